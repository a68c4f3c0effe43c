"""Consoles in a page, from the page's side: the list, terminals, whoever is slow or killed."""

from __future__ import annotations

import base64
import json
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from scene import assert_same, boot, numbered, wait_port
from test_attached import HASTY
from vhost_device_console.people.web.console import MOST_TYPED, WINDOW
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import ClientConnection

from conftest import StartDaemon
from launch import WITHIN, Daemon
from page import Web

Message = dict[str, Any]


class Page:
    """A page's WebSocket: what was said is in `seen`, output in `output` from offset `begin` on."""

    def __init__(self, socket: ClientConnection, *, shows: bool = True) -> None:
        self.socket = socket
        self.shows = shows
        self.seen: list[Message] = []
        self.output = bytearray()
        self.begin: int | None = None
        self.received = 0

    def say(self, kind: str, **fields: object) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def take(self, within: float) -> None:
        message = self.socket.recv(within)
        if isinstance(message, str):
            self.seen.append(json.loads(message))
            return
        (offset,) = struct.unpack_from("<Q", message)
        data = message[8:]
        if self.begin is None:
            self.begin = offset
        assert offset >= self.begin + len(self.output) or self.missing(), "it comes twice"
        self.output += data
        self.received += len(data)
        if self.shows:
            self.show()

    def missing(self) -> int:
        return sum(each["missing"] for each in self.seen if each["type"] == "gap")

    def take_window(self) -> None:
        """Take what is sent to a page that shows nothing."""
        self.until(lambda: self.received >= WINDOW, "a window full")
        for _ in range(3):
            assert self.socket.ping().wait(WITHIN)  # what was sent before has come
        with suppress(TimeoutError):
            while True:
                self.take(0)

    def show(self) -> None:
        self.say("shown", count=self.received)

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + WITHIN
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, f"{what}: {self.seen}"
            self.take(left)

    def read(self, count: int) -> bytes:
        self.until(lambda: len(self.output) >= count, f"{count} bytes, not {len(self.output)}")
        return bytes(self.output[:count])

    def expect(self, kind: str, **fields: object) -> Message:
        """Return the next message of a kind with these fields; it is seen no more."""

        def found() -> list[Message]:
            wanted = {"type": kind, **fields}
            return [each for each in self.seen if wanted.items() <= each.items()]

        self.until(found, f"{kind} {fields}")
        message = found()[0]
        self.seen.remove(message)
        return message

    def type(self, data: bytes) -> None:
        """Type as a page does: never more at a time than it may."""
        for at in range(0, len(data), MOST_TYPED):
            part = data[at : at + MOST_TYPED]
            self.socket.send(part)
            self.expect_taken(at + len(part))

    def expect_taken(self, count: int) -> None:
        self.until(
            lambda: any(e["type"] == "taken" and e["count"] >= count for e in self.seen),
            f"{count} bytes taken",
        )


@pytest.fixture
def served(daemon: StartDaemon) -> Daemon:
    return daemon("unix", 1, program=HASTY)


@pytest.fixture
def web(folder: Path) -> Iterator[Web]:
    with Web(folder) as server:
        server.login()
        yield server


def the_guest(web: Web) -> str:
    with web.connect("/guests") as socket:
        guests = Page(socket).expect("guests")["order"]
    assert len(guests) == 1
    return str(guests[0])


@contextmanager
def page(web: Web, *, shows: bool = True, guest: str | None = None, **how: Any) -> Iterator[Page]:
    """Give a page at the guest's console, once it knows its role."""
    name = guest or the_guest(web)
    with web.connect("/console") as socket:
        made = Page(socket, shows=shows)
        made.say("open", guest=name, **how)
        made.hello = made.expect("hello")  # type: ignore[attr-defined]
        made.expect("role")
        yield made


def test_the_list_has_every_guest_and_what_changes(served: Daemon, web: Web) -> None:
    with web.connect("/guests") as socket:
        listed = Page(socket)
        (guest,) = listed.expect("guests")["changed"]
        assert (guest["state"], guest["connected"]) == ("running", False)
        assert guest["ports"][0]["output"] == 0
        with boot(served) as console:
            console.write(b"twelve bytes")

            def told(port: Message) -> bool:
                return bool(port["output"] == 12 and port["open"])

            listed.until(
                lambda: any(told(p) for e in listed.seen for g in e["changed"] for p in g["ports"]),
                "12 bytes",
            )
            listed.until(
                lambda: any(
                    g["connected"] and p["out_rate"] > 0
                    for e in listed.seen
                    for g in e["changed"]
                    for p in g["ports"]
                ),
                "a rate",
            )


def test_the_list_goes_on_without_a_daemon(daemon: StartDaemon, web: Web) -> None:
    with web.connect("/guests") as socket:
        listed = Page(socket)
        listed.expect("guests", order=[])
        served = daemon("unix", 2)
        listed.until(lambda: len(listed.seen[-1:] and listed.seen[-1]["order"]) == 2, "two")
        served.close()
        listed.expect("guests", order=[])


def test_a_screen_that_is_looked_at_is_told_as_it_changes(served: Daemon, web: Web) -> None:
    with boot(served) as console, web.connect("/guests") as socket:
        console.write(b"first")
        listed = Page(socket)
        (guest,) = listed.expect("guests")["order"]
        listed.say("look", at=[guest, "no such guest"])
        assert base64.b64decode(listed.expect("screen", id=guest)["data"]) == b"first"
        console.write(b" second")
        assert base64.b64decode(listed.expect("screen", id=guest)["data"]) == b"first second"


def test_history_comes_first_and_then_what_is_new(served: Daemon, web: Web) -> None:
    with boot(served) as console:
        console.write(b"before ")
        with page(web) as somebody:
            console.write(b"after")
            assert somebody.read(12) == b"before after"
            assert somebody.begin == 0


def test_as_much_history_as_is_asked_for(served: Daemon, web: Web) -> None:
    with boot(served) as console:
        console.write(b"before")
        with page(web, replay=3) as somebody:
            assert somebody.read(3) == b"ore"
            assert somebody.begin == 3


def test_what_is_typed_reaches_the_guest_and_is_told_to_be_taken(served: Daemon, web: Web) -> None:
    typed = numbered(4 * MOST_TYPED)
    with boot(served) as console, page(web) as somebody:
        for at in range(0, len(typed), MOST_TYPED // 2):
            somebody.socket.send(typed[at : at + MOST_TYPED // 2])
            assert_same(console.read(MOST_TYPED // 2), typed[at : at + MOST_TYPED // 2])
        somebody.expect_taken(len(typed))


def test_the_size_is_the_guest_s(served: Daemon, web: Web) -> None:
    with boot(served), page(web, columns=80, rows=24) as somebody:
        wait_port(served, columns=80, rows=24)
        somebody.say("size", columns=132, rows=50)
        wait_port(served, columns=132, rows=50)


def test_one_types_and_the_other_may_take_it_by_force(served: Daemon, web: Web) -> None:
    with boot(served) as console, page(web) as first, page(web) as second:
        second.socket.send(b"not heard")
        second.expect("dropped", count=9)
        second.say("ask", write=True, force=True)
        second.expect("role", writer=True)
        first.expect("role", writer=False)
        second.type(b"mine")
        assert console.read(4) == b"mine"


def test_who_only_watches_never_types(served: Daemon, web: Web) -> None:
    with boot(served), page(web, write=False) as watcher:
        watcher.say("ask-who")
        (me,) = watcher.expect("who")["people"]
        assert (me["name"], me["you"], me["writer"]) == ("127.0.0.1 (web)", True, False)


def test_a_proxy_says_who_it_is(served: Daemon, folder: Path) -> None:
    path = folder / "page.sock"
    with Web(folder, "--no-login", listen=f"unix:{path}") as server, boot(served):
        guest = the_guest(server)
        with server.connect("/console", **{"X-Remote-User": "ann"}) as socket:
            somebody = Page(socket)
            somebody.say("open", guest=guest)
            somebody.expect("hello")
            somebody.say("ask-who")
            assert somebody.expect("who")["people"][0]["name"] == "ann (web)"


def test_a_page_s_own_word_on_who_it_is_counts_nothing(served: Daemon, web: Web) -> None:
    with boot(served):
        guest = the_guest(web)
        with web.connect(
            "/console", **{"X-Remote-User": "ann", "X-Forwarded-For": "ann"}
        ) as socket:
            somebody = Page(socket)
            somebody.say("open", guest=guest)
            somebody.expect("hello")
            somebody.say("ask-who")
            assert somebody.expect("who")["people"][0]["name"] == "127.0.0.1 (web)"


def test_who_comes_again_goes_on_where_they_were(served: Daemon, web: Web) -> None:
    with boot(served) as console:
        with page(web) as somebody:
            console.write(b"one ")
            assert somebody.read(4) == b"one "
            journal = somebody.hello["journal"]  # type: ignore[attr-defined]
        console.write(b"two")
        with page(web, since=4, journal=journal) as again:
            assert again.read(3) == b"two"
            assert again.begin == 4


def test_a_gap_is_told(served: Daemon, web: Web) -> None:
    with boot(served) as console:
        with page(web) as somebody:
            console.write(b"begin")
            somebody.read(5)
            journal = somebody.hello["journal"]  # type: ignore[attr-defined]
        console.write(numbered(2 << 20), depth=16)
        with page(web, since=5, journal=journal) as again:
            total = (2 << 20) + 5
            again.until(lambda: again.begin is not None and again.missing() > 0, "a gap")
            again.until(
                lambda: (again.missing() + len(again.output)) == total - 5, "all that there is"
            )
            assert again.begin == 5 + again.seen[0]["missing"]


def test_nothing_is_lost_or_doubled_when_workers_are_killed(served: Daemon, web: Web) -> None:
    out = numbered(1 << 18)
    with boot(served) as console, page(web) as somebody:
        for at in range(0, 1 << 18, 1 << 16):
            console.write(out[at : at + (1 << 16)])
            somebody.type(b"key")
            served.kill_worker()
        assert_same(somebody.read(1 << 18), out)
        assert console.read(12) == b"key" * 4
        assert not [each for each in somebody.seen if each["type"] in ("gap", "dropped", "waiting")]


def test_a_page_that_shows_nothing_is_sent_no_more_than_it_may(served: Daemon, web: Web) -> None:
    """It lags, as anybody who is slow, and finds a gap when it goes on."""
    total = 4 << 20
    with boot(served) as console, page(web, shows=False) as slow:
        console.write(numbered(total), depth=16)
        slow.take_window()
        assert slow.received == WINDOW
        slow.shows = True
        slow.show()
        console.write(b"the end")
        slow.until(lambda: slow.output.endswith(b"the end"), "the end")
        assert slow.missing() > 0
        assert slow.missing() + len(slow.output) == total + 7


def test_a_page_that_is_slow_holds_neither_the_guest_nor_another_page(
    served: Daemon, web: Web
) -> None:
    with boot(served) as console, page(web, shows=False, write=False) as slow, page(web) as other:
        console.write(numbered(WINDOW * 2), depth=16)
        assert_same(other.read(WINDOW * 2), numbered(WINDOW * 2))
        other.type(b"goes on")
        assert console.read(7) == b"goes on"
        slow.take_window()
        assert slow.received == WINDOW


def test_another_daemon_is_waited_for_and_has_another_journal(
    daemon: StartDaemon, web: Web
) -> None:
    served = daemon("unix", 1)
    with page(web) as somebody:
        with boot(served) as console:
            console.write(b"one ")
            somebody.read(4)
        served.close()
        somebody.expect("waiting")
        served = daemon("unix", 1)
        somebody.expect("gap", missing=None)
        hello = somebody.expect("hello")
        assert hello["journal"] != somebody.hello["journal"]  # type: ignore[attr-defined]
        somebody.expect("role", writer=True)
        with boot(served) as console:
            somebody.type(b"still here")
            assert console.read(10) == b"still here"


def test_a_guest_that_is_not_there_is_waited_for(web: Web) -> None:
    with web.connect("/console") as socket:
        somebody = Page(socket)
        somebody.say("open", guest="vm\n/x")
        assert somebody.expect("waiting")["why"] == "there is no guest vm now"


@pytest.mark.usefixtures("served")
def test_a_port_that_is_not_there_is_said(web: Web) -> None:
    guest = the_guest(web)
    with web.connect("/console") as socket:
        somebody = Page(socket)
        somebody.say("open", guest=guest, port="9")
        assert "port" in somebody.expect("waiting")["why"]


@pytest.mark.parametrize(
    "first",
    [
        "",
        "{",
        "[]",
        '{"type":"size"}',
        b"typed",
        '{"type":"open","guest":"a","journal":"-1"}',
        "[" * 9999,
    ],
)
def test_a_page_that_begins_with_nonsense_is_hung_up_on(web: Web, first: str | bytes) -> None:
    with web.connect("/console") as socket:
        socket.send(first)
        with pytest.raises(ConnectionClosedError) as raised:
            socket.recv(WITHIN)
        assert raised.value.rcvd is not None
        assert raised.value.rcvd.code == 1008


@pytest.mark.parametrize(
    "said",
    [
        "",
        '{"type":"open","guest":"a"}',
        '{"type":"size","columns":-1,"rows":1}',
        '{"type":"size","columns":65536,"rows":1}',
        '{"type":"shown","count":-1}',
        '{"type":"ask","write":"yes"}',
    ],
)
def test_a_page_that_talks_nonsense_is_hung_up_on(served: Daemon, web: Web, said: str) -> None:
    with page(web) as somebody:
        somebody.socket.send(said)
        with pytest.raises(ConnectionClosedError) as raised:
            somebody.until(lambda: False, "the end")
        assert raised.value.rcvd is not None
        assert raised.value.rcvd.code == 1008
    with page(web):
        wait_port(served, readers=1)


def test_a_page_that_types_without_end_is_hung_up_on(served: Daemon, web: Web) -> None:
    """What a guest that reads nothing is sent is bounded here, too."""
    with page(web) as somebody:

        def type_on() -> None:
            for _ in range(64):
                somebody.socket.send(bytes(1 << 15))
            somebody.until(lambda: False, "the end")

        with pytest.raises(ConnectionClosedError) as raised:
            type_on()
        assert raised.value.rcvd is not None
        assert raised.value.rcvd.code == 1008
    wait_port(served, readers=0)


def test_the_history_is_a_file_of_the_guest_s_bytes(served: Daemon, web: Web) -> None:
    data = b"<script>alert(1)</script>\x1b]52;c;eA==\x07" + bytes(range(256))
    with boot(served) as console:
        console.write(data)
        wait_port(served, output=len(data))
        status, headers, body = web.request("GET", f"/history?guest={quote(the_guest(web))}&port=0")
    assert (status, body) == (200, data)
    assert headers["Content-Type"] == "application/octet-stream"
    assert headers["Content-Disposition"].startswith("attachment;")


def test_nobody_is_left_attached_when_the_server_ends(served: Daemon, folder: Path) -> None:
    with Web(folder) as server:
        server.login()
        with page(server):
            wait_port(served, readers=1)
            server.process.terminate()
            server.process.wait(WITHIN)
    wait_port(served, readers=0)
