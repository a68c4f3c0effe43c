"""A page's server for tests: started through the command line, always ended with status 0."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from websockets.sync.client import ClientConnection, connect

from launch import COMMAND, WITHIN, environment, wait_readable


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=WITHIN)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(WITHIN)
        self.sock.connect(self._path)


class Web:
    """`vhost-device-console web` for the daemons of `folder`, on a free port unless `options` say.

    `context` is a browser's TLS, `program` Python that is run in place of ours. `url` is what it
    printed, `origin` that of its page.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        listen: str = "127.0.0.1:0",
        context: ssl.SSLContext | None = None,
        program: str | None = None,
    ) -> None:
        command = COMMAND if program is None else [sys.executable, "-c", program]
        self.process = subprocess.Popen(
            [*command, "web", "--listen", listen, "--json", *options],
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._context = context
        self._unix = listen.removeprefix("unix:") if listen.startswith("unix:") else None
        self.cookie = ""
        try:
            said = json.loads(self._line())
        except BaseException:
            self.process.kill()
            print(self.process.communicate()[1].decode())
            raise
        self.url, self.token = said["url"], said["token"]
        parts = urlsplit(self.url)
        self.origin = "http://localhost" if self._unix else f"{parts.scheme}://{parts.netloc}"
        self.host = "localhost" if self._unix else parts.netloc

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        deadline = time.monotonic() + WITHIN
        wait_readable(self.process.stdout.fileno(), deadline, "it says no address")
        return self.process.stdout.readline()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            _, self.log = self.process.communicate(timeout=WITHIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        print(self.log.decode())
        assert self.process.returncode == 0, self.log
        assert b"Traceback" not in self.log, self.log

    # HTTP

    def request(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Return status, headers and body; `headers` are over those of its own page."""
        connection: http.client.HTTPConnection
        if self._unix:
            connection = _UnixConnection(self._unix)
        elif self._context is not None:
            connection = http.client.HTTPSConnection(
                self.host, timeout=WITHIN, context=self._context
            )
        else:
            connection = http.client.HTTPConnection(self.host, timeout=WITHIN)
        sent = {"Origin": self.origin, "Cookie": self.cookie, **headers}
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {k: v for k, v in sent.items() if v})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def login(self, token: str | None = None) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Log in, so that what follows is in a session, and return the answer."""
        answer = self.request("POST", "/login", {"token": self.token if token is None else token})
        if cookie := answer[1]["Set-Cookie"]:
            self.cookie = cookie.split(";")[0]
        return answer

    def connect(self, path: str, **headers: str) -> ClientConnection:
        """Return a WebSocket as its own page has, but for `headers`."""
        sent = {"Cookie": self.cookie, **headers}
        origin: Any = sent.pop("Origin", self.origin)
        more: dict[str, Any] = {}
        if self._unix:
            more["sock"] = socket.socket(socket.AF_UNIX)
            more["sock"].connect(self._unix)
        elif self._context is not None:
            more["ssl"] = self._context
        scheme = "wss" if self._context else "ws"
        try:
            return connect(
                f"{scheme}://{self.host}{path}",
                origin=origin or None,
                additional_headers={k: v for k, v in sent.items() if v},
                compression=None,
                proxy=None,
                max_size=None,
                max_queue=None,
                open_timeout=WITHIN,
                close_timeout=WITHIN,
                **more,
            )
        except BaseException:
            if "sock" in more:
                more["sock"].close()
            raise
