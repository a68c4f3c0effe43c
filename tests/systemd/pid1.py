"""A machine that systemd runs: process 1 of namespaces of its own, over this machine's files."""

from __future__ import annotations

import os
import re
import secrets
import select
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

import vhost_device_console

from launch import WITHIN, until

ROOT = Path(__file__).parents[2]

USER = "vhost-device-console"

_SYSTEMD = "/usr/lib/systemd/systemd"

#: What the units are written for.
_OLDEST = 252

_PATH = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class UnavailableError(Exception):
    """No such machine can be started here; the message says why."""


def _check() -> None:
    """Raise UnavailableError when it is clear beforehand that there can be none."""
    if os.geteuid() != 0:
        raise UnavailableError("only root may run systemd as process 1")
    if not os.path.exists(_SYSTEMD):
        raise UnavailableError(f"there is no {_SYSTEMD}: install systemd")
    said = subprocess.run([_SYSTEMD, "--version"], capture_output=True, text=True, check=True)
    version = said.stdout.split()[1]
    if int(version.partition(".")[0].partition("~")[0]) < _OLDEST:
        raise UnavailableError(f"systemd {_OLDEST} or later is needed, and this is {version}")
    for program in ("unshare", "nsenter", "setpriv", "pivot_root"):
        if not shutil.which(program, path=_PATH):
            raise UnavailableError(f"there is no {program}: install util-linux")


def own_cgroup(controller: str = "") -> Path | None:
    """Return the folder of this process's control group, of version 2 or of a `controller` of 1."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        root, point = mount.split()[3:5]
        kind, _, options = source.split()
        wanted = controller in options.split(",") if controller else kind == "cgroup2"
        if wanted and controller in own:
            return Path(point) / os.path.relpath(own[controller], root)
    return None


class Machine:
    """A running systemd; a context manager that ends all that there is in it.

    Its network is this machine's, its files too, but what it writes is gone with it. `cgroup` is
    the folder of the control group that all of it is in. Raises UnavailableError.
    """

    def __init__(self) -> None:
        _check()
        with ExitStack() as undo:
            self._folder = Path(tempfile.mkdtemp(prefix="vdc", dir="/tmp"))
            undo.callback(shutil.rmtree, self._folder)
            self.cgroup = self._make_cgroup(undo)
            self._start(undo)
            self._undo = undo.pop_all()

    def _make_cgroup(self, undo: ExitStack) -> Path:
        own = own_cgroup()
        if own is None:
            raise UnavailableError("no control groups of version 2 are mounted here")
        made = own / f"vhost-device-console-{self._folder.name}"
        try:
            made.mkdir()
        except OSError as error:
            raise UnavailableError(f"no control group can be made: {error}") from None
        undo.callback(_remove_cgroups, made)
        return made

    def _start(self, undo: ExitStack) -> None:
        scratch = self._folder / "scratch"
        scratch.mkdir()
        python = os.path.realpath(sys.executable)
        prefix = os.path.realpath(sys.base_prefix)
        name = f"vhost-device-console-test-{secrets.token_hex(8)}"
        command = [
            *("sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', self.cgroup),
            # However this process ends, that machine ends with it.
            *("setpriv", "--pdeathsig=KILL"),
            *("unshare", "--kill-child=KILL", "--pid", "--mount", "--uts", "--ipc", "--cgroup"),
            Path(__file__).parent / "boot",
            scratch,
            *(os.path.relpath(python, prefix), prefix),
            sysconfig.get_path("platlib"),
            Path(vhost_device_console.__file__).parent,
            ROOT / "contrib",
            f"@{name}",
        ]
        # Closed after that: systemd would wait for ever for somebody to read what it says next.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(f"\0{name}")
            with open(self._log, "wb") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "PATH": _PATH},
                )
            undo.callback(_end, process)
            self._wait_ready(ready, process.pid)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        self.pid = int(children)
        undo.callback(self.kill)

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _wait_ready(self, ready: socket.socket, pid: int) -> None:
        deadline = time.monotonic() + WITHIN
        pidfd = os.pidfd_open(pid)
        try:
            while True:
                seconds = max(0.0, deadline - time.monotonic())
                found, _, _ = select.select([ready, pidfd], [], [], seconds)
                if ready in found and ready.recv(4096).startswith(b"READY=1"):
                    return
                if not found or pidfd in found:
                    why = self._log.read_text().strip().replace("\n", "; ")
                    raise UnavailableError(f"systemd cannot be started in namespaces here: {why}")
        finally:
            os.close(pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def kill(self) -> None:
        """End process 1 and with it every process of the machine."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, 9)

    # What is in it

    def path(self, inside: str) -> str:
        """Return where this process finds the machine's file, folder or socket `inside`."""
        return f"/proc/{self.pid}/root{inside}"

    def write(self, inside: str, text: str) -> None:
        """Write a file, its folder made when it is missing."""
        file = Path(self.path(inside))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def processes(self, uid: int) -> list[int]:
        """Return the user's processes, by the machine's numbers."""
        found = []
        for folder in Path(self.path("/proc")).glob("[0-9]*"):
            with suppress(FileNotFoundError):
                if folder.stat().st_uid == uid:
                    found.append(int(folder.name))
        return found

    # What is done to it

    def outside(self, pid: int) -> int:
        """Return this machine's number of the process that is `pid` in that one."""
        for group in self.cgroup.rglob("cgroup.procs"):
            for number in group.read_text().split():
                with suppress(FileNotFoundError, ProcessLookupError):
                    status = Path(f"/proc/{number}/status").read_text()
                    if re.search(rf"^NSpid:.*\t{pid}$", status, re.MULTILINE):
                        return int(number)
        raise ProcessLookupError(f"there is no process {pid} in the machine")

    def run(
        self, *command: str, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it as root; fails, with what it said, unless it succeeds."""
        done = subprocess.run(
            [
                *("nsenter", f"--target={self.pid}", "--mount", "--pid", "--uts", "--ipc"),
                *("--cgroup", "--", *command),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * WITHIN,
            env={"PATH": _PATH, "LC_ALL": "C", **environment},
        )
        if check and done.returncode:
            raise AssertionError(f"{command}: status {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        """Run systemctl and return what it prints."""
        return self.run("systemctl", "--no-pager", *arguments, check=check).stdout

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return a unit's properties (systemctl show)."""
        said = self.systemctl("show", unit, *(f"--property={each}" for each in properties))
        return dict(line.split("=", 1) for line in said.splitlines())

    def wait(self, unit: str, **wanted: str) -> None:
        """Wait until a unit's properties have these values."""
        last: dict[str, str] = {}

        def there() -> bool:
            last.update(self.show(unit, *wanted))
            return last == wanted

        try:
            until(there, "")
        except TimeoutError:
            raise TimeoutError(f"{unit}: {last}, not {wanted}: {self.journal(unit)}") from None

    def journal(self, unit: str, since: float = 0.0) -> str:
        """Return what the unit, and systemd about it, logged `since` a time (time.time)."""
        self.run("journalctl", "--sync")
        which = (f"--unit={unit}", f"--since=@{since:.6f}")
        return self.run("journalctl", "--quiet", "--output=cat", *which).stdout


def _end(process: subprocess.Popen[bytes]) -> None:
    # Its child, process 1, is gone or goes with it, and with that every other one.
    process.kill()
    process.wait()


def _remove_cgroups(folder: Path) -> None:
    """Remove a control group and those in it, whose processes are ending."""

    def empty() -> bool:
        return "populated 0" in (folder / "cgroup.events").read_text()

    until(empty, f"processes are left in {folder}")
    for each, _, _ in os.walk(folder, topdown=False):
        os.rmdir(each)
