"""What systemd is told."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from vhost_device_console import systemd


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as made:
        yield made


def test_a_message_goes_to_the_socket_path(
    listener: socket.socket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener.bind(str(folder / "n"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "n"))
    systemd.notify("READY=1")
    assert listener.recv(100) == b"READY=1"


def test_an_at_sign_means_an_abstract_name(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"vdc-{secrets.token_hex(8)}"
    listener.bind("\0" + name)
    monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
    systemd.notify("STOPPING=1")
    assert listener.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "/nowhere/to/be/found", "/" + "x" * 200])
def test_an_address_nobody_listens_at_is_no_error(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.notify("READY=1")


def test_nothing_is_sent_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a socket was made")

    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setattr(socket, "socket", fail)
    systemd.notify("READY=1")


def test_a_listener_that_does_not_read_does_not_hold_us(
    listener: socket.socket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener.bind(str(folder / "n"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "n"))
    for number in range(10000):
        systemd.notify(f"STATUS={number}")
    assert listener.recv(100) == b"STATUS=0"
