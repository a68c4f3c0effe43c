"""A real guest's console over ssh, with OpenSSH's client."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import asyncssh
import pytest
from console import PROMPT, Console
from uml import StartGuest

from launch import Daemon
from sshing import ESCAPE, OpenSSH, Server
from terminal import Terminal

pytestmark = pytest.mark.guest

KEY = asyncssh.generate_private_key("ssh-ed25519")


def test_boot_type_resize_and_power_off(
    a_kernel: Path, folder: Path, daemon: Callable[..., Daemon], boot: StartGuest
) -> None:
    """From the boot log's first line on, while a worker is killed, and at last from a pipe."""
    started = daemon("unix")
    name = started.status()[0]["name"]
    guest = boot(a_kernel, started.sockets[0])
    with Server(folder, KEY.export_public_key().decode()) as server:
        ssh = OpenSSH(server, KEY)
        with Terminal(ssh.command(name)) as terminal:
            person = Console(terminal.outer)
            person.until(rb"\[attached to ")
            person.until(rb"Linux version")
            person.until(PROMPT)
            assert person.run(b"tty") == b"/dev/hvc0\r\n"
            person.run(b'until [ "$(stty size)" = "24 80" ]; do :; done')
            os.kill(started.workers()[0], signal.SIGKILL)
            terminal.resize(132, 50)
            person.run(b'until [ "$(stty size)" = "50 132" ]; do :; done')
            person.send(ESCAPE + b"q")
            assert terminal.process.wait(30) == 0
        told = ssh.run(name, input=b"poweroff -f\n")
        assert told.returncode == 0
        assert b"Linux version" in told.stdout  # all of it again
        assert guest.wait() == 0
