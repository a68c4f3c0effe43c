"""What systemd is told."""

from __future__ import annotations

import fcntl
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from vhost_device_console import systemd

from launch import WITHIN, wait_readable


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


def received(listener: socket.socket) -> tuple[bytes, list[int]]:
    """Return the next datagram and its descriptors, which are the caller's."""
    data, fds, _, _ = socket.recv_fds(listener, 1000, 253)
    return data, fds


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


@pytest.fixture
def heard(listener: socket.socket, folder: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """Give a listener that systemd's part of the environment names."""
    listener.bind(str(folder / "n"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "n"))
    return listener


def test_a_message_that_was_taken_is_known_from_one_that_was_not(heard: socket.socket) -> None:
    assert systemd.notify("READY=1")
    heard.close()
    assert not systemd.notify("READY=1")


def test_descriptors_go_to_the_store_under_their_name(heard: socket.socket, folder: Path) -> None:
    (folder / "kept").write_bytes(b"kept")
    with open(folder / "kept", "rb") as file:
        assert systemd.store("journal.web", [file.fileno()])
    state, fds = received(heard)
    try:
        assert sorted(state.split(b"\n")) == [b"FDNAME=journal.web", b"FDPOLL=0", b"FDSTORE=1"]
        assert [os.read(fd, 10) for fd in fds] == [b"kept"]
    finally:
        close_all(fds)


def test_more_descriptors_than_a_datagram_takes_go_in_several(heard: socket.socket) -> None:
    fds = [os.dup(0) for _ in range(600)]
    try:
        assert systemd.store("many", fds)
    finally:
        close_all(fds)
    counts = []
    for _ in range(3):
        state, taken = received(heard)
        assert b"FDNAME=many" in state
        counts.append(len(taken))
        close_all(taken)
    assert counts == [systemd.MOST_FDS, systemd.MOST_FDS, 600 - 2 * systemd.MOST_FDS]


def test_a_descriptor_that_is_not_open_is_no_reason_to_end(heard: socket.socket) -> None:
    assert not systemd.store("closed", [1 << 20])
    assert not select.select([heard], [], [], 0)[0]


def test_removal_names_what_is_removed(heard: socket.socket) -> None:
    assert systemd.remove("journal.web")
    assert received(heard) == (b"FDSTOREREMOVE=1\nFDNAME=journal.web", [])


@pytest.mark.parametrize("name", ["", "a:b", "ä", "a\nREADY=1", "x" * 256])
def test_a_name_that_systemd_would_not_take_is_refused(heard: socket.socket, name: str) -> None:
    with pytest.raises(ValueError, match="under the name"):
        systemd.store(name, [0])
    with pytest.raises(ValueError, match="under the name"):
        systemd.remove(name)
    assert not select.select([heard], [], [], 0)[0]


def test_the_store_waits_while_systemd_is_busy(heard: socket.socket) -> None:
    while systemd.notify("STATUS=busy"):
        pass  # until there is no room
    taken: list[bytes] = []
    deadline = time.monotonic() + WITHIN

    def read() -> None:
        while not taken or taken[-1].startswith(b"STATUS"):
            wait_readable(heard.fileno(), deadline, f"nothing after {taken}")
            taken.append(heard.recv(100))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert systemd.remove("late", within=WITHIN)
    finally:
        reader.join()
    assert taken[-1] == b"FDSTOREREMOVE=1\nFDNAME=late"


def test_the_store_gives_up_on_a_listener_that_never_reads(heard: socket.socket) -> None:
    while systemd.notify("STATUS=busy"):
        pass
    assert not systemd.store("late", [0], within=0.01)
    assert heard.recv(100) == b"STATUS=busy"


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Give three descriptors in a row, inheritable, where systemd's would be."""
    first = 700
    fds = [fcntl.fcntl(0, fcntl.F_DUPFD, first + at) for at in range(3)]
    assert fds == [first, first + 1, first + 2]
    monkeypatch.setattr(systemd, "_FIRST", first)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "3")
    monkeypatch.setenv("LISTEN_FDNAMES", "frontend:frontend:journal.web")
    yield fds
    close_all(fds)


def test_passed_descriptors_have_the_names_systemd_gave_them(passed: list[int]) -> None:
    names = ["frontend", "frontend", "journal.web"]
    assert systemd.listen_fds() == list(zip(names, passed, strict=True))


def test_passed_descriptors_are_not_passed_on(passed: list[int]) -> None:
    systemd.listen_fds()
    assert not any(os.get_inheritable(fd) for fd in passed)
    assert [key for key in os.environ if key.startswith("LISTEN_")] == []
    assert systemd.listen_fds() == []


def test_descriptors_without_names_are_unknown(
    passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LISTEN_FDNAMES")
    assert systemd.listen_fds() == [("unknown", fd) for fd in passed]


@pytest.mark.parametrize(("key", "value"), [("PID", "1"), ("PID", ""), ("FDS", "x"), ("FDS", "-1")])
def test_descriptors_that_are_somebody_elses_are_left_alone(
    passed: list[int], monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    monkeypatch.setenv(f"LISTEN_{key}", value)
    assert systemd.listen_fds() == []
    assert all(os.get_inheritable(fd) for fd in passed)


def test_only_open_descriptors_count(passed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", str(10**12))
    assert [fd for _, fd in systemd.listen_fds()] == passed


@pytest.mark.parametrize("pid", [None, "own"])
def test_the_watchdogs_limit_is_in_seconds(monkeypatch: pytest.MonkeyPatch, pid: object) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2500000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert systemd.watchdog_s() == 2.5


@pytest.mark.parametrize(("limit", "pid"), [("2500000", "1"), ("0", None), ("", None), ("x", None)])
def test_without_a_limit_of_ours_nothing_watches(
    monkeypatch: pytest.MonkeyPatch, limit: str, pid: str | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", limit)
    monkeypatch.setenv("WATCHDOG_PID", pid or str(os.getpid()))
    assert systemd.watchdog_s() is None
