"""Everyone at one port: clients arrive, read the journal at their own pace, type, and leave.

A client has two halves that end on their own. The output half ends when writing fails; what the
client typed before it left still reaches the guest. The input half ends at end of file; the client
is then served until it takes nothing for a moment, so that a pipe into `nc -N` gets its answer.

Where clients are terminals, the size of the one that typed last is the port's.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Callable
from functools import partial

from .backends.base import Client, Endpoint
from .console.port import Port, Watcher
from .poller import HUP, IN, OUT, Poller, Timer

#: How long a client that will not type any more is kept without taking anything.
_GRACE_S = 1.0

#: How long arrivals wait when the system has no room for them.
_NO_ROOM_S = 1.0

#: The first client's share of one round, in bytes.
_MOST_PER_ROUND = 1 << 20

#: What another one gets at a time, the part of what the first one takes that is for the others, and
#: what those have on top before that counts.
_PIECE = 1 << 14
_OTHERS_SHARE = 8
_BURST = 1 << 22

#: The clients of a port at once.
_MOST_CLIENTS = 256

#: The input half has ended, which is told without waiting for input.
_END = HUP | select.EPOLLRDHUP


def _lag(seat: _Seat) -> int:
    return seat.watcher.pending if seat.watcher else 0


class _Seat:
    """One client: `watcher` is its output half while there is one, `typing` its input half.

    `grace` runs when it will not type any more.
    """

    def __init__(self, client: Client, watcher: Watcher, grace: Timer) -> None:
        self.client = client
        self.watcher: Watcher | None = watcher
        self.grace = grace
        self.granted = (0, 0)  # what it had taken when that was started
        self.typing = True
        self.paused = False  # the port's input has no room
        self.polled = True  # for input; not after its end was told while paused
        self.blocked = False  # its output has no room
        self.notice = b""  # of a gap, due before the bytes after it
        self.behind = False  # it has missed some since it had last caught up
        self.noticed = 0  # bytes of the last one that were written, and bytes after it
        self.since = 0

    @property
    def taken(self) -> tuple[int, int]:
        """How far its output is, and what of that is on its way: the same as long as it stalls."""
        return self.watcher.offset if self.watcher else 0, self.client.on_its_way()


class Audience:
    """The clients of `port`, who arrive at `endpoint`.

    `changed` hears of every come and go, `resized` of every other size of the port.
    """

    def __init__(
        self,
        port: Port,
        endpoint: Endpoint,
        poller: Poller,
        stall_ms: int,
        log: logging.LoggerAdapter[logging.Logger],
        changed: Callable[[], None],
        resized: Callable[[], None],
    ) -> None:
        self._port = port
        self._endpoint = endpoint
        self._poller = poller
        self._stall_s = stall_ms / 1000
        self._log = log
        self._changed = changed
        self._resized = resized
        self._fixed = (0, 0)  # a size that no client decides
        self._typist: _Seat | None = None
        self._frozen = False
        self._others_due = _BURST  # bytes for those behind the first while the guest writes
        self._seats: list[_Seat] = []
        self._stall = poller.timer(self._stalled)
        self._stall_mark = 0  # where the holder was when that was started
        self._no_room = poller.timer(self._listen)
        self._listen()
        self._arrive(0)

    @property
    def served(self) -> bool:
        """Whether everyone was given all there is."""
        return not any(
            seat.notice or (seat.watcher and seat.watcher.pending) for seat in self._seats
        )

    def _warn(self, client: Client, what: str) -> None:
        self._log.warning("port %d: %s %s", self._port.id, client.name, what)

    def _listen(self) -> None:
        fd = self._endpoint.fileno()
        if fd is not None:
            self._poller.watch(fd, self._arrive)

    def _arrive(self, _: int) -> None:
        # Whoever leaves at the same moment leaves first: the next one is then not its watcher.
        for seat in [*self._seats]:
            if seat.typing and seat.polled and not seat.paused:
                self._readable(seat)
            if seat.watcher is not None and self._poller.hung(seat.client.writes):
                self._deafen(seat)
        try:
            while (client := self._endpoint.accept()) is not None:
                if len(self._seats) < _MOST_CLIENTS or self._make_room():
                    self._seat(client)
                else:
                    self._warn(client, f"was turned away: {_MOST_CLIENTS} others are here")
                    client.close()
        except OSError as error:
            self._log.warning("cannot take another client, next try in a second: %s", error)
            fd = self._endpoint.fileno()
            if fd is not None:
                self._poller.forget(fd)
                self._no_room.start(_NO_ROOM_S)

    def _make_room(self) -> bool:
        """Let one go whose input waits and has ended, first of all one that took no output."""
        ended = [seat for seat in self._seats if not seat.polled]
        if not ended:
            return False
        seat = min(ended, key=lambda seat: seat.watcher is not None)
        lost = seat.client.unread()
        self._warn(seat.client, f"makes room for another: {lost} bytes that it typed are lost")
        self._let_go(seat)
        return True

    def _seat(self, client: Client) -> None:
        grace = self._poller.timer(lambda: self._out_of_grace(seat))
        seat = _Seat(client, self._port.attach(), grace)
        self._seats.append(seat)
        self._listen_to(seat)
        self._poller.watch(
            client.writes, lambda events: self._writable(seat, events), 0, file_too=True
        )
        self._log.info("port %d: %s attached", self._port.id, client.name)
        self._port.attended = True
        self.decide_size()
        self._changed()

    # The input half

    def _listen_to(self, seat: _Seat) -> None:
        seat.polled = True
        # No function of ours in between: after a silence each costs microseconds before a key.
        self._poller.watch(seat.client.reads, partial(self._readable, seat), IN, file_too=True)

    def _readable(self, seat: _Seat, events: int = 0) -> None:
        if seat.paused:
            if events & _END:
                # Reported for ever from here on; what is left to read waits for room.
                self._poller.forget(seat.client.reads)
                seat.polled = False
            return
        port = self._port
        waiting = port.input
        if self._frozen or waiting.head - waiting.tail == waiting.size:
            seat.paused = True
            if seat.polled:
                self._poller.want(seat.client.reads, select.EPOLLRDHUP)
            return
        try:
            count = port.receive(seat.client.read)
        except ConnectionError:
            self._let_go(seat)
            return
        if count:
            if seat is not self._typist or seat.client.size() != port.size:
                self._typist = seat
                self.decide_size()
        elif count == 0:
            self._ended(seat)

    def resume(self) -> None:
        """Let those type again who had to wait: the guest has taken input."""
        for seat in [*self._seats]:
            if not seat.paused or self._frozen or not self._port.input.room():
                continue
            seat.paused = False
            if seat.polled:
                self._poller.want(seat.client.reads, IN)
            else:
                self._listen_to(seat)

    def _ended(self, seat: _Seat) -> None:
        if not seat.typing:
            return
        seat.typing = False
        if seat.polled:
            self._poller.forget(seat.client.reads)
        if seat.watcher is None:
            self._leave(seat)
        elif not seat.client.stays:
            self._grant(seat)

    def _grant(self, seat: _Seat) -> None:
        seat.granted = seat.taken
        seat.grace.start(_GRACE_S)

    def _out_of_grace(self, seat: _Seat) -> None:
        if seat.taken == seat.granted and not self._frozen:
            self._deafen(seat)
        else:
            self._grant(seat)

    # The size

    def fix_size(self, columns: int, rows: int) -> None:
        """Give the port this size, whatever its clients' is; 0 x 0 lets them decide again."""
        self._fixed = (columns, rows)
        self.decide_size()

    def decide_size(self) -> None:
        """Look whose size is the port's; the last one stays when nobody knows a size."""
        if self._fixed != (0, 0):
            size, by = self._fixed, "resize"
        else:
            sizes = {seat: seat.client.size() for seat in self._seats}
            known = [seat for seat in self._seats if sizes[seat] != (0, 0)]
            if not known:
                self._port.size_by = ""
                return
            decider = self._typist if self._typist in known else known[0]
            size, by = sizes[decider], decider.client.name
        self._port.size_by = by
        if size != self._port.size:
            self._port.size = size
            self._resized()
            self._changed()

    # The output half

    def _writable(self, seat: _Seat, events: int) -> None:
        if events & HUP:
            self._deafen(seat)
            self._arrive(0)  # a pty that was opened again meanwhile said so before this
            return
        seat.blocked = False
        self._poller.want(seat.client.writes, 0)

    def flush(self) -> bool:
        """Give everyone their next bytes; return whether anyone took some.

        The guest keeps the pace of the first in line, so the others are not to slow it down: while
        it goes on writing, and after a burst, they share an eighth of what the first takes, and in
        each pause, however short, one of them gets a piece.
        """
        if self._frozen:
            return False
        first: Watcher | None = None
        progress = False
        others: list[_Seat] = []
        for seat in [*self._seats]:
            watcher = seat.watcher
            if watcher is None:
                continue
            if first is None and not watcher.stuck:
                first = watcher
            if seat.blocked or not (watcher.pending or seat.notice):
                continue
            if watcher is not first:
                others.append(seat)
            elif took := self._serve(seat, watcher, _MOST_PER_ROUND):
                progress = True
                self._others_due += took // _OTHERS_SHARE
        if others:
            progress |= self._serve_others(others, pause=not progress)
        else:
            self._others_due = _BURST
        self._mind_the_holder()
        return progress

    def _serve_others(self, seats: list[_Seat], *, pause: bool) -> bool:
        """Give some to those that lag most; return whether anyone took some."""
        seats.sort(key=_lag)
        progress = False
        while seats and (self._others_due > 0 or pause):
            seat = seats.pop()
            most = max(_PIECE, self._others_due)
            took = self._serve(seat, seat.watcher, most) if seat.watcher else 0
            if took:
                progress = True
                if pause:
                    break
                self._others_due -= took
        return progress

    def _serve(self, seat: _Seat, watcher: Watcher, most: int) -> int:
        try:
            took = self._give(seat, watcher, most)
        except OSError as error:
            if not isinstance(error, ConnectionError):
                self._warn(seat.client, f"failed: {error}")
            self._deafen(seat)
            return 0
        if took and seat.client.resizes:
            self.decide_size()
        return took

    def _give(self, seat: _Seat, watcher: Watcher, most: int) -> int:
        lost = watcher.skip_lost()
        if lost:
            seat.notice += b"\r\n[vhost-device-console: %d bytes missed]\r\n" % lost
            if not seat.behind:  # else the log has it; one line for every gap would fill it
                self._warn(seat.client, f"did not read in time and missed {lost} bytes")
            seat.behind = True
            seat.noticed = seat.since = 0
        if seat.notice:
            count = seat.client.write(seat.notice)
            seat.noticed += count
            seat.notice = seat.notice[count:]
            if seat.notice:
                return self._block(seat, 0)
        took = 0
        while took < most and (span := watcher.span()[: most - took]):
            count = seat.client.write(span)
            self._port.took(watcher, count)
            seat.since += count
            took += count
            if count < len(span):
                return self._block(seat, took)
        if not watcher.pending:
            seat.behind = False
        return took

    def _block(self, seat: _Seat, took: int) -> int:
        seat.blocked = True
        self._poller.want(seat.client.writes, OUT)
        return took

    def _deafen(self, seat: _Seat) -> None:
        if seat.watcher is None:
            return
        self._poller.forget(seat.client.writes)
        undelivered = seat.client.end_output()
        # A notice of ours among them is none of the guest's bytes.
        undelivered -= min(seat.noticed, max(0, undelivered - seat.since))
        self._port.detach(seat.watcher, undelivered)
        seat.watcher = None
        if not seat.typing:
            self._leave(seat)
        elif seat.client.stays:  # as long as there is output, that is, not for typing alone
            self._ended(seat)
        else:
            self._changed()

    # Both halves

    def _let_go(self, seat: _Seat) -> None:
        self._ended(seat)
        self._deafen(seat)

    def _leave(self, seat: _Seat) -> None:
        self._seats.remove(seat)
        seat.grace.stop()
        seat.client.close()
        if seat is self._typist:
            self._typist = None
        self._port.attended = bool(self._seats)
        self.decide_size()
        self._log.info("port %d: %s left", self._port.id, seat.client.name)
        self._changed()

    # The guest waits

    def _mind_the_holder(self) -> None:
        holder = self._port.holder if self._port.holding else None
        if holder is None or holder.stuck:
            self._stall.stop()
        elif self._stall.due is None or holder.offset != self._stall_mark:
            self._stall_mark = holder.offset
            self._stall.start(self._stall_s)

    def _stalled(self) -> None:
        self._port.stall()
        self._changed()

    # The guest moves

    def freeze(self) -> None:
        """Let nothing more be read or typed: what waits goes where the guest goes."""
        self._frozen = True
        self._stall.stop()

    def thaw(self) -> None:
        """Go on: the guest stayed, or another one came."""
        self._frozen = False
        self.resume()

    def dismiss(self) -> bool:
        """Take in nobody and nothing any more; return whether everyone is served and has gone.

        They stay for what there is, as long as they take it.
        """
        self._no_room.stop()
        fd = self._endpoint.fileno()
        if fd is not None:
            self._poller.forget(fd)
        for seat in [*self._seats]:
            self._ended(seat)
        if self.served or not self._seats:
            self.close()
            return True
        return False

    def close(self) -> None:
        """Let everyone go, and the endpoint."""
        for seat in [*self._seats]:
            self._let_go(seat)
        self._stall.stop()
        self._no_room.stop()
        fd = self._endpoint.fileno()
        if fd is not None:
            self._poller.forget(fd)
        self._endpoint.close()
