"""A worker's death is invisible: frontends and clients stay, and every byte arrives once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import pytest
from scene import assert_same, attach, boot, converse, exactly, noise
from vhost_device_console.testing import DRIVER_FEATURES
from vhost_device_console.testing.features import Feature

from launch import Daemon

#: The command, without the pauses between restarts.
HASTY = "from vhost_device_console import cli, supervision; supervision.delay = lambda _: 0.0; "
PROGRAM = [sys.executable, "-c", f"{HASTY}cli.main()"]

FORMATS = pytest.mark.parametrize(
    "features",
    [DRIVER_FEATURES, DRIVER_FEATURES | Feature.RING_PACKED, DRIVER_FEATURES & ~Feature.EVENT_IDX],
    ids=["split", "packed", "flags"],
)


@pytest.fixture(params=["network", "unix"])
def served(request: pytest.FixtureRequest, daemon: Callable[..., Daemon]) -> Daemon:
    """Give a daemon that restarts its workers at once."""
    return daemon(request.param, 1, "--packed", program=PROGRAM)


@FORMATS
def test_a_session_goes_on(served: Daemon, features: Feature) -> None:
    with attach(served) as peer, boot(served, features=features) as console:
        for _ in range(5):
            converse(console, peer)
            served.kill_worker()
        converse(console, peer)


@FORMATS
def test_nothing_is_lost_or_doubled_under_load(
    daemon: Callable[..., Daemon], features: Feature
) -> None:
    """TCP tells how much went out; a unix socket does not, and may get its last write twice."""
    served = daemon("network", 1, "--packed", program=PROGRAM)
    data = noise(4 << 20)
    with attach(served) as peer, boot(served, features=features) as console:
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(exactly(peer, len(data))))
        sender = threading.Thread(target=peer.sendall, args=[data])
        reader.start()
        sender.start()
        for at in range(0, len(data), 1 << 18):
            console.write(data[at : at + (1 << 18)])
            served.kill_worker()
        back = console.read(len(data))
        reader.join()
        sender.join()
    assert_same(got[0], data)
    assert_same(back, data)
