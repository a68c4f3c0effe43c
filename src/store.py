"""Descriptors and states that systemd keeps for the daemon's next start (its fd store).

systemd keeps an open file once, under the first name that it was stored with, so whoever stores
must know which descriptors are of the same open file: kcmp(2) tells.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import stat
from collections.abc import Iterable

import msgspec

from . import systemd

_log = logging.getLogger(__name__)

_KCMP_FILE = 0
_SYS_KCMP = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "loongarch64": 272}
_kcmp = _SYS_KCMP.get(os.uname().machine)
_syscall = ctypes.CDLL(None).syscall

#: What our names begin with: a socket unit's listeners have others.
_OURS = "vdc-"

_STATE = _OURS + "state-"
_FILE = _OURS + "file-"


def in_force() -> bool:
    """Say whether systemd keeps anything for this process ($FDSTORE, systemd.exec(5))."""
    return os.environ.get("FDSTORE", "0") not in ("", "0")


def _same(one: int, other: int) -> bool:
    """Say whether two descriptors are of the same open file."""
    if _kcmp is None:
        return False
    pid = os.getpid()
    same: int = _syscall(_kcmp, pid, pid, _KCMP_FILE, one, other)
    return same == 0


class Saved(msgspec.Struct, array_like=True):
    """A store as another program goes on with it: all by their names, the parts' by the parts'."""

    files: dict[str, int]
    states: dict[str, int]
    names: dict[str, dict[int, str]]
    last: int


class Record(msgspec.Struct, array_like=True):
    """One part of the state, and under what names its descriptors, by their numbers, are kept."""

    names: dict[int, str]
    state: msgspec.Raw


_record = msgspec.msgpack.Decoder(Record)


class Store:
    """What is kept: `put` each part of the state, with its descriptors, whenever it changes.

    It has a copy of each descriptor, by which it knows that the number is another's by now.
    """

    def __init__(self, saved: Saved | None = None) -> None:
        self._saved = saved or Saved({}, {}, {}, 0)
        self._names = self._saved.names
        self._files = self._saved.files
        self._states = self._saved.states

    def save(self) -> Saved:
        """Return what another program in this process begins with."""
        return self._saved

    def fds(self) -> set[int]:
        """Return the descriptors in `save`."""
        return {*self._files.values(), *self._states.values()}

    def put(self, part: str, state: msgspec.Struct, fds: Iterable[int]) -> None:
        """Have `state` be what is kept of a part, and its descriptors `fds` along with it."""
        before = self._names.get(part, {})
        names = {fd: self._name(fd, before.get(fd)) for fd in fds}
        self._names[part] = names
        raw = msgspec.Raw(msgspec.msgpack.encode(state))
        self._write(part, msgspec.msgpack.encode(Record(names, raw)))
        self._sweep({*before.values()} - {*names.values()})

    def drop(self, part: str) -> None:
        """Keep nothing of a part."""
        names = self._names.pop(part, {})
        fd = self._states.pop(part, None)
        if fd is not None:
            os.close(fd)
            systemd.remove(_STATE + part)
        self._sweep({*names.values()})

    def _name(self, fd: int, before: str | None) -> str:
        """Return the name under which a descriptor's open file is kept, from now on if not yet."""
        if before is not None and _same(fd, self._files[before]):
            return before
        for name, own in self._files.items():
            if _same(fd, own):
                return name
        self._saved.last += 1
        name = f"{_FILE}{self._saved.last}"
        self._files[name] = os.dup(fd)
        self._tell(name, fd)
        return name

    @staticmethod
    def _tell(name: str, fd: int) -> None:
        if not systemd.store(name, [fd]):
            _log.warning("systemd was not told to keep a descriptor: a restart will be noticed")

    def _sweep(self, names: set[str]) -> None:
        """Let go of files that no part has any more."""
        used = {name for each in self._names.values() for name in each.values()} if names else ()
        for name in names:
            if name not in used:
                os.close(self._files.pop(name))
                systemd.remove(name)

    def _write(self, part: str, data: bytes) -> None:
        """Write a state into the one of its file's two halves that does not count; then it does."""
        fd = self._states.get(part)
        if fd is None:
            fd = self._states[part] = os.memfd_create("state", os.MFD_CLOEXEC)
            os.pwrite(fd, bytes(8), 0)
            self._tell(_STATE + part, fd)
        half = 1 - (int.from_bytes(os.pread(fd, 8, 0), "little") & 1)
        os.pwrite(fd, len(data).to_bytes(8, "little") + data, _HALF * (1 + half))
        os.pwrite(fd, half.to_bytes(8, "little"), 0)

    def close(self) -> None:
        """Give back the copies; what systemd has it keeps."""
        for fd in self.fds():
            os.close(fd)


#: A state's largest size, with its length before it.
_HALF = 1 << 26


def is_ours(name: str) -> bool:
    """Say whether a descriptor of that name is a store's."""
    return name.startswith(_OURS)


def forget(fds: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Have nothing of a store be kept any more; return what is of use all the same.

    That is what is no store's, and listeners: nobody could make them anew while they are open.
    """
    left = []
    for name, fd in fds:
        if is_ours(name):
            systemd.remove(name)
        if not is_ours(name) or _listens(fd):
            left.append((name, fd))
        else:
            os.close(fd)
    return left


def _listens(fd: int) -> bool:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    borrowed = socket.socket(fileno=fd)
    try:
        return bool(borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    finally:
        borrowed.detach()


class Found:
    """What the store of an earlier process had, with the names of its descriptors now.

    `states` are the parts' as they were last put, `numbers` the numbers that the descriptors had,
    by those that they have. Raises ValueError when that is not whole.
    """

    def __init__(self, fds: Iterable[tuple[str, int]]) -> None:
        self._files: dict[str, int] = {}
        self._parts: dict[str, int] = {}
        records: dict[str, Record] = {}
        for name, fd in fds:
            if name.startswith(_FILE):
                self._files[name] = fd
            elif name.startswith(_STATE) and (record := _read(fd)) is not None:
                part = name.removeprefix(_STATE)
                self._parts[part], records[part] = fd, record
        self.states = {part: bytes(record.state) for part, record in records.items()}
        self._names = {part: record.names for part, record in records.items()}
        try:
            self.numbers = [
                (self._files[name], number)
                for names in self._names.values()
                for number, name in names.items()
            ]
        except KeyError as error:
            raise ValueError(f"systemd did not keep {error.args[0]}") from None

    def saved(self) -> Saved:
        """Return what a `Store` goes on with."""
        last = max((int(name.removeprefix(_FILE)) for name in self._files), default=0)
        return Saved(self._files, self._parts, self._names, last)


def _read(fd: int) -> Record | None:
    half = int.from_bytes(os.pread(fd, 8, 0), "little") & 1
    at = _HALF * (1 + half)
    size = int.from_bytes(os.pread(fd, 8, at), "little")
    return _record.decode(os.pread(fd, size, at + 8)) if size else None
