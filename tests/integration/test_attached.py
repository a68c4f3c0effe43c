"""Who is attached over the monitor socket: history, offsets, roles, and whoever is killed."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
from scene import assert_same, attach, boot, converse, exactly, numbered, wait_port
from vhost_device_console import monitor
from vhost_device_console.attachment import Ask, AskWho, Hello, Role, Size, Who
from vhost_device_console.errors import ConsoleError
from vhost_device_console.people.link import Dropped, Event, Gap, Link, LinkLostError

from conftest import StartDaemon
from launch import WITHIN, Daemon, wait_readable

#: A daemon that restarts its workers at once.
HASTY = [
    sys.executable,
    "-c",
    "from vhost_device_console import cli, supervision; supervision.delay = lambda _: 0.0; "
    "cli.main()",
]


class Person:
    """Somebody with a link; what came is in `output`, and `seen`."""

    def __init__(self, daemon: Daemon, **request: object) -> None:
        self.daemon = daemon
        asked = {"guest": daemon.status()[0]["name"], "name": "somebody", **request}
        self.link = Link(monitor.Attach(**asked))  # type: ignore[arg-type]
        self.output = bytearray()
        self.seen: list[Event] = []
        self.link.connect(daemon.monitor)

    def take(self) -> None:
        for event in self.link.receive():
            if isinstance(event, memoryview):
                self.output += event
            else:
                self.seen.append(event)

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + WITHIN
        while not condition():
            wait_readable(self.link.fileno(), deadline, f"{what}: {self.seen}")
            self.take()

    def read(self, count: int) -> bytes:
        self.until(lambda: len(self.output) >= count, f"{count} bytes, not {len(self.output)}")
        data = bytes(self.output[:count])
        del self.output[:count]
        return data

    def expect(self, kind: type, **fields: object) -> Event:
        def found() -> list[Event]:
            return [
                event
                for event in self.seen
                if isinstance(event, kind)
                and all(getattr(event, name) == value for name, value in fields.items())
            ]

        self.until(found, f"{kind.__name__} {fields}")
        event = found()[0]
        self.seen.remove(event)
        return event

    def type(self, data: bytes) -> None:
        while data:
            count = self.link.type(data)
            data = data[count:]
            if not count:
                self.until(lambda: self.link.unacknowledged == 0, "acknowledgements")


@contextmanager
def person(daemon: Daemon, **request: object) -> Iterator[Person]:
    somebody = Person(daemon, **request)
    try:
        somebody.expect(Hello)
        somebody.expect(Role)
        yield somebody
    finally:
        somebody.link.close()


@pytest.fixture
def served(daemon: StartDaemon) -> Daemon:
    return daemon("unix", 1, program=HASTY)


def test_history_comes_first_and_then_what_is_new(served: Daemon) -> None:
    with boot(served) as console:
        console.write(b"before ")
        with person(served) as somebody:
            console.write(b"after")
            assert somebody.read(12) == b"before after"


@pytest.mark.parametrize(("replay", "seen"), [(0, b"now"), (3, b"orenow"), (100, b"beforenow")])
def test_as_much_history_as_is_asked_for(served: Daemon, replay: int, seen: bytes) -> None:
    with boot(served) as console:
        console.write(b"before")
        with person(served, replay=replay) as somebody:
            console.write(b"now")
            assert somebody.read(len(seen)) == seen


def test_the_first_writes_and_others_watch(served: Daemon) -> None:
    with boot(served) as console, person(served) as first, person(served) as second:
        assert (first.link.writer, second.link.writer) == (True, False)
        assert second.link.type(b"no") == 0
        first.type(b"yes")
        assert console.read(3) == b"yes"
        console.write(b"both")
        assert (first.read(4), second.read(4)) == (b"both", b"both")


def test_the_role_is_taken_by_force(served: Daemon) -> None:
    with boot(served) as console, person(served, name="a") as first, person(served) as second:
        second.link.ask(Ask(write=True))
        second.expect(Role, writer=False, by="a")
        second.link.ask(Ask(write=True, force=True))
        second.expect(Role, writer=True)
        first.expect(Role, writer=False)
        second.type(b"mine")
        assert console.read(4) == b"mine"


def test_the_next_one_writes_when_the_writer_has_left(served: Daemon) -> None:
    with boot(served) as console, person(served) as first, person(served) as second:
        first.link.close()
        second.expect(Role, writer=True)
        second.type(b"next")
        assert console.read(4) == b"next"


def test_who_only_watches_never_writes(served: Daemon) -> None:
    with boot(served), person(served, write=False) as watcher:
        assert not watcher.link.writer
        with person(served) as writer:
            assert writer.link.writer
        wait_port(served, readers=1)
        watcher.link.ask(AskWho())
        assert len(watcher.expect(Who).people) == 1  # type: ignore[union-attr]
        assert not watcher.link.writer


def test_who_looks_is_nobody(served: Daemon) -> None:
    """Not listed, and never the writer, nor asked for its size."""
    looker = Person(served, look=True, columns=9, rows=9)
    with boot(served) as console, closing(looker.link):
        looker.expect(Hello)
        looker.link.ask(Ask(write=True, force=True))
        looker.link.ask(AskWho())
        assert looker.expect(Who).people == []  # type: ignore[union-attr]
        assert not looker.link.writer
        with person(served) as somebody:
            somebody.type(b"mine")
            assert console.read(4) == b"mine"
        wait_port(served, columns=0, rows=0)


def test_what_is_no_pair_is_refused_in_a_line(served: Daemon) -> None:
    request = monitor.Attach(guest=served.status()[0]["name"], name="x")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as alone,
        pytest.raises(ConsoleError, match="one end of a SOCK_SEQPACKET pair has to come"),
    ):
        monitor.attach(served.monitor, request, alone)


def test_who_keeps_the_worker_s_end_cannot_have_it_wait(served: Daemon) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with boot(served) as console, ours, theirs:
        request = monitor.Attach(guest=served.status()[0]["name"], name="x")
        monitor.attach(served.monitor, request, theirs)
        assert ours.recv(1)
        theirs.setblocking(True)
        console.write(numbered(1 << 20))  # more than there is room for
        with person(served, replay=0) as somebody:
            console.write(b"still here")
            assert somebody.read(10) == b"still here"


def test_since_an_offset_of_whichever_journal_there_is(served: Daemon) -> None:
    with boot(served) as console:
        console.write(b"0123456789")
        with person(served, since=7) as somebody:
            assert somebody.read(3) == b"789"
            assert not [event for event in somebody.seen if isinstance(event, Gap)]


def test_who_is_here(served: Daemon) -> None:
    with (
        boot(served),
        person(served, name="ann", columns=80, rows=24),
        attach(served, readers=2),
        person(served, name="bob") as second,
    ):
        second.link.ask(AskWho())
        who = second.expect(Who)
        told = [(p.name, p.attached, p.writer, p.you) for p in who.people]  # type: ignore[union-attr]
        assert told == [
            ("ann", True, True, False),
            ("unix client", False, True, False),
            ("bob", True, False, True),
        ]


def test_the_size_is_the_guest_s(served: Daemon) -> None:
    with boot(served) as console, person(served, columns=80, rows=24) as somebody:
        wait_port(served, columns=80, rows=24)
        somebody.link.ask(Size(132, 50))
        wait_port(served, columns=132, rows=50, size_by="somebody")
        assert console is not None


def test_nothing_is_lost_or_doubled_when_workers_are_killed(served: Daemon) -> None:
    """Neither way; what a unix socket cannot tell, offsets do."""
    total = 1 << 20
    out, typed = numbered(total), numbered(1 << 16)
    with boot(served) as console, person(served) as somebody:
        for at in range(0, 1 << 16, 1 << 12):
            somebody.type(typed[at : at + (1 << 12)])
            for start in range(at * 16, (at + (1 << 12)) * 16, 1 << 14):
                console.write(out[start : start + (1 << 14)])
            served.kill_worker()
        assert_same(somebody.read(total), out)
        somebody.until(lambda: somebody.link.unacknowledged == 0, "acknowledgements")
        assert_same(console.read(1 << 16), typed)
        assert not [e for e in somebody.seen if isinstance(e, Gap | Dropped)]


def test_a_slow_one_finds_a_gap_that_the_offsets_show(served: Daemon) -> None:
    with boot(served) as console, person(served) as somebody:
        console.write(numbered(4 << 20), depth=16)
        console.write(b"the end")
        somebody.until(lambda: somebody.output.endswith(b"the end"), "the end")
        gaps = sum(event.missing or 0 for event in somebody.seen if isinstance(event, Gap))
        assert gaps > 0
        assert gaps + len(somebody.output) == (4 << 20) + 7


def test_who_comes_again_goes_on_where_they_were(served: Daemon) -> None:
    with boot(served) as console, person(served) as somebody:
        console.write(b"one ")
        assert somebody.read(4) == b"one "
        somebody.link.close()
        console.write(b"two")
        somebody.link.connect(served.monitor)
        assert somebody.read(3) == b"two"


def test_another_daemon_is_another_journal(daemon: StartDaemon) -> None:
    served = daemon("unix", 1)
    with boot(served) as console, person(served) as somebody:
        console.write(b"one ")
        assert somebody.read(4) == b"one "
        served.close()
        with pytest.raises(LinkLostError):
            somebody.until(lambda: False, "the end")
        served = daemon("unix", 1)
        with boot(served) as console:
            console.write(b"two")
            somebody.link.connect(served.monitor)
            somebody.expect(Gap, missing=None)
            assert somebody.read(3) == b"two"


def test_plain_clients_type_as_before(served: Daemon) -> None:
    with boot(served) as console, attach(served) as peer, person(served) as somebody:
        converse(console, peer)
        somebody.type(b"too")
        assert console.read(3) == b"too"
        console.write(b"all")
        assert exactly(peer, 3) == b"all"


Turns = Callable[[str], Daemon]


@pytest.fixture
def turns(daemon: StartDaemon) -> Turns:
    """Give a function that starts a daemon whose plain clients' typing counts so."""
    return lambda typing: daemon("unix", 1, "--typing", typing, program=HASTY)


def test_plain_clients_take_turns(turns: Turns) -> None:
    """What the second types waits until the first has left, also when a worker dies."""
    served = turns("first")
    with boot(served) as console, attach(served) as second:
        second.sendall(b"first ")
        assert console.read(6) == b"first "
        with attach(served, readers=2) as third:
            third.sendall(b"third")
            served.kill_worker()
            second.sendall(b"second ")
            assert console.read(7) == b"second "
            second.close()
            assert console.read(5) == b"third"


def test_plain_clients_and_those_who_attach_take_turns_together(
    turns: Turns,
) -> None:
    served = turns("first")
    with boot(served) as console, attach(served) as peer, person(served) as somebody:
        assert not somebody.link.writer
        peer.close()
        somebody.expect(Role, writer=True)
        somebody.type(b"now")
        assert console.read(3) == b"now"


@pytest.mark.parametrize("typing", ["first", "none"])
def test_who_leaves_before_its_turn_is_gone(turns: Turns, typing: str) -> None:
    served = turns(typing)
    with boot(served) as console, attach(served) as first:
        with attach(served, readers=2) as second:
            second.sendall(b"unheard")
        served.expect_log("typed 7 bytes that do not count, and has ended")
        with person(served, write=False) as somebody:
            somebody.link.ask(AskWho())
            people = somebody.expect(Who).people  # type: ignore[union-attr]
            assert [one.attached for one in people] == [False, True]
        console.write(b"on")
        assert exactly(first, 2) == b"on"


def test_who_has_ended_before_its_turn_holds_nobody_up(turns: Turns) -> None:
    """Also if it is still there, for what it may be answered, when the writer leaves."""
    served = turns("first")
    worker = served.workers()
    with boot(served) as console, attach(served) as first:
        first.sendall(b"one")
        assert console.read(3) == b"one"
        with attach(served, readers=2) as second:
            second.sendall(b"unheard")
            second.shutdown(socket.SHUT_WR)
            served.expect_log("typed 7 bytes that do not count, and has ended")
            first.close()
            with person(served) as somebody:
                somebody.expect(Role, writer=True)
                somebody.type(b"two")
                assert console.read(3) == b"two"
    assert served.workers() == worker


def test_plain_clients_only_watch(turns: Turns) -> None:
    served = turns("none")
    with boot(served) as console, attach(served) as peer, person(served) as somebody:
        peer.sendall(b"unheard")
        somebody.type(b"heard")
        assert console.read(5) == b"heard"
        console.write(b"seen")
        assert exactly(peer, 4) == b"seen"


def test_a_reload_is_not_noticed(served: Daemon) -> None:
    with boot(served) as console, person(served) as somebody:
        (worker,) = served.workers()
        served.signal(signal.SIGHUP)
        served.until(
            lambda guests: guests[0]["state"] == "running" and guests[0]["worker"] != worker,
            "its worker is the old one",
        )
        console.write(b"still")
        assert somebody.read(5) == b"still"
        somebody.type(b"here")
        assert console.read(4) == b"here"
