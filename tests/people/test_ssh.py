"""The ssh server: consoles for those who may reach them, and nothing else for anybody."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import asyncssh
import psutil
import pytest
from scene import assert_same, boot, numbered, wait_port
from test_attached import HASTY

from conftest import StartDaemon
from launch import WITHIN, Daemon, command, receive_until, wait_ended
from sshing import ESCAPE, Loop, People, Person, Server, Session, transport

KEY = asyncssh.generate_private_key("ssh-ed25519")
OTHER = asyncssh.generate_private_key("ssh-ed25519")
AUTHORITY = asyncssh.generate_private_key("ssh-ed25519")


def public(key: asyncssh.SSHKey, comment: str = "ann@laptop", options: str = "") -> str:
    text = key.export_public_key().decode().strip()
    return f"{options}{' ' if options else ''}{text} {comment}\n"


Serve = Callable[..., People]


@pytest.fixture
def served(daemon: StartDaemon) -> Daemon:
    return daemon("unix", 1, program=HASTY)


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def serve(folder: Path, loop: Loop) -> Iterator[Serve]:
    """Give a function that starts a server, by default for KEY only, and gives its people."""
    with ExitStack() as ends:

        def start(*options: str, keys: str = public(KEY), **more: str) -> People:
            server = ends.enter_context(Server(folder, keys, *options, **more))
            return People(loop, server, KEY)

        yield start


def guest_of(daemon: Daemon, index: int = 0) -> str:
    name: str = daemon.status()[index]["name"]
    return name


def certificate(
    *principals: str, authority: asyncssh.SSHKey = AUTHORITY, before: str = "+1d"
) -> tuple[asyncssh.SSHKey, asyncssh.SSHOpenSSHCertificate]:
    made = authority.generate_user_certificate(
        KEY.convert_to_public(), "ann", principals=[*principals], valid_before=before
    )
    return KEY, made


# A console


def test_history_first_then_live_and_keys_go_to_the_guest(served: Daemon, serve: Serve) -> None:
    with boot(served) as console:
        console.write(b"before\n")
        with serve().come(guest_of(served)) as person:
            person.expect(rb"\[attached to .*; Ctrl-\] then \? for help\]\r\nbefore")
            person.type(b"typed")
            assert console.read(5) == b"typed"
            console.write(b"\xfflive")
            person.expect(rb"\xfflive")


def test_the_menu_leaves_and_the_guest_goes_on(served: Daemon, serve: Serve) -> None:
    with boot(served) as console, serve().come(guest_of(served)) as person:
        person.type(ESCAPE + b"?")
        person.expect(rb"\[q  leave; the guest goes on\]")
        assert b"write a log" not in person.session.out
        person.type(ESCAPE + b"q")
        assert person.wait() == 0
        wait_port(served, readers=0)
        console.write(b"on")


def test_another_escape_key(served: Daemon, serve: Serve) -> None:
    with boot(served) as console, serve("-e", "^a").come(guest_of(served)) as person:
        person.expect(rb"Ctrl-A then \? for help")
        person.type(ESCAPE + b"\x01q")
        assert person.wait() == 0
        assert console.read(1) == ESCAPE


def test_a_break_is_sysrq(served: Daemon, serve: Serve) -> None:
    with boot(served) as console, serve().come(guest_of(served)) as person:
        person.expect(rb"\[attached to ")
        person.loop.call(lambda: person.chan.send_break(0))
        person.expect(rb"\[SysRq: which key")
        person.type(b"h")
        assert console.read(2) == b"\x0fh"


def test_the_first_writes_others_watch_and_take_the_role_by_force(
    served: Daemon, serve: Serve
) -> None:
    people, guest = serve(), guest_of(served)
    with boot(served) as console, people.come(guest) as first:
        first.expect(rb"\[attached to ")
        with people.come(guest) as second:
            second.expect(rb"\[you watch: ann@laptop, ssh from 127\.0\.0\.1 types\]")
            second.type(b"ignored" + ESCAPE + b"f")
            second.expect(rb"\[you type now\]")
            first.expect(rb"\[you watch: ")
            second.type(b"heard" + ESCAPE + b"w")
            assert console.read(5) == b"heard"
            second.expect(rb"ann@laptop, ssh from 127\.0\.0\.1 \(you\): types, 80x24")
        first.expect(rb"\[you type now\]")


def test_a_terminal_s_size_is_the_guest_s(served: Daemon, serve: Serve) -> None:
    with boot(served), serve().come(guest_of(served)) as person:
        wait_port(served, columns=80, rows=24)
        person.loop.call(lambda: person.chan.change_terminal_size(132, 50))
        wait_port(served, columns=132, rows=50, size_by="ann@laptop, ssh from 127.0.0.1")


def test_a_pipe_is_typed_and_answered(served: Daemon, serve: Serve) -> None:
    with boot(served) as console:
        console.write(b"history ")
        with serve().come(guest_of(served), terminal=False) as person:
            person.type(b"poweroff\n" + ESCAPE + b"q")
            person.end()
            assert console.read(11) == b"poweroff\n" + ESCAPE + b"q"
            console.write(b"bye")
            assert person.wait() == 0
            assert bytes(person.session.out) == b"history bye"


def test_a_pipe_that_may_not_type_says_so(served: Daemon, serve: Serve) -> None:
    people, guest = serve(), guest_of(served)
    with boot(served), people.come(guest) as first:
        first.expect(rb"\[attached to ")
        with people.come(guest, terminal=False) as person:
            person.type(b"poweroff\n")
            person.expect(rb"cannot be typed: another is the writer", aside=True)
            assert person.wait() == 4


def test_a_long_paste_arrives_whole_while_the_guest_reads_slowly(
    served: Daemon, serve: Serve
) -> None:
    pasted = numbered(1 << 20)
    with boot(served) as console, serve().come(guest_of(served), terminal=False) as person:
        person.type(pasted)
        person.end()
        got = b"".join(console.read(1 << 12) for _ in range(1 << 8))
        assert_same(got, pasted)
        assert person.wait() == 0


#: Keys that come before it is known which guest they are for, and before that one is reached.
HASTE = """
begin = ssh._Session._begin
def begin_amid_keys(self, place):
    self.data_received(b"one ", None)
    begin(self, place)
    self.data_received(b"after the other", None)
ssh._Session._begin = begin_amid_keys
"""


def test_what_is_typed_before_the_guest_is_reached_comes_in_order(
    served: Daemon, serve: Serve
) -> None:
    with boot(served) as console, serve(change=HASTE).come(guest_of(served)):
        assert console.read(19) == b"one after the other"


@pytest.mark.parametrize("user", ["{}", "{}:0", "{}+0"])
def test_a_user_name_is_a_guest_or_one_of_its_ports(
    served: Daemon, serve: Serve, user: str
) -> None:
    with boot(served), serve().come(user.format(guest_of(served))) as person:
        person.expect(rb"\[attached to .*, port 0")


@pytest.mark.parametrize("user", ["nobody", "{}:9", "{}:", ":", "$(id)"])
def test_there_is_no_such_console(served: Daemon, serve: Serve, user: str) -> None:
    guest = guest_of(served)
    with serve().come(user.format(guest), terminal=False) as person:
        line = person.expect(rb"^\[there is no guest .* for you, only .*\]\n", aside=True)[0]
        assert guest.encode() in line
        assert b"\x1b" not in line
        assert person.wait() == 1


def test_a_key_for_one_port_reaches_no_other(
    daemon: StartDaemon, serve: Serve, folder: Path
) -> None:
    """Not the console, when none is named, nor one that is called as that one is numbered."""
    ports = [f"--port=name={name},backend=unix,path={folder}/{name}" for name in ("agent", "1")]
    served = daemon("unix", 1, *ports, program=HASTY)
    guest = guest_of(served)
    people = serve(keys=public(KEY, options=f'guests="{guest}:agent"'))
    for user in (guest, f"{guest}:agent", f"{guest}:1"):
        with people.come(user, terminal=False) as person:
            person.expect(rb"\[attached to [^,]*, port 1, agent\]", aside=True)


# Whoever is killed


def test_a_killed_worker_is_not_seen(served: Daemon, serve: Serve) -> None:
    with boot(served) as console, serve().come(guest_of(served)) as person:
        person.expect(rb"help\]\r\n")
        for number in range(3):
            console.write(b"line %d\r\n" % number)
            served.kill_worker()
            person.type(b"%d" % number)
            assert console.read(1) == b"%d" % number
        assert person.expect(rb"((?s:.*)line 2)")[1] == b"line 0\r\nline 1\r\nline 2"


def test_it_waits_for_a_daemon_that_went_and_goes_on(daemon: StartDaemon, serve: Serve) -> None:
    first = daemon("unix", 1)
    with serve().come(guest_of(first)) as person:
        with boot(first) as console:
            console.write(b"one")
            person.expect(rb"one")
        first.close()
        person.expect(rb"\[the daemon is gone; waiting for it\]")
        second = daemon("unix", 1)
        with boot(second) as console:
            console.write(b"two")
            person.expect(rb"\[another daemon: what came meanwhile is not known\]")
            person.expect(rb"two")
            person.type(b"heard")
            assert console.read(5) == b"heard"


def test_it_leaves_when_it_is_told_to_and_says_so(served: Daemon, serve: Serve) -> None:
    people = serve()
    with boot(served), people.come(guest_of(served)) as person:
        person.expect(rb"\[attached to ")
        people.server.close()
        person.expect(rb"\[the server ends\]")
        assert person.wait() == 1


# Who comes in


def refused(people: People, user: str, **options: object) -> None:
    with pytest.raises(asyncssh.PermissionDenied):
        people.connect(user, **options)


def test_a_key_that_is_not_known_does_not_come_in(served: Daemon, serve: Serve) -> None:
    people = serve()
    refused(people, guest_of(served), client_keys=[OTHER])
    people.server.expect_log(r"127\.0\.0\.1 did not come in for \S+: .* keys of it are not known")


def test_neither_a_password_nor_questions_are_taken(served: Daemon, serve: Serve) -> None:
    people = serve()
    refused(people, guest_of(served), client_keys=None, password="secret")

    async def methods() -> object:
        return await asyncssh.get_server_auth_methods(
            "127.0.0.1", people.server.port, username=guest_of(served), config=None
        )

    assert people.loop.run(methods()) == ["publickey"]


@pytest.mark.parametrize("options", ['from="192.0.2.1"', 'expiry-time="20200101"'])
def test_a_line_s_limits_hold(served: Daemon, serve: Serve, options: str) -> None:
    refused(serve(keys=public(KEY, options=options)), guest_of(served))


def test_only_so_many_keys_can_be_tried(served: Daemon, serve: Serve) -> None:
    keys = [asyncssh.generate_private_key("ssh-ed25519") for _ in range(12)]
    people = serve()
    with pytest.raises(asyncssh.Error):
        people.connect(guest_of(served), client_keys=[*keys, KEY])
    people.server.expect_log(r"did not come in for \S+: too many keys")


def test_a_certificate_of_the_authority_comes_in(served: Daemon, serve: Serve) -> None:
    people = serve(keys=public(AUTHORITY, options='cert-authority,principals="ops"'))
    with boot(served), people.come(guest_of(served), client_keys=[certificate("ops")]) as person:
        person.expect(rb"\[attached to ")
        person.type(ESCAPE + b"w")
        person.expect(rb"\[ops, ssh from 127\.0\.0\.1 \(you\): types")


@pytest.mark.parametrize(
    "made",
    [
        lambda: certificate("others"),
        lambda: certificate(),
        lambda: certificate("ops", authority=OTHER),
        lambda: certificate("ops", before="-1h"),
    ],
    ids=["other principals", "no principals", "another authority", "expired"],
)
def test_a_certificate_that_is_not_right_does_not(
    served: Daemon, serve: Serve, made: Callable[[], object]
) -> None:
    people = serve(keys=public(AUTHORITY, options='cert-authority,principals="ops"'))
    try:
        keys = [made()]
    except ValueError:  # asyncssh makes no certificate that has ended
        keys = [ended_certificate()]
    refused(people, guest_of(served), client_keys=keys)


def ended_certificate() -> tuple[asyncssh.SSHKey, asyncssh.SSHOpenSSHCertificate]:
    made = AUTHORITY.generate_user_certificate(
        KEY.convert_to_public(),
        "ann",
        principals=["ops"],
        valid_after="20200101000000",
        valid_before="20200102000000",
    )
    return KEY, made


# Where to


ACCESS = """
[[allow]]
keys = ["ann@laptop"]
guests = ["{}"]

[[allow]]
keys = ["bob"]
guests = ["*"]
role = "watch"
"""


def test_the_access_file_says_who_reaches_what(
    daemon: StartDaemon, serve: Serve, folder: Path
) -> None:
    started = daemon("unix", 2)
    first, second = guest_of(started, 0), guest_of(started, 1)
    (folder / "access").write_text(ACCESS.format(second))
    people = serve(f"--access={folder / 'access'}")
    with people.come(first) as person:
        person.expect(rf"\[there is no guest {first} for you, only {second}\]".encode())
        assert person.wait() == 1
    with boot(started, 1), people.come(second) as person:
        person.expect(rb"\[attached to ")


def test_who_may_only_watch_neither_types_nor_sizes(
    served: Daemon, serve: Serve, folder: Path
) -> None:
    (folder / "access").write_text(ACCESS.format("none"))
    people = serve(f"--access={folder / 'access'}", keys=public(KEY, "bob"))
    with boot(served) as console, people.come(guest_of(served)) as person:
        person.expect(rb"\[attached to ")
        person.type(b"no" + ESCAPE + b"f")
        person.expect(rb"\[you may only watch\]")
        person.type(ESCAPE + b"r")
        person.expect(rb"\[you may only watch\]")
        person.loop.call(lambda: person.chan.change_terminal_size(132, 50))
        person.type(b"no" + ESCAPE + b"w")
        person.expect(rb"\(you\): watches")
        port = wait_port(served, readers=1)
        assert (port["input"], port["columns"]) == (0, 0)
        console.write(b"seen")
        person.expect(rb"seen")


def test_who_is_not_named_in_the_access_file_reaches_nothing(
    served: Daemon, serve: Serve, folder: Path
) -> None:
    (folder / "access").write_text("")
    people = serve(f"--access={folder / 'access'}")
    with people.come(guest_of(served), terminal=False) as person:
        person.expect(rb"\[there is no guest .* for you, only none at all\]", aside=True)
        assert person.wait() == 1


def test_a_key_that_is_taken_away_is_hung_up_on_at_sighup(served: Daemon, serve: Serve) -> None:
    people = serve()
    with boot(served), people.come(guest_of(served)) as person:
        person.expect(rb"\[attached to ")
        people.server.keys.write_text("# nobody\n")
        people.server.process.send_signal(signal.SIGHUP)
        person.expect(rb"\[your key is not valid here any more\]")
        assert person.wait() == 1
    refused(people, guest_of(served))


def test_another_role_ends_the_session_at_sighup(
    served: Daemon, serve: Serve, folder: Path
) -> None:
    access = folder / "access"
    access.write_text(ACCESS.format("*"))
    people = serve(f"--access={access}")
    with boot(served), people.come(guest_of(served)) as person:
        person.expect(rb"\[attached to ")
        access.write_text(ACCESS.format("*").replace('guests = ["*"]', 'guests = ["x"]', 1))
        people.server.process.send_signal(signal.SIGHUP)
        person.expect(rb"\[what you may do here has changed\]")
        assert person.wait() == 1


def test_a_new_key_comes_in_at_once(served: Daemon, serve: Serve) -> None:
    people = serve(keys=public(OTHER))
    refused(people, guest_of(served))
    people.server.keys.write_text(public(OTHER) + public(KEY))
    with people.come(guest_of(served)) as person:
        person.expect(rb"\[attached to ")


# What else there is


def test_status_lists_what_can_be_reached(daemon: StartDaemon, serve: Serve, folder: Path) -> None:
    started = daemon("unix", 2)
    second = guest_of(started, 1)
    (folder / "access").write_text(ACCESS.format(second))
    people = serve(f"--access={folder / 'access'}")
    with people.come("x", terminal=False, command="status") as person:
        assert person.wait() == 0
        head, line = bytes(person.session.out).decode().splitlines()
        assert head.startswith("NAME")
        assert line.startswith(second)
    with people.come("x", terminal=False, command="status --json") as person:
        assert person.wait() == 0
        (guest,) = json.loads(bytes(person.session.out))["guests"]
        assert guest["name"] == second


@pytest.mark.parametrize("what", ["sh", "status; sh", "scp -t /tmp", "status --yaml"])
def test_no_command_is_run(served: Daemon, serve: Serve, what: str) -> None:
    people = serve()
    with people.come(guest_of(served), terminal=False, command=what) as person:
        person.expect(rb"\[no command can be run here but status; ", aside=True)
        assert person.wait() == 1
    people.server.expect_log(f"was refused the command {re.escape(what)}")


def test_there_are_no_files(served: Daemon, serve: Serve) -> None:
    people = serve()
    conn = people.connect(guest_of(served))
    try:
        with pytest.raises(asyncssh.ChannelOpenError):
            people.loop.run(conn.start_sftp_client())
    finally:
        people.hang_up(conn)
    people.server.expect_log("was refused sftp")


def test_nothing_is_forwarded(served: Daemon, serve: Serve, folder: Path) -> None:
    people = serve()
    conn = people.connect(guest_of(served))
    with socket.create_server(("127.0.0.1", 0)) as target:
        port = target.getsockname()[1]
        asked = [
            lambda: conn.create_connection(asyncssh.SSHTCPSession, "127.0.0.1", port),
            lambda: conn.create_unix_connection(asyncssh.SSHUNIXSession, served.monitor),
            lambda: conn.forward_remote_port("127.0.0.1", 0, "127.0.0.1", port),
            lambda: conn.forward_remote_path(str(folder / "f.sock"), served.monitor),
            lambda: conn.create_tun(asyncssh.SSHTunTapSession),
        ]
        try:
            for ask in asked:
                with pytest.raises((asyncssh.ChannelOpenError, asyncssh.ChannelListenError)):
                    people.loop.run(ask())
        finally:
            people.hang_up(conn)
        target.setblocking(False)
        with pytest.raises(BlockingIOError):
            target.accept()
    assert not (folder / "f.sock").exists()


def test_a_connection_has_so_many_sessions(served: Daemon, serve: Serve) -> None:
    people = serve(change="ssh.MOST_SESSIONS = 2")
    conn = people.connect(guest_of(served))
    try:
        several = [Person(people.loop, conn, term_type="xterm") for _ in range(2)]
        with pytest.raises(asyncssh.ChannelOpenError):
            Person(people.loop, conn, term_type="xterm")
        several[0].type(ESCAPE + b"q")
        assert several[0].wait() == 0
        deadline = time.monotonic() + WITHIN
        while True:  # the server has to hear that the channel is closed
            try:
                again = Person(people.loop, conn, term_type="xterm")
                break
            except asyncssh.ChannelOpenError:
                assert time.monotonic() < deadline
        again.expect(rb"\[attached to ")
    finally:
        people.hang_up(conn)


# Strangers and the hostile


def test_many_that_never_say_who_they_are_keep_nobody_out(served: Daemon, serve: Serve) -> None:
    people = serve(change="ssh.MOST_UNKNOWN = 4")
    strangers = []
    try:
        for _ in range(8):
            stranger = socket.create_connection(("127.0.0.1", people.server.port), WITHIN)
            strangers.append(stranger)
            receive_until(stranger, b"\n")
        with people.come(guest_of(served)) as person:
            person.expect(rb"\[attached to ")
        assert strangers[0].recv(1) == b""
        people.server.expect_log("others came before it had said who it is")
    finally:
        for stranger in strangers:
            stranger.close()


def test_there_are_so_many_connections(served: Daemon, serve: Serve) -> None:
    people = serve(change="ssh.MOST_CONNECTIONS = 1")
    with people.come(guest_of(served)) as person:
        person.expect(rb"\[attached to ")
        with socket.create_connection(("127.0.0.1", people.server.port), WITHIN) as another:
            assert another.recv(1) == b""
        people.server.expect_log("did not come in: 1 others are here")
        person.type(ESCAPE + b"?")
        person.expect(rb"this list")


def test_who_does_not_say_who_it_is_in_time_is_hung_up_on(served: Daemon, serve: Serve) -> None:
    people = serve(change="ssh.GRACE_S = 0.2")
    assert served is not None
    with socket.create_connection(("127.0.0.1", people.server.port), WITHIN) as stranger:
        while stranger.recv(1 << 12):
            pass
    people.server.expect_log("did not come in: ")


def test_refusals_do_not_fill_the_log(served: Daemon, serve: Serve) -> None:
    people = serve()
    for _ in range(15):
        with socket.create_connection(("127.0.0.1", people.server.port), WITHIN) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            while stranger.recv(1 << 12):
                pass
    with people.come(guest_of(served)) as person:
        person.expect(rb"\[attached to ")
    people.server.expect_log("is ann@laptop, for ")
    assert people.server.said("did not come in") == 10


def test_a_client_that_does_not_read_makes_only_itself_lag(served: Daemon, serve: Serve) -> None:
    """However large a window it gives, and whether it is the channel or the connection."""
    people, guest = serve(), guest_of(served)
    process = psutil.Process(people.server.process.pid)
    with boot(served) as console, people.come(guest, terminal=False) as other:
        console.write(b"begin ")
        other.expect(rb"begin ")
        conn = people.connect(guest)
        try:
            # The connection is not read at all, though the window has room for everything.
            chan, lazy = people.loop.run(
                conn.create_session(Session, encoding=None, window=(1 << 31) - 1)
            )
            assert chan is not None
            wait_port(served, readers=2)
            before = process.memory_info().rss
            people.loop.call(transport(conn).pause_reading)
            for _ in range(32):
                console.write(numbered(1 << 20), depth=16)
                other.expect(rb"00ffff8\n")
            assert process.memory_info().rss - before < 16 << 20
            people.loop.call(transport(conn).resume_reading)
            console.write(b"the end")
            other.expect(rb"the end")
            with lazy.changed:
                assert lazy.changed.wait_for(lambda: lazy.out.endswith(b"the end"), WITHIN)
            said = re.search(rb"\[(\d+) bytes are missing here\]", bytes(lazy.err))
            assert said is not None
        finally:
            people.hang_up(conn)


def test_a_client_that_asks_and_does_not_read_makes_nothing_grow(
    served: Daemon, serve: Serve
) -> None:
    """Its channel has little window, so that no answer gets out; what it types does."""
    people, guest = serve(), guest_of(served)
    process = psutil.Process(people.server.process.pid)
    with boot(served) as console:
        console.write(numbered(1 << 20), depth=16)
        conn = people.connect(guest)
        try:
            person = Person(people.loop, conn, term_type="xterm", window=1 << 12)
            person.expect(rb"help\]\r\n0000000\n")
            people.loop.call(person.chan.pause_reading)
            before = process.memory_info().rss
            for _ in range(16):
                person.type((ESCAPE + b"?" + ESCAPE + b"w") * (1 << 10))
            person.type(b"typed all the same")
            assert console.read(5) == b"typed"
            assert process.memory_info().rss - before < 16 << 20
        finally:
            people.hang_up(conn)
        with people.come(guest) as person:
            person.expect(rb"\[attached to ")


def test_a_flood_of_sizes_and_variables_ends_with_the_last_size(
    served: Daemon, serve: Serve
) -> None:
    people = serve()
    variables = {f"V{number}": "x" * 1000 for number in range(1000)}
    with boot(served), people.come(guest_of(served), env=variables) as person:
        person.expect(rb"\[attached to ")

        def flood() -> None:
            for number in range(5000):
                person.chan.change_terminal_size(number % 300 + 1, (1 << 32) - 1 - number % 2)
                person.chan.change_terminal_size(number % 300 + 1, number % 100 + 1)
            person.chan.change_terminal_size(1 << 31, 1 << 31)
            person.chan.change_terminal_size(100, 40)

        person.loop.call(flood)
        wait_port(served, columns=100, rows=40)


def test_a_session_with_tiny_packets_is_refused(served: Daemon, serve: Serve) -> None:
    people = serve()
    conn = people.connect(guest_of(served))
    try:
        person = Person(people.loop, conn, max_pktsize=16)
        person.expect(rb"\[packets of 16 bytes are too small here\]", aside=True)
        assert person.wait() == 1
    finally:
        people.hang_up(conn)


# The server itself


def test_the_host_s_key_is_made_once_for_its_owner_alone(served: Daemon, serve: Serve) -> None:
    first = serve().server
    assert served is not None
    assert stat.S_IMODE(first.host_key.stat().st_mode) == 0o600
    made = first.host_key.read_bytes()
    first.close()
    assert serve().server.host_key.read_bytes() == made
    assert asyncssh.import_private_key(made).get_algorithm() == "ssh-ed25519"


def run(folder: Path, *options: str) -> str:
    """Return the one line with which the command fails."""
    ended = command(folder, "ssh", *options)
    assert ended.returncode in (1, 2)
    lines = [line for line in ended.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    return lines[0]


def test_a_host_key_that_others_may_read_is_refused(folder: Path) -> None:
    key, keys = folder / "key", folder / "keys"
    key.write_bytes(KEY.export_private_key())
    key.chmod(0o640)
    keys.write_text(public(KEY))
    line = run(folder, f"--host-key={key}", f"--authorized-keys={keys}")
    assert f"others may read the host key {key}: chmod 600 {key}" in line


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--authorized-keys={folder}/none"], "cannot read {folder}/none: no such file"),
        (["--listen=nowhere"], "cannot listen at nowhere: give HOST:PORT"),
        (["--listen=127.0.0.1:99999"], "cannot listen at 127.0.0.1:99999: give HOST:PORT"),
        (["--listen=192.0.2.1:2222"], "cannot listen at 192.0.2.1:2222: "),
        (["--listen=unix:{folder}/none/s"], "{folder}/none does not exist"),
        (["--host-key={folder}/keys"], "{folder}/keys is no host key that can be used"),
        (["--access={folder}/keys"], "{folder}/keys: "),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(
    folder: Path, options: list[str], what: str
) -> None:
    (folder / "keys").write_text(public(KEY))
    (folder / "keys").chmod(0o600)
    given = [option.format(folder=folder) for option in options]
    line = run(folder, f"--authorized-keys={folder}/keys", f"--host-key={folder}/h", *given)
    assert what.format(folder=folder) in line


def test_it_listens_at_a_unix_socket_too(served: Daemon, serve: Serve, folder: Path) -> None:
    place = folder / "ssh.sock"
    people = serve(listen=f"unix:{place}")
    near = socket.socket(socket.AF_UNIX)
    near.connect(str(place))
    with boot(served), people.come(guest_of(served), sock=near) as person:
        person.type(ESCAPE + b"w")
        person.expect(rb"ann@laptop, ssh from a unix socket \(you\)")
    people.server.close()
    assert not os.path.exists(place)


def test_nothing_stays_of_a_person_who_is_gone(served: Daemon, serve: Serve) -> None:
    people = serve()
    with boot(served), people.come(guest_of(served)) as person:
        person.expect(rb"\[attached to ")
        held = len(os.listdir(f"/proc/{people.server.process.pid}/fd"))
        for _ in range(3):
            with people.come(guest_of(served)) as another:
                another.expect(rb"\[attached to ")
            wait_port(served, readers=1)
        with people.come(guest_of(served)) as another:
            another.expect(rb"\[attached to ")
            wait_port(served, readers=2)
            assert len(os.listdir(f"/proc/{people.server.process.pid}/fd")) == held + 2


def test_it_ends_with_its_people_still_there(served: Daemon, serve: Serve) -> None:
    people = serve()
    with people.come(guest_of(served)) as person:
        person.expect(rb"\[attached to ")
        people.server.process.send_signal(signal.SIGINT)
        wait_ended(people.server.process.pid)
        assert people.server.process.wait() == 0
