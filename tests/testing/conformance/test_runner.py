"""What becomes of a run whose backend hangs, dies, or comes back."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import fake
import psutil
import pytest
from vhost_device_console.testing.conformance import (
    Backend,
    CannotRunError,
    Outcome,
    Result,
    run,
    select,
)
from vhost_device_console.testing.conformance.bench import Bench
from vhost_device_console.testing.conformance.process import Process
from vhost_device_console.testing.conformance.statement import (
    Level,
    SkippedError,
    Statement,
    expect,
)
from vhost_device_console.testing.features import Feature
from vhost_device_console.worker.vhost_user.message import ProtocolFeature

#: One before the mistake, the one it is in, one after.
AROUND = ["feature.version-1", "hostile.unknown-request", "frontend.qemu"]


def by_id(results: list[Result]) -> dict[str, Result]:
    return {result.statement.id: result for result in results}


def test_backend_that_dies(folder: Path) -> None:
    """The statement that ends the backend fails, and so does all the rest: it is gone."""
    with fake.Fake(folder / "s", fake.DiesOfTheUnknown) as backend:
        found = Backend.find(backend.path, None, 0.5)
        results = by_id(list(run(found, select(AROUND))))
    assert results["feature.version-1"].outcome is Outcome.PASS
    guilty = results["hostile.unknown-request"]
    assert guilty.outcome is Outcome.FAIL  # though it is a SHOULD
    assert "no new connection can be had" in guilty.seen
    assert results["frontend.qemu"].outcome is Outcome.FAIL
    assert results["frontend.qemu"].seen.startswith("backend is gone: ")


def test_backend_that_hangs(folder: Path) -> None:
    """A backend that follows a loop for ever is gone too, and is not waited for again."""
    patterns = ["split.bad-endless", "frontend.*"]
    with fake.Fake(folder / "s", fake.FollowsLoops) as backend:
        found = Backend.find(backend.path, None, 0.5)
        results = by_id(list(run(found, select(patterns))))
    guilty = results.pop("split.bad-endless")
    assert guilty.outcome is Outcome.FAIL
    assert "did not come in time; then a new connection gets no answer" in guilty.seen
    offered = [r for r in results.values() if r.outcome is not Outcome.NOT_OFFERED]
    assert {r.seen for r in offered} == {"backend is gone: a new connection gets no answer"}
    assert sum(r.seconds for r in offered) == 0


def test_backend_that_is_started_again(folder: Path) -> None:
    """With a way to start it again, a backend's end spoils no later statement."""
    path = folder / "s"
    with Process(f"{sys.executable} {fake.__file__} {path}", str(path)) as process:
        found = Backend.find(str(path), None, 1.0)
        results = by_id(list(run(found, select(AROUND), process)))
    assert results["hostile.unknown-request"].outcome is Outcome.FAIL
    assert results["hostile.unknown-request"].seen.endswith("the backend ended with exit status 0")
    assert results["frontend.qemu"].outcome is Outcome.PASS
    assert psutil.Process().children() == []


def test_backend_that_comes_back_by_itself(folder: Path) -> None:
    """A backend that ends is found out even if something else starts it again at once."""
    path = folder / "s"
    command = f'sh -c "while :; do {sys.executable} {fake.__file__} {path}; rm {path}; done"'
    with Process(command, str(path)):
        found = Backend.find(str(path), None, 20.0)
        results = by_id(list(run(found, select(AROUND))))
        for child in psutil.Process().children(recursive=True)[1:]:
            child.suspend()
        for child in psutil.Process().children(recursive=True):
            child.kill()
    assert results["hostile.unknown-request"].outcome is Outcome.FAIL
    assert "was started again" in results["hostile.unknown-request"].seen
    assert results["frontend.qemu"].outcome is Outcome.PASS


def one(check: object, level: Level = Level.MUST, **more: object) -> Statement:
    fields = {"features": Feature(0), "protocol": ProtocolFeature(0), "client": False}
    return Statement(
        "x.y",
        level,
        "VIRTIO 1",
        "Something",
        check,
        **{**fields, "hostile": False, **more},  # type: ignore[arg-type]
    )


def fails(_: Bench) -> None:
    expect(False, "black", "white")


def breaks(_: Bench) -> None:
    raise ValueError("nobody thought of that")


def skips(_: Bench) -> None:
    raise SkippedError("not today")


@pytest.mark.parametrize(
    ("statement", "outcome", "seen", "expected"),
    [
        (one(lambda _: None), Outcome.PASS, "", ""),
        (one(fails), Outcome.FAIL, "black", "white"),
        (one(fails, Level.SHOULD), Outcome.WARN, "black", "white"),
        (
            one(breaks),
            Outcome.FAIL,
            "ValueError: nobody thought of that",
            "what the statement says",
        ),
        (one(skips), Outcome.SKIPPED, "not today", ""),
        (one(fails, features=Feature.SIZE), Outcome.NOT_OFFERED, "SIZE", ""),
        (one(fails, protocol=ProtocolFeature.STATUS), Outcome.NOT_OFFERED, "STATUS", ""),
        (
            one(fails, client=True),
            Outcome.SKIPPED,
            "--data does not say where a client attaches",
            "",
        ),
    ],
)
def test_outcome(
    folder: Path, statement: Statement, outcome: Outcome, seen: str, expected: str
) -> None:
    """What a statement raises, and what it needs, decides on its outcome."""
    with fake.Fake(folder / "s") as backend:
        (result,) = run(Backend.find(backend.path, None, 1.0), [statement])
    assert (result.outcome, result.seen, result.expected) == (outcome, seen, expected)


def test_no_socket(folder: Path) -> None:
    """What does not listen is nothing to check."""
    with pytest.raises(CannotRunError, match="No such file or directory"):
        Backend.find(str(folder / "s"), None, 0.1)


def test_no_backend(folder: Path) -> None:
    """What listens and says something else is nothing to check."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()
        with pytest.raises(CannotRunError, match="gets no answer"):
            Backend.find(str(folder / "s"), None, 0.1)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("true", "true: the backend ended with exit status 0 at once"),
        ("./nonesuch", "cannot start ./nonesuch: No such file or directory"),
        ("", "cannot start : nothing to start"),
    ],
)
def test_command_that_starts_nothing(folder: Path, command: str, error: str) -> None:
    """A command that makes no socket is reported in one line."""
    with pytest.raises(CannotRunError, match=f"^{error}$"), Process(command, str(folder / "s")):
        pass


def test_socket_of_one_that_was_killed(folder: Path) -> None:
    """The socket that a killed backend has left does not keep the next one from starting."""
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with Process(f"{sys.executable} {fake.__file__} {path}", str(path)):
        Backend.find(str(path), None, 1.0)
    assert os.path.exists(path)
