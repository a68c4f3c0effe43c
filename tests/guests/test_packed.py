"""Linux takes packed rings where a daemon offers them, which it does with --packed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from console import PROMPT, Attach, Console
from qemu import StartQemu
from uml import StartGuest

from launch import Daemon

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]


def type_and_print(console: Console) -> None:
    """Wait for a guest with packed rings, type 1 MiB and have it printed; check it both ways."""
    console.until(PROMPT)
    assert 34 in console.features()
    # Ctrl-O steers the kernel itself where the console is also printk's (hvc_poll).
    data = random.Random(1).randbytes(1 << 20).replace(b"\x0f", b"\x0e")
    console.send(b"stty raw -echo; echo 'be''gin'; head -c %d > f; sha256sum < f\n" % len(data))
    console.until(rb"begin\n")
    console.send(data)
    assert console.until(rb"  -\n") == hashlib.sha256(data).hexdigest().encode()
    console.until(PROMPT)
    console.send(b"echo 'be''gin'; cat f\n")
    console.until(rb"begin\n")
    assert hashlib.sha256(console.take(len(data))).digest() == hashlib.sha256(data).digest()
    console.until(PROMPT)


def test_1_mib_goes_both_ways_in_user_mode_linux(
    kernel: Path, daemon: Callable[..., Daemon], attach: Attach, boot: StartGuest
) -> None:
    started = daemon("unix", 1, "--packed")
    console = attach(started.data[0])
    boot(kernel, started.sockets[0])
    type_and_print(console)


def test_1_mib_goes_both_ways_in_qemu(
    daemon: Callable[..., Daemon], attach: Attach, boot_qemu: StartQemu
) -> None:
    started = daemon("unix", 1, "--packed")
    console = attach(started.data[0])
    boot_qemu(started.sockets[0])
    type_and_print(console)
