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
    InflightArea,
    LogArea,
    ProtocolFeature,
    Region,
    Request,
    StateTransfer,
    VringAddr,
    VringFd,
    VringState,
    encode_region,
    encode_regions,
    encode_u64,
)
from vhost_device_console.worker.vhost_user.session import Session

OFFERED = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 1
LOG_ALL = 1 << 26
PROTOCOL_FEATURES = 1 << 30
PACKED = 1 << 34
INBAND = 1 << 14
PROTOCOL = 0b1001_1011_0110_0010_1011 & ~INBAND
REPLY_ACK = 1 << 3
ADDR = VringAddr(0, 0, 0x1000, 0x3000, 0x2000, 0)

Answer = Callable[[fx.Effect], Any]


@pytest.fixture
def session() -> Session:
    return Session(OFFERED, 4, 1024)


@pytest.fixture
def full() -> Session:
    return everything()


def everything() -> Session:
    """Return a session in which everything was chosen, but for packed rings."""
    session = Session(OFFERED | PACKED, 4, 1024, inband=True)
    run(session, Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL | INBAND))
    choose(session)
    return session


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
        return effects, None if done.value is None else done.value.payload


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


def test_the_features_offered_are_the_devices_and_vhost_users_own(session: Session) -> None:
    offered = OFFERED | PROTOCOL_FEATURES | LOG_ALL
    assert run(session, Request.GET_FEATURES) == ([], encode_u64(offered))


@pytest.mark.parametrize("features", [0, 1 << 32, OFFERED, OFFERED | PROTOCOL_FEATURES])
def test_any_subset_of_the_features_can_be_chosen(session: Session, features: int) -> None:
    effects, reply = run(session, Request.SET_FEATURES, encode_u64(features))
    assert (effects, reply) == ([fx.SetFeatures(features)], None)
    assert session.chosen == features


@pytest.mark.parametrize("bit", [0, 2, 24, 34, 63])
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


@pytest.mark.parametrize("before", [0, LOG_ALL])
def test_logging_is_switched_while_queues_run(session: Session, before: int) -> None:
    choose(session, OFFERED | PROTOCOL_FEATURES | before)
    start(session)
    features = OFFERED | PROTOCOL_FEATURES | (before ^ LOG_ALL)
    effects, reply = run(session, Request.SET_FEATURES, encode_u64(features))
    assert (effects, reply) == ([fx.SetFeatures(features)], None)
    refused(session, Request.SET_FEATURES, encode_u64(features ^ LOG_ALL ^ (1 << 29)))
    assert session.chosen == features


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


def test_inband_notifications_are_offered_to_who_asked_for_them(full: Session) -> None:
    assert run(full, Request.GET_PROTOCOL_FEATURES) == ([], encode_u64(PROTOCOL | INBAND))


@pytest.mark.parametrize("without", [1 << 3, 1 << 5])
def test_inband_notifications_need_a_channel_and_replies(full: Session, without: int) -> None:
    with pytest.raises(FrontendError) as caught:
        run(full, Request.SET_PROTOCOL_FEATURES, encode_u64((PROTOCOL | INBAND) & ~without))
    assert not isinstance(caught.value, RefusedError)


@pytest.mark.parametrize("features", [0, 1, REPLY_ACK, PROTOCOL])
def test_any_subset_of_the_protocol_features_can_be_chosen(session: Session, features: int) -> None:
    effects, reply = run(session, Request.SET_PROTOCOL_FEATURES, encode_u64(features))
    assert (effects, reply) == ([fx.SetProtocolFeatures(ProtocolFeature(features))], None)
    assert session.protocol == features


@pytest.mark.parametrize("bit", [2, 4, 14, 17, 18, 20, 63])
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
    Request.SET_LOG_BASE,
    Request.GET_INFLIGHT_FD,
    Request.GET_MAX_MEM_SLOTS,
    Request.GET_STATUS,
    Request.SET_DEVICE_STATE_FD,
    Request.CHECK_DEVICE_STATE,
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


RESULTS = {fx.ReadConfig: bytes(4), fx.MakeInflight: (4096, 0, 8)}


def test_every_request_with_a_reply_of_its_own_counts_as_answered() -> None:
    for request, payload in HANDLED.items():
        session = everything()
        prepare(session)
        fds = {Request.SET_MEM_TABLE: (5, 6)}.get(request, (7,) if request in WITH_FDS else ())
        _, reply = run(session, request, payload, fds, lambda each: RESULTS.get(type(each), 0))
        assert (reply is not None) == (request in ANSWERED), request


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


def test_a_memory_table_of_nothing_is_refused(session: Session) -> None:
    refused(session, Request.SET_MEM_TABLE, encode_regions([]))


def test_there_are_many_memory_slots(full: Session) -> None:
    assert run(full, Request.GET_MAX_MEM_SLOTS) == ([], encode_u64(509))


def test_a_memory_slot_is_added_with_its_fd(full: Session) -> None:
    effects, reply = run(full, Request.ADD_MEM_REG, encode_region(REGIONS[0]), (5,))
    assert (effects, reply) == ([fx.AddMemory(REGIONS[0], 5)], None)


@pytest.mark.parametrize("fds", [(), (5, 6)])
def test_a_memory_slot_has_one_fd(full: Session, fds: tuple[int, ...]) -> None:
    refused(full, Request.ADD_MEM_REG, encode_region(REGIONS[0]), fds)


@pytest.mark.parametrize("fds", [(), (5,)])
def test_a_memory_slot_is_removed_whether_a_fd_came_along_or_not(
    full: Session, fds: tuple[int, ...]
) -> None:
    effects, reply = run(full, Request.REM_MEM_REG, encode_region(REGIONS[0]), fds)
    assert (effects, reply) == ([fx.RemoveMemory(REGIONS[0])], None)


def test_a_memory_slot_is_not_removed_with_two_fds(full: Session) -> None:
    refused(full, Request.REM_MEM_REG, encode_region(REGIONS[0]), (5, 6))


def test_memory_that_cannot_be_mapped_is_refused(session: Session) -> None:
    refused(session, Request.SET_MEM_TABLE, encode_regions(REGIONS), (5, 6), answer=no)


# A ring's life


def test_a_ring_is_checked_as_it_is_described(session: Session) -> None:
    assert run(session, Request.SET_VRING_NUM, state(0, 64)) == ([fx.CheckSize(64)], None)
    effects, reply = run(session, Request.SET_VRING_ADDR, ADDR.encode())
    assert (effects, reply) == ([fx.CheckRing(0, 64, ADDR, 0)], None)


def test_a_kick_fd_starts_a_ring_as_described(session: Session) -> None:
    choose(session)
    addr = prepare(session, 2, 128)
    effects, reply = run(session, Request.SET_VRING_KICK, VringFd(2, True).encode(), (7,))
    assert (effects, reply) == ([fx.StartRing(2, 128, addr, 0, 7, False)], None)


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
def test_a_base_is_where_a_ring_begins(session: Session, base: int) -> None:
    assert run(session, Request.SET_VRING_BASE, state(0, base)) == ([], None)
    assert start(session).base == base


@pytest.mark.parametrize("base", [0, 1, 0xFFFF])
def test_a_ring_that_never_started_is_where_it_was_said_to_be(session: Session, base: int) -> None:
    run(session, Request.SET_VRING_BASE, state(0, base))
    assert run(session, Request.GET_VRING_BASE, state(0, 0)) == ([], state(0, base))


def test_a_ring_nobody_spoke_of_is_at_its_beginning(session: Session) -> None:
    assert run(session, Request.GET_VRING_BASE, state(0, 0)) == ([], state(0, 0))


def test_a_packed_ring_begins_with_its_wrap_counters_at_one(full: Session) -> None:
    choose(full, OFFERED | PROTOCOL_FEATURES | PACKED)
    assert run(full, Request.GET_VRING_BASE, state(0, 0)) == ([], state(0, 0x8000_8000))
    assert start(full).base == 0x8000_8000


def test_a_packed_rings_base_has_32_bits(full: Session) -> None:
    refused(full, Request.SET_VRING_BASE, state(0, 0x1_0000))
    choose(full, OFFERED | PROTOCOL_FEATURES | PACKED)
    run(full, Request.SET_VRING_BASE, state(0, 0x8005_8005))
    assert start(full).base == 0x8005_8005


def test_a_ring_that_stopped_goes_on_there(session: Session) -> None:
    start(session)
    run(session, Request.GET_VRING_BASE, state(0, 0), answer=lambda _: 5)
    assert run(session, Request.GET_VRING_BASE, state(0, 0)) == ([], state(0, 5))
    assert start(session).base == 5


def test_a_running_ring_can_be_given_another_kick_fd(session: Session) -> None:
    first = start(session)
    effects, _ = run(session, Request.SET_VRING_KICK, VringFd(0, True).encode(), (8,))
    assert effects == [first._replace(kick=8)]


def test_a_kick_before_addresses_is_refused(session: Session) -> None:
    run(session, Request.SET_VRING_NUM, state(0, 256))
    refused(session, Request.SET_VRING_KICK, VringFd(0, True).encode(), (7,))


def test_a_ring_needs_no_kick_fd(session: Session) -> None:
    addr = prepare(session)
    effects, reply = run(session, Request.SET_VRING_KICK, VringFd(0, False).encode())
    assert (effects, reply) == ([fx.StartRing(0, 256, addr, 0, None, True)], None)


def test_an_inband_kick_starts_a_ring_and_serves_it(full: Session) -> None:
    addr = prepare(full)
    run(full, Request.SET_VRING_ENABLE, state(0, 1))
    effects, reply = run(full, Request.VRING_KICK, state(0, 0))
    assert effects == [fx.StartRing(0, 256, addr, 0, None, True), fx.KickRing(0)]
    assert reply is None
    assert run(full, Request.VRING_KICK, state(0, 0)) == ([fx.KickRing(0)], None)


def test_an_inband_kick_of_a_ring_with_a_kick_fd_serves_it_too(full: Session) -> None:
    start(full, 1)
    assert run(full, Request.VRING_KICK, state(1, 0)) == ([fx.KickRing(1)], None)


def test_an_inband_kick_has_no_number(full: Session) -> None:
    start(full)
    refused(full, Request.VRING_KICK, state(0, 1))


def test_an_inband_kick_before_addresses_is_refused(full: Session) -> None:
    refused(full, Request.VRING_KICK, state(0, 0))


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
    assert effects == [fx.StartRing(0, 256, ADDR, 0, 7, True)]


def test_a_size_that_no_ring_has_is_refused(session: Session) -> None:
    run(session, Request.SET_VRING_NUM, state(0, 64))
    refused(session, Request.SET_VRING_NUM, state(0, 3), answer=no)
    effects, _ = run(session, Request.SET_VRING_ADDR, ADDR.encode())
    assert effects == [fx.CheckRing(0, 64, ADDR, 0)]


@pytest.mark.parametrize("size", [1025, 2048, 0xFFFF_FFFF])
def test_a_size_above_the_largest_is_refused(session: Session, size: int) -> None:
    refused(session, Request.SET_VRING_NUM, state(0, size))


@pytest.mark.parametrize("size", [1, 2, 256, 1024])
def test_sizes_up_to_the_largest_may_be(session: Session, size: int) -> None:
    run(session, Request.SET_VRING_NUM, state(0, size))
    effects, _ = run(session, Request.SET_VRING_ADDR, ADDR.encode())
    assert effects == [fx.CheckRing(0, size, ADDR, 0)]


ELSEWHERE = ADDR._replace(used=0x4000)
CHANGES = [
    (Request.SET_VRING_NUM, state(0, 64)),
    (Request.SET_VRING_ADDR, ELSEWHERE.encode()),
    (Request.SET_VRING_BASE, state(0, 0)),
]


@pytest.mark.parametrize(("request_", "payload"), CHANGES)
@pytest.mark.parametrize("protocol_features", [False, True])
def test_a_ring_at_work_cannot_be_changed(
    session: Session, request_: Request, payload: bytes, protocol_features: bool
) -> None:
    choose(session, OFFERED | PROTOCOL_FEATURES if protocol_features else OFFERED)
    if protocol_features:
        run(session, Request.SET_VRING_ENABLE, state(0, 1))
    first = start(session)
    refused(session, request_, payload)
    effects, _ = run(session, Request.SET_VRING_KICK, VringFd(0, True).encode(), (7,))
    assert effects == [first]


@pytest.mark.parametrize(("request_", "payload"), CHANGES)
def test_a_disabled_ring_that_is_described_anew_has_stopped(
    session: Session, request_: Request, payload: bytes
) -> None:
    choose(session)
    start(session)
    run(session, Request.SET_VRING_ENABLE, state(0, 1))
    run(session, Request.SET_VRING_ENABLE, state(0, 0))
    effects, reply = run(session, request_, payload, answer=lambda _: 9)
    assert (effects[-1], reply) == (fx.StopRing(0), None)
    refused(session, Request.SET_FEATURES, encode_u64(1 << 63))
    choose(session, OFFERED)  # for nothing runs


def test_a_disabled_ring_runs_on_when_its_new_place_is_refused(session: Session) -> None:
    choose(session)
    start(session)
    refused(session, Request.SET_VRING_ADDR, ELSEWHERE.encode(), answer=no)
    refused(session, Request.SET_FEATURES, encode_u64(0))  # for it runs


@pytest.mark.parametrize("enabled", [0, 1])
def test_a_running_rings_log_can_be_changed(session: Session, enabled: int) -> None:
    choose(session)
    run(session, Request.SET_VRING_ENABLE, state(0, enabled))
    start(session)
    for addr in (ADDR._replace(flags=1, log=0x5000), ADDR):
        effects, reply = run(session, Request.SET_VRING_ADDR, addr.encode())
        assert (effects, reply) == ([fx.LogRing(0, addr)], None)


def test_a_log_that_is_refused_leaves_the_one_before(session: Session) -> None:
    start(session)
    addr = ADDR._replace(flags=1, log=0x5000)
    refused(session, Request.SET_VRING_ADDR, addr.encode(), answer=no)
    effects, _ = run(session, Request.SET_VRING_KICK, VringFd(0, True).encode(), (7,))
    assert effects == [fx.StartRing(0, 256, ADDR, 0, 7, True)]


def test_a_ring_that_cannot_start_is_not_running(session: Session) -> None:
    prepare(session)
    refused(session, Request.SET_VRING_KICK, VringFd(0, True).encode(), (7,), answer=no)
    run(session, Request.SET_VRING_NUM, state(0, 64))


def test_a_ring_that_cannot_be_enabled_is_not(session: Session) -> None:
    choose(session)
    start(session)
    refused(session, Request.SET_VRING_ENABLE, state(0, 1), answer=no)
    effects, _ = run(session, Request.SET_VRING_KICK, VringFd(0, True).encode(), (7,))
    assert effects == [fx.StartRing(0, 256, ADDR, 0, 7, False)]


def test_a_ring_that_cannot_stop_runs_on(session: Session) -> None:
    start(session)
    refused(session, Request.GET_VRING_BASE, state(0, 0), answer=no)
    refused(session, Request.SET_VRING_NUM, state(0, 64))


@pytest.mark.parametrize("ring", [4, 127, 255])
def test_a_frontend_may_have_more_queues_than_were_told(session: Session, ring: int) -> None:
    assert start(session, ring).ring == ring


STATES = [
    Request.SET_VRING_NUM,
    Request.SET_VRING_BASE,
    Request.GET_VRING_BASE,
    Request.SET_VRING_ENABLE,
]
FD_MESSAGES = [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]


@pytest.mark.parametrize("ring", [256, 65537, 1 << 31, 0xFFFF_FFFF])
@pytest.mark.parametrize("request_", [*STATES, Request.SET_VRING_ADDR])
def test_a_queue_that_does_not_exist_is_refused(
    session: Session, request_: Request, ring: int
) -> None:
    is_addr = request_ == Request.SET_VRING_ADDR
    refused(session, request_, ADDR._replace(ring=ring).encode() if is_addr else state(ring, 1))


@pytest.mark.parametrize("request_", FD_MESSAGES)
def test_a_queue_has_eight_bits_beside_a_fd(session: Session, request_: Request) -> None:
    refused(session, request_, encode_u64(1 << 16), (7,))


# What a frontend says of its queues


def test_the_queues_a_frontend_names_at_first_are_those_it_has(session: Session) -> None:
    assert session.named is None
    for ring in (3, 9, 2):
        run(session, Request.SET_VRING_CALL, VringFd(ring, True).encode(), (7,))
    assert session.named == 10


def test_queues_named_once_a_ring_runs_say_nothing(session: Session) -> None:
    start(session, 1)
    prepare(session, 9)
    assert session.named == 2


def test_queues_named_once_the_configuration_was_read_say_nothing(full: Session) -> None:
    payload = ConfigSpan(0, 0, bytes(4)).encode()
    run(full, Request.GET_CONFIG, payload, answer=lambda _: bytes(4))
    prepare(full, 9)
    assert full.named is None


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


def test_a_config_read_is_answered_with_its_span(full: Session) -> None:
    payload = ConfigSpan(4, 0, bytes(3)).encode()
    effects, reply = run(full, Request.GET_CONFIG, payload, answer=lambda _: b"abc")
    assert effects == [fx.ReadConfig(4, 3)]
    assert reply == struct.pack("=III", 4, 3, 0) + b"abc"


def test_a_config_read_past_the_end_is_answered_with_nothing(full: Session) -> None:
    payload = ConfigSpan(10, 0, bytes(4)).encode()
    assert run(full, Request.GET_CONFIG, payload, answer=no) == ([fx.ReadConfig(10, 4)], b"")


@pytest.mark.parametrize("flags", [0, 1])
def test_a_config_write_is_passed_on(full: Session, flags: int) -> None:
    payload = ConfigSpan(8, flags, b"A\0\0\0").encode()
    effects, reply = run(full, Request.SET_CONFIG, payload)
    assert (effects, reply) == ([fx.WriteConfig(8, b"A\0\0\0", flags)], None)


def test_a_config_write_past_the_end_is_refused(full: Session) -> None:
    refused(full, Request.SET_CONFIG, ConfigSpan(10, 0, bytes(4)).encode(), answer=no)


# Migration


def test_a_log_is_set_and_its_words_sent_back(full: Session) -> None:
    payload = LogArea(0x1000, 0x20).encode()
    effects, reply = run(full, Request.SET_LOG_BASE, payload, (5,))
    assert (effects, reply) == ([fx.SetLog(LogArea(0x1000, 0x20), 5)], payload)


def test_a_log_that_cannot_be_is_refused(full: Session) -> None:
    refused(full, Request.SET_LOG_BASE, LogArea(1, 0).encode(), (5,), answer=no)


@pytest.mark.parametrize("fds", [(), (5, 6)])
@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (Request.SET_LOG_BASE, LogArea(1, 0).encode()),
        (Request.SET_LOG_FD, b""),
        (Request.SET_INFLIGHT_FD, InflightArea(1, 0, 1, 1).encode()),
    ],
)
def test_an_area_or_event_is_one_fd(
    full: Session, request_: Request, payload: bytes, fds: tuple[int, ...]
) -> None:
    refused(full, request_, payload, fds)


def test_a_logs_event_is_passed_on(full: Session) -> None:
    assert run(full, Request.SET_LOG_FD, b"", (5,)) == ([fx.SetLogEvent(5)], None)


@pytest.mark.parametrize("size", [20, 24])
def test_an_inflight_area_is_answered_in_the_frontends_layout(full: Session, size: int) -> None:
    asked = InflightArea(0, 0, 4, 64).encode()[:size]
    steps = full.handle(Request.GET_INFLIGHT_FD, asked, [])
    assert next(steps) == fx.MakeInflight(4, 64)
    with pytest.raises(StopIteration) as done:
        steps.send((4096, 32, 8))
    assert done.value.value == fx.Reply(InflightArea(4096, 32, 4, 64).encode()[:size], 8)


def test_an_inflight_area_that_cannot_be_made_has_no_bytes_and_no_fd(full: Session) -> None:
    steps = full.handle(Request.GET_INFLIGHT_FD, InflightArea(0, 0, 4, 0).encode(), [])
    next(steps)
    with pytest.raises(StopIteration) as done:
        steps.throw(RefusedError("no"))
    assert done.value.value == fx.Reply(InflightArea(0, 0, 4, 0).encode())


@pytest.mark.parametrize("queues", [257, 0xFFFF])
def test_no_inflight_area_is_for_more_queues_than_there_can_be(full: Session, queues: int) -> None:
    area = InflightArea(1 << 40, 0, queues, 64)
    nothing = area._replace(size=0).encode()
    assert run(full, Request.GET_INFLIGHT_FD, area.encode()) == ([], nothing)
    refused(full, Request.SET_INFLIGHT_FD, area.encode(), (5,))


def test_an_inflight_area_is_passed_on(full: Session) -> None:
    area = InflightArea(4096, 32, 4, 64)
    effects, reply = run(full, Request.SET_INFLIGHT_FD, area.encode(), (5,))
    assert (effects, reply) == ([fx.SetInflight(area, 5)], None)


TRANSFERS = [(0, fx.SaveState(5)), (1, fx.LoadState(5))]
ACCEPTED, NOT_ACCEPTED = encode_u64(0x100), encode_u64(0x101)


@pytest.mark.parametrize(("direction", "effect"), TRANSFERS)
def test_a_state_is_moved_through_the_frontends_own_fd(
    full: Session, direction: int, effect: fx.Effect
) -> None:
    payload = StateTransfer(direction, 0).encode()
    assert run(full, Request.SET_DEVICE_STATE_FD, payload, (5,)) == ([effect], ACCEPTED)


@pytest.mark.parametrize(("direction", "effect"), TRANSFERS)
def test_a_state_is_not_moved_while_a_queue_runs(
    full: Session, direction: int, effect: fx.Effect
) -> None:
    start(full)
    payload = StateTransfer(direction, 0).encode()
    assert run(full, Request.SET_DEVICE_STATE_FD, payload, (5,)) == ([], NOT_ACCEPTED)
    run(full, Request.GET_VRING_BASE, state(0, 0), answer=lambda _: 0)
    assert run(full, Request.SET_DEVICE_STATE_FD, payload, (5,)) == ([effect], ACCEPTED)


@pytest.mark.parametrize(
    ("direction", "phase", "fds"), [(2, 0, (5,)), (0, 1, (5,)), (0, 0, ()), (1, 0, (5, 6))]
)
def test_a_state_that_is_asked_for_wrongly_is_not_moved(
    full: Session, direction: int, phase: int, fds: tuple[int, ...]
) -> None:
    payload = StateTransfer(direction, phase).encode()
    assert run(full, Request.SET_DEVICE_STATE_FD, payload, fds) == ([], NOT_ACCEPTED)


def test_a_state_that_the_device_refuses_is_not_moved(full: Session) -> None:
    payload = StateTransfer(0, 0).encode()
    _, reply = run(full, Request.SET_DEVICE_STATE_FD, payload, (5,), answer=no)
    assert reply == NOT_ACCEPTED


@pytest.mark.parametrize(("whole", "outcome"), [(True, 0), (False, 1)])
def test_how_a_state_was_moved_is_told(full: Session, whole: bool, outcome: int) -> None:
    effects, reply = run(full, Request.CHECK_DEVICE_STATE, answer=lambda _: whole)
    assert (effects, reply) == ([fx.CheckState()], encode_u64(outcome))


# The device's own life


def test_a_reset_stops_all_rings_and_forgets_them(full: Session) -> None:
    for ring in (1, 3):
        run(full, Request.SET_VRING_ENABLE, state(ring, 1))
        start(full, ring)
    run(full, Request.SET_STATUS, encode_u64(15))
    effects, reply = run(full, Request.RESET_DEVICE, answer=lambda _: 9)
    assert effects == [fx.StopRing(1), fx.StopRing(3), fx.SetFeatures(0), fx.ResetDevice()]
    assert reply is None
    assert full.chosen == 0
    assert run(full, Request.GET_STATUS, answer=lambda _: False)[1] == encode_u64(0)
    assert run(full, Request.GET_VRING_BASE, state(1, 0))[1] == state(1, 0)
    refused(full, Request.SET_VRING_KICK, VringFd(1, True).encode(), (7,))


def test_a_reset_keeps_what_the_frontend_chose(full: Session) -> None:
    run(full, Request.RESET_DEVICE)
    assert full.protocol == PROTOCOL | INBAND


@pytest.mark.parametrize("broken", [False, True])
def test_a_status_is_kept_and_tells_of_broken_queues(full: Session, broken: bool) -> None:
    assert run(full, Request.SET_STATUS, encode_u64(11)) == ([], None)
    effects, reply = run(full, Request.GET_STATUS, answer=lambda _: broken)
    assert (effects, reply) == ([fx.AnyBroken()], encode_u64(75 if broken else 11))


@pytest.mark.parametrize("status", [0x10, 0x20, 0x100, 1 << 63])
def test_a_status_with_unknown_bits_is_refused(full: Session, status: int) -> None:
    run(full, Request.SET_STATUS, encode_u64(1))
    refused(full, Request.SET_STATUS, encode_u64(status | 2))
    assert run(full, Request.GET_STATUS, answer=lambda _: False)[1] == encode_u64(1)


def test_a_status_of_zero_stops_all_rings_and_no_more(full: Session) -> None:
    first = start(full, 2)
    run(full, Request.SET_STATUS, encode_u64(15))
    effects, reply = run(full, Request.SET_STATUS, encode_u64(0), answer=lambda _: 9)
    assert (effects, reply) == ([fx.StopRing(2)], None)
    effects, _ = run(full, Request.SET_VRING_KICK, VringFd(2, True).encode(), (7,))
    assert effects == [first._replace(base=9)]


# What is not a message

HANDLED: dict[Request, bytes] = {
    Request.GET_FEATURES: b"",
    Request.SET_FEATURES: encode_u64(0),
    Request.SET_OWNER: b"",
    Request.RESET_OWNER: b"",
    Request.SET_MEM_TABLE: encode_regions(REGIONS),
    Request.SET_LOG_BASE: LogArea(4096, 0).encode(),
    Request.SET_LOG_FD: b"",
    Request.SET_VRING_NUM: state(0, 64),
    Request.SET_VRING_ADDR: ADDR.encode(),
    Request.SET_VRING_BASE: state(0, 0),
    Request.GET_VRING_BASE: state(0, 0),
    Request.SET_VRING_KICK: VringFd(0, True).encode(),
    Request.SET_VRING_CALL: VringFd(0, True).encode(),
    Request.SET_VRING_ERR: VringFd(0, True).encode(),
    Request.GET_PROTOCOL_FEATURES: b"",
    Request.SET_PROTOCOL_FEATURES: encode_u64(PROTOCOL | INBAND),
    Request.GET_QUEUE_NUM: b"",
    Request.SET_VRING_ENABLE: state(0, 1),
    Request.SET_BACKEND_REQ_FD: b"",
    Request.GET_CONFIG: ConfigSpan(0, 0, bytes(4)).encode(),
    Request.SET_CONFIG: ConfigSpan(0, 0, bytes(4)).encode(),
    Request.GET_INFLIGHT_FD: InflightArea(0, 0, 4, 64).encode(),
    Request.SET_INFLIGHT_FD: InflightArea(4096, 0, 4, 64).encode(),
    Request.RESET_DEVICE: b"",
    Request.VRING_KICK: state(0, 0),
    Request.GET_MAX_MEM_SLOTS: b"",
    Request.ADD_MEM_REG: encode_region(REGIONS[0]),
    Request.REM_MEM_REG: encode_region(REGIONS[0]),
    Request.SET_STATUS: encode_u64(0),
    Request.GET_STATUS: b"",
    Request.SET_DEVICE_STATE_FD: StateTransfer(0, 0).encode(),
    Request.CHECK_DEVICE_STATE: b"",
}
WITH_FDS = {
    Request.SET_MEM_TABLE,
    Request.SET_LOG_BASE,
    Request.SET_LOG_FD,
    *FD_MESSAGES,
    Request.SET_BACKEND_REQ_FD,
    Request.SET_INFLIGHT_FD,
    Request.ADD_MEM_REG,
    Request.REM_MEM_REG,
    Request.SET_DEVICE_STATE_FD,
}

#: Which feature each message is of; for the others it is enough that there are messages.
OF_FEATURES = {
    Request.SET_LOG_BASE: 1,
    Request.SET_LOG_FD: 1,
    Request.GET_CONFIG: 9,
    Request.SET_CONFIG: 9,
    Request.GET_INFLIGHT_FD: 12,
    Request.SET_INFLIGHT_FD: 12,
    Request.RESET_DEVICE: 13,
    Request.VRING_KICK: 14,
    Request.GET_MAX_MEM_SLOTS: 15,
    Request.ADD_MEM_REG: 15,
    Request.REM_MEM_REG: 15,
    Request.SET_STATUS: 16,
    Request.GET_STATUS: 16,
    Request.SET_DEVICE_STATE_FD: 19,
    Request.CHECK_DEVICE_STATE: 19,
}


@pytest.mark.parametrize(("request_", "bit"), OF_FEATURES.items())
def test_a_message_of_a_feature_that_was_not_chosen_is_refused(
    full: Session, request_: Request, bit: int
) -> None:
    chosen = (PROTOCOL | INBAND) & ~(1 << bit)
    run(full, Request.SET_PROTOCOL_FEATURES, encode_u64(chosen))
    refused(full, request_, HANDLED[request_], (7,) if request_ in WITH_FDS else ())


@pytest.mark.parametrize("request_", [0, *(set(Request) - HANDLED.keys()), 44, 99, 0xFFFF_FFFF])
def test_a_request_that_is_unknown_or_not_offered_is_refused(
    session: Session, request_: int
) -> None:
    refused(session, request_)
    refused(session, request_, bytes(8), (7,))


@pytest.mark.parametrize("request_", HANDLED.keys() - WITH_FDS)
def test_fds_where_none_belong_are_refused(full: Session, request_: Request) -> None:
    refused(full, request_, HANDLED[request_], (7,))


@pytest.mark.parametrize("request_", HANDLED)
def test_a_payload_of_a_wrong_size_is_the_frontends_error(full: Session, request_: Request) -> None:
    fds = {Request.SET_MEM_TABLE: (5, 6)}.get(request_, (7,) if request_ in WITH_FDS else ())
    prepare(full)
    right = HANDLED[request_]
    wrong = right[:-1] if right else b"x"
    with pytest.raises(FrontendError) as caught:
        run(full, request_, wrong, fds)
    assert not isinstance(caught.value, RefusedError)
