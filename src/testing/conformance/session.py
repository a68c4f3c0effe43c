"""Statements about the vhost-user conversation itself: messages, acknowledgements, features."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress

from ...worker.vhost_user.message import (
    ProtocolFeature,
    Request,
    VringFd,
    encode,
)
from ..errors import NackError
from ..features import Feature
from ..frontend import Frontend
from ..split import SplitDriver
from .bench import TX, Bench, split_driver
from .rings import call
from .statement import BrokenError, Level, NotApplicableError, expect, statement

MUST, SHOULD = Level.MUST, Level.SHOULD
P = ProtocolFeature

#: virtio features that only make sense with others, and protocol features likewise.
_NEEDS = (
    (P.INBAND_NOTIFICATIONS, P.BACKEND_REQ | P.REPLY_ACK),
    (P.BACKEND_SEND_FD, P.BACKEND_REQ),
    (1 << 20, P.INFLIGHT_SHMFD),  # GET_VRING_BASE_INFLIGHT
)


# Messages


@statement("message.reply-header", MUST, "vhost-user Header")
def reply_header(bench: Bench) -> None:
    """A reply has its request's number, the reply bit and version 1, and no other flag."""
    frontend = bench.connect()
    for request in (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES):
        if request is Request.GET_PROTOCOL_FEATURES and not frontend.offered & 1 << 30:
            continue
        frontend.send_raw(encode(request))
        data, _ = frontend.recv_raw(12, what=f"the answer to {request.name}")
        got = struct.unpack("=III", data.ljust(12, b"\0"))
        expect(
            got == (request, 5, 8),
            f"{request.name} was answered with request {got[0]}, flags {got[1]:#x}, size {got[2]}",
            f"request {request.value}, flags 0x5, size 8",
        )
        frontend.recv_raw(8)


@statement("message.whole-however-sent", MUST, "vhost-user Communication")
def whole_however_sent(bench: Bench) -> None:
    """A message that arrives byte by byte is one message."""
    frontend = bench.connect()
    for byte in encode(Request.SET_OWNER) + encode(Request.GET_FEATURES):
        frontend.send_raw(bytes([byte]))
    frontend.reply_to(Request.GET_FEATURES)


@statement("message.in-order", MUST, "vhost-user Communication")
def in_order(bench: Bench) -> None:
    """Messages that arrive together are handled one by one, in their order."""
    frontend = bench.connect()
    data = encode(Request.SET_OWNER) + encode(Request.GET_FEATURES)
    if frontend.offered & Feature.PROTOCOL_FEATURES:
        data += encode(Request.GET_PROTOCOL_FEATURES) + encode(Request.GET_FEATURES)
    frontend.send_raw(data)
    frontend.reply_to(Request.GET_FEATURES)
    if frontend.offered & Feature.PROTOCOL_FEATURES:
        frontend.reply_to(Request.GET_PROTOCOL_FEATURES)
        frontend.reply_to(Request.GET_FEATURES)


@statement("message.reset-owner", SHOULD, "vhost-user RESET_OWNER")
def reset_owner(bench: Bench) -> None:
    """The deprecated RESET_OWNER is ignored or disables the rings; it forgets nothing else."""
    frontend = bench.start()
    frontend.reset_owner()
    for index in frontend.queues:
        if frontend.features & Feature.PROTOCOL_FEATURES:
            frontend.enable(index)
    queue = frontend.queues[TX]
    queue.driver.add([b"still here\r\n"])
    queue.notify()
    bench.used(queue)


@statement("message.owner-first", MUST, "vhost-user SET_OWNER")
def owner_first(bench: Bench) -> None:
    """SET_OWNER may also be the very first message, as Linux has it."""
    frontend = bench.connect(owner=True)
    bench.agree(frontend)
    frontend.set_features(bench.features, ack=False)
    bench.start(frontend)
    queue = frontend.queues[TX]
    queue.driver.add([b"owner\r\n"])
    queue.notify()
    bench.used(queue)


@statement("message.early-protocol", MUST, "vhost-user SET_PROTOCOL_FEATURES")
def early_protocol(bench: Bench) -> None:
    """Protocol features can be agreed on before SET_FEATURES, on a connection without an owner."""
    if not bench.backend.features & Feature.PROTOCOL_FEATURES:
        raise NotApplicableError("PROTOCOL_FEATURES")
    frontend = bench.connect()
    expect(
        frontend.get_protocol_features() == bench.backend.protocol,
        "another set of protocol features than before",
        f"{bench.backend.protocol:#x}",
    )
    frontend.set_protocol_features(bench.protocol)
    frontend.barrier()


@statement("message.multiple-queues", SHOULD, "vhost-user Multiple queue support")
def multiple_queues(bench: Bench) -> None:
    """The MQ protocol feature is offered, also by devices with a fixed number of queues."""
    expect(bench.backend.protocol & P.MQ, "MQ is not offered", "it, for introspection")


@statement("message.queue-num", MUST, "vhost-user GET_QUEUE_NUM", P.MQ)
def queue_num(bench: Bench) -> None:
    """GET_QUEUE_NUM says at least how many queues the console has: 2, and 2 more with control."""
    least = 4 if bench.backend.features & Feature.MULTIPORT else 2
    expect(bench.backend.queues >= least, f"{bench.backend.queues} queues", f"at least {least}")


@statement("message.queue-num-ports", MUST, "vhost-user Multiple queue support", P.MQ, P.CONFIG)
def queue_num_ports(bench: Bench) -> None:
    """There are queues for every port that max_nr_ports allows."""
    if not bench.backend.features & Feature.MULTIPORT:
        raise NotApplicableError("MULTIPORT")
    needed = 2 * bench.backend.ports + 2
    expect(
        bench.backend.queues >= needed,
        f"{bench.backend.queues} queues for {bench.backend.ports} ports",
        f"at least {needed}",
    )


# Acknowledgements


@statement("ack.session", MUST, "vhost-user REPLY_ACK", P.REPLY_ACK)
def ack_session(bench: Bench) -> None:
    """SET_OWNER and SET_FEATURES are acknowledged with 0 when that is asked for."""
    frontend = bench.connect()
    bench.agree(frontend)
    frontend.set_owner(ack=True)
    frontend.set_features(bench.features, ack=True)


@statement("ack.protocol", SHOULD, "vhost-user REPLY_ACK", P.REPLY_ACK)
def ack_protocol(bench: Bench) -> None:
    """The very SET_PROTOCOL_FEATURES that agrees on REPLY_ACK is acknowledged, as Linux asks."""
    bench.agree(bench.connect(), ack=True)


@statement("ack.rings", MUST, "vhost-user REPLY_ACK", P.REPLY_ACK)
def ack_rings(bench: Bench) -> None:
    """SET_MEM_TABLE and a ring's size, base, addresses and descriptors are acknowledged with 0."""
    frontend = bench.negotiate()
    memory = bench.memory()
    frontend.set_memory(memory, ack=True)
    queue = frontend.queue(TX, SplitDriver(memory, 64))
    frontend.describe_queue(queue, ack=True)
    frontend.give_call(queue, "eventfd", ack=True)
    frontend.set_vring_err(TX, queue.call_fd, ack=True)
    frontend.set_vring_kick(TX, queue.new_kick_fd(), ack=True)
    frontend.set_vring_enable(TX, True, ack=True)


@statement("ack.unasked", MUST, "vhost-user REPLY_ACK", P.REPLY_ACK)
def ack_unasked(bench: Bench) -> None:
    """A message that does not ask for an acknowledgement gets none."""
    frontend = bench.negotiate()
    frontend.set_vring_num(TX, 64, ack=False)
    frontend.set_vring_base(TX, 0, ack=False)
    frontend.get_features()


@statement("ack.own-reply", MUST, "vhost-user REPLY_ACK", P.REPLY_ACK)
def ack_own_reply(bench: Bench) -> None:
    """A message with an answer of its own gets just that, asked for an acknowledgement or not."""
    frontend = bench.negotiate()
    for request in (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES):
        frontend.send(request, need_reply=True)
        frontend.reply_to(request)
    frontend.get_features()


@statement("ack.failure", MUST, "vhost-user REPLY_ACK", P.REPLY_ACK)
def ack_failure(bench: Bench) -> None:
    """What cannot be done is acknowledged with another number than 0, or ends the connection."""
    frontend = bench.negotiate()
    frontend.set_memory(bench.memory())
    frontend.set_vring_num(TX, 64)
    expect(
        bench.refused(frontend, lambda: frontend.set_vring_addr(TX, 0x1000, 0x3000, 0x2000)),
        "ring addresses outside all memory were acknowledged with 0",
        "a refusal",
    )


@statement("ack.goes-on", SHOULD, "vhost-user Communication", P.REPLY_ACK)
def ack_goes_on(bench: Bench) -> None:
    """After a refusal that was acknowledged the connection lives."""
    frontend = bench.negotiate()
    try:
        frontend.set_vring_num(TX, 0)
    except NackError:
        frontend.set_vring_num(TX, 64)
        return
    except ConnectionError:
        raise BrokenError("the backend hung up", "an acknowledgement that says no") from None
    raise BrokenError("a ring of 0 entries was acknowledged with 0", "a refusal")


# Features


@statement("feature.version-1", MUST, "VIRTIO 6.2")
def version_1(bench: Bench) -> None:
    """VERSION_1 is offered."""
    expect(bench.backend.features & Feature.VERSION_1, "it is not", "bit 32 in GET_FEATURES")


@statement("feature.needs", MUST, "VIRTIO 2.2.2")
def feature_needs(bench: Bench) -> None:
    """No feature is offered without those that it needs."""
    protocol = bench.backend.protocol
    for feature, needed in _NEEDS:
        expect(
            not protocol & feature or protocol & needed == needed,
            f"protocol features {protocol:#x}",
            f"{needed:#x} where {int(feature):#x} is offered",
        )


@statement("feature.no-sr-iov", MUST, "VIRTIO 6.2")
def no_sr_iov(bench: Bench) -> None:
    """SR_IOV is not offered, for a vhost-user backend has no PCI capability."""
    expect(not bench.backend.features & 1 << 37, "it is", "bit 37 clear")


@statement("feature.steady", SHOULD, "VIRTIO 2.2.2")
def steady(bench: Bench) -> None:
    """The same features can be agreed on again after a reset."""
    for _ in range(2):
        frontend = bench.negotiate()
        expect(
            frontend.offered == bench.backend.features,
            f"another offer: {frontend.offered:#x}",
            f"{bench.backend.features:#x} as before",
        )
        frontend.barrier()


@statement("feature.least", SHOULD, "VIRTIO 2.2.2")
def least(bench: Bench) -> None:
    """A driver that takes nothing but VERSION_1 is served."""
    console = bench.console(
        bench.start(
            bench.negotiate(Feature.VERSION_1 | Feature.PROTOCOL_FEATURES),
        )
    )
    console.write(b"least\r\n")


def _without(feature: Feature, text: str) -> None:
    def check(bench: Bench) -> None:
        bench.console(without=feature).write(b"without\r\n")

    check.__doc__ = text
    name = str(feature.name).lower().replace("_", "-")
    statement(f"feature.without-{name}", SHOULD, "VIRTIO 2.2.2", feature)(check)


_without(Feature.MULTIPORT, "A driver that leaves out MULTIPORT is served, with two queues")
_without(Feature.INDIRECT_DESC, "A driver that leaves out INDIRECT_DESC is served")
_without(Feature.EVENT_IDX, "A driver that leaves out EVENT_IDX is served")


@statement("feature.never-offered", MUST, "VIRTIO 2.2.2")
def never_offered(bench: Bench) -> None:
    """A driver's choice with a feature that was not offered is refused."""
    frontend = bench.negotiate()
    bit = next(bit for bit in range(63, 0, -1) if not frontend.offered >> bit & 1)
    expect(
        bench.refused(frontend, lambda: frontend.set_features(frontend.features | 1 << bit)),
        f"SET_FEATURES with bit {bit} was acknowledged with 0",
        "a refusal",
    )


@statement("feature.protocol-never-offered", SHOULD, "vhost-user Communication", P.REPLY_ACK)
def protocol_never_offered(bench: Bench) -> None:
    """A choice of protocol features with one that was not offered is refused."""
    frontend = bench.negotiate()
    bit = next(bit for bit in range(63, 0, -1) if not bench.backend.protocol >> bit & 1)
    expect(
        bench.refused(
            frontend,
            lambda: frontend.set_protocol_features(bench.protocol | 1 << bit, ack=True),
        ),
        f"SET_PROTOCOL_FEATURES with bit {bit} was acknowledged with 0",
        "a refusal",
    )


# Descriptors of rings


def _without_fd(frontend: Frontend, request: Request) -> Callable[[], None]:
    return lambda: frontend.tell(request, VringFd(TX, False).encode())


@statement("fd.no-call", MUST, "vhost-user SET_VRING_CALL")
def no_call(bench: Bench) -> None:
    """A ring whose call has no descriptor works, and the guest looks by itself."""
    frontend = bench.start()
    frontend.set_vring_call(TX, None)
    queue = frontend.queues[TX]
    queue.driver.add([b"no call\r\n"])
    queue.notify()
    bench.used(queue)


@statement("fd.no-kick", SHOULD, "vhost-user SET_VRING_KICK")
def no_kick(bench: Bench) -> None:
    """A ring whose kick has no descriptor is polled."""
    frontend = bench.negotiate()
    memory = bench.memory()
    frontend.set_memory(memory)
    queue = frontend.queue(TX, bench.ring(memory))
    queue.driver.set_features(frontend.features)
    frontend.describe_queue(queue)
    frontend.give_call(queue, "eventfd")
    try:
        frontend.set_vring_kick(TX, None)
    except (NackError, ConnectionError):
        raise BrokenError(
            "SET_VRING_KICK without a descriptor is refused", "a ring that is polled"
        ) from None
    if frontend.features & Feature.PROTOCOL_FEATURES:
        frontend.enable(TX)
    queue.driver.add([b"polled\r\n"])
    queue.driver.publish()
    bench.used(queue)


@statement("fd.error", SHOULD, "vhost-user SET_VRING_ERR", hostile=True)
def error_fd(bench: Bench) -> None:
    """The descriptor of SET_VRING_ERR tells of a ring with a descriptor that cannot be."""
    frontend = bench.start()
    queue = frontend.queues[TX]
    with os.fdopen(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), "rb", 0) as error:
        frontend.set_vring_err(TX, error.fileno())
        driver = split_driver(queue)
        driver.write_desc(0, 0xFFFF_FFFF_FFFF_0000, 4096)
        driver.offer(0)
        driver.publish()
        queue.kick()
        try:
            bench.until(lambda: error.read(8), "a signal on the error descriptor", 1.0)
        except TimeoutError as timeout:
            raise BrokenError(str(timeout), "it, when a buffer is in no memory") from None


@statement("fd.another-call", MUST, "vhost-user Ring states")
def another_call(bench: Bench) -> None:
    """A running ring's call descriptor can be replaced; calls come on the new one."""
    frontend = bench.start()
    queue = frontend.queues[TX]
    for _ in range(3):
        frontend.give_call(queue, "eventfd")
        frontend.barrier()
        queue.take_calls()
        queue.driver.enable_calls()
        call(bench, queue, "one on the new descriptor")


@statement("fd.another-kick", MUST, "vhost-user Ring states")
def another_kick(bench: Bench) -> None:
    """A running ring's kick descriptor can be replaced; the new one is listened to."""
    frontend = bench.start()
    queue = frontend.queues[TX]
    for _ in range(3):
        frontend.set_vring_kick(TX, queue.new_kick_fd())
        frontend.barrier()
        queue.driver.add([b"\r\n"])
        queue.driver.publish()
        queue.kick()
        bench.used(queue)


# Configuration


@statement("config.read", MUST, "vhost-user GET_CONFIG", P.CONFIG)
def config_read(bench: Bench) -> None:
    """GET_CONFIG of the whole space is answered with as many bytes."""
    bench.negotiate().get_config(0, 12)


@statement("config.read-part", MUST, "vhost-user GET_CONFIG", P.CONFIG)
def config_read_part(bench: Bench) -> None:
    """GET_CONFIG of each field gives that part of the whole."""
    frontend = bench.negotiate()
    whole = frontend.get_config(0, 12)
    for offset, size in ((0, 2), (2, 2), (4, 4), (8, 4), (0, 8)):
        part = frontend.get_config(offset, size)
        expect(
            part == whole[offset : offset + size],
            f"{part.hex()} at {offset}, in {whole.hex()}",
            f"{whole[offset : offset + size].hex()}",
        )


@statement("config.read-early", MUST, "VIRTIO 2.5.2", P.CONFIG)
def config_read_early(bench: Bench) -> None:
    """The configuration can be read before the driver has chosen features."""
    frontend = bench.connect()
    bench.agree(frontend)
    frontend.get_config(0, 12)


@statement("config.past-the-end", MUST, "vhost-user GET_CONFIG", P.CONFIG, hostile=True)
def config_past_the_end(bench: Bench) -> None:
    """GET_CONFIG of what does not exist is answered with an empty payload."""
    frontend = bench.negotiate()
    payload = struct.pack("=III", 0xFFFF_FF00, 12, 0) + bytes(12)
    try:
        answer = frontend.request(Request.GET_CONFIG, payload).payload
    except ConnectionError:
        raise BrokenError("the backend hung up", "an empty payload, the sign of an error") from None
    expect(answer == b"", f"a payload of {len(answer)} bytes", "an empty one")


@statement("config.read-only", MUST, "vhost-user SET_CONFIG", P.CONFIG)
def config_read_only(bench: Bench) -> None:
    """SET_CONFIG of a read-only field, not from migration, leaves it as it is."""
    frontend = bench.negotiate()
    before = frontend.get_config(0, 8)
    with suppress(NackError):
        frontend.set_config(0, bytes(byte ^ 0xFF for byte in before))
    after = frontend.get_config(0, 8)
    expect(after == before, f"{before.hex()} became {after.hex()}", "no change")


@statement("channel.set", MUST, "vhost-user SET_BACKEND_REQ_FD", P.BACKEND_REQ, P.REPLY_ACK)
def channel_set(bench: Bench) -> None:
    """SET_BACKEND_REQ_FD is acknowledged with 0, also when it replaces another channel."""
    frontend = bench.negotiate()
    frontend.set_backend_req_fd(ack=True)
    frontend.set_backend_req_fd(ack=True)
