"""Somebody attached who says anything: records of the right form, and any others.

Nothing that is typed counts twice or before its turn, and output has the offsets it should.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import suppress

from source import Source
from vhost_device_console import attachment
from vhost_device_console.attachment import Acknowledged, Ask, AskWho, Output, Role, Size
from vhost_device_console.worker.backends import attached

_SPACE = bytes(range(256)) * 64


def _typed(source: Source, epoch: int, read_to: int) -> bytes:
    """Return an input record; what stands at an offset is that offset's lowest byte."""
    how = source.byte()
    offset = max(0, read_to + (0, 0, -1, 1, -40, 40, -read_to, 1 << 20)[how & 7])
    size = source.byte() << (how >> 3 & 7)
    begin = offset % 256
    header = attachment.input_header((epoch, epoch - 1, epoch + 1, epoch)[how >> 6], offset)
    return header + _SPACE[begin : begin + min(size, attachment.MOST_INPUT)]


def _say(theirs: socket.socket, record: bytes) -> None:
    with suppress(BlockingIOError):
        theirs.send(record)


def _hear(theirs: socket.socket, at: int) -> tuple[int, int | None]:
    """Take all that was told; return up to where output came, and what was acknowledged last."""
    read = None
    with suppress(BlockingIOError):
        while record := theirs.recv(attachment.LARGEST):
            said = attachment.told(memoryview(record))
            if isinstance(said, Output):
                assert said.offset == at
                assert said.data == _SPACE[at % 256 :][: len(said.data)]
                at += len(said.data)
            elif isinstance(said, (Acknowledged, Role)):
                assert read is None or said.read >= read
                read = said.read
    return at, read


def _run(source: Source, client: attached.Attached, theirs: socket.socket) -> None:
    heard, strange = 0, False
    epoch = 1
    client.play("she", writer=True, epoch=epoch)
    while source:
        match source.byte() % 9:
            case 0 | 1:
                _say(theirs, _typed(source, epoch, client.read_to))
            case 2:
                strange = True
                _say(theirs, source.take(1 + source.byte()) or b"\0")
            case 3:
                question = source.pick((Ask(True), Ask(False), AskWho(), Size(1 << 40, -5)))
                _say(theirs, attachment.encode(question))
            case 4:
                before, writer = client.read_to, client.writer
                into = [memoryview(bytearray(source.byte())), memoryview(bytearray(source.byte()))]
                count = client.read(into)
                if count:
                    assert writer
                    assert client.read_to == before + count
                    got = b"".join(into)[:count]
                    assert strange or got == _SPACE[before % 256 :][:count]
                else:
                    assert client.read_to == before
            case 5:
                how = source.byte()
                epoch += how & 1
                client.play("he", writer=bool(how & 2), epoch=epoch)
            case 6:
                while not client.say() and (told := _hear(theirs, heard)):
                    heard = told[0]
                count = client.write(_SPACE[client.at % 256 :][: source.byte() << 4])
                client.at += count
            case 7:
                heard, read = _hear(theirs, heard)
                assert heard == client.at
                assert read is None or read <= client.read_to
            case _:
                client.asked.clear()
                assert all(0 <= number < 1 << 16 for number in client.size())


def run(data: bytes) -> None:
    """The worker's end takes what the other says until it has had enough of it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    client = attached.client(ours.detach(), "she", (80, 24))
    try:
        with suppress(ConnectionError):
            _run(Source(data), client, theirs)
    finally:
        client.close()
        theirs.close()


def seeds() -> Iterable[bytes]:
    """Typing and being read, roles that change, output."""
    return (
        bytes((0, 0, 5, 4, 9, 9, 4, 9, 9, 7)),
        bytes((0, 24, 200, 4, 255, 255, 5, 3, 0, 0, 9, 4, 0, 0, 4, 9, 0, 7, 8)),
        bytes((6, 9, 6, 200, 7, 3, 0, 4, 1, 1, 8, 3, 3, 4, 0, 0, 8)),
        b'\x02\x08{"type":' + bytes((4, 0, 0, 7)),
    )
