"""Listeners and ptys: claimed all or none, and given back at the end."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import select
import socket
import stat
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import product
from pathlib import Path

import msgspec
import pytest
from vhost_device_console import claims
from vhost_device_console.admission import user_id
from vhost_device_console.config import (
    Access,
    Backend,
    Guest,
    Nested,
    Network,
    Port,
    Pty,
    Tls,
    Unix,
)
from vhost_device_console.endpoints import Endpoint, Endpoints, Inherited, Kept, KeptEndpoints
from vhost_device_console.errors import ConfigError

from launch import Ports

PRIVATE = Access()


def guest(
    path: Path | None,
    backend: Backend | None = None,
    fd: int | None = None,
    access: Access = PRIVATE,
) -> Guest:
    return Guest(
        name="g",
        ports=(Port(id=0, name="console0", backend=backend or Nested(), access=access),),
        max_ports=1,
        socket_path=None if path is None else str(path),
        fd=fd,
        access=access,
    )


@contextmanager
def refused(pattern: str) -> Iterator[None]:
    """Expect a ConfigError of one line, and not one descriptor more than before."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match=pattern) as raised:
        yield
    assert "\n" not in str(raised.value)
    assert os.listdir("/proc/self/fd") == before


def leave_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
        made.listen()


def connect(path: Path | str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.connect(str(path))
    return made


def as_nobody(action: Callable[[], None], groups: Sequence[int] = ()) -> str:
    """Run `action` without privileges in a child and return the error it raised."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(groups)
            os.setresuid(65534, 65534, 65534)
            action()
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read, "rb") as pipe:
        return pipe.read().decode()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become someone else")


# Unix listeners


def test_a_frontend_can_connect_from_the_start(folder: Path) -> None:
    with closing(Endpoints(guest(folder / "s"))), closing(connect(folder / "s")):
        pass


def test_a_socket_is_its_owner_s_alone(folder: Path) -> None:
    with closing(Endpoints(guest(folder / "s"))):
        assert stat.S_IMODE((folder / "s").stat().st_mode) == 0o600


def test_the_umask_is_as_it_was(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        Endpoints(guest(folder / "s")).close()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


@pytest.mark.parametrize("kind", ["unix", "network", "pty"])
def test_descriptors_are_non_blocking_and_closed_on_exec(
    kind: str, folder: Path, ports: Ports
) -> None:
    backends: dict[str, Backend] = {
        "unix": Unix(str(folder / "s.data")),
        "network": Network("127.0.0.1", ports()),
        "pty": Pty(None),
    }
    with closing(Endpoints(guest(folder / "s", backends[kind]))) as made:
        for fd in (made.frontend, made.ports[0].fd):
            assert fd is not None
            assert (os.get_blocking(fd), os.get_inheritable(fd)) == (False, False)


def test_closing_removes_what_was_made(folder: Path) -> None:
    Endpoints(guest(folder / "s", Unix(str(folder / "d")))).close()
    assert os.listdir(folder) == []


def test_closing_twice_is_closing_once(folder: Path) -> None:
    made = Endpoints(guest(folder / "s"))
    made.close()
    made.close()


def test_closing_leaves_a_socket_that_took_the_place_of_ours(folder: Path) -> None:
    made = Endpoints(guest(folder / "s"))
    os.rename(folder / "s", folder / "old")
    leave_stale(folder / "s")
    made.close()
    assert sorted(os.listdir(folder)) == ["old", "s"]


def test_a_stale_socket_is_replaced(folder: Path) -> None:
    leave_stale(folder / "s")
    with closing(Endpoints(guest(folder / "s"))), closing(connect(folder / "s")):
        pass


def test_a_live_socket_is_refused_and_stays(folder: Path) -> None:
    with closing(Endpoints(guest(folder / "s"))):
        with refused("s is in use by another process"):
            Endpoints(guest(folder / "s"))
        connect(folder / "s").close()


def test_a_live_socket_with_a_full_backlog_is_refused(folder: Path) -> None:
    with ExitStack() as undo:
        live = undo.enter_context(socket.socket(socket.AF_UNIX))
        live.bind(str(folder / "s"))
        live.listen(0)
        undo.enter_context(connect(folder / "s"))
        with refused("in use by another process"):
            Endpoints(guest(folder / "s"))


def test_a_live_datagram_socket_is_refused(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as live:
        live.bind(str(folder / "s"))
        with refused("in use by another process"):
            Endpoints(guest(folder / "s"))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: path.write_text("precious"), "a file"),
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: path.symlink_to("elsewhere"), "a symbolic link"),
        (lambda path: os.mkfifo(path), "something else"),
    ],
    ids=["file", "folder", "link", "fifo"],
)
def test_anything_but_a_socket_is_refused_and_stays(
    make: Callable[[Path], None], kind: str, folder: Path
) -> None:
    make(folder / "s")
    with refused(f"s is {kind}, not a socket: remove it"):
        Endpoints(guest(folder / "s"))
    assert os.path.lexists(folder / "s")


def test_a_link_to_a_stale_socket_is_refused_too(folder: Path) -> None:
    leave_stale(folder / "real")
    (folder / "s").symlink_to("real")
    with refused("symbolic link"):
        Endpoints(guest(folder / "s"))
    assert (folder / "real").exists()


def test_a_missing_folder_is_named(folder: Path) -> None:
    with refused(re.escape(f"folder {folder}/no does not exist")):
        Endpoints(guest(folder / "no" / "s"))


def test_a_file_in_the_folder_s_place_is_named(folder: Path) -> None:
    (folder / "f").touch()
    with refused(re.escape(f"{folder}/f is not a folder")):
        Endpoints(guest(folder / "f" / "s"))


def test_a_name_longer_than_the_file_system_takes_is_refused(folder: Path) -> None:
    with refused("cannot create socket .*too long"):
        Endpoints(guest(folder / ("x" * 300)))


@needs_root
def test_a_folder_without_permission_is_named(folder: Path) -> None:
    folder.chmod(0o755)
    said = as_nobody(lambda: Endpoints(guest(folder / "s")).close())
    assert said == (
        f"ConfigError: cannot create socket {folder}/s: no permission in folder {folder}"
    )


@needs_root
def test_another_user_s_live_socket_is_refused(folder: Path) -> None:
    folder.chmod(0o777)
    with closing(Endpoints(guest(folder / "s"))):
        said = as_nobody(lambda: Endpoints(guest(folder / "s")).close())
    assert said == (f"ConfigError: {folder}/s is a socket of another user: choose another path")


@needs_root
def test_a_folder_that_cannot_be_listed_is_no_hindrance(folder: Path) -> None:
    folder.chmod(0o333)
    assert as_nobody(lambda: Endpoints(guest(folder / "s")).close()) == ""


def test_a_claim_waits_for_another_in_the_same_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []

    def release(_seconds: float) -> None:
        waited.append((folder / "s").exists())
        fcntl.flock(holder, fcntl.LOCK_UN)

    monkeypatch.setattr(time, "sleep", release)
    holder = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        Endpoints(guest(folder / "s")).close()
    finally:
        os.close(holder)
    assert waited == [False]


def test_a_stranger_s_lock_on_the_folder_does_not_stop_us(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_CLAIM_WITHIN", 0.05)
    holder = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        Endpoints(guest(folder / "s")).close()
    finally:
        os.close(holder)


def test_a_data_socket_that_cannot_be_had_takes_the_frontend_s_with_it(folder: Path) -> None:
    (folder / "d").touch()
    with refused("d is a file"):
        Endpoints(guest(folder / "s", Unix(str(folder / "d"))))
    assert os.listdir(folder) == ["d"]


def test_only_a_stale_socket_is_removed_for_the_asking(folder: Path) -> None:
    leave_stale(folder / "dead")
    with closing(Endpoints(guest(folder / "live"))):
        assert claims.remove_if_stale(str(folder / "dead"))
        assert not claims.remove_if_stale(str(folder / "live"))
        assert os.listdir(folder) == ["live"]


def test_a_stale_socket_that_cannot_be_removed_is_nobody_s_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlink(_path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    leave_stale(folder / "dead")
    monkeypatch.setattr(os, "unlink", unlink)
    assert claims.remove_if_stale(str(folder / "dead"))


# TCP listeners


def test_a_tcp_listener_is_on_the_loopback_alone(folder: Path, ports: Ports) -> None:
    port = ports()
    with closing(Endpoints(guest(folder / "s", Network("127.0.0.1", port)))) as made:
        assert made.ports[0].name == f"127.0.0.1:{port}"
        with socket.create_connection(("127.0.0.1", port)) as client:
            assert client.getpeername() == ("127.0.0.1", port)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port)).close()


def _has_ipv6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not _has_ipv6(), reason="no IPv6 here")
def test_a_port_may_be_an_ipv6_address_s(folder: Path, ports: Ports) -> None:
    port = ports()
    with closing(Endpoints(guest(folder / "s", Network("::1", port)))) as made:
        assert made.ports[0].name == f"[::1]:{port}"
        with socket.create_connection(("::1", port)):
            pass


def test_an_address_of_another_machine_is_refused(folder: Path) -> None:
    with refused("cannot use TCP port 192.0.2.1:5: cannot assign requested address"):
        Endpoints(guest(folder / "s", Network("192.0.2.1", 5)))


def test_a_port_in_use_is_refused(folder: Path, ports: Ports) -> None:
    port = ports()
    with socket.socket() as live:
        live.bind(("127.0.0.1", port))
        live.listen()
        with refused(f"TCP port 127.0.0.1:{port} is in use: choose another"):
            Endpoints(guest(folder / "s", Network("127.0.0.1", port)))
    assert os.listdir(folder) == []


def test_a_port_is_free_again_right_after_its_clients(folder: Path, ports: Ports) -> None:
    port = ports()
    network = Network("127.0.0.1", port)
    with closing(Endpoints(guest(folder / "s", network))) as first:
        assert first.ports[0].fd is not None
        with socket.socket(fileno=os.dup(first.ports[0].fd)) as listener:
            listener.setblocking(True)
            client = socket.create_connection(("127.0.0.1", port))
            listener.accept()[0].close()  # our side closes first: TIME_WAIT is here
            client.close()
    Endpoints(guest(folder / "s", network)).close()


# Ptys


@pytest.fixture
def pty(folder: Path) -> Iterator[Endpoints]:
    with closing(Endpoints(guest(folder / "s", Pty(str(folder / "link"))))) as made:
        yield made


def test_a_pty_carries_bytes_unchanged_both_ways(pty: Endpoints) -> None:
    everything = bytes(range(256))
    master = pty.ports[0].fd
    assert master is not None
    slave = os.open(pty.ports[0].name, os.O_RDWR | os.O_NOCTTY)
    try:
        for source, sink in ((master, slave), (slave, master)):
            os.write(source, everything)
            received = b""
            while len(received) < len(everything):
                assert select.select([sink], [], [], 10)[0]
                received += os.read(sink, 1000)
            assert received == everything
    finally:
        os.close(slave)


def test_a_pty_is_raw_for_the_second_client_too(pty: Endpoints) -> None:
    for _ in range(2):
        slave = os.open(pty.ports[0].name, os.O_RDWR | os.O_NOCTTY)
        flags = termios.tcgetattr(slave)
        os.close(slave)
        assert flags[3] & (termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN) == 0
        assert flags[1] & termios.OPOST == 0
        assert flags[0] & (termios.ICRNL | termios.IXON) == 0


def test_a_pty_is_its_owner_s_alone(pty: Endpoints) -> None:
    assert stat.S_IMODE(os.stat(pty.ports[0].name).st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a pty away")
def test_a_pty_is_whose_the_daemon_is_going_to_be() -> None:
    port = Port(id=0, name="p", backend=Pty(None), access=Access(owner="nobody"))
    endpoint = Endpoint(port)
    try:
        assert os.stat(endpoint.name).st_uid == user_id("nobody")
    finally:
        endpoint.close()


def test_a_pty_s_link_leads_to_its_slave(pty: Endpoints, folder: Path) -> None:
    assert os.readlink(folder / "link") == pty.ports[0].name


def test_a_pty_s_link_goes_with_it(pty: Endpoints, folder: Path) -> None:
    pty.close()
    assert os.listdir(folder) == []


def test_a_link_that_took_the_place_of_ours_stays(pty: Endpoints, folder: Path) -> None:
    os.rename(folder / "link", folder / "old")
    (folder / "link").symlink_to("elsewhere")
    pty.close()
    assert os.readlink(folder / "link") == "elsewhere"


def test_a_link_left_behind_is_replaced(folder: Path) -> None:
    (folder / "link").symlink_to("/dev/pts/999999")
    with closing(Endpoints(guest(folder / "s", Pty(str(folder / "link"))))) as made:
        assert os.readlink(folder / "link") == made.ports[0].name


@pytest.mark.parametrize("target", ["/nowhere", "/dev/null"])
def test_any_other_link_is_refused_and_stays(target: str, folder: Path) -> None:
    (folder / "link").symlink_to(target)
    with refused("pty link .*/link exists: remove it"):
        Endpoints(guest(folder / "s", Pty(str(folder / "link"))))
    assert os.readlink(folder / "link") == target


def test_a_link_to_a_pty_in_use_is_refused(folder: Path) -> None:
    with closing(Endpoints(guest(folder / "s", Pty(str(folder / "link"))))) as first:
        with refused("exists"):
            Endpoints(guest(folder / "t", Pty(str(folder / "link"))))
        assert os.readlink(folder / "link") == first.ports[0].name


def test_a_link_in_a_missing_folder_is_refused(folder: Path) -> None:
    with refused("cannot create pty link .*no does not exist"):
        Endpoints(guest(folder / "s", Pty(str(folder / "no" / "link"))))
    assert os.listdir(folder) == []


# The terminal and inherited sockets


def test_the_terminal_has_no_descriptor(folder: Path) -> None:
    with closing(Endpoints(guest(folder / "s"))) as made:
        assert (made.ports[0].fd, made.ports[0].name) == (None, "terminal")


def test_after_one_frontend_of_an_inherited_listener_another_can_come(folder: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "s"))
    listener.listen()
    with closing(Endpoints(guest(None, fd=listener.detach()))) as made:
        assert made.listening()


def test_after_an_inherited_connection_no_other_frontend_can_come() -> None:
    ours, theirs = socket.socketpair()
    with theirs, closing(Endpoints(guest(None, fd=ours.detach()))) as made:
        assert not made.listening()


def test_an_inherited_socket_is_non_blocking_and_closed_on_exec() -> None:
    ours, theirs = socket.socketpair()
    ours.set_inheritable(True)
    with theirs, closing(Endpoints(guest(None, fd=ours.detach()))) as made:
        assert not os.get_blocking(made.frontend)
        assert not os.get_inheritable(made.frontend)


def test_an_inherited_listener_s_path_is_its_maker_s(folder: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "s"))
    listener.listen()
    Endpoints(guest(None, fd=listener.detach())).close()
    assert (folder / "s").exists()


@pytest.mark.parametrize("fd", [-1, 1 << 15, 1 << 40])
def test_a_descriptor_that_is_not_open_is_refused(fd: int) -> None:
    with refused(f"--fd {fd} is not open"):
        Endpoints(guest(None, fd=fd))


def test_a_file_is_no_socket(folder: Path) -> None:
    with open(folder / "f", "w") as file, refused("is not a socket"):
        Endpoints(guest(None, fd=file.fileno()))


@pytest.mark.parametrize(
    ("family", "kind"),
    [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM)],
)
def test_another_kind_of_socket_is_refused(family: int, kind: int) -> None:
    with socket.socket(family, kind) as made, refused("is not a unix stream socket"):
        Endpoints(guest(None, fd=made.fileno()))


def test_a_socket_that_is_neither_listening_nor_connected_is_refused() -> None:
    with socket.socket(socket.AF_UNIX) as made, refused("neither listening nor connected"):
        Endpoints(guest(None, fd=made.fileno()))


# One port's, while the guest runs


def test_one_port_s_endpoint_is_there_until_it_is_closed(folder: Path) -> None:
    path = folder / "d"
    made = Endpoint(Port(id=5, name="p", backend=Unix(str(path))))
    assert made.name == str(path)
    connect(path).close()
    made.close()
    made.close()
    assert not path.exists()


def test_one_port_s_endpoint_that_cannot_be_had_leaves_nothing(folder: Path) -> None:
    with refused("folder .* does not exist"):
        Endpoint(Port(id=5, name="p", backend=Unix(str(folder / "no" / "d"))))


@pytest.mark.parametrize("backend", [Network("127.0.0.1", 5), Unix("d"), Pty(None)])
def test_without_descriptors_an_endpoint_is_one_clear_line(
    backend: Backend, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(ConfigError, match="too many open files"):
            Endpoint(Port(id=5, name="p", backend=backend))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Who owns a socket


def owned(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid


def test_a_socket_has_the_mode_that_is_asked_for(folder: Path) -> None:
    wanted = guest(folder / "s", Unix(str(folder / "d")), access=Access(0o666))
    with closing(Endpoints(wanted)):
        assert {owned(folder / name)[0] for name in ("s", "d")} == {0o666}


@needs_root
def test_a_socket_has_the_owner_and_group_that_are_asked_for(folder: Path) -> None:
    wanted = guest(folder / "s", Unix(str(folder / "d")), access=Access(0o640, "12345", "54321"))
    with closing(Endpoints(wanted)):
        assert {owned(folder / name) for name in ("s", "d")} == {(0o640, 12345, 54321)}
    assert os.listdir(folder) == []


@needs_root
def test_nobody_may_connect_for_a_moment_who_may_not_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each change the file's mode, owner and group let in only whom the last ones do."""
    seen = []

    def watched(change: Callable[..., None]) -> Callable[..., None]:
        def spy(*arguments: object) -> None:
            change(*arguments)
            seen.append(owned(folder / "s"))

        return spy

    for name in ("chown", "chmod"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    with closing(Endpoints(guest(folder / "s", access=Access(0o660, "12345", "54321")))):
        pass
    assert seen == [(0o600, 0, 54321), (0o660, 0, 54321), (0o660, 12345, 54321)]


@needs_root
@pytest.mark.parametrize(
    ("access", "why"),
    [
        (Access(owner="12345"), "to user 12345: it takes CAP_CHOWN"),
        (Access(group="54321"), "to group 54321: it takes that this daemon's user is in it"),
    ],
    ids=["owner", "group"],
)
def test_an_owner_that_cannot_be_given_is_one_line_and_leaves_nothing(
    access: Access, why: str, folder: Path
) -> None:
    folder.chmod(0o777)
    said = as_nobody(lambda: Endpoints(guest(folder / "s", access=access)).close())
    assert said.startswith(f"ConfigError: cannot give socket {folder}/s {why}")
    assert os.listdir(folder) == []


@needs_root
def test_a_group_of_one_s_own_needs_no_privilege(folder: Path) -> None:
    folder.chmod(0o777)
    wanted = guest(folder / "s", access=Access(0o660, group="54321"))

    def action() -> None:
        with closing(Endpoints(wanted)):
            assert owned(folder / "s") == (0o660, 65534, 54321)

    assert as_nobody(action, groups=[54321]) == ""


@pytest.mark.parametrize("access", [Access(owner="no-such"), Access(group="no-such")])
def test_an_owner_that_there_is_not_leaves_nothing(access: Access, folder: Path) -> None:
    with refused("there is no (user|group) 'no-such' on this machine"):
        Endpoints(guest(folder / "s", access=access))
    assert os.listdir(folder) == []


def test_a_user_to_let_in_that_there_is_not_is_refused(folder: Path) -> None:
    with refused("there is no user 'no-such' on this machine"):
        Endpoints(guest(folder / "s", access=Access(allow=("no-such",))))
    assert os.listdir(folder) == []


@needs_root
@pytest.mark.parametrize(
    ("moment", "other"),
    [
        *product(["before", "after"], ["link", "stranger's socket", "file"]),
        ("after", "socket"),  # before it, one of this user's is as good
    ],
)
def test_what_took_the_place_of_a_socket_is_not_given_away(
    moment: str, other: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write to the folder exchanges it around the look at what bind made."""
    victim = folder / "victim"
    if other == "file":
        victim.touch()
    else:
        leave_stale(victim)
    if other == "stranger's socket":
        os.chown(victim, 65534, 65534)
    before = owned(victim)
    lstat = os.lstat

    def swap() -> None:
        (folder / "s").unlink()
        if other == "link":
            (folder / "s").symlink_to(victim)
        else:
            victim.rename(folder / "s")

    def look(path: str) -> os.stat_result:
        if not (folder / "s").exists():
            return lstat(path)  # the look for a stale one
        monkeypatch.setattr(os, "lstat", lstat)
        if moment == "before":
            swap()
        status = lstat(path)
        if moment == "after":
            swap()
        return status

    monkeypatch.setattr(os, "lstat", look)
    with refused("s: something else took its place"):
        Endpoints(guest(folder / "s", access=Access(0o666, "12345")))
    if (folder / "s").exists():
        assert owned(folder / "s") == before


def test_each_listener_has_a_door_of_its_own(folder: Path) -> None:
    access = Access(allow=(str(os.geteuid() + 1),))
    with closing(Endpoints(guest(folder / "s", Unix(str(folder / "d")), access=access))) as made:
        for door in (made.door, made.ports[0].door):
            ours, theirs = socket.socketpair()
            with theirs:
                assert not door.admit(ours)
                assert ours.fileno() == -1


# Listeners that were made before


def listening(path: Path | None, port: int = 0) -> int:
    """Return a listener as a service manager makes them: blocking, and inherited."""
    made = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
    made.bind(str(path) if path else ("127.0.0.1", port))
    made.listen()
    made.set_inheritable(True)
    return made.detach()


def test_listeners_of_the_same_address_are_taken_over(folder: Path, ports: Ports) -> None:
    port = ports()
    fds = [listening(None, port), listening(folder / "s")]
    pool = Inherited([("data", fds[0]), ("frontend", fds[1])])
    with closing(Endpoints(guest(folder / "s", Network("127.0.0.1", port)), pool)) as made:
        assert [made.ports[0].fd, made.frontend] == fds
        for fd in fds:
            assert (os.get_blocking(fd), os.get_inheritable(fd)) == (False, False)
    pool.close()


def test_a_path_is_the_same_however_it_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    fd = listening(folder / "s")
    with closing(Endpoints(guest(Path("./s")), Inherited([("x", fd)]))) as made:
        assert made.frontend == fd


def test_somebody_else_s_socket_stays_at_the_end(folder: Path) -> None:
    fd = listening(folder / "s")
    Endpoints(guest(folder / "s", access=Access(0o666)), Inherited([("x", fd)])).close()
    assert stat.S_ISSOCK((folder / "s").stat().st_mode)


def test_somebody_else_s_socket_keeps_its_mode(folder: Path) -> None:
    fd = listening(folder / "s")
    (folder / "s").chmod(0o640)
    with closing(Endpoints(guest(folder / "s", access=Access(0o666)), Inherited([("x", fd)]))):
        assert owned(folder / "s")[0] == 0o640


def test_what_nobody_takes_is_closed_and_named(
    folder: Path, ports: Ports, caplog: pytest.LogCaptureFixture
) -> None:
    port = ports()
    pool = Inherited([("one", listening(folder / "s")), ("two", listening(None, port))])
    before = os.listdir("/proc/self/fd")
    pool.close()
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == len(before) - 2
    assert sorted(caplog.messages) == [
        f"inherited socket one, at {folder}/s, is no guest's: closed",
        f"inherited socket two, at 127.0.0.1:{port}, is no guest's: closed",
    ]


def test_what_is_no_listener_is_left_to_the_caller(folder: Path) -> None:
    ours, theirs = socket.socketpair()
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, datagrams, open(folder / "f", "w") as file:
        given = [("a", ours.fileno()), ("b", file.fileno()), ("c", datagrams.fileno())]
        pool = Inherited(given)
        pool.close()
        assert pool.others == given


# Going on as another program


def test_what_is_kept_is_adopted_and_removed_at_the_end(folder: Path, ports: Ports) -> None:
    wanted = Guest(
        name="g",
        ports=(
            Port(id=0, name="a", backend=Network("127.0.0.1", ports())),
            Port(id=1, name="b", backend=Unix(str(folder / "d"))),
            Port(id=2, name="c", backend=Pty(str(folder / "link"))),
        ),
        max_ports=3,
        socket_path=str(folder / "s"),
    )
    first = Endpoints(wanted)
    fds = [first.frontend, *(one.fd for one in first.ports.values())]
    with closing(connect(folder / "s")), closing(connect(folder / "d")):
        kept = msgspec.msgpack.decode(msgspec.msgpack.encode(first.keep()), type=KeptEndpoints)
        first.close()
        second = Endpoints(wanted, adopted=kept)
        assert [second.frontend, *(one.fd for one in second.ports.values())] == fds
        assert second.ports[2].name == first.ports[2].name
        for fd in (second.frontend, second.ports[1].fd):
            assert fd is not None
            with socket.socket(fileno=os.dup(fd)) as listener:
                listener.accept()[0].close()  # who came in between is not lost
    second.close()
    assert os.listdir(folder) == []


def test_what_was_inherited_stays_at_the_end_of_whoever_adopts_it(folder: Path) -> None:
    wanted = guest(folder / "s")
    kept = Endpoints(wanted, Inherited([("x", listening(folder / "s"))])).keep()
    Endpoints(wanted, adopted=kept).close()
    assert (folder / "s").exists()


def test_an_inherited_connection_can_be_adopted() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        wanted = guest(None, fd=ours.detach())
        with closing(Endpoints(wanted, adopted=Endpoints(wanted).keep())) as made:
            assert made.frontend == wanted.fd


def test_another_mode_holds_for_what_is_adopted(folder: Path) -> None:
    kept = Endpoints(guest(folder / "s")).keep()
    with closing(Endpoints(guest(folder / "s", access=Access(0o660)), adopted=kept)):
        assert owned(folder / "s")[0] == 0o660


@pytest.mark.parametrize(
    "backend", [Unix("elsewhere"), Network("127.0.0.1", 1), Pty("other"), Pty(None), Nested()]
)
@pytest.mark.parametrize("before", [Unix("d"), Pty("d")], ids=["unix", "pty"])
def test_what_does_not_fit_any_more_is_let_go(
    before: Backend, backend: Backend, folder: Path, ports: Ports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if isinstance(backend, Network):
        backend = Network("127.0.0.1", ports())
    kept = Endpoint(Port(id=0, name="p", backend=before)).keep()
    with closing(Endpoint(Port(id=0, name="p", backend=backend), adopted=kept)):
        assert not (folder / "d").exists()


def test_where_it_cannot_be_as_it_is_to_be_all_can_still_be_as_it_was(
    folder: Path, ports: Ports
) -> None:
    def described(*backends: Backend, path: str) -> Guest:
        numbered = [Port(id=n, name=f"p{n}", backend=one) for n, one in enumerate(backends)]
        return Guest(name="g", ports=tuple(numbered), max_ports=3, socket_path=str(folder / path))

    tcp, unix, pty = Network("127.0.0.1", ports()), Unix(f"{folder}/d"), Pty(f"{folder}/link")
    before = described(tcp, unix, pty, path="s")
    kept = Endpoints(before).keep()
    assert kept is not None
    (folder / "taken").touch()
    held = os.listdir("/proc/self/fd")
    for worse in (
        described(tcp, Unix(f"{folder}/new"), Pty(f"{folder}/taken"), path="s"),
        described(Unix(f"{folder}/new"), unix, Unix(f"{folder}/taken"), path="s2"),
        described(tcp, path="taken"),
    ):
        with pytest.raises(ConfigError, match="taken"):
            Endpoints(worse, adopted=kept)
    assert sorted(os.listdir(folder)) == ["d", "link", "s", "taken"]
    assert os.listdir("/proc/self/fd") == held
    with closing(Endpoints(before, adopted=kept)) as made:
        assert made.kept == kept
        connect(folder / "d").close()
    assert os.listdir(folder) == ["taken"]


def test_a_port_that_its_guest_has_no_more_is_let_go(folder: Path) -> None:
    kept = Endpoints(guest(folder / "s", Unix(str(folder / "d")))).keep()
    assert kept is not None
    kept = KeptEndpoints(kept.frontend, {5: kept.ports[0]})
    with closing(Endpoints(guest(folder / "s"), adopted=kept)):
        assert os.listdir(folder) == ["s"]


def test_a_socket_whose_file_is_gone_is_made_anew(folder: Path) -> None:
    kept = Endpoints(guest(folder / "s")).keep()
    (folder / "s").unlink()
    with closing(Endpoints(guest(folder / "s"), adopted=kept)):
        connect(folder / "s").close()


def test_what_was_kept_can_be_let_go(folder: Path) -> None:
    kept = Endpoint(Port(id=0, name="p", backend=Unix(str(folder / "d")))).keep()
    assert isinstance(kept, Kept)
    kept.release()
    assert os.listdir(folder) == []


# TLS


def test_who_comes_to_a_port_with_tls_is_not_the_port_s(folder: Path, ports: Ports) -> None:
    network = Network("127.0.0.1", ports(), Tls("c", "k"))
    with closing(Endpoints(guest(folder / "s", network))) as made:
        endpoint = made.ports[0]
        assert endpoint.fd is None
        assert endpoint.name == f"tls://127.0.0.1:{network.port}"
        assert endpoint.tls_listener is not None
        with (
            socket.socket(fileno=os.dup(endpoint.tls_listener)) as listener,
            socket.create_connection(("127.0.0.1", network.port)),
        ):
            listener.accept()[0].close()


def test_a_listener_with_tls_is_adopted_as_one_without(folder: Path, ports: Ports) -> None:
    port = ports()
    kept = Endpoints(guest(folder / "s", Network("127.0.0.1", port))).keep()
    wanted = guest(folder / "s", Network("127.0.0.1", port, Tls("c", "k")))
    with closing(Endpoints(wanted, adopted=kept)) as made:
        assert kept is not None
        assert (made.ports[0].fd, made.ports[0].tls_listener) == (None, kept.ports[0].fd)
