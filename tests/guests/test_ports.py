"""Ports, sizes and what else a console can have, as real kernels of several versions see them."""

from __future__ import annotations

import hashlib
import os
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from console import PROMPT, Attach, Console, Place
from uml import StartGuest

from launch import COMMAND, Daemon, command

pytestmark = pytest.mark.guest


def port(folder: Path, name: str) -> tuple[str, str]:
    """Return options for a port with a unix socket for people, `folder`/NAME0."""
    return "--port", f"name={name},backend=unix,path={folder}/{name}"


def manage(folder: Path, *arguments: str) -> None:
    """Run the daemon's command line; it must succeed."""
    done = command(folder, *arguments)
    assert done.returncode == 0, done


def see_size(console: Console, columns: int, rows: int) -> None:
    console.run(b'until [ "$(stty size)" = "%d %d" ]; do :; done' % (rows, columns))


def test_every_kernel_takes_31_ports(
    folder: Path, kernel: Path, daemon: Callable[..., Daemon], attach: Attach, boot: StartGuest
) -> None:
    names = [f"port{number}" for number in range(1, 31)]
    options = [option for name in names for option in port(folder, name)]
    started = daemon("unix", 1, *options)
    console = attach(started.data[0])
    last = attach(f"{folder}/port300")
    boot(kernel, started.sockets[0])
    console.until(PROMPT)
    seen = console.run(b"cat /sys/class/virtio-ports/*/name").decode().split()
    assert sorted(seen) == sorted(["console0", *names])
    console.run(b"echo from the last > /dev/virtio-ports/port30")
    assert last.until(rb"\n") == b"from the last"


def test_every_kernel_takes_the_features_that_the_document_says(
    kernel: Path, place: Place, boot: StartGuest
) -> None:
    """docs/offered.md; 7.2 knows of IN_ORDER, the others do not. See also test_packed.py."""
    daemon, console = place("unix")
    boot(kernel, daemon.sockets[0])
    console.until(PROMPT)
    assert console.features() == {0, 1, 28, 29, 32} | ({35} if kernel.name == "sid" else set())


def test_a_new_size_reaches_every_kernel(
    folder: Path, kernel: Path, daemon: Callable[..., Daemon], attach: Attach, boot: StartGuest
) -> None:
    started = daemon("unix")
    console = attach(started.data[0])
    boot(kernel, started.sockets[0])
    console.until(PROMPT)
    for columns, rows in ((132, 43), (80, 24)):
        manage(folder, "resize", started.status()[0]["name"], f"{columns}x{rows}")
        see_size(console, columns, rows)


def test_the_other_order_exchanges_the_numbers(
    folder: Path, a_kernel: Path, daemon: Callable[..., Daemon], attach: Attach, boot: StartGuest
) -> None:
    # Linux reads the columns first since 6.15, and in the stable versions that took the change.
    started = daemon("unix", 1, "--resize-order", "linux-legacy")
    console = attach(started.data[0])
    boot(a_kernel, started.sockets[0])
    console.until(PROMPT)
    manage(folder, "resize", started.status()[0]["name"], "132x43")
    see_size(console, 43, 132)


def test_the_guest_has_the_size_of_the_terminal_it_is_on(
    kernel: Path, daemon: Callable[..., Daemon], boot: StartGuest
) -> None:
    ours, theirs = os.openpty()
    try:
        termios.tcsetwinsize(theirs, (33, 111))
        started = daemon(
            "nested",
            1,
            program=("setsid", "--ctty", *COMMAND),  # for SIGWINCH
            stdin=theirs,
            stdout=theirs,
        )
        console = Console(ours)
        boot(kernel, started.sockets[0])
        console.until(PROMPT)
        see_size(console, 111, 33)
        termios.tcsetwinsize(ours, (44, 122))
        see_size(console, 122, 44)
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_port_comes_and_goes_while_the_guest_runs(
    folder: Path, kernel: Path, daemon: Callable[..., Daemon], attach: Attach, boot: StartGuest
) -> None:
    started = daemon("unix", 1, "--max-ports", "3")
    console = attach(started.data[0])
    boot(kernel, started.sockets[0])
    console.until(PROMPT)
    name = started.status()[0]["name"]
    for _ in range(2):
        manage(folder, "port", "add", name, f"name=later,backend=unix,path={folder}/later")
        later = attach(f"{folder}/later")
        console.run(b"until [ -e /dev/virtio-ports/later ]; do usleep 1000; done")
        console.send(b"cat /dev/virtio-ports/later\n")
        later.send(b"there\n")
        console.until(rb"\nthere\r\n")
        manage(folder, "port", "remove", name, "later")
        console.until(PROMPT)
        console.run(b"while grep -qx later /sys/class/virtio-ports/*/name; do usleep 1000; done")


def test_the_console_goes_on_after_its_driver_was_taken_away(
    kernel: Path, place: Place, boot: StartGuest
) -> None:
    daemon, console = place("unix")
    boot(kernel, daemon.sockets[0])
    console.until(PROMPT)
    # The shell loses its terminal with the driver, and init starts another. Nobody else may hold
    # the old one by then: Linux hands the new shell's input to no one while it is being let go.
    console.run(b"touch /respawn")
    drivers = b"/sys/bus/virtio/drivers/virtio_console"
    again = b"setsid sh -c 'cd %s; echo virtio0 > unbind; echo virtio0 > bind'" % drivers
    console.send(b"%s </dev/null >/dev/null 2>&1 &\n" % again)
    console.until(rb"Linux version")
    console.until(PROMPT)
    console.run(b"true")


def test_a_guest_can_notify_by_messages_alone(
    kernel: Path, daemon: Callable[..., Daemon], attach: Attach, boot: StartGuest
) -> None:
    started = daemon("unix", 1, "--inband")
    console = attach(started.data[0])
    boot(kernel, started.sockets[0])
    console.until(PROMPT)
    console.run(b"seq 50000 > f; stty raw")
    console.send(b"echo 'be''gin'; cat f\n")
    console.until(rb"begin\n")
    expected = b"".join(b"%d\n" % number for number in range(1, 50001))
    assert console.take(len(expected)) == expected


def test_100_mib_pass_through_a_blocking_port_whose_reader_pauses(
    folder: Path, a_kernel: Path, daemon: Callable[..., Daemon], attach: Attach, boot: StartGuest
) -> None:
    started = daemon("unix", 1, *port(folder, "data"))
    console = attach(started.data[0])
    data = attach(f"{folder}/data0")
    boot(a_kernel, started.sockets[0])
    console.until(PROMPT)
    console.run(b"dd if=/dev/urandom of=f bs=65536 count=16 2> /dev/null")
    console.run(b"all() { for i in $(seq 100); do echo $i; cat f; done; }")
    expected = console.run(b"all | sha256sum").split()[0].decode()
    console.run(b"{ all > /dev/virtio-ports/data & }")

    digest, taken = hashlib.sha256(), 0
    total = (100 << 20) + sum(len(f"{number}\n") for number in range(1, 101))
    for pause in range(1, 11):
        # The guest writes on while nobody reads, until there is no room.
        full = min(total, taken + (1 << 20))
        started.until(
            lambda guests, full=full: guests[0]["ports"][1]["output"] >= full, f"no {full} bytes"
        )
        while taken < total * pause // 10:
            piece = data.take(min(1 << 20, total - taken))
            digest.update(piece)
            taken += len(piece)
    assert digest.hexdigest() == expected
    console.run(b"wait")
    assert started.status()[0]["ports"][1]["missed"] == 0
