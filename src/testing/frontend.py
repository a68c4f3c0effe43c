"""The frontend's side of a vhost-user connection (QEMU docs/interop/vhost-user.rst)."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from ..errors import FrontendError
from ..worker.vhost_user import message
from ..worker.vhost_user.message import (
    HEADER_SIZE,
    BackendRequest,
    ConfigSpan,
    Direction,
    Header,
    InflightArea,
    LogArea,
    ProtocolFeature,
    Region,
    Request,
    StateTransfer,
    VringAddr,
    VringFd,
    VringState,
)
from .driver import RingDriver
from .errors import DeviceError, NackError
from .features import DRIVER_FEATURES, Feature
from .memory import GuestMemory
from .queue import CallAs, Queue, wait_readable

#: What the mock frontend accepts when it is offered: everything there is a name for.
FRONTEND_FEATURES = reduce(or_, ProtocolFeature)

_MOST_FDS = 253  # the kernel's limit, SCM_MAX_FD

_PIPE = 1 << 16

_T = TypeVar("_T")


class Message(NamedTuple):
    """A message received; the caller owns `fds`."""

    header: Header
    payload: bytes
    fds: list[int]


class Frontend:
    """A connection to a backend, for use in a `with` block.

    `target` is the backend's socket path, or a connected socket, which is taken over. Everything
    that waits gives up after `timeout` seconds with TimeoutError, naming what it waited for, and
    raises ConnectionError when the backend hangs up. A malformed or unexpected answer is a
    DeviceError, a refusal a NackError.

    `queues` holds what `start_queue` started. After `negotiate`, `features` and
    `protocol_features` are what both sides agreed on.

    The backend's own messages are taken by `recv_backend`, or with the calls of in-band queues:
    `config_changes` counts those of that kind, `broken` are the rings of VRING_ERR. What asks for
    an answer gets one, unless `answers` is false. `inflight` is the area of GET_INFLIGHT_FD and its
    descriptor; it outlives connections, for `reconnect`.
    """

    def __init__(self, target: str | socket.socket, *, timeout: float = 10.0) -> None:
        self.timeout = timeout
        self.offered = 0
        self.features = 0
        self.protocol_features = 0
        self.queues: dict[int, Queue] = {}
        self.backend_channel: socket.socket | None = None
        self.config_changes = 0
        self.broken: list[int] = []
        self.answers = True
        self.inflight: tuple[InflightArea, int] | None = None
        self.conversation: Callable[[Frontend], None] | None = None
        self.path = target if isinstance(target, str) else None
        self.socket = _connect(target, timeout) if isinstance(target, str) else target
        self.socket.settimeout(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        self.forget_inflight()

    def close(self) -> None:
        """Close the connection and every notifier at once, without a word, as if killed.

        Memory and rings stay as they are, for `reconnect`.
        """
        self.socket.close()
        if self.backend_channel is not None:
            self.backend_channel.close()
            self.backend_channel = None
        for queue in self.queues.values():
            queue.close()

    def reconnect(self, target: str | socket.socket | None = None) -> None:
        """Close, connect again, and repeat the conversation with the same memory and rings.

        Each ring goes on at its used.idx. A frontend that was not made by one of the ready-made
        conversations is only connected: negotiate and start its queues again. Raises ValueError
        when the first connection was no path and `target` is not given.
        """
        self.close()
        target = self.path if target is None else target
        if target is None:
            raise ValueError("the first connection had no path: say where to connect to")
        self.socket = _connect(target, self.timeout) if isinstance(target, str) else target
        self.socket.settimeout(self.timeout)
        self.features = self.protocol_features = 0
        if self.conversation is not None:
            self.conversation(self)

    # Bytes and messages.

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are, with descriptors on the first of them."""
        sent = socket.send_fds(self.socket, [data], list(fds)) if fds else 0
        if sent < len(data):
            self.socket.sendall(data[sent:])

    def recv_raw(self, count: int = 1 << 16, *, what: str = "bytes") -> tuple[bytes, list[int]]:
        """Return what the backend sent, at most `count` bytes, b"" at its hang-up, and descriptors.

        The caller owns the descriptors.
        """
        return _receive(self.socket, count, time.monotonic() + self.timeout, what)

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
    ) -> None:
        """Send one message."""
        self.send_raw(message.encode(request, payload, need_reply=need_reply), fds)

    def recv(self, what: str = "a message") -> Message:
        """Return the backend's next message on the main connection."""
        return _receive_message(self.socket, self.timeout, what)

    def request(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        with_fd: bool = False,
        need_reply: bool = False,
    ) -> Message:
        """Send a message that has an answer of its own, and return the answer.

        `need_reply`, which some frontends set on every message, changes nothing. Raises DeviceError
        when the answer is another message, no reply, or has descriptors that `with_fd` does not
        allow.
        """
        self.send(request, payload, fds, need_reply=need_reply)
        return self.reply_to(request, with_fd=with_fd)

    def reply_to(self, request: int, *, with_fd: bool = False) -> Message:
        """Return the answer to `request`, checked as `request` says."""
        name = _name(request)
        answer = self.recv(f"the answer to {name}")
        if answer.header.request != request or not answer.header.reply or answer.header.need_reply:
            _close_all(answer.fds)
            raise DeviceError(f"the answer to {name} has the header {answer.header}")
        if answer.fds and not with_fd:
            _close_all(answer.fds)
            raise DeviceError(f"the answer to {name} has {len(answer.fds)} descriptors")
        return answer

    def tell(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        ack: bool | None = None,
    ) -> None:
        """Send a message that has no answer of its own.

        `ack` asks for an acknowledgement and waits for it; by default where REPLY_ACK was
        negotiated. Raises NackError when the backend refuses.
        """
        if ack is None:
            ack = bool(self.protocol_features & ProtocolFeature.REPLY_ACK)
        self.send(request, payload, fds, need_reply=ack)
        if ack:
            status = _u64(self.reply_to(request), request)
            if status:
                raise NackError(_name(request), status)

    def wait_closed(self) -> None:
        """Wait until the backend hangs up. Raises DeviceError when it says something instead."""
        try:
            data, fds = self.recv_raw(what="the backend's hang-up")
        except ConnectionError:
            return
        if data:
            _close_all(fds)
            raise DeviceError(f"the backend sent {data!r} instead of hanging up")

    def barrier(self) -> None:
        """Return once the backend has handled every message sent before."""
        self.get_features()

    # One method a message; sizes and addresses in bytes.

    def get_features(self) -> int:
        """GET_FEATURES: the virtio features on offer."""
        return self._get_u64(Request.GET_FEATURES)

    def set_features(self, features: int, *, ack: bool | None = None) -> None:
        """SET_FEATURES."""
        self.tell(Request.SET_FEATURES, message.encode_u64(features), ack=ack)
        self.features = features

    def get_protocol_features(self) -> int:
        """GET_PROTOCOL_FEATURES."""
        return self._get_u64(Request.GET_PROTOCOL_FEATURES)

    def set_protocol_features(self, features: int, *, ack: bool = False) -> None:
        """SET_PROTOCOL_FEATURES."""
        self.tell(Request.SET_PROTOCOL_FEATURES, message.encode_u64(features), ack=ack)
        self.protocol_features = features

    def set_owner(self, *, ack: bool | None = None) -> None:
        """SET_OWNER."""
        self.tell(Request.SET_OWNER, ack=ack)

    def reset_owner(self, *, ack: bool | None = None) -> None:
        """RESET_OWNER, which the protocol deprecates."""
        self.tell(Request.RESET_OWNER, ack=ack)

    def reset_device(self, *, ack: bool | None = None) -> None:
        """RESET_DEVICE."""
        self.tell(Request.RESET_DEVICE, ack=ack)

    def set_status(self, status: int, *, ack: bool | None = None) -> None:
        """SET_STATUS: the virtio device status."""
        self.tell(Request.SET_STATUS, message.encode_u64(status), ack=ack)

    def get_status(self) -> int:
        """GET_STATUS."""
        return self._get_u64(Request.GET_STATUS)

    def add_status(self, status: int) -> None:
        """Set bits of the device status as QEMU does: read, then write what is new."""
        before = self.get_status()
        if before | status != before:
            self.set_status(before | status, ack=False)

    def get_queue_num(self) -> int:
        """GET_QUEUE_NUM: how many queues there can be."""
        return self._get_u64(Request.GET_QUEUE_NUM)

    def set_memory(
        self, memory: GuestMemory, *, slots: int | None = None, ack: bool | None = None
    ) -> None:
        """SET_MEM_TABLE; the payload has room for `slots` regions, by default what it needs."""
        regions = memory.regions()
        payload = message.encode_regions([region for region, _ in regions])
        if slots is not None:
            payload = payload.ljust(8 + 32 * slots, b"\0")
        self.tell(Request.SET_MEM_TABLE, payload, [fd for _, fd in regions], ack=ack)

    def get_max_mem_slots(self) -> int:
        """GET_MAX_MEM_SLOTS."""
        return self._get_u64(Request.GET_MAX_MEM_SLOTS)

    def add_mem_reg(self, region: Region, fd: int, *, ack: bool | None = None) -> None:
        """ADD_MEM_REG."""
        self.tell(Request.ADD_MEM_REG, message.encode_region(region), [fd], ack=ack)

    def rem_mem_reg(
        self, region: Region, fd: int | None = None, *, ack: bool | None = None
    ) -> None:
        """REM_MEM_REG; some frontends send a descriptor along."""
        fds = [] if fd is None else [fd]
        self.tell(Request.REM_MEM_REG, message.encode_region(region), fds, ack=ack)

    def add_memory(self, memory: GuestMemory, *, ack: bool | None = None) -> None:
        """ADD_MEM_REG for each region, as a frontend with CONFIGURE_MEM_SLOTS does."""
        for region, fd in memory.regions():
            self.add_mem_reg(region, fd, ack=ack)

    def set_vring_num(self, ring: int, size: int, *, ack: bool | None = None) -> None:
        """SET_VRING_NUM: how many descriptors the ring has."""
        self.tell(Request.SET_VRING_NUM, VringState(ring, size).encode(), ack=ack)

    def set_vring_base(self, ring: int, base: int, *, ack: bool | None = None) -> None:
        """SET_VRING_BASE: the next available index the backend shall look at."""
        self.tell(Request.SET_VRING_BASE, VringState(ring, base).encode(), ack=ack)

    def get_vring_base(self, ring: int) -> int:
        """GET_VRING_BASE: stop the ring; return the next available index."""
        answer = self.request(Request.GET_VRING_BASE, VringState(ring, 0).encode())
        state = _decoded(VringState.decode, answer.payload, Request.GET_VRING_BASE)
        if state.ring != ring:
            raise DeviceError(f"GET_VRING_BASE of ring {ring} was answered for ring {state.ring}")
        return state.num

    def set_vring_addr(
        self,
        ring: int,
        desc: int,
        used: int,
        avail: int,
        log: int = 0,
        *,
        flags: int = 0,
        ack: bool | None = None,
    ) -> None:
        """SET_VRING_ADDR, in the frontend's own addresses."""
        payload = VringAddr(ring, flags, desc, used, avail, log).encode()
        self.tell(Request.SET_VRING_ADDR, payload, ack=ack)

    def vring_kick(self, ring: int, *, ack: bool | None = None) -> None:
        """VRING_KICK: a kick as a message, served before it is acknowledged."""
        self.tell(Request.VRING_KICK, VringState(ring, 0).encode(), ack=ack)

    def set_vring_kick(self, ring: int, fd: int | None, *, ack: bool | None = None) -> None:
        """SET_VRING_KICK; None: the backend shall poll."""
        self._vring_fd(Request.SET_VRING_KICK, ring, fd, ack)

    def set_vring_call(self, ring: int, fd: int | None, *, ack: bool | None = None) -> None:
        """SET_VRING_CALL; None: the backend shall not call."""
        self._vring_fd(Request.SET_VRING_CALL, ring, fd, ack)

    def set_vring_err(self, ring: int, fd: int | None, *, ack: bool | None = None) -> None:
        """SET_VRING_ERR."""
        self._vring_fd(Request.SET_VRING_ERR, ring, fd, ack)

    def set_vring_enable(self, ring: int, enabled: bool, *, ack: bool | None = None) -> None:
        """SET_VRING_ENABLE."""
        self.tell(Request.SET_VRING_ENABLE, VringState(ring, int(enabled)).encode(), ack=ack)

    def get_config(self, offset: int = 0, size: int = 12) -> bytes:
        """GET_CONFIG: `size` bytes of configuration space. Raises DeviceError on a refusal."""
        payload = ConfigSpan(offset, 0, bytes(size)).encode()
        answer = self.request(Request.GET_CONFIG, payload)
        span = _decoded(ConfigSpan.decode, answer.payload, Request.GET_CONFIG)
        if span.offset != offset or len(span.data) != size:
            raise DeviceError(f"GET_CONFIG of {size} bytes at {offset} was answered with {span}")
        return span.data

    def set_config(
        self, offset: int, data: bytes, *, flags: int = 0, ack: bool | None = None
    ) -> None:
        """SET_CONFIG."""
        self.tell(Request.SET_CONFIG, ConfigSpan(offset, flags, data).encode(), ack=ack)

    def set_backend_req_fd(self, *, ack: bool | None = None) -> None:
        """SET_BACKEND_REQ_FD; the frontend's end is `backend_channel`."""
        if self.backend_channel is not None:
            self.backend_channel.close()
        self.backend_channel, theirs = socket.socketpair()
        with theirs:
            self.tell(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()], ack=ack)

    def recv_backend(self) -> Message:
        """Return the backend's next message on its own channel, counted and answered."""
        if self.backend_channel is None:
            raise ValueError("there is no backend channel: set_backend_req_fd makes one")
        message_ = _receive_message(self.backend_channel, self.timeout, "a backend's request")
        request, _size, reply, need_reply = message_.header
        if reply:
            raise DeviceError(f"message {request} of the backend is a reply to nothing")
        match request:
            case BackendRequest.CONFIG_CHANGE_MSG:
                self.config_changes += 1
            case BackendRequest.VRING_CALL:
                ring = _decoded(VringState.decode, message_.payload, request).ring
                if ring in self.queues:
                    self.queues[ring].called += 1
            case BackendRequest.VRING_ERR:
                self.broken.append(_decoded(VringState.decode, message_.payload, request).ring)
            case _:
                raise DeviceError(f"there is no message {request} from backends")
        if need_reply and self.answers:
            answer = message.encode(request, message.encode_u64(0), reply=True)
            self.backend_channel.sendall(answer)
        return message_

    # What a queue without descriptors of its own needs; see `queue.Inband`.

    def kick_inband(self, ring: int) -> None:
        """Kick a ring by a message."""
        self.vring_kick(ring)

    def calls_fd(self) -> int | None:
        """Return what is readable once the backend says something on its channel."""
        return None if self.backend_channel is None else self.backend_channel.fileno()

    def take_backend(self) -> None:
        """Take whatever the backend has said on its channel."""
        while self.backend_channel is not None:
            readable, _, _ = select.select([self.backend_channel], [], [], 0)
            if not readable:
                return
            try:
                self.recv_backend()
            except ConnectionError:
                self.backend_channel.close()
                self.backend_channel = None

    # Migration.

    def set_log_base(self, area: LogArea, fd: int) -> None:
        """SET_LOG_BASE: where the bitmap of written pages is."""
        self.request(Request.SET_LOG_BASE, area.encode(), [fd])

    def set_log_fd(self, fd: int, *, ack: bool | None = None) -> None:
        """SET_LOG_FD: what to signal when the bitmap has changed."""
        self.tell(Request.SET_LOG_FD, fds=[fd], ack=ack)

    def start_log(self, area: LogArea, fd: int) -> None:
        """Let the backend log what it writes, into a bitmap, as QEMU does at a migration's start.

        The used rings are logged where they are.
        """
        self.set_log_base(area, fd)
        self.set_features(self.features | Feature.LOG_ALL)
        for queue in self.queues.values():
            self._set_addr(queue, message.VRING_F_LOG, queue.driver.used_addr, None)

    def stop_log(self) -> None:
        """Let the backend log no more."""
        self.set_features(self.features & ~Feature.LOG_ALL)
        for queue in self.queues.values():
            self._set_addr(queue, 0, 0, None)

    def get_inflight_fd(
        self, queues: int, queue_size: int, *, need_reply: bool = False
    ) -> InflightArea:
        """GET_INFLIGHT_FD; what came is kept in `inflight`, unless the backend has no area."""
        self.forget_inflight()
        answer = self.request(
            Request.GET_INFLIGHT_FD,
            InflightArea(0, 0, queues, queue_size).encode(),
            with_fd=True,
            need_reply=need_reply,
        )
        area = _decoded(InflightArea.decode, answer.payload, Request.GET_INFLIGHT_FD)
        if len(answer.fds) != bool(area.size):
            _close_all(answer.fds)
            raise DeviceError(f"GET_INFLIGHT_FD has {len(answer.fds)} descriptors with {area}")
        if answer.fds:
            self.inflight = area, answer.fds[0]
        return area

    def set_inflight_fd(self, area: InflightArea, fd: int, *, ack: bool | None = None) -> None:
        """SET_INFLIGHT_FD."""
        self.tell(Request.SET_INFLIGHT_FD, area.encode(), [fd], ack=ack)

    def forget_inflight(self) -> None:
        """Close the descriptor of the area for buffers in flight."""
        if self.inflight is not None:
            os.close(self.inflight[1])
            self.inflight = None

    def set_device_state_fd(self, direction: int, fd: int, *, phase: int = 0) -> int:
        """SET_DEVICE_STATE_FD; return the answer, 0x100 when the backend will use `fd`."""
        payload = StateTransfer(direction, phase).encode()
        return _u64(
            self.request(Request.SET_DEVICE_STATE_FD, payload, [fd]), Request.SET_DEVICE_STATE_FD
        )

    def check_device_state(self) -> int:
        """CHECK_DEVICE_STATE: 0 when the last state was moved whole."""
        return self._get_u64(Request.CHECK_DEVICE_STATE)

    def save_state(self) -> bytes:
        """Return the device's state, as a frontend that migrates away reads it.

        Raises NackError when the backend does not want to give it, or could not.
        """
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                self._transfer(Direction.SAVE, theirs)
            finally:
                os.close(theirs)
            deadline = time.monotonic() + self.timeout
            parts = []
            while True:
                wait_readable([ours], deadline, "the rest of the device's state")
                data = os.read(ours, _PIPE)
                if not data:
                    break
                parts.append(data)
        finally:
            os.close(ours)
        self._check_transfer()
        return b"".join(parts)

    def load_state(self, state: bytes) -> None:
        """Give the device a state, as a frontend that was migrated to writes it.

        Raises NackError when the backend does not take it.
        """
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                self._transfer(Direction.LOAD, theirs)
            finally:
                os.close(theirs)
            os.set_blocking(ours, False)
            deadline = time.monotonic() + self.timeout
            rest = memoryview(state)
            while rest:
                poll = select.poll()
                poll.register(ours, select.POLLOUT)
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise TimeoutError("room for the device's state did not come in time")
                try:
                    rest = rest[os.write(ours, rest[:_PIPE]) :]
                except BrokenPipeError:
                    break  # the backend has seen enough; it says why when it is asked
        finally:
            os.close(ours)
        self._check_transfer()

    def _transfer(self, direction: Direction, fd: int) -> None:
        answer = self.set_device_state_fd(direction, fd)
        if answer != message.NO_FD:
            raise NackError(_name(Request.SET_DEVICE_STATE_FD), answer)

    def _check_transfer(self) -> None:
        outcome = self.check_device_state()
        if outcome:
            raise NackError(_name(Request.CHECK_DEVICE_STATE), outcome)

    # Steps of a conversation.

    def negotiate(
        self, features: int = DRIVER_FEATURES, protocol: int = FRONTEND_FEATURES
    ) -> tuple[int, int]:
        """Agree on what both sides can do, become owner, and return both sets of features."""
        self.offered = self.get_features()
        if self.offered & Feature.PROTOCOL_FEATURES:
            self.set_protocol_features(self.get_protocol_features() & protocol)
        self.set_owner()
        self.set_features(self.offered & features)
        return self.features, self.protocol_features

    def start_queue(
        self,
        index: int,
        driver: RingDriver,
        *,
        call_as: CallAs = "eventfd",
        base: int | None = None,
        enable: bool = True,
    ) -> Queue:
        """Start a ring at `base`, by default where it goes on, and return it with its notifiers.

        A driver that was started before goes on where it was. With `call_as` "inband" it has no
        descriptors, and starts at its first kick. `enable` also enables the ring, when that can be
        said (bit 30 negotiated).
        """
        queue = self.queue(index, driver)
        driver.set_features(self.features)
        self.describe_queue(queue, base=base)
        if call_as == "inband":
            queue.inband = self
        else:
            self.give_call(queue, call_as)
            self.set_vring_kick(index, queue.new_kick_fd())
        if enable and self.features & Feature.PROTOCOL_FEATURES:
            self.enable(index)
        return queue

    def queue(self, index: int, driver: RingDriver) -> Queue:
        """Return queue `index`, made for `driver` unless it is that driver's already."""
        queue = self.queues.get(index)
        if queue is None or queue.driver is not driver:
            if queue is not None:
                queue.close()
            queue = self.queues[index] = Queue(index, driver)
        return queue

    def describe_queue(
        self, queue: Queue, *, base: int | None = None, log: int = 0, ack: bool | None = None
    ) -> None:
        """Say how large the ring is, where it goes on and where it lies: NUM, BASE, ADDR."""
        driver = queue.driver
        self.set_vring_num(queue.index, driver.size, ack=ack)
        self.set_vring_base(queue.index, driver.base if base is None else base, ack=ack)
        self._set_addr(queue, 0, log, ack)

    def _set_addr(self, queue: Queue, flags: int, log: int, ack: bool | None) -> None:
        driver = queue.driver
        self.set_vring_addr(
            queue.index,
            driver.memory.user_addr(driver.desc_addr),
            driver.memory.user_addr(driver.used_addr),
            driver.memory.user_addr(driver.avail_addr),
            log,
            flags=flags,
            ack=ack,
        )

    def give_call(self, queue: Queue, call_as: CallAs, *, ack: bool | None = None) -> None:
        """Send a fresh call descriptor for the queue; `call_as` is not "inband"."""
        fd = queue.new_call_fd(call_as)
        try:
            self.set_vring_call(queue.index, fd, ack=ack)
        finally:
            os.close(fd)

    def enable(self, index: int) -> None:
        """Enable a ring."""
        self.set_vring_enable(index, True)

    def disable(self, index: int) -> None:
        """Disable a ring; it stays started."""
        self.set_vring_enable(index, False)

    def stop_queue(self, index: int) -> int:
        """Stop a ring, close its notifiers and return the index at which it can go on."""
        base = self.get_vring_base(index)
        self.queues[index].close()
        return base

    def _get_u64(self, request: Request) -> int:
        return _u64(self.request(request), request)

    def _vring_fd(self, request: Request, ring: int, fd: int | None, ack: bool | None) -> None:
        payload = VringFd(ring, fd is not None).encode()
        self.tell(request, payload, [] if fd is None else [fd], ack=ack)


def _name(request: int) -> str:
    try:
        return Request(request).name
    except ValueError:
        return f"message {request}"


def _u64(answer: Message, request: int) -> int:
    return _decoded(message.decode_u64, answer.payload, request)


def _decoded(decode: Callable[[bytes], _T], payload: bytes, request: int) -> _T:
    try:
        return decode(payload)
    except FrontendError as error:
        raise DeviceError(f"the answer to {_name(request)} is malformed: {error}") from error


def _connect(path: str, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def _receive(
    connection: socket.socket, count: int, deadline: float, what: str
) -> tuple[bytes, list[int]]:
    connection.settimeout(max(0.001, deadline - time.monotonic()))
    try:
        data, fds, flags, _ = socket.recv_fds(connection, count, _MOST_FDS, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError:
        raise TimeoutError(f"{what} did not come in time") from None
    if flags & socket.MSG_CTRUNC:
        _close_all(fds)
        raise DeviceError("the backend sent more descriptors than can be received")
    return data, fds


def _receive_message(connection: socket.socket, timeout: float, what: str) -> Message:
    deadline = time.monotonic() + timeout
    fds: list[int] = []

    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            part, more = _receive(connection, count - len(data), deadline, what)
            fds.extend(more)
            if not part:
                raise ConnectionError(f"the backend hung up when {what} was due")
            data += part
        return data

    try:
        header = message.decode_header(exactly(HEADER_SIZE))
        return Message(header, exactly(header.size), fds)
    except BaseException as error:
        _close_all(fds)
        if isinstance(error, FrontendError):
            raise DeviceError(f"{what} is malformed: {error}") from error
        raise


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
