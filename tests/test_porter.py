"""The porter believes a worker's commits only as far as they can be true."""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Iterator
from typing import cast

import pytest
from vhost_device_console import custody
from vhost_device_console.admission import Door
from vhost_device_console.alarms import Alarms
from vhost_device_console.config import Access
from vhost_device_console.custody import Commit, FrontendCame, FrontendSaid
from vhost_device_console.endpoints import Endpoints
from vhost_device_console.porter import Line, Porter
from vhost_device_console.worker.vhost_user import message as wire


class _Endpoints:
    """A frontend that is connected already."""

    def __init__(self, frontend: int) -> None:
        self.frontend = frontend
        self.door = Door("test", Access())

    def listening(self) -> bool:
        return False


class Scene:
    """A porter whose frontend has said something with one descriptor, which is not dealt with."""

    def __init__(self, selector: selectors.BaseSelector, frontend: socket.socket, end: int) -> None:
        self.selector = selector
        self.porter = Porter(
            "test", cast(Endpoints, _Endpoints(end)), selector, Alarms(), lambda: None
        )
        self.line, self.worker = self.begin()
        assert isinstance(self.order(), FrontendCame)
        fd = os.eventfd(0)
        socket.send_fds(frontend, [wire.encode(1)], [fd])
        os.close(fd)
        self.porter.committed(Commit(serial=1, newest=0, snapshot=b"", keys=[]), [])
        said = self.order()
        assert isinstance(said, FrontendSaid)
        (self.key,) = said.keys

    def begin(self) -> tuple[Line, socket.socket]:
        ours, theirs = custody.pair()
        line = Line(self.selector, ours, lambda: None)
        self.porter.begin(line)
        return line, theirs

    def order(self) -> custody.Order:
        received = custody.receive_order(self.worker)
        assert received is not None
        order, fds = received
        custody.close(fds)
        return order

    def die(self) -> None:
        self.line.close()
        self.worker.close()
        self.porter.end()


@pytest.fixture
def scene() -> Iterator[Scene]:
    frontend, theirs = socket.socketpair()
    with frontend, theirs, selectors.DefaultSelector() as selector:
        made = Scene(selector, frontend, theirs.fileno())
        yield made
        made.die()
        made.porter.close()


def test_a_message_is_kept_with_its_descriptors_until_it_is_dealt_with(scene: Scene) -> None:
    """Even if a worker commits that it has them and needs none of them."""
    scene.porter.committed(Commit(serial=1, newest=scene.key, snapshot=b"", keys=[]), [])
    scene.die()
    scene.line, scene.worker = scene.begin()
    again = scene.order()
    assert isinstance(again, FrontendSaid)
    assert again.keys == [scene.key]


@pytest.mark.parametrize(
    "commit",
    [
        Commit(serial=3, newest=1, snapshot=b"", keys=[]),
        Commit(serial=0, newest=1, snapshot=b"", keys=[]),
        Commit(serial=2, newest=2, snapshot=b"", keys=[]),
        Commit(serial=2, newest=-1, snapshot=b"", keys=[]),
        Commit(serial=2, newest=1, snapshot=b"", keys=[], made=[1]),
        Commit(serial=2, newest=1, snapshot=b"", keys=[], made=[-1, -2]),
    ],
    ids=["later", "earlier", "a key to come", "a key gone by", "a key not its own", "too few"],
)
def test_a_commit_that_cannot_be_is_a_value_error(scene: Scene, commit: Commit) -> None:
    """Whatever came along is closed, as after every test."""
    with pytest.raises(ValueError, match="a commit of what never was"):
        scene.porter.committed(commit, [os.eventfd(0)])
    assert (scene.porter.serial, scene.porter.newest) == (1, 0)
