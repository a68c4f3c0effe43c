"""The command line, as a person meets it: real launches, one clear line for each mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from vhost_device_console import __version__, core

from launch import COMMAND, Daemon, Ports, command, environment

StartDaemon = Callable[..., Daemon]


def refused(folder: Path, *arguments: str, code: int = 2, **popen: object) -> str:
    """Run a command line that must fail; return its one line, without the program's name."""
    before = sorted(os.listdir(folder))
    done = command(folder, *arguments, **popen)
    assert (done.returncode, done.stdout) == (code, "")
    line = re.fullmatch(r"vhost-device-console: error: (.+)\n", done.stderr)
    assert line, f"not one line: {done.stderr!r}"
    after = [name for name in sorted(os.listdir(folder)) if name != "run"]
    assert after == [name for name in before if name != "run"]
    assert os.listdir(folder / "run") == []
    return line[1]


# Words


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_every_option(option: str, folder: Path) -> None:
    said = command(folder, option)
    assert said.returncode == 0
    for name in (
        "-s, --socket-path",
        "-c, --socket-count",
        "-b, --backend",
        "-p, --tcp-port",
        "-q, --max-queue-size",
        "--fd",
        "--pty-link",
        "--port",
        "--max-ports",
        "--config",
        "--resize-order",
        "--inband",
        "--packed",
        "--poll-us",
        "--cpus",
        "--user",
        "--no-sandbox",
        "--log-level",
        "--print-capabilities",
        "-V, --version",
        "check",
        "port",
        "resize",
        "status",
    ):
        assert name in said.stdout


def test_help_does_not_load_what_only_the_daemon_needs() -> None:
    code = (
        "import sys; from vhost_device_console import cli; sys.argv = ['x', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "rest = ('psutil', 'asyncio', 'vhost_device_console.master')\n"
        "print([name for name in rest if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.endswith("[]\n")


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version_is_the_package_s(option: str, folder: Path) -> None:
    assert command(folder, option).stdout == f"vhost-device-console {__version__} ({core()})\n"


def test_plain_python_can_be_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VHOST_DEVICE_CONSOLE_PURE", "1")
    assert "(plain Python)" in command(folder, "--version").stdout


@pytest.mark.parametrize(
    "rest",
    [
        (),
        ("--backend", "nonsense"),
        ("-s",),
        ("status", "--what"),
        ("-s", "/nowhere/x", "-c", "-5"),
    ],
)
def test_capabilities_are_printed_whatever_else_is_said(
    rest: tuple[str, ...], folder: Path
) -> None:
    said = command(folder, *rest, "--print-capabilities")
    assert (said.returncode, said.stderr) == (0, "")
    assert json.loads(said.stdout) == {"type": "console"}


def test_the_shell_can_complete_options(folder: Path) -> None:
    said = command(
        folder,
        env=environment(
            folder,
            _VHOST_DEVICE_CONSOLE_COMPLETE="bash_complete",
            COMP_WORDS="vhost-device-console --socket-p",
            COMP_CWORD="1",
        ),
    )
    assert said.stdout.split() == ["plain,--socket-path"]


# Mistakes in the options


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "give either --socket-path or --fd"),
        (("-s", "x", "--fd", "3"), "give either --socket-path or --fd"),
        (("-s", ""), "--socket-path is empty"),
        (("-s", "x", "-c", "0"), "--socket-count must be at least 1, not 0"),
        (
            ("-s", "x", "-c", "2"),
            "the nested backend is one terminal: one port of one guest can have it",
        ),
        (("-s", "x", "-b", "serial"), "'serial' is not one of 'nested', 'network', 'unix', 'pty'"),
        (("-s", "x", "-c", "many"), "'many' is not a valid integer"),
        (("-s", "x", "-q", "100"), "--max-queue-size must be a power of two"),
        (("-s", "x", "--poll-us", "-1"), "--poll-us must not be negative"),
        (("-s", "x", "--cpus", "two"), "--cpus is 'two', not a list of CPUs such as 2-5,8"),
        (("-s", "x", "--cpus", "8191"), "x0 cannot be served on CPU 8191: this daemon may use 0"),
        (("-s", "x", "--pty-link", "y"), "--pty-link goes with --backend pty"),
        (("-s", "x", "-p", "1000"), "--tcp-port goes with --backend network"),
        (
            ("-s", "x", "-b", "network", "-p", "70000"),
            "--backend network: tcp-port must be from 1 to 65535, not 70000",
        ),
        (
            ("-s", "x", "-b", "network", "-p", "65535", "-c", "2"),
            "tcp-port must be from 1 to 65535, not 65536",
        ),
        (("-s", "x" * 200), "socket path is 201 bytes long, the system's limit is 107"),
        (("--fd", "77"), "--fd 77 is not open"),
        (("--fd", "1", "-b", "pty"), "--fd 1 is not a socket"),
        (("--fd", "0"), "--fd 0 is the terminal's place"),
        (("--fd", "5", "-b", "unix"), "the unix backend needs --socket-path"),
        (("-s",), "Option '-s' requires an argument"),
        (("--no-such-thing",), "No such option '--no-such-thing'"),
        (("reboot",), "No such command 'reboot'"),
        (("-c", "2", "status"), "--socket-count is the daemon's, not status's"),
        (("status", "--verbose"), "No such option '--verbose'"),
        (("--inband", "port", "add", "g", "name=a"), "--inband is the daemon's, not port's"),
        (("-s", "x", "--port", "name=a"), "--port 'name=a': backend is missing"),
        (("-s", "x", "--port", "name=a\nb,backend=pty"), r"'a\nb' is no name"),
        (("-s", "x", "--port", "name=a,backend=nested"), "one port of one guest can have it"),
        (("-s", "x", "--max-ports", "200"), "--max-ports must be from 1, for port 0, to 127"),
        (("-s", "x", "--resize-order", "rows"), "'rows' is not one of 'spec', 'linux-legacy'"),
        (("-s", "x", "--config", "f"), "--socket-path does not go with --config: say it in f"),
        (("--port", "x", "--config", "f"), "--port does not go with --config: say it in f"),
        (("--config", "f"), "cannot read f: no such file or directory"),
        (("--config", "/"), "cannot read /: is a directory"),
        (("--config", "/dev/null"), "/dev/null: one [[guest]] at least is needed"),
        (("port", "add", "g", "name=a"), "port add: backend is missing"),
        (("port", "add", "g", "name=a,backend=pty,x=y"), "port add: unknown key 'x': there are"),
        (("port", "add", "g"), "Missing argument"),
        (("port", "remove", "g"), "Missing argument 'PORT'"),
        (("resize", "g", "80"), "80 is no size: give COLUMNSxROWS, such as 80x24"),
        (("resize", "g", "80x70000"), "80x70000 is no size: give COLUMNSxROWS, such as 80x24"),
        (("-s", "\x1b[31m/x"), r"folder \x1b[31m does not exist"),
    ],
)
def test_a_wrong_option_is_one_clear_line(
    arguments: tuple[str, ...], line: str, folder: Path
) -> None:
    assert line in refused(folder, *arguments, cwd=folder)


# Mistakes that only the system knows


def test_a_missing_folder_is_one_clear_line(folder: Path) -> None:
    assert refused(folder, "-s", f"{folder}/no/c.sock") == (
        f"cannot create socket {folder}/no/c.sock0: folder {folder}/no does not exist"
    )


def test_a_file_in_the_way_is_one_clear_line(folder: Path) -> None:
    (folder / "c.sock1").write_text("precious")
    assert refused(folder, "-s", f"{folder}/c.sock", "-c", "3", "-b", "pty") == (
        f"{folder}/c.sock1 is a file, not a socket: remove it or choose another path"
    )


def test_a_busy_port_is_one_clear_line(folder: Path, ports: Ports) -> None:
    first = ports(3)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", first + 2))
        busy.listen()
        said = refused(
            folder, "-s", f"{folder}/c.sock", "-c", "3", "-b", "network", "-p", str(first)
        )
    assert said == f"TCP port 127.0.0.1:{first + 2} is in use: choose another"


def test_a_second_daemon_on_the_same_sockets_is_refused_and_the_first_lives(
    folder: Path, daemon: StartDaemon
) -> None:
    first = daemon("unix")
    said = command(folder, "-b", "unix", "-s", f"{folder}/c.sock")
    assert said.returncode == 2
    assert f"{folder}/c.sock0 is in use by another process" in said.stderr
    assert first.workers()


def test_too_few_descriptors_are_one_clear_line(folder: Path) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20));"
        "from vhost_device_console import cli; cli.main()"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, "-s", f"{folder}/c.sock", "-c", "20", "-b", "pty"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(folder),
    )
    assert (said.returncode, said.stdout) == (2, "")
    assert re.fullmatch(r"vhost-device-console: error: .*too many open files\n", said.stderr)
    assert os.listdir(folder) == ["run"]


# The daemon


@pytest.mark.parametrize("backend", ["network", "unix", "pty", "nested"])
def test_every_backend_starts_and_ends(backend: str, daemon: StartDaemon) -> None:
    served = daemon(backend, stdin=subprocess.PIPE)
    assert all(os.path.exists(path) for path in [*served.sockets, *served.data])
    assert served.workers()


def test_a_stale_socket_of_a_killed_daemon_is_replaced(daemon: StartDaemon) -> None:
    first = daemon("unix")
    first.workers()
    first.signal(signal.SIGKILL)
    first.wait()
    assert os.path.exists(first.sockets[0])
    assert daemon("unix").workers()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_daemon_and_removes_its_sockets(
    number: int, daemon: StartDaemon, folder: Path
) -> None:
    served = daemon("unix", 2)
    served.workers()
    served.signal(number)
    assert served.wait() == 0
    assert os.listdir(folder) == ["run"]


def test_a_signal_in_the_middle_of_the_start_leaves_no_traceback(daemon: StartDaemon) -> None:
    served = daemon("unix", 4)
    served.signal(signal.SIGINT)
    assert served.wait() == 0
    assert served.process.stderr is not None
    assert "Traceback" not in served.process.stderr.read().decode()


def test_a_killed_worker_is_replaced(daemon: StartDaemon) -> None:
    served = daemon()
    served.kill_worker()
    served.expect_log("c.sock0: its worker died: SIGKILL")
    assert served.status()[0]["restarts"] == 1


def test_an_inherited_listener_serves_frontends(daemon: StartDaemon, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "mine"))
        listener.listen()
        fd = listener.fileno()
        served = daemon("pty", 1, "--fd", str(fd), socket_path=None, pass_fds=[fd])
        with socket.socket(socket.AF_UNIX) as frontend:
            frontend.connect(str(folder / "mine"))
            served.expect_log(f"fd{fd}: frontend {os.getpid()} connected")


def test_the_daemon_ends_with_its_inherited_connection(daemon: StartDaemon) -> None:
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    with ours:
        with theirs:
            served = daemon("pty", 1, "--fd", str(fd), socket_path=None, pass_fds=[fd])
        served.workers()
    assert served.wait() == 0


def test_a_frontend_is_seen_coming_and_going(daemon: StartDaemon) -> None:
    served = daemon()
    with socket.socket(socket.AF_UNIX) as frontend:
        frontend.connect(served.sockets[0])
        served.until(lambda guests: guests[0]["frontend"] == os.getpid(), "not seen coming")
    served.until(lambda guests: guests[0]["frontend"] is None, "not seen going")


@pytest.mark.parametrize(("level", "heard"), [("info", True), ("error", False)])
def test_the_log_level_decides_what_is_said(level: str, heard: bool, daemon: StartDaemon) -> None:
    served = daemon("unix", 1, "--log-level", level)
    with socket.socket(socket.AF_UNIX) as frontend:
        frontend.connect(served.sockets[0])
        served.until(lambda guests: guests[0]["frontend"], "not seen")
    served.signal(signal.SIGTERM)
    served.wait()
    assert served.process.stderr is not None
    assert ("frontend" in served.process.stderr.read().decode()) is heard


# status


def test_status_without_a_daemon_is_one_line_and_status_1(folder: Path) -> None:
    assert refused(folder, "status", code=1) == "no daemon is running"


def test_status_of_a_socket_nobody_made_is_one_line(folder: Path) -> None:
    said = refused(folder, "status", "--socket", f"{folder}/no", code=1)
    assert said == f"cannot ask the daemon at {folder}/no: no such file or directory"


def test_status_is_a_table(folder: Path, daemon: StartDaemon) -> None:
    served = daemon("network", 2)
    served.workers()
    assert served.tcp is not None
    head, *rows = command(folder, "status").stdout.splitlines()
    assert re.sub(" +", " ", head) == (
        "NAME STATE FRONTEND PORTS READERS IN OUT DROPPED RSS CPU NOTES"
    )
    assert [row.split()[:8] for row in rows] == [
        [f"c.sock{n}", "running", "-", f"127.0.0.1:{served.tcp + n}", *"0000"] for n in range(2)
    ]


def test_status_of_a_guest_is_its_ports(folder: Path, daemon: StartDaemon) -> None:
    served = daemon("unix", 2, "--port", f"name=agent,backend=unix,path={folder}/a")
    served.workers()
    head, *rows = command(folder, "status", "c.sock1").stdout.splitlines()
    assert head.startswith("PORT       NAME      ENDPOINT")
    assert [row.split()[:3] for row in rows] == [
        ["c.sock1:0", "console0", served.data[1]],
        ["c.sock1:1", "agent", f"{folder}/a1"],
        ["c.sock1", "is", "served"],
    ]


def test_status_of_all_ports_is_a_line_for_each(folder: Path, daemon: StartDaemon) -> None:
    daemon("pty", 2, "--port", "name=agent,backend=pty")
    _, *rows = command(folder, "status", "--ports").stdout.splitlines()
    assert [row.split()[0] for row in rows] == [f"c.sock{n}:{port}" for n in "01" for port in "01"]


def test_status_of_a_guest_for_machines_is_that_guest(folder: Path, daemon: StartDaemon) -> None:
    daemon("pty", 2)
    guests = json.loads(command(folder, "status", "c.sock1", "--json").stdout)["guests"]
    assert [guest["name"] for guest in guests] == ["c.sock1"]


def test_status_of_an_unknown_guest_is_one_line(folder: Path, daemon: StartDaemon) -> None:
    daemon("pty", 2)
    said = command(folder, "status", "web")
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr == (
        "vhost-device-console: error: there is no guest web, only c.sock0, c.sock1\n"
    )


def test_status_fits_the_terminal(folder: Path, daemon: StartDaemon) -> None:
    daemon("unix", 1, "--port", f"name={'n' * 90},backend=pty").workers()
    ours, theirs = os.openpty()
    termios.tcsetwinsize(ours, (24, 100))
    done = subprocess.run(
        [*COMMAND, "status", "--ports"], stdout=theirs, check=False, env=environment(folder)
    )
    os.close(theirs)
    said = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "…" + "n" * 11 in said
    assert max(map(len, said.splitlines())) <= 100 + len("  NOTES")


def test_status_for_machines_is_json(folder: Path, daemon: StartDaemon) -> None:
    served = daemon("unix")
    (worker,) = served.workers()
    (guest,) = json.loads(command(folder, "status", "--json").stdout)["guests"]
    assert (guest["daemon"], guest["worker"]) == (served.pid, worker)
    assert (guest["socket"], guest["ports"][0]["endpoint"]) == (served.sockets[0], served.data[0])


def test_status_of_several_daemons_is_one_table(folder: Path, daemon: StartDaemon) -> None:
    daemon("pty", 1, socket_path="a")
    daemon("pty", 2, socket_path="b")
    _, *rows = command(folder, "status").stdout.splitlines()
    assert sorted(row.split()[0] for row in rows) == ["a0", "b0", "b1"]


def test_status_of_one_socket_is_that_daemon_s(folder: Path, daemon: StartDaemon) -> None:
    daemon("pty", 1, socket_path="a")
    chosen = daemon("pty", 1, socket_path="b")
    _, *rows = command(folder, "status", "--socket", chosen.monitor).stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["b0"]


def test_status_passes_over_a_daemon_that_was_killed(folder: Path, daemon: StartDaemon) -> None:
    dead = daemon("pty", 1, socket_path="a")
    daemon("pty", 1, socket_path="b")
    dead.signal(signal.SIGKILL)
    dead.wait()
    said = command(folder, "status")
    assert (said.returncode, len(said.stdout.splitlines())) == (0, 2)
    assert not os.path.exists(dead.monitor)


def test_status_spells_out_names_that_could_steer_a_terminal(
    folder: Path, daemon: StartDaemon
) -> None:
    daemon("pty", 1, socket_path="a\x1b[2J\n")
    said = command(folder, "status").stdout
    assert r"a\x1b[2J\n0" in said
    assert "\x1b" not in said


def test_a_path_that_is_not_text_is_served_and_shown(folder: Path, daemon: StartDaemon) -> None:
    served = daemon("unix", socket_path=os.fsdecode(b"a\xff"))
    assert served.workers()
    said = command(folder, "status")
    assert said.stdout.splitlines()[1].startswith(r"a\xff0 ")
    assert said.returncode == 0


def test_status_into_a_closed_pipe_says_nothing(folder: Path, daemon: StartDaemon) -> None:
    daemon("pty").workers()
    read, write = os.pipe()
    os.close(read)
    said = subprocess.run(
        [*COMMAND, "status"],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
        env=environment(folder),
    )
    os.close(write)
    assert (said.returncode, said.stderr) == (1, b"")


def test_status_says_which_daemon_hangs_and_shows_the_rest(
    folder: Path, daemon: StartDaemon
) -> None:
    daemon("pty").workers()
    hung = folder / "run" / "1.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(hung))
        listener.listen()
        said = command(folder, "status")
        hung.unlink()
    assert said.returncode == 1
    assert said.stderr == (f"vhost-device-console: error: the daemon at {hung} does not answer\n")
    assert "c.sock0" in said.stdout


def test_status_is_not_cut_for_a_pipe(folder: Path, daemon: StartDaemon) -> None:
    daemon("pty", 1, "--port", f"name={'n' * 90},backend=pty").workers()
    assert "n" * 90 in command(folder, "status", "--ports").stdout


# A file instead of options

FILE = """
[[guest]]
name = "web"
socket = "{folder}/web"
max-ports = 4

[[guest.port]]
name = "console"
console = true
backend = "unix"
path = "{folder}/web.console"

[[guest.port]]
name = "agent"
backend = "unix"
path = "{folder}/web.agent"

[[guest]]
socket = "{folder}/build"

[[guest.port]]
name = "console"
console = true
backend = "pty"
"""


@pytest.fixture
def from_file(folder: Path, daemon: StartDaemon) -> Daemon:
    """Give a daemon that FILE describes."""
    (folder / "f.toml").write_text(FILE.format(folder=folder))
    return daemon(None, 0, "--config", str(folder / "f.toml"), socket_path=None)


def test_a_file_s_guests_are_served(from_file: Daemon, folder: Path) -> None:
    from_file.workers()
    places = [
        (guest["name"], guest["socket"], [port["name"] for port in guest["ports"]])
        for guest in from_file.status()
    ]
    assert places == [
        ("web", f"{folder}/web", ["console", "agent"]),
        ("build", f"{folder}/build", ["console"]),
    ]


def test_a_file_s_sockets_go_with_the_daemon(from_file: Daemon, folder: Path) -> None:
    from_file.workers()
    from_file.signal(signal.SIGTERM)
    assert from_file.wait() == 0
    assert sorted(os.listdir(folder)) == ["f.toml", "run"]


# Changes to guests that run


def done(folder: Path, *arguments: str) -> str:
    """Run a command that must succeed and return what it printed."""
    said = command(folder, *arguments)
    assert (said.returncode, said.stderr) == (0, "")
    return said.stdout


def failed(folder: Path, *arguments: str) -> str:
    """Run a command that must fail with status 1 and return its line without the program's name."""
    said = command(folder, *arguments)
    assert (said.returncode, said.stdout) == (1, "")
    line = re.fullmatch(r"vhost-device-console: error: (.+)\n", said.stderr)
    assert line, f"not one line: {said.stderr!r}"
    return line[1]


def test_a_port_is_added_and_removed(folder: Path, from_file: Daemon) -> None:
    from_file.workers()
    said = done(folder, "port", "add", "web", f"name=log,backend=unix,path={folder}/log")
    assert said == f"port 2 of web, log, is at {folder}/log\n"
    assert os.path.exists(folder / "log")
    assert done(folder, "port", "remove", "web", "log") == "port 2 of web, log, is gone\n"
    assert not os.path.exists(folder / "log")


@pytest.mark.parametrize("guest", ["web", "web:0", "web:console"])
def test_a_console_s_size_is_set_and_given_back(
    guest: str, folder: Path, from_file: Daemon
) -> None:
    from_file.workers()
    assert done(folder, "resize", guest, "132x43") == "port 0 of web, console, is 132x43\n"
    said = done(folder, "resize", guest, "0x0")
    assert said == "port 0 of web, console, has its clients' size\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("port", "add", "web", "name=agent,backend=pty"), "another port has the name agent"),
        (("port", "add", "build", "name=a,backend=pty"), "build may have ports 0 to 0: start"),
        (("port", "add", "nobody", "name=a,backend=pty"), "no guest nobody, only build, web"),
        (("port", "remove", "web", "3"), "web has no port 3"),
        (("port", "remove", "web", "0"), "port 0 stays as long as its guest"),
        (("resize", "web:agent", "80x24"), "port agent of web is no console: it has no size"),
        (("resize", "web:x", "80x24"), "web has no port x"),
        (("resize", "web:", "80x24"), "web has no port "),
        (("resize", "x:0", "80x24"), "there is no guest x:0, only build, web"),
        (("resize", "web", "80x0"), "80x0 is no size: nothing fits in it"),
        (("port", "add", "web", "name=a,backend=unix,path=/\udcff"), "is not UTF-8"),
        (("port", "remove", "web", "\x1b[2J"), r"web has no port \x1b[2J"),
    ],
)
def test_a_change_that_cannot_be_is_one_line_and_status_1(
    arguments: tuple[str, ...], line: str, folder: Path, from_file: Daemon
) -> None:
    from_file.workers()
    assert line in failed(folder, *arguments)
    assert [len(guest["ports"]) for guest in from_file.status()] == [2, 1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("port", "add", "g", "name=a,backend=pty"),
        ("port", "remove", "g", "a"),
        ("resize", "g", "1x1"),
    ],
)
def test_a_change_without_a_daemon_is_one_line(arguments: tuple[str, ...], folder: Path) -> None:
    assert refused(folder, *arguments, code=1) == "no daemon is running"


def test_a_guest_of_two_daemons_has_to_be_chosen(folder: Path, daemon: StartDaemon) -> None:
    (folder / "b").mkdir()
    first, second = daemon("pty"), daemon("pty", socket_path="b/c.sock")
    said = failed(folder, "resize", "c.sock0", "80x24")
    assert said.startswith("2 daemons have a guest c.sock0: choose one with --socket ")
    assert first.monitor in said
    assert second.monitor in said
    first.workers()
    assert done(folder, "resize", "c.sock0", "80x24", "--socket", first.monitor)
    second.signal(signal.SIGTERM)
    second.wait()
    (folder / "b").rmdir()


def test_a_guest_s_name_may_have_a_colon(folder: Path, daemon: StartDaemon) -> None:
    daemon("pty", socket_path="a:").workers()
    assert done(folder, "resize", "a:0", "80x24") == "port 0 of a:0, console0, is 80x24\n"
    assert done(folder, "resize", "a:0:0", "80x24") == "port 0 of a:0, console0, is 80x24\n"


@pytest.mark.parametrize(
    "words", ["status c.", "resize c.", "port add c.", "port remove c.", "resize "]
)
def test_the_shell_can_complete_guests(words: str, folder: Path, daemon: StartDaemon) -> None:
    daemon("pty", 2)
    assert completed(folder, words) == ["plain,c.sock0", "plain,c.sock1"]


def test_completing_without_a_daemon_is_silent(folder: Path) -> None:
    assert completed(folder, "resize c") == []


def completed(folder: Path, words: str) -> list[str]:
    """Return what the shell would be given for the last of `words`."""
    env = environment(
        folder,
        _VHOST_DEVICE_CONSOLE_COMPLETE="bash_complete",
        COMP_WORDS=f"vhost-device-console {words}",
        COMP_CWORD=str(len(words.split(" "))),
    )
    said = command(folder, env=env)
    assert said.stderr == ""
    return said.stdout.split()
