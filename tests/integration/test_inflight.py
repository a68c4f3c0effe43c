"""Buffers in flight, kept in memory that the frontend holds, through workers' and tests' deaths."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from scene import Pair, attach, boot, converse, exactly, footprint, wait_footprint
from vhost_device_console.testing import (
    DRIVER_FEATURES,
    Feature,
    Frontend,
    GuestMemory,
    NackError,
    SplitDriver,
    connect_like_cloud_hypervisor,
)
from vhost_device_console.testing.packed import make_driver
from vhost_device_console.worker.vhost_user.message import InflightArea

from launch import WITHIN

VERSION = 8  # where a queue's region has its version, and behind it its number of entries
COUNT = 10
SPLIT_ENTRIES = 16


@pytest.fixture
def frontend(pair: Pair) -> Iterator[Frontend]:
    """Give a frontend of the first guest that has agreed on features, no more."""
    with Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend:
        frontend.negotiate()
        yield frontend


@contextmanager
def mapped(frontend: Frontend) -> Iterator[mmap.mmap]:
    """Give the area's bytes."""
    assert frontend.inflight is not None
    area, fd = frontend.inflight
    with mmap.mmap(fd, area.size, offset=area.offset) as view:
        yield view


def refused(do: Callable[[], Any]) -> None:
    with pytest.raises(NackError):
        do()


@pytest.mark.parametrize("features", [DRIVER_FEATURES, DRIVER_FEATURES | Feature.RING_PACKED])
def test_an_area_for_all_queues(pair: Pair, features: int) -> None:
    """The area has a region for each queue asked for, and comes with its descriptor."""
    with Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend:
        frontend.negotiate(features)
        area = frontend.get_inflight_fd(4, 64)
        assert area.size >= 4 * 64 * 16
        assert frontend.inflight is not None
        assert os.fstat(frontend.inflight[1]).st_size >= area.size + area.offset
        with mapped(frontend) as view:
            assert bytes(view) == bytes(area.size)


@pytest.mark.parametrize(("queues", "size"), [(0, 64), (4, 0), (257, 64), (4, 0xFFFF)])
def test_an_area_that_cannot_be(frontend: Frontend, queues: int, size: int) -> None:
    """Where there can be no area, the answer has no size and no descriptor."""
    assert frontend.get_inflight_fd(queues, size) == (0, 0, queues, size)
    assert frontend.inflight is None


@pytest.mark.parametrize("packed", [False, True])
def test_a_guest_that_comes_again(pair: Pair, packed: bool) -> None:
    """With the same rings, memory and area a new connection goes on where the last one was."""
    features = DRIVER_FEATURES & ~Feature.MULTIPORT | (Feature.RING_PACKED if packed else 0)
    with (
        GuestMemory() as memory,
        Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend,
        attach(pair.daemon) as peer,
    ):
        drivers = [make_driver(memory, 8, features) for _ in range(2)]
        for turn in range(3):
            if turn:
                frontend.reconnect()
            frontend.negotiate(features)
            frontend.set_memory(memory)
            if frontend.inflight is None:
                frontend.get_inflight_fd(2, 8)
            assert frontend.inflight is not None
            frontend.set_inflight_fd(*frontend.inflight)
            queue = [frontend.start_queue(index, driver) for index, driver in enumerate(drivers)][1]
            for count in range(20):
                data = b"%d %d" % (turn, count)
                queue.driver.add([data])
                queue.notify()
                assert exactly(peer, len(data)) == data
                queue.wait()


def test_regions_say_what_they_are(pair: Pair) -> None:
    """A started queue's region has its version and its number of entries."""
    with (
        boot(pair.daemon, connect=connect_like_cloud_hypervisor) as console,
        mapped(console.frontend) as view,
    ):
        assert struct.unpack_from("<HH", view, VERSION) == (1, 256)


def damage_version(view: mmap.mmap) -> None:
    struct.pack_into("<H", view, VERSION, 7)


def damage_count(view: mmap.mmap) -> None:
    struct.pack_into("<H", view, COUNT, 0xFFFF)


def damage_all(view: mmap.mmap) -> None:
    view[:] = b"\xff" * len(view)


def damage_marks(view: mmap.mmap) -> None:
    for entry in range(256):
        view[SPLIT_ENTRIES + 16 * entry] = 1


def damage_batch(view: mmap.mmap) -> None:
    struct.pack_into("<HH", view, 12, 300, 0x7FFF)  # last_batch_head, used_idx


@pytest.mark.parametrize(
    "damage", [damage_version, damage_count, damage_all, damage_marks, damage_batch]
)
def test_an_area_that_makes_no_sense(pair: Pair, damage: Callable[[mmap.mmap], None]) -> None:
    """Whatever an area holds, the ring goes on at its used index, and the log says so."""
    with boot(pair.daemon, connect=connect_like_cloud_hypervisor) as console:
        with attach(pair.daemon) as peer:
            converse(console, peer)
        with mapped(console.frontend) as view:
            damage(view)
        console.frontend.reconnect()
        with attach(pair.daemon) as peer:
            converse(console, peer)
    pair.daemon.expect_log("what was in flight is not known")


@pytest.mark.parametrize(
    "change",
    [
        {"size": 1},
        {"offset": 1 << 62},
        {"offset": 4},
        {"queues": 0},
        {"queues": 0xFFFF},
        {"queue_size": 0},
        {"queue_size": 0xFFFF},
    ],
)
def test_an_area_that_is_not_there(frontend: Frontend, change: dict[str, int]) -> None:
    """An area that its file does not have, or that has not its queues, is refused."""
    area = frontend.get_inflight_fd(4, 64)
    assert frontend.inflight is not None
    refused(lambda: frontend.set_inflight_fd(area._replace(**change), frontend.inflight[1]))
    frontend.barrier()


def test_an_area_again_and_again(pair: Pair, frontend: Frontend) -> None:
    """An area takes the place of the one before, which is given back."""
    frontend.get_inflight_fd(4, 64)
    assert frontend.inflight is not None
    frontend.set_inflight_fd(*frontend.inflight)
    held = footprint(pair.worker)
    for _ in range(500):
        frontend.set_inflight_fd(*frontend.inflight)
    wait_footprint(pair.worker, held)
    for _ in range(100):
        frontend.get_inflight_fd(4, 64)
    wait_footprint(pair.worker, held)


def test_an_area_of_another_format(pair: Pair) -> None:
    """An area made for packed rings is of no use to split ones, which run without."""
    with Frontend(pair.daemon.sockets[0], timeout=WITHIN) as frontend, GuestMemory() as memory:
        frontend.negotiate(DRIVER_FEATURES & ~Feature.MULTIPORT | Feature.RING_PACKED)
        frontend.get_inflight_fd(2, 8)
        assert frontend.inflight is not None
        frontend.set_inflight_fd(*frontend.inflight)
        frontend.set_features(frontend.features & ~Feature.RING_PACKED)
        frontend.set_memory(memory)
        queue = [frontend.start_queue(index, SplitDriver(memory, 8)) for index in range(2)][1]
        with attach(pair.daemon) as peer:
            queue.driver.add([b"as ever"])
            queue.notify()
            assert exactly(peer, 7) == b"as ever"


def test_an_area_whose_file_shrinks(frontend: Frontend) -> None:
    """The file of an area that is in use cannot be cut short, so that nobody dies of it."""
    fd = os.memfd_create("inflight", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 1 << 16)
        frontend.set_inflight_fd(InflightArea(1 << 16, 0, 4, 64), fd)
        with suppress(OSError):
            os.ftruncate(fd, 0)
        assert os.fstat(fd).st_size == 1 << 16
        frontend.barrier()
    finally:
        os.close(fd)
