"""Guests of QEMU, with what `contrib/guest/fetch --all` made ready."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from machine import Machine
from uml import BUILD

from launch import WITHIN, Daemon, command

FOLDER = BUILD / "guest-qemu"

#: How many ports a shared guest may have.
MAX_PORTS = 6


class Qemu(Machine):
    """A running guest with its console on `path`, and QEMU's own monitor.

    The device has the queues of `ports` ports (port 0 is one), of `queue_size` entries;
    `properties` are others of it. `run` is a shell command for the guest to run before its shell.
    """

    def __init__(
        self, path: str, ports: int = 1, queue_size: int = 64, run: str = ":", **properties: str
    ) -> None:
        self._monitor, theirs = socket.socketpair()
        properties |= {"num_vqs": str(2 * ports + 2), "vq_size": str(queue_size)}
        device = [f"vhost-user-test-device-pci.{key}={value}" for key, value in properties.items()]
        with theirs:
            super().__init__(
                [
                    *(FOLDER / "boot", path, f"vdc.run={run}", "--"),
                    *(option for setting in device for option in ("-global", setting)),
                    *("-chardev", f"socket,id=monitor,fd={theirs.fileno()}"),
                    *("-qmp", "chardev:monitor"),
                ],
                pass_fds=[theirs.fileno()],
            )
        self._monitor.settimeout(WITHIN)
        self._messages = self._monitor.makefile("rb")
        self._events: list[str] = []
        # QEMU wants to be told first that nothing of its protocol is asked for.
        self._monitor.sendall(b'{"execute": "qmp_capabilities"}\n')

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._messages.close()
        self._monitor.close()

    def _read(self) -> dict[str, Any]:
        """Return its next message; an event is noted as well."""
        line = self._messages.readline()
        if not line:
            raise EOFError("QEMU has closed its monitor")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self._events.append(message["event"])
        return message

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a command of QEMU's monitor (QMP) and return its result."""
        message = {"execute": command, "arguments": arguments, "id": command}
        self._monitor.sendall(json.dumps(message).encode() + b"\n")
        while (answer := self._read()).get("id") != command:
            pass
        assert "return" in answer, answer
        return answer["return"]

    def expect_event(self, name: str) -> None:
        """Wait for an event of QEMU's monitor, and forget it and those before it."""
        while name not in self._events:
            self._read()
        del self._events[: self._events.index(name) + 1]


class Shared:
    """One guest for many tests, with several ports, each a unix socket for people.

    Port 0 and `second` are consoles, `data` and `org.qemu.guest_agent.0` are not, and there is
    room for more.
    """

    def __init__(self, folder: Path, ends: ExitStack) -> None:
        self.folder = folder
        options = ["--max-ports", str(MAX_PORTS)]
        for port in ("second,console", "data", "org.qemu.guest_agent.0"):
            name = port.partition(",")[0]
            options += ["--port", f"name={port},backend=unix,path={folder}/{name}."]
        self.daemon = ends.enter_context(Daemon(folder, "unix", 1, *options))
        self.guest = ends.enter_context(Qemu(self.daemon.sockets[0], MAX_PORTS))

    def add(self, name: str) -> None:
        """Give the guest another port."""
        address = f"{self.folder}/{name}.0"
        self.command("port", "add", self.name, f"name={name},backend=unix,path={address}")

    @property
    def name(self) -> str:
        """The guest's name on the daemon's command line."""
        name: str = self.daemon.status()[0]["name"]
        return name

    def command(self, *arguments: str) -> None:
        """Run the daemon's command line; it must succeed."""
        done = command(self.folder, *arguments)
        assert done.returncode == 0, done

    def attach(self, name: str) -> socket.socket:
        """Return a connection to the port of this name."""
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(self.daemon.data[0] if name == "console0" else f"{self.folder}/{name}.0")
        return peer


#: What the fixture of conftest.py gives.
StartQemu = Callable[..., Qemu]
