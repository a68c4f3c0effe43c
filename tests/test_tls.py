"""TLS at a TCP port: a real gateway, real certificates; the test is master, port and client."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import selectors
import signal
import socket
import ssl
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from vhost_device_console import gateway, privileges, tls
from vhost_device_console.config import Network, Port, Tls
from vhost_device_console.errors import ConfigError
from vhost_device_console.tls import Gateway

from authority import Authority
from launch import WITHIN, Ports, until, wait_ended

YESTERDAY = datetime.now(UTC) - timedelta(days=1)


@pytest.fixture
def authority(folder: Path) -> Authority:
    return Authority(folder)


class Desk:
    """A master of one port, and whoever came to it."""

    def __init__(
        self, ports: Ports, kept: Sequence[tuple[int, int]] = (), *, start: bool = True
    ) -> None:
        self.selector = selectors.DefaultSelector()
        self.came: list[tuple[str, int, socket.socket]] = []
        # As the master has it, so that every test shows that it needs no more.
        confine = partial(privileges.confine_gateway, True)
        self.gateway = Gateway(
            self.selector, lambda *who: self.came.append(who), settle=confine, kept=kept
        )
        if start:
            self.gateway.start()
        self.listener = socket.create_server(("127.0.0.1", ports()))
        self.listener.setblocking(False)
        self.address = self.listener.getsockname()

    def serve(self, cert: Path, ca: Path | None = None, most: int = 10) -> None:
        files = Tls(str(cert), str(cert), str(ca) if ca else None)
        port = Port(id=3, name="p", backend=Network(*self.address, files), max_clients=most)
        self.gateway.serve("g", port, self.listener.fileno())

    def turn(self) -> None:
        for key, _ in self.selector.select(0.01):
            key.data()

    def arrival(self) -> socket.socket:
        """Return the port's end of the next client's connection."""

        def look() -> bool:
            self.turn()
            return bool(self.came)

        until(look, "nobody came")
        guest, port, sock = self.came.pop(0)
        assert (guest, port) == ("g", 3)
        sock.settimeout(WITHIN)
        return sock

    @property
    def pid(self) -> int:
        return self.gateway.kept[-1][0]

    def close(self) -> None:
        self.gateway.close()
        self.listener.close()
        self.selector.close()
        for _, _, sock in self.came:
            sock.close()


class _Said(logging.Handler):
    """Writes to where a process that was forked, and closed all else, can."""

    def emit(self, record: logging.LogRecord) -> None:
        os.write(2, f"{record.getMessage()}\n".encode())


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], None]]:
    """Give a function that waits until a gateway has logged what it is given."""
    log, handler, text = logging.getLogger("vhost_device_console"), _Said(), ""
    before = log.level
    log.addHandler(handler)
    log.setLevel("INFO")

    def wait(pattern: str) -> None:
        def look() -> bool:
            nonlocal text
            text += capfd.readouterr().err
            return bool(re.search(pattern, text))

        until(look, f"{pattern} was not said")

    yield wait
    log.removeHandler(handler)
    log.setLevel(before)


@pytest.fixture
def desk(ports: Ports) -> Iterator[Desk]:
    with closing(Desk(ports)) as made:
        yield made


def dial(
    desk: Desk, authority: Authority, cert: trustme.LeafCert | None = None, **options: Any
) -> ssl.SSLSocket:
    return authority.dial(desk.address[1], cert, **options)


@contextmanager
def call(desk: Desk, authority: Authority) -> Iterator[tuple[ssl.SSLSocket, socket.socket]]:
    """Give a client and the port's end of its connection."""
    with dial(desk, authority) as client, desk.arrival() as port:
        yield client, port


def exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        more = sock.recv(count - len(data))
        assert more, f"{len(data)} of {count} bytes came"
        data += more
    return bytes(data)


def numbered(count: int) -> bytes:
    return b"".join(b"%07x\n" % at for at in range(0, count, 8))


def converse(client: socket.socket, port: socket.socket) -> None:
    port.sendall(b"to people")
    assert exactly(client, 9) == b"to people"
    client.sendall(b"to the guest")
    assert exactly(port, 12) == b"to the guest"


@contextmanager
def refused(desk: Desk) -> Iterator[None]:
    """Expect that who comes meanwhile is hung up on, and that the port does not hear of it."""
    with pytest.raises((ssl.SSLError, ConnectionError)):
        yield
    desk.turn()
    assert desk.came == []


# What passes


def test_bytes_pass_unchanged_both_ways(desk: Desk, authority: Authority, folder: Path) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    data = numbered(1 << 20)
    with call(desk, authority) as (client, port), ExitStack() as ends:
        for source, sink in ((client, port), (port, client)):
            pid = os.fork()
            if pid == 0:
                source.sendall(data)
                os._exit(0)
            ends.callback(os.waitpid, pid, 0)
            assert exactly(sink, len(data)) == data


def test_clients_do_not_hear_each_other(desk: Desk, authority: Authority, folder: Path) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    with call(desk, authority) as first, call(desk, authority) as second:
        converse(*second)
        converse(*first)


def test_the_port_s_end_is_tcp_on_the_loopback(
    desk: Desk, authority: Authority, folder: Path
) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    with call(desk, authority) as (_, port):
        assert port.family == socket.AF_INET
        assert port.getpeername()[0] == "127.0.0.1"


def test_a_port_that_lets_go_is_a_clean_farewell(
    desk: Desk, authority: Authority, folder: Path
) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    with call(desk, authority) as (client, port):
        port.sendall(b"last")
        port.close()
        assert exactly(client, 4) == b"last"
        assert client.recv(1) == b""


def test_a_client_that_vanishes_is_the_end_of_its_input(
    desk: Desk, authority: Authority, folder: Path
) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    with call(desk, authority) as (client, port):
        client.sendall(b"last")
        client.close()
        assert exactly(port, 4) == b"last"
        assert port.recv(1) == b""


class Half:
    """A client that can say that it types no more and read on, as ssl.SSLSocket cannot."""

    def __init__(self, desk: Desk, authority: Authority) -> None:
        self._sock = socket.create_connection(desk.address, WITHIN)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cafile=str(authority.path))
        self._tls = context.wrap_bio(self._in, self._out, server_hostname="127.0.0.1")
        self._until_done(self._tls.do_handshake)

    def _until_done(self, step: Callable[[], Any]) -> Any:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self._sock.sendall(self._out.read())
                self._in.write(self._sock.recv(1 << 16))
            finally:
                self._sock.sendall(self._out.read())

    def send(self, data: bytes) -> None:
        self._tls.write(data)
        self._sock.sendall(self._out.read())

    def recv(self, count: int) -> bytes:
        data: bytes = self._until_done(lambda: self._tls.read(count))
        return data

    def end(self) -> None:
        with suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        self._sock.sendall(self._out.read())

    def close(self) -> None:
        self._sock.close()


def test_a_client_that_types_no_more_still_reads(
    desk: Desk, authority: Authority, folder: Path
) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    with closing(Half(desk, authority)) as client, desk.arrival() as port:
        client.send(b"question")
        client.end()
        assert exactly(port, 8) == b"question"
        assert port.recv(1) == b""
        for answer in (b"one", b"two"):
            port.sendall(answer)
            assert client.recv(9) == answer


def test_a_port_that_says_no_more_still_hears(
    desk: Desk, authority: Authority, folder: Path
) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    with call(desk, authority) as (client, port):
        port.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        client.sendall(b"still here")
        assert exactly(port, 10) == b"still here"


def untaken(sock: socket.socket) -> int:
    """Return how many bytes the other side's system has not acknowledged."""
    count: int = struct.unpack("=i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]
    return count


def fill(sock: socket.socket) -> int:
    """Send until nothing more is taken for a moment; return how much was."""
    sock.settimeout(1)
    count = 0
    with suppress(TimeoutError):
        while True:
            count += sock.send(numbered(1 << 16))
    sock.settimeout(WITHIN)
    return count


def test_who_does_not_read_holds_the_port_up_and_misses_nothing(
    desk: Desk, authority: Authority, folder: Path
) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    with call(desk, authority) as (client, port):
        count = fill(port)
        # This side's, the gateway's and the client's socket buffers; the last is the system's.
        assert count < 12 << 20
        assert len(exactly(client, count)) == count


def test_who_does_not_read_can_type(desk: Desk, authority: Authority, folder: Path) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    with call(desk, authority) as (client, port):
        fill(port)
        client.sendall(b"stop that")
        assert exactly(port, 9) == b"stop that"


def test_what_was_typed_arrives_although_its_client_has_left(
    desk: Desk, authority: Authority, folder: Path
) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    data = numbered(1 << 20)
    with call(desk, authority) as (client, port):
        pid = os.fork()
        if pid == 0:
            client.sendall(data)
            os._exit(0)
        client.close()
        os.waitpid(pid, 0)
        assert exactly(port, len(data)) == data
        assert port.recv(1) == b""


def test_what_was_typed_arrives_although_its_client_broke_off(
    desk: Desk, authority: Authority, folder: Path
) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    data = numbered(1 << 17)
    with call(desk, authority) as (client, port):
        fill(port)
        client.sendall(data)
        until(lambda: untaken(client) == 0, "it was not all taken")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        client.close()
        assert exactly(port, len(data)) == data
        with suppress(ConnectionError):
            assert port.recv(1) == b""


# Who gets in


def test_who_does_not_speak_tls_is_hung_up_on(
    desk: Desk, authority: Authority, folder: Path, said: Callable[[str], None]
) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    with socket.create_connection(desk.address, WITHIN) as client, refused(desk):
        client.sendall(b"root\n" * 10)
        while client.recv(100):
            pass
        raise ConnectionResetError
    said(r"g: port 3: 127\.0\.0\.1:\d+ was refused: wrong version number")


def test_an_older_tls_is_refused(desk: Desk, authority: Authority, folder: Path) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    with refused(desk):
        dial(desk, authority, maximum_version=ssl.TLSVersion.TLSv1_2)


def test_a_client_with_a_certificate_gets_in_and_is_named(
    desk: Desk, authority: Authority, folder: Path, said: Callable[[str], None]
) -> None:
    desk.serve(authority.server(folder / "s.pem"), authority.path)
    with dial(desk, authority, authority.client()) as client, desk.arrival() as port:
        converse(client, port)
        near = "{}:{}".format(*port.getpeername())
    said(rf"g: port 3: 127\.0\.0\.1:\d+ \(alice\) comes in as {near}")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("none", "peer did not return a certificate"),
        ("foreign", "its certificate is not accepted: unable to get local issuer certificate"),
        ("expired", "its certificate is not accepted: certificate has expired"),
    ],
)
def test_other_clients_do_not(
    kind: str,
    why: str,
    desk: Desk,
    authority: Authority,
    folder: Path,
    said: Callable[[str], None],
) -> None:
    desk.serve(authority.server(folder / "s.pem"), authority.path)
    cert = {
        "none": lambda: None,
        "foreign": lambda: Authority(folder).client(),
        "expired": lambda: authority.client(not_after=YESTERDAY),
    }[kind]()
    with refused(desk), dial(desk, authority, cert) as client:
        client.recv(1)  # a client learns of it only now (RFC 8446, section 4.4.2)
    said(f"was refused: {why}")


def test_one_client_too_many_is_refused(desk: Desk, authority: Authority, folder: Path) -> None:
    desk.serve(authority.server(folder / "s.pem"), most=2)
    with call(desk, authority) as first, call(desk, authority):
        with dial(desk, authority) as client, refused(desk):
            client.recv(1)
        converse(*first)
        first[1].close()
        assert first[0].recv(1) == b""
        first[0].close()

        def another() -> bool:
            with dial(desk, authority) as client, suppress(ssl.SSLError, ConnectionError):
                client.settimeout(0.2)
                with suppress(TimeoutError):
                    client.recv(1)
                desk.turn()
            return bool(desk.came)

        until(another, "the place did not become free")


def test_a_handshake_that_takes_too_long_is_given_up(
    desk: Desk, authority: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "HANDSHAKE_S", 0.1)
    desk.serve(authority.server(folder / "s.pem"))
    with socket.create_connection(desk.address, WITHIN) as silent:
        assert silent.recv(1) == b""


def test_the_oldest_handshake_gives_way(
    desk: Desk, authority: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "MOST_HANDSHAKES", 2)
    desk.serve(authority.server(folder / "s.pem"))
    with ExitStack() as ends:
        silent = [
            ends.enter_context(socket.create_connection(desk.address, WITHIN)) for _ in range(2)
        ]
        converse(*ends.enter_context(call(desk, authority)))
        assert silent[0].recv(1) == b""
        silent[1].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[1].recv(1)


# Certificates


def test_certificates_are_replaced_and_who_is_there_stays(
    desk: Desk, authority: Authority, folder: Path
) -> None:
    cert = authority.server(folder / "s.pem")
    desk.serve(cert)
    with call(desk, authority) as before:
        other = Authority(folder)
        other.server(cert)
        desk.serve(cert)
        with pytest.raises(ssl.SSLCertVerificationError):
            dial(desk, authority)
        with call(desk, other) as after:
            converse(*after)
        converse(*before)


def test_a_bad_replacement_changes_nothing(desk: Desk, authority: Authority, folder: Path) -> None:
    cert = authority.server(folder / "s.pem")
    desk.serve(cert)
    cert.write_text("nonsense")
    with pytest.raises(ConfigError):
        tls.check(Tls(str(cert), str(cert)))
    with call(desk, authority) as both:
        converse(*both)


def broken(kind: str, folder: Path, authority: Authority) -> Tls:
    cert = str(authority.server(folder / "s.pem"))
    other = folder / "other.pem"
    match kind:
        case "missing":
            return Tls(str(folder / "no.pem"), cert)
        case "empty":
            other.touch()
            return Tls(cert, str(other))
        case "large":
            other.write_bytes(bytes(gateway.LARGEST_FILE + 1))
            return Tls(cert, cert, str(other))
        case "folder":
            return Tls(cert, str(folder))
        case "pipe":
            os.mkfifo(other)
            return Tls(cert, str(other))
        case "foreign key":
            return Tls(cert, str(authority.server(other)))
        case "encrypted":
            pem = authority.ca.issue_cert("127.0.0.1").private_key_pem.bytes()
            key = serialization.load_pem_private_key(pem, None)
            other.write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.BestAvailableEncryption(b"secret"),
                )
            )
            return Tls(cert, str(other))
        case "damaged":
            other.write_text("-----BEGIN PRIVATE KEY-----\nMIHsMFcGCSqG\n-----END PRIVATE KEY-----")
            return Tls(cert, str(other))
        case "no CA":
            other.write_text("nobody")
            return Tls(cert, cert, str(other))
        case _:
            other.write_bytes(b"\xff")
            return Tls(cert, cert, str(other))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("missing", "cannot read .*/no.pem: no such file or directory"),
        ("empty", "the key is empty"),
        ("large", "the client CA is too large"),
        ("folder", "the certificate or its key: is a directory"),
        ("pipe", "the certificate or its key: illegal seek"),
        ("foreign key", "the certificate or its key: key values mismatch"),
        ("encrypted", "the key is encrypted"),
        ("damaged", "the certificate or its key: no PEM, or damaged"),
        ("no CA", "the client CA: no PEM, or damaged"),
        ("not text", "the client CA is no PEM"),
    ],
)
def test_files_that_are_no_use_are_one_line(
    kind: str, why: str, desk: Desk, authority: Authority, folder: Path
) -> None:
    files = broken(kind, folder, authority)
    port = Port(id=3, name="p", backend=Network(*desk.address, files))
    for attempt in (
        lambda: desk.gateway.serve("g", port, desk.listener.fileno()),
        lambda: tls.check(files),
    ):
        with pytest.raises(ConfigError, match=why) as raised:
            attempt()
        assert str(raised.value).isprintable()


def test_good_files_are_found_good(authority: Authority, folder: Path) -> None:
    cert = str(authority.server(folder / "s.pem"))
    tls.check(Tls(cert, cert, str(authority.path)))


# The process


def test_a_port_that_is_forgotten_lets_nobody_in_and_its_clients_stay(
    desk: Desk, authority: Authority, folder: Path
) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    with call(desk, authority) as both:
        desk.gateway.forget("g", 3)
        held = f"socket:[{os.fstat(desk.listener.fileno()).st_ino}]"
        until(lambda: held not in open_files(desk.pid), "it still listens")
        converse(*both)


def open_files(pid: int) -> list[str]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def test_it_has_nothing_open_but_what_it_serves(
    desk: Desk, authority: Authority, folder: Path
) -> None:
    with open(folder / "secret", "w"):
        desk.serve(authority.server(folder / "s.pem"))
        found = open_files(desk.pid)
    assert not [name for name in found if str(folder) in name or "memfd" in name]
    # Its channel, the listener, and a pair to wake its loop.
    assert sum(name.startswith("socket:") for name in found if name != found[2]) == 4


def test_one_that_died_is_started_again(
    desk: Desk, authority: Authority, folder: Path, caplog: Any
) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    first = desk.pid
    with call(desk, authority) as (client, port):
        os.kill(first, signal.SIGKILL)
        wait_ended(first)
        desk.gateway.reap()
        assert "the TLS gateway died: SIGKILL" in caplog.text
        assert port.recv(1) == b""
        with pytest.raises((ssl.SSLError, ConnectionError)):
            client.recv(1)
    assert desk.gateway.deadline is not None
    desk.gateway.tick()
    assert desk.pid != first
    with call(desk, authority) as both:
        converse(*both)


def test_one_that_is_reaped_before_its_last_word_is_read_does_no_harm(
    desk: Desk, authority: Authority, folder: Path
) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    pid = desk.pid
    os.kill(pid, signal.SIGKILL)
    wait_ended(pid)
    ready = desk.selector.select(0)
    assert ready
    desk.gateway.reap()
    for key, _ in ready:
        key.data()
    desk.gateway.tick()
    with call(desk, authority) as both:
        converse(*both)


def test_one_that_is_started_again_needs_no_right_to_open_files(
    desk: Desk, authority: Authority, folder: Path
) -> None:
    cert = authority.server(folder / "s.pem")
    desk.serve(cert)
    cert.unlink()
    first = desk.pid
    os.kill(first, signal.SIGKILL)
    wait_ended(first)
    desk.gateway.reap()
    desk.gateway.tick()
    with call(desk, authority) as both:
        converse(*both)


def test_ports_that_were_there_before_are_served_from_the_start_on(
    authority: Authority, folder: Path, ports: Ports
) -> None:
    with closing(Desk(ports, start=False)) as desk:
        desk.serve(authority.server(folder / "s.pem"))
        assert desk.gateway.kept == []
        desk.gateway.start()
        with call(desk, authority) as both:
            converse(*both)


def test_one_that_hangs_is_not_waited_for(
    desk: Desk,
    authority: Authority,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cert = authority.server(folder / "s.pem")
    desk.serve(cert)
    monkeypatch.setattr(tls, "ANSWER_WITHIN", 0.1)
    monkeypatch.setattr(tls, "END_WITHIN", 0.1)
    os.kill(desk.pid, signal.SIGSTOP)
    with pytest.raises(ConfigError, match="the TLS gateway does not answer"):
        desk.serve(cert)
    desk.gateway.close()
    assert "the TLS gateway does not end: killed" in caplog.text


def test_one_that_is_replaced_serves_whom_it_has_and_ends(
    desk: Desk, authority: Authority, folder: Path, ports: Ports
) -> None:
    cert = authority.server(folder / "s.pem")
    desk.serve(cert)
    first = desk.pid
    with ExitStack() as ends:
        before = ends.enter_context(call(desk, authority))
        with closing(Desk(ports, desk.gateway.keep())) as successor:
            successor.address = desk.address
            successor.listener.close()
            successor.listener = desk.listener.dup()
            successor.serve(cert)
            assert successor.pid != first
            with call(successor, authority) as after:
                converse(*after)
            converse(*before)
            before[1].close()
            before[0].close()
            wait_ended(first)
            successor.gateway.reap()
            assert [pid for pid, _ in successor.gateway.kept] == [successor.pid]


def test_what_was_written_last_arrives_when_the_daemon_ends(
    desk: Desk, authority: Authority, folder: Path
) -> None:
    desk.serve(authority.server(folder / "s.pem"))
    data = numbered(1 << 17)
    with call(desk, authority) as (client, port):
        port.sendall(data)
        port.close()
        desk.gateway.close()
        assert exactly(client, len(data)) == data
        assert client.recv(1) == b""


@pytest.fixture
def impostor(
    desk: Desk, authority: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """Give a gateway's side of the channel, as whoever took it over from the network has it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    alive, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(end)
        os.read(alive, 1)
        os._exit(0)
    os.close(alive)
    monkeypatch.setattr(tls, "_fork", lambda _: tls._Process(pid, theirs))  # noqa: SLF001
    tls.send(ours, tls.Served("g", 3))
    desk.serve(authority.server(folder / "s.pem"))
    with ours:
        yield ours
        os.close(end)
        desk.gateway.close()


@pytest.mark.parametrize(
    "record",
    [
        b"\xc1",
        b"\x81\xa4type\xa4Came",
        b"\x81\xa4type\xa4\xff\xff\xff\xff",
        b"\x82\xa4type\xa6Served\xa1x" + b"\x91" * 9000 + b"\xc0",
    ],
)
def test_one_that_makes_no_sense_is_killed(
    record: bytes, desk: Desk, impostor: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    impostor.send(record)
    desk.turn()
    assert "the TLS gateway is killed: it makes no sense" in caplog.text
    wait_ended(desk.pid)
    desk.gateway.reap()
    assert "the TLS gateway died: SIGKILL" in caplog.text
    assert desk.came == []


def test_what_is_no_client_goes_to_no_port(
    desk: Desk, impostor: socket.socket, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        open(folder / "s.pem", "rb") as file,
        socket.socket() as unconnected,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        for fds in ([], [file.fileno()], [unconnected.fileno()], [unix.fileno()]):
            tls.send(impostor, tls.Came("g", 3), fds)
    before = len(os.listdir("/proc/self/fd"))
    desk.turn()
    assert caplog.text.count("g: port 3: a client was lost on its way") == 4
    assert desk.came == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_port_without_tls_is_given_no_clients(desk: Desk, impostor: socket.socket) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        closing(listener.accept()[0]),
    ):
        for guest, port in (("g", 0), ("other", 3)):
            tls.send(impostor, tls.Came(guest, port), [client.fileno()])
        tls.send(impostor, tls.Came("g", 3), [client.fileno()])
        desk.arrival().close()
        assert desk.came == []


def test_nobody_is_kept_waiting_by_one_that_never_stops(
    desk: Desk, impostor: socket.socket
) -> None:
    for _ in range(20):
        tls.send(impostor, tls.Served("g", 3))
    desk.turn()
    assert desk.selector.select(0)  # there is more


def test_it_ends_with_its_master(authority: Authority, folder: Path, ports: Ports) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        orphaned = Desk(ports)
        orphaned.serve(authority.server(folder / "s.pem"))
        os.write(write, b"%d" % orphaned.pid)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(write)
    with open(read, "rb") as pipe:
        orphan = int(pipe.read())
    os.waitpid(pid, 0)
    wait_ended(orphan)


def test_nobody_else_loads_what_it_needs() -> None:
    program = (
        "import sys, vhost_device_console.cli, vhost_device_console.master;"
        "sys.exit(bool({'ssl', 'asyncio', 'vhost_device_console.gateway'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
