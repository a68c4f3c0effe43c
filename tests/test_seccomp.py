"""The system calls of a worker: what is let through, refused, or the end."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import termios
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vhost_device_console import seccomp
from vhost_device_console.kernel import prctl

from confined import Died, in_child, loopback

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def library() -> Iterator[ctypes.CDLL]:
    """Give libseccomp, where there is one."""
    try:
        yield seccomp.library()
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture
def restricted(library: ctypes.CDLL) -> Callable[..., Any]:
    """Give a function that does something in a child with a worker's system calls."""
    assert library

    def run(work: Callable[[], Any], *, network: bool = False) -> Any:
        def child() -> Any:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # some are killed
            prctl(38, 1)
            seccomp.restrict_self(network=network)
            return work()

        return in_child(child)

    return run


def _call(function: str, *arguments: object) -> int:
    result: int = getattr(_libc, function)(*arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), function)
    return result


def _own() -> int:
    return fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())


@pytest.mark.parametrize(
    "work",
    [
        lambda: os.open("/proc/self/status", os.O_RDONLY),
        lambda: os.stat("/"),
        lambda: os.unlink("/tmp/vdc-not-there"),
        lambda: os.readlink("/proc/self/exe"),
        lambda: os.kill(os.getppid(), 0),
        lambda: os.setpriority(os.PRIO_PROCESS, 0, 19),
        lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)),
        lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
        lambda: fcntl.ioctl(0, termios.TIOCSTI, b"x"),
        _own,
        lambda: os.setsid(),
        lambda: socket.socketpair(),
    ],
    ids=[
        "open",
        "stat",
        "unlink",
        "readlink",
        "kill",
        "priority",
        "cpus",
        "executable-memory",
        "type-into-a-terminal",
        "have-somebody-signalled",
        "session",
        "socketpair",
    ],
)
def test_what_a_worker_never_does_is_refused(
    restricted: Callable[..., Any], work: Callable[[], Any]
) -> None:
    assert restricted(work).errno == errno.EPERM


@pytest.mark.parametrize(
    "work",
    [
        lambda: os.execv("/bin/true", ["true"]),
        lambda: os.fork(),
        lambda: os.posix_spawn("/bin/true", ["true"], {}),
        lambda: socket.socket(socket.AF_UNIX),
        lambda: _call("bind", 0, None, 0),
        lambda: _call("connect", 0, None, 0),
        lambda: _call("ptrace", 16, os.getppid(), None, None),
        lambda: _call("process_vm_readv", os.getppid(), None, 0, None, 0, 0),
        lambda: os.setresuid(0, 0, 0),
        lambda: _call("unshare", 0),
    ],
    ids=[
        "execve",
        "fork",
        "spawn",
        "socket",
        "bind",
        "connect",
        "ptrace",
        "read-memory",
        "become",
        "unshare",
    ],
)
def test_what_only_an_intruder_does_is_its_end(
    restricted: Callable[..., Any], work: Callable[[], Any]
) -> None:
    assert restricted(work) == Died(signal.SIGSYS)


def _memory() -> bytes:
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with mmap.mmap(fd, 4096) as view:
        view[:2] = b"ok"
    return os.pread(os.dup(fd), 2, 0)


def _wait() -> bytes:
    event = os.eventfd(1, os.EFD_NONBLOCK)
    with select.epoll() as epoll:
        epoll.register(event, select.EPOLLIN)
        assert epoll.poll(0)
    os.set_blocking(event, True)
    os.set_inheritable(event, True)
    os.fstat(event)
    os.eventfd_read(event)
    return b"ok"


def _terminal(ends: tuple[int, int]) -> bytes:
    ours, theirs = ends
    modes = termios.tcgetattr(theirs)
    modes[3] &= ~termios.ECHO
    termios.tcsetattr(theirs, termios.TCSADRAIN, modes)
    os.get_terminal_size(theirs)
    os.write(theirs, b"ok")
    return os.read(ours, 2)


@pytest.mark.parametrize("work", [_memory, _wait], ids=["memory", "wait"])
def test_what_a_worker_does_is_let_through(
    restricted: Callable[..., Any], work: Callable[[], Any]
) -> None:
    assert restricted(work) == b"ok"


def test_a_terminal_s_modes_can_be_set(restricted: Callable[..., Any]) -> None:
    ends = os.openpty()
    try:
        assert restricted(lambda: _terminal(ends)) == b"ok"
    finally:
        for end in ends:
            os.close(end)


def test_sockets_that_are_there_carry_bytes_and_descriptors(
    restricted: Callable[..., Any],
) -> None:
    ours, theirs = socket.socketpair()

    def receive() -> tuple[bytes, int]:
        data, fds, _, _ = socket.recv_fds(theirs, 10, 1)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        theirs.sendall(b"back")
        return data, len(fds)

    with ours, theirs:
        socket.send_fds(ours, [b"there"], [0])
        assert restricted(receive) == (b"there", 1)
        assert ours.recv(10) == b"back"


def test_a_gateway_has_sockets(restricted: Callable[..., Any]) -> None:
    assert restricted(loopback, network=True) == b"over TCP"


def test_a_gateway_starts_nothing_either(restricted: Callable[..., Any]) -> None:
    died = restricted(lambda: os.execv("/bin/true", ["true"]), network=True)
    assert died == Died(signal.SIGSYS)


def test_a_worker_may_end_itself(restricted: Callable[..., Any]) -> None:
    assert restricted(lambda: os.kill(os.getpid(), signal.SIGKILL)) == Died(signal.SIGKILL)


def test_an_abort_is_one(restricted: Callable[..., Any]) -> None:
    def abort() -> None:
        faulthandler.disable()  # pytest's would write about it
        os.abort()

    assert restricted(abort) == Died(signal.SIGABRT)


def test_calls_that_the_library_does_not_know_yet_are_passed_over(
    restricted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = seccomp._ALLOWED  # noqa: SLF001
    monkeypatch.setattr(seccomp, "_ALLOWED", f"{allowed} call_of_the_future")
    seccomp.prepare.cache_clear()
    assert restricted(_wait) == b"ok"


def test_a_machine_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "_LIBRARY", "libthereisnone.so.2")
    seccomp.library.cache_clear()
    seccomp.prepare.cache_clear()
    try:
        with pytest.raises(OSError, match=r"libthereisnone.so.2 is not installed"):
            seccomp.restrict_self()
    finally:
        seccomp.library.cache_clear()


def test_a_kernel_that_takes_no_filter_says_so(library: ctypes.CDLL) -> None:
    assert library

    def child() -> None:  # who has not given up new privileges may not restrict what gives them
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        seccomp.restrict_self()

    assert in_child(child).errno == errno.EACCES


class _Refusing:
    """A library that writes no filter."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_: -errno.ENOMEM if name == "seccomp_export_bpf" else 0


def test_a_library_that_writes_no_filter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "library", _Refusing)
    seccomp.prepare.cache_clear()
    with pytest.raises(OSError, match="libseccomp: cannot allocate memory"):
        seccomp.restrict_self()


def test_what_stands_for_the_own_process_is_no_other_s(restricted: Callable[..., Any]) -> None:
    assert restricted(lambda: os.kill(seccomp.MYSELF, 0)).errno == errno.EPERM
