"""The doors of a guest: listeners and ptys, claimed all or none and given back at the end.

Every refusal is a ConfigError of one line, found before any worker runs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from .config import Guest, Nested, Network, Port, Pty, Unix
from .errors import ConfigError

#: Seconds to wait for another daemon that claims a path in the same folder.
_CLAIM_WITHIN = 1.0


class Endpoint:
    """Where people attach to one port: `fd` is a listener, a pty's master side or None (terminal).

    `name` says the same in words: `127.0.0.1:12345`, a path, `terminal`. Raises ConfigError when it
    cannot be had.
    """

    def __init__(self, port: Port) -> None:
        self.fd: int | None = None
        self.name = "terminal"
        with ExitStack() as undo:
            match port.backend:
                case Network(host=host, port=number):
                    self.fd, self.name = _listen_tcp(undo, host, number)
                case Unix(path=path):
                    self.fd, self.name = listen_unix(undo, path), path
                case Pty(link=link):
                    self.fd, self.name = _open_pty(undo, link)
                case Nested():
                    pass
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Close what is open and remove what was made; a second time does nothing."""
        self._undo.close()


class Endpoints:
    """One guest's descriptors, all non-blocking and close-on-exec.

    `frontend` is the vhost-user socket, `ports` has each port's endpoint by the port's id.
    Raises ConfigError when one of them cannot be had; then none is left.
    """

    def __init__(self, guest: Guest) -> None:
        self.ports: dict[int, Endpoint] = {}
        with ExitStack() as undo:
            if guest.socket_path is not None:
                self.frontend = listen_unix(undo, guest.socket_path)
            elif guest.fd is not None:
                self.frontend = _inherited(undo, guest.fd)
            else:
                raise ConfigError(f"{guest.name}: no vhost-user socket")
            undo.callback(self._close_ports)
            for port in guest.ports:
                self.ports[port.id] = Endpoint(port)
            self._undo = undo.pop_all()

    def _close_ports(self) -> None:
        for endpoint in self.ports.values():
            endpoint.close()

    def close(self) -> None:
        """Close what is open and remove what was made; a second time does nothing."""
        self._undo.close()

    def resumable(self) -> bool:
        """Tell whether a new worker can start over: not on a connection that is under way."""
        return _is_listening(self.frontend)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def listen_unix(undo: ExitStack, path: str) -> int:
    """Return a new listener at `path`, mode 0600, in place of a stale one; `undo` removes it.

    Raises ConfigError when something else is there or the path cannot be used.
    """
    try:
        with _claiming(os.path.dirname(path) or "."):
            _clear_stale(path)
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            undo.callback(made.close)
            # From its first moment nobody else may connect: a chmod would come too late.
            before = os.umask(0o177)
            try:
                made.bind(path)
            finally:
                os.umask(before)
            # Removed before it is closed: a path without a listener may be another's by then.
            undo.callback(_remove_own, path, _identity(path))
            made.listen()
    except OSError as error:
        raise ConfigError(f"cannot create socket {path}: {_unusable(path, error)}") from error
    return made.fileno()


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


@contextmanager
def _claiming(folder: str) -> Iterator[None]:
    """Keep other daemons from claiming a path in `folder` meanwhile.

    Between bind and listen a live socket looks stale. The lock leaves no file behind; who cannot
    have it (a stranger may hold it in /tmp) goes on without.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        yield
        return
    try:
        deadline = time.monotonic() + _CLAIM_WITHIN
        while time.monotonic() < deadline:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)


_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISREG, "a file"),
)


def _clear_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise ConfigError(f"{path} is {kind}, not a socket: remove it or choose another path")
    try:
        if not _is_stale(path):
            raise ConfigError(
                f"{path} is in use by another process: stop it or choose another path"
            )
    except PermissionError:
        raise ConfigError(f"{path} is a socket of another user: choose another path") from None
    with suppress(FileNotFoundError):
        os.unlink(path)


def _is_stale(path: str) -> bool:
    """Tell whether nobody listens at the socket `path`; raises PermissionError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        except PermissionError:
            raise
        except OSError:
            return False  # a full backlog or another socket type: somebody is there
        return False


def remove_if_stale(path: str) -> bool:
    """Remove the socket `path` when nobody listens; tell whether nobody does."""
    with suppress(OSError):
        if _is_stale(path):
            with _claiming(os.path.dirname(path) or "."):
                if _is_stale(path):
                    os.unlink(path)
                    return True
    return not os.path.lexists(path)


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _remove_own(path: str, identity: tuple[int, int]) -> None:
    with suppress(OSError):
        if _identity(path) == identity:
            os.unlink(path)


def _listen_tcp(undo: ExitStack, host: str, port: int) -> tuple[int, str]:
    family, name = socket.AF_INET, f"{host}:{port}"
    if ":" in host:
        family, name = socket.AF_INET6, f"[{host}]:{port}"
    try:
        made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        undo.callback(made.close)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"TCP port {name} is in use: choose another") from error
        raise ConfigError(f"cannot use TCP port {name}: {_reason(error)}") from error
    return made.fileno(), name


def _open_pty(undo: ExitStack, link: str | None) -> tuple[int, str]:
    """Return a raw pty's master side and its slave's name."""
    try:
        fd, slave = os.openpty()
    except OSError as error:
        raise ConfigError(f"cannot open a pseudo-terminal: {_reason(error)}") from error
    undo.callback(os.close, fd)
    try:
        # The master side keeps the settings while nobody has the slave open.
        tty.setraw(slave)
        name = os.ttyname(slave)
    finally:
        os.close(slave)
    os.set_blocking(fd, False)
    if link is not None:
        _make_link(undo, link, name)
    return fd, name


def _make_link(undo: ExitStack, link: str, target: str) -> None:
    try:
        # What an earlier daemon left behind points to a pty that is gone.
        stale = os.path.islink(link) and not os.path.exists(link)
        if stale and os.readlink(link).startswith("/dev/pts/"):
            os.unlink(link)
        os.symlink(target, link)
        undo.callback(_remove_own, link, _identity(link))
    except FileExistsError:
        raise ConfigError(f"pty link {link} exists: remove it or choose another name") from None
    except OSError as error:
        raise ConfigError(f"cannot create pty link {link}: {_unusable(link, error)}") from error


def _is_listening(fd: int) -> bool:
    borrowed = socket.socket(fileno=fd)
    try:
        return bool(borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    finally:
        borrowed.detach()


def _inherited(undo: ExitStack, fd: int) -> int:
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
    undo.callback(os.close, fd)
    return fd
