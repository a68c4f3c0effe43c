"""A stream of bytes and descriptors in any pieces through a channel, and answers to our messages.

The channel must find the same messages as one look at the whole stream, each with the descriptors
that were sent within it, or give the stream up where it must; all descriptors are closed.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
from source import Source
from vhost_device_console.channel import Channel, Message, Saved
from vhost_device_console.errors import FrontendError
from vhost_device_console.worker.vhost_user import message as wire
from vhost_device_console.worker.vhost_user.backend_channel import BackendChannel

_FD = os.memfd_create("any", os.MFD_CLOEXEC)


class Piece(NamedTuple):
    """What is sent at once, and whether it is received before the next."""

    data: bytes
    fds: int
    drain: bool


def _pieces(source: Source) -> list[Piece]:
    pieces = []
    while source and len(pieces) < 64:
        how = source.byte()
        kind = how >> 5
        if kind < 3:  # a message of the right form
            size = source.byte() if how & 8 else 8 * (how >> 3 & 2)
            flags = wire.VERSION | (source.byte() & 0xC if kind == 2 else 0)
            data = b"".join(
                number.to_bytes(4, "little") for number in (source.byte() % 48, flags, size)
            ) + source.take(size).ljust(size, b"\0")
        elif kind < 6:
            data = source.take(1 + source.byte() % 24)
        else:
            data = source.take(source.number(2) % 2048)
        if data:
            pieces.append(Piece(data, (0, 0, 1, 2, 5, 0, 1, 253)[how & 7], bool(how & 16)))
    return pieces


def _run_channel(pieces: list[Piece]) -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    channel = Channel(ours)
    found: list[tuple[Message, int]] = []
    failed = False
    try:
        try:
            for piece in pieces:
                socket.send_fds(theirs, [piece.data], [_FD] * piece.fds)
                if piece.drain:
                    _receive(channel, found)
                    channel = _handed_over(channel)
            _receive(channel, found)
            assert not channel.closed
            theirs.close()
            _receive(channel, found)
            assert channel.closed
        except FrontendError:
            failed = True
        except BlockingIOError:
            return  # more than the socket takes
        _compare(pieces, found, failed)
    finally:
        for message, _ in found:
            message.close_fds()
        channel.close()
        theirs.close()


def _handed_over(channel: Channel) -> Channel:
    """Return what another program makes of the channel."""
    saved = msgspec.msgpack.encode(channel.save())
    channel._sock.detach()  # noqa: SLF001
    return Channel.resume(msgspec.msgpack.decode(saved, type=Saved))


def _receive(channel: Channel, found: list[tuple[Message, int]]) -> None:
    while (message := channel.receive()) is not None:
        found.append((message, len(message.fds)))


def _compare(pieces: list[Piece], found: list[tuple[Message, int]], failed: bool) -> None:
    stream = b"".join(piece.data for piece in pieces)
    begins: list[tuple[int, int]] = []  # of each piece with descriptors
    at = 0
    for piece in pieces:
        if piece.fds:
            begins.append((at, piece.fds))
        at += len(piece.data)
    at = 0
    for message, count in found:
        end = at + wire.HEADER_SIZE
        assert message.header == wire.decode_header(stream[at:end])
        size = message.header.size
        assert message.payload == stream[end : end + size]
        end += size
        inside = [(begin, fds) for begin, fds in begins if at <= begin < end]
        assert count == sum(fds for _, fds in inside)
        if not any(begin > at for begin, _ in inside):
            assert not message.stray_fds
        if any(begin >= at + wire.HEADER_SIZE for begin, _ in inside):
            assert message.stray_fds
        at = end
    rest = stream[at:]
    broken = False
    if len(rest) >= wire.HEADER_SIZE:
        try:
            whole = wire.HEADER_SIZE + wire.decode_header(rest).size <= len(rest)
            assert not whole, "a whole message was not found"
        except FrontendError:
            broken = True
    assert failed == broken


def _run_answers(source: Source) -> None:
    ours, theirs = socket.socketpair()
    channel = BackendChannel(ours.detach())
    try:
        while source and channel.broken is None:
            how = source.byte()
            ring = source.byte()
            match how & 7:
                case 0:
                    channel.call(ring)
                case 1:
                    channel.error(ring)
                case 2:
                    channel.config_changed()
                case 3:
                    theirs.send(source.take(1 + ring % 32) or b"\0")
                    channel.work()
                case 4:
                    # A right answer to a question that may have been asked.
                    request = 4 + how // 8 % 2
                    theirs.send(wire.encode(request, bytes(8), reply=True))
                    channel.work()
                case 5:
                    theirs.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        theirs.recv(1 << 16)
                    channel.work()
                case 6:
                    theirs.close()
                    channel.work()
                    assert channel.broken is not None
                case _:
                    channel.work()
            assert len(channel._asked) + len(channel._due) <= 2 * 2 * 256 + 1  # noqa: SLF001
    finally:
        channel.close()
        theirs.close()


def run(data: bytes) -> None:
    """The first byte chooses between the frontend's messages and its answers to ours."""
    before = len(os.listdir("/proc/self/fd"))
    source = Source(data)
    if source.byte() % 4:
        _run_channel(_pieces(source))
    else:
        _run_answers(source)
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors were left open"


def seeds() -> Iterable[bytes]:
    yield bytes([1, 0, 1, 2, 1]) + bytes(20)
    for fds in range(8):
        yield bytes([1, 16 | fds, 3]) * 4
        yield bytes([1, 16 | 8 | fds, 8, 2]) + bytes(8) + bytes([16 | fds, 3])
    header = wire.encode(2, b"12345678")
    # In pieces of 12 and 8 bytes, byte by byte, and more at once.
    yield bytes([1, 3 << 5 | 16 | 2, 11]) + header[:12] + bytes([3 << 5 | 2, 7]) + header[12:]
    yield b"\1" + b"".join(bytes([3 << 5 | 16, 0, byte]) for byte in header)
    yield bytes([1, 7 << 5, 100, 0]) + header * 5
    yield bytes([1, 3 << 5, 11]) + b"\2\0\0\0\2\0\0\0\0\0\0\0"
    yield bytes([1, 3 << 5, 11]) + b"\2\0\0\0\1\0\0\0\0\x20\0\0"
    yield bytes([0, 0, 3, 4, 0, 1, 3, 12, 0, 2, 0, 5, 0, 6, 0])
    yield bytes([0, 0, 3, 3, 19]) + wire.encode(4, bytes(8), reply=True)
