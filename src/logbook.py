"""The log of a process: lines for people, JSON for programs, or entries of systemd's journal.

Writing never waits: what cannot be taken at once is lost, and the next line says how many were.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
from abc import abstractmethod
from datetime import UTC, datetime
from enum import StrEnum

from .errors import ConfigError
from .events import Happening
from .words import clean

_NAME = "vhost-device-console"

#: Where systemd's journal takes entries (systemd's JOURNAL_NATIVE_PROTOCOL).
JOURNAL = "/run/systemd/journal/socket"

_PRIORITIES = {logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}  # syslog(3)

#: What `journalctl MESSAGE_ID=` finds; never to be changed.
MESSAGE_IDS = {
    Happening.FRONTEND_CONNECTED: "377e25781f4548d99452f233364fe285",
    Happening.FRONTEND_DISCONNECTED: "fb61ea748e7a49db9708e6184aee69c2",
    Happening.FRONTEND_DROPPED: "b91bf034c2294a6c804ab16d3db1d66d",
    Happening.WORKER_DIED: "b1bfedd48efb4cf2bfede75b006db3db",
    Happening.BEGINS_ANEW: "11699216e2f34ca6ab5aa2af4e8fb3ce",
}


class Format(StrEnum):
    """How the log is written."""

    TEXT = "text"
    JSON = "json"
    JOURNALD = "journald"


class _Handler(logging.Handler):
    """Writes to `fd` what `render` makes of each line, if that takes it at once."""

    def __init__(self, fd: int, lost_to: str) -> None:
        super().__init__()
        self.fd = fd
        self._lost_to = lost_to
        self._lost = 0
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, after one about those that were lost."""
        pieces = [self.render(record)]
        if self._lost:
            said = f"{self._lost} log lines lost: {self._lost_to}"
            lost = {"msg": said, "levelno": logging.WARNING, "levelname": "WARNING"}
            pieces.insert(0, self.render(logging.makeLogRecord({**lost, "name": __package__})))
        try:
            if not self._poll.poll(0):
                raise BlockingIOError
            self.write(pieces)
            self._lost = 0
        except OSError:
            self._lost += 1

    def write(self, pieces: list[bytes]) -> None:
        """Write all in one, lest another process' lines come in between."""
        os.write(self.fd, b"".join(pieces))

    @abstractmethod
    def render(self, record: logging.LogRecord) -> bytes:
        """Return what is written of a line."""

    def trace(self, record: logging.LogRecord) -> list[str]:
        """Return where the error happened that a line is about, if it is known."""
        return self.format(record).splitlines()[1:] if record.exc_info else []


class _Text(_Handler):
    """Lines for people, without control characters."""

    def __init__(self) -> None:
        super().__init__(2, "stderr was not read")
        # With the terminal raw, a line feed alone does not return to the first column.
        self._end = "\r\n" if os.isatty(2) else "\n"

    def render(self, record: logging.LogRecord) -> bytes:
        lines = [clean(_message(record)), *self.trace(record)]
        text = "".join(f"{_NAME}: {line}{self._end}" for line in lines)
        return text.encode(errors="backslashreplace")


class _Json(_Handler):
    """One object a line, in ASCII."""

    def __init__(self) -> None:
        super().__init__(2, "stderr was not read")

    def render(self, record: logging.LogRecord) -> bytes:
        found = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            **_fields(record),
            "message": _whole(record.getMessage()),
            "process": record.process or os.getpid(),
        }
        if trace := self.trace(record):
            found["exception"] = "\n".join(trace)
        return json.dumps(found).encode() + b"\n"


class _Journal(_Handler):
    """Entries of systemd's journal, a datagram each."""

    def __init__(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.connect(JOURNAL)
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise ConfigError(f"cannot log to the journal at {JOURNAL}: {reason}") from error
            super().__init__(sock.detach(), "the journal did not take them")

    def write(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            os.write(self.fd, piece)

    def render(self, record: logging.LogRecord) -> bytes:
        fields = {
            "MESSAGE": clean(_message(record)),
            "PRIORITY": str(_PRIORITIES.get(record.levelno, 3)),
            "SYSLOG_IDENTIFIER": _NAME,
            **{name.upper(): str(value) for name, value in _fields(record).items()},
        }
        event = getattr(record, "event", None)
        if event is not None:
            fields["MESSAGE_ID"] = MESSAGE_IDS[event]
        if trace := self.trace(record):
            fields["EXCEPTION"] = "\n".join(trace)
        return b"".join(_entry(name.encode(), value) for name, value in fields.items())


def _entry(name: bytes, value: str) -> bytes:
    data = value.encode(errors="backslashreplace")
    if b"\n" in data:
        return name + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
    return name + b"=" + data + b"\n"


def _message(record: logging.LogRecord) -> str:
    """Return a line as people read it: with the guest that it is about."""
    guest = getattr(record, "guest", None)
    return record.getMessage() if guest is None else f"{guest}: {record.getMessage()}"


def _fields(record: logging.LogRecord) -> dict[str, str | int]:
    """Return what a line is about, as far as there is something."""
    found: dict[str, str | int] = {}
    if (guest := getattr(record, "guest", None)) is not None:
        found["guest"] = _whole(guest)
    # All lines about a port begin so.
    if str(record.msg).startswith("port %d: ") and isinstance(record.args, tuple):
        found["port"] = int(str(record.args[0]))
    if (event := getattr(record, "event", None)) is not None:
        found["event"] = str(event)
    return {**found, "logger": record.name.removeprefix(f"{__package__}.")}


def _whole(text: str) -> str:
    """Return text that any program can read, undecodable bytes spelled out."""
    return text.encode(errors="backslashreplace").decode()


_HANDLERS: dict[Format, type[_Text | _Json | _Journal]] = {
    Format.TEXT: _Text,
    Format.JSON: _Json,
    Format.JOURNALD: _Journal,
}


def start(level: str, form: Format = Format.TEXT) -> None:
    """Log everything of `level` and above. Raises ConfigError when there is no such journal."""
    logging.raiseExceptions = False
    logging.basicConfig(level=level.upper(), handlers=[_HANDLERS[form]()], force=True)


def is_structured() -> bool:
    """Tell whether it is programs that read the log."""
    return any(isinstance(each, (_Json, _Journal)) for each in logging.getLogger().handlers)


def fds() -> set[int]:
    """Return the descriptors that the log of a forked process needs."""
    return {each.fd for each in logging.getLogger().handlers if isinstance(each, _Handler)}
