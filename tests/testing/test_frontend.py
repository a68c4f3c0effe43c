"""The frontend's messages, byte for byte, and what it makes of the answers."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vhost_device_console.testing import (
    DeviceError,
    Frontend,
    GuestMemory,
    NackError,
    SplitDriver,
)
from vhost_device_console.worker.vhost_user.message import InflightArea, LogArea, Region

Serve = Callable[..., tuple[Any, socket.socket]]


def h(text: str) -> bytes:
    return bytes.fromhex(text)


@pytest.fixture
def pair() -> Iterator[tuple[Frontend, socket.socket]]:
    """Give a frontend with a short timeout and the socket it talks to."""
    ours, theirs = socket.socketpair()
    with Frontend(ours, timeout=0.05) as frontend, theirs:
        yield frontend, theirs


Act = Callable[[Frontend], object]
REGION = Region(0x1000, 0x2000, 0x3000, 0x4000)
REGION_BYTES = "00100000 00000000 00200000 00000000 00300000 00000000 00400000 00000000"

TOLD: dict[str, tuple[Act, str, int]] = {
    "SET_FEATURES": (
        lambda f: f.set_features(0x1_7000_0002),
        "02000000 01000000 08000000 02000070 01000000",
        0,
    ),
    "SET_OWNER": (lambda f: f.set_owner(), "03000000 01000000 00000000", 0),
    "RESET_OWNER": (lambda f: f.reset_owner(), "04000000 01000000 00000000", 0),
    "SET_VRING_NUM": (
        lambda f: f.set_vring_num(3, 256),
        "08000000 01000000 08000000 03000000 00010000",
        0,
    ),
    "SET_VRING_ADDR": (
        lambda f: f.set_vring_addr(1, 0x10, 0x30, 0x20, 0x40, flags=1),
        "09000000 01000000 28000000 01000000 01000000"
        "1000000000000000 3000000000000000 2000000000000000 4000000000000000",
        0,
    ),
    "SET_VRING_BASE": (
        lambda f: f.set_vring_base(2, 65530),
        "0a000000 01000000 08000000 02000000 faff0000",
        0,
    ),
    "SET_VRING_KICK": (
        lambda f: f.set_vring_kick(2, 0),
        "0c000000 01000000 08000000 02000000 00000000",
        1,
    ),
    "SET_VRING_KICK for polling": (
        lambda f: f.set_vring_kick(2, None),
        "0c000000 01000000 08000000 02010000 00000000",
        0,
    ),
    "SET_VRING_CALL": (
        lambda f: f.set_vring_call(1, 0),
        "0d000000 01000000 08000000 01000000 00000000",
        1,
    ),
    "SET_VRING_ERR": (
        lambda f: f.set_vring_err(1, 0),
        "0e000000 01000000 08000000 01000000 00000000",
        1,
    ),
    "SET_PROTOCOL_FEATURES": (
        lambda f: f.set_protocol_features(0x229),
        "10000000 01000000 08000000 29020000 00000000",
        0,
    ),
    "SET_VRING_ENABLE": (
        lambda f: f.set_vring_enable(3, True),
        "12000000 01000000 08000000 03000000 01000000",
        0,
    ),
    "SET_BACKEND_REQ_FD": (
        lambda f: f.set_backend_req_fd(),
        "15000000 01000000 00000000",
        1,
    ),
    "SET_CONFIG": (
        lambda f: f.set_config(8, b"abcd", flags=1),
        "19000000 01000000 10000000 08000000 04000000 01000000 61626364",
        0,
    ),
    "SET_LOG_FD": (lambda f: f.set_log_fd(0), "07000000 01000000 00000000", 1),
    "SET_INFLIGHT_FD": (
        lambda f: f.set_inflight_fd(InflightArea(0x1000, 0x20, 4, 64), 0),
        "20000000 01000000 18000000 0010000000000000 2000000000000000 0400 4000 00000000",
        1,
    ),
    "VRING_KICK": (
        lambda f: f.vring_kick(3),
        "23000000 01000000 08000000 03000000 00000000",
        0,
    ),
    "SET_STATUS": (
        lambda f: f.set_status(15),
        "27000000 01000000 08000000 0f000000 00000000",
        0,
    ),
    "REM_MEM_REG with a descriptor": (
        lambda f: f.rem_mem_reg(REGION, 0),
        "26000000 01000000 28000000 00000000 00000000" + REGION_BYTES,
        1,
    ),
    "RESET_DEVICE": (lambda f: f.reset_device(), "22000000 01000000 00000000", 0),
    "ADD_MEM_REG": (
        lambda f: f.add_mem_reg(REGION, 0),
        "25000000 01000000 28000000 00000000 00000000" + REGION_BYTES,
        1,
    ),
    "REM_MEM_REG": (
        lambda f: f.rem_mem_reg(REGION),
        "26000000 01000000 28000000 00000000 00000000" + REGION_BYTES,
        0,
    ),
}

ASKED: dict[str, tuple[Act, str, str, object]] = {
    "GET_FEATURES": (
        lambda f: f.get_features(),
        "01000000 01000000 00000000",
        "01000000 05000000 08000000 02000070 01000000",
        0x1_7000_0002,
    ),
    "GET_VRING_BASE": (
        lambda f: f.get_vring_base(3),
        "0b000000 01000000 08000000 03000000 00000000",
        "0b000000 05000000 08000000 03000000 07000000",
        7,
    ),
    "GET_PROTOCOL_FEATURES": (
        lambda f: f.get_protocol_features(),
        "0f000000 01000000 00000000",
        "0f000000 05000000 08000000 29020000 00000000",
        0x229,
    ),
    "GET_QUEUE_NUM": (
        lambda f: f.get_queue_num(),
        "11000000 01000000 00000000",
        "11000000 05000000 08000000 04000000 00000000",
        4,
    ),
    "GET_CONFIG": (
        lambda f: f.get_config(4, 4),
        "18000000 01000000 10000000 04000000 04000000 00000000 00000000",
        "18000000 05000000 10000000 04000000 04000000 00000000 01000000",
        b"\x01\0\0\0",
    ),
    "SET_LOG_BASE": (
        lambda f: f.set_log_base(LogArea(0x1000, 0x20), 0),
        "06000000 01000000 10000000 0010000000000000 2000000000000000",
        "06000000 05000000 00000000",
        None,
    ),
    "GET_STATUS": (
        lambda f: f.get_status(),
        "28000000 01000000 00000000",
        "28000000 05000000 08000000 4f000000 00000000",
        0x4F,
    ),
    "SET_DEVICE_STATE_FD": (
        lambda f: f.set_device_state_fd(1, 0),
        "2a000000 01000000 08000000 01000000 00000000",
        "2a000000 05000000 08000000 00010000 00000000",
        0x100,
    ),
    "CHECK_DEVICE_STATE": (
        lambda f: f.check_device_state(),
        "2b000000 01000000 00000000",
        "2b000000 05000000 08000000 01000000 00000000",
        1,
    ),
    "GET_INFLIGHT_FD of a backend that has none": (
        lambda f: f.get_inflight_fd(4, 64),
        "1f000000 01000000 18000000 0000000000000000 0000000000000000 0400 4000 00000000",
        "1f000000 05000000 18000000 0000000000000000 0000000000000000 0400 4000 00000000",
        (0, 0, 4, 64),
    ),
    "GET_MAX_MEM_SLOTS": (
        lambda f: f.get_max_mem_slots(),
        "24000000 01000000 00000000",
        "24000000 05000000 08000000 20000000 00000000",
        32,
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_told_messages(pair: tuple[Frontend, socket.socket], name: str) -> None:
    """A message without an answer is sent as the specification lays it out."""
    frontend, peer = pair
    act, expected, count = TOLD[name]
    act(frontend)
    data, fds, _, _ = socket.recv_fds(peer, 4096, 8)
    for fd in fds:
        os.close(fd)
    assert (data, len(fds)) == (h(expected), count)


@pytest.mark.parametrize("name", ASKED)
def test_asked_messages(pair: tuple[Frontend, socket.socket], name: str) -> None:
    """A message with an answer is sent as the specification lays it out, and its answer read."""
    frontend, peer = pair
    act, question, answer, value = ASKED[name]
    peer.sendall(h(answer))
    assert act(frontend) == value
    assert peer.recv(4096) == h(question)


@pytest.mark.parametrize(("slots", "size"), [(None, 40), (2, 72)])
def test_memory_table(pair: tuple[Frontend, socket.socket], slots: int | None, size: int) -> None:
    """A memory table is padded to the slots asked for, and has each region's descriptor."""
    frontend, peer = pair
    with GuestMemory([Region(0x1000, 0x1000, 0x7000, 0x2000)]) as memory:
        frontend.set_memory(memory, slots=slots)
        data, (fd,), _, _ = socket.recv_fds(peer, 4096, 8)
        os.close(fd)
    expected = h(
        f"05000000 01000000 {size:02x}000000 01000000 00000000"
        "0010000000000000 0010000000000000 0070000000000000 0020000000000000"
    )
    assert data == expected.ljust(12 + size, b"\0")


def test_ack_is_asked_for(pair: tuple[Frontend, socket.socket]) -> None:
    """An acknowledged message has the need_reply bit."""
    frontend, peer = pair
    peer.sendall(h("03000000 05000000 08000000 00000000 00000000"))
    frontend.set_owner(ack=True)
    assert peer.recv(4096) == h("03000000 09000000 00000000")


def test_ack_follows_the_negotiation(pair: tuple[Frontend, socket.socket]) -> None:
    """Once REPLY_ACK is negotiated, every message asks for its acknowledgement."""
    frontend, peer = pair
    frontend.set_protocol_features(1 << 3)
    peer.recv(4096)
    peer.sendall(h("03000000 05000000 08000000 00000000 00000000"))
    frontend.set_owner()
    assert peer.recv(4096) == h("03000000 09000000 00000000")


def test_refusal(pair: tuple[Frontend, socket.socket]) -> None:
    """A status other than zero is an error that names the message."""
    frontend, peer = pair
    peer.sendall(h("08000000 05000000 08000000 16000000 00000000"))
    with pytest.raises(NackError, match="refused SET_VRING_NUM with status 22"):
        frontend.set_vring_num(0, 3, ack=True)


def test_no_answer(pair: tuple[Frontend, socket.socket]) -> None:
    """A missing answer is a TimeoutError that names it."""
    with pytest.raises(TimeoutError, match="the answer to GET_FEATURES"):
        pair[0].get_features()


def test_half_an_answer(pair: tuple[Frontend, socket.socket]) -> None:
    """An answer cut short is a TimeoutError too."""
    frontend, peer = pair
    peer.sendall(h("01000000 05000000 08000000 0000"))
    with pytest.raises(TimeoutError, match="the answer to GET_FEATURES"):
        frontend.get_features()


def test_hang_up_instead_of_an_answer(pair: tuple[Frontend, socket.socket]) -> None:
    """A hang-up is a ConnectionError that names what was due."""
    frontend, peer = pair
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError, match="the answer to GET_FEATURES"):
        frontend.get_features()


@pytest.mark.parametrize(
    "answer",
    [
        "02000000 05000000 08000000 00000000 00000000",
        "01000000 01000000 08000000 00000000 00000000",
        "01000000 0d000000 08000000 00000000 00000000",
        "01000000 06000000 08000000 00000000 00000000",
        "01000000 05000000 04000000 00000000",
        "01000000 05000000 01100000",
    ],
    ids=["other request", "no reply", "need_reply", "version 2", "size 4", "oversize"],
)
def test_wrong_answer(pair: tuple[Frontend, socket.socket], answer: str) -> None:
    """An answer that is not the one due is the backend's fault."""
    frontend, peer = pair
    peer.sendall(h(answer))
    with pytest.raises(DeviceError, match="the answer to GET_FEATURES"):
        frontend.get_features()


def test_answer_with_descriptors(pair: tuple[Frontend, socket.socket]) -> None:
    """Descriptors with an answer that has none are closed and are the backend's fault."""
    frontend, peer = pair
    answer = h("01000000 05000000 08000000 00000000 00000000")
    before = set(os.listdir("/proc/self/fd"))
    socket.send_fds(peer, [answer], [0, 0])
    with pytest.raises(DeviceError, match="2 descriptors"):
        frontend.get_features()
    assert set(os.listdir("/proc/self/fd")) == before


def test_answer_for_another_ring(pair: tuple[Frontend, socket.socket]) -> None:
    """GET_VRING_BASE must be answered for its own ring."""
    frontend, peer = pair
    peer.sendall(h("0b000000 05000000 08000000 01000000 00000000"))
    with pytest.raises(DeviceError, match="ring 3 was answered for ring 1"):
        frontend.get_vring_base(3)


def test_config_of_another_size(pair: tuple[Frontend, socket.socket]) -> None:
    """GET_CONFIG must be answered with exactly what was asked for."""
    frontend, peer = pair
    peer.sendall(h("18000000 05000000 0c000000 00000000 00000000 00000000"))
    with pytest.raises(DeviceError, match="GET_CONFIG of 12 bytes"):
        frontend.get_config()


def test_raw_bytes_and_descriptors(pair: tuple[Frontend, socket.socket]) -> None:
    """Any bytes and descriptors can be sent."""
    frontend, peer = pair
    frontend.send_raw(b"\xff\xfe", [0] * 253)
    data, fds, _, _ = socket.recv_fds(peer, 4096, 253)
    for fd in fds:
        os.close(fd)
    assert (data, len(fds)) == (b"\xff\xfe", 253)


def test_raw_receive(pair: tuple[Frontend, socket.socket]) -> None:
    """Any bytes can be received."""
    frontend, peer = pair
    peer.sendall(b"\xff\xfe")
    assert frontend.recv_raw() == (b"\xff\xfe", [])


def test_wait_closed(pair: tuple[Frontend, socket.socket]) -> None:
    """A hang-up can be waited for."""
    frontend, peer = pair
    peer.shutdown(socket.SHUT_WR)
    frontend.wait_closed()


def test_wait_closed_in_vain(pair: tuple[Frontend, socket.socket]) -> None:
    """A backend that does not hang up is a TimeoutError."""
    with pytest.raises(TimeoutError, match="hang-up"):
        pair[0].wait_closed()


def test_wait_closed_hears_something(pair: tuple[Frontend, socket.socket]) -> None:
    """A backend that speaks instead is at fault."""
    frontend, peer = pair
    peer.sendall(b"?")
    with pytest.raises(DeviceError, match="instead of hanging up"):
        frontend.wait_closed()


def test_no_socket(tmp_path: object) -> None:
    """A path where nothing is raises the system's own error."""
    with pytest.raises(FileNotFoundError):
        Frontend(f"{tmp_path}/none")


def test_close_gives_up_every_descriptor() -> None:
    """After close no descriptor of the frontend's is left."""
    with GuestMemory() as memory:
        before = set(os.listdir("/proc/self/fd"))
        ours, theirs = socket.socketpair()
        with theirs:
            frontend = Frontend(ours)
            queue = frontend.queue(0, SplitDriver(memory, 8))
            queue.new_kick_fd()
            os.close(queue.new_call_fd("eventfd"))
            os.close(queue.new_call_fd("socketpair"))
            frontend.set_backend_req_fd(ack=False)
            _, (fd,), _, _ = socket.recv_fds(theirs, 4096, 8)
            os.close(fd)
            frontend.close()
        assert set(os.listdir("/proc/self/fd")) == before


def test_negotiate(serve: Serve) -> None:
    """What both sides can do is what is agreed on."""
    device, connection = serve(virtio=1 << 32 | 1 << 30 | 1 << 29 | 1 << 24, protocol=1 << 3 | 1)
    with Frontend(connection) as frontend:
        agreed = frontend.negotiate(features=1 << 32 | 1 << 30 | 1 << 1, protocol=1 << 3 | 1 << 9)
        assert agreed == (1 << 32 | 1 << 30, 1 << 3)
        frontend.barrier()
        assert device.features == 1 << 32 | 1 << 30


def test_negotiate_without_protocol_features(serve: Serve) -> None:
    """Where bit 30 is not offered, protocol features are not asked for."""
    device, connection = serve(virtio=1 << 32)
    with Frontend(connection) as frontend:
        frontend.negotiate()
        frontend.barrier()
    assert [seen.request for seen in device.seen] == [1, 3, 2, 1]


@pytest.mark.parametrize("call_as", ["eventfd", "socketpair"])
def test_start_queue(serve: Serve, call_as: str) -> None:
    """A started queue moves chains, kicks and is called, over either kind of call channel."""
    device, connection = serve()
    with GuestMemory() as memory, Frontend(connection) as frontend:
        frontend.negotiate()
        frontend.set_memory(memory)
        queue = frontend.start_queue(1, SplitDriver(memory, 8), call_as=call_as)  # type: ignore[arg-type]
        chain = queue.driver.add([b"out"])
        assert queue.notify()
        assert [used.chain for used in queue.wait()] == [chain]
        frontend.barrier()
        assert bytes(device.output) == b"out"
        queue.take_calls()
        assert (queue.kicks, queue.calls) == (1, 1)


def test_stop_queue(serve: Serve) -> None:
    """A stopped queue says where it can go on."""
    _, connection = serve()
    with GuestMemory() as memory, Frontend(connection) as frontend:
        frontend.negotiate()
        frontend.set_memory(memory)
        queue = frontend.start_queue(1, SplitDriver(memory, 8, start=65535))
        queue.driver.add([b"out"])
        queue.notify()
        queue.wait()
        assert frontend.stop_queue(1) == 0


def test_queue_without_enable(serve: Serve) -> None:
    """A queue can be started and left disabled."""
    device, connection = serve()
    with GuestMemory() as memory, Frontend(connection) as frontend:
        frontend.negotiate()
        frontend.set_memory(memory)
        frontend.start_queue(1, SplitDriver(memory, 8), enable=False)
        assert not device.rings[1].enabled
        frontend.enable(1)
        assert device.rings[1].enabled


def test_reconnect_by_hand(serve: Serve) -> None:
    """The same memory and ring go on with another backend where the first one left them."""
    _, connection = serve()
    later, another = serve()
    with GuestMemory() as memory, Frontend(connection) as frontend:
        driver = SplitDriver(memory, 8)
        for turn in range(2):
            if turn:
                frontend.reconnect(another)
            frontend.negotiate()
            frontend.set_memory(memory)
            queue = frontend.start_queue(1, driver)
            driver.add([b"%d" % turn])
            queue.notify()
            queue.wait()
        frontend.barrier()
        assert bytes(later.output) == b"1"
        assert driver.used_idx == 2


def test_reconnect_without_a_path(pair: tuple[Frontend, socket.socket]) -> None:
    """A frontend that was given a socket must be told where to connect again."""
    with pytest.raises(ValueError, match="say where"):
        pair[0].reconnect()


def backend_of(frontend: Frontend, peer: socket.socket) -> socket.socket:
    """Return the backend's end of a new backend channel."""
    frontend.set_backend_req_fd(ack=False)
    _, (fd,), _, _ = socket.recv_fds(peer, 4096, 8)
    return socket.socket(fileno=fd)


def test_backend_messages(pair: tuple[Frontend, socket.socket]) -> None:
    """What the backend says on its own channel is received and counted."""
    frontend, peer = pair
    with GuestMemory() as memory, backend_of(frontend, peer) as channel:
        queue = frontend.queue(1, SplitDriver(memory, 8))
        channel.sendall(h("02000000 01000000 00000000"))
        channel.sendall(h("04000000 01000000 08000000 01000000 00000000"))
        channel.sendall(h("05000000 01000000 08000000 03000000 00000000"))
        assert [frontend.recv_backend().header.request for _ in range(3)] == [2, 4, 5]
        assert (frontend.config_changes, queue.called, frontend.broken) == (1, 1, [3])


def test_backend_message_is_answered(pair: tuple[Frontend, socket.socket]) -> None:
    """The backend gets an answer if it asks for one."""
    frontend, peer = pair
    with backend_of(frontend, peer) as channel:
        channel.sendall(h("04000000 09000000 08000000 02000000 00000000"))
        frontend.recv_backend()
        assert channel.recv(4096) == h("04000000 05000000 08000000 00000000 00000000")


def test_backend_message_is_not_answered(pair: tuple[Frontend, socket.socket]) -> None:
    """A frontend can be told not to answer."""
    frontend, peer = pair
    frontend.answers = False
    with backend_of(frontend, peer) as channel:
        channel.sendall(h("04000000 09000000 08000000 02000000 00000000"))
        frontend.recv_backend()
        channel.setblocking(False)
        with pytest.raises(BlockingIOError):
            channel.recv(1)


@pytest.mark.parametrize(
    "data", ["04000000 05000000 08000000 00000000 00000000", "07000000 01000000 00000000"]
)
def test_backend_says_nonsense(pair: tuple[Frontend, socket.socket], data: str) -> None:
    """A reply to nothing, and a message there is not, are the backend's fault."""
    frontend, peer = pair
    with backend_of(frontend, peer) as channel:
        channel.sendall(h(data))
        with pytest.raises(DeviceError, match="message"):
            frontend.recv_backend()


def test_inband_queue(serve: Serve) -> None:
    """A queue without descriptors kicks and is called by messages."""
    device, connection = serve()
    with GuestMemory() as memory, Frontend(connection) as frontend:
        frontend.negotiate()
        frontend.set_memory(memory)
        frontend.set_backend_req_fd()
        queue = frontend.start_queue(1, SplitDriver(memory, 8), call_as="inband")
        chain = queue.driver.add([b"out"])
        assert queue.notify()
        assert [used.chain for used in queue.wait()] == [chain]
        queue.take_calls()
        assert (queue.kicks, queue.calls) == (1, 1)
    assert not {12, 13} & {seen.request for seen in device.seen}


def test_state_is_saved(pair: tuple[Frontend, socket.socket]) -> None:
    """A state is read from a pipe to its end."""
    frontend, peer = pair
    peer.sendall(h("2a000000 05000000 08000000 00010000 00000000"))
    peer.sendall(h("2b000000 05000000 08000000 00000000 00000000"))

    def backend() -> None:
        _, (fd,), _, _ = socket.recv_fds(peer, 4096, 8)
        with open(fd, "wb") as pipe:
            pipe.write(bytes(1 << 20))

    thread = threading.Thread(target=backend)
    thread.start()
    assert frontend.save_state() == bytes(1 << 20)
    thread.join()


def test_state_is_loaded(pair: tuple[Frontend, socket.socket]) -> None:
    """A state is written into a pipe, which then ends."""
    frontend, peer = pair
    peer.sendall(h("2a000000 05000000 08000000 00010000 00000000"))
    peer.sendall(h("2b000000 05000000 08000000 00000000 00000000"))
    loaded: list[bytes] = []

    def backend() -> None:
        _, (fd,), _, _ = socket.recv_fds(peer, 4096, 8)
        with open(fd, "rb") as pipe:
            loaded.append(pipe.read())

    thread = threading.Thread(target=backend)
    thread.start()
    frontend.load_state(bytes(1 << 20))
    thread.join()
    assert loaded == [bytes(1 << 20)]


@pytest.mark.parametrize("answers", [["00000001"], ["00010000", "01000000"], ["01010000"]])
def test_state_is_refused(pair: tuple[Frontend, socket.socket], answers: list[str]) -> None:
    """A backend that wants another pipe, says no at first, or says no at last, is a NackError."""
    frontend, peer = pair
    for request, answer in zip(("2a", "2b"), answers, strict=False):
        peer.sendall(h(f"{request}000000 05000000 08000000 {answer} 00000000"))
    with pytest.raises(NackError):
        frontend.load_state(b"")


def test_inflight_area_outlives_the_connection(serve: Serve) -> None:
    """The area's descriptor stays until the frontend is done with, and no longer."""
    _, connection = serve()
    before = set(os.listdir("/proc/self/fd"))
    with Frontend(connection) as frontend:
        area = frontend.get_inflight_fd(4, 64)
        assert area == (4096, 0, 4, 64)
        assert frontend.inflight is not None
        frontend.close()
        assert os.fstat(frontend.inflight[1]).st_size == 4096
        fd = str(frontend.inflight[1])
    assert fd not in os.listdir("/proc/self/fd") or fd in before
