"""Health records and their framing: the only vocabulary between worker and master.

A record is a worker's counters, sent when they changed; the latest one replaces
all before it. A frame is a u32 length (little-endian) and that many bytes of MessagePack.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

_LENGTH = struct.Struct("<I")

#: Upper bounds of the buckets that service times are counted in, in nanoseconds: 4 µs to 1 s.
SERVICE_NS = tuple(1 << exponent for exponent in range(12, 31))

#: A record of 127 ports with long names is under 64 KiB; more than this is not a record.
_LARGEST = 1 << 16


class LogHealth(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """A port's log: which `generation` of its files is written, and how many bytes that has.

    `failing` says that it cannot be written now.
    """

    generation: int
    size: int
    failing: bool


class PortHealth(msgspec.Struct, array_like=True, kw_only=True):
    """One port's counters, in bytes unless they say otherwise.

    `output` and `input` are offsets in the journal, which a successor goes on with: all that the
    guest ever wrote and was given. The others start at 0 with each worker. `missed` is what readers
    were skipped over, each gap counted once for every reader that met it; `discarded` is what the
    guest wrote to a disabled queue. `stalls` counts how often a stuck reader let the guest wait.
    `columns` and `rows` are the size of the port, 0 where it is not known, and `size_by` says who
    decided it: a client's name, "resize" for the command, "" for nobody. `state` is how far the
    guest has come with the port: absent, added, ready or failed. `open` says that a program in the
    guest has it open, `host_open` that the guest was told somebody is there on this side. `held`
    says that a buffer of the guest's waits for room in the journal. `log` is None without a log.
    `lag` is how far the reader that is furthest behind has yet to read.
    """

    id: int
    name: str
    open: bool = False
    readers: int = 0
    output: int = 0
    input: int = 0
    missed: int = 0
    discarded: int = 0
    stalls: int = 0
    columns: int = 0
    rows: int = 0
    state: str = "absent"
    host_open: bool = False
    held: bool = False
    size_by: str = ""
    log: LogHealth | None = None
    lag: int = 0


class Privileges(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker may still do, as its kernel said when it was confined.

    `capabilities` are those left, `landlock` the version (ABI) in force, 0 for none, `seccomp` says
    that only listed system calls are let through, `files` how many descriptors it may have, and
    `memory` how many bytes of its own, None for any number. `missing` has a reason for everything
    that could not be had.
    """

    user: str
    capabilities: list[str]
    no_new_privileges: bool
    landlock: int
    seccomp: bool
    files: int | None
    memory: int | None
    missing: list[str]

    def __str__(self) -> str:
        parts = [
            f"user {self.user}",
            f"capabilities {' '.join(self.capabilities) or 'none'}",
            "no new privileges" if self.no_new_privileges else "",
            f"Landlock {self.landlock}" if self.landlock else "",
            "seccomp" if self.seccomp else "",
            f"{self.files} descriptors" if self.files else "",
            f"{self.memory >> 20} MiB" if self.memory else "",
            *self.missing,
        ]
        return ", ".join(part for part in parts if part)


class Health(msgspec.Struct, array_like=True, kw_only=True):
    """One worker's counters.

    `frontend` is the connected frontend's process id, 0 when it cannot be known, None when nobody
    is connected. `sessions` counts frontends so far, `kicks` and `calls` notifications, `chains`
    completed buffers, `refused` messages and frontends turned away, `broken` stopped virtqueues,
    `ignored` control messages that made no sense. `privileges` is None until it is confined.
    `services` counts, by `service_bucket`, how often what woke the worker up took how long
    until all of it was where it belongs and the guest was told, and `service_ns` sums that up.
    """

    frontend: int | None = None
    sessions: int = 0
    kicks: int = 0
    calls: int = 0
    chains: int = 0
    refused: int = 0
    broken: int = 0
    ignored: int = 0
    ports: list[PortHealth] = []
    privileges: Privileges | None = None
    services: list[int] = []
    service_ns: int = 0


def service_bucket(took_ns: int) -> int:
    """Return which of `Health.services` counts this time: by `SERVICE_NS`, the last any longer."""
    least, most = SERVICE_NS[0].bit_length(), len(SERVICE_NS)
    return min(max((took_ns - 1).bit_length() + 1 - least, 0), most)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Health)


def encode(health: Health) -> bytes:
    """Return `health` as one frame."""
    body = _encoder.encode(health)
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Turns the pipe's bytes, in whatever pieces they come, back into records."""

    def __init__(self, rest: bytes = b"") -> None:
        self._buffer = bytearray(rest)

    @property
    def rest(self) -> bytes:
        """What has come of the next record; another decoder can go on with it."""
        return bytes(self._buffer)

    def feed(self, data: bytes) -> Iterator[Health]:
        """Yield the records that `data` completes, oldest first.

        Raises ValueError where the bytes are no frame: the sender is broken, read no further.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > _LARGEST:
                raise ValueError(f"a health record of {size} bytes")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                break
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                record = _decoder.decode(body)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise ValueError(f"not a health record: {error}") from error
            yield record
