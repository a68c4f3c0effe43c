"""A program that people really run on a port: QEMU's guest agent."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import uml
from console import STILL

from launch import Daemon, need, until

pytestmark = pytest.mark.guest

PORT = "org.qemu.guest_agent.0"


class Agent:
    """Someone who asks the agent, as libvirt does, through `peer`."""

    def __init__(self, peer: socket.socket) -> None:
        peer.settimeout(STILL)
        self._peer = peer
        self._answers = peer.makefile("rb")

    def synchronise(self) -> int:
        """Forget what was said before, and return the number that the agent gave back."""
        # "\xff" ends whatever either side was about to say (QEMU Guest Agent Protocol Reference).
        self._peer.sendall(b"\xff")
        self._say("guest-sync-delimited", {"id": 4711})
        while (byte := self._answers.read(1)) != b"\xff":
            assert byte, "the agent's port was closed"
        number: int = self._answer()
        return number

    def ask(self, command: str, **arguments: Any) -> Any:
        self._say(command, arguments)
        return self._answer()

    def close(self) -> None:
        self._answers.close()
        self._peer.close()

    def _say(self, command: str, arguments: dict[str, Any]) -> None:
        request = {"execute": command, "arguments": arguments}
        self._peer.sendall(json.dumps(request).encode() + b"\n")

    def _answer(self) -> Any:
        return json.loads(self._answers.readline())["return"]


@pytest.fixture
def agent(folder: Path, daemon: Any, boot: uml.StartGuest, a_kernel: Path) -> Iterator[Agent]:
    """Give a guest's agent, on a port with a unix socket."""
    need(uml.AGENT.exists(), "guest agent")
    initramfs = folder / "initramfs"
    initramfs.write_bytes((a_kernel / "initramfs").read_bytes() + uml.AGENT.read_bytes())
    started: Daemon = daemon("unix", 1, "--port", f"name={PORT},backend=unix,path={folder}/agent")
    peer = socket.socket(socket.AF_UNIX)
    with closing(Agent(peer)) as agent:
        peer.connect(f"{folder}/agent0")
        path = f"/dev/virtio-ports/{PORT}"
        start = f"qemu-ga -d -t /tmp -f /tmp/pid -p {path}"
        boot(
            a_kernel,
            started.sockets[0],
            f"initrd={initramfs}",
            run=f"until [ -e {path} ]; do usleep 1000; done; {start}",
        )
        yield agent


def test_the_agent_answers_a_ping(agent: Agent) -> None:
    assert agent.synchronise() == 4711
    assert agent.ask("guest-ping") == {}


def test_the_agent_runs_a_program_and_returns_what_it_said(agent: Agent) -> None:
    agent.synchronise()
    script = "seq 10000; echo oh >&2; exit 3"
    started = agent.ask(
        "guest-exec", path="/bin/sh", arg=["-c", script], **{"capture-output": True}
    )

    def ended() -> Any:
        status = agent.ask("guest-exec-status", pid=started["pid"])
        return status["exited"] and status

    status = until(ended, "the program does not end")
    assert status["exitcode"] == 3
    printed = b"".join(b"%d\n" % number for number in range(1, 10001))
    assert base64.b64decode(status["out-data"]) == printed
    assert base64.b64decode(status["err-data"]) == b"oh\n"
