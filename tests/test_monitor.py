"""The monitor socket: its messages, where it is, and how it treats its clients."""

from __future__ import annotations

import json
import os
import re
import selectors
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vhost_device_console import endpoints, monitor
from vhost_device_console.config import BackendKind, PortTable
from vhost_device_console.errors import ConfigError, ConsoleError
from vhost_device_console.monitor import (
    Change,
    Done,
    GuestStatus,
    PortAdd,
    PortRemove,
    PortStatus,
    Request,
    Resize,
    Status,
    StatusRequest,
)
from vhost_device_console.reception import (
    LARGEST_REQUEST,
    MOST_CLIENTS,
    MOST_FDS,
    MOST_UNREAD,
    Server,
)

from launch import WITHIN


def listen(undo: ExitStack, path: str) -> int:
    """Return a listener's descriptor."""
    kept = endpoints.listen_unix(path)
    undo.callback(kept.release)
    return kept.fd


REQUEST = b'{"type":"status"}\n'

PORT = PortStatus(
    id=0,
    name="console0",
    endpoint="127.0.0.1:12345",
    console=True,
    overflow="drop",
    state="ready",
    open=True,
    host_open=True,
    held=False,
    readers=1,
    output=2,
    input=3,
    missed=4,
    discarded=5,
    stalls=6,
    columns=80,
    rows=24,
    size_by="resize",
    log="/var/log/web",
)
GUEST = GuestStatus(
    name="c.sock0",
    socket="/tmp/c.sock0",
    state="running",
    daemon=1,
    worker=2,
    frontend=3,
    uptime=1.5,
    restarts=0,
    rss=4096,
    cpu=0.5,
    sessions=1,
    kicks=2,
    calls=3,
    chains=4,
    refused=5,
    broken=6,
    ignored=7,
    max_ports=8,
    ports=[PORT],
)


class Desk:
    """A server with its selector, turned by hand."""

    def __init__(self, folder: Path, undo: ExitStack) -> None:
        self.path = str(folder / "m.sock")
        self.status = Status(version="1", guests=[GUEST])
        self.requests: list[Request] = []
        self._selector = undo.enter_context(selectors.DefaultSelector())
        listener = listen(undo, self.path)
        self._undo = undo
        server = Server(self._selector, listener, self._answer)
        undo.callback(server.close)

    def _answer(self, request: Request, _fds: list[int]) -> Status | Done:
        self.requests.append(request)
        if isinstance(request, StatusRequest):
            return self.status
        if request.guest != "web":
            raise ConsoleError(f"no guest {request.guest}\udcff")
        return Done("it is so")

    def turn(self) -> None:
        """Serve what is ready until nothing is."""
        while ready := self._selector.select(0):
            for key, _ in ready:
                key.data()

    def wait(self) -> None:
        """Serve what is ready next; fail when nothing comes."""
        ready = self._selector.select(WITHIN)
        assert ready, "nothing came"
        self.turn()

    def watched(self) -> int:
        """How many descriptors the selector has."""
        return len(self._selector.get_map())

    def connect(self) -> socket.socket:
        client = self._undo.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(self.path)
        client.setblocking(False)
        self.turn()
        return client

    def say(self, client: socket.socket, data: bytes) -> list[Any]:
        """Send `data` and return the replies."""
        client.sendall(data)
        self.turn()
        return [json.loads(line) for line in client.recv(1 << 20).splitlines()]


@pytest.fixture
def desk(folder: Path) -> Iterator[Desk]:
    with ExitStack() as undo:
        yield Desk(folder, undo)


# Messages


def test_a_status_is_one_line_of_json(desk: Desk) -> None:
    client = desk.connect()
    client.sendall(REQUEST)
    desk.turn()
    assert client.recv(1 << 16) == (
        b'{"type":"status","version":"1","guests":[{"name":"c.sock0","socket":"/tmp/c.sock0",'
        b'"state":"running","daemon":1,"worker":2,"frontend":3,"uptime":1.5,"restarts":0,'
        b'"rss":4096,"cpu":0.5,"sessions":1,"kicks":2,"calls":3,"chains":4,"refused":5,"broken":6,'
        b'"ignored":7,"max_ports":8,"privileges":null,"died":null,"ports":[{"id":0,"name":"console0",'
        b'"endpoint":"127.0.0.1:12345","console":true,"overflow":"drop","state":"ready",'
        b'"open":true,"host_open":true,"held":false,"readers":1,"output":2,"input":3,"missed":4,'
        b'"discarded":5,"stalls":6,"columns":80,"rows":24,"size_by":"resize",'
        b'"log":"/var/log/web","log_failing":false,"lag":0}],"cpu_seconds":null,"services":null}]}\n'
    )


def test_requests_are_answered_one_by_one(desk: Desk) -> None:
    replies = desk.say(desk.connect(), REQUEST * 3)
    assert [reply["type"] for reply in replies] == ["status"] * 3


def test_a_request_may_come_in_pieces(desk: Desk) -> None:
    client = desk.connect()
    client.sendall(REQUEST[:5])
    desk.turn()
    assert desk.say(client, REQUEST[5:])[0]["type"] == "status"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"{}",
        b"no json",
        b"[1]",
        b'{"type":"reboot"}',
        b'{"type":5}',
        b'{"type":"port-remove","guest":"web"}',
        b'{"type":"port-remove","guest":"web","port":1}',
        b'{"type":"port-add","guest":"web","port":{"name":"a"}}',
        b'{"type":"port-add","guest":"web","port":{"name":"a","backend":"serial"}}',
        b'{"type":"resize","guest":"web","port":"0","columns":-1,"rows":5}',
        b'{"type":"resize","guest":"web","port":"0","columns":80,"rows":65536}',
        b'{"type":"resize","guest":"web","port":"0","columns":"80","rows":24}',
        *(
            b'{"type":"attach","guest":"web","name":"x","%s":%d}' % (which, number)
            for which in (b"since", b"replay", b"journal")
            for number in (-1, 1 << 63)
        ),
        b"\xff\xfe",
        b"[" * 5000,
        b'{"type":"status","more":' + b"[" * 5000,
    ],
)
def test_nonsense_is_answered_with_a_failure_and_the_client_stays(line: bytes, desk: Desk) -> None:
    client = desk.connect()
    replies = desk.say(client, line + b"\n" + REQUEST)
    assert [reply["type"] for reply in replies] == ["failure", "status"]
    assert desk.requests == [StatusRequest()]


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        (
            b'{"type":"port-add","guest":"web","port":'
            b'{"name":"a","backend":"network","tcp-port":7,"console":true,"stall-ms":9}}',
            PortAdd(
                "web",
                PortTable(
                    name="a", backend=BackendKind.NETWORK, tcp_port=7, console=True, stall_ms=9
                ),
            ),
        ),
        (b'{"type":"port-remove","guest":"web","port":"a"}', PortRemove("web", "a")),
        (
            b'{"type":"resize","guest":"web","port":"0","columns":80,"rows":24}',
            Resize("web", "0", 80, 24),
        ),
    ],
)
def test_a_change_is_one_line_of_json_and_so_is_its_reply(
    line: bytes, request_: Request, desk: Desk
) -> None:
    replies = desk.say(desk.connect(), line + b"\n")
    assert replies == [{"type": "done", "message": "it is so"}]
    assert desk.requests == [request_]


def test_a_change_that_cannot_be_made_is_a_failure_that_says_why(desk: Desk) -> None:
    replies = desk.say(desk.connect(), b'{"type":"port-remove","guest":"x","port":"a"}\n' + REQUEST)
    assert [reply["type"] for reply in replies] == ["failure", "status"]
    assert replies[0]["message"] == r"no guest x\xff"


def test_names_that_are_not_text_are_spelled_out() -> None:
    assert monitor.text(os.fsdecode(b"a\xff\xc3\xbc")) == "a\\xffü"


# Clients that misbehave


def test_a_client_that_hangs_up_is_forgotten(desk: Desk) -> None:
    before = desk.watched()
    desk.connect().close()
    desk.turn()
    assert desk.watched() == before


def test_an_endless_request_costs_its_client_the_connection(desk: Desk) -> None:
    client = desk.connect()
    rest = b"x" * LARGEST_REQUEST
    while rest:
        rest = rest[client.send(rest) :]
        desk.turn()
    assert client.recv(1) == b""


def test_endless_descriptors_cost_their_client_the_connection(desk: Desk) -> None:
    client = desk.connect()
    for _ in range(MOST_FDS + 1):
        socket.send_fds(client, [b" "], [client.fileno()])
        desk.turn()
    assert client.recv(1) == b""


def test_one_client_more_takes_the_place_of_the_oldest(desk: Desk) -> None:
    clients = [desk.connect() for _ in range(MOST_CLIENTS + 1)]
    assert clients[0].recv(1) == b""
    assert desk.say(clients[1], REQUEST)
    assert desk.say(clients[-1], REQUEST)


def test_a_client_that_does_not_read_is_dropped(desk: Desk) -> None:
    desk.status.guests *= 2000
    client = desk.connect()

    def ask_on() -> None:
        while True:
            client.sendall(REQUEST)
            desk.turn()

    with pytest.raises(BrokenPipeError):
        ask_on()
    assert desk.watched() == 1


def test_a_flood_of_requests_makes_no_more_replies_than_are_kept(desk: Desk) -> None:
    desk.status.guests *= 2000
    client = desk.connect()
    client.sendall(REQUEST * 3000)
    desk.turn()
    reply = len(msgspec.json.encode(desk.status))
    assert len(desk.requests) <= MOST_UNREAD // reply + 3


def test_a_reply_larger_than_the_socket_arrives_whole(desk: Desk) -> None:
    desk.status.guests *= 5000
    client = desk.connect()
    client.sendall(REQUEST)
    received = b""
    while not received.endswith(b"\n"):
        desk.turn()
        received += client.recv(1 << 20)
    assert len(json.loads(received)["guests"]) == 5000


def test_a_client_dropped_in_the_same_turn_is_not_served(desk: Desk) -> None:
    clients = [desk.connect() for _ in range(MOST_CLIENTS)]
    late = socket.socket(socket.AF_UNIX)
    with late:
        late.connect(desk.path)
        for client in clients:
            client.sendall(REQUEST)
        desk.turn()
        assert desk.watched() == 1 + MOST_CLIENTS


def test_running_out_of_descriptors_does_not_leave_the_listener_ready(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(24, "Too many open files")
    accept = socket.socket.accept
    left = [full]

    def refuse_once(listener: socket.socket) -> Any:
        if left:
            raise left.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", refuse_once)
    client = desk.connect()
    assert client.recv(1) == b""
    assert desk.watched() == 1


def test_closing_drops_the_clients(folder: Path) -> None:
    with ExitStack() as undo:
        desk = Desk(folder, undo)
        with closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(desk.path)
            desk.turn()
            undo.close()
            assert client.recv(1) == b""


# Where it is


@pytest.mark.parametrize(
    ("environ", "uid", "places"),
    [
        ({"RUNTIME_DIRECTORY": "/run/x", "XDG_RUNTIME_DIR": "/run/user/0"}, 0, ["/run/x"]),
        ({"RUNTIME_DIRECTORY": "/run/x:/run/y"}, 0, ["/run/x"]),
        (
            {"XDG_RUNTIME_DIR": "/run/user/7"},
            7,
            ["/run/user/7/vhost-device-console", "/tmp/vhost-device-console-7"],
        ),
        (
            {"XDG_RUNTIME_DIR": "/run/user/0"},
            0,
            ["/run/user/0/vhost-device-console", "/run/vhost-device-console"],
        ),
        ({}, 0, ["/run/vhost-device-console"]),
        ({}, 7, ["/tmp/vhost-device-console-7"]),
    ],
)
def test_the_runtime_folder_is_where_the_system_says(
    environ: dict[str, str], uid: int, places: list[str]
) -> None:
    assert monitor.folders(environ, uid) == places


def test_a_daemon_s_socket_is_named_after_its_process(folder: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(folder)}
    assert monitor.own_path(environ) == f"{folder}/vhost-device-console/{os.getpid()}.sock"


def test_the_folder_is_made_for_its_owner_alone(folder: Path) -> None:
    monitor.own_path({"XDG_RUNTIME_DIR": str(folder)})
    assert stat.S_IMODE((folder / "vhost-device-console").stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
def test_a_folder_of_somebody_else_is_refused(folder: Path) -> None:
    (folder / "r").mkdir()
    os.chown(folder / "r", 65534, 65534)
    with pytest.raises(ConfigError, match="r belongs to another user"):
        monitor.own_path({"RUNTIME_DIRECTORY": str(folder / "r")})


def test_a_link_is_no_folder_of_ours(folder: Path) -> None:
    (folder / "r").symlink_to(folder)
    with pytest.raises(ConfigError, match="belongs to another user"):
        monitor.own_path({"RUNTIME_DIRECTORY": str(folder / "r")})


def test_live_daemons_are_found_in_the_folder_and_one_level_below(folder: Path) -> None:
    (folder / "instance").mkdir()
    with ExitStack() as undo:
        here, below = str(folder / "5.sock"), str(folder / "instance" / "7.sock")
        listen(undo, here)
        listen(undo, below)
        assert monitor.find({"RUNTIME_DIRECTORY": str(folder)}) == [here, below]


def test_a_dead_daemon_s_socket_is_removed(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "1.sock"))
    assert monitor.find({"RUNTIME_DIRECTORY": str(folder)}) == []
    assert os.listdir(folder) == []


def test_other_sockets_in_the_folder_are_left_alone(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "guest.sock"))
    assert monitor.find({"RUNTIME_DIRECTORY": str(folder)}) == []
    assert os.listdir(folder) == ["guest.sock"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who asks everybody's")
def test_root_finds_daemons_that_became_other_users(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "_TEMPORARY", str(folder))
    theirs, forged = (folder / f"vhost-device-console-{uid}" for uid in (65534, 65533))
    with ExitStack() as undo:
        for place in (theirs, forged):
            place.mkdir()
            os.chown(place, 65534, 65534)
            listen(undo, str(place / "5.sock"))
        assert monitor.find({"XDG_RUNTIME_DIR": str(folder / "no")}) == [str(theirs / "5.sock")]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give folders away")
def test_a_user_finds_its_own_daemons_in_root_s_folder_and_no_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.chmod(0o755)
    with ExitStack() as undo:
        for name, uid in (("mine", 65534), ("theirs", 65533)):
            (folder / name).mkdir()
            os.chown(folder / name, uid, uid)
            listen(undo, str(folder / name / "5.sock"))
        monkeypatch.setattr(os, "geteuid", lambda: 65534)
        asked = {"RUNTIME_DIRECTORY": str(folder)}
        assert monitor.find(asked) == [str(folder / "mine/5.sock")]
        folder.chmod(0o777)  # now anybody may have put it there
        assert monitor.find(asked) == []


def test_a_missing_folder_has_no_daemons(folder: Path) -> None:
    assert monitor.find({"RUNTIME_DIRECTORY": str(folder / "no")}) == []


# Asking


def meanwhile(desk: Desk, what: Callable[[], Any]) -> Any:
    """Return what `what` does, or its ConsoleError, while the desk serves."""
    answers: list[Any] = []

    def act() -> None:
        try:
            answers.append(what())
        except ConsoleError as error:
            answers.append(error)

    client = threading.Thread(target=act)
    client.start()
    desk.wait()  # it connects
    while client.is_alive():
        desk.turn()
    client.join()
    return answers[0]


def test_asking_gives_the_status(desk: Desk) -> None:
    assert meanwhile(desk, lambda: monitor.ask(desk.path)) == desk.status


@pytest.mark.parametrize(
    "request_",
    [
        PortAdd("web", PortTable(name="ü", backend=BackendKind.UNIX, path="/a", id=3)),
        PortRemove("web", "ü"),
        Resize("web", "0", 65535, 0),
    ],
)
def test_a_change_arrives_as_it_was_asked_for(request_: Change, desk: Desk) -> None:
    assert meanwhile(desk, lambda: monitor.change(desk.path, request_)) == "it is so"
    assert desk.requests == [request_]


def test_a_change_that_is_refused_is_the_daemon_s_line(desk: Desk) -> None:
    said = meanwhile(desk, lambda: monitor.change(desk.path, PortRemove("x", "a")))
    assert isinstance(said, ConsoleError)
    assert str(said) == r"no guest x\xff"


def test_what_is_not_text_cannot_be_asked_for(folder: Path) -> None:
    with pytest.raises(ConsoleError, match=r"'a\\udcff' is not UTF-8"):
        monitor.change(str(folder / "no"), PortRemove("web", "a\udcff"))


def test_asking_nobody_is_one_line(folder: Path) -> None:
    with pytest.raises(ConsoleError, match=re.escape(f"{folder}/no: no such file or directory")):
        monitor.ask(str(folder / "no"))


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (b"", "hung up"),
        (b"what?\n", "no answer from"),
        (b'{"type":"done","message":"not asked"}\n', "refused: not asked"),
        (b'{"type":"failure","message":"not today"}\n', "refused: not today"),
    ],
)
def test_a_wrong_answer_is_one_line(reply: bytes, line: str, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as peer:
                peer.recv(1000)
                peer.sendall(reply)

        daemon = threading.Thread(target=answer)
        daemon.start()
        with pytest.raises(ConsoleError, match=line):
            monitor.ask(str(folder / "s"))
        daemon.join()


def test_a_daemon_that_hangs_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "ANSWER_WITHIN", 0.05)
    with ExitStack() as undo:
        listen(undo, str(folder / "s"))
        with pytest.raises(ConsoleError, match="does not answer"):
            monitor.ask(str(folder / "s"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become someone else")
def test_a_process_of_another_user_is_hung_up_on(
    desk: Desk, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.chmod(0o755)
    os.chmod(desk.path, 0o666)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setresuid(65534, 65534, 65534)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(desk.path)
                client.sendall(REQUEST)
                status = len(client.recv(1))
        except ConnectionError:
            status = 0
        finally:
            os._exit(status)
    desk.wait()
    assert os.waitpid(pid, 0) == (pid, 0)
    assert (desk.requests, desk.watched()) == ([], 1)
    assert caplog.messages == [
        f"a command was refused: process {pid} of user 65534 may not connect"
    ]
