"""The emergency write: a byte of output before, while and after a driver runs."""

from __future__ import annotations

import struct

import pytest
from scene import attach, boot, exactly, wait_port
from vhost_device_console.testing import Feature, Frontend

from conftest import StartDaemon
from launch import WITHIN


def test_it_is_offered(daemon: StartDaemon) -> None:
    with Frontend(daemon("unix").sockets[0], timeout=WITHIN) as frontend:
        assert frontend.get_features() & Feature.EMERG_WRITE


def test_it_works_before_anything_was_negotiated_but_the_configuration(
    daemon: StartDaemon,
) -> None:
    started = daemon("unix")
    with attach(started) as peer, Frontend(started.sockets[0], timeout=WITHIN) as frontend:
        frontend.negotiate(features=0)
        for byte in b"panic":
            frontend.set_config(8, struct.pack("<I", byte))
        assert exactly(peer, 5) == b"panic"


def test_it_works_beside_a_driver(daemon: StartDaemon) -> None:
    started = daemon("unix")
    with boot(started) as console, attach(started) as peer:
        console.write(b"a")
        console.frontend.set_config(8, b"b\0\0\0")
        console.write(b"c")
        assert exactly(peer, 3) == b"abc"


def test_only_its_low_byte_counts(daemon: StartDaemon) -> None:
    started = daemon("unix")
    with boot(started) as console, attach(started) as peer:
        console.frontend.set_config(8, b"xyz!")
        console.write(b"|")
        assert exactly(peer, 2) == b"x|"


def test_a_frontend_that_writes_the_whole_space_repeats_nothing(daemon: StartDaemon) -> None:
    """QEMU reads the space and writes all of it back, with the guest's byte or without."""
    started = daemon("unix")
    with boot(started) as console, attach(started) as peer:
        space = console.frontend.get_config(0, 12)
        console.frontend.set_config(0, space)
        console.frontend.set_config(0, space[:8] + b"A\0\0\0")
        console.frontend.set_config(0, b"\x01" + space[1:8] + b"A\0\0\0")
        console.write(b"|")
        assert exactly(peer, 2) == b"A|"


def test_a_migration_s_write_is_none(daemon: StartDaemon) -> None:
    started = daemon("unix")
    with boot(started) as console, attach(started) as peer:
        console.frontend.set_config(8, b"A\0\0\0", flags=1)
        console.write(b"|")
        assert exactly(peer, 1) == b"|"


@pytest.mark.parametrize("queues", [0, 4])
def test_it_is_kept_for_who_comes_later(daemon: StartDaemon, queues: int) -> None:
    started = daemon("unix")
    with Frontend(started.sockets[0], timeout=WITHIN) as frontend:
        frontend.negotiate(features=0)
        for _ in range(queues + 1):
            frontend.set_config(8, b"!")
        wait_port(started, output=queues + 1)
    with attach(started) as peer:
        assert exactly(peer, queues + 1) == b"!" * (queues + 1)
