"""The ssh server as OpenSSH's own client meets it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import asyncssh
import pytest
from scene import boot, wait_port

from conftest import StartDaemon
from launch import WITHIN, Daemon
from sshing import ESCAPE, OpenSSH, Server
from terminal import Terminal

KEY = asyncssh.generate_private_key("ssh-ed25519")
LINE = KEY.export_public_key().decode().strip() + " ann@laptop\n"


@pytest.fixture
def served(daemon: StartDaemon) -> Daemon:
    return daemon("unix", 1)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(folder, LINE) as made:
        yield made


@pytest.fixture
def ssh(server: Server) -> OpenSSH:
    return OpenSSH(server, KEY)


def guest_of(daemon: Daemon) -> str:
    name: str = daemon.status()[0]["name"]
    return name


def test_a_terminal_with_its_size_keys_and_menu(served: Daemon, ssh: OpenSSH) -> None:
    with boot(served) as console:
        console.write(b"before\r\n")
        with Terminal(ssh.command(guest_of(served))) as person:
            person.expect(rb"\[attached to .*\]\r\nbefore\r\n")
            wait_port(served, columns=80, rows=24)
            person.resize(132, 50)
            wait_port(served, columns=132, rows=50)
            person.type(b"\x03typed")
            assert console.read(6) == b"\x03typed"
            person.type(ESCAPE + b"q")
            assert person.process.wait(WITHIN) == 0


def test_its_break_is_sysrq(served: Daemon, ssh: OpenSSH) -> None:
    with boot(served) as console, Terminal(ssh.command(guest_of(served), "-e~")) as person:
        person.expect(rb"\[attached to ")
        person.type(b"\r")
        assert console.read(1) == b"\r"
        person.type(b"~B")
        person.expect(rb"\[SysRq: which key")
        person.type(b"h")
        assert console.read(2) == b"\x0fh"


def test_a_pipe_is_typed_and_answered(served: Daemon, ssh: OpenSSH) -> None:
    with boot(served) as console:
        console.write(b"history \xff")
        told = ssh.run(guest_of(served), input=b"poweroff\n")
        assert (told.returncode, told.stdout) == (0, b"history \xff")
        assert told.stderr.startswith(b"[attached to ")
        assert console.read(9) == b"poweroff\n"


def test_status_and_no_other_command(served: Daemon, ssh: OpenSSH) -> None:
    told = ssh.run("x", "--", "status")
    assert told.returncode == 0
    assert guest_of(served).encode() in told.stdout
    told = ssh.run("x", "--", "cat /etc/passwd")
    assert (told.returncode, told.stdout) == (1, b"")
    assert told.stderr == (
        b"[no command can be run here but status; without one, it is a console]\n"
    )


def test_nothing_is_forwarded(served: Daemon, ssh: OpenSSH) -> None:
    with socket.create_server(("127.0.0.1", 0)) as target:
        place = f"127.0.0.1:{target.getsockname()[1]}"
        told = ssh.run(guest_of(served), "-W", place)
        assert told.returncode != 0
        assert b"forwarding failed" in told.stderr
        told = ssh.run(guest_of(served), "-N", "-oExitOnForwardFailure=yes", "-R", f"0:{place}")
        assert told.returncode != 0
        assert b"remote port forwarding failed" in told.stderr
        target.setblocking(False)
        with pytest.raises(BlockingIOError):
            target.accept()


def test_another_key_does_not_come_in(served: Daemon, server: Server) -> None:
    ssh = OpenSSH(server, asyncssh.generate_private_key("ssh-ed25519"))
    told = ssh.run(guest_of(served))
    assert told.returncode == 255
    assert told.stderr.endswith(b"Permission denied (publickey).\r\n")
