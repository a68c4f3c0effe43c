"""A worker that somebody has taken over gets nothing of the master but its own end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scene import attach, boot, converse
from vhost_device_console import custody

from conftest import StartDaemon

#: The first worker of the first guest says this, and waits; all others are as ever.
_PROGRAM = """
import functools, os, signal, sys
from vhost_device_console import cli, master, supervision, worker

supervision.delay = lambda _: 0.0

def run(guest, heirlooms):
    if guest.name.endswith("0"):
        try:
            os.close(os.open({once!r}, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os.write(heirlooms.custody, {said!r})
            signal.sigwait([signal.SIGTERM])
    return worker.run(guest, heirlooms)

master.serve = functools.partial(master.serve, run=run)
cli.main()
"""


def encoded(serial: int = 0, made: tuple[int, ...] = ()) -> bytes:
    commit = custody.Commit(serial=serial, newest=0, snapshot=b"", keys=[], made=[*made])
    return custody._encoder.encode(commit)  # noqa: SLF001


@pytest.mark.parametrize(
    "said",
    [
        b"nonsense",
        b"\x82\xa4type\xa4Pong\xa1x" + b"\x91" * 9000,
        b"\xc1",
        encoded(9),
        encoded(0, (-2,)),
    ],
    ids=["nonsense", "depth", "a file", "what never was", "descriptors"],
)
def test_a_worker_that_says_what_none_says_is_ended(
    daemon: StartDaemon, folder: Path, said: bytes
) -> None:
    """Its successor serves the guest, and the other guest's worker has nothing to do with it."""
    code = _PROGRAM.format(once=str(folder / "once"), said=said)
    served = daemon("unix", 2, program=[sys.executable, "-c", code])
    for index in range(2):
        with attach(served, index) as peer, boot(served, index) as console:
            converse(console, peer)
    assert [guest["restarts"] for guest in served.status()] == [1, 0]
    served.expect_log("its worker cannot be followed: ")
