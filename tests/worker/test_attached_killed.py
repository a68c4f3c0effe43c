"""The same as in test_audience_killed, for clients who speak the attachment protocol.

Their other ends are links, as people's programs have them.
"""

from __future__ import annotations

import pickle
import socket
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from vhost_device_console import attachment, monitor
from vhost_device_console.attachment import Ask
from vhost_device_console.custody import Attach
from vhost_device_console.journal import Journal
from vhost_device_console.people.link import Dropped, Gap, Link, LinkLostError
from vhost_device_console.worker.backends import base

sys.path.append(str(Path(__file__).parent))

import test_audience_killed as killed
from test_audience_killed import (
    LARGEST_WRITE,
    TRACED,
    TYPED,
    Point,
    all_once,
    lines,
    lives,
    made,
    points,
)

#: What of a link is only this process'.
_OWN = ("_sock", "_record")


class Scene(killed.Scene):
    """A port's memory, and links to it, all of which begin as their user says."""

    def __init__(self, ends: ExitStack, kind: str, features: int) -> None:
        self.links: list[Link] = []
        super().__init__(ends, kind, features)
        for user in self.users:
            link = Link(monitor.Attach(guest="x", name="x"))
            link.adopt(user)
            self.links.append(link)
        self.keep()

    def pair(self) -> tuple[socket.socket, socket.socket]:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def worker(self) -> Worker:
        return Worker(self)

    def keep(self) -> None:
        self.kept.links = [
            pickle.dumps({name: value for name, value in vars(link).items() if name not in _OWN})
            for link in self.links
        ]
        super().keep()

    def remember(self) -> None:
        super().remember()
        for link, saved in zip(self.links, self.kept.links, strict=True):
            vars(link).update(pickle.loads(saved))

    def drain(self, who: int, wanted: int = 1 << 20) -> None:
        kept = self.kept
        link = self.links[who]
        link.flush()
        with suppress(LinkLostError):
            before = -1
            while before != (before := len(kept.got[who])) < wanted:
                for event in link.receive():
                    match event:
                        case memoryview():
                            kept.got[who] += event
                        case Gap(missing):
                            kept.got[who] += base.gap(missing or 0)
                        case Dropped(count):  # what is typed next are those again
                            kept.typed[who] -= count
        self.keep()

    def quiet(self, who: int) -> bool:
        link = self.links[who]
        return super().quiet(who) and not (link.wants_room or link.unacknowledged)

    def finish(self) -> None:
        self.remember()
        for ours in self.held:
            ours.close()
        for who in range(3):
            self.drain(who)
        assert all(link._greeted for link in self.links)  # noqa: SLF001
        journal = Journal(self.journal)
        self.taken = b"".join(used.data for used in self.sides.driver.reap())
        self.waiting = journal.input.copy()
        self.written = journal.output.head


class Worker(killed.Worker):
    """One life; who types becomes the writer first."""

    scene: Scene

    def arrive(self, key: int) -> None:
        attach = Attach(
            name=f"user {key}",
            write=True,
            replay=None if key == 0 else 0,
            since=None,
            journal=0,
            columns=0,
            rows=0,
        )
        fd = self.scene.held[key].fileno()
        self.audience.arrive(socket.dup(fd), key, attach)

    def type(self, who: int, count: int, turns: int = 1) -> None:
        scene, kept, link = self.scene, self.scene.kept, self.scene.links[who]
        if not link.writer:
            link.ask(Ask(write=True, force=True))
        while not link.writer:
            self.turn()
            scene.drain(who)
        kept.typed[who] += link.type(TYPED[who][kept.typed[who] : count])
        scene.keep()
        self.turn(turns)
        scene.drain(who, len(kept.got[who]))

    def leave(self, who: int, successor: int) -> None:
        while self.scene.links[who].unacknowledged:  # who hangs up before that is not told
            self.rest()
            self.scene.drain(who)
        super().leave(who, successor)


@pytest.fixture(autouse=True, scope="module")
def small() -> None:
    """Have output go in small records."""
    killed.SCENES["attached"] = Scene
    attachment.MOST_OUTPUT = LARGEST_WRITE


def test_a_story_goes_well_without_deaths() -> None:
    def run(scene: Scene) -> None:
        assert lives(scene)
        killed.check(scene)
        # What 1 had typed last was not the guest's yet when 0 took the role.
        assert scene.kept.typed == [900, 200, 100]

    made("attached", 0, run)


@pytest.mark.parametrize("part", range(8))
def test_every_byte_arrives_once_at_whatever_line_a_worker_dies(part: int) -> None:
    every = points(made("attached", 0, lines))[part::8]
    assert any(point.file == "attached.py" for point in every)
    died = sum(made("attached", 0, all_once(point)) for point in every)
    assert died > len(every) / 2


#: Where a worker has done something that only the system, or a word, knows of.
UNTOLD = {
    "given to the guest": ("audience.py", "seat.record[_READ] = seat.read = seat.read + count", 2),
    "written": (
        "audience.py",
        "seat.record[_WRITTEN] = seat.written = seat.written + count",
        5,
    ),
    "taken from the socket": ("attached.py", "self.read_to += count", 2),
    "a role that was told": ("attached.py", "del self._due[kind]", 4),
}


@pytest.mark.parametrize("what", UNTOLD)
def test_every_byte_arrives_once_though_the_successor_dies_as_it_takes_over(what: str) -> None:
    file, text, time = UNTOLD[what]
    source = next(Path(str(path)) for path, name in TRACED.items() if name == file)
    texts = [line.strip() for line in source.read_text().splitlines()]
    first = Point(file, 1 + texts.index(text), time)

    def takes_over(scene: killed.Scene) -> list[Point]:
        assert not lives(scene, first)
        return [Point(*where, 1) for where in sorted(lines(scene, begins=True))[::2]]

    every = made("attached", 0, takes_over)
    assert len(every) > 40
    died = sum(made("attached", 0, all_once(first, later)) for later in every)
    assert died > len(every) / 2
