"""A terminal in a page: one WebSocket, one link.

The page sends what is typed as binary messages; the rest, either way, is JSON with a `type`. The
guest's output goes to the page as binary messages, its offset (u64, little endian) in front. The
page says how many bytes it has shown (`shown`); when too many are not, nothing more is read for it
and the daemon lets it lag, as it does anybody who is slow.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from ... import attachment, monitor
from ...attachment import Ask, AskWho, Hello, Role, Size
from ...errors import ConsoleError
from ..link import Dropped, Gap, Link, LinkLostError, News

#: Bytes of output that a page may have been sent and not shown.
WINDOW = 1 << 18

#: Bytes of output after which no more is gathered for one message.
_MESSAGE = 1 << 16

#: A guest writes 16 bytes at a time to hvc. Output less than so many bytes is followed by so many
#: seconds in which more is gathered: a page that has no more to do than that is never behind.
_SMALL, _PACE_S = 1 << 12, 0.004

#: Bytes of input that a page may have sent and the link not taken: more is against the rules.
MOST_TYPED = 1 << 17

#: Seconds between two tries to find the guest again.
_AGAIN_S = 0.3

_OFFSET = struct.Struct("<Q")

#: What reading a message raises that makes no sense.
NONSENSE = (msgspec.MsgspecError, KeyError, UnicodeError, RecursionError)

#: RFC 6455, section 7.4.1: the other side breaks the rules.
_POLICY = 1008

_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Characters = Annotated[int, msgspec.Meta(ge=0, le=(1 << 16) - 1)]


class Open(msgspec.Struct, tag_field="type", tag="open", kw_only=True):
    """The page's first message: which port, from where, how large, and whether it would type.

    `journal` is a string: JavaScript has no u64.
    """

    guest: str
    port: str = "0"
    since: _Count | None = None
    journal: Annotated[str, msgspec.Meta(pattern="^[0-9]{1,20}$")] = "0"
    replay: _Count | None = None
    write: bool = True
    columns: _Characters = 0
    rows: _Characters = 0


class Shown(msgspec.Struct, tag_field="type", tag="shown"):
    """So many bytes of output the page has shown, since it was opened."""

    count: _Count


_open = msgspec.json.Decoder(Open)
_said: msgspec.json.Decoder[Ask | AskWho | Size | Shown] = msgspec.json.Decoder(
    Ask | AskWho | Size | Shown
)
_encode = msgspec.json.Encoder().encode


class _AgainstTheRules(Exception):  # noqa: N818 - not an error of ours
    """The page sends what it may not."""


class Console:
    """Somebody called `name` at a port in a page; `locate` finds a guest by its id.

    `locate` returns its daemon's monitor socket and its name, or raises ConsoleError.
    """

    def __init__(
        self, page: WebSocket, locate: Callable[[str], Awaitable[tuple[str, str]]], name: str
    ) -> None:
        self._page = page
        self._locate = locate
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._sent = self._shown = 0
        self._room = asyncio.Event()
        self._room.set()
        self._typed = bytearray()
        self._taken = 0
        self._may_type: bool | None = None  # not known
        self._connected = False
        self._writes_at = -1
        self._opened: Open
        self._link: Link

    async def run(self) -> None:
        """Serve the page until it is gone."""
        try:
            self._opened = _open.decode(await self._page.receive_text())
        except NONSENSE:
            await self._page.close(_POLICY, "it does not say what to open")
            return
        except WebSocketDisconnect:
            return
        opened = self._opened
        self._link = Link(
            monitor.Attach(
                guest="",
                port=opened.port,
                name=self._name[:64],
                write=opened.write,
                replay=opened.replay,
                since=opened.since,
                journal=min(int(opened.journal), (1 << 64) - 1),
                columns=opened.columns,
                rows=opened.rows,
            )
        )
        halves = [asyncio.create_task(self._tell_page()), asyncio.create_task(self._hear_page())]
        try:
            await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for half in halves:
                half.cancel()
            ended = await asyncio.gather(*halves, return_exceptions=True)
            self._hang_up()
        for result in ended:
            if isinstance(result, _AgainstTheRules):
                with suppress(RuntimeError, WebSocketDisconnect):
                    await self._page.close(_POLICY, str(result))
            elif isinstance(result, Exception) and not isinstance(result, WebSocketDisconnect):
                raise result

    # From the guest to the page

    async def _tell_page(self) -> None:
        waiting = False
        while True:
            try:
                path, self._link.request.guest = await self._locate(self._opened.guest)
                await self._connect(path)
                while True:
                    await self._readable()
                    count = await self._tell_all()
                    await self._type()
                    if 0 < count < _SMALL:
                        await asyncio.sleep(_PACE_S)
            except LinkLostError:
                self._lose()
                await self._send({"type": "waiting", "why": "the console is gone"})
            except ConsoleError as error:
                self._lose()
                if not waiting:
                    await self._send({"type": "waiting", "why": str(error)})
                await asyncio.sleep(_AGAIN_S)
            waiting = True

    def _lose(self) -> None:
        self._connected, self._may_type = False, None
        self._writes(False)

    async def _connect(self, path: str) -> None:
        request = self._link.request
        size = (request.columns, request.rows)
        connecting = asyncio.create_task(asyncio.to_thread(self._link.connect, path))
        try:
            await asyncio.shield(connecting)
        except asyncio.CancelledError:
            # The thread cannot be stopped, and what it opens has to be closed.
            with suppress(ConsoleError):
                await connecting
            raise
        self._connected = True
        if (now := (request.columns, request.rows)) != size:
            self._link.ask(Size(*now))

    async def _readable(self) -> None:
        fd = self._link.fileno()
        ready = asyncio.Event()
        self._loop.add_reader(fd, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_reader(fd)

    async def _send(self, message: object) -> None:
        await self._page.send_text(_encode(message).decode())

    async def _tell_all(self) -> int:
        """Tell what has come, output of a message's size at most; return how many bytes of it."""
        output = bytearray()
        more = True
        try:
            while more and len(output) < _MESSAGE:
                more = False
                for event in self._link.receive():
                    more = True
                    if isinstance(event, memoryview):
                        output += event
                        continue
                    await self._show(output)
                    await self._tell(event)
        except LinkLostError:
            await self._show(output)  # the link counts it as shown
            raise
        return await self._show(output)

    async def _show(self, output: bytearray) -> int:
        """Send output, the last of which is before where the link is; empty it."""
        count = len(output)
        while output:
            await self._room.wait()
            part = bytes(output[: WINDOW - (self._sent - self._shown)])
            at = (self._link.at or 0) - len(output)
            del output[: len(part)]
            self._sent += len(part)
            self._consider_room()
            await self._page.send_bytes(_OFFSET.pack(at) + part)
        return count

    async def _tell(self, event: News) -> None:
        match event:
            case Gap(missing):
                await self._send({"type": "gap", "missing": missing})
            case Dropped(count):
                await self._send({"type": "dropped", "count": count})
            case Hello():
                fields = {**msgspec.to_builtins(event), "journal": str(event.journal)}
                await self._send(fields)
            case _:
                if isinstance(event, Role):
                    self._may_type = event.writer
                await self._page.send_text(attachment.encode(event).decode())

    def _consider_room(self) -> None:
        if self._sent - self._shown < WINDOW:
            self._room.set()
        else:
            self._room.clear()

    # From the page to the guest

    async def _hear_page(self) -> None:
        while True:
            message = await self._page.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1000))
            if (data := message.get("bytes")) is not None:
                self._typed += data
                if len(self._typed) > MOST_TYPED:
                    raise _AgainstTheRules("it types more than it may")
                await self._type()
                continue
            try:
                said = _said.decode(message["text"])
            except NONSENSE:
                raise _AgainstTheRules("a message that makes no sense") from None
            self._hear(said)

    def _hear(self, said: Ask | AskWho | Size | Shown) -> None:
        if isinstance(said, Shown):
            self._shown = min(max(self._shown, said.count), self._sent)
            self._consider_room()
            return
        if isinstance(said, Size) and not (0 <= said.columns < 1 << 16 > said.rows >= 0):
            raise _AgainstTheRules("no size")
        if isinstance(said, Ask):
            self._link.request.write = said.write  # also when it has to attach again
        if self._connected:
            self._link.ask(said)
            self._consider_writing()
        elif isinstance(said, Size):
            self._link.request.columns, self._link.request.rows = said.columns, said.rows

    async def _type(self) -> None:
        """Type what there is room for, and say how far that went."""
        count = 0
        if self._may_type:
            count = self._link.type(bytes(self._typed))
        elif self._may_type is False:
            count = len(self._typed)
        self._consider_writing()
        if not count:
            return
        del self._typed[:count]
        self._taken += count
        taken = {"type": "taken", "count": self._taken}
        if not self._may_type:
            await self._send({"type": "dropped", "count": count})
        await self._send(taken)

    def _consider_writing(self) -> None:
        self._writes(self._link.wants_room)

    def _writes(self, wanted: bool) -> None:
        """Have the link flushed once there is room, or no more."""
        fd = self._link.fileno() if wanted else -1
        if fd == self._writes_at:
            return
        if self._writes_at >= 0:
            self._loop.remove_writer(self._writes_at)
        if fd >= 0:
            self._loop.add_writer(fd, self._flush)
        self._writes_at = fd

    def _flush(self) -> None:
        self._link.flush()
        self._consider_writing()

    def _hang_up(self) -> None:
        self._writes(False)
        self._link.close()
