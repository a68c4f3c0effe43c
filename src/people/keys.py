"""Who may reach which consoles over ssh: authorized keys, certificates, and a file that maps them.

Both files are read again when they have changed. One that cannot be read lets nobody in.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated, Any, Generic, TypeVar

import asyncssh
import msgspec

from ..errors import ConfigError
from ..words import clean

#: Options of an authorized_keys line (sshd(8)) that change nothing, since nothing is forwarded, run
#: or set here anyway.
_WITHOUT_EFFECT = frozenset(
    {
        "agent-forwarding",
        "environment",
        "no-agent-forwarding",
        "no-port-forwarding",
        "no-user-rc",
        "no-X11-forwarding",
        "permitlisten",
        "permitopen",
        "port-forwarding",
        "tunnel",
        "user-rc",
        "X11-forwarding",
    }
)

#: Those that asyncssh looks at.
_LOOKED_AT = frozenset({"cert-authority", "command", "from", "no-touch-required", "principals"})

#: Those that are looked at here.
_OURS = frozenset({"expiry-time", "guests", "no-pty", "pty", "restrict", "role"})

_log = logging.getLogger(__name__)


class Role(StrEnum):
    """What somebody may do at a console."""

    WATCH = "watch"
    WRITER = "writer"


class Proof(msgspec.Struct, frozen=True):
    """By what somebody came in: a key, or a certificate's authority and principals."""

    key: asyncssh.SSHKey
    host: str
    address: str
    principals: tuple[str, ...] | None


class Person(msgspec.Struct, frozen=True):
    """Somebody who came in: called `name`, known in the access file by any of `marks`.

    `guests` are patterns that limit where to, None for no such limit.
    """

    name: str
    marks: frozenset[str]
    principals: frozenset[str]
    guests: tuple[str, ...] | None
    role: Role
    proof: Proof


class Rule(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One [[allow]] table: whose `keys` or `principals` reach `guests`, as what."""

    guests: Annotated[list[str], msgspec.Meta(min_length=1)]
    keys: list[str] = []
    principals: list[str] = []
    role: Role = Role.WRITER


class _File(msgspec.Struct, forbid_unknown_fields=True):
    allow: list[Rule] = []


class Line:
    """A line of authorized keys, `text`; raises ValueError, in words, if it cannot be used.

    A line with an option that is not known here is not used: it may be a restriction.
    """

    def __init__(self, text: str) -> None:
        try:
            options: list[tuple[str, str]] = []
            self._key = asyncssh.import_public_key(text)
        except asyncssh.KeyImportError:
            options, rest = _split(text)
            try:
                self._key = asyncssh.import_public_key(rest)
            except asyncssh.KeyImportError:
                raise ValueError("there is no key in it") from None
        given = dict(options)
        if unknown := given.keys() - _WITHOUT_EFFECT - _LOOKED_AT - _OURS:
            raise ValueError(f"the option {min(unknown)} means nothing here")
        ours = [name for name, _ in options if name in _OURS]
        if len(ours) > len({*ours}):
            raise ValueError("an option stands there twice")
        self._options = given
        self._authority = "cert-authority" in given
        self._until = _moment(given["expiry-time"]) if "expiry-time" in given else None
        self._guests = tuple(given["guests"].split(",")) if "guests" in given else None
        try:
            self._role = Role(given.get("role", Role.WRITER))
        except ValueError:
            raise ValueError(f"{given['role']!r} is no role: say writer or watch") from None
        self._fingerprint = self._key.get_fingerprint()
        self._comment = self._key.get_comment() or ""
        self._checked = asyncssh.import_authorized_keys(text)

    def admit(self, proof: Proof, now: datetime, *, accounts: bool) -> Mapping[str, object] | None:
        """Return what asyncssh is to know of who comes with `proof`, None if this is not theirs.

        With `accounts` an authority without `principals` is for those guests that a certificate
        names as its principals, as sshd takes them for accounts.
        """
        if proof.key != self._key or self._authority is not (proof.principals is not None):
            return None
        if self._until is not None and now >= self._until:
            return None
        if self._authority and not proof.principals:  # it would be good for everybody
            return None
        try:
            found = self._checked.validate(
                proof.key, proof.host, proof.address, proof.principals, ca=self._authority
            )
        except ValueError:  # `from`, and there is no address
            return None
        if found is None:
            return None
        told: dict[str, object] = {"person": self._person(proof, accounts)}
        if self._authority:
            told["principals"] = True  # no more is to be asked of them
        if "no-pty" in self._options or {"restrict", "pty"} & {*self._options} == {"restrict"}:
            told["no-pty"] = True
        for name in ("command", "no-touch-required"):
            if name in found:
                told[name] = found[name]
        return told

    def _person(self, proof: Proof, accounts: bool) -> Person:
        principals = proof.principals or ()
        name = ", ".join(principals) or self._comment or self._fingerprint
        marks = frozenset() if self._authority else {self._fingerprint, self._comment} - {""}
        guests = self._guests
        if self._authority and accounts and "principals" not in self._options:
            named = [each for each in principals if guests is None or _matches(guests, [each])]
            guests = tuple(map(glob.escape, named))
        return Person(
            clean(name), frozenset(marks), frozenset(principals), guests, self._role, proof
        )


def _split(text: str) -> tuple[list[tuple[str, str]], str]:
    """Return the options that `text` begins with, and what comes after them."""
    options = [""]
    quoted = escaped = False
    characters = iter(text)
    for character in characters:
        if escaped or (quoted and character not in '\\"'):
            options[-1] += character
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif character in " \t":
            break
        elif character == ",":
            options.append("")
        else:
            options[-1] += character
    if quoted or escaped:
        raise ValueError("a quote in it does not end")
    pairs = [option.partition("=") for option in options]
    return [(name, value) for name, _, value in pairs], "".join(characters).strip()


def _moment(text: str) -> datetime:
    """Return when `expiry-time` is (sshd(8)): YYYYMMDD[HHMM[SS]], local time, or with Z UTC."""
    digits, utc = text.removesuffix("Z"), text.endswith("Z")
    form = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}.get(len(digits))
    try:
        if form is None or not digits.isdecimal():
            raise ValueError
        moment = datetime.strptime(digits, form)
    except ValueError:
        raise ValueError(f"{text!r} is no time: say YYYYMMDD or YYYYMMDDHHMM") from None
    return moment.replace(tzinfo=UTC) if utc else moment.astimezone()


def parse_keys(data: bytes, source: str) -> list[Line]:
    """Return the lines of an authorized_keys file; what cannot be used is logged."""
    lines = []
    for number, text in enumerate(data.decode(errors="replace").splitlines(), 1):
        if not (text := text.strip()) or text.startswith("#"):
            continue
        try:
            lines.append(Line(text))
        except ValueError as error:
            _log.warning("%s: line %d is not used: %s", source, number, error)
    return lines


def parse_access(data: bytes, source: str) -> list[Rule]:
    """Return the rules of an access file; raises ConfigError."""
    try:
        return msgspec.toml.decode(data, type=_File).allow
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{source}: {error}") from None


_T = TypeVar("_T")


class _Kept(Generic[_T]):
    """What a file says, read again when it is another; nothing while it cannot be read."""

    def __init__(self, path: str, parse: Callable[[bytes, str], list[_T]]) -> None:
        self._path = path
        self._parse = parse
        self._version: object = None
        self._value: list[_T] = []
        self._value = self._read()
        self._version = self._look()

    def _look(self) -> object:
        try:
            status = os.stat(self._path)
        except OSError as error:
            return error.errno
        return status.st_mtime_ns, status.st_ino, status.st_size

    def _read(self) -> list[_T]:
        try:
            with open(self._path, "rb") as file:
                return self._parse(file.read(), self._path)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ConfigError(f"cannot read {self._path}: {reason}") from error

    def get(self) -> list[_T]:
        """Return what it says by now."""
        version = self._look()
        if version != self._version:
            self._version = version
            try:
                self._value = self._read()
                _log.info("%s was read again", self._path)
            except ConfigError as error:
                self._value = []
                _log.error("nobody is let in: %s", error)
        return self._value


class Keys(asyncssh.SSHAuthorizedKeys):
    """Who is let in by the file `keys`, and to what by `access`; without that, to every guest.

    Raises ConfigError when one of them cannot be used.
    """

    def __init__(self, keys: str, access: str | None) -> None:
        super().__init__()
        self._lines = _Kept(keys, parse_keys)
        self._rules = None if access is None else _Kept(access, parse_access)

    def validate(
        self,
        key: asyncssh.SSHKey,
        client_host: str,
        client_addr: str,
        cert_principals: Sequence[str] | None = None,
        ca: bool = False,
    ) -> Mapping[str, object] | None:
        """See asyncssh, which asks this; the Person is the option `person`."""
        principals = tuple(cert_principals or ()) if ca else None
        return self._admit(Proof(key, client_host, client_addr, principals))

    def _admit(self, proof: Proof) -> Mapping[str, Any] | None:
        now = datetime.now(UTC)
        for line in self._lines.get():
            if (told := line.admit(proof, now, accounts=self._rules is None)) is not None:
                return told
        return None

    def again(self, person: Person) -> bool:
        """Tell whether `person` would be let in now just as they were."""
        told = self._admit(person.proof)
        return told is not None and told["person"] == person

    def role(self, person: Person, places: Iterable[str]) -> Role | None:
        """Return what `person` may do at a console called any of `places`, None for nothing."""
        places = list(places)
        if person.guests is not None and not _matches(person.guests, places):
            return None
        if self._rules is None:
            return person.role
        roles = {
            rule.role
            for rule in self._rules.get()
            if (person.marks.intersection(rule.keys) or person.principals & {*rule.principals})
            and _matches(rule.guests, places)
        }
        if not roles:
            return None
        return person.role if Role.WRITER in roles else Role.WATCH


def _matches(patterns: Iterable[str], places: Iterable[str]) -> bool:
    return any(fnmatchcase(place, pattern) for place in places for pattern in patterns)
