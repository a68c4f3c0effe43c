"""`ssh`: consoles for people who come with OpenSSH's client or another one, and nothing else.

A user name is a guest's. Of all that the protocol has only sessions are granted, and in those only
the console itself and a list of consoles; there is no shell, no file and no forwarding.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import signal
import socket
import stat
from collections.abc import Coroutine, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import asyncssh

from .. import monitor, systemd, tables
from ..admission import Sparing
from ..attachment import Ask, AskWho, Size
from ..errors import ConfigError, ConsoleError
from ..monitor import GuestStatus, PortStatus
from ..privileges import confine_entrance
from ..words import clean
from .desk import DONE, Desk, Effect, Leave, Say, Show, ToggleLog, bracketed
from .keys import Keys, Person, Role
from .link import Link, LinkLostError
from .listening import listening

#: Connections at once; those of them who have not said who they are; seconds they have for that.
MOST_CONNECTIONS = 128
MOST_UNKNOWN = 32
GRACE_S = 30

#: Keys that a connection may offer.
MOST_KEYS = 10

#: Sessions of one connection.
MOST_SESSIONS = 8

#: Bytes of a session's output that wait for its client, beyond which nothing is read for it.
MOST_UNREAD = 1 << 18

#: Bytes that a client may send ahead in a session.
WINDOW = 1 << 16

#: A session whose packets would be smaller is not worth its work. Any size up to 32 KiB is to be
#: taken by everybody (RFC 4253, section 6.1).
_SMALLEST_PACKET = 1 << 10

#: Seconds between two looks at a connection that is silent, and how many go without an answer.
_ALIVE_S = 30
_ALIVE_COUNT = 4

#: Seconds between two tries to find the guest again, at first and at most.
_AGAIN_S = 0.2
_AGAIN_MOST_S = 2.0

#: Seconds that connections have to end when the server does.
_LAST_S = 2.0

#: Exit statuses, besides those of `desk`.
_GONE, _REFUSED = 1, 1

#: The largest size of a terminal in either direction: a le16 of the console's.
_LARGEST_SIZE = (1 << 16) - 1

_log = logging.getLogger(__name__)


@dataclass
class Options:
    """What to serve: `listen` are HOST:PORT or unix:PATH, `monitor` one daemon's socket, or none.

    `escape` is as for `desk.Desk`, `access` as for `keys.Keys`; `as_json` says where on stdout.
    """

    listen: list[str]
    authorized_keys: str
    host_keys: list[str]
    access: str | None = None
    monitor: str | None = None
    escape: int | None = 0x1D
    as_json: bool = False


def serve(options: Options) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit status; raises ConsoleError."""
    logging.getLogger("asyncssh").setLevel(logging.ERROR)  # peers could fill the log
    keys = [_host_key(path) for path in options.host_keys]
    return asyncio.run(_Server(options, keys).run())


def default_host_key() -> str:
    """Return where the host's key is when nobody says so."""
    state = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if not state:
        home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
        state = f"{home}/vhost-device-console"
    return f"{state}/ssh_host_ed25519_key"


def _host_key(path: str) -> asyncssh.SSHKey:
    """Return the key in a file that is nobody else's, made when it is missing."""
    try:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return _new_host_key(path)
        with open(fd, "rb") as file:
            if stat.S_IMODE(os.fstat(fd).st_mode) & 0o077:
                raise ConfigError(f"others may read the host key {path}: chmod 600 {path}")
            return asyncssh.import_private_key(file.read())
    except OSError as error:
        raise ConfigError(f"cannot use the host key {path}: {_words(error)}") from error
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
        raise ConfigError(f"{path} is no host key that can be used: {error}") from None


def _new_host_key(path: str) -> asyncssh.SSHKey:
    key = asyncssh.generate_private_key("ssh-ed25519")
    if folder := os.path.dirname(path):
        os.makedirs(folder, 0o700, exist_ok=True)
    made = f"{path}.new"  # never a half of one
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(key.export_private_key())
    os.rename(made, path)
    _log.info("made the host key %s", path)
    return key


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


# Consoles


@dataclass
class _Place:
    """A console that somebody may reach, as `role`, by the daemon at `monitor`."""

    monitor: str
    guest: str
    port: int
    role: Role

    def is_same(self, other: _Place) -> bool:
        """Say whether `other` is the same console and role, of whichever daemon."""
        return (self.guest, self.port, self.role) == (other.guest, other.port, other.role)


def _served(path: str | None) -> list[tuple[str, GuestStatus]]:
    """Return the guests of all daemons, each with its daemon's monitor socket; may take long."""
    found = []
    for at in monitor.find(os.environ) if path is None else [path]:
        with suppress(ConsoleError):
            found += [(at, guest) for guest in monitor.ask(at).guests]
    return found


def _port(guest: GuestStatus, which: str | None) -> PortStatus | None:
    """Return the port called so, by name or id, or a guest's console."""
    if which is None:
        return next((port for port in guest.ports if port.console), next(iter(guest.ports), None))
    named = [port for port in guest.ports if port.name == which]
    return next(iter(named or [port for port in guest.ports if str(port.id) == which]), None)


def _names(guest: GuestStatus, port: PortStatus) -> list[str]:
    """Return all that an access file may call a console."""
    return [guest.name, f"{guest.name}:{port.id}", f"{guest.name}:{port.name}"]


def _meant(user: str) -> list[tuple[str, str | None]]:
    """Return the guests and ports that a user name may mean, the likeliest first."""
    meant: list[tuple[str, str | None]] = [(user, None)]
    for sign in ":+":  # a guest's name may have those in it
        front, found, which = user.rpartition(sign)
        if found and front:
            meant.append((front, which))
    return meant


# The server


class _Server:
    def __init__(self, options: Options, host_keys: list[asyncssh.SSHKey]) -> None:
        self.options = options
        self.keys = Keys(options.authorized_keys, options.access)
        self.refusals = Sparing()
        self._host_keys = host_keys
        self._visitors: dict[_Visitor, None] = {}  # in the order in which they came
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        loop.set_exception_handler(_log_fault)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, over.set)
        loop.add_signal_handler(signal.SIGHUP, self._look_again)
        with ExitStack() as undo:
            acceptors, places = [], []
            for where in self.options.listen:
                sock, place = undo.enter_context(listening(where))
                acceptors.append(await self._serve(sock))
                places.append(place)
            confine_entrance()
            self._say(places)
            systemd.notify("READY=1")
            await over.wait()
            systemd.notify("STOPPING=1")
            for acceptor in acceptors:
                acceptor.close()
            await self._end()
        return 0

    def _say(self, places: Iterable[str]) -> None:
        """Say where it listens, and with which keys."""
        keys = [key.get_fingerprint() for key in self._host_keys]
        for place in places:
            if self.options.as_json:
                print(json.dumps({"listening": place, "keys": keys}), flush=True)
            for key in keys:
                _log.info("listening at %s with the key %s", place, key)

    async def _serve(self, sock: socket.socket) -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            sock=sock,
            server_factory=lambda: _Visitor(self),
            server_host_keys=self._host_keys,
            authorized_client_keys=self.keys,
            x509_trusted_certs=None,
            password_auth=False,
            kbdint_auth=False,
            host_based_auth=False,
            gss_host=None,
            agent_forwarding=False,
            x11_forwarding=False,
            line_editor=False,
            compression_algs=None,
            encoding=None,
            window=WINDOW,
            login_timeout=GRACE_S,
            keepalive_interval=_ALIVE_S,
            keepalive_count_max=_ALIVE_COUNT,
            server_version="vhost-device-console",
        )

    async def _end(self) -> None:
        for visitor in [*self._visitors]:
            visitor.dismiss("the server ends")
        if tasks := [visitor.gone for visitor in self._visitors]:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_S):
                    await asyncio.gather(*(gone.wait() for gone in tasks))
        for visitor in [*self._visitors]:
            visitor.conn.abort()

    def _look_again(self) -> None:
        """Let go whose key does not hold any more; whoever comes is looked at anew anyway."""
        for visitor in [*self._visitors]:
            if visitor.person is not None and not self.keys.again(visitor.person):
                visitor.dismiss("your key is not valid here any more")
            for session in [*visitor.sessions]:
                session.look_again()

    # Who comes

    def came(self, visitor: _Visitor) -> bool:
        """Take in a connection, unless there are too many."""
        if len(self._visitors) >= MOST_CONNECTIONS:
            return False
        unknown = [each for each in self._visitors if each.person is None]
        if len(unknown) >= MOST_UNKNOWN:
            unknown[0].why = "others came before it had said who it is"
            unknown[0].conn.abort()
        self._visitors[visitor] = None
        return True

    def left(self, visitor: _Visitor) -> None:
        self._visitors.pop(visitor, None)

    def begin(self, work: Coroutine[None, None, None]) -> None:
        """Have some work done beside."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a session was lost: %s: %s", type(error).__name__, error)

    # Where to

    async def find(self, person: Person, user: str) -> _Place:
        """Return the console that `user` names; raises ConsoleError when there is none for them."""
        guests = await self._reachable(person)
        for name, which in _meant(user):
            found = [
                (at, guest, port, role)
                for at, guest in guests
                if guest.name == name
                and (port := _port(guest, which)) is not None
                and (role := self.keys.role(person, _names(guest, port))) is not None
            ]
            if len(found) > 1:
                raise ConsoleError(f"{len(found)} daemons have a guest {name}")
            for at, guest, port, role in found:
                return _Place(at, guest.name, port.id, role)
        names = ", ".join(sorted({guest.name for _, guest in guests}))
        raise ConsoleError(f"there is no guest {user} for you, only {names or 'none at all'}")

    async def _reachable(self, person: Person) -> list[tuple[str, GuestStatus]]:
        """Return the guests of which `person` may reach a port, with no other ports."""
        found = []
        for at, guest in await asyncio.to_thread(_served, self.options.monitor):
            ports = [p for p in guest.ports if self.keys.role(person, _names(guest, p)) is not None]
            if ports:
                guest.ports = ports
                found.append((at, guest))
        return found

    async def table(self, person: Person, *, as_json: bool) -> str:
        """Return what `status` prints, of what `person` may reach."""
        guests = [guest for _, guest in await self._reachable(person)]
        if as_json:
            return json.dumps({"guests": monitor.plain(guests)}, indent=2)
        return "\n".join(tables.guests(guests, None)) if guests else "there is no guest for you"


def _log_fault(_loop: asyncio.AbstractEventLoop, fault: dict[str, object]) -> None:
    _log.error("the ssh server: %s: %s", fault.get("message"), fault.get("exception"))


# Connections


class _Visitor(asyncssh.SSHServer):
    """A connection: `person` is who came, once that is known."""

    conn: asyncssh.SSHServerConnection

    def __init__(self, server: _Server) -> None:
        self.server = server
        self.person: Person | None = None
        self.sessions: dict[_Session, None] = {}
        self.why = ""
        self.gone = asyncio.Event()
        self.choked = False
        self._offered = 0
        self._where = ""
        self._user = ""

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self.conn = conn
        peer = conn.get_extra_info("peername")
        self._where = peer[0] if peer else "a unix socket"
        # asyncssh counts on a channel's window, which is the client's to choose: what does not go
        # out would pile up here.
        vars(conn).update(pause_writing=self._choke, resume_writing=self._release)
        if not self.server.came(self):
            self.why = f"{MOST_CONNECTIONS} others are here"
            conn.abort()

    def _choke(self) -> None:
        self.choked = True
        self._transport.pause_reading()
        for session in [*self.sessions]:
            session.consider()

    def _release(self) -> None:
        self.choked = False
        self._transport.resume_reading()
        for session in [*self.sessions]:
            session.consider()

    @property
    def _transport(self) -> asyncio.Transport:
        transport = self.conn._transport  # noqa: SLF001 - nothing else leads there
        if transport is None:
            raise RuntimeError("the connection is gone")
        return transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.left(self)
        if self.person is None:
            user = f" for {clean(self._user)}" if self._user else ""
            why = self.why or (clean(str(exc)) if exc else "it said nothing more")
            keys = f", {self._offered} keys of it are not known here" if self._offered else ""
            self.server.refusals.warn(f"{self._where} did not come in{user}: {why}{keys}")
        else:
            _log.info("%s, %s left", self._where, self.person.name)
        self.gone.set()

    def dismiss(self, why: str) -> None:
        """Say `why` at all consoles, and end the connection."""
        for session in [*self.sessions]:
            session.leave(_GONE, why)
        self.conn.disconnect(asyncssh.DISC_BY_APPLICATION, why)

    # Who it is

    def begin_auth(self, username: str) -> bool:
        self._user = username
        self._count_offer()
        return True

    def validate_public_key(self, _user: str, _key: asyncssh.SSHKey) -> bool:
        self._count_offer()
        return False  # asyncssh has asked for all that are known before

    def validate_ca_key(self, _user: str, _key: asyncssh.SSHKey) -> bool:
        self._count_offer()
        return False

    def _count_offer(self) -> None:
        self._offered += 1
        if self._offered > MOST_KEYS:
            self.why = "too many keys"
            self.conn.disconnect(asyncssh.DISC_NO_MORE_AUTH_METHODS_AVAILABLE, self.why)

    def auth_completed(self) -> None:
        person = self.conn.get_key_option("person")
        if not isinstance(person, Person):
            raise asyncssh.PermissionDenied("nobody knows who this is")
        self.person = person
        _log.info("%s is %s, for %s", self._where, person.name, clean(self._user))

    # What it wants

    def session_requested(self) -> _Session | bool:
        if self.person is None or len(self.sessions) >= MOST_SESSIONS:
            return False
        name = f"{self.person.name}, ssh from {self._where}"[:64]
        session = _Session(self, self.person, self._user, name)
        self.sessions[session] = None
        return session


class _Forgetful(dict[bytes, bytes]):
    """An environment that nobody reads, and that does not grow."""

    def __setitem__(self, _name: bytes, _value: bytes) -> None:
        pass


class _Session(asyncssh.SSHServerSession[bytes]):
    """A console, or what is said instead of one."""

    def __init__(self, visitor: _Visitor, person: Person, user: str, name: str) -> None:
        self._visitor = visitor
        self._server = visitor.server
        self._person = person
        self._user = user
        self._name = name
        self._chan: asyncssh.SSHServerChannel[bytes]
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._command: str | None = None
        self._terminal = False
        self._size = (0, 0)
        self._full = False  # the channel
        self._paused = False  # its input
        self._ended = False  # its input
        self._desk: Desk | None = None
        self._place: _Place | None = None
        self._link: Link | None = None
        self._early: bytearray | None = bytearray()  # what comes before the link is up
        self._fd = -1  # the link's, while it is up
        self._reading = self._writing = False
        self._leaving: asyncio.TimerHandle | None = None

    # The channel

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        self._chan = chan
        vars(chan)["_env"] = _Forgetful()
        chan.set_write_buffer_limits(MOST_UNREAD)

    def connection_lost(self, _error: Exception | None) -> None:
        self._visitor.sessions.pop(self, None)
        self._hang_up()

    def pty_requested(self, _type: str, size: tuple[int, int, int, int], _modes: object) -> bool:
        self._terminal = True
        self._size = _sane(*size[:2])
        return True

    def shell_requested(self) -> bool:
        return True

    def exec_requested(self, command: str) -> bool:
        self._command = command.strip()
        return True

    def subsystem_requested(self, subsystem: str) -> bool:
        self._server.refusals.warn(f"{self._name} was refused {clean(subsystem[:64])}")
        return False

    def session_started(self) -> None:
        if (size := vars(self._chan)["_send_pktsize"]) < _SMALLEST_PACKET:
            self.leave(_REFUSED, f"packets of {size} bytes are too small here")
            return
        work = self._attach() if self._command is None else self._answer(self._command)
        self._server.begin(work)

    def pause_writing(self) -> None:
        self._full = True
        self.consider()

    def resume_writing(self) -> None:
        self._full = False
        self.consider()

    # Instead of a console

    async def _answer(self, command: str) -> None:
        words = command.split()
        if words[:1] == ["status"] and words[1:] in ([], ["--json"]):
            text = await self._server.table(self._person, as_json=bool(words[1:]))
            end = "\r\n" if self._terminal else "\n"
            self._write("".join(f"{line}{end}" for line in text.splitlines()).encode())
            self._exit(DONE)
            return
        self._server.refusals.warn(f"{self._name} was refused the command {clean(command[:64])}")
        self.leave(_REFUSED, "no command can be run here but status; without one, it is a console")

    # The console

    async def _attach(self) -> None:
        try:
            place = await self._server.find(self._person, self._user)
            self._begin(place)
            await self._connect(place)
        except ConsoleError as error:
            self.leave(_REFUSED, clean(str(error)))

    def _begin(self, place: _Place) -> None:
        writer = place.role is Role.WRITER
        self._place = place
        self._desk = Desk(
            terminal=self._terminal,
            escape=self._server.options.escape,
            may_write=writer,
            denied="you may only watch" if not writer else "another is the writer",
        )
        # Who may only watch does not decide how large the guest's console is.
        columns, rows = self._size if writer else (0, 0)
        self._link = Link(
            monitor.Attach(
                guest=place.guest,
                port=place.port,
                name=self._name,
                write=writer,
                columns=columns,
                rows=rows,
            )
        )

    async def _connect(self, place: _Place) -> None:
        link = self._link
        if link is None or self._over.is_set():
            return
        size = self._size
        # Nobody touches the link meanwhile: it is not up.
        await asyncio.to_thread(link.connect, place.monitor)
        if self._over.is_set():
            link.close()
            return
        self._fd = link.fileno()
        if self._size != size:
            self._tell_size()
        if self._early is not None:
            early, self._early = bytes(self._early), None
            self._take_keys(early)
            if self._ended and self._desk is not None:
                self._do(self._desk.end())
        self.consider()

    async def _connect_again(self) -> None:
        pause = _AGAIN_S
        while not self._over.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._over.wait()
            pause = min(2 * pause, _AGAIN_MOST_S)
            try:
                place = await self._server.find(self._person, self._user)
                if self._place is not None and not place.is_same(self._place):
                    self.leave(_GONE, "what you may do here has changed")
                await self._connect(place)
            except ConsoleError:
                continue
            return

    def look_again(self) -> None:
        """Leave if another role is this person's by now."""
        place = self._place
        if place is None:
            return
        self._server.begin(self._look_again(place))

    async def _look_again(self, place: _Place) -> None:
        try:
            same = place.is_same(await self._server.find(self._person, self._user))
        except ConsoleError:
            same = False
        if not same:
            self.leave(_GONE, "what you may do here has changed")

    def _receive(self) -> None:
        link, desk = self._link, self._desk
        if link is None or desk is None:
            return
        try:
            for event in link.receive():
                self._do(desk.take(event))
                if isinstance(event, memoryview) and self._blocked:
                    break
        except LinkLostError:
            self._forget_link()
            self._do([desk.lost()])
            self._server.begin(self._connect_again())
        except ConsoleError as error:
            self._forget_link()
            self.leave(_GONE, clean(str(error)))
        self.consider()

    def _flush(self) -> None:
        if self._link is not None:
            self._link.flush()
        self.consider()

    @property
    def _blocked(self) -> bool:
        return self._full or self._visitor.choked

    def consider(self) -> None:
        """Look what to wait for, now that something has happened."""
        link, desk = self._link, self._desk
        if link is None or desk is None or self._over.is_set():
            return
        self._type()
        if self._fd >= 0:
            self._watch(reading=not self._blocked, writing=link.wants_room)
        if desk.full is not self._paused and not self._over.is_set():
            self._paused = desk.full
            (self._chan.pause_reading if desk.full else self._chan.resume_reading)()
        self._consider_leaving(desk, link)

    def _consider_leaving(self, desk: Desk, link: Link) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        moment = desk.leaves_at(link.unacknowledged)
        if moment is None or self._over.is_set():
            return
        if self._loop.time() >= moment:
            self._do(desk.leave())
        else:
            self._leaving = self._loop.call_at(moment, self.consider)

    def _watch(self, *, reading: bool, writing: bool) -> None:
        if reading is not self._reading:
            self._reading = reading
            if reading:
                self._loop.add_reader(self._fd, self._receive)
            else:
                self._loop.remove_reader(self._fd)
        if writing is not self._writing:
            self._writing = writing
            if writing:
                self._loop.add_writer(self._fd, self._flush)
            else:
                self._loop.remove_writer(self._fd)

    def _forget_link(self) -> None:
        if self._fd >= 0:
            self._watch(reading=False, writing=False)
            self._fd = -1

    def _hang_up(self) -> None:
        self._over.set()
        self._forget_link()
        if self._leaving is not None:
            self._leaving.cancel()
        # While it connects, who does that closes it.
        if self._link is not None:
            self._link.close()

    # Keys

    def data_received(self, data: bytes, _kind: int | None) -> None:
        if self._command is not None or self._over.is_set():
            return
        if self._early is not None:
            self._early += data
            if len(self._early) >= WINDOW and not self._paused:
                self._paused = True
                self._chan.pause_reading()
            return
        self._take_keys(data)
        self.consider()

    def _take_keys(self, data: bytes) -> None:
        if self._desk is not None:
            effects = self._desk.keys(data)
            self._type()  # the last of them may be to leave
            self._do(effects)

    def _type(self) -> None:
        if self._desk is not None and self._link is not None and self._fd >= 0:
            self._do(self._desk.type(self._link.type))

    def eof_received(self) -> bool:
        self._ended = True
        if self._desk is not None and self._early is None:
            self._do(self._desk.end())
            self.consider()
        return True  # there may be an answer

    def break_received(self, _milliseconds: int) -> bool:
        if self._desk is None or not self._terminal:
            return False
        self._do(self._desk.sysrq())
        return True

    def terminal_size_changed(
        self, columns: int, rows: int, _pixels_across: int, _pixels_down: int
    ) -> None:
        size = _sane(columns, rows)
        if self._terminal and size != self._size:
            self._size = size
            if self._fd >= 0:
                self._tell_size()
                self.consider()

    def _tell_size(self) -> None:
        if self._link is not None and self._place is not None and self._place.role is Role.WRITER:
            self._link.ask(Size(*self._size))

    # What is to be done

    def _do(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Show(data):
                    self._write(bytes(data))
                case Say(text):
                    self._say(text)
                case Leave(status):
                    self._exit(status)
                case Ask() | AskWho():
                    if self._link is not None and self._fd >= 0:
                        self._link.ask(effect)
                    else:
                        self._say("the daemon is gone")
                case ToggleLog():
                    pass

    def _write(self, data: bytes, *, aside: bool = False) -> None:
        with suppress(OSError):
            if aside and not self._terminal:
                self._chan.write_stderr(data)
            else:
                self._chan.write(data)

    def _say(self, text: str) -> None:
        if not self._full:  # who reads nothing could have it say much
            self._write(bracketed(text, raw=self._terminal), aside=True)

    def _exit(self, status: int) -> None:
        if not self._over.is_set():
            self._hang_up()
            with suppress(OSError):
                self._chan.exit(status)

    def leave(self, status: int, why: str) -> None:
        """Say `why`, and end the session."""
        if not self._over.is_set():
            self._say(why)
            self._exit(status)


def _sane(columns: int, rows: int) -> tuple[int, int]:
    """Return a size as the console has it; none if it is none."""
    if 0 < columns <= _LARGEST_SIZE and 0 < rows <= _LARGEST_SIZE:
        return columns, rows
    return 0, 0
