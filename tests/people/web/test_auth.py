"""Who is let in: tokens, sessions, tries and origins."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path

import pytest
from vhost_device_console.errors import ConfigError
from vhost_device_console.people.web import auth
from vhost_device_console.people.web.auth import (
    Door,
    Limiter,
    Passwords,
    Token,
    new_token,
    read_token,
    same_origin,
)

from launch import WITHIN

LOCK = Token("the right token!")


def enter(door: Door, token: str, address: str) -> str | None:
    return asyncio.run(door.enter({"token": token}, address))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_token_opens_a_session_and_nothing_else_does() -> None:
    door = Door(LOCK)
    name = enter(door, "the right token!", "a")
    assert name is not None
    assert door.session(name) is not None
    assert enter(door, "the right token", "a") is None
    assert enter(door, "", "a") is None
    assert [door.session(other) for other in (None, "", name[:-1], "the right token!")] == [
        None
    ] * 4


def test_tokens_are_long_and_never_the_same() -> None:
    assert len({new_token() for _ in range(100)}) == 100
    assert len(new_token()) >= 43


def test_a_session_ends_in_time_and_so_does_what_goes_on_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when nobody asks for it any more."""
    monkeypatch.setattr(auth, "SESSION_S", 0.01)

    async def outlive() -> None:
        door = Door(LOCK)
        name = await door.enter({"token": "the right token!"}, "a")
        session = door.session(name)
        assert session is not None
        ended = asyncio.Event()
        session.ends.add(ended.set)
        await asyncio.wait_for(ended.wait(), WITHIN)
        assert door.session(name) is None

    asyncio.run(outlive())


def test_the_oldest_session_gives_way_when_there_are_too_many() -> None:
    door = Door(LOCK)
    names = [enter(door, "the right token!", "a") for _ in range(auth.MOST_SESSIONS + 1)]
    assert door.session(names[0]) is None
    assert all(door.session(name) for name in names[1:])


def test_who_is_wrong_too_often_waits() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    for _ in range(auth.TRIES):
        assert limiter.wait("a") == 0
        limiter.wrong("a")
    assert limiter.wait("a") == auth.AGAIN_S
    assert limiter.wait("b") == 0
    clock.now += auth.AGAIN_S
    assert limiter.wait("a") == 0
    limiter.wrong("a")
    assert limiter.wait("a") == auth.AGAIN_S


def test_addresses_beyond_number_are_forgotten() -> None:
    limiter = Limiter()
    for number in range(5000):
        limiter.wrong(str(number))
    assert len(limiter._debts) <= 1024  # noqa: SLF001


class Pam:
    """Knows one user, and one whose account is locked; what it was asked is in `asked`."""

    class PAMError(Exception):
        pass

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []

    def authenticate(self, user: str, password: str, service: str) -> None:
        self.asked.append((user, password, service))
        if (user, password) not in (("ann", "right"), ("bob", "right")):
            raise self.PAMError


@pytest.fixture
def pam(monkeypatch: pytest.MonkeyPatch) -> Pam:
    made = Pam()
    monkeypatch.setitem(sys.modules, "pamela", made)
    return made


def test_a_user_s_password_is_what_pam_says(pam: Pam) -> None:
    lock = Passwords("login")
    assert lock.opens({"user": "ann", "password": "right"}) == "ann"
    assert lock.opens({"user": "ann", "password": "wrong"}) is None
    assert pam.asked == [("ann", "right", "login"), ("ann", "wrong", "login")]


@pytest.mark.usefixtures("pam")
def test_only_those_users_come_in_who_may() -> None:
    lock = Passwords("login", ["ann"])
    assert lock.opens({"user": "ann", "password": "right"}) == "ann"
    assert lock.opens({"user": "bob", "password": "right"}) is None


@pytest.mark.parametrize(
    "said",
    [{}, {"user": "ann"}, {"user": "ann", "password": ""}, {"user": "ann\0", "password": "x"}],
)
def test_pam_is_not_asked_about_what_is_no_password(pam: Pam, said: dict[str, str]) -> None:
    assert Passwords("login").opens(said) is None
    assert pam.asked == []


@pytest.mark.usefixtures("pam")
def test_a_session_is_somebody_s() -> None:
    door = Door(Passwords("login"))
    name = asyncio.run(door.enter({"user": "ann", "password": "right"}, "a"))
    session = door.session(name)
    assert session is not None
    assert session.name == "ann"
    assert door.locked == "password"


def test_many_who_try_at_the_same_time_are_counted_before_it_is_known(
    pam: Pam, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def try_often() -> float:
        door = Door(Passwords("login"), Clock())
        loop = asyncio.get_running_loop()
        asked, known = asyncio.Event(), threading.Event()

        def authenticate(*_: str, **__: str) -> None:
            loop.call_soon_threadsafe(asked.set)
            known.wait(WITHIN)
            raise pam.PAMError

        monkeypatch.setattr(pam, "authenticate", authenticate)
        wrong = {"user": "ann", "password": "wrong"}
        async with asyncio.TaskGroup() as group:
            for _ in range(auth.TRIES):
                group.create_task(door.enter(wrong, "a"))
            # By the time that one is told of its question all have begun.
            await asyncio.wait_for(asked.wait(), WITHIN)
            wait = door.wait("a")
            known.set()
        return wait

    assert asyncio.run(try_often()) > 0


def test_who_is_right_has_not_been_wrong() -> None:
    door = Door(LOCK, Clock())
    for _ in range(3 * auth.TRIES):
        assert enter(door, "the right token!", "a")
    assert door.wait("a") == 0


@pytest.mark.parametrize(
    ("origin", "host", "secure", "ours"),
    [
        ("http://localhost:8080", "localhost:8080", False, True),
        ("https://localhost:8080", "localhost:8080", True, True),
        ("http://localhost:8080", "localhost:8080", True, False),
        ("http://localhost:8081", "localhost:8080", False, False),
        ("http://evil.example", "localhost:8080", False, False),
        ("http://localhost:8080.evil.example", "localhost:8080", False, False),
        ("https://consoles.example", "10.0.0.1", False, True),
        ("null", "localhost:8080", False, False),
        ("null", None, False, False),
        (None, "localhost:8080", False, False),
        ("http://[", "localhost:8080", False, False),
    ],
)
def test_a_page_s_origin_is_ours_or_one_that_was_named(
    origin: str | None, host: str | None, secure: bool, ours: bool
) -> None:
    assert same_origin(origin, host, secure, ["https://consoles.example"]) is ours


def test_a_token_file_is_read_without_what_is_around_it(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("  0123456789abcdef\n")
    path.chmod(0o600)
    assert read_token(str(path)) == "0123456789abcdef"


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (b"0123456789abcdef", 0o640, "can be read by others: chmod 600"),
        (b"0123456789abcde", 0o600, "16 characters or more, not 15"),
        (b"\xff" * 32, 0o600, "is not text"),
        (None, 0, "no such file"),
    ],
)
def test_a_token_file_to_distrust_is_refused(
    tmp_path: Path, content: bytes | None, mode: int, why: str
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(ConfigError, match=why):
        read_token(str(path))
