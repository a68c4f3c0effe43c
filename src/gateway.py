"""The TLS gateway, a process of its own: between people far away and the loopback.

TLS 1.3 only: there the end of one direction leaves the other open (RFC 8446, section 6.1), as a
console's clients use it. Each direction is read only as fast as it is written. What comes from the
network is decrypted here and nowhere else, by OpenSSL over memory.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import select
import socket
import ssl
import sys
import termios
from collections.abc import Coroutine
from contextlib import suppress
from typing import NoReturn

from . import tls
from .admission import Sparing

#: Seconds from a connection to the end of its handshake.
HANDSHAKE_S = 10.0

#: Handshakes under way; one more takes the place of the oldest.
MOST_HANDSHAKES = 64

#: Seconds in which a client may still type when its port has nothing more for it.
LINGER_S = 10.0

#: Seconds for what was written last to be delivered when the daemon ends.
LAST_S = 1.0

#: Bytes in one direction of a client on their way through here, and in each socket's buffer.
CHUNK = 1 << 16
BUFFER = 1 << 18

#: Bytes of a file with certificates or keys.
LARGEST_FILE = 1 << 20

#: How a silent client is asked whether it is there: as those of a port without TLS.
_KEEPALIVE_IDLE_S = 60
_KEEPALIVE_INTERVAL_S = 10
_KEEPALIVE_PROBES = 3

#: Seconds until the next try when the system has no descriptor left.
_NO_ROOM_S = 1.0

#: Seconds between looks whether what a client typed has reached its port, after it left.
_LOOK_S = 0.05

_log = logging.getLogger(__name__)


def serve(channel: socket.socket) -> int:
    """Serve what the master says over `channel` until it is gone; return the exit status."""
    with asyncio.Runner() as runner:
        return runner.run(_Gateway(channel).run())


def _refuse_password() -> NoReturn:
    raise ValueError("the key is encrypted, and nobody there to type its passphrase")


def _contents(fd: int, what: str) -> bytes:
    data = b""
    # From its beginning, wherever an earlier gateway that had it too has read to.
    while more := os.pread(fd, LARGEST_FILE + 1 - len(data), len(data)):
        data += more
    if not data or len(data) > LARGEST_FILE:
        raise ValueError(f"the {what} is {'too large' if data else 'empty'}")
    return data


def _in_memory(fd: int, what: str) -> int:
    """Return a file of the same content that can be opened once more."""
    made = os.memfd_create(what, os.MFD_CLOEXEC)
    os.write(made, _contents(fd, what))
    return made


def context(files: list[int]) -> ssl.SSLContext:
    """Return what a server needs of these open files: certificate, key, perhaps a client CA.

    Raises ValueError with a line that says what is wrong with them.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.num_tickets = 0  # or a certificate that expired could come back
    memory: list[int] = []
    which = "the certificate or its key"
    try:
        for fd, what in zip(files, ("certificate", "key"), strict=False):
            memory.append(_in_memory(fd, what))
        cert, key = (f"/proc/self/fd/{fd}" for fd in memory)
        made.load_cert_chain(cert, key, _refuse_password)
        which = "the client CA"
        for fd in files[2:]:
            made.load_verify_locations(cadata=_contents(fd, "client CA").decode())
            made.verify_mode = ssl.CERT_REQUIRED
    except UnicodeDecodeError:
        raise ValueError(f"{which} is no PEM") from None
    except ssl.SSLError as error:
        why = _words(error) if error.reason else "no PEM, or damaged"
        raise ValueError(f"{which}: {why}") from error
    except OSError as error:
        raise ValueError(f"{which}: {_words(error)}") from error
    finally:
        for fd in memory:
            os.close(fd)
    return made


def _words(error: BaseException) -> str:
    """Say in words what OpenSSL, or the system, says."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    if isinstance(error, TimeoutError):
        return "its handshake took too long"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


async def _loopback() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a TCP connection that nobody else has; raises OSError."""
    loop = asyncio.get_running_loop()
    ours = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            async with asyncio.timeout(HANDSHAKE_S):
                await loop.sock_connect(ours, listener.getsockname())
                while True:
                    theirs, address = await loop.sock_accept(listener)
                    if address == ours.getsockname():
                        break
                    theirs.close()  # somebody of this machine was faster
    except BaseException:
        ours.close()
        raise
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


class _Channel:
    """TLS over a connection that is read and written as far as is asked, no more."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._writing = asyncio.Lock()

    async def _flush(self) -> None:
        async with self._writing:
            while data := self._outgoing.read():
                await self._loop.sock_sendall(self._sock, data)

    async def _fill(self) -> None:
        if data := await self._loop.sock_recv(self._sock, CHUNK):
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    async def shake_hands(self) -> None:
        """Raise OSError, of which ssl.SSLError is one, when that fails."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError:
                with suppress(OSError):
                    await self._flush()  # the alert that says why
                raise
            else:
                await self._flush()
                return

    def peer(self) -> str:
        """Return whom the client's certificate names, "" without one."""
        subject: tuple[tuple[tuple[str, str], ...], ...]
        subject = (self._tls.getpeercert() or {}).get("subject", ())  # type: ignore[assignment]
        return next((value for each in subject for key, value in each if key == "commonName"), "")

    async def receive(self) -> bytes:
        """Return some bytes, b"" at the end; nothing is left in between that was received.

        A connection that ends without a word has ended, too: most clients do that.
        """
        while True:
            plain = bytearray()
            over = False
            try:
                while data := self._tls.read(CHUNK):
                    plain += data
                over = True
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                over = True
            except ssl.SSLWantReadError:
                pass
            # What TLS itself has to answer goes out with what is being sent. A client that does not
            # read holds that up, but not what it types.
            if self._outgoing.pending > CHUNK or not self._writing.locked():
                await self._flush()
            if plain or over:
                return bytes(plain)
            await self._fill()

    async def send(self, data: bytes) -> None:
        """Send all of `data`."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._tls.write(rest) :]
        await self._flush()

    async def end_output(self) -> None:
        """Say that no more will be sent; receiving goes on."""
        with suppress(ssl.SSLError):  # the client has not said so as well
            self._tls.unwrap()
        await self._flush()
        self._sock.shutdown(socket.SHUT_WR)


class _Port:
    """A port that is served."""

    def __init__(self, order: tls.Serve, listener: socket.socket, context: ssl.SSLContext) -> None:
        self.guest = order.guest
        self.id = order.port
        self.name = order.name
        self.most = order.most
        self.listener = listener
        self.context = context
        self.clients = 0
        self.accepting: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Let nobody else in."""
        if self.accepting is not None:
            self.accepting.cancel()


class _Gateway:
    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._loop: asyncio.AbstractEventLoop
        self._over: asyncio.Event
        self._ports: dict[tuple[str, int], _Port] = {}
        self._handshakes: dict[asyncio.Task[None], None] = {}
        self._clients: set[asyncio.Task[None]] = set()
        self._retiring = False
        self._refusals = Sparing()

    async def run(self) -> int:
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._loop.set_exception_handler(_log_fault)
        self._loop.add_reader(self._channel, self._hear)
        await self._over.wait()
        self._loop.remove_reader(self._channel)
        for port in self._ports.values():
            port.close()
        if self._clients:
            _, left = await asyncio.wait(self._clients, timeout=LAST_S)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        return 0

    # The master

    def _hear(self) -> None:
        while (record := tls.receive(self._channel)) is not None:
            data, fds = record
            if not data:
                self._over.set()
                return
            try:
                answer = self._obey(tls.orders.decode(data), fds)
            finally:
                for fd in fds:
                    os.close(fd)
            if answer is not None:
                with suppress(OSError):
                    tls.send(self._channel, answer)

    def _obey(self, order: tls.Order, fds: list[int]) -> tls.Served | None:
        """Do what the master says, and return what it is to hear; takes what it keeps of `fds`."""
        match order:
            case tls.Serve(guest=guest, port=number, client_ca=client_ca):
                error = self._serve(order, fds) if len(fds) == 3 + client_ca else _NO_FDS
                return tls.Served(guest, number, error)
            case tls.Check(client_ca=client_ca):
                return tls.Served(error=_tried(fds)[1] if len(fds) == 2 + client_ca else _NO_FDS)
            case tls.Forget(guest=guest, port=number):
                if (port := self._ports.pop((guest, number), None)) is not None:
                    port.close()
            case tls.Retire():
                for port in self._ports.values():
                    port.close()
                self._ports.clear()
                self._retiring = True
                self._leave_if_done()
        return None

    def _serve(self, order: tls.Serve, fds: list[int]) -> str | None:
        made, error = _tried(fds[1:])
        if made is None:
            return error
        listener = socket.socket(fileno=fds.pop(0))
        listener.setblocking(False)
        port = _Port(order, listener, made)
        key = order.guest, order.port
        if (before := self._ports.pop(key, None)) is not None:
            before.close()
        self._ports[key] = port
        port.accepting = self._loop.create_task(self._accept(port))
        return None

    def _leave_if_done(self) -> None:
        if self._retiring and not self._clients:
            self._over.set()

    # Clients

    async def _accept(self, port: _Port) -> None:
        with port.listener:
            while True:
                try:
                    sock, address = await self._loop.sock_accept(port.listener)
                except ConnectionAbortedError:
                    continue
                except OSError as error:
                    _log.warning("%s: cannot take another client: %s", port.name, error.strerror)
                    await asyncio.sleep(_NO_ROOM_S)
                    continue
                if len(self._handshakes) >= MOST_HANDSHAKES:
                    next(iter(self._handshakes)).cancel("others came before its handshake was over")
                task = self._loop.create_task(self._client(port, sock, _address(address)))
                self._handshakes[task] = None
                self._clients.add(task)
                task.add_done_callback(self._left)
                await asyncio.sleep(0)  # who is cancelled has to have begun

    def _left(self, task: asyncio.Task[None]) -> None:
        self._handshakes.pop(task, None)
        self._clients.discard(task)
        self._leave_if_done()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a client was lost: %s: %s", type(error).__name__, error)

    def _refuse(self, port: _Port, who: str, why: str) -> None:
        self._refusals.warn(f"{port.name}: {who} was refused: {why}")

    async def _client(self, port: _Port, sock: socket.socket, who: str) -> None:
        task = asyncio.current_task()
        with sock:
            channel = _Channel(sock, port.context)
            try:
                _set_options(sock)
                async with asyncio.timeout(HANDSHAKE_S):
                    await channel.shake_hands()
            except OSError as error:
                self._refuse(port, who, _words(error))
                return
            except asyncio.CancelledError as error:
                if error.args:
                    self._refuse(port, who, str(error.args[0]))
                raise
            finally:
                if task is not None:
                    self._handshakes.pop(task, None)
            if port.clients >= port.most:
                self._refuse(port, who, f"{port.most} others are here")
                return
            port.clients += 1
            try:
                await self._introduce(port, channel, who)
            finally:
                port.clients -= 1

    async def _introduce(self, port: _Port, channel: _Channel, who: str) -> None:
        """Give the port its end of a new connection, and relay."""
        try:
            inner, theirs = await _loopback()
        except OSError as error:
            self._refuse(port, who, _words(error))
            return
        with inner:
            with theirs:
                near = _address(inner.getsockname())
                try:
                    tls.send(self._channel, tls.Came(port.guest, port.id), [theirs.fileno()])
                except OSError as error:
                    self._refuse(port, who, f"the daemon does not take it: {error.strerror}")
                    return
            named = channel.peer()
            _log.info("%s: %s%s comes in as %s", port.name, who, f" ({named})" * bool(named), near)
            await _relay(channel, inner)


_NO_FDS = "too many open files"


def _address(name: tuple[str, int]) -> str:
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _tried(files: list[int]) -> tuple[ssl.SSLContext | None, str | None]:
    try:
        return context(files), None
    except ValueError as error:
        return None, str(error)


def _set_options(sock: socket.socket) -> None:
    tcp = socket.IPPROTO_TCP
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(tcp, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    sock.setsockopt(tcp, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    sock.setsockopt(tcp, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


def _is_over(inner: socket.socket) -> bool:
    """Tell whether the port has let its client go."""
    look = select.poll()
    look.register(inner, select.POLLRDHUP)
    return bool(look.poll(0))


async def _deliver(sending: Coroutine[None, None, None], inner: socket.socket) -> None:
    """Wait as long as the client needs, or LINGER_S once its port has let it go."""
    task = asyncio.create_task(sending)
    try:
        while not (await asyncio.wait([task], timeout=LINGER_S))[0]:
            if _is_over(inner):
                raise TimeoutError
        task.result()
    finally:
        task.cancel()


async def _relay(channel: _Channel, inner: socket.socket) -> None:
    """Carry bytes both ways until both have ended, and what was typed has arrived."""
    loop = asyncio.get_running_loop()

    async def inwards() -> None:
        try:
            while data := await channel.receive():
                await loop.sock_sendall(inner, data)
                await asyncio.sleep(0)  # a socket that takes all at once gives nobody else a turn
        finally:
            inner.shutdown(socket.SHUT_WR)

    async def outwards() -> None:
        while data := await loop.sock_recv(inner, CHUNK):
            await _deliver(channel.send(data), inner)
        await _deliver(channel.end_output(), inner)

    typing, reading = ways = (loop.create_task(inwards()), loop.create_task(outwards()))
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        if typing.done():
            await asyncio.wait([reading])
        else:
            await asyncio.wait([typing], timeout=LINGER_S if _is_over(inner) else None)
        while not _is_over(inner) and _unsent(inner):
            await asyncio.sleep(_LOOK_S)
    finally:
        for way in ways:
            way.cancel()
        for result in await asyncio.gather(*ways, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, OSError):
                raise result


def _unsent(sock: socket.socket) -> int:
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def _log_fault(_loop: asyncio.AbstractEventLoop, fault: dict[str, object]) -> None:
    _log.error("the TLS gateway: %s: %s", fault.get("message"), fault.get("exception"))
