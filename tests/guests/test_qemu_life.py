"""QEMU's guests come and go; the daemon and whoever is attached stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from console import PROMPT, Attach, Place
from qemu import StartQemu

from launch import Daemon

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]


def test_a_client_stays_while_a_killed_guest_is_replaced(
    place: Place, boot_qemu: StartQemu
) -> None:
    daemon, console = place("network")
    first = boot_qemu(daemon.sockets[0])
    console.until(PROMPT)
    console.send(b"yes $$ | head -c 100000; yes the first one\n")
    console.until(rb"the first one\r\n")
    first.kill()
    boot_qemu(daemon.sockets[0])
    console.until(rb"Linux version")
    console.until(PROMPT)
    assert console.run(b"cat /proc/sys/kernel/ostype") == b"Linux\r\n"


def test_4_guests_boot_at_once_on_one_daemon_and_power_off(
    daemon: Callable[..., Daemon], attach: Attach, boot_qemu: StartQemu
) -> None:
    started = daemon("network", 4)
    assert started.tcp is not None
    consoles = [attach(started.tcp + index) for index in range(4)]
    guests = [boot_qemu(socket) for socket in started.sockets]
    for index, console in enumerate(consoles):
        console.until(PROMPT)
        console.send(
            b"stty raw; i=%d; echo 'be''gin'; seq 5000 | sed s,^,$i-, > f; cat f; exit\n" % index
        )
    for index, console in enumerate(consoles):
        console.until(rb"begin\n")
        expected = b"".join(b"%d-%d\n" % (index, number) for number in range(1, 5001))
        assert console.take(len(expected)) == expected
    assert [guest.wait() for guest in guests] == [0, 0, 0, 0]
