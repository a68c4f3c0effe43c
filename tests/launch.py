"""Real daemons for tests: started through the command line, always ended, checked for leftovers.

`Daemon` returns once the daemon says it is ready (sd_notify), so no test probes its sockets. Every
wait here has a deadline and ends with what was seen so far.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from vhost_device_console.errors import ConsoleError

#: Seconds any single wait may take; generous, since two cores may be shared by many.
WITHIN = 30.0

COMMAND = (sys.executable, "-m", "vhost_device_console")


def need(there: object, what: str, how: str = "contrib/guest/fetch --all says why") -> None:
    """Skip a test of something that is not there; where all has to be, fail it."""
    if not there:
        why = f"no {what} here: {how}"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)


def wait_readable(fd: int, deadline: float, what: str) -> None:
    """Return once `fd` is readable or at its end; fail with `what` after `deadline`."""
    if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        raise TimeoutError(what)


def until(
    condition: Callable[[], Any], what: str | Callable[[], str], within: float = WITHIN
) -> Any:
    """Ask `condition` until it gives something true, and return that; `what` says what is not."""
    deadline = time.monotonic() + within
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(what if isinstance(what, str) else what())
    return result


def wait_ended(pid: int, within: float = WITHIN) -> None:
    """Return once process `pid` has ended, be it anybody's child and reaped or not."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        wait_readable(pidfd, time.monotonic() + within, f"process {pid} did not end")
    finally:
        os.close(pidfd)


def held() -> set[tuple[str, str]]:
    """Return what this process has open, and its children."""
    found = {("process", str(child.pid)) for child in psutil.Process().children()}
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
    return found


def receive_until(peer: socket.socket, end: bytes, within: float = WITHIN) -> bytes:
    """Return everything that `peer` sends up to and including `end`."""
    deadline = time.monotonic() + within
    data = b""
    while not data.endswith(end):
        wait_readable(peer.fileno(), deadline, f"no {end!r} after {data[-200:]!r}")
        more = peer.recv(1 << 16)
        if not more:
            raise EOFError(f"no {end!r} in {data[-200:]!r}")
        data += more
    return data


class Ports:
    """Free TCP ports on the loopback, in a row, that no other test of this machine is given."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def __call__(self, count: int = 1) -> int:
        """Return the first of `count` ports; they stay reserved until `close`."""
        for _ in range(1000):
            # Below the range that outgoing connections are given theirs from.
            first = random.randrange(10000, 32000 - count)
            held: list[socket.socket] = []
            try:
                for port in range(first, first + count):
                    # The kernel drops an abstract name with its process: a reservation.
                    name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    held.append(name)
                    name.bind(f"\0vhost-device-console-test-{port}")
                    with socket.socket() as probe:
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        probe.bind(("127.0.0.1", port))
            except OSError:
                for name in held:
                    name.close()
                continue
            self._held += held
            return first
        raise RuntimeError("no free ports")

    def close(self) -> None:
        """Give the ports back."""
        for name in self._held:
            name.close()


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Return an environment in which commands see only daemons of `folder`."""
    run = folder / "run"
    run.mkdir(mode=0o700, exist_ok=True)
    return {**os.environ, "RUNTIME_DIRECTORY": str(run), **more}


def command(folder: Path, *arguments: str, **popen: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end and return its status, stdout and stderr."""
    return run([*COMMAND, *arguments], folder, **popen)


def run(words: Sequence[str], folder: Path, **popen: Any) -> subprocess.CompletedProcess[str]:
    """Do the same for another program's words."""
    options = {"stdin": subprocess.DEVNULL, "env": environment(folder), "timeout": WITHIN, **popen}
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


class Served(ABC):
    """A daemon whose status can be asked for."""

    @abstractmethod
    def status(self) -> list[dict[str, Any]]:
        """Return its guests as `status --json` prints them; may raise ConsoleError for now."""

    def until(
        self, condition: Callable[[list[dict[str, Any]]], Any], what: str, within: float = WITHIN
    ) -> list[dict[str, Any]]:
        """Ask for its status until there is one and `condition` holds, and return that status."""
        last: list[dict[str, Any]] = []

        def ask() -> Any:
            nonlocal last
            with suppress(ConsoleError):  # it is starting or ending
                last = self.status()
                return condition(last)
            return False

        until(ask, lambda: f"{what}: {last}", within)
        return last

    def workers(self) -> list[int]:
        """Return every guest's worker's process id, once they all run."""
        guests = self.until(
            lambda guests: all(guest["state"] == "running" for guest in guests), "not all run"
        )
        return [guest["worker"] for guest in guests]


class Daemon(Served):
    """A running daemon; a context manager that ends it and checks that nothing is left.

    Its sockets are `folder`/c.sock0 and so on (`sockets`); `data` are the unix backend's,
    `tcp` is the network backend's first port. `options` go to the command line after the usual
    ones, `program` replaces `python -m vhost_device_console`. With `socket_path=None` there is no
    --socket-path (for --fd and --config), with `backend=None` no --backend. stdin, stdout and
    stderr may be given as descriptors; stdout and stderr are pipes otherwise, read by `expect_out`
    and `expect_log`.
    """

    def __init__(
        self,
        folder: Path,
        backend: str | None = "network",
        count: int = 1,
        *options: str,
        tcp: int | None = None,
        socket_path: str | None = "c.sock",
        program: Sequence[str] = COMMAND,
        env: dict[str, str] | None = None,
        **popen: Any,
    ) -> None:
        self.folder = folder
        self.tcp = tcp
        arguments = [] if backend is None else ["-b", backend]
        self.sockets: list[str] = []
        if socket_path is not None:
            path = str(folder / socket_path)
            arguments += ["-s", path, "-c", str(count)]
            self.sockets = [f"{path}{index}" for index in range(count)]
        self.data = [f"{path}.data" for path in self.sockets] if backend == "unix" else []
        if tcp is not None:
            arguments += ["-p", str(tcp)]
        self.status_code: int | None = None
        self._env = environment(folder, **(env or {}))
        self._seen = {"stdout": b"", "stderr": b""}
        notices = folder / f"n{random.randrange(1 << 32):x}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(str(notices))
            notices.chmod(0o666)  # as systemd's is: the daemon may become another user
            self.process = subprocess.Popen(
                [*program, *arguments, *options],
                env={**self._env, "NOTIFY_SOCKET": str(notices)},
                **{
                    "stdin": subprocess.DEVNULL,
                    "stdout": subprocess.PIPE,
                    "stderr": subprocess.PIPE,
                    **popen,
                },
            )
            try:
                self._wait_ready(listener)
            except BaseException:
                self.process.kill()
                self.process.wait()
                self._close_pipes()
                raise
            finally:
                notices.unlink()
        self.pid = self.process.pid
        self.monitor = str(folder / "run" / f"{self.pid}.sock")

    def _wait_ready(self, listener: socket.socket) -> None:
        pidfd = os.pidfd_open(self.process.pid)
        try:
            ready, _, _ = select.select([listener.fileno(), pidfd], [], [], WITHIN)
        finally:
            os.close(pidfd)
        if listener.fileno() not in ready or not listener.recv(4096).startswith(b"READY=1\n"):
            self.process.kill()
            _, log = self.process.communicate()
            raise RuntimeError(f"the daemon did not start: {log!r}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What it says

    def _expect(self, name: str, pattern: str, within: float) -> re.Match[str]:
        pipe = getattr(self.process, name)
        deadline = time.monotonic() + within
        while True:
            seen = self._seen[name].decode(errors="backslashreplace")
            if match := re.search(pattern, seen, re.MULTILINE):
                return match
            what = f"{pattern!r} not in {name}: {seen!r}"
            wait_readable(pipe.fileno(), deadline, what)
            data = os.read(pipe.fileno(), 1 << 16)
            if not data:
                raise EOFError(what)
            self._seen[name] += data

    def expect_log(self, pattern: str, within: float = WITHIN) -> re.Match[str]:
        """Wait until stderr, from its start, has `pattern` (a regular expression)."""
        return self._expect("stderr", pattern, within)

    def expect_out(self, pattern: str, within: float = WITHIN) -> re.Match[str]:
        """Wait until stdout, from its start, has `pattern` (a regular expression)."""
        return self._expect("stdout", pattern, within)

    # How it is

    def status(self) -> list[dict[str, Any]]:
        """Return its guests as `status --json` prints them, asked without a command."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(WITHIN)
            client.connect(self.monitor)
            client.sendall(b'{"type":"status"}\n')
            guests: list[dict[str, Any]] = json.loads(receive_until(client, b"\n"))["guests"]
            return guests

    def kill_worker(self) -> int:
        """Kill the first guest's worker, and return its successor's process id once it serves."""
        before = self.until(lambda guests: guests[0]["state"] == "running", "does not run")[0]
        os.kill(before["worker"], signal.SIGKILL)
        after = self.until(
            lambda guests: (
                guests[0]["restarts"] > before["restarts"] and guests[0]["state"] == "running"
            ),
            "no successor",
        )[0]
        return int(after["worker"])

    # Its end

    def signal(self, number: int) -> None:
        """Send a signal to the master."""
        self.process.send_signal(number)

    def wait(self, within: float = WITHIN) -> int:
        """Wait until it ended by itself, check that nothing is left, return its exit status."""
        family = self._family()
        self.status_code = self.process.wait(within)
        self._check_gone(family)
        return self.status_code

    def _family(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def _check_gone(self, family: list[psutil.Process]) -> None:
        # A worker whose master was killed ends by itself, soon.
        for process in family:
            try:
                wait_ended(process.pid)
            except TimeoutError:
                process.kill()
                raise
        if self.status_code != -signal.SIGKILL:
            left_paths = [p for p in [*self.sockets, *self.data, self.monitor] if os.path.exists(p)]
            assert not left_paths, f"sockets left behind: {left_paths}"

    def _close_pipes(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def close(self) -> None:
        """Stop it with SIGTERM unless it has ended; it must end with status 0 and leave nothing."""
        try:
            if self.status_code is None:
                family = self._family()
                self.process.terminate()
                try:
                    self.status_code = self.process.wait(WITHIN)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()
                    for left in family:
                        with suppress(psutil.NoSuchProcess):
                            left.kill()
                    raise
                self._check_gone(family)
                assert self.status_code == 0, f"exit status {self.status_code}"
        finally:
            self._close_pipes()
