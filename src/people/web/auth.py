"""Who may look at the page: tokens, passwords, sessions, how often one may try, and from where."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import secrets
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from ...errors import ConfigError

#: Characters that a token of somebody's own has at least.
SHORTEST_TOKEN = 16

#: Seconds for which a session lasts, and how many there are at most.
SESSION_S = 12 * 3600.0
MOST_SESSIONS = 256

#: Wrong tokens that an address may send in a row, and seconds until it may send one more.
TRIES, AGAIN_S = 5, 10.0

#: Addresses of which wrong tokens are remembered.
_MOST_ADDRESSES = 1024


def new_token() -> str:
    """Return a token that nobody guesses."""
    return secrets.token_urlsafe(32)


def read_token(path: str) -> str:
    """Return the token in the file `path`; raises ConfigError when it is none to rely on."""
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read(4096).strip()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"--token-file {path}: {reason}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--token-file {path} is not text") from None
    if stat.S_ISREG(mode) and mode & 0o077:
        raise ConfigError(f"--token-file {path} can be read by others: chmod 600 {path}")
    if len(token) < SHORTEST_TOKEN:
        raise ConfigError(
            f"--token-file {path}: a token has {SHORTEST_TOKEN} characters or more, not"
            f" {len(token)}"
        )
    return token


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


class Lock(Protocol):
    """What keeps strangers out: `kind` is what opens it."""

    kind: str

    def opens(self, said: Mapping[str, str]) -> str | None:
        """Return who comes with that, empty for nobody in particular; None if it does not open.

        May take seconds.
        """


class Token:
    """A lock that one secret opens, of which only the digest is kept."""

    kind = "token"

    def __init__(self, token: str) -> None:
        self._token = _digest(token)

    def opens(self, said: Mapping[str, str]) -> str | None:
        """See `Lock`."""
        given = said.get("token", "").strip()
        return "" if hmac.compare_digest(_digest(given), self._token) else None


class Passwords:
    """A lock for users with passwords, as the PAM `service` takes them; all, or those `allowed`.

    Raises ConfigError when there is no PAM.
    """

    kind = "password"

    def __init__(self, service: str, allowed: Iterable[str] = ()) -> None:
        try:
            import pamela
        except (ImportError, OSError) as error:
            raise ConfigError(
                f"--pam: {error}: pip install 'vhost-device-console[web]', on a system with libpam"
            ) from None
        self._pam = pamela
        self._service = service
        self._allowed = frozenset(allowed)

    def opens(self, said: Mapping[str, str]) -> str | None:
        """See `Lock`."""
        user, password = said.get("user", ""), said.get("password", "")
        # An account without a password is not for everybody in the network.
        if not user or not password or "\0" in user + password:
            return None
        try:
            self._pam.authenticate(user, password, service=self._service)
        except self._pam.PAMError:
            return None
        return user if not self._allowed or user in self._allowed else None


class Limiter:
    """How often an address may be wrong: `TRIES` times, and then once in `AGAIN_S` seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._debts: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tries, when

    def _debt(self, address: str) -> float:
        tries, when = self._debts.get(address, (0.0, 0.0))
        return max(0.0, tries - (self._clock() - when) / AGAIN_S)

    def wait(self, address: str) -> float:
        """Return the seconds until `address` may try again, 0 when it may now."""
        return max(0.0, self._debt(address) - (TRIES - 1)) * AGAIN_S

    def wrong(self, address: str) -> None:
        """Count a wrong try."""
        self._debts[address] = (self._debt(address) + 1, self._clock())
        self._debts.move_to_end(address)
        while len(self._debts) > _MOST_ADDRESSES:
            self._debts.popitem(last=False)

    def right(self, address: str) -> None:
        """Take back that a try was wrong."""
        self._debts[address] = (self._debt(address) - 1, self._clock())


class Session:
    """Somebody called `name` who has logged in; `ends` are called when that is over."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.ends: set[Callable[[], object]] = set()

    def end(self) -> None:
        """Have all that goes on in it end."""
        for end in list(self.ends):
            end()


class Door:
    """Lets those in who open `lock`; without one, everybody who reaches it.

    What is kept of sessions is their digests. `clock` counts the seconds of who was wrong.
    """

    def __init__(self, lock: Lock | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = lock
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()
        self._open = Session()
        self._limiter = Limiter(clock)

    @property
    def locked(self) -> str | None:
        """What one has to log in with, None for nothing."""
        return None if self._lock is None else self._lock.kind

    def wait(self, address: str) -> float:
        """Return the seconds until somebody at `address` may try, 0 when they may now."""
        return self._limiter.wait(address)

    async def enter(self, said: Mapping[str, str], address: str) -> str | None:
        """Return a new session's name if that opens the lock, None if it does not."""
        if self._lock is None:
            return None
        self._limiter.wrong(address)  # as many others may be at it by the time that is known
        who = await asyncio.to_thread(self._lock.opens, said)
        if who is None:
            return None
        self._limiter.right(address)
        name = secrets.token_urlsafe(32)
        self._sessions[_digest(name)] = session = Session(who)
        timer = asyncio.get_running_loop().call_later(SESSION_S, self._end, _digest(name))
        session.ends.add(timer.cancel)
        while len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)[1].end()
        return name

    def session(self, name: str | None) -> Session | None:
        """Return the session called so, if it lasts."""
        return self._open if self._lock is None else self._sessions.get(_digest(name or ""))

    def leave(self, name: str) -> None:
        """End a session, if there is one called so."""
        self._end(_digest(name))

    def _end(self, digest: bytes) -> None:
        if found := self._sessions.pop(digest, None):
            found.end()


def same_origin(origin: str | None, host: str | None, secure: bool, more: Iterable[str]) -> bool:
    """Say whether a page of `origin` is ours: that of the server's `host`, or one of `more`."""
    ours = f"{'https' if secure else 'http'}://{host}" if host else None
    return origin is not None and (origin == ours or origin in more)
