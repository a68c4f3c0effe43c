"""What a worker says to the master, if somebody has taken it over: any words, any descriptors.

The master may believe that the worker is broken, which is a ValueError or OSError here. It may not
fail otherwise, wait, hand out what is not the guest's, or keep descriptors that nobody named.
"""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Iterable
from typing import Any, cast

import msgspec
from source import Source
from vhost_device_console import custody
from vhost_device_console.admission import Door
from vhost_device_console.alarms import Alarms
from vhost_device_console.config import Access
from vhost_device_console.endpoints import Endpoints
from vhost_device_console.porter import Line, Porter
from vhost_device_console.worker import can_resume
from vhost_device_console.worker.vhost_user import message as wire

_NUMBERS = [0, 1, 2, 3, 4, 5, 100, 1 << 31, (1 << 63) - 1, (1 << 64) - 1, -1, -2, -(1 << 63)]


def _files() -> list[int]:
    memory = os.memfd_create("word", os.MFD_CLOEXEC)
    os.write(memory, msgspec.msgpack.encode(["Commit", 1, 0, b"snapshot", []]))
    vast = os.memfd_create("vast", os.MFD_CLOEXEC)
    os.ftruncate(vast, 1 << 40)
    pipe, _ = os.pipe()
    return [
        *(memory, vast, pipe),
        os.open("/", os.O_RDONLY | os.O_CLOEXEC),
        os.open("/", os.O_PATH | os.O_CLOEXEC),
        os.eventfd(0, os.EFD_CLOEXEC),
        os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC),
    ]


_FILES = _files()


class _Endpoints:
    """What a porter wants of a guest's endpoints: a frontend that is connected already."""

    def __init__(self, fd: int) -> None:
        self.frontend = fd
        self.door = Door("fuzz", Access())

    def listening(self) -> bool:
        return False


def _word(source: Source) -> bytes:
    """Return a word of the right form, with numbers that are often worth a try."""

    def numbers() -> list[int]:
        return [source.pick(_NUMBERS) for _ in range(source.byte() % 5)]

    snapshot = source.take(source.byte() % 32)
    fields: list[Any] = [source.pick(_NUMBERS), source.pick(_NUMBERS), snapshot, numbers()]
    fields += [numbers(), source.pick([None, source.take(12), wire.encode(1, b"12345678")])]
    fields += [bool(source.byte() & 1), source.byte() % 8 == 7]
    names = custody.Commit.__struct_fields__
    commit = {
        "type": source.pick(["Commit"] * 7 + ["Pong"]),
        **dict(zip(names, fields, strict=True)),
    }
    return msgspec.msgpack.encode(commit)


def run(data: bytes) -> None:
    """One word after another, some between messages of the frontend's."""
    before = len(os.listdir("/proc/self/fd"))
    source = Source(data)
    frontend, theirs = socket.socketpair()
    with selectors.DefaultSelector() as selector:
        porter = Porter(
            "fuzz", cast(Endpoints, _Endpoints(theirs.fileno())), selector, Alarms(), lambda: None
        )
        try:
            while source:
                _worker(porter, selector, frontend, source)
        finally:
            porter.close()
            frontend.close()
            theirs.close()
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors are left"


def _worker(
    porter: Porter, selector: selectors.BaseSelector, frontend: socket.socket, source: Source
) -> None:
    """Let a worker say things until it is killed, perhaps for what it said."""
    ours, worker = custody.pair()
    line = Line(selector, ours, lambda: None)
    porter.begin(line)
    try:
        while source and (what := source.byte()) & 7 != 7:
            if what & 3 == 3:
                said = wire.encode(1 + what // 16, source.take(source.byte()), need_reply=True)
                socket.send_fds(frontend, [said], [_FILES[0]] * (what >> 3 & 3))
                continue
            word = _word(source) if what & 1 else source.take(source.byte()) or b"\xc1"
            fds = [source.pick(_FILES) for _ in range(what >> 2 & 3)]
            socket.send_fds(worker, [word], fds)
            _hear(line, porter)
    except (OSError, ValueError):
        pass
    finally:
        line.close()
        worker.close()
        porter.end()
        assert can_resume(porter.snapshot) in (True, False)


def _hear(line: Line, porter: Porter) -> None:
    """Do as the master does."""
    while (received := custody.receive_word(line.sock)) is not None:
        word, fds = received
        if isinstance(word, custody.Commit):
            porter.committed(word, fds)
        else:
            custody.close(fds)


def seeds() -> Iterable[bytes]:
    good = bytes([1, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    yield good
    for fds in range(3):
        said = bytes([3 | fds << 3, 0])
        yield good + said + good + good
        # The worker names none of its descriptors, and leaves the message to another one.
        yield good + said + good + bytes([1, 0, 0, 7, 0, 0, 0, 0, 0, 0, 7]) + good
    for fds in range(4):
        for file in range(7):
            yield bytes([fds << 2, 1, 0xC1, *[file] * fds])
        yield bytes([1 | fds << 2, 0, 1, 2, 2, 1, 2, 1, 10, 0, 1, 0, *[0] * fds])
    yield bytes([0, 9]) + b"\x91" * 9
