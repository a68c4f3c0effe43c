"""The doors of a guest: listeners and ptys, claimed all or none and given back at the end.

Every refusal is a ConfigError of one line, found before any worker runs. A listener may also have
been made by somebody else, such as systemd, or by this daemon before it began anew.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import stat
import sys
import tty
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from ipaddress import ip_address

import msgspec

from .admission import Door, group_id, user_id
from .claims import claiming, clear_stale
from .config import SOCKET_MODE, Access, Backend, Guest, Nested, Network, Port, Pty, Unix
from .errors import ConfigError

_log = logging.getLogger(__name__)

#: Connections that the system holds until they are accepted.
BACKLOG = 128

# ioctl_tty(2); os.ptsname is there from Python 3.13 on.
_TIOCGPTN = 0x80045430

#: A listener's path, absolute, or its IP address and port.
_Address = bytes | tuple[str, int]


class Kept(msgspec.Struct, frozen=True):
    """An endpoint as another program can go on with it.

    `path` is the file to be removed at the end, by its device and inode; b"" when it is not ours.
    """

    fd: int
    path: bytes = b""
    device: int = 0
    inode: int = 0

    def is_there(self) -> bool:
        """Tell whether the file at `path` still is this endpoint's."""
        try:
            status = os.lstat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == (self.device, self.inode)

    def release(self) -> None:
        """Close the descriptor and remove the file."""
        # Removed before it is closed: a path without a listener may be another's by then.
        if self.path and self.is_there():
            with suppress(OSError):
                os.unlink(self.path)
        os.close(self.fd)


class KeptEndpoints(msgspec.Struct, frozen=True):
    """One guest's endpoints as another program can go on with them, ports by their id."""

    frontend: Kept
    ports: dict[int, Kept]


class Inherited:
    """Listeners that somebody else made, until an endpoint of the same address takes them.

    `fds` are (name, descriptor) pairs, as systemd gives them; those that are no listening stream
    sockets are left to the caller, in `others`.
    """

    def __init__(self, fds: Iterable[tuple[str, int]] = ()) -> None:
        self.others: list[tuple[str, int]] = []
        self._listeners: list[tuple[str, int]] = []
        for name, fd in fds:
            (self.others if _address(fd) is None else self._listeners).append((name, fd))

    def take(self, address: _Address) -> int | None:
        """Return a listener at `address`, the caller's from now on, or None."""
        for index, (_, fd) in enumerate(self._listeners):
            if _address(fd) == address:
                del self._listeners[index]
                os.set_blocking(fd, False)
                os.set_inheritable(fd, False)
                return fd
        return None

    def drop(self, fd: int) -> None:
        """Close the listener at the same address as `fd`: the same one, come twice."""
        address = _address(fd)
        if address is not None and (again := self.take(address)) is not None:
            os.close(again)

    def close(self) -> None:
        """Close what nobody took, and say so."""
        while self._listeners:
            name, fd = self._listeners.pop()
            address = _address(fd)
            where = (
                os.fsdecode(address) if isinstance(address, bytes) else _tcp_name(*address or ())
            )
            _log.warning("inherited socket %s, at %s, is no guest's: closed", name, where)
            os.close(fd)


def _address(fd: int) -> _Address | None:
    """Return where `fd` listens, None when it does not, or not for streams."""
    try:
        borrowed = socket.socket(fileno=fd)
    except OSError:
        return None
    try:
        listens = borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if not listens or borrowed.type != socket.SOCK_STREAM:
            return None
        name = borrowed.getsockname()
        match borrowed.family:
            case socket.AF_UNIX:
                return name if isinstance(name, bytes) else os.path.abspath(os.fsencode(name))
            case socket.AF_INET | socket.AF_INET6:
                return _tcp_address(*name[:2])
            case _:
                return None
    finally:
        borrowed.detach()


def _unix_address(path: str) -> bytes:
    return os.path.abspath(os.fsencode(path))


def _tcp_address(host: str, port: int) -> tuple[str, int]:
    return str(ip_address(host)), port


class Endpoint:
    """Where people attach to one port: `fd` is a listener, a pty's master side or None (terminal).

    Of a TCP port with TLS `tls_listener` is the listener and `fd` None: what comes in there is not
    for the port. `name` says in words where it is: `127.0.0.1:12345`, `tls://[::]:12345`, a path,
    `terminal`. Whoever comes in is to be shown to `door` first.

    An `inherited` listener of the same address is used and its file left alone. `adopted` is what
    an earlier program kept of this endpoint; when it does not fit any more it is let go once there
    is another. Raises ConfigError when the endpoint cannot be had, and what was adopted stays.
    """

    def __init__(
        self, port: Port, inherited: Inherited | None = None, adopted: Kept | None = None
    ) -> None:
        backend = port.backend
        self.name = "terminal"
        self.tls_listener: int | None = None
        old = adopted
        if adopted is not None and not _fits(backend, adopted):
            adopted = None
        match backend:
            case Network(host=host, port=number, tls=tls):
                self.name = f"tls://{_tcp_name(host, number)}" if tls else _tcp_name(host, number)
            case Unix(path=path):
                self.name = path
        self.door = Door(self.name, port.access)
        self.kept = adopted or _claimed(port, inherited)
        if adopted and isinstance(backend, Unix):
            _give(adopted, port.access)
        self.fd = None if self.kept is None else self.kept.fd
        match backend:
            case Network(tls=tls) if tls is not None:
                self.tls_listener, self.fd = self.fd, None
            case Pty() if self.fd is not None:
                self.name = _slave_name(self.fd)
        if old is not None and old is not self.kept:
            old.release()

    def keep(self) -> Kept | None:
        """Give it up as it is, for another program to adopt: `close` does nothing then."""
        kept, self.kept = self.kept, None
        return kept

    def close(self) -> None:
        """Close what is open and remove what was made; a second time does nothing."""
        if (kept := self.keep()) is not None:
            kept.release()


def _claimed(port: Port, inherited: Inherited | None) -> Kept | None:
    match port.backend:
        case Network(host=host, port=number):
            return _listen_tcp(host, number, inherited)
        case Unix(path=path):
            return _listen_unix(path, port.access, inherited)
        case Pty(link=link):
            return _open_pty(link, port.access)
        case Nested():
            return None


def _fits(backend: Backend, kept: Kept) -> bool:
    """Tell whether `kept` is what `backend` describes, and still where it was."""
    if kept.path and not kept.is_there():
        return False
    match backend:
        case Network(host=host, port=number):
            return _address(kept.fd) == _tcp_address(host, number)
        case Unix(path=path):
            return _address(kept.fd) == _unix_address(path)
        case Pty(link=link):
            return os.isatty(kept.fd) and kept.path == os.fsencode(link or "")
        case Nested():
            return False


class Endpoints:
    """One guest's descriptors, all non-blocking and close-on-exec.

    `frontend` is the vhost-user socket, whose `door` is for those who come, `ports` has each port's
    endpoint by the port's id. `inherited` and `adopted` are as with `Endpoint`; what was adopted
    for ports that the guest does not have is let go. Raises ConfigError when one of them cannot be
    had; then none is left but what was to be adopted, all of it.
    """

    def __init__(
        self,
        guest: Guest,
        inherited: Inherited | None = None,
        adopted: KeptEndpoints | None = None,
    ) -> None:
        self.ports: dict[int, Endpoint] = {}
        self._frontend: Kept | None = None
        old = [adopted.frontend, *adopted.ports.values()] if adopted else []
        fitting = {
            port.id: kept
            for port in guest.ports
            if adopted and (kept := adopted.ports.get(port.id)) and _fits(port.backend, kept)
        }
        try:
            self.door = Door(guest.name, guest.access)
            self._frontend = _frontend(guest, inherited, adopted.frontend if adopted else None)
            self.frontend = self._frontend.fd
            for port in guest.ports:
                self.ports[port.id] = Endpoint(port, inherited, fitting.get(port.id))
        except BaseException:
            for made in self._all():
                if made not in old:
                    made.release()
            raise
        for kept in old:
            if kept not in self._all():
                kept.release()
            elif inherited is not None:
                inherited.drop(kept.fd)

    def _all(self) -> list[Kept]:
        ports = [endpoint.kept for endpoint in self.ports.values()]
        return [kept for kept in (self._frontend, *ports) if kept is not None]

    @property
    def kept(self) -> KeptEndpoints | None:
        """What another program can go on with; None when that was given up."""
        if self._frontend is None:
            return None
        ports = {number: one.kept for number, one in self.ports.items() if one.kept is not None}
        return KeptEndpoints(self._frontend, ports)

    def keep(self) -> KeptEndpoints | None:
        """Give all up as they are, for another program to adopt: `close` does nothing then."""
        kept, self._frontend = self.kept, None
        for endpoint in self.ports.values():
            endpoint.keep()
        return kept

    def close(self) -> None:
        """Close what is open and remove what was made; a second time does nothing."""
        for endpoint in self.ports.values():
            endpoint.close()
        frontend, self._frontend = self._frontend, None
        if frontend is not None:
            frontend.release()

    def listening(self) -> bool:
        """Tell whether one frontend can come after another: not where one is connected already."""
        return _address(self.frontend) is not None


def _frontend(guest: Guest, inherited: Inherited | None, adopted: Kept | None) -> Kept:
    if guest.fd is not None:
        return adopted or Kept(_given(guest.fd))
    if guest.socket_path is None:
        raise ConfigError(f"{guest.name}: no vhost-user socket")
    if adopted is not None and _fits(Unix(guest.socket_path), adopted):
        _give(adopted, guest.access)
        return adopted
    return _listen_unix(guest.socket_path, guest.access, inherited)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def listen_unix(path: str) -> Kept:
    """Return a new listener at `path`, mode 0600, in place of a stale one.

    Raises ConfigError when something else is there or the path cannot be used.
    """
    return _listen_unix(path, Access(), None)


def _listen_unix(path: str, access: Access, inherited: Inherited | None) -> Kept:
    if inherited and (fd := inherited.take(_unix_address(path))) is not None:
        return Kept(fd)
    with ExitStack() as undo:
        try:
            with claiming(os.path.dirname(path) or "."):
                clear_stale(path)
                made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                undo.callback(made.close)
                # From its first moment nobody else may connect: a chmod would come too late.
                before = os.umask(0o777 & ~SOCKET_MODE)
                try:
                    made.bind(path)
                finally:
                    os.umask(before)
                status = os.lstat(path)
                if access != Access() and not _is_own_socket(status):
                    raise ConfigError(f"cannot create socket {path}: {_OUSTED}")
                kept = Kept(made.fileno(), os.fsencode(path), status.st_dev, status.st_ino)
                undo.callback(made.detach)
                undo.callback(kept.release)
                _give(kept, access)
                made.listen(BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot create socket {path}: {_unusable(path, error)}") from error
        undo.pop_all()
        made.detach()
    return kept


_OUSTED = "something else took its place"


def _is_own_socket(status: os.stat_result) -> bool:
    return stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid()


def _give(kept: Kept, access: Access) -> None:
    """Give a socket's file, if it is ours, the mode, owner and group of `access`.

    Whoever may write to the folder can put something else in its place at any moment. So it is
    done through a descriptor (a symbolic link is not followed) of what is seen to be the same.
    Raises ConfigError.
    """
    path = os.fsdecode(kept.path)
    owner = -1 if not access.owner else user_id(access.owner)
    group = -1 if not access.group else group_id(access.group)
    if not path:
        return
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != (kept.device, kept.inode):
            raise ConfigError(f"cannot create socket {path}: {_OUSTED}")
        file = f"/proc/self/fd/{fd}"
        # In this order nobody may connect for a moment who may not later.
        if group not in (-1, status.st_gid):
            _change(path, "group", access.group, lambda: os.chown(file, -1, group))
        if stat.S_IMODE(status.st_mode) != access.mode:
            os.chmod(file, access.mode)
        if owner not in (-1, status.st_uid):
            _change(path, "user", access.owner, lambda: os.chown(file, owner, -1))
    finally:
        os.close(fd)


def _change(path: str, kind: str, name: str, change: Callable[[], None]) -> None:
    try:
        change()
    except PermissionError:
        needed = "CAP_CHOWN" if kind == "user" else "that this daemon's user is in it, or CAP_CHOWN"
        raise ConfigError(
            f"cannot give socket {path} to {kind} {name}: it takes {needed}"
        ) from None


def _unusable(path: str, error: OSError) -> str:
    folder = os.path.dirname(path) or "."
    match error.errno:
        case errno.ENOENT:
            return f"folder {folder} does not exist"
        case errno.ENOTDIR:
            return f"{folder} is not a folder"
        case errno.EACCES | errno.EPERM:
            return f"no permission in folder {folder}"
        case errno.EADDRINUSE:
            return "something else took the path just now"
        case _:
            return _reason(error)


def _tcp_name(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen_tcp(host: str, port: int, inherited: Inherited | None) -> Kept:
    if inherited and (fd := inherited.take(_tcp_address(host, port))) is not None:
        return Kept(fd)
    name = _tcp_name(host, port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((host, port))
            made.listen(BACKLOG)
            return Kept(made.detach())
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"TCP port {name} is in use: choose another") from error
        raise ConfigError(f"cannot use TCP port {name}: {_reason(error)}") from error


def _open_pty(link: str | None, access: Access) -> Kept:
    """Return a raw pty's master side, and the link to its slave, which is `access.owner`'s."""
    try:
        fd, slave = os.openpty()
    except OSError as error:
        raise ConfigError(f"cannot open a pseudo-terminal: {_reason(error)}") from error
    with ExitStack() as undo:
        undo.callback(os.close, fd)
        try:
            # The master side keeps the settings while nobody has the slave open.
            tty.setraw(slave)
            os.fchmod(slave, SOCKET_MODE)  # the system lets group tty write, which here is typing
            if access.owner:
                os.fchown(slave, user_id(access.owner), -1)
            name = os.ttyname(slave)
        finally:
            os.close(slave)
        os.set_blocking(fd, False)
        kept = Kept(fd) if link is None else _linked(fd, link, name)
        undo.pop_all()
    return kept


def _slave_name(fd: int) -> str:
    number = fcntl.ioctl(fd, _TIOCGPTN, bytes(4))
    return f"/dev/pts/{int.from_bytes(number, sys.byteorder)}"


def _linked(fd: int, link: str, target: str) -> Kept:
    try:
        # What an earlier daemon left behind points to a pty that is gone.
        stale = os.path.islink(link) and not os.path.exists(link)
        if stale and os.readlink(link).startswith("/dev/pts/"):
            os.unlink(link)
        os.symlink(target, link)
        status = os.lstat(link)
    except FileExistsError:
        raise ConfigError(f"pty link {link} exists: remove it or choose another name") from None
    except OSError as error:
        raise ConfigError(f"cannot create pty link {link}: {_unusable(link, error)}") from error
    return Kept(fd, os.fsencode(link), status.st_dev, status.st_ino)


def _given(fd: int) -> int:
    """Return the vhost-user socket that was given as a number; raises ConfigError."""
    try:
        status = os.fstat(fd)
    except (OSError, OverflowError):
        raise ConfigError(f"--fd {fd} is not open") from None
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError(f"--fd {fd} is not a socket")
    borrowed = socket.socket(fileno=fd)
    try:
        if (borrowed.family, borrowed.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise ConfigError(f"--fd {fd} is not a unix stream socket")
        if not borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            try:
                borrowed.getpeername()
            except OSError:
                raise ConfigError(f"--fd {fd} is neither listening nor connected") from None
        borrowed.setblocking(False)
    finally:
        borrowed.detach()
    os.set_inheritable(fd, False)
    return fd
