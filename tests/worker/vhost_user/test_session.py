"""What each message means, by driving the session's steps by hand."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from vhost_device_console.errors import FrontendError, RefusedError
from vhost_device_console.worker.vhost_user import session as fx
from vhost_device_console.worker.vhost_user.message import (
    ConfigSpan,
    Region,
    Request,
    VringAddr,
    VringFd,
    VringState,
    encode_regions,
    encode_u64,
)
from vhost_device_console.worker.vhost_user.session import Session

OFFERED = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 1
PROTOCOL_FEATURES = 1 << 30
PROTOCOL = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9
REPLY_ACK = 1 << 3
ADDR = VringAddr(0, 0, 0x1000, 0x3000, 0x2000, 0)

Answer = Callable[[fx.Effect], Any]


@pytest.fixture
def session() -> Session:
    return Session(OFFERED, 4, 1024)


def run(
    session: Session,
    request: int,
    payload: bytes = b"",
    fds: tuple[int, ...] = (),
    answer: Answer = lambda _: None,
) -> tuple[list[fx.Effect], bytes | None]:
    """Carry out one message; return its effects, and its reply if the protocol has one.

    `answer` gives each effect's result, or raises.
    """
    effects: list[fx.Effect] = []
    try:
        steps = session.handle(request, payload, list(fds))
        effect = next(steps)
        while True:
            effects.append(effect)
            try:
                result = answer(effect)
            except RefusedError as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(result)
    except StopIteration as done:
        return effects, done.value


def refused(
    session: Session,
    request: int,
    payload: bytes = b"",
    fds: tuple[int, ...] = (),
    answer: Answer = lambda _: None,
) -> None:
    with pytest.raises(RefusedError):
        run(session, request, payload, fds, answer)


def no(_: fx.Effect) -> None:
    raise RefusedError("no")


def state(ring: int, num: int) -> bytes:
    return VringState(ring, num).encode()


def prepare(session: Session, ring: int = 0, size: int = 256) -> VringAddr:
    """Give a ring its size and addresses."""
    addr = ADDR._replace(ring=ring)
    run(session, Request.SET_VRING_NUM, state(ring, size))
    run(session, Request.SET_VRING_ADDR, addr.encode())
    return addr


def start(session: Session, ring: int = 0) -> fx.StartRing:
    """Prepare a ring and kick it."""
    prepare(session, ring)
    effects, _ = run(session, Request.SET_VRING_KICK, VringFd(ring, True).encode(), (7,))
    (effect,) = effects
    assert isinstance(effect, fx.StartRing)
    return effect


def choose(session: Session, features: int = OFFERED | PROTOCOL_FEATURES) -> None:
    run(session, Request.SET_FEATURES, encode_u64(features))


# Features


def test_the_features_offered_are_the_devices_and_protocol_features(session: Session) -> None:
    assert run(session, Request.GET_FEATURES) == ([], encode_u64(OFFERED | PROTOCOL_FEATURES))


@pytest.mark.parametrize("features", [0, 1 << 32, OFFERED, OFFERED | PROTOCOL_FEATURES])
def test_any_subset_of_the_features_can_be_chosen(session: Session, features: int) -> None:
    effects, reply = run(session, Request.SET_FEATURES, encode_u64(features))
    assert (effects, reply) == ([fx.SetFeatures(features)], None)
    assert session.chosen == features


@pytest.mark.parametrize("bit", [0, 2, 24, 26, 34, 63])
def test_features_never_offered_are_refused(session: Session, bit: int) -> None:
    choose(session)
    refused(session, Request.SET_FEATURES, encode_u64(OFFERED | 1 << bit))
    assert session.chosen == OFFERED | PROTOCOL_FEATURES


def test_features_the_device_refuses_are_not_chosen(session: Session) -> None:
    refused(session, Request.SET_FEATURES, encode_u64(OFFERED), answer=no)
    assert session.chosen == 0


def test_features_cannot_change_while_a_queue_runs(session: Session) -> None:
    choose(session)
    start(session, 3)
    refused(session, Request.SET_FEATURES, encode_u64(0))
    assert session.chosen == OFFERED | PROTOCOL_FEATURES


def test_features_can_be_said_again_while_a_queue_runs(session: Session) -> None:
    choose(session)
    start(session)
    choose(session)


def test_features_can_change_when_every_queue_has_stopped(session: Session) -> None:
    choose(session)
    start(session)
    run(session, Request.GET_VRING_BASE, state(0, 0), answer=lambda _: 0)
    choose(session, 1 << 32)
    assert session.chosen == 1 << 32


def test_the_protocol_features_are_just_those_that_work(session: Session) -> None:
    assert run(session, Request.GET_PROTOCOL_FEATURES) == ([], encode_u64(PROTOCOL))


@pytest.mark.parametrize("features", [0, 1, REPLY_ACK, PROTOCOL])
def test_any_subset_of_the_protocol_features_can_be_chosen(session: Session, features: int) -> None:
    assert run(session, Request.SET_PROTOCOL_FEATURES, encode_u64(features)) == ([], None)
    assert session.protocol == features


@pytest.mark.parametrize("bit", [1, 2, 4, 12, 14, 20, 63])
def test_protocol_features_never_offered_are_refused(session: Session, bit: int) -> None:
    run(session, Request.SET_PROTOCOL_FEATURES, encode_u64(1))
    refused(session, Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL | 1 << bit))
    assert session.protocol == 1


def test_the_queue_number_is_told(session: Session) -> None:
    assert run(session, Request.GET_QUEUE_NUM) == ([], encode_u64(4))


@pytest.mark.parametrize("request_", [Request.SET_OWNER, Request.RESET_OWNER])
def test_owners_change_nothing(session: Session, request_: int) -> None:
    choose(session)
    start(session)
    assert run(session, request_) == ([], None)
    assert session.chosen == OFFERED | PROTOCOL_FEATURES


# Acknowledgements

ANSWERED = {
    Request.GET_FEATURES,
    Request.GET_PROTOCOL_FEATURES,
    Request.GET_QUEUE_NUM,
    Request.GET_VRING_BASE,
    Request.GET_CONFIG,
}


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("chosen", [False, True])
def test_an_acknowledgement_is_for_who_asks_and_may_and_gets_no_other_answer(
    session: Session, asked: bool, chosen: bool
) -> None:
    run(session, Request.SET_PROTOCOL_FEATURES, encode_u64(REPLY_ACK if chosen else 0))
    requests = {*Request, 0, 99, 0xFFFF_FFFF}
    acknowledged = {each for each in requests if session.acknowledges(each, asked=asked)}
    assert acknowledged == (requests - ANSWERED if asked and chosen else set())


@pytest.mark.parametrize("features", [0, REPLY_ACK])
def test_set_protocol_features_is_acknowledged_by_what_it_has_just_set(
    session: Session, features: int
) -> None:
    run(session, Request.SET_PROTOCOL_FEATURES, encode_u64(features))
    acknowledged = session.acknowledges(Request.SET_PROTOCOL_FEATURES, asked=True)
    assert acknowledged is (features == REPLY_ACK)


def test_every_request_with_a_reply_of_its_own_counts_as_answered(session: Session) -> None:
    payloads = {
        Request.GET_VRING_BASE: state(0, 0),
        Request.GET_CONFIG: ConfigSpan(0, 0, bytes(4)).encode(),
    }
    for request in ANSWERED:
        is_config = request == Request.GET_CONFIG
        result: Answer = (lambda _: bytes(4)) if is_config else (lambda _: 0)
        _, reply = run(session, request, payloads.get(request, b""), answer=result)
        assert reply is not None, request


# Memory

REGIONS = [Region(0, 0x1000, 0x7000, 0), Region(0x2000, 0x1000, 0x9000, 0x1000)]


def test_a_memory_table_is_mapped_with_its_fds(session: Session) -> None:
    effects, reply = run(session, Request.SET_MEM_TABLE, encode_regions(REGIONS), (5, 6))
    assert (effects, reply) == ([fx.MapMemory(REGIONS, [5, 6])], None)


@pytest.mark.parametrize("fds", [(), (5,), (5, 6, 7), tuple(range(5, 13))])
def test_a_memory_table_with_another_number_of_fds_is_refused(
    session: Session, fds: tuple[int, ...]
) -> None:
    refused(session, Request.SET_MEM_TABLE, encode_regions(REGIONS), fds)


def test_memory_that_cannot_be_mapped_is_refused(session: Session) -> None:
    refused(session, Request.SET_MEM_TABLE, encode_regions(REGIONS), (5, 6), answer=no)


# A ring's life


def test_a_ring_is_checked_as_it_is_described(session: Session) -> None:
    assert run(session, Request.SET_VRING_NUM, state(0, 64)) == ([], None)
    effects, reply = run(session, Request.SET_VRING_ADDR, ADDR.encode())
    assert (effects, reply) == ([fx.CheckRing(0, 64, ADDR)], None)


def test_a_kick_fd_starts_a_ring_as_described(session: Session) -> None:
    choose(session)
    addr = prepare(session, 2, 128)
    effects, reply = run(session, Request.SET_VRING_KICK, VringFd(2, True).encode(), (7,))
    assert (effects, reply) == ([fx.StartRing(2, 128, addr, 7, False)], None)


@pytest.mark.parametrize("features", [0, OFFERED])
def test_without_protocol_features_a_ring_starts_enabled(session: Session, features: int) -> None:
    choose(session, features)
    assert start(session).enabled


def test_with_protocol_features_a_ring_starts_as_it_was_told(session: Session) -> None:
    choose(session)
    assert not start(session, 0).enabled
    run(session, Request.SET_VRING_ENABLE, state(1, 1))
    assert start(session, 1).enabled
    run(session, Request.SET_VRING_ENABLE, state(2, 1))
    run(session, Request.SET_VRING_ENABLE, state(2, 0))
    assert not start(session, 2).enabled


@pytest.mark.parametrize("num", [0, 1])
def test_a_running_ring_is_enabled_and_disabled(session: Session, num: int) -> None:
    choose(session)
    start(session, 1)
    effects, reply = run(session, Request.SET_VRING_ENABLE, state(1, num))
    assert (effects, reply) == ([fx.EnableRing(1, bool(num))], None)


def test_a_stopped_ring_is_only_marked(session: Session) -> None:
    assert run(session, Request.SET_VRING_ENABLE, state(1, 1)) == ([], None)


@pytest.mark.parametrize("num", [2, 0xFFFF_FFFF])
def test_a_ring_can_only_be_enabled_or_not(session: Session, num: int) -> None:
    choose(session)
    refused(session, Request.SET_VRING_ENABLE, state(0, num))
    assert not start(session).enabled


def test_a_ring_is_stopped_by_asking_where_it_is(session: Session) -> None:
    start(session, 1)
    effects, reply = run(session, Request.GET_VRING_BASE, state(1, 0), answer=lambda _: 0xFFFE)
    assert (effects, reply) == ([fx.StopRing(1)], state(1, 0xFFFE))


def test_a_stopped_ring_can_be_changed_and_started_again(session: Session) -> None:
    start(session)
    run(session, Request.GET_VRING_BASE, state(0, 0), answer=lambda _: 5)
    prepare(session, 0, 512)
    assert start(session).size == 256


@pytest.mark.parametrize("base", [0, 1, 0xFFFF])
def test_a_base_is_accepted_but_the_ring_knows_better(session: Session, base: int) -> None:
    assert run(session, Request.SET_VRING_BASE, state(0, base)) == ([], None)


def test_a_running_ring_can_be_given_another_kick_fd(session: Session) -> None:
    first = start(session)
    effects, _ = run(session, Request.SET_VRING_KICK, VringFd(0, True).encode(), (8,))
    assert effects == [first._replace(kick=8)]


def test_a_kick_before_addresses_is_refused(session: Session) -> None:
    run(session, Request.SET_VRING_NUM, state(0, 256))
    refused(session, Request.SET_VRING_KICK, VringFd(0, True).encode(), (7,))


def test_a_kick_without_fd_is_refused(session: Session) -> None:
    prepare(session)
    refused(session, Request.SET_VRING_KICK, VringFd(0, False).encode())


def test_addresses_before_a_size_are_refused(session: Session) -> None:
    refused(session, Request.SET_VRING_ADDR, ADDR.encode())


def test_addresses_outside_memory_are_refused_and_forgotten(session: Session) -> None:
    run(session, Request.SET_VRING_NUM, state(0, 256))
    refused(session, Request.SET_VRING_ADDR, ADDR.encode(), answer=no)
    refused(session, Request.SET_VRING_KICK, VringFd(0, True).encode(), (7,))


def test_refused_addresses_leave_the_ones_before(session: Session) -> None:
    prepare(session)
    other = ADDR._replace(desc=0xBAD0).encode()
    refused(session, Request.SET_VRING_ADDR, other, answer=no)
    effects, _ = run(session, Request.SET_VRING_KICK, VringFd(0, True).encode(), (7,))
    assert effects == [fx.StartRing(0, 256, ADDR, 7, True)]


@pytest.mark.parametrize("size", [0, 3, 6, 255, 1023, 2048, 32769, 0xFFFF_FFFF])
def test_a_size_that_no_ring_has_is_refused(session: Session, size: int) -> None:
    run(session, Request.SET_VRING_NUM, state(0, 64))
    refused(session, Request.SET_VRING_NUM, state(0, size))
    effects, _ = run(session, Request.SET_VRING_ADDR, ADDR.encode())
    assert effects == [fx.CheckRing(0, 64, ADDR)]


@pytest.mark.parametrize("size", [1, 2, 256, 1024])
def test_powers_of_two_up_to_the_largest_are_sizes(session: Session, size: int) -> None:
    run(session, Request.SET_VRING_NUM, state(0, size))
    effects, _ = run(session, Request.SET_VRING_ADDR, ADDR.encode())
    assert effects == [fx.CheckRing(0, size, ADDR)]


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (Request.SET_VRING_NUM, state(0, 64)),
        (Request.SET_VRING_ADDR, ADDR.encode()),
        (Request.SET_VRING_BASE, state(0, 0)),
    ],
)
def test_a_running_ring_cannot_be_changed(
    session: Session, request_: Request, payload: bytes
) -> None:
    first = start(session)
    refused(session, request_, payload)
    effects, _ = run(session, Request.SET_VRING_KICK, VringFd(0, True).encode(), (7,))
    assert effects == [first]


def test_a_ring_that_cannot_start_is_not_running(session: Session) -> None:
    prepare(session)
    refused(session, Request.SET_VRING_KICK, VringFd(0, True).encode(), (7,), answer=no)
    run(session, Request.SET_VRING_NUM, state(0, 64))


def test_a_ring_that_cannot_be_enabled_is_not(session: Session) -> None:
    choose(session)
    start(session)
    refused(session, Request.SET_VRING_ENABLE, state(0, 1), answer=no)
    effects, _ = run(session, Request.SET_VRING_KICK, VringFd(0, True).encode(), (7,))
    assert effects == [fx.StartRing(0, 256, ADDR, 7, False)]


def test_a_ring_that_cannot_stop_runs_on(session: Session) -> None:
    start(session)
    refused(session, Request.GET_VRING_BASE, state(0, 0), answer=no)
    refused(session, Request.SET_VRING_NUM, state(0, 64))


STATES = [
    Request.SET_VRING_NUM,
    Request.SET_VRING_BASE,
    Request.GET_VRING_BASE,
    Request.SET_VRING_ENABLE,
]
FD_MESSAGES = [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]


@pytest.mark.parametrize("ring", [4, 5, 127, 255, 256, 65537, 1 << 31, 0xFFFF_FFFF])
@pytest.mark.parametrize("request_", [*STATES, Request.SET_VRING_ADDR, *FD_MESSAGES])
def test_a_queue_that_does_not_exist_is_refused(
    session: Session, request_: Request, ring: int
) -> None:
    payload = state(ring, 1)
    fds: tuple[int, ...] = ()
    if request_ == Request.SET_VRING_ADDR:
        payload = ADDR._replace(ring=ring).encode()
    if request_ in FD_MESSAGES:
        payload, fds = encode_u64(ring & ~0x100 if ring != 256 else 1 << 16), (7,)
    refused(session, request_, payload, fds)


# Call, error and backend channel


@pytest.mark.parametrize(
    ("request_", "effect"),
    [(Request.SET_VRING_CALL, fx.SetCall), (Request.SET_VRING_ERR, fx.SetError)],
)
@pytest.mark.parametrize("fd", [7, None])
def test_call_and_error_fds_are_passed_on(
    session: Session,
    request_: Request,
    effect: type[fx.SetCall | fx.SetError],
    fd: int | None,
) -> None:
    fds = () if fd is None else (fd,)
    effects, reply = run(session, request_, VringFd(3, fd is not None).encode(), fds)
    assert (effects, reply) == ([effect(3, fd)], None)


@pytest.mark.parametrize("request_", FD_MESSAGES)
@pytest.mark.parametrize(("has_fd", "fds"), [(True, ()), (True, (7, 8)), (False, (7,))])
def test_fds_other_than_announced_are_refused(
    session: Session, request_: Request, has_fd: bool, fds: tuple[int, ...]
) -> None:
    prepare(session)
    refused(session, request_, VringFd(0, has_fd).encode(), fds)


def test_the_backend_channel_is_one_fd(session: Session) -> None:
    effects, reply = run(session, Request.SET_BACKEND_REQ_FD, b"", (9,))
    assert (effects, reply) == ([fx.SetBackendChannel(9)], None)
    refused(session, Request.SET_BACKEND_REQ_FD, b"", ())
    refused(session, Request.SET_BACKEND_REQ_FD, b"", (9, 10))


# Configuration space


def test_a_config_read_is_answered_with_its_span(session: Session) -> None:
    payload = ConfigSpan(4, 0, bytes(3)).encode()
    effects, reply = run(session, Request.GET_CONFIG, payload, answer=lambda _: b"abc")
    assert effects == [fx.ReadConfig(4, 3)]
    assert reply == struct.pack("=III", 4, 3, 0) + b"abc"


def test_a_config_read_past_the_end_is_answered_with_nothing(session: Session) -> None:
    payload = ConfigSpan(10, 0, bytes(4)).encode()
    assert run(session, Request.GET_CONFIG, payload, answer=no) == ([fx.ReadConfig(10, 4)], b"")


def test_a_config_write_is_passed_on(session: Session) -> None:
    payload = ConfigSpan(8, 0, b"A\0\0\0").encode()
    effects, reply = run(session, Request.SET_CONFIG, payload)
    assert (effects, reply) == ([fx.WriteConfig(8, b"A\0\0\0")], None)


def test_a_config_write_past_the_end_is_refused(session: Session) -> None:
    refused(session, Request.SET_CONFIG, ConfigSpan(10, 0, bytes(4)).encode(), answer=no)


# What is not a message

HANDLED = {
    Request.GET_FEATURES: b"",
    Request.SET_FEATURES: encode_u64(0),
    Request.SET_OWNER: b"",
    Request.RESET_OWNER: b"",
    Request.SET_MEM_TABLE: encode_regions(REGIONS),
    Request.SET_VRING_NUM: state(0, 64),
    Request.SET_VRING_ADDR: ADDR.encode(),
    Request.SET_VRING_BASE: state(0, 0),
    Request.GET_VRING_BASE: state(0, 0),
    Request.SET_VRING_KICK: VringFd(0, True).encode(),
    Request.SET_VRING_CALL: VringFd(0, True).encode(),
    Request.SET_VRING_ERR: VringFd(0, True).encode(),
    Request.GET_PROTOCOL_FEATURES: b"",
    Request.SET_PROTOCOL_FEATURES: encode_u64(0),
    Request.GET_QUEUE_NUM: b"",
    Request.SET_VRING_ENABLE: state(0, 1),
    Request.SET_BACKEND_REQ_FD: b"",
    Request.GET_CONFIG: ConfigSpan(0, 0, bytes(4)).encode(),
    Request.SET_CONFIG: ConfigSpan(0, 0, bytes(4)).encode(),
}
WITH_FDS = {Request.SET_MEM_TABLE, *FD_MESSAGES, Request.SET_BACKEND_REQ_FD}


@pytest.mark.parametrize("request_", [0, *(set(Request) - HANDLED.keys()), 44, 99, 0xFFFF_FFFF])
def test_a_request_that_is_unknown_or_not_offered_is_refused(
    session: Session, request_: int
) -> None:
    refused(session, request_)
    refused(session, request_, bytes(8), (7,))


@pytest.mark.parametrize("request_", HANDLED.keys() - WITH_FDS)
def test_fds_where_none_belong_are_refused(session: Session, request_: Request) -> None:
    refused(session, request_, HANDLED[request_], (7,))


@pytest.mark.parametrize("request_", HANDLED)
def test_a_payload_of_a_wrong_size_is_the_frontends_error(
    session: Session, request_: Request
) -> None:
    fds = {Request.SET_MEM_TABLE: (5, 6)}.get(request_, (7,) if request_ in WITH_FDS else ())
    prepare(session)
    right = HANDLED[request_]
    wrong = right[:-1] if right else b"x"
    with pytest.raises(FrontendError) as caught:
        run(session, request_, wrong, fds)
    assert not isinstance(caught.value, RefusedError)
