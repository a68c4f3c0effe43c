"""Options to a description of the daemon; every mistake in one line."""

from __future__ import annotations

import re
from typing import Any

import pytest
from vhost_device_console.config import (
    BackendKind,
    Daemon,
    Nested,
    Network,
    Pty,
    Unix,
    from_options,
)
from vhost_device_console.errors import ConfigError


def options(**changed: Any) -> Daemon:
    usual: dict[str, Any] = {
        "socket_path": "/tmp/c.sock",
        "fd": None,
        "socket_count": 1,
        "backend": BackendKind.NETWORK,
        "tcp_port": 12345,
        "max_queue_size": 128,
    }
    return from_options(**{**usual, **changed})


def test_sockets_are_the_path_and_the_index_also_for_one() -> None:
    assert [guest.socket_path for guest in options().guests] == ["/tmp/c.sock0"]


def test_there_is_a_guest_for_each_socket() -> None:
    paths = [guest.socket_path for guest in options(socket_count=3).guests]
    assert paths == ["/tmp/c.sock0", "/tmp/c.sock1", "/tmp/c.sock2"]


def test_a_guest_is_named_after_its_socket() -> None:
    assert options(socket_count=2).guests[1].name == "c.sock1"


def test_an_inherited_socket_names_its_guest() -> None:
    (guest,) = options(socket_path=None, fd=7).guests
    assert (guest.name, guest.fd, guest.socket_path) == ("fd7", 7, None)


def test_tcp_ports_are_the_port_and_the_index_on_the_loopback() -> None:
    backends = [guest.ports[0].backend for guest in options(socket_count=2).guests]
    assert backends == [Network("127.0.0.1", 12345), Network("127.0.0.1", 12346)]


def test_the_last_port_may_be_65535() -> None:
    assert options(tcp_port=65534, socket_count=2).guests[1].ports[0].backend == Network(
        "127.0.0.1", 65535
    )


def test_a_unix_backend_lies_next_to_the_socket() -> None:
    guest = options(backend=BackendKind.UNIX, socket_count=2).guests[1]
    assert guest.ports[0].backend == Unix("/tmp/c.sock1.data")


def test_pty_links_are_numbered() -> None:
    guests = options(backend=BackendKind.PTY, pty_link="/tmp/p", socket_count=2).guests
    assert [guest.ports[0].backend for guest in guests] == [Pty("/tmp/p0"), Pty("/tmp/p1")]


def test_a_pty_needs_no_link() -> None:
    assert options(backend=BackendKind.PTY).guests[0].ports[0].backend == Pty(None)


def test_nested_is_the_terminal() -> None:
    assert options(backend=BackendKind.NESTED).guests[0].ports[0].backend == Nested()


def test_the_port_is_a_console() -> None:
    (port,) = options().guests[0].ports
    assert (port.id, port.console) == (0, True)


def test_limits_reach_the_guest() -> None:
    (guest,) = options(max_queue_size=64, poll_us=7).guests
    assert (guest.max_queue_size, guest.poll_us) == (64, 7)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"socket_path": None}, "give either --socket-path or --fd"),
        ({"fd": 3}, "give either --socket-path or --fd"),
        ({"socket_count": 0}, "--socket-count must be at least 1, not 0"),
        ({"socket_path": None, "fd": 3, "socket_count": 2}, "--fd is one socket"),
        ({"backend": BackendKind.NESTED, "socket_count": 2}, "nested backend is one terminal"),
        (
            {"backend": BackendKind.NESTED, "socket_path": None, "fd": 0},
            "--fd 0 is the terminal's place",
        ),
        ({"backend": BackendKind.UNIX, "socket_path": None, "fd": 3}, "needs --socket-path"),
        ({"pty_link": "/tmp/p"}, "--pty-link goes with --backend pty"),
        ({"max_queue_size": 0}, "power of two from 1 to 32768, not 0"),
        ({"max_queue_size": 100}, "power of two from 1 to 32768, not 100"),
        ({"max_queue_size": 65536}, "power of two from 1 to 32768, not 65536"),
        ({"poll_us": -1}, "--poll-us must not be negative, not -1"),
        ({"tcp_port": 0}, "TCP ports 0 to 0 do not fit in 1 to 65535"),
        ({"tcp_port": 65535, "socket_count": 2}, "TCP ports 65535 to 65536 do not fit"),
        ({"socket_path": "/tmp/" + "x" * 200}, "socket path is 206 bytes long"),
        ({"socket_path": "/tmp/a\0b"}, "names no file"),
        ({"socket_path": ""}, "--socket-path is empty"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_change(changed: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)) as raised:
        options(**changed)
    assert "\n" not in str(raised.value)


def test_a_path_of_107_bytes_is_the_longest() -> None:
    path = "/tmp/" + "x" * 101
    (guest,) = options(socket_path=path).guests
    assert guest.socket_path is not None
    assert len(guest.socket_path) == 107
    with pytest.raises(ConfigError, match="108 bytes"):
        options(socket_path=path + "x")


def test_a_path_is_measured_in_bytes_not_characters() -> None:
    with pytest.raises(ConfigError, match="socket path is 126 bytes long"):
        options(socket_path="/tmp/" + "ü" * 60)


def test_a_data_socket_has_to_fit_too() -> None:
    with pytest.raises(ConfigError, match=r"109 bytes long.*\.data"):
        options(socket_path="/tmp/" + "x" * 98, backend=BackendKind.UNIX)
