"""The page's server without any guest: login, headers, origins, TLS, and where it listens."""

from __future__ import annotations

import errno
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trustme
from vhost_device_console.people.listening import listening
from vhost_device_console.people.web.auth import TRIES
from websockets.exceptions import ConnectionClosed, InvalidStatus

from launch import WITHIN, command, environment
from page import Web

StartWeb = Callable[..., Web]


@pytest.fixture
def web(folder: Path) -> Iterator[StartWeb]:
    with ExitStack() as ends:
        yield lambda *options, **more: ends.enter_context(Web(folder, *options, **more))


def refused(web: Web, path: str, **headers: str) -> int:
    with pytest.raises(InvalidStatus) as raised:
        web.connect(path, **headers)
    return raised.value.response.status_code


def test_the_printed_token_logs_in(web: StartWeb) -> None:
    server = web()
    assert server.url.startswith("http://127.0.0.1:")
    assert server.url.endswith(f"#token={server.token}")
    assert server.request("GET", "/session")[2] == b'{"inside":false,"login":"token"}'
    status, headers, _ = server.login()
    assert status == 200
    attributes = {part.strip() for part in headers["Set-Cookie"].lower().split(";")[1:]}
    assert attributes == {"httponly", "path=/", "samesite=strict"}
    assert server.request("GET", "/session")[2] == b'{"inside":true,"login":"token"}'


def test_wrong_tokens_are_refused_and_soon_not_even_looked_at(web: StartWeb) -> None:
    server = web()
    for _ in range(TRIES):
        assert server.login("wrong")[0] == 401
    status, headers, _ = server.login()
    assert status == 429
    assert int(headers["Retry-After"]) > 0
    assert server.cookie == ""


def test_tries_that_have_only_begun_are_not_let_through_together(web: StartWeb) -> None:
    server = web()
    host = server.origin.removeprefix("http://")
    body = b'{"token":"wrong"}'
    head = (
        f"POST /login HTTP/1.1\r\nHost: {host}\r\nOrigin: {server.origin}\r\n"
        f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    )
    address, port = host.split(":")
    with ExitStack() as ends:
        begun = [
            ends.enter_context(socket.create_connection((address, int(port)), WITHIN))
            for _ in range(TRIES + 3)
        ]
        for each in begun:
            each.sendall(head.encode())
            assert each.recv(1 << 12).startswith(b"HTTP/1.1 100 ")  # the body is waited for
        answers = []
        for each in begun:
            each.sendall(body)
            answers.append(each.recv(1 << 12).split()[1])
    assert answers == [b"401"] * TRIES + [b"429"] * 3


@pytest.mark.parametrize("body", [None, [], {"token": 1}, {"token": "x" * 5000}, {}])
def test_what_is_no_token_is_refused(web: StartWeb, body: object) -> None:
    assert web().request("POST", "/login", body)[0] in (400, 401, 413)


@pytest.mark.parametrize("path", ["/", "/static/vendor/xterm.js", "/nothing", "/session"])
def test_every_answer_says_what_browsers_may_do_with_it(web: StartWeb, path: str) -> None:
    _, headers, _ = web().request("GET", path)
    policy = dict(
        part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Frame-Options"] == "DENY"


@pytest.mark.parametrize("path", ["/login", "/logout"])
@pytest.mark.parametrize("origin", ["http://evil.example", "http://[", "null", ""])
def test_another_page_can_neither_log_in_nor_out(web: StartWeb, path: str, origin: str) -> None:
    server = web()
    server.login()
    assert server.request("POST", path, {"token": server.token}, Origin=origin)[0] == 403
    assert server.request("GET", "/session")[2].startswith(b'{"inside":true')


def test_a_host_that_is_none_has_no_page(web: StartWeb) -> None:
    assert web().request("POST", "/login", {}, Host="[")[0] == 403


@pytest.mark.parametrize("said", ["", "{", '{"type":"look","x":' + "[" * 9999])
def test_a_page_that_makes_no_sense_is_hung_up_on(web: StartWeb, said: str) -> None:
    server = web()
    server.login()
    with server.connect("/guests") as page:
        page.recv(WITHIN)
        page.send(said)
        with pytest.raises(ConnectionClosed):
            page.recv(WITHIN)


@pytest.mark.parametrize("path", ["/guests", "/console"])
def test_no_websocket_without_a_session(web: StartWeb, path: str) -> None:
    assert refused(web(), path) == 401


@pytest.mark.parametrize("path", ["/guests", "/console"])
@pytest.mark.parametrize("origin", ["http://evil.example", "http://[", "null", ""])
def test_no_websocket_for_another_page(web: StartWeb, path: str, origin: str) -> None:
    server = web()
    server.login()
    assert refused(server, path, Origin=origin) == 403


def test_no_history_without_a_session(web: StartWeb) -> None:
    assert web().request("GET", "/history?guest=x")[0] == 401


def test_a_proxy_s_origin_is_allowed_when_it_is_named(web: StartWeb) -> None:
    server = web("--origin", "https://consoles.example.org")
    server.login()
    with server.connect("/guests", Origin="https://consoles.example.org") as page:
        assert '"guests"' in str(page.recv(WITHIN))


def test_logging_out_ends_what_the_session_has_open(web: StartWeb) -> None:
    server = web()
    server.login()
    with server.connect("/guests") as page:
        page.recv(WITHIN)
        cookie = server.cookie
        assert server.request("POST", "/logout")[0] == 200
        with pytest.raises(ConnectionClosed):
            page.recv(WITHIN)
        server.cookie = cookie
        assert refused(server, "/guests") == 401


def test_a_token_of_one_s_own(web: StartWeb, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("a token of our own\n")
    path.chmod(0o600)
    server = web("--token-file", str(path))
    assert server.token is None
    assert "token" not in server.url
    assert server.login("a token of our own")[0] == 200


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--listen", "0.0.0.0:0"], "every console and token would be shown to the network"),
        (["--listen", "[::]:0"], "every console and token would be shown to the network"),
        (["--listen", "127.0.0.1:0", "--no-login"], "would let everybody in who reaches the port"),
        (["--listen", "8080"], "give HOST:PORT"),
        (["--listen", "127.0.0.1:70000"], "give HOST:PORT"),
        (["--listen", "a..b:80"], "cannot listen at a..b:80: that is no host's name"),
        (["--listen", "unix:/nowhere/x"], "folder /nowhere does not exist"),
        (["--tls-key", "x"], "need --tls-cert"),
        (["--tls-cert", "/nowhere"], "--tls-cert: no such file"),
        (["--token-file", "/nowhere"], "no such file"),
        (["--token-file", "/nowhere", "--no-login"], "exclude each other"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(
    folder: Path, options: list[str], why: str
) -> None:
    done = command(folder, "web", *options)
    assert done.returncode == 2
    assert why in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_fails_while_it_is_served_is_no_mistake_of_whoever_started_it() -> None:
    def serve() -> None:
        with listening("127.0.0.1:0"):
            raise OSError(errno.EMFILE, "no more files")

    with pytest.raises(OSError, match="no more files"):
        serve()


def test_a_file_in_the_place_of_the_socket_is_left_alone(folder: Path) -> None:
    path = folder / "precious"
    path.write_text("mine")
    done = command(folder, "web", "--listen", f"unix:{path}")
    assert done.returncode == 2
    assert "is a file, not a socket" in done.stderr
    assert path.read_text() == "mine"


def test_a_unix_socket_needs_no_login_and_is_removed_at_the_end(folder: Path) -> None:
    path = folder / "page.sock"
    with Web(folder, "--no-login", listen=f"unix:{path}") as server:
        assert path.stat().st_mode & 0o777 == 0o660
        assert server.request("GET", "/session")[2] == b'{"inside":true,"login":null}'
        with server.connect("/guests") as page:
            page.recv(WITHIN)
    assert not path.exists()


@pytest.fixture
def authority(tmp_path: Path) -> tuple[trustme.CA, list[str]]:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
        str(tmp_path / "page.pem")
    )
    return ca, ["--tls-cert", str(tmp_path / "page.pem")]


def browser_of(ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return context


def test_over_tls_the_cookie_is_for_tls_and_this_host_alone(
    web: StartWeb, authority: tuple[trustme.CA, list[str]]
) -> None:
    ca, options = authority
    server = web(*options, context=browser_of(ca))
    assert server.url.startswith("https://")
    cookie = server.login()[1]["Set-Cookie"]
    assert cookie.startswith("__Host-")
    assert "; secure" in cookie.lower()
    with server.connect("/guests") as page:
        page.recv(WITHIN)


def test_with_certificates_who_has_none_is_not_let_in(
    web: StartWeb, authority: tuple[trustme.CA, list[str]], tmp_path: Path
) -> None:
    ca, options = authority
    known = browser_of(ca)
    ca.issue_cert("somebody@example.org").configure_cert(known)
    server = web(*options, "--tls-client-ca", str(tmp_path / "ca.pem"), "--no-login", context=known)
    assert server.request("GET", "/session")[2] == b'{"inside":true,"login":null}'
    server._context = browser_of(ca)  # noqa: SLF001
    with pytest.raises(OSError, match=r"(?i)certificate required|reset|eof|closed"):
        server.request("GET", "/session")


def changed(before: str) -> str:
    """Return Python that does that and then what our command does."""
    return f"import sys; {before}; from vhost_device_console import cli; cli.main()"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: a\r\n",
        b"POST /login HTTP/1.1\r\nHost: %s\r\nOrigin: http://%s\r\nContent-Length: 2\r\n\r\n{",
    ],
)
def test_who_asks_nothing_in_time_is_hung_up_on(web: StartWeb, said: bytes) -> None:
    hurry = "from vhost_device_console.people.web import connections as c; c.FIRST_WITHIN_S = 0.1"
    server = web(program=changed(hurry))
    host, _, port = server.host.partition(":")
    with socket.create_connection((host, int(port)), WITHIN) as slow:
        slow.sendall(said.replace(b"%s", server.host.encode()))
        assert slow.recv(1) == b""
    assert server.request("GET", "/")[0] == 200


FEW = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (128, 128))"


@pytest.mark.parametrize("tls", [False, True])
def test_who_asks_nothing_keeps_nobody_out(
    web: StartWeb, authority: tuple[trustme.CA, list[str]], tls: bool
) -> None:
    ca, options = authority
    how = {"context": browser_of(ca)} if tls else {}
    server = web(*(options if tls else []), program=changed(FEW), **how)
    server.login()
    host, _, port = server.host.partition(":")
    with ExitStack() as ends, server.connect("/guests") as page:
        page.recv(WITHIN)
        for _ in range(200):
            ends.enter_context(socket.create_connection((host, int(port)), WITHIN))
        assert server.request("GET", "/")[0] == 200
        with server.connect("/guests") as other:
            other.recv(WITHIN)
        assert page.ping().wait(WITHIN)


@pytest.mark.parametrize(
    ("before", "why"),
    [
        ("sys.modules['starlette'] = None", "pip install 'vhost-device-console[web]'"),
        (
            "from vhost_device_console.people.web import server; server._VENDORED = 'no'",
            "run contrib/web/vendor",
        ),
    ],
)
def test_what_is_missing_is_said_in_a_line(folder: Path, before: str, why: str) -> None:
    done = command_of(folder, changed(before))
    assert done[0] != 0
    assert why in done[1]
    assert done[1].count("\n") == 1


def command_of(folder: Path, program: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", program, "web"],
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=WITHIN,
    )
    return done.returncode, done.stderr
