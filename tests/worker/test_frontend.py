"""A successor is told again of all that was not dealt with to its end."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
from vhost_device_console.custody import FrontendCame, FrontendGone, FrontendSaid
from vhost_device_console.health import Health
from vhost_device_console.worker.frontend import Frontend
from vhost_device_console.worker.inheritance import Held
from vhost_device_console.worker.vhost_user import message as wire
from vhost_device_console.worker.vhost_user import session as fx
from vhost_device_console.worker.vhost_user.message import ProtocolFeature, Request

_REGION = wire.encode_regions([wire.Region(0, 4096, 0, 0)])


class Worker:
    """A worker that commits while it carries out an effect, and while its frontend goes.

    `commits` has of each (serial, newest key, whether there is a frontend, dismissed).
    """

    def __init__(self) -> None:
        self.commits: list[tuple[int, int, bool, bool]] = []
        log = logging.LoggerAdapter(logging.getLogger("test"), {})
        self.frontend = Frontend(
            6,
            Health(),
            log,
            begin=lambda: fx.Session(0, 4, 256),
            apply=lambda _: self.commit(),
            gone=self.commit,
            commit=self.commit,
        )
        self.frontend.came(FrontendCame(7, 1))
        self.say(8, Request.SET_PROTOCOL_FEATURES, wire.encode_u64(ProtocolFeature.REPLY_ACK))
        self.commits.clear()

    def commit(self, *_: Any, dismiss: bool = False) -> None:
        frontend = self.frontend
        self.commits.append((frontend.serial, frontend.newest, frontend.connected, dismiss))

    def say(self, serial: int, request: int, payload: bytes, key: int | None = None) -> None:
        fds = [] if key is None else [Held(os.eventfd(0), key)]
        keys = [fd.key for fd in fds]
        self.frontend.said(FrontendSaid(serial, request, False, True, payload, False, keys), fds)


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_what_is_committed_within_a_message_leaves_the_message_to_a_successor(
    worker: Worker,
) -> None:
    worker.say(9, Request.SET_MEM_TABLE, _REGION, key=3)
    assert worker.commits == [(8, 0, True, False), (9, 3, True, False)]


def test_what_is_committed_while_a_frontend_goes_leaves_its_going_to_a_successor(
    worker: Worker,
) -> None:
    worker.frontend.gone(FrontendGone(9))
    assert worker.commits == [(8, 0, True, False), (9, 0, False, False)]


def test_a_frontend_that_is_let_go_for_a_message_is_so_by_a_successor_too(worker: Worker) -> None:
    worker.say(9, Request.SET_MEM_TABLE, b"", key=3)
    assert worker.commits == [(8, 0, True, False), (9, 3, False, True)]


def test_descriptors_of_a_message_that_came_too_late_are_of_no_use(worker: Worker) -> None:
    worker.frontend.gone(FrontendGone(9))
    worker.say(10, Request.SET_MEM_TABLE, _REGION, key=3)
    assert (worker.frontend.serial, worker.frontend.newest) == (10, 3)
