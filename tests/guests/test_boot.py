"""A real guest starts, and what it says while it does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from console import BACKENDS, PROMPT, Attach, Place
from uml import StartGuest

from launch import Daemon

pytestmark = pytest.mark.guest


def test_boots_to_a_shell_that_answers(kernel: Path, place: Place, boot: StartGuest) -> None:
    daemon, console = place("network")
    guest = boot(kernel, daemon.sockets[0])
    console.until(PROMPT)
    assert console.run(b"tty") == b"/dev/hvc0\r\n"
    console.send(b"exit\n")
    assert guest.wait() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_leads_to_the_shell(
    a_kernel: Path, backend: str, place: Place, boot: StartGuest
) -> None:
    daemon, console = place(backend)
    guest = boot(a_kernel, daemon.sockets[0])
    console.until(PROMPT)
    console.run(b"true")
    console.send(b"poweroff -f\n")
    assert guest.wait() == 0


def test_someone_who_comes_late_reads_the_boot_log_from_its_first_byte(
    kernel: Path, daemon: Callable[..., Daemon], attach: Attach, boot: StartGuest
) -> None:
    started = daemon("unix")
    guest = boot(kernel, started.sockets[0], run="echo the end; poweroff -f")
    assert guest.wait() == 0
    late = attach(started.data[0]).until(rb"the end\r\n").splitlines()
    assert late[0].startswith(b"Linux version ")
    # The kernel said the same to its standard output, but for its debug messages.
    log = guest.expect_log(rb"Linux version (?s:.*)\nRun /init as init process\n")[0].splitlines()
    place = iter(late)
    assert all(line in place for line in log), "lines are missing or out of order"


@pytest.mark.parametrize("gap", [0, 0.003], ids=["0 ms", "3 ms"])
def test_what_is_typed_before_the_guest_is_there_is_not_lost(
    a_kernel: Path, gap: float, place: Place, boot: StartGuest
) -> None:
    daemon, console = place("unix")
    console.type(b"echo $((6 * 7)) answers\n", gap)
    boot(a_kernel, daemon.sockets[0])
    assert re.search(rb"\nguest# .*", console.until(rb"42 answers\r\n"))
