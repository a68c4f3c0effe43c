"""Who gets in at a daemon: sockets' owners, users by name, TLS and certificates, and limits."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from scene import assert_same, attach, boot, call, converse, exactly, numbered, port_of, wait_port
from vhost_device_console.testing import ConsoleDriver, GuestMemory, connect_like_qemu

from authority import Authority
from conftest import StartDaemon
from launch import WITHIN, Daemon, Ports, command, receive_until, until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become someone else")

NOBODY = 65534


@contextmanager
def boot_at(path: Path) -> Iterator[ConsoleDriver]:
    """Give the console of a guest whose vhost-user socket is at `path`."""
    with GuestMemory() as memory, connect_like_qemu(str(path), memory, timeout=WITHIN) as frontend:
        console = ConsoleDriver(frontend)
        console.wait_open()
        yield console


# Unix sockets


def owned(path: str | Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid


def test_every_socket_is_its_owner_s_alone(daemon: StartDaemon) -> None:
    running = daemon("unix")
    paths = [*running.sockets, *running.data, running.monitor]
    assert {owned(path)[0] for path in paths} == {0o600}


@needs_root
def test_all_but_the_monitor_socket_can_be_given_away(daemon: StartDaemon) -> None:
    options = ("--socket-mode", "0620", "--socket-owner", "12345", "--socket-group", "54321")
    running = daemon("unix", 1, *options)
    assert {owned(path) for path in (*running.sockets, *running.data)} == {(0o620, 12345, 54321)}
    assert owned(running.monitor) == (0o600, 0, 0)


@contextmanager
def stranger(path: str) -> Iterator[int]:
    """Give the id of another user's process that connects to `path` and is hung up on."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(WITHIN)
                client.connect(path)
                status = len(client.recv(1))
        except ConnectionError:
            status = 0
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        assert os.waitpid(pid, 0) == (pid, 0)


@needs_root
def test_only_who_is_named_is_served(daemon: StartDaemon, folder: Path) -> None:
    folder.chmod(0o755)
    running = daemon("unix", 1, "--socket-mode", "0666", "--allow-uid", "0")
    for path in (running.sockets[0], running.data[0]):
        with stranger(path) as pid:
            running.expect_log(f"process {pid} of user {NOBODY} may not connect")
    assert running.status()[0]["refused"] == 2
    with boot(running) as console, attach(running) as peer:
        converse(console, peer)


@needs_root
def test_whoever_is_named_besides_root_is_served(daemon: StartDaemon, folder: Path) -> None:
    folder.chmod(0o755)
    running = daemon("unix", 1, "--socket-mode", "0666", "--allow-uid", "nobody")
    with call(running) as peer, suppress(ConnectionError):
        assert peer.recv(1) == b""
    pid = os.fork()
    if pid == 0:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        client = socket.socket(socket.AF_UNIX)
        client.connect(running.data[0])
        signal.pause()
    try:
        wait_port(running, readers=1)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@needs_root
def test_no_other_user_commands_a_daemon(daemon: StartDaemon, folder: Path) -> None:
    running = daemon("unix")
    for path in (folder, folder / "run"):
        path.chmod(0o755)
    os.chmod(running.monitor, 0o666)
    with stranger(running.monitor) as pid:
        running.expect_log(f"a command was refused: process {pid} of user {NOBODY}")


# TCP


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_not_let_in_without_a_word(host: str, folder: Path) -> None:
    arguments = ("-s", str(folder / "c"), "-b", "network", "--tcp-host", host)
    done = command(folder, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"vhost-device-console: error: .* other machines could .*\n", done.stderr)
    assert "c0" not in os.listdir(folder)


def test_other_machines_are_let_in_on_demand(daemon: StartDaemon) -> None:
    running = daemon("network", 1, "--tcp-host", "0.0.0.0", "--tcp-insecure")
    assert port_of(running)["endpoint"] == f"0.0.0.0:{running.tcp}"
    with attach(running):
        pass


def test_a_port_has_no_more_clients_than_it_may(daemon: StartDaemon) -> None:
    running = daemon("network", 1, "--max-clients", "2")
    with attach(running) as first, attach(running, readers=2) as second, call(running) as third:
        assert third.recv(1) == b""
        first.close()
        wait_port(running, readers=1)
        with attach(running, readers=2):
            pass
        second.close()


# TLS


@pytest.fixture
def authority(folder: Path) -> Authority:
    return Authority(folder)


@pytest.fixture
def secure(daemon: StartDaemon, authority: Authority, folder: Path) -> Daemon:
    """Give a daemon of one guest whose clients need certificates."""
    cert = authority.server(folder / "server.pem")
    options = ("--tls-cert", str(cert), "--tls-client-ca", str(authority.path))
    return daemon("network", 1, "--max-ports", "4", *options)


def dial(daemon: Daemon, authority: Authority, readers: int = 1) -> ssl.SSLSocket:
    """Return a client's connection, with which the port has so many readers."""
    assert daemon.tcp is not None
    peer = authority.dial(daemon.tcp, authority.client())
    try:
        wait_port(daemon, readers=readers)
    except BaseException:
        peer.close()
        raise
    return peer


def gateway_of(daemon: Daemon) -> int:
    """Return the process id of the gateway: the child that is no worker."""
    workers = {guest["worker"] for guest in daemon.status()}
    (found,) = {child.pid for child in psutil.Process(daemon.pid).children()} - workers
    return found


def test_a_console_by_tls(secure: Daemon, authority: Authority) -> None:
    assert port_of(secure)["endpoint"] == f"tls://127.0.0.1:{secure.tcp}"
    with boot(secure) as console, dial(secure, authority) as peer:
        converse(console, peer)
        data = numbered(1 << 20)
        console.write(data)
        assert_same(exactly(peer, len(data)), data)
        peer.sendall(data)
        assert_same(console.read_until(data[-8:]), data)


def test_who_has_no_certificate_reads_nothing(secure: Daemon, authority: Authority) -> None:
    assert secure.tcp is not None
    with boot(secure) as console:
        console.write(b"secret\n")
        with (
            authority.dial(secure.tcp) as peer,
            pytest.raises(ssl.SSLError, match="certificate required"),
        ):
            peer.recv(1)
        secure.expect_log(r"c\.sock0: port 0: \S+ was refused: peer did not return a certificate")
        assert port_of(secure)["readers"] == 0
        with dial(secure, authority) as peer:
            receive_until(peer, b"secret\n")


def test_who_does_not_speak_tls_reads_nothing(secure: Daemon) -> None:
    with boot(secure) as console, call(secure) as peer:
        console.write(b"secret\n")
        peer.sendall(b"let me in\n" * 10)
        with suppress(ConnectionResetError):
            assert b"secret" not in peer.recv(1000)
            assert peer.recv(1) == b""
        secure.expect_log("was refused: wrong version number")


def test_a_dead_worker_is_not_noticed_by_tls(secure: Daemon, authority: Authority) -> None:
    data = numbered(1 << 20)
    with boot(secure) as console, dial(secure, authority) as peer:
        console.write(data[: len(data) // 2])
        (worker,) = secure.workers()
        os.kill(worker, signal.SIGKILL)
        console.write(data[len(data) // 2 :])
        assert_same(exactly(peer, len(data)), data)
        converse(console, peer)
        assert secure.workers() != [worker]


def test_a_dead_gateway_has_a_successor(secure: Daemon, authority: Authority) -> None:
    with boot(secure) as console:
        with dial(secure, authority) as peer:
            gateway = gateway_of(secure)
            os.kill(gateway, signal.SIGKILL)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                peer.recv(1)
        secure.expect_log("the TLS gateway died: SIGKILL")
        wait_port(secure, readers=0)
        with dial(secure, authority) as peer:
            converse(console, peer)


def test_a_port_with_tls_comes_and_goes(
    secure: Daemon, authority: Authority, folder: Path, ports: Ports
) -> None:
    number = ports()
    add = ("port", "add", "c.sock0", f"name=more,console,backend=network,tcp-port={number}")
    done = command(folder, *add)
    assert done.stdout.strip() == f"port 1 of c.sock0, more, is at tls://127.0.0.1:{number}"
    with authority.dial(number, authority.client()) as peer:
        secure.until(lambda guests: guests[0]["ports"][1]["readers"] == 1, "nobody came")
        assert command(folder, "port", "remove", "c.sock0", "more").returncode == 0
        assert peer.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        # The gateway hears of it a moment after the daemon said it.
        until(lambda: authority.dial(number, authority.client()).close(), "it still listens")


def test_a_port_whose_certificate_is_no_use_is_not_added(
    secure: Daemon, folder: Path, ports: Ports
) -> None:
    (folder / "bad.pem").write_text("nonsense")
    number = ports()
    text = f"name=more,backend=network,tcp-port={number},tls-cert={folder}/bad.pem"
    done = command(folder, "port", "add", "c.sock0", text)
    assert done.returncode == 1
    assert "port 1: the certificate or its key: no PEM, or damaged" in done.stderr
    assert len(secure.status()[0]["ports"]) == 1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", number), WITHIN).close()


def test_a_certificate_that_is_no_use_is_one_line_at_the_start(folder: Path, ports: Ports) -> None:
    arguments = ("-s", str(folder / "c"), "-b", "network", "-p", str(ports()))
    done = command(folder, *arguments, "--tls-cert", str(folder / "no.pem"))
    assert done.returncode == 2
    assert done.stderr.endswith(f"error: cannot read {folder}/no.pem: no such file or directory\n")
    assert [name for name in os.listdir(folder) if name != "run"] == []


def test_what_a_guest_wrote_last_reaches_tls_clients_at_the_end(
    secure: Daemon, authority: Authority
) -> None:
    data = numbered(1 << 16)
    with boot(secure) as console, dial(secure, authority) as peer:
        console.write(data)
        secure.signal(signal.SIGTERM)
        assert_same(exactly(peer, len(data)), data)
        assert peer.recv(1) == b""
    assert secure.wait() == 0


def test_the_gateway_holds_nothing_of_a_guest_s(secure: Daemon, authority: Authority) -> None:
    with boot(secure), dial(secure, authority):
        pid = gateway_of(secure)
        held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert [name for name in held if "memfd" in name or str(secure.folder) in name] == []
        with open(f"/proc/{pid}/maps") as maps:
            assert "memfd" not in maps.read()
        with open(f"/proc/{pid}/status") as file:
            status = file.read()
    assert "\nNoNewPrivs:\t1\n" in status
    assert "\nCapEff:\t0000000000000000\n" in status


def test_there_is_no_gateway_without_tls(daemon: StartDaemon) -> None:
    running = daemon()
    assert len(psutil.Process(running.pid).children()) == len(running.workers())


def _everybody_reads(path: str) -> bool:
    """Tell whether a user without any right of its own can read the file at `path`."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresuid(NOBODY, NOBODY, NOBODY)
            with open(path, "rb"):
                status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


# A reload


def reload(daemon: Daemon) -> None:
    """Have a daemon begin anew, with other workers."""
    before = daemon.workers()
    daemon.signal(signal.SIGHUP)
    daemon.until(
        lambda guests: all(
            guest["state"] == "running" and guest["worker"] not in before for guest in guests
        ),
        "its workers are the old ones",
    )


def gateways_of(daemon: Daemon) -> set[int]:
    workers = {guest["worker"] for guest in daemon.status()}
    children = psutil.Process(daemon.pid).children()
    return {child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE} - workers


def test_a_reload_takes_new_certificates_and_leaves_who_is_there(
    secure: Daemon, authority: Authority, folder: Path
) -> None:
    assert secure.tcp is not None
    first = gateway_of(secure)
    with boot(secure) as console, dial(secure, authority) as peer:
        converse(console, peer)
        other = Authority(folder)
        other.server(folder / "server.pem")
        reload(secure)
        converse(console, peer)
        with pytest.raises(ssl.SSLCertVerificationError):
            authority.dial(secure.tcp, authority.client()).close()
        with other.dial(secure.tcp, authority.client()) as another:
            wait_port(secure, readers=2)
            peer.close()
            wait_port(secure, readers=1)
            converse(console, another)
            until(lambda: len(gateways_of(secure)) == 1, "the first gateway does not end")
            assert gateways_of(secure) != {first}


def test_a_reload_with_certificates_that_are_no_use_changes_nothing(
    secure: Daemon, authority: Authority, folder: Path
) -> None:
    before = secure.workers()
    with boot(secure) as console, dial(secure, authority) as peer:
        (folder / "server.pem").write_text("nonsense")
        secure.signal(signal.SIGHUP)
        secure.expect_log("the certificate or its key: no PEM, or damaged")
        secure.expect_log("nothing is reloaded")
        assert secure.workers() == before
        converse(console, peer)
        with dial(secure, authority, 2) as another:
            converse(console, another)


def test_a_reload_goes_on_counting_who_was_refused(daemon: StartDaemon) -> None:
    running = daemon("unix", 1, "--allow-uid", str(os.geteuid() + 1))
    with call(running) as peer, suppress(ConnectionError):
        assert peer.recv(1) == b""
    running.until(lambda guests: guests[0]["refused"] == 1, "nobody was refused")
    reload(running)
    with call(running) as peer, suppress(ConnectionError):
        assert peer.recv(1) == b""
    running.until(lambda guests: guests[0]["refused"] == 2, "nobody was refused again")


def configuration(folder: Path, *ports: str, mode: str = "0600") -> Path:
    """Write a configuration of one guest with these ports more than its console."""
    lines = ["[[guest]]", f'socket = "{folder}/s"', f'socket-mode = "{mode}"']
    for text in ('name = "c"\nconsole = true\nbackend = "unix"\npath = "FOLDER/c"', *ports):
        lines += ["[[guest.port]]", text.replace("FOLDER", str(folder))]
    path = folder / "c.toml"
    path.write_text("\n".join(lines))
    return path


def test_a_reload_gives_sockets_other_modes(folder: Path) -> None:
    config = configuration(folder)
    with Daemon(folder, None, 0, "--config", str(config), socket_path=None) as running:
        configuration(folder, mode="0660")
        reload(running)
        assert {owned(folder / name)[0] for name in ("s", "c")} == {0o660}
        assert owned(running.monitor)[0] == 0o600


def test_a_reload_brings_tls_to_a_port_and_takes_it_away(
    folder: Path, authority: Authority, ports: Ports
) -> None:
    number = ports()
    plain = f'name = "p"\nconsole = true\nbackend = "network"\ntcp-port = {number}'
    secret = f'{plain}\ntls-cert = "{authority.server(folder / "server.pem")}"'
    config = configuration(folder, plain)
    with (
        Daemon(folder, None, 0, "--config", str(config), socket_path=None) as running,
        socket.create_connection(("127.0.0.1", number), WITHIN),
    ):

        def wait_readers(count: int) -> None:
            running.until(
                lambda guests: guests[0]["ports"][1]["readers"] == count, f"never {count}"
            )

        wait_readers(1)
        configuration(folder, secret)
        reload(running)
        with authority.dial(number):
            wait_readers(2)
        wait_readers(1)
        configuration(folder, plain)
        reload(running)
        with socket.create_connection(("127.0.0.1", number), WITHIN):
            wait_readers(2)
        until(lambda: gateways_of(running) == set(), "the gateway does not end")


@pytest.mark.parametrize("more", ["guest", "port"])
def test_a_reload_with_what_cannot_be_had_leaves_the_rest(more: str, folder: Path) -> None:
    config = configuration(folder)
    with Daemon(folder, None, 0, "--config", str(config), socket_path=None) as running:
        (folder / "taken").touch()
        if more == "port":
            configuration(folder, 'name = "p"\nbackend = "unix"\npath = "FOLDER/taken"')
        else:
            other = config.read_text().replace("/s", "/taken").replace("/c", "/d")
            config.write_text(f"{config.read_text()}\n{other}")
        with boot_at(folder / "s") as console:
            reload(running)
            running.expect_log("taken is a file, not a socket")
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(WITHIN)
                peer.connect(str(folder / "c"))
                wait_port(running, readers=1)
                converse(console, peer)
        assert [guest["name"] for guest in running.status()] == ["s"]


@needs_root
def test_tls_is_spoken_as_the_user_that_the_daemon_becomes(
    daemon: StartDaemon, authority: Authority, folder: Path
) -> None:
    """The key is root's alone, also when the gateway is started again."""
    if not all(map(_everybody_reads, (ssl.__file__, psutil.__file__))):
        pytest.skip("this Python is not everybody's to read")
    (folder / "run").mkdir(mode=0o700)
    for path in (folder, folder / "run"):
        os.chown(path, NOBODY, NOBODY)
    cert = authority.server(folder / "server.pem")
    cert.chmod(0o600)
    umask = os.umask(0)  # for the socket that the daemon says it is ready at
    try:
        running = daemon("network", 1, "--tls-cert", str(cert), "--user", "nobody")
    finally:
        os.umask(umask)
    gateway = gateway_of(running)
    with open(f"/proc/{gateway}/status") as file:
        assert f"\nUid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}\n" in file.read()
    os.kill(gateway, signal.SIGKILL)
    running.expect_log("the TLS gateway died: SIGKILL")
    with boot(running) as console, dial(running, authority) as peer:
        converse(console, peer)
