"""One instance of our units on a machine that systemd runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol, Self

from pid1 import USER, Machine
from vhost_device_console import monitor

from launch import Served


class Service(Served):
    """vhost-device-console@`name` with its files; a context manager that stops and forgets it.

    `environment` is its EnvironmentFile=, `settings` are a drop-in's lines of [Service]. What tests
    of whole daemons ask a launch.Daemon for is here too: `sockets`, `data` and `tcp` are where its
    guests are reached from outside the machine, and status and until say how they are.
    """

    def __init__(
        self,
        machine: Machine,
        name: str,
        environment: str = "",
        settings: str = "",
        *,
        guests: int = 1,
        tcp: int | None = None,
    ) -> None:
        self.machine = machine
        self.name = f"vhost-device-console@{name}.service"
        self.socket_unit = f"vhost-device-console@{name}.socket"
        self.folder = f"/run/vhost-device-console/{name}"
        self.sockets = [
            machine.path(f"{self.folder}/console.sock{index}") for index in range(guests)
        ]
        self.data = [] if tcp else [f"{path}.data" for path in self.sockets]
        self.tcp = tcp
        self._files = {
            f"/etc/vhost-device-console/{name}.env": environment,
            f"/etc/systemd/system/{self.name}.d/test.conf": f"[Service]\n{settings}\n",
        }

    def __enter__(self) -> Self:
        for path, text in self._files.items():
            self.machine.write(path, text)
        self._begun = time.time()
        self.machine.systemctl("daemon-reload")
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.systemctl("stop", self.name, self.socket_unit)
        self.machine.systemctl("reset-failed", self.name, self.socket_unit, check=False)
        print(self.log())
        for path in self._files:
            Path(self.machine.path(path)).unlink()
        self.machine.systemctl("daemon-reload")

    # What systemd says and does

    def systemctl(self, verb: str, *options: str) -> str:
        """Do something to the service."""
        return self.machine.systemctl(verb, self.name, *options)

    def show(self, name: str) -> str:
        """Return one of its properties."""
        return self.machine.show(self.name, name)[name]

    @property
    def pid(self) -> int:
        """The master's process id in the machine; 0: there is none."""
        return int(self.show("MainPID"))

    @property
    def cgroup(self) -> Path:
        """The folder of its control group."""
        return self.machine.cgroup / self.show("ControlGroup").lstrip("/")

    def log(self) -> str:
        """Return what it said, and systemd about it."""
        return self.machine.journal(self.name, self._begun)

    # What it says itself

    def status(self) -> list[dict[str, Any]]:
        """Return its guests as `status --json` prints them."""
        path = self.machine.path(f"{self.folder}/{self.pid}.sock")
        guests: list[dict[str, Any]] = monitor.plain(monitor.ask(path).guests)  # type: ignore[assignment]
        return guests

    def kill(self, pid: int, signal: str = "KILL") -> None:
        """Send a signal to a process of the machine."""
        self.machine.run("kill", f"-{signal}", str(pid))


class StartService(Protocol):
    """The `service` fixture."""

    def __call__(
        self,
        name: str,
        environment: str = ...,
        settings: str = ...,
        *,
        guests: int = ...,
        tcp: int | None = ...,
    ) -> Service: ...


def uid(machine: Machine, which: str = "--user") -> int:
    """Return the number of the services' user, or of its --group, in the machine."""
    return int(machine.run("id", which, USER).stdout)
