"""The page's server: what is asked over HTTP, and the WebSockets of the list and of terminals."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import resources
from io import BytesIO
from typing import Any, cast
from urllib.parse import quote

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from ... import systemd
from ...errors import ConfigError, ConsoleError
from ...privileges import confine_entrance
from ...words import clean
from ..cast import Writer
from ..listening import is_unix, listening
from ..recording import Recorder
from .auth import Door, Lock, Passwords, Session, Token, new_token, read_token, same_origin
from .connections import Http, Listener
from .console import NONSENSE, Console
from .guests import Guests, daemons, read_history

_log = logging.getLogger(__name__)

#: The page's own files alone; no inline script or style, no other place to send anything to.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), usb=(), serial=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

#: Bytes of a request to log in, and of a WebSocket's message.
_MOST_BODY = 4096
_MOST_MESSAGE = 1 << 16

#: Ids whose screens a page may look at.
_MOST_LOOKS = 256

#: Seconds in which a download's history has to arrive.
_HISTORY_S = 30.0

#: The first file that the build step makes: without it there is no terminal.
_VENDORED = "vendor/xterm.js"


@dataclass
class Options:
    """Where and how to serve. `daemon` is a monitor socket, None for all that are found.

    `pam` is the service that checks passwords, of `allow_users` if there are any. `login` is off
    only where something else says who may come. `origins` are those of proxies.
    """

    listen: str = "127.0.0.1:8080"
    daemon: str | None = None
    token_file: str | None = None
    pam: str | None = None
    allow_users: tuple[str, ...] = ()
    login: bool = True
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    origins: tuple[str, ...] = ()
    as_json: bool = False


class _Headers:
    """Puts what browsers have to know on every answer, a refused WebSocket's too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, with_headers)


class _Look(msgspec.Struct, tag_field="type", tag="look"):
    """The page shows these guests' screens."""

    at: list[str]


_look = msgspec.json.Decoder(_Look)


class Pages:
    """The application. `name_header` is the header in which a proxy says who somebody is."""

    def __init__(
        self,
        find: Callable[[], list[str]],
        door: Door,
        *,
        origins: tuple[str, ...] = (),
        cookie: str = "console",
        name_header: str | None = None,
    ) -> None:
        self._guests = Guests(find)
        self._door = door
        self._origins = origins
        self._cookie = cookie
        self._name_header = name_header
        static = resources.files(__package__) / "static"
        self._static = str(static)
        self.app = _Headers(
            Starlette(
                routes=[
                    Route("/", self._page),
                    Route("/session", self._session, methods=["GET"]),
                    Route("/login", self._login, methods=["POST"]),
                    Route("/logout", self._logout, methods=["POST"]),
                    Route("/history", self._history, methods=["GET"]),
                    Route("/recording", self._recording, methods=["GET"]),
                    WebSocketRoute("/guests", self._list),
                    WebSocketRoute("/console", self._console),
                    Mount("/static", StaticFiles(directory=self._static)),
                ]
            )
        )

    # Who

    def _is_ours(self, asked: HTTPConnection) -> bool:
        headers = asked.headers
        secure = _is_secure(asked)
        return same_origin(headers.get("origin"), headers.get("host"), secure, self._origins)

    def _cookie_name(self, asked: HTTPConnection) -> str:
        # The prefix has browsers take it from this host alone, and over TLS.
        return f"__Host-{self._cookie}" if _is_secure(asked) else self._cookie

    def _session_of(self, asked: HTTPConnection) -> Session | None:
        return self._door.session(asked.cookies.get(self._cookie_name(asked)))

    def _address(self, asked: HTTPConnection) -> str:
        return asked.client.host if asked.client else ""

    def _name(self, asked: HTTPConnection) -> str:
        """Return what others at a console see of whoever asks."""
        session = self._session_of(asked)
        name = session.name if session else ""
        if self._name_header:
            name = asked.headers.get(self._name_header, "")
        return f"{clean(name) or self._address(asked)} (web)".strip()

    # HTTP

    async def _page(self, _request: Request) -> Response:
        return FileResponse(f"{self._static}/index.html")

    async def _session(self, request: Request) -> Response:
        inside = self._session_of(request) is not None
        return JSONResponse({"inside": inside, "login": self._door.locked})

    async def _login(self, request: Request) -> Response:
        if not self._is_ours(request):
            return _refusal(403, "another page asks: that is not allowed")
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > _MOST_BODY:
                    return _refusal(413, "a token or password is shorter")
            said = msgspec.json.decode(body, type=dict[str, str])
        except (msgspec.MsgspecError, UnicodeError, ClientDisconnect):
            return _refusal(400, "that is no token or password")
        address = self._address(request)
        # Not before all of it is here: any number of requests could have got so far meanwhile.
        wait = self._door.wait(address)
        if wait > 0:
            refused = _refusal(429, f"too many wrong tries: try again in {wait:.0f} seconds")
            refused.headers["Retry-After"] = str(int(wait) + 1)
            return refused
        name = await self._door.enter(said, address)
        if name is None:
            locked = self._door.locked or "login"
            _log.warning("a login was refused: wrong %s from %s", locked, address or "the socket")
            return _refusal(401, f"that is not the {locked}")
        response = JSONResponse({"inside": True})
        response.set_cookie(
            self._cookie_name(request),
            name,
            path="/",
            secure=_is_secure(request),
            httponly=True,
            samesite="strict",
        )
        return response

    async def _logout(self, request: Request) -> Response:
        if not self._is_ours(request):
            return _refusal(403, "another page asks: that is not allowed")
        cookie = self._cookie_name(request)
        self._door.leave(request.cookies.get(cookie, ""))
        response = JSONResponse({"inside": False})
        response.delete_cookie(cookie, path="/", httponly=True, samesite="strict")
        return response

    async def _history(self, request: Request) -> Response:
        """Give what the journal has of a port's output, as a file."""

        def read(path: str, guest: str, port: str) -> bytes:
            return read_history(path, guest, port, None, _HISTORY_S)[1]

        return await self._download(request, read, "log")

    async def _recording(self, request: Request) -> Response:
        """Give the same as a recording, with its times as far as they are known."""

        def read(path: str, guest: str, port: str) -> bytes:
            file = BytesIO()
            recorder = Recorder(
                guest,
                port,
                lambda: path,
                lambda size: Writer(file, size, guest, None),
                follow=False,
                duration=_HISTORY_S,
            )
            recorder.run()
            return file.getvalue()

        return await self._download(request, read, "cast")

    async def _download(
        self, request: Request, read: Callable[[str, str, str], bytes], kind: str
    ) -> Response:
        if self._session_of(request) is None:
            return _refusal(401, "log in first")
        request.state.spare()
        wanted, port = request.query_params.get("guest", ""), request.query_params.get("port", "0")
        try:
            path, guest = await self._guests.locate(wanted)
            data = await asyncio.to_thread(read, path, guest, port)
        except ConsoleError as error:
            return _refusal(404, str(error))
        name = re.sub(r"[^\w.-]", "_", f"{guest}-{port}-{time.strftime('%Y%m%d-%H%M%S')}.{kind}")
        return Response(
            data,
            media_type="application/octet-stream",
            headers={"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}"},
        )

    # WebSockets

    @asynccontextmanager
    async def _inside(self, page: WebSocket) -> AsyncIterator[bool]:
        """Let a page in that is ours and in a session, whose end it will not outlive."""
        session = self._session_of(page)
        if not self._is_ours(page):
            await page.send_denial_response(_refusal(403, "another page asks"))
        elif session is None:
            await page.send_denial_response(_refusal(401, "log in first"))
        else:
            task = cast(asyncio.Task[None], asyncio.current_task())
            end = task.cancel
            session.ends.add(end)
            try:
                await page.accept()
                page.state.spare()
                yield True
            except asyncio.CancelledError:
                if self._session_of(page) is not None:
                    raise
                task.uncancel()
                with suppress(RuntimeError):
                    await page.close(1008, "the session is over")
            finally:
                session.ends.discard(end)
            return
        yield False

    async def _console(self, page: WebSocket) -> None:
        async with self._inside(page) as inside:
            if inside:
                await Console(page, self._guests.locate, self._name(page)).run()

    async def _list(self, page: WebSocket) -> None:
        async with self._inside(page) as inside:
            if not inside:
                return
            async with self._guests.watch() as watcher:

                async def hear() -> None:
                    while True:
                        said = _look.decode(await page.receive_text())
                        if set(said.at) != watcher.looks:
                            watcher.looks = set(said.at[:_MOST_LOOKS])
                            self._guests.look_now()

                async def tell() -> None:
                    while True:
                        await watcher.changed.wait()
                        watcher.changed.clear()
                        for message in watcher.news():
                            await page.send_text(message.decode())

                await _first(hear(), tell())


async def _first(*halves: Coroutine[Any, Any, None]) -> None:
    """Run these until one ends, be it since the page is gone or makes no sense."""
    tasks = [asyncio.create_task(half) for half in halves]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    expected = (WebSocketDisconnect, *NONSENSE)
    for result in ended:
        if isinstance(result, Exception) and not isinstance(result, expected):
            raise result


def _is_secure(asked: HTTPConnection) -> bool:
    return asked.scope["scheme"] in ("https", "wss")


def _refusal(status: int, why: str) -> JSONResponse:
    return JSONResponse({"error": why}, status_code=status)


# Serving

#: Why it does not speak plain HTTP to other machines.
_EXPOSED = (
    "every console and token would be shown to the network: give --tls-cert and --tls-key, or"
    " listen on 127.0.0.1, or on a unix socket behind a proxy"
)


def _context(options: Options) -> ssl.SSLContext | None:
    """Return how TLS is spoken, None for not at all; raises ConfigError."""
    if options.tls_cert is None and options.tls_key is None and options.tls_client_ca is None:
        return None
    if options.tls_cert is None:
        raise ConfigError("--tls-key and --tls-client-ca need --tls-cert")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    what = "--tls-cert"
    try:
        # A key with a passphrase is refused: there is nobody to ask.
        context.load_cert_chain(options.tls_cert, options.tls_key, password=lambda: "")
        if options.tls_client_ca is not None:
            what = "--tls-client-ca"
            context.load_verify_locations(options.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
        raise ConfigError(f"{what}: {reason.lower().replace('_', ' ')}") from None
    return context


def _lock(options: Options) -> tuple[Lock | None, str | None]:
    """Return what keeps strangers out, if anything, and a token to show; raises ConfigError."""
    if options.allow_users and options.pam is None:
        raise ConfigError("--allow-user goes with --pam")
    ways = (not options.login, options.token_file is not None, options.pam is not None)
    if sum(ways) > 1:
        raise ConfigError("--no-login, --token-file and --pam exclude each other")
    if options.pam is not None:
        return Passwords(options.pam, options.allow_users), None
    if options.token_file is not None:
        return Token(read_token(options.token_file)), None
    if options.login:
        token = new_token()
        return Token(token), token
    if not is_unix(options.listen) and options.tls_client_ca is None:
        raise ConfigError(
            "--no-login would let everybody in who reaches the port: use it with --listen unix:PATH"
            " behind a proxy that asks who it is, or with --tls-client-ca"
        )
    return None, None


class _Server(uvicorn.Server):
    """Ends at a signal, with status 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Have signals end it, instead of being raised again when it has ended."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        self.should_exit = True


def config(pages: Pages, listener: Listener, context: ssl.SSLContext | None) -> uvicorn.Config:
    """Return how uvicorn serves `pages` to those who come to `listener`."""
    made = uvicorn.Config(
        pages.app,
        http=cast(type[asyncio.Protocol], partial(Http, listener)),
        ws="websockets-sansio",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # who asks is whom the connection says
        server_header=False,
        ws_max_size=_MOST_MESSAGE,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=1,
    )
    made.load()
    made.ssl = context
    return made


def serve(options: Options) -> None:
    """Serve the page until a signal; raises ConfigError when it cannot be."""
    static = resources.files(__package__) / "static"
    if not (static / _VENDORED).is_file():
        raise ConfigError("the page lacks its terminal: run contrib/web/vendor (`make web`) first")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # until uvicorn takes them
    context = _context(options)
    lock, token = _lock(options)
    behind_proxy = is_unix(options.listen)
    # A proxy is another user, in the socket's group.
    with listening(options.listen, refusal=_EXPOSED if context is None else None, mode=0o660) as (
        sock,
        place,
    ):
        address = "" if behind_proxy else f"http{'s' * (context is not None)}://{place}/"
        pages = Pages(
            daemons(options.daemon),
            Door(lock),
            origins=options.origins,
            cookie="console" if behind_proxy else f"console-{sock.getsockname()[1]}",
            name_header="x-remote-user" if behind_proxy and lock is None else None,
        )
        # PAM may check a password in a program that is privileged to do so.
        confine_entrance(may_gain=options.pam is not None)
        _say(options, address, token)
        systemd.notify("READY=1")
        listener = Listener(sock)
        asyncio.run(_Server(config(pages, listener, context)).serve(sockets=[listener]))


def _say(options: Options, address: str, token: str | None) -> None:
    url = address or options.listen
    if token is not None:
        url += f"#token={token}" if address else ""
    if options.as_json:
        line = json.dumps({"url": url, "token": token})
    elif token is not None and not address:
        line = f"{url}\ntoken: {token}"
    else:
        line = url
    print("\n".join(map(clean, line.split("\n"))), flush=True)
