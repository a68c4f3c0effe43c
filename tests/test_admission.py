"""Users by name or number, the look at who came, and a log that nobody floods."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from vhost_device_console import admission
from vhost_device_console.admission import Door, Sparing, group_id, look_up, refusal, user_id
from vhost_device_console.config import Access
from vhost_device_console.errors import ConfigError

NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become someone else")


def test_a_user_is_a_name_or_a_number() -> None:
    me = pwd.getpwuid(os.geteuid()).pw_name
    assert (user_id(me), user_id("64055"), group_id("0")) == (os.geteuid(), 64055, 0)


@pytest.mark.parametrize("text", ["no such user", "-1", "", "a\0b", "4294967295", "9" * 5000, "²"])
def test_anything_else_is_nobody(text: str) -> None:
    for number in (user_id, group_id):
        with pytest.raises(ConfigError) as raised:
            number(text)
        assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("user", "said"),
    [
        ("nobody-at-all", "there is no user 'nobody-at-all' on this machine"),
        ("3999999999", "there is no user '3999999999' on this machine"),
        (":daemon", "there is no user '' on this machine"),
        ("nobody:no-group-at-all", "there is no group 'no-group-at-all' on this machine"),
    ],
)
def test_somebody_to_become_that_there_is_not_is_one_line(user: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        look_up(user)


def test_somebody_to_become_has_names_and_numbers() -> None:
    me = pwd.getpwuid(os.geteuid())
    assert look_up(f"{me.pw_uid}:{me.pw_gid}") == (me.pw_name, me.pw_uid, me.pw_gid, [me.pw_gid])
    groups = os.getgrouplist(me.pw_name, me.pw_gid)
    assert look_up(me.pw_name) == (me.pw_name, me.pw_uid, me.pw_gid, groups)


@pytest.fixture
def listener(folder: Path) -> Iterator[socket.socket]:
    folder.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "s"))
        (folder / "s").chmod(0o666)
        made.listen()
        yield made


def caller(listener: socket.socket, uid: int) -> int:
    """Fork a process of user `uid` that connects and waits until it is hung up on."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setresuid(uid, uid, uid)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(listener.getsockname())
                client.recv(1)
            status = 0
        finally:
            os._exit(status)
    return pid


@needs_root
def test_another_user_s_process_is_refused_hung_up_on_and_named(
    listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    door = Door("the door", Access(allow=("0",)))
    pid = caller(listener, NOBODY)
    assert not door.admit(listener.accept()[0])
    assert os.waitpid(pid, 0) == (pid, 0)
    assert caplog.messages == [f"the door: process {pid} of user {NOBODY} may not connect"]


@needs_root
def test_a_user_who_is_named_gets_in(listener: socket.socket) -> None:
    door = Door("the door", Access(allow=("12345", str(NOBODY))))
    pid = caller(listener, NOBODY)
    with closing(listener.accept()[0]) as sock:
        assert door.admit(sock)
    assert os.waitpid(pid, 0) == (pid, 0)


def test_even_root_has_to_be_named() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert refusal(ours, {os.geteuid() + 1}) is not None


def test_without_names_everybody_gets_in() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert refusal(ours, ()) is None


def test_a_tcp_client_s_user_is_not_asked_for() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()),
        closing(listener.accept()[0]) as sock,
    ):
        assert Door("a port", Access(allow=("12345",))).admit(sock)


def test_a_log_says_so_many_lines_a_minute_and_counts_the_rest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    log = Sparing(lambda: now)
    most = admission.LOGGED_A_MINUTE
    for number in range(most + 5):
        log.warn(f"line {number}")
    now = 59.9
    log.warn("still that minute")
    assert caplog.messages == [f"line {number}" for number in range(most)]
    now = 60.0
    log.warn("the next")
    log.warn("another")
    assert caplog.messages[most:] == ["the next (6 more such lines were left out)", "another"]
