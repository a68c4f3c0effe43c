"""An ssh server of ours as a process, and people who come to it with asyncssh."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import asyncssh
import pytest

from launch import COMMAND, WITHIN, environment, wait_readable

_T = TypeVar("_T")

ESCAPE = b"\x1d"


class Server:
    """`vhost-device-console ssh` for the daemons of `folder`; `keys` are its authorized keys.

    It ends with the context, by SIGTERM and status 0. `change` is Python that is run before it.
    """

    def __init__(
        self, folder: Path, keys: str, *options: str, listen: str = "127.0.0.1:0", change: str = ""
    ) -> None:
        self.folder = folder
        self.keys = folder / "authorized_keys"
        self.keys.write_text(keys)
        self.host_key = folder / "host_key"
        program: tuple[str, ...] = COMMAND
        if change:
            text = f"from vhost_device_console.people import ssh\n{change}\n"
            text += "from vhost_device_console import cli; cli.main()"
            program = (sys.executable, "-c", text)
        self.process = subprocess.Popen(
            [
                *program,
                "ssh",
                f"--listen={listen}",
                f"--authorized-keys={self.keys}",
                f"--host-key={self.host_key}",
                *options,
            ],
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._log = ""
        self.port = 0
        try:
            where = self.expect_log(r"listening at (\S+) with the key")[1]
        except BaseException:
            self.process.kill()
            self.close(None)
            raise
        if "/" not in where:
            self.port = int(where.rpartition(":")[2])

    def expect_log(self, pattern: str) -> re.Match[str]:
        """Wait until stderr, from its start, has `pattern`."""
        assert self.process.stderr is not None
        fd = self.process.stderr.fileno()
        deadline = time.monotonic() + WITHIN
        while not (match := re.search(pattern, self._log)):
            wait_readable(fd, deadline, f"{pattern!r} not in {self._log!r}")
            data = os.read(fd, 1 << 16)
            if not data:
                raise EOFError(f"{pattern!r} not in {self._log!r}")
            self._log += data.decode(errors="backslashreplace")
        return match

    def said(self, what: str) -> int:
        """Return how often `what` is in what it has said so far."""
        return self._log.count(what)

    def close(self, status: int | None = 0) -> None:
        """End it, with this exit status."""
        assert self.process.stderr is not None
        if self.process.stderr.closed:
            return
        if self.process.poll() is None:
            self.process.terminate()
        try:
            ended = self.process.wait(WITHIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            print(self._log + self.process.stderr.read().decode(errors="backslashreplace"))
            self.process.stderr.close()
        assert status is None or ended == status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Loop:
    """An event loop in a thread of its own, so that people's clients go on by themselves."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, work: Awaitable[_T]) -> _T:
        """Wait for `work`, and return its result."""

        async def wait() -> _T:
            return await work

        return asyncio.run_coroutine_threadsafe(wait(), self._loop).result(WITHIN)

    def call(self, what: Callable[[], _T]) -> _T:
        """Call `what` there, and return its result."""

        async def work() -> _T:
            return what()

        return self.run(work())

    def close(self) -> None:
        """Stop it."""

        async def last() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.get_running_loop().shutdown_default_executor()

        self.run(last())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def transport(conn: asyncssh.SSHClientConnection) -> asyncio.Transport:
    """Return what a connection reads from."""
    found = vars(conn)["_transport"]
    assert isinstance(found, asyncio.Transport)
    return found


class Session(asyncssh.SSHClientSession[bytes]):
    """A person's session: what came is in `out` and `err`, and `status` once it has ended."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.err = bytearray()
        self.status: int | None = None
        self.over = False
        self.changed = threading.Condition()
        self.chan: asyncssh.SSHClientChannel[bytes]

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        self.chan = chan

    def _add(self, change: Callable[[], object]) -> None:
        with self.changed:
            change()
            self.changed.notify_all()

    def data_received(self, data: bytes, kind: int | None) -> None:
        self._add(lambda: (self.err if kind else self.out).extend(data))

    def exit_status_received(self, status: int) -> None:
        self._add(lambda: setattr(self, "status", status))

    def connection_lost(self, _error: Exception | None) -> None:
        self._add(lambda: setattr(self, "over", True))


class Person:
    """Somebody with a session; `conn` is their connection."""

    def __init__(self, loop: Loop, conn: asyncssh.SSHClientConnection, **options: Any) -> None:
        self.loop = loop
        self.conn = conn
        chan, self.session = loop.run(conn.create_session(Session, **{"encoding": None, **options}))
        self.chan = chan

    def until(self, condition: Callable[[Session], Any], what: str) -> Any:
        """Wait until `condition` holds for the session, and return what it gives."""
        session = self.session
        with session.changed:
            result = session.changed.wait_for(lambda: condition(session), WITHIN)
        if not result:
            raise TimeoutError(
                f"{what}: {bytes(session.out[-300:])!r} {bytes(session.err[-300:])!r}"
            )
        return result

    def expect(self, pattern: bytes, *, aside: bool = False) -> re.Match[bytes]:
        """Wait until `pattern` has come, and forget all up to its end."""

        def found(session: Session) -> re.Match[bytes] | None:
            where = session.err if aside else session.out
            if match := re.search(pattern, bytes(where), re.MULTILINE):
                del where[: match.end()]
            return match

        match: re.Match[bytes] = self.until(found, f"no {pattern!r}")
        return match

    def read(self, count: int) -> bytes:
        """Return the next `count` bytes of output."""

        def taken(session: Session) -> bytes:
            data = b""
            if len(session.out) >= count:
                data = bytes(session.out[:count])
                del session.out[:count]
            return data

        data: bytes = self.until(taken, f"{count} bytes")
        return data

    def type(self, keys: bytes) -> None:
        """Send `keys`."""
        self.loop.call(lambda: self.chan.write(keys))

    def end(self) -> None:
        """Send the end of file."""
        self.loop.call(self.chan.write_eof)

    def wait(self) -> int | None:
        """Wait until the session has ended, and return its exit status."""
        self.until(lambda session: session.over, "no end")
        return self.session.status


class People:
    """Connects people to `server` with a key of theirs, `key` unless another is given."""

    def __init__(self, loop: Loop, server: Server, key: asyncssh.SSHKey) -> None:
        self.loop = loop
        self.server = server
        self.key = key

    def connect(self, user: str, **options: Any) -> asyncssh.SSHClientConnection:
        """Return a connection, which is to be closed; raises what asyncssh does."""
        given = {
            "username": user,
            "client_keys": [self.key],
            "known_hosts": None,
            "agent_path": None,
            "config": None,
            "gss_host": None,
            **options,
        }
        if "sock" not in given:
            given |= {"host": "127.0.0.1", "port": self.server.port}
        return self.loop.run(asyncssh.connect(**given))

    @contextmanager
    def come(self, user: str, *, terminal: bool = True, **options: Any) -> Iterator[Person]:
        """Give somebody at a session, with a terminal of 80 x 24 or without one."""
        if terminal:
            options = {"term_type": "xterm", "term_size": (80, 24), **options}
        session = {
            name: options.pop(name)
            for name in ("term_type", "term_size", "command", "subsystem", "env")
            if name in options
        }
        conn = self.connect(user, **options)
        try:
            yield Person(self.loop, conn, **session)
        finally:
            self.hang_up(conn)

    def hang_up(self, conn: asyncssh.SSHClientConnection) -> None:
        """Close a connection."""
        self.loop.call(conn.abort)
        self.loop.run(conn.wait_closed())


class OpenSSH:
    """OpenSSH's client, which comes to `server` with `key` and knows the server's own key."""

    def __init__(self, server: Server, key: asyncssh.SSHKey) -> None:
        if shutil.which("ssh") is None:
            why = "no ssh here: install openssh-client"
            pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
        self._identity = server.folder / "id_ed25519"
        self._identity.touch(0o600)
        self._identity.write_bytes(key.export_private_key("openssh"))
        own = asyncssh.read_private_key(server.host_key).export_public_key().decode()
        self._known = server.folder / "known_hosts"
        self._known.write_text(f"[127.0.0.1]:{server.port} {own}")
        self._port = server.port

    def command(self, user: str, *words: str) -> list[str]:
        """Return its command line; `words` are options, and what comes after `--` a command."""
        at = words.index("--") if "--" in words else len(words)
        return [
            "ssh",
            "-F",
            "none",
            "-p",
            str(self._port),
            *(
                f"-o{option}"
                for option in (
                    "BatchMode=yes",
                    "IdentitiesOnly=yes",
                    f"IdentityFile={self._identity}",
                    "IdentityAgent=none",
                    f"UserKnownHostsFile={self._known}",
                    "StrictHostKeyChecking=yes",
                    "LogLevel=ERROR",
                )
            ),
            *words[:at],
            f"{user}@127.0.0.1",
            *words[at + 1 :],
        ]

    def run(self, user: str, *words: str, **popen: Any) -> subprocess.CompletedProcess[bytes]:
        """Run it between pipes, to its end."""
        if "input" not in popen:
            popen["stdin"] = subprocess.DEVNULL
        return subprocess.run(
            self.command(user, *words), capture_output=True, timeout=WITHIN, check=False, **popen
        )
