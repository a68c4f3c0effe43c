"""A console backend that is right, and one that is wrong in one way for each way there is.

It shares no code with the tool that judges it: struct, mmap and a thread.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

MULTIPORT, INDIRECT, EVENT_IDX, PROTOCOL, VERSION_1 = 1 << 1, 1 << 28, 1 << 29, 1 << 30, 1 << 32
MQ, REPLY_ACK, CONFIG = 1 << 0, 1 << 3, 1 << 9

_INDEX = 0xFFFF


class RefusedError(Exception):
    """A message that is refused."""


class Ring:
    """One ring, as SET_VRING_* described it."""

    def __init__(self) -> None:
        self.size = self.base = self.desc = self.avail = self.used = 0
        self.kick: int | None = None
        self.call: int | None = None
        self.started = self.enabled = False


class Session:
    """One frontend's connection."""

    def __init__(self, backend: Fake, connection: socket.socket) -> None:
        self.backend = backend
        self.connection = connection
        self.features = self.protocol = 0
        self.rings = [Ring() for _ in range(4)]
        self.regions: list[tuple[int, int, int, mmap.mmap]] = []
        self.replies: list[bytes] = []

    # The socket

    def serve(self) -> None:
        """Serve until the frontend hangs up, or is hung up on."""
        try:
            while True:
                poll = select.poll()
                poll.register(self.connection, select.POLLIN)
                poll.register(self.backend.wake, select.POLLIN)
                for ring in self.rings:
                    if ring.kick is not None:
                        poll.register(ring.kick, select.POLLIN)
                ready = {fd for fd, _ in poll.poll()}
                if self.backend.wake in ready:
                    return
                for ring in self.rings:
                    if ring.kick in ready:
                        os.read(ring.kick, 8)
                        ring.started = True
                if self.connection.fileno() in ready and not self.message():
                    return
                self.work()
        except (OSError, RefusedError):
            return
        finally:
            self.close()

    def close(self) -> None:
        """Close everything."""
        self.connection.close()
        for ring in self.rings:
            for fd in (ring.kick, ring.call):
                if fd is not None:
                    os.close(fd)
        for _, _, _, mapping in self.regions:
            mapping.close()

    def message(self) -> bool:
        """Handle one message; False when there is none any more."""
        header, fds, _, _ = socket.recv_fds(self.connection, 12, 253)
        try:
            while 0 < len(header) < 12:
                more = self.connection.recv(12 - len(header))
                if not more:
                    return False
                header += more
            if not header:
                return False
            request, flags, size = struct.unpack("=III", header)
            if flags & 7 != 1 or size > 4096:
                return False
            payload = b""
            while len(payload) < size:
                more = self.connection.recv(size - len(payload))
                if not more:
                    return False
                payload += more
            return self.answer(request, flags, payload, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def answer(self, request: int, flags: int, payload: bytes, fds: list[int]) -> bool:
        """Carry out a message and reply where that is due."""
        asked = flags & 8 and self.protocol & REPLY_ACK
        try:
            reply = self.act(request, payload, fds)
        except (RefusedError, struct.error, IndexError):
            if not asked:
                return False
            reply = struct.pack("=Q", 1)
        if reply is None and flags & 8 and self.protocol & REPLY_ACK:
            reply = struct.pack("=Q", 0)
        if reply is not None:
            self.reply(request, reply)
        return True

    def reply(self, request: int, payload: bytes) -> None:
        """Send a reply."""
        self.connection.sendall(struct.pack("=III", request, 5, len(payload)) + payload)

    # Messages

    def act(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        """Carry out a message and return its own reply, if it has one."""
        match request:
            case 1:
                return struct.pack("=Q", self.backend.features)
            case 2:
                (features,) = struct.unpack("=Q", payload)
                self.set_features(features)
            case 3 | 4 | 14:
                pass
            case 5:
                self.set_memory(payload, fds)
            case 8 | 10 | 18:
                index, number = struct.unpack("=II", payload)
                self.set_number(self.rings[index], request, number)
            case 9:
                index, _, desc, used, avail, _ = struct.unpack("=IIQQQQ", payload)
                ring = self.rings[index]
                for addr, align, size in (
                    (desc, 16, 16 * ring.size),
                    (used, 4, 6 + 8 * ring.size),
                    (avail, 2, 6 + 2 * ring.size),
                ):
                    if addr % align:
                        raise RefusedError
                    self.at(addr, size, user=True).release()
                ring.desc, ring.used, ring.avail = desc, used, avail
            case 11:
                index, _ = struct.unpack("=II", payload)
                return struct.pack("=II", index, self.stop(self.rings[index]))
            case 12 | 13:
                (index,) = struct.unpack("=Q", payload)
                self.set_fd(self.rings[index & 0xFF], request, fds if not index >> 8 else None)
            case 15:
                return struct.pack("=Q", self.backend.protocol)
            case 16:
                (chosen,) = struct.unpack("=Q", payload)
                if chosen & ~self.backend.protocol:
                    raise RefusedError
                self.protocol = chosen
            case 17:
                return struct.pack("=Q", 4)
            case 24:
                return self.read_config(*struct.unpack_from("=II", payload), payload)
            case 25:
                self.write_config(*struct.unpack_from("=II", payload), payload[12:])
            case _:
                raise RefusedError
        return None

    def set_features(self, features: int) -> None:
        """Take the driver's choice."""
        if features & ~self.backend.features:
            raise RefusedError
        self.features = features
        if not features & PROTOCOL:
            for ring in self.rings:
                ring.enabled = True

    def set_memory(self, payload: bytes, fds: list[int]) -> None:
        """Map memory."""
        count, _ = struct.unpack_from("=II", payload)
        if len(fds) != count:
            raise RefusedError
        regions = []
        for at, fd in enumerate(fds):
            guest, size, user, offset = struct.unpack_from("=QQQQ", payload, 8 + 32 * at)
            try:
                regions.append((guest, user, size, mmap.mmap(fd, size, offset=offset)))
            except (ValueError, OSError, OverflowError):
                raise RefusedError from None
        self.regions = regions

    def set_number(self, ring: Ring, request: int, number: int) -> None:
        """SET_VRING_NUM, BASE and ENABLE."""
        match request:
            case 8:
                if not 0 < number <= 32768 or number & (number - 1):
                    raise RefusedError
                ring.size = number
            case 10:
                ring.base = number
            case 18:
                ring.enabled = bool(number)

    def set_fd(self, ring: Ring, request: int, fds: list[int] | None) -> None:
        """SET_VRING_KICK and CALL."""
        name = "kick" if request == 12 else "call"
        if fds == []:
            raise RefusedError
        old = getattr(ring, name)
        setattr(ring, name, fds.pop() if fds else None)
        if old is not None:
            os.close(old)

    def stop(self, ring: Ring) -> int:
        """Stop a ring and return its index."""
        ring.started = False
        if ring.kick is not None:
            os.close(ring.kick)
            ring.kick = None
        return ring.base

    def read_config(self, offset: int, size: int, payload: bytes) -> bytes:
        """Answer GET_CONFIG."""
        if offset + size > 12 or len(payload) != 12 + size:
            return b""
        space = struct.pack("<HHII", 80, 25, 1, 0)
        return payload[:12] + space[offset : offset + size]

    def write_config(self, offset: int, size: int, data: bytes) -> None:
        """Take a write to a configuration in which nothing changes."""
        if offset + size > 12 or len(data) != size:
            raise RefusedError

    # Memory; `user` says which address it is

    def at(self, addr: int, size: int, *, user: bool = False) -> memoryview:
        """Return memory. Raises RefusedError."""
        for guest, frontend, length, mapping in self.regions:
            start = addr - (frontend if user else guest)
            if start >= 0 and start + size <= length:
                return memoryview(mapping)[start : start + size]
        raise RefusedError

    def spans(self, addr: int, size: int) -> Iterator[memoryview]:
        """Return a buffer's memory, in pieces where it crosses regions. Raises RefusedError."""
        while size:
            for guest, _, length, _ in self.regions:
                if guest <= addr < guest + length:
                    count = min(size, guest + length - addr)
                    yield self.at(addr, count)
                    addr, size = addr + count, size - count
                    break
            else:
                raise RefusedError

    def word(self, addr: int) -> int:
        """Return a 16-bit word of a ring."""
        with self.at(addr, 2, user=True) as view, view.cast("H") as words:
            return words[0]

    def store(self, addr: int, value: int) -> None:
        """Store a 16-bit word of a ring."""
        with self.at(addr, 2, user=True) as view, view.cast("H") as words:
            words[0] = value & _INDEX

    # Rings

    def work(self) -> None:
        """Serve all rings until there is nothing to do."""
        while self.control() or self.transmit() or self.speak():
            pass

    def waiting(self, ring: Ring) -> bool:
        """Tell whether a ring that runs has a buffer; ask for a kick at the next one."""
        if not ring.started or not ring.avail or not self.regions:
            return False
        if self.features & EVENT_IDX:
            self.store(ring.used + 4 + 8 * ring.size, ring.base)
        count = self.word(ring.avail + 2) - ring.base & _INDEX
        if count > ring.size:
            raise RefusedError
        return count > 0

    def pop(self, ring: Ring) -> tuple[int, list[tuple[int, int, bool]]]:
        """Return the next chain: its head, and each part's address, size and direction."""
        index = head = self.word(ring.avail + 4 + 2 * (ring.base % ring.size))
        ring.base = (ring.base + 1) & _INDEX
        with self.at(ring.desc, 16 * ring.size, user=True) as view:
            table = bytes(view)
        parts = []
        for _ in range(2 * ring.size):
            if 16 * index + 16 > len(table):
                raise RefusedError
            addr, size, flags, following = struct.unpack_from("<QIHH", table, 16 * index)
            if flags & 4:
                table, index = self.table(addr, size, bool(flags & 2), not parts), 0
                continue
            parts.append((addr, size, bool(flags & 2)))
            if not flags & 1:
                return head, parts
            index = following
        raise RefusedError

    def table(self, addr: int, size: int, _writable: bool, _first: bool) -> bytes:
        """Return a table of descriptors; what is said is of the descriptor that refers to it."""
        with self.at(addr, size) as view:
            return bytes(view)

    def push(self, ring: Ring, head: int, length: int) -> None:
        """Return a chain to the guest, and call it if it wants that."""
        old = self.word(ring.used + 2)
        with self.at(ring.used + 4 + 8 * (old % ring.size), 8, user=True) as view:
            struct.pack_into("<II", view, 0, head, length)
        self.store(ring.used + 2, old + 1)
        if (
            ring.call is not None
            and self.wanted(ring, old)
            and select.select([], [ring.call], [], 0)[1]
        ):
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(ring.call, struct.pack("=Q", 1))

    def wanted(self, ring: Ring, old: int) -> bool:
        """Tell whether the guest wants a call for the buffer at index `old`."""
        if self.features & EVENT_IDX:
            return self.word(ring.avail + 4 + 2 * ring.size) == old
        return not self.word(ring.avail) & 1

    def take(self, ring: Ring) -> bytes:
        """Take what the guest has written, and return the buffer."""
        head, parts = self.pop(ring)
        data = b""
        for addr, size, writable in parts:
            if writable:
                raise RefusedError
            data += b"".join(map(bytes, self.spans(addr, size)))
        self.push(ring, head, self.taken_length(data))
        return data

    def taken_length(self, _: bytes) -> int:
        """Return the length for a buffer that nothing was written to."""
        return 0

    def transmit(self) -> bool:
        """Take one buffer of output."""
        ring = self.rings[1]
        if not self.waiting(ring):
            return False
        self.take(ring)
        return True

    def control(self) -> bool:
        """Take one control message."""
        ring = self.rings[3]
        if not self.waiting(ring):
            return False
        data = self.take(ring)
        if len(data) >= 8 and ring.enabled:
            self.hear(*struct.unpack_from("<IHH", data))
        return True

    def hear(self, port: int, event: int, value: int) -> None:
        """Answer a control message."""
        if event == 0 and value:
            self.replies = [struct.pack("<IHH", 0, 1, 0)]
        elif event == 3 and port == 0 and value:
            self.replies += [
                struct.pack("<IHH", 0, 4, 1),
                struct.pack("<IHH", 0, 7, 1) + b"console0",
                struct.pack("<IHH", 0, 6, 1),
            ]
        del self.replies[100:]

    def speak(self) -> bool:
        """Say what there is to say, in one buffer."""
        ring = self.rings[2]
        if not self.replies or not ring.enabled or not self.waiting(ring):
            return False
        head, parts = self.pop(ring)
        data = rest = self.replies.pop(0)
        for addr, size, writable in parts:
            if not writable:
                raise RefusedError
            for view in self.spans(addr, min(size, len(rest))):
                view[:] = rest[: len(view)]
                rest = rest[len(view) :]
        self.push(ring, head, self.said_length(len(data) - len(rest)))
        return True

    def said_length(self, written: int) -> int:
        """Return the length for a buffer with a message."""
        return written


class Fake:
    """A backend at a socket of its own, in a thread, for use in a `with` block."""

    def __init__(
        self, path: str | Path, session: type[Session] = Session, **attributes: int
    ) -> None:
        self.features = MULTIPORT | INDIRECT | EVENT_IDX | PROTOCOL | VERSION_1
        self.protocol = MQ | REPLY_ACK | CONFIG
        self.path = str(path)
        self.wake = os.eventfd(0)
        self.sessions = 0
        for name, value in attributes.items():
            setattr(self, name, value)
        self._session = session
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.eventfd_write(self.wake, 1)
        self._thread.join(10)
        assert not self._thread.is_alive()
        os.close(self.wake)

    def join(self) -> None:
        """Wait until the backend has ended by itself."""
        self._thread.join()

    def _serve(self) -> None:
        with self._listener:
            while True:
                ready, _, _ = select.select([self._listener, self.wake], [], [])
                if self.wake in ready:
                    return
                connection, _ = self._listener.accept()
                self.sessions += 1
                try:
                    self._session(self, connection).serve()
                except DyingError:
                    return


class DyingError(Exception):
    """The backend ends, whatever it was doing."""


# One mistake each


class TakesAnyAddress(Session):
    def act(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        try:
            return super().act(request, payload, fds)
        except RefusedError:
            if request == 9:
                return None
            raise


class AnswersUnasked(Session):
    def answer(self, request: int, flags: int, payload: bytes, fds: list[int]) -> bool:
        if request == 10 and not flags & 8:
            self.reply(request, bytes(8))
        return super().answer(request, flags, payload, fds)


class AnswersTwice(Session):
    def answer(self, request: int, flags: int, payload: bytes, fds: list[int]) -> bool:
        going_on = super().answer(request, flags, payload, fds)
        if request == 15 and flags & 8:
            self.reply(request, bytes(8))
        return going_on


class ConfigCanBeWritten(Session):
    columns = 80

    def read_config(self, offset: int, size: int, payload: bytes) -> bytes:
        good = super().read_config(offset, size, payload)
        return good[:12] + bytes([self.columns]) + good[13:] if good and not offset else good

    def write_config(self, offset: int, size: int, data: bytes) -> None:
        super().write_config(offset, size, data)
        self.columns = data[0]


class ConfigWithoutEnd(Session):
    def read_config(self, offset: int, size: int, payload: bytes) -> bytes:
        return super().read_config(offset, size, payload) or payload


class TakesAnyFeature(Session):
    def set_features(self, features: int) -> None:
        super().set_features(features & self.backend.features)


class NeverDisabled(Session):
    def work(self) -> None:
        for ring in self.rings:
            ring.enabled = True
        super().work()


class DrainsNothing(Session):
    def waiting(self, ring: Ring) -> bool:
        return ring.enabled and super().waiting(ring)


class ForgetsEnable(Session):
    def set_number(self, ring: Ring, request: int, number: int) -> None:
        if request != 18 or ring.kick is not None:
            super().set_number(ring, request, number)


class StopsAtTheNext(Session):
    def stop(self, ring: Ring) -> int:
        return super().stop(ring) + 1 & 0xFFFF


class WroteWhatItRead(Session):
    def taken_length(self, data: bytes) -> int:
        return len(data)


class WroteMore(Session):
    def said_length(self, written: int) -> int:
        return written + 1


class NeverCalls(Session):
    def wanted(self, _ring: Ring, _old: int) -> bool:
        return False


class AlwaysCalls(Session):
    def wanted(self, _ring: Ring, _old: int) -> bool:
        return True


class FlagStopsEvents(Session):
    def wanted(self, ring: Ring, old: int) -> bool:
        return super().wanted(ring, old) and not self.word(ring.avail) & 1


class TableIsForReading(Session):
    def table(self, addr: int, size: int, writable: bool, first: bool) -> bytes:
        if writable:
            raise RefusedError
        return super().table(addr, size, writable, first)


class TableComesFirst(Session):
    def table(self, addr: int, size: int, writable: bool, first: bool) -> bytes:
        if not first:
            raise RefusedError
        return super().table(addr, size, writable, first)


class AlwaysReady(Session):
    def hear(self, port: int, event: int, value: int) -> None:
        super().hear(port, event, value or event == 0)


class NameWithNul(Session):
    def hear(self, port: int, event: int, value: int) -> None:
        super().hear(port, event, value)
        self.replies = [said + b"\0" * (said[4] == 7) for said in self.replies]


class PortPastTheLast(Session):
    def hear(self, port: int, event: int, value: int) -> None:
        super().hear(port, event, value)
        if event == 0 and value:
            self.replies.append(struct.pack("<IHH", 1, 1, 0))


class PortTwice(Session):
    def hear(self, port: int, event: int, value: int) -> None:
        super().hear(port, event, value)
        if event == 0 and value:
            self.replies *= 2


class EightBitIndex(Session):
    def act(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        if request in (8, 10):
            payload = payload[:1] + bytes(3) + payload[4:]
        return super().act(request, payload, fds)


class DiesOfTheUnknown(Session):
    def act(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        if request == 1000:
            raise DyingError
        return super().act(request, payload, fds)


class FollowsLoops(Session):
    def pop(self, ring: Ring) -> tuple[int, list[tuple[int, int, bool]]]:
        try:
            return super().pop(ring)
        except RefusedError:
            select.select([self.backend.wake], [], [])  # busy for ever
            raise


if __name__ == "__main__":
    with Fake(sys.argv[1], DiesOfTheUnknown) as fake:
        fake.join()
