"""In-band notifications: kicks, calls and errors as messages, as User Mode Linux has them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scene import attach, boot, converse, exactly, noise
from vhost_device_console.testing import (
    ConsoleDriver,
    Frontend,
    GuestMemory,
    SplitDriver,
    connect_like_qemu,
    connect_like_uml,
    stop_like_uml,
)
from vhost_device_console.worker.vhost_user.message import ProtocolFeature

from conftest import StartDaemon
from launch import WITHIN, Daemon, until

INBAND = (
    ProtocolFeature.INBAND_NOTIFICATIONS | ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK
)


@pytest.fixture
def inband(daemon: StartDaemon) -> Daemon:
    return daemon("unix", 1, "--inband")


@pytest.fixture
def uml(inband: Daemon) -> Iterator[ConsoleDriver]:
    """Give the console of a guest all of whose notifications are messages."""
    with (
        GuestMemory.like_uml() as memory,
        connect_like_uml(inband.sockets[0], memory, timeout=WITHIN) as frontend,
    ):
        console = ConsoleDriver(frontend)
        console.wait_open()
        yield console


def test_a_whole_guest(inband: Daemon, uml: ConsoleDriver) -> None:
    """A guest without any descriptor for notifications has its console."""
    with attach(inband) as peer:
        converse(uml, peer)
        stop_like_uml(uml.frontend)


def test_much_both_ways(inband: Daemon, uml: ConsoleDriver) -> None:
    """Nothing is lost among many notifications, in either direction."""
    data = noise(1 << 18)
    with attach(inband) as peer:
        uml.write(data, chunk=512, depth=8)
        assert exactly(peer, len(data)) == data
        peer.sendall(data)
        assert uml.read(len(data)) == data


def test_a_kick_is_served_before_it_is_acknowledged(uml: ConsoleDriver) -> None:
    """What the guest offered is used, and the guest called, once its kick is answered."""
    tx = uml.port.tx
    tx.driver.enable_calls()
    chain = tx.driver.add([b"now"])
    tx.driver.publish()
    tx.kick()
    assert [used.chain for used in tx.driver.reap()] == [chain]
    assert tx.take_calls() == 1


def test_calls_wait_for_the_answer_to_the_one_before(uml: ConsoleDriver) -> None:
    """A frontend that does not get to its calls has one a ring, and one more when it has."""
    tx = uml.port.tx
    frontend = uml.frontend
    others = [queue for queue in frontend.queues.values() if queue is not tx]
    before = sum(queue.called for queue in others)
    frontend.answers = False
    for _ in range(5):
        tx.driver.enable_calls()
        tx.driver.add([b"x"])
        tx.driver.publish()
        tx.kick()
        assert len(tx.driver.reap()) == 1
    assert tx.take_calls() == 1
    channel = frontend.backend_channel
    assert channel is not None
    for _ in range(1 + sum(queue.called for queue in others) - before):
        channel.sendall(bytes.fromhex("04000000 05000000 08000000 0000000000000000"))
    frontend.answers = True
    until(lambda: tx.take_calls() == 1, "the call that waited never came")
    frontend.barrier()
    assert tx.take_calls() == 0


def test_a_call_that_waits_comes_by_the_next_channel(uml: ConsoleDriver) -> None:
    """A frontend that opens another channel gets what the one before had no turn for."""
    tx = uml.port.tx
    frontend = uml.frontend
    frontend.answers = False
    for _ in range(2):
        tx.driver.enable_calls()
        tx.driver.add([b"x"])
        tx.driver.publish()
        tx.kick()
        assert len(tx.driver.reap()) == 1
    assert tx.take_calls() == 1
    frontend.answers = True
    frontend.set_backend_req_fd()
    until(lambda: tx.take_calls() == 1, "the call that waited never came")


def test_an_error_that_came_too_early_comes_by_the_next_channel(uml: ConsoleDriver) -> None:
    """A queue that is broken is told of again to a frontend that opens another channel."""
    tx = uml.port.tx
    tx.driver.offer(tx.driver.size)
    tx.driver.publish()
    tx.kick()
    uml.frontend.set_backend_req_fd()
    while not uml.frontend.broken:  # behind a call for each of the others
        uml.frontend.recv_backend()
    assert uml.frontend.broken == [1]


def test_a_queue_that_breaks_is_told_of(uml: ConsoleDriver) -> None:
    """Instead of an error descriptor there is a message."""
    tx = uml.port.tx
    tx.driver.offer(tx.driver.size)
    tx.driver.publish()
    tx.kick()
    uml.frontend.take_backend()
    assert uml.frontend.broken == [1]


def test_descriptors_are_preferred(inband: Daemon) -> None:
    """A frontend that chose in-band notifications and has descriptors gets no messages."""
    with boot(inband, connect=connect_like_qemu) as console, attach(inband) as peer:
        assert console.frontend.protocol_features & ProtocolFeature.INBAND_NOTIFICATIONS
        converse(console, peer)
        console.frontend.take_backend()
        assert console.frontend.queues[1].called == 0


def test_who_wants_no_calls_gets_no_messages(inband: Daemon, uml: ConsoleDriver) -> None:
    """SET_VRING_CALL without a descriptor says that the guest looks by itself."""
    uml.frontend.set_vring_call(1, None)
    with attach(inband) as peer:
        tx = uml.port.tx
        tx.driver.add([b"quiet"])
        tx.driver.enable_calls()
        tx.notify()
        assert exactly(peer, 5) == b"quiet"
        assert tx.take_calls() == 0


def test_a_ring_can_start_without_a_kick_descriptor(inband: Daemon) -> None:
    """SET_VRING_KICK without a descriptor starts a ring that is kicked by messages."""
    with GuestMemory() as memory, Frontend(inband.sockets[0], timeout=WITHIN) as frontend:
        frontend.negotiate()
        frontend.set_memory(memory)
        frontend.set_backend_req_fd()
        for index in range(4):
            frontend.start_queue(index, SplitDriver(memory, 64), call_as="inband")
            frontend.set_vring_kick(index, None)
        console = ConsoleDriver(frontend)
        console.wait_open()
        with attach(inband) as peer:
            converse(console, peer)


def test_the_frontend_may_close_its_channel(inband: Daemon, uml: ConsoleDriver) -> None:
    """Without the channel there are no calls; everything else goes on."""
    frontend = uml.frontend
    assert frontend.backend_channel is not None
    frontend.backend_channel.close()
    frontend.backend_channel = None
    with attach(inband) as peer:
        tx = uml.port.tx
        tx.driver.add([b"still"])
        tx.notify()
        assert exactly(peer, 5) == b"still"
        assert tx.driver.has_used()


@pytest.mark.parametrize("missing", [ProtocolFeature.BACKEND_REQ, ProtocolFeature.REPLY_ACK])
def test_without_a_channel_or_replies_the_connection_ends(
    inband: Daemon, missing: ProtocolFeature
) -> None:
    """In-band notifications alone are an error that only a hang-up can tell."""
    with Frontend(inband.sockets[0], timeout=WITHIN) as frontend:
        frontend.set_protocol_features(INBAND ^ missing)
        frontend.wait_closed()
    inband.expect_log("in-band notifications without")


def test_kicks_count(inband: Daemon, uml: ConsoleDriver) -> None:
    """Kicks that are messages are counted as others are."""
    before = inband.status()[0]["kicks"]
    uml.frontend.vring_kick(1)
    inband.until(lambda guests: guests[0]["kicks"] > before, "the kick was never counted")


def test_only_who_asked_is_offered_them(daemon: StartDaemon) -> None:
    """Without --inband User Mode Linux has descriptors, which are faster."""
    with Frontend(daemon("unix", 1).sockets[0], timeout=WITHIN) as frontend:
        assert not frontend.get_protocol_features() & ProtocolFeature.INBAND_NOTIFICATIONS
