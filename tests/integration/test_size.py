"""The size of a console: whose it is, and how the guest hears of it."""

from __future__ import annotations

import os
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from scene import boot, wait_port
from vhost_device_console import monitor
from vhost_device_console.testing import ConsoleDriver, Feature, connect_like_uml
from vhost_device_console.testing.features import DRIVER_FEATURES

from conftest import StartDaemon
from launch import Daemon


def resize(daemon: Daemon, columns: int, rows: int, port: str = "0") -> None:
    """Give a port of the first guest a size, as the command does."""
    monitor.change(daemon.monitor, monitor.Resize("c.sock0", port, columns, rows))


def config_size(console: ConsoleDriver) -> tuple[int, ...]:
    """Return columns and rows as the configuration space has them."""
    return struct.unpack("<HH", console.frontend.get_config(0, 4))


def wait_size(console: ConsoleDriver, size: tuple[int, int]) -> None:
    """Wait until port 0 was told this size last."""
    console.wait_until(lambda: console.port.size == size, f"a size of {size}")


@contextmanager
def terminal(daemon: StartDaemon, size: tuple[int, int]) -> Iterator[tuple[Daemon, int]]:
    """Give a daemon at a terminal of that size, and the terminal's controlling side."""
    ours, theirs = os.openpty()
    try:
        termios.tcsetwinsize(ours, size[::-1])
        yield daemon("nested", stdin=theirs, stdout=theirs), ours
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_guest_is_told_the_terminal_s_size(daemon: StartDaemon) -> None:
    with terminal(daemon, (132, 43)) as (started, _), boot(started) as console:
        wait_size(console, (132, 43))
        assert config_size(console) == (132, 43)


def test_a_guest_is_told_when_the_terminal_changes_its_size(daemon: StartDaemon) -> None:
    with terminal(daemon, (80, 25)) as (started, ours), boot(started) as console:
        wait_size(console, (80, 25))
        termios.tcsetwinsize(ours, (50, 200))
        os.kill(started.workers()[0], 28)  # SIGWINCH: the terminal is not the worker's own
        wait_size(console, (200, 50))


def test_a_guest_of_old_linux_is_told_rows_first(daemon: StartDaemon) -> None:
    started = daemon("unix", 1, "--resize-order", "linux-legacy")
    with boot(started) as console:
        resize(started, 132, 43)
        wait_size(console, (43, 132))
        assert config_size(console) == (132, 43)


def test_the_command_decides_until_it_gives_the_decision_back(daemon: StartDaemon) -> None:
    with terminal(daemon, (80, 25)) as (started, ours), boot(started) as console:
        resize(started, 100, 30)
        wait_size(console, (100, 30))
        os.write(ours, b"x")
        wait_port(started, input=1, columns=100, rows=30, size_by="resize")
        resize(started, 0, 0)
        wait_size(console, (80, 25))
        wait_port(started, columns=80, rows=25, size_by="terminal")


def test_a_pty_s_size_is_what_its_user_set_it_to(daemon: StartDaemon) -> None:
    started = daemon("pty")
    slave = os.open(started.expect_out(r"/dev/pts/\d+").group(), os.O_RDWR | os.O_NOCTTY)
    try:
        with boot(started) as console:
            wait_port(started, readers=1)
            termios.tcsetwinsize(slave, (43, 132))
            os.write(slave, b"x")
            wait_size(console, (132, 43))
    finally:
        os.close(slave)


def test_a_guest_without_the_feature_is_told_no_size(daemon: StartDaemon) -> None:
    started = daemon("unix")
    with boot(started, features=DRIVER_FEATURES & ~Feature.SIZE) as console:
        resize(started, 132, 43)
        wait_port(started, columns=132)
        console.send_control(0, 6, 1)
        console.pump()
        assert console.port.size is None


def test_a_guest_that_boots_later_is_told_the_last_size(daemon: StartDaemon) -> None:
    started = daemon("unix")
    resize(started, 132, 43)
    for _ in range(2):
        with boot(started) as console:
            wait_size(console, (132, 43))


@pytest.mark.parametrize("connect", [None, connect_like_uml])
def test_a_single_port_guest_hears_that_its_configuration_changed(
    daemon: StartDaemon, connect: object
) -> None:
    started = daemon("unix")
    options = {} if connect is None else {"connect": connect}
    with boot(
        started, queue_count=2, features=DRIVER_FEATURES & ~Feature.MULTIPORT, **options
    ) as console:
        assert config_size(console) == (0, 0)
        resize(started, 132, 43)
        console.frontend.recv_backend()
        assert console.frontend.config_changes == 1
        assert config_size(console) == (132, 43)


def test_each_console_has_a_size_of_its_own(daemon: StartDaemon) -> None:
    folder_port = "name=second,backend=pty,console"
    started = daemon("unix", 1, "--port", folder_port)
    with boot(started, queue_count=6) as console:
        console.wait_until(lambda: len(console.ports) == 2, "both ports")
        resize(started, 100, 30)
        resize(started, 120, 40, "second")
        wait_size(console, (100, 30))
        console.wait_until(lambda: console.ports[1].size == (120, 40), "the second size")


def test_a_thousand_sizes_leave_the_last_one(daemon: StartDaemon) -> None:
    started = daemon("unix")
    with boot(started) as console:
        for columns in range(1, 301):
            resize(started, columns, 25)
        wait_size(console, (300, 25))


def test_an_unknown_size_is_said_to_nobody(daemon: StartDaemon) -> None:
    with boot(daemon("unix")) as console:
        assert config_size(console) == (0, 0)
        assert console.port.size is None
