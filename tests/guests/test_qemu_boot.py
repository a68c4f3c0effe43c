"""QEMU's guests start, and all that the UML guests show holds for them."""

from __future__ import annotations

import pytest
from console import PROMPT, Place
from qemu import StartQemu

pytestmark = pytest.mark.guest


def test_boots_to_a_shell_that_answers(place: Place, boot_qemu: StartQemu) -> None:
    daemon, console = place("network")
    guest = boot_qemu(daemon.sockets[0])
    console.until(PROMPT)
    assert console.run(b"tty") == b"/dev/hvc0\r\n"
    print(
        console.run(
            b"cat /sys/bus/virtio/devices/virtio0/features; ls -la /dev/virtio-ports; ls /sys/class/virtio-ports /sys/power; cat /sys/power/state /sys/power/mem_sleep"
        )
    )
    console.send(b"exit\n")
    assert guest.wait() == 0
