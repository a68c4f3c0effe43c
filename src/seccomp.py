"""The system calls of a worker or a gateway: those on a list, by a filter that libseccomp writes.

The library is called by its C functions, as its Python bindings do: it is on nearly every Linux,
since systemd needs it, and they are not. Source: seccomp_init(3) and the pages it names.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import termios
from collections.abc import Iterator
from functools import cache

from .kernel import system_call

_LIBRARY = "libseccomp.so.2"

# seccomp.h
_UNKNOWN = -1  # __NR_SCMP_ERROR
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000  # with an errno
_KILL = 0x80000000  # the process, by SIGSYS
_BAD_ARCH = 2
_OPTIMIZE = 8
_BY_TREE = 2
_MASKED_EQUAL = 7

# linux/seccomp.h
_SET_FILTER = 1  # SECCOMP_SET_MODE_FILTER
_KEEP_SPECULATING = 4  # Linux before 5.16 would otherwise slow the whole process down

#: An instruction of the filter (struct sock_filter), and all that there can be.
_INSTRUCTION = struct.Struct("=HBBI")
_LARGEST = 4096 * _INSTRUCTION.size

#: No process has this number (PID_MAX_LIMIT is 1 << 22), nor is it a system call or an argument.
MYSELF = 0x4D594944

_LOW = (1 << 32) - 1  # what the kernel looks at of these arguments
_PROT_EXEC = 4
_AT_EMPTY_PATH = 0x1000
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034  # linux/fcntl.h

#: What a worker does all day.
_ALLOWED = """
    read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek
    recvfrom recvmsg sendto sendmsg shutdown getsockopt setsockopt getsockname getpeername
    close close_range dup dup2 dup3 pipe2 eventfd2 memfd_create ftruncate fallocate fstat
    epoll_create1 epoll_ctl epoll_wait epoll_pwait poll ppoll select pselect6
    inotify_init1 inotify_add_watch inotify_rm_watch
    munmap mremap madvise brk
    futex sched_yield sched_getaffinity
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
    getpid gettid getppid getuid geteuid getgid getegid getrandom
    exit exit_group
"""

#: What a gateway does besides; which files it can open is Landlock's to say.
_NETWORK = "socket socketpair bind listen connect accept accept4 openat"

#: What only somebody who has taken the worker over would try. Anything else is merely refused.
_HOSTILE = """
    execve execveat fork vfork clone clone3
    ptrace process_vm_readv process_vm_writev pidfd_getfd process_madvise kcmp
    socket bind connect listen
    setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid capset
    mount umount2 move_mount open_tree fsopen pivot_root chroot unshare setns
    init_module finit_module delete_module kexec_load kexec_file_load reboot
    bpf io_uring_setup io_uring_enter io_uring_register perf_event_open userfaultfd
    add_key request_key keyctl
"""

#: Sizes, counts and modes; none that types into a terminal or takes one.
_REQUESTS = (
    termios.TCGETS,
    termios.TCSETS,
    termios.TCSETSW,
    termios.TCSETSF,
    termios.TCFLSH,
    termios.TCSBRK,
    termios.TIOCGWINSZ,
    termios.TIOCSWINSZ,
    termios.TIOCPKT,
    termios.TIOCOUTQ,
    termios.FIONREAD,
    termios.FIONBIO,
    termios.FIOCLEX,
    termios.FIONCLEX,
    0x80045430,  # TIOCGPTN
    0x802C542A,  # TCGETS2, by which newer C libraries get them
    0x402C542B,
    0x402C542C,
    0x402C542D,
)

_COMMANDS = (
    fcntl.F_GETFD,
    fcntl.F_SETFD,
    fcntl.F_GETFL,
    fcntl.F_SETFL,
    fcntl.F_DUPFD_CLOEXEC,
    _F_ADD_SEALS,
    _F_GET_SEALS,
)


class _If(ctypes.Structure):
    """struct scmp_arg_cmp: what an argument has to be."""

    _fields_ = [
        ("argument", ctypes.c_uint),
        ("how", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    ]


class Filter:
    """The instructions of a filter, in which `MYSELF` stands for the process that loads them."""

    def __init__(self, instructions: bytes, number: int) -> None:
        self._number = number
        self._text = bytearray(instructions)
        each = enumerate(_INSTRUCTION.iter_unpack(instructions))
        self._me = [at * _INSTRUCTION.size + 4 for at, (*_, value) in each if value == MYSELF]
        self._pin = ctypes.c_char.from_buffer(self._text)  # struct sock_fprog has their address
        count = len(instructions) // _INSTRUCTION.size
        self._program = struct.pack("@HP", count, ctypes.addressof(self._pin))

    def load(self) -> None:
        """Have the kernel use it for this process; raises OSError."""
        for at in self._me:
            struct.pack_into("=I", self._text, at, os.getpid())
        program = ctypes.c_char.from_buffer(bytearray(self._program))
        system_call(self._number, _SET_FILTER, _KEEP_SPECULATING, ctypes.addressof(program))


def _has(argument: int, value: int, mask: int = _LOW) -> _If:
    return _If(argument, _MASKED_EQUAL, mask, value)


def _rules(network: bool) -> Iterator[tuple[int, str, list[_If]]]:
    """Yield what is done about a system call whose arguments are so."""
    allowed = {*_ALLOWED.split(), *(_NETWORK.split() if network else ())}
    for name in sorted(allowed):
        yield _ALLOW, name, []
    for name in sorted({*_HOSTILE.split()} - allowed):
        yield _KILL, name, []
    for name in ("mmap", "mprotect"):
        yield _ALLOW, name, [_has(2, 0, _PROT_EXEC)]
    for name, flags in (("newfstatat", 3), ("statx", 2)):  # of a descriptor, as fstat(3) asks
        yield _ALLOW, name, [_has(flags, _AT_EMPTY_PATH, _AT_EMPTY_PATH)]
    for request in _REQUESTS:
        yield _ALLOW, "ioctl", [_has(1, request)]
    for command in _COMMANDS:
        yield _ALLOW, "fcntl", [_has(1, command)]
    for name in ("kill", "tgkill"):  # abort(3)
        yield _ALLOW, name, [_has(0, MYSELF)]


@cache
def library() -> ctypes.CDLL:
    """Return libseccomp. Raises OSError, with a line for people, where there is none."""
    try:
        found = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise OSError(errno.ENOENT, f"{_LIBRARY} is not installed") from error
    found.seccomp_init.restype = ctypes.c_void_p
    return found


@cache
def prepare(network: bool) -> Filter:
    """Return what `restrict_self` loads. Raises OSError, with a line for people.

    Writing a filter takes ten times as long as loading it, and memory that each worker would keep.
    """
    found = library()
    context = ctypes.c_void_p(found.seccomp_init(_REFUSE | errno.EPERM))
    file = os.memfd_create("seccomp")
    try:
        _check(found.seccomp_attr_set(context, _BAD_ARCH, ctypes.c_uint32(_KILL)))
        # From libseccomp 2.5 on; before it they are looked for one by one.
        found.seccomp_attr_set(context, _OPTIMIZE, ctypes.c_uint32(_BY_TREE))
        for action, name, conditions in _rules(network):
            number = found.seccomp_syscall_resolve_name(name.encode())
            if number == _UNKNOWN:  # newer than the library
                continue
            _check(
                found.seccomp_rule_add_array(
                    context,
                    ctypes.c_uint32(action),
                    number,
                    len(conditions),
                    (_If * len(conditions))(*conditions),
                )
            )
        _check(found.seccomp_export_bpf(context, file))
        return Filter(os.pread(file, _LARGEST, 0), found.seccomp_syscall_resolve_name(b"seccomp"))
    finally:
        os.close(file)
        found.seccomp_release(context)


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, f"libseccomp: {os.strerror(-result).lower()}")


def restrict_self(*, network: bool = False) -> None:
    """Be left with the system calls of a worker, for ever; with `network`, of a gateway.

    What is not listed fails with EPERM, and what only an intruder would try kills the process
    (SIGSYS). The process must have no_new_privs. Raises OSError, with a line for people, where it
    cannot be had.
    """
    prepare(network).load()
