"""Everyone at one port: clients arrive, read the journal at their own pace, type, and leave.

A client has two halves that end on their own. The output half ends when writing fails; what the
client typed before it left still reaches the guest. The input half ends at end of file; the client
is then served until it takes nothing for a moment, so that a pipe into `nc -N` gets its answer.

Where clients are terminals, the size of the one that typed last is the port's.

A client outlives the worker that serves it. Its *record*, in memory that the successor has too,
says how many bytes it was given and where in the output those were, so that only the last write and
the last read can be unknown: TCP tells those, and a read says beforehand where its bytes will be. A
record is twelve words (u64, native byte order), of which the data path stores one at a time:

- who: 0 for nobody, 1 for who came to the endpoint, else the master's key and 2
- what became of it: 1 its input has ended, 2 its output, 4 it is stuck; the offset it joined at
- bytes written to it, bytes read from it
- which of two states counts: each says that the client is at that offset of the output once it has
  so many bytes, and how large the gap before it is, whose notice are the bytes before that, if any.
"""

from __future__ import annotations

import errno
import logging
import select
from collections.abc import Callable, Mapping
from functools import partial
from typing import NoReturn

import msgspec

from ..attachment import Ask, Hello, Person, Size, Who
from ..config import Typing
from ..custody import Attach
from .backends import attached
from .backends.attached import Attached
from .backends.base import Client, Endpoint, gap
from .console.port import Port, UnderWay, Watcher
from .poller import HUP, IN, OUT, Poller, Timer
from .roles import Roles, Standing

#: How long a client that will not type any more is kept without taking anything.
_GRACE_S = 1.0

#: The first client's share of one round, in bytes.
_MOST_PER_ROUND = 1 << 20

#: What another one gets at a time, the part of what the first one takes that is for the others, and
#: what those have on top before that counts.
_PIECE = 1 << 14
_OTHERS_SHARE = 8
_BURST = 1 << 22

#: The clients of a port at once: there are so many records.
_MOST_CLIENTS = 256

#: A record's words, and their number.
_KEY, _BECAME, _JOINED, _WRITTEN, _READ, _WHICH, _STATES = range(7)
_STATE_WORDS = 3
_RECORD_WORDS = _STATES + 2 * _STATE_WORDS

#: What became of a client.
_INPUT, _OUTPUT, _STUCK = 1, 2, 4

#: The record of nobody, of who came to the endpoint, and of the first key.
_NOBODY, _CAME, _FIRST_KEY = range(3)

#: The words of a port's records, and which of them are its `under_way`. The last 32 are for others.
_WORDS = 4096
_UNDER_WAY = slice(_WORDS - 48, _WORDS - 46)

#: How far a client had read when that read began.
_BEGAN = _WORDS - 46

#: The input half has ended, which is told without waiting for input.
_END = HUP | select.EPOLLRDHUP


class Seat(msgspec.Struct, array_like=True):
    """What a successor has to know of a client besides its record, which is number `slot`.

    `key` is the master's for its descriptor, None if it came to the endpoint. Whoever takes turns
    has a `standing`; a `framed` one has told its terminal's `size`, and perhaps only `looks`.
    """

    key: int | None
    slot: int
    name: str
    standing: Standing | None = None
    framed: bool = False
    size: tuple[int, int] = (0, 0)
    looks: bool = False


class Saved(msgspec.Struct, array_like=True):
    """What a successor has to know of an audience; `seats` in the order in which they came.

    `fixed` is a size in columns and rows that no client decides, (0, 0) if they do.
    """

    fixed: tuple[int, int]
    seats: list[Seat]


def _lag(seat: _Seat) -> int:
    return seat.watcher.pending if seat.watcher else 0


#: Makes a client of a connected descriptor; one who was here before has a name.
Connect = Callable[[int, str], Client]


def nobody(_fd: int, _name: str) -> NoReturn:
    """Be the `connect` of a port to which nobody is sent."""
    raise TypeError("who is at this port comes to its endpoint")


#: Of those who type as they like.
_FREE = Standing(wants=True, writer=True)


def _who(key: int | None) -> int:
    return _CAME if key is None else key + _FIRST_KEY


class _Seat:
    """One client: `watcher` is its output half while there is one, `typing` its input half.

    `grace` runs when it will not type any more. Nothing is read or written before it is `settled`.
    """

    def __init__(self, client: Client, grace: Timer, told: Seat, record: memoryview) -> None:
        self.client = client
        self.name = client.name
        self.watcher: Watcher | None = None
        self.grace = grace
        self.told = told
        self.record = record
        self.settled = False
        self.granted = (0, 0)  # what it had taken when that was started
        self.typing = True
        self.paused = False  # the port's input has no room
        self.polled = False  # for input; not after its end was told while paused
        self.blocked = True  # its output has no room, or may not go yet
        self.written: int = record[_WRITTEN]
        self.read: int = record[_READ]
        self.lost = 0  # the size of its last gap
        self.start = 0  # the bytes written once that gap's notice is
        self.notice = b""  # what of that is due before the bytes after it
        self.behind = False  # it has missed some since it had last caught up

    @property
    def plays(self) -> bool:
        """Whether it takes turns with others."""
        return self.told.standing is not None

    @property
    def standing(self) -> Standing:
        """Its place among those who take turns; of one who does not, the writer's."""
        return self.told.standing or _FREE

    def tell_role(self, by: str) -> None:
        """Hear its role."""
        if isinstance(self.client, Attached):
            standing = self.standing
            self.client.play(by, writer=standing.writer, epoch=standing.epoch)

    @property
    def silent(self) -> bool:
        """Whether it is plain and waits for its turn; others know themselves what counts."""
        return not self.client.framed and not self.standing.writer

    def begin(self, watcher: Watcher) -> None:
        """Begin a record: it joins there."""
        record = self.record
        self.written = self.client.total_written() or 0
        self.read = self.client.total_read() or 0
        record[_BECAME] = 0
        record[_JOINED] = watcher.joined
        record[_WRITTEN], record[_READ] = self.written, self.read
        record[_WHICH] = 0
        self._watch(watcher)
        self.mark()
        record[_KEY] = _who(self.told.key)  # only now: it says that the rest is there

    def resume(self, port: Port) -> None:
        """Go on with its record where the client is by now."""
        record = self.record
        written = self.client.total_written()
        if written is not None:
            self.written = record[_WRITTEN] = max(written, self.written)
        at = _STATES + record[_WHICH] * _STATE_WORDS
        offset, self.start, self.lost = record[at : at + _STATE_WORDS]
        if self.lost and self.written < self.start:
            self.notice = gap(self.lost)[self.written - self.start :]
        self.typing = not record[_BECAME] & _INPUT
        if not record[_BECAME] & _OUTPUT:
            since = max(0, self.written - self.start)
            watcher = port.go_on(offset + since, record[_JOINED], looks=self.told.looks)
            watcher.stuck = bool(record[_BECAME] & _STUCK)
            self._watch(watcher)

    def _watch(self, watcher: Watcher) -> None:
        self.watcher = watcher
        watcher.jumped = self.mark

    def mark(self) -> None:
        """Have the record say where the watcher is, since it got there by other than its bytes."""
        if self.watcher is None:
            return
        if not self.notice:
            self.start, self.lost = self.written, 0
        record = self.record
        which = 1 - record[_WHICH]
        at = _STATES + which * _STATE_WORDS
        record[at] = self.watcher.offset
        record[at + 1] = self.start
        record[at + 2] = self.lost
        record[_WHICH] = which  # one aligned store, which all of it counts from

    def miss(self, lost: int) -> None:
        """Have a notice written first: `lost` bytes lie between the last ones and the watcher.

        The offsets tell a framed client.
        """
        if self.client.framed:
            self.mark()
            return
        self.lost, self.notice = lost, gap(lost)
        self.start = self.written + len(self.notice)
        self.mark()

    def without_notice(self, undelivered: int) -> int:
        """Return how many of the last `undelivered` bytes are the guest's."""
        since = max(0, self.written - self.start)
        noticed = len(gap(self.lost)) - len(self.notice) if self.lost else 0
        return undelivered - min(noticed, max(0, undelivered - since))

    @property
    def taken(self) -> tuple[int, int]:
        """How far its output is, and what of that is on its way: the same as long as it stalls."""
        return self.watcher.offset if self.watcher else 0, self.client.on_its_way()


class Audience:
    """The clients of `port`, who come to its `endpoint`, if there is one, or `arrive`.

    `connect` makes those from a descriptor, and for a successor a name. `changed` hears of every
    come and go, `resized` of every other size of the port. `records` are 32768 bytes, zeros at
    first, which a successor has too. `most` are let in, up to 256. Who is attached is told of the
    `guest` and the number of the port's `journal`. `typing` says which of the others count.

    A successor goes on with what was `saved` last and the descriptors in it, by key, which are its
    own from here on; a client that was let go since is gone. Seats that came or went make an
    audience `unsettled`: it is to be saved, and then to `settle`.
    """

    def __init__(
        self,
        port: Port,
        endpoint: Endpoint | None,
        poller: Poller,
        stall_ms: int,
        log: logging.LoggerAdapter[logging.Logger],
        changed: Callable[[], None],
        resized: Callable[[], None],
        *,
        records: memoryview,
        connect: Connect = nobody,
        saved: Saved | None = None,
        fds: Mapping[int, int] | None = None,
        most: int = _MOST_CLIENTS,
        guest: str = "",
        journal: int = 0,
        typing: Typing = Typing.ALL,
    ) -> None:
        self._port = port
        self._endpoint = endpoint
        self._poller = poller
        self._stall_s = stall_ms / 1000
        self._log = log
        self._changed = changed
        self._resized = resized
        self._connect = connect
        self._most = most
        self._guest, self._journal = guest, journal
        self._typing = typing
        self._roles = Roles()
        self._words = records.cast("Q")
        self._under_way = port.under_way = self._words[_UNDER_WAY]
        self.unsettled = False
        self._fixed = saved.fixed if saved else (0, 0)  # a size that no client decides
        self._typist: _Seat | None = None
        self._frozen = False
        self._others_due = _BURST  # bytes for those behind the first while the guest writes
        self._seats: list[_Seat] = []
        self._stall = poller.timer(self._stalled)
        self._stall_mark = 0  # where the holder was when that was started
        self._restored: list[_Seat] = []  # who is not served yet
        if saved is not None:
            self._restore(saved.seats, fds or {})
        self._bell = endpoint.fileno() if endpoint else None
        if self._bell is not None:
            poller.watch(self._bell, self._arrive)
        self._let_in()

    @property
    def served(self) -> bool:
        """Whether everyone was given all there is."""
        return not any(
            seat.notice or (seat.watcher and seat.watcher.pending) for seat in self._seats
        )

    def _warn(self, client: Client, what: str) -> None:
        self._log.warning("port %d: %s %s", self._port.id, client.name, what)

    # For a successor

    def save(self) -> Saved:
        """Return what a successor has to be told."""
        return Saved(self._fixed, [seat.told for seat in self._seats])

    def keys(self) -> list[int]:
        """Return the keys of those who are here."""
        return [seat.told.key for seat in self._seats if seat.told.key is not None]

    def settle(self) -> None:
        """Serve those who came, since a successor is told of them."""
        self.unsettled = False
        for seat in self._seats:
            if not seat.settled and seat not in self._restored:
                self._serve_from_now_on(seat)

    def adopt(self) -> None:
        """Go on where a killed worker was, once the rings do and the port's streams are right.

        What it had read and not handed on yet is the guest's first. Whoever was here then is served
        from now on.
        """
        self._finish_read()
        self._port.resumed()
        restored, self._restored = self._restored, []
        for seat in restored:
            if isinstance(seat.client, Attached):
                seat.client.read_to = seat.read
                if not (seat.read or seat.written):  # nobody knows whether it was greeted
                    self._greet(seat, seat.client)
                seat.client.resumed()
            if seat.plays:
                self._roles.resumed(seat)
        for seat in restored:
            self._serve_from_now_on(seat)
            if seat.watcher is None and not seat.typing:
                self._leave(seat)
        if self.unsettled:
            self._changed()

    def _finish_read(self) -> None:
        read = UnderWay.of(self._under_way)
        if read is None:
            return
        seat = next((seat for seat in self._restored if seat.told.slot == read.who), None)
        known, total = read.known, seat.client.total_read() if seat else None
        if seat is not None and seat.client.framed:  # it types again what has not been counted
            known = known or 0
            total = self._words[_BEGAN] + known
        if known is None and seat is not None and total is not None:
            known = max(0, total - seat.read)
        count = known or 0
        self._under_way[1] = count + 1
        lost = self._port.finish(read, count)
        name = seat.client.name if seat else "a client"
        if lost:
            self._log.warning(
                "port %d: %d bytes that %s typed are lost: the guest's buffers are gone",
                self._port.id,
                lost,
                name,
            )
        elif known is None:
            self._log.warning(
                "port %d: what %s typed last may be lost with its worker", self._port.id, name
            )
        if seat is not None and total is not None:
            seat.read = seat.record[_READ] = total
        self._under_way[0] = 0

    def _restore(self, seats: list[Seat], fds: Mapping[int, int]) -> None:
        for told in seats:
            client = self._client_again(told, fds)
            if client is None:
                self.unsettled = True
            elif self._record(told.slot)[_KEY] == _who(told.key):
                seat = self._new_seat(client, told)
                seat.resume(self._port)
                self._seats.append(seat)
                self._restored.append(seat)
            elif told.key is None:  # somebody else by now
                self._admit(client, None)
            else:
                self.unsettled = True
                client.close()
        self._attend()
        self.decide_size()

    def _attend(self) -> None:
        self._port.attended = any(not seat.told.looks for seat in self._seats)

    def _client_again(self, told: Seat, fds: Mapping[int, int]) -> Client | None:
        try:
            if told.key is not None and told.framed:
                return attached.client(fds[told.key], told.name, told.size)
            if told.key is not None:
                return self._connect(fds[told.key], told.name)
            return self._endpoint.accept() if self._endpoint else None
        except OSError as error:
            self._log.warning("port %d: %s cannot stay: %s", self._port.id, told.name, error)
            return None

    def _record(self, slot: int) -> memoryview:
        return self._words[slot * _RECORD_WORDS :][:_RECORD_WORDS]

    # Arrivals

    def arrive(self, fd: int, key: int, attach: Attach | None = None) -> None:
        """Take in a client whose descriptor, its own from now on, the master keeps under `key`."""
        self._see_off()
        try:
            if attach is None:
                client = self._connect(fd, "")
            else:
                client = attached.client(fd, attach.name, (attach.columns, attach.rows))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._log.warning("port %d: a client was turned away: %s", self._port.id, error)
            return  # else it was gone before it could be set up
        self._admit(client, key, attach)

    def _arrive(self, _: int) -> None:
        self._see_off()
        self._let_in()

    def _let_in(self) -> None:
        if self._endpoint is None:
            return
        try:
            while (client := self._endpoint.accept()) is not None:
                self._admit(client, None)
        except OSError as error:
            self._log.warning("port %d: who came cannot be served: %s", self._port.id, error)

    def _see_off(self) -> None:
        """Let those go who leave at the moment at which another comes, who is not their watcher."""
        for seat in [*self._seats]:
            if seat.typing and seat.polled and not seat.paused:
                self._readable(seat)
            if seat.watcher is not None and self._poller.hung(seat.client.writes):
                self._deafen(seat)

    def _admit(self, client: Client, key: int | None, attach: Attach | None = None) -> None:
        if len(self._seats) < self._most or self._make_room():
            self._seat(client, key, attach)
        else:
            self._warn(client, f"was turned away: {self._most} others are here")
            client.close()

    def _make_room(self) -> bool:
        """Let one go whose input waits and has ended, first of all one that took no output."""
        ended = [seat for seat in self._seats if seat.settled and not seat.polled]
        if not ended:
            return False
        seat = min(ended, key=lambda seat: seat.watcher is not None)
        lost = seat.client.unread()
        self._warn(seat.client, f"makes room for another: {lost} bytes that it typed are lost")
        self._let_go(seat)
        return True

    def _seat(self, client: Client, key: int | None, attach: Attach | None) -> None:
        taken = {seat.told.slot for seat in self._seats}
        slot = next(slot for slot in range(_MOST_CLIENTS) if slot not in taken)
        told = Seat(key, slot, client.name)
        seat = self._new_seat(client, told)
        if attach is not None and isinstance(client, Attached):
            told.framed, told.size = True, client.columns_rows
            told.looks = attach.look
            if not attach.look:
                told.standing = Standing(attach.write)
            seat.begin(self._port.attach(self._start(attach), looks=attach.look))
            self._greet(seat, client)
        else:
            if self._typing is not Typing.ALL:
                told.standing = Standing(self._typing is Typing.FIRST)
            seat.begin(self._port.attach())
        self._seats.append(seat)
        if seat.plays:
            self._roles.came(seat)
        if not told.looks:
            self._log.info("port %d: %s attached", self._port.id, client.name)
        self._attend()
        self.decide_size()
        self._unsettle()

    def _new_seat(self, client: Client, told: Seat) -> _Seat:
        grace = self._poller.timer(lambda: self._out_of_grace(seat))
        seat = _Seat(client, grace, told, self._record(told.slot))
        return seat

    def _unsettle(self) -> None:
        self.unsettled = True
        self._changed()

    def _serve_from_now_on(self, seat: _Seat) -> None:
        seat.settled = True
        seat.blocked = False
        if seat.typing:
            self._listen_to(seat)
        elif not seat.client.stays:
            self._grant(seat)
        if seat.watcher is not None:
            self._poller.watch(
                seat.client.writes, lambda events: self._writable(seat, events), 0, file_too=True
            )

    # Who is attached

    def _start(self, attach: Attach) -> int:
        """Return where somebody who attaches begins to read."""
        output = self._port.output
        if attach.since is not None and attach.journal in (0, self._journal):
            return min(max(attach.since, output.tail), output.head)
        if attach.replay is None:
            return output.tail
        return max(output.head - attach.replay, output.tail)

    def _greet(self, seat: _Seat, client: Attached) -> None:
        port = self._port
        client.tell(
            Hello(
                guest=self._guest,
                port=port.id,
                name=port.name,
                console=port.console,
                journal=self._journal,
                tail=port.output.tail,
                head=port.output.head,
                at=seat.watcher.offset if seat.watcher else port.output.head,
            )
        )
        client.tell(Size(*port.size, port.size_by))

    def _hear(self, seat: _Seat) -> None:
        """Answer what an attached client has asked."""
        client = seat.client
        if not isinstance(client, Attached):
            return
        asked, client.asked = client.asked, []
        for question in asked:
            if not isinstance(question, Ask):
                client.tell(self._who(client))
            elif seat.plays and self._roles.asked(seat, question):
                self._roles_changed()
        if client.resized:
            client.resized = False
            seat.told.size = client.columns_rows
            self.decide_size()
            self._unsettle()

    def _roles_changed(self) -> None:
        """Look anew at what was typed: it may not count any more, or count now."""
        self._unsettle()
        for seat in self._seats:
            if seat.paused and seat.plays:
                self._unpause(seat)

    def _hears(self, seat: _Seat) -> bool:
        """Hear what an attached client asks while nobody can type; say whether that was all."""
        if not isinstance(seat.client, Attached):
            return False
        try:
            waits = seat.client.waiting()
        except ConnectionError:
            self._let_go(seat)
            return True
        self._hear(seat)
        return waits is None

    def _who(self, asker: Attached) -> Who:
        people = []
        for seat in self._seats:
            if seat.told.looks:
                continue
            client = seat.client
            columns, rows = client.size()
            people.append(
                Person(
                    name=client.name,
                    attached=isinstance(client, Attached),
                    writer=seat.standing.writer,
                    you=client is asker,
                    columns=columns,
                    rows=rows,
                    lag=_lag(seat),
                )
            )
        return Who(people)

    # The input half

    def _listen_to(self, seat: _Seat) -> None:
        seat.polled = True
        # No function of ours in between: after a silence each costs microseconds before a key.
        self._poller.watch(seat.client.reads, partial(self._readable, seat), IN, file_too=True)

    def _readable(self, seat: _Seat, events: int = 0) -> None:
        if seat.paused:
            if events & _END and seat.silent:
                lost = seat.client.unread()
                self._warn(seat.client, f"typed {lost} bytes that do not count, and has ended")
                self._ended(seat)
            elif events & _END:
                # Reported for ever from here on; what is left to read waits for room.
                self._poller.forget(seat.client.reads)
                seat.polled = False
            return
        port = self._port
        waiting = port.input
        full = waiting.head - waiting.tail == waiting.size
        if full or self._frozen or seat.silent:
            if not self._frozen and self._hears(seat):
                return
            seat.paused = True
            if seat.polled:
                self._poller.want(seat.client.reads, select.EPOLLRDHUP)
            return
        framed = seat.client.framed
        if framed:
            self._words[_BEGAN] = seat.read
        try:
            count = port.receive(seat.client.read, seat.told.slot)
        except ConnectionError:
            self._under_way[0] = 0
            self._let_go(seat)
            return
        if count:
            seat.record[_READ] = seat.read = seat.read + count
        self._under_way[0] = 0
        if framed:
            self._hear(seat)
        if count:
            if seat is not self._typist or seat.client.size() != port.size:
                self._typist = seat
                self.decide_size()
        elif count == 0:
            self._ended(seat)

    def resume(self) -> None:
        """Let those type again who had to wait: the guest has taken input."""
        for seat in [*self._seats]:
            if seat.paused and not (self._frozen or seat.silent) and self._port.input.room():
                self._unpause(seat)

    def _unpause(self, seat: _Seat) -> None:
        seat.paused = False
        if seat.polled:
            self._poller.want(seat.client.reads, IN)
        else:
            self._listen_to(seat)

    def _ended(self, seat: _Seat) -> None:
        if not seat.typing:
            return
        seat.typing = False
        seat.record[_BECAME] |= _INPUT
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
        self.unsettled = True
        self.decide_size()

    def decide_size(self) -> None:
        """Look whose size is the port's; the last one stays when nobody knows a size."""
        if self._fixed != (0, 0):
            size, by = self._fixed, "resize"
        else:
            sizes = {seat: seat.client.size() for seat in self._seats if not seat.told.looks}
            known = [seat for seat, size in sizes.items() if size != (0, 0)]
            if not known:
                self._port.size_by = ""
                return
            decider = self._typist if self._typist in known else known[0]
            size, by = sizes[decider], decider.client.name
        self._port.size_by = by
        if size != self._port.size:
            self._port.size = size
            for seat in self._seats:
                if isinstance(seat.client, Attached):
                    seat.client.tell(Size(*size, by))
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
            if first is None and not (watcher.stuck or watcher.looks):
                first = watcher
            if seat.blocked or not (watcher.pending or seat.notice or seat.client.due):
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
        if seat.notice and not self._notify(seat):
            return self._block(seat, 0)
        client = seat.client
        if isinstance(client, Attached) and client.due and not client.say():
            return self._block(seat, 0)
        lost = watcher.skip_lost()
        if lost:
            if not (
                seat.behind or watcher.looks
            ):  # else the log has it; one line for every gap would fill it
                self._warn(seat.client, f"did not read in time and missed {lost} bytes")
            seat.behind = True
            seat.miss(lost)
            if not self._notify(seat):
                return self._block(seat, 0)
        took = 0
        while took < most and (span := watcher.span()[: most - took]):
            if isinstance(client, Attached):
                client.at = watcher.offset
            count = client.write(span)
            seat.record[_WRITTEN] = seat.written = seat.written + count
            self._port.took(watcher, count)
            took += count
            if count < len(span):
                return self._block(seat, took)
        if not watcher.pending:
            seat.behind = False
            if seat.record[_BECAME] & _STUCK:
                seat.record[_BECAME] &= ~_STUCK
        return took

    @staticmethod
    def _notify(seat: _Seat) -> bool:
        """Write what is due of a notice; return whether that was all."""
        count = seat.client.write(seat.notice)
        seat.record[_WRITTEN] = seat.written = seat.written + count
        seat.notice = seat.notice[count:]
        return not seat.notice

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
        self._port.detach(seat.watcher, seat.without_notice(undelivered))
        seat.record[_BECAME] |= _OUTPUT
        seat.watcher.jumped = None
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
        seat.record[_KEY] = _NOBODY
        if seat.plays:
            self._roles.left(seat)
            self._roles_changed()
        seat.client.close()
        if seat is self._typist:
            self._typist = None
        self._attend()
        self.decide_size()
        if not seat.told.looks:
            self._log.info("port %d: %s left", self._port.id, seat.client.name)
        self._unsettle()

    # The guest waits

    def _mind_the_holder(self) -> None:
        holder = self._port.holder if self._port.holding else None
        if holder is None or holder.stuck:
            self._stall.stop()
        elif self._stall.due is None or holder.offset != self._stall_mark:
            self._stall_mark = holder.offset
            self._stall.start(self._stall_s)

    def _stalled(self) -> None:
        holder = self._port.holder
        self._port.stall()
        for seat in self._seats:
            if seat.watcher and seat.watcher is holder:  # for which no successor waits again
                seat.record[_BECAME] |= _STUCK
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

        They stay for what there is, as long as they take it: no successor has them.
        """
        self.settle()
        self._stop_listening()
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
        self._stop_listening()
        if self._endpoint is not None:
            self._endpoint.close()

    def abandon(self) -> None:
        """Leave everything as it is, for those who go on with it, but the modes of a terminal."""
        if self._endpoint is not None:
            self._endpoint.abandon()

    def _stop_listening(self) -> None:
        if self._bell is not None:
            self._poller.forget(self._bell)
