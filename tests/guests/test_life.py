"""Guests come and go; the daemon and whoever is attached stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import uml
from console import PROMPT, Attach, Place
from uml import StartGuest

from launch import Daemon

pytestmark = pytest.mark.guest


def test_a_client_stays_while_the_guest_reboots(
    kernel: Path, place: Place, boot: StartGuest
) -> None:
    daemon, console = place("network")
    guest = boot(kernel, daemon.sockets[0])
    console.until(PROMPT)
    console.send(b"reboot -f\n")
    console.until(rb"Linux version")
    console.until(PROMPT)
    console.run(b"true")
    assert guest.process.poll() is None


def test_a_client_stays_while_a_killed_guest_is_replaced(
    kernel: Path, place: Place, boot: StartGuest
) -> None:
    daemon, console = place("network")
    first = boot(kernel, daemon.sockets[0])
    console.until(PROMPT)
    console.send(b"yes $$ | head -c 100000; yes the first one\n")
    console.until(rb"the first one\r\n")
    first.kill()
    boot(kernel, daemon.sockets[0])
    console.until(rb"Linux version")
    console.until(PROMPT)
    assert console.run(b"cat /proc/sys/kernel/ostype") == b"Linux\r\n"


def test_a_guest_in_the_middle_of_a_paste_can_be_killed(
    a_kernel: Path, place: Place, boot: StartGuest
) -> None:
    daemon, console = place("network")
    first = boot(a_kernel, daemon.sockets[0])
    console.until(PROMPT)
    console.send(b"stty raw -echo; echo 'be''gin'; sleep 1000\n")
    console.until(rb"begin\n")
    console.send(b"\n" * (1 << 15))
    first.kill()
    boot(a_kernel, daemon.sockets[0])
    console.until(rb"Linux version")
    console.until(PROMPT)
    console.run(b"true")


@pytest.mark.usefixtures("a_kernel")
def test_8_guests_on_one_daemon_each_have_their_own_traffic(
    daemon: Callable[..., Daemon], attach: Attach, boot: StartGuest
) -> None:
    started = daemon("network", 8)
    assert started.tcp is not None
    consoles = [attach(started.tcp + index) for index in range(8)]
    for index, socket in enumerate(started.sockets):
        boot(uml.KERNELS[index % len(uml.KERNELS)], socket)
    for index, console in enumerate(consoles):
        console.until(PROMPT)
        console.send(
            b"stty raw; i=%d; echo 'be''gin'; seq 5000 | sed s,^,$i-, > f; cat f\n" % index
        )
    for index, console in enumerate(consoles):
        console.until(rb"begin\n")
        expected = b"".join(b"%d-%d\n" % (index, number) for number in range(1, 5001))
        assert console.take(len(expected)) == expected
