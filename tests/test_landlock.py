"""What Landlock takes from a process, on this kernel and on others."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest
from vhost_device_console import landlock
from vhost_device_console.kernel import prctl, system_call

from confined import in_child, loopback


def _abi() -> int:
    try:
        return system_call(444, 0, 0, 1)
    except OSError:
        return 0


ABI = _abi()

needs = {abi: pytest.mark.skipif(abi > ABI, reason=f"Landlock is {ABI}") for abi in (1, 3, 4, 6)}


def restricted(work: Callable[[], Any], *, network: bool = False) -> Any:
    """Return what `work` returns in a process that gave up all that it can."""

    def child() -> Any:
        prctl(38, 1)
        landlock.restrict_self(network=network)
        return work()

    return in_child(child)


@needs[1]
@pytest.mark.parametrize(
    "work",
    [
        lambda: os.open("/proc/self/status", os.O_RDONLY),
        lambda: os.open("/dev/null", os.O_WRONLY),
        lambda: os.listdir("/"),
        lambda: os.mkdir("/tmp/vdc-not-to-be-made"),
        lambda: os.execv("/bin/true", ["true"]),
    ],
    ids=["read", "write", "list", "make", "execute"],
)
def test_no_path_can_be_used(work: Callable[[], Any]) -> None:
    assert restricted(work).errno == errno.EACCES


@needs[1]
def test_what_is_open_stays_usable() -> None:
    with open("/proc/self/status") as file:
        assert restricted(lambda: file.read(5)) == "Name:"


@needs[3]
def test_new_memory_files_have_any_size() -> None:
    assert restricted(lambda: os.ftruncate(os.memfd_create("x"), 4096)) is None


@needs[4]
def test_tcp_leads_nowhere() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        came = restricted(lambda: socket.create_connection(listener.getsockname()))
    assert came.errno == errno.EACCES


@needs[4]
def test_no_tcp_port_is_taken() -> None:
    assert restricted(lambda: socket.create_server(("127.0.0.1", 0))).errno == errno.EACCES


@needs[1]
def test_a_gateway_keeps_tcp() -> None:
    assert restricted(loopback, network=True) == b"over TCP"


@needs[1]
def test_a_gateway_opens_memory_and_no_file() -> None:
    def read() -> tuple[str, int | None]:
        fd = os.memfd_create("certificate")
        os.write(fd, b"ok")
        with open(f"/proc/self/fd/{fd}") as file:
            text = file.read()
        try:
            os.open("/etc/passwd", os.O_RDONLY)
        except OSError as error:
            return text, error.errno
        return text, None

    assert restricted(read, network=True) == ("ok", errno.EACCES)


@needs[6]
def test_abstract_sockets_of_others_cannot_be_reached() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()

        def connect() -> None:
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(listener.getsockname())

        assert restricted(connect).errno == errno.EPERM


@needs[6]
def test_nobody_outside_can_be_signalled() -> None:
    me = os.getpid()
    assert restricted(lambda: os.kill(me, signal.SIGWINCH)).errno == errno.EPERM


@needs[1]
def test_the_version_in_force_is_told() -> None:
    assert in_child(lambda: prctl(38, 1) or landlock.restrict_self()) == (ABI)


class _Kernel:
    """A kernel with another Landlock, that keeps what it is asked for."""

    def __init__(self, abi: int) -> None:
        self.abi = abi
        self.rules: list[int] = []
        self.restricted = False

    def __call__(self, number: int, *arguments: Any) -> int:
        if number == 446:
            self.restricted = True
            return 0
        rules, size, flags = arguments
        if flags:
            return self.abi
        self.rules = [*(ctypes.c_uint64 * (size // 8)).from_address(rules)]
        return os.open(os.devnull, os.O_RDONLY)


@pytest.mark.parametrize(
    ("abi", "rules"),
    [
        (1, [0x1FFF, 0, 0]),
        (2, [0x3FFF, 0, 0]),
        (3, [0x7FFF, 0, 0]),
        (4, [0x7FFF, 3, 0]),
        (5, [0xFFFF, 3, 0]),
        (6, [0xFFFF, 3, 3]),
        (99, [0xFFFF, 3, 3]),
    ],
)
def test_a_kernel_is_asked_for_what_it_knows(abi: int, rules: list[int]) -> None:
    kernel = _Kernel(abi)
    assert landlock.restrict_self(kernel) == abi
    assert (kernel.rules, kernel.restricted) == (rules, True)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSYS, "this kernel has none"),
        (errno.EOPNOTSUPP, "this kernel was started without it"),
        (errno.EPERM, "this kernel refuses it: operation not permitted"),
    ],
)
def test_a_kernel_without_it_says_so(code: int, said: str) -> None:
    def kernel(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    with pytest.raises(OSError, match=said):
        landlock.restrict_self(kernel)
