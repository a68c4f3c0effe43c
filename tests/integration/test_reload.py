"""An upgrade is invisible: SIGHUP has the daemon begin anew in its place, and nobody notices."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scene import assert_same, attach, boot, converse, exactly, noise

from launch import Daemon, command

StartDaemon = Callable[..., Daemon]


def reload(served: Daemon) -> list[dict[str, Any]]:
    """Have a daemon begin anew, and return its status once all workers are new."""
    before = served.workers()
    served.signal(signal.SIGHUP)
    status: list[dict[str, Any]] = served.until(
        lambda guests: all(
            guest["state"] == "running" and guest["worker"] not in before for guest in guests
        ),
        "its workers are the old ones",
    )
    return status


def test_sessions_go_on_in_the_same_process(daemon: StartDaemon) -> None:
    served = daemon("network", 3)
    with attach(served) as peer, boot(served) as console:
        for _ in range(3):
            converse(console, peer)
            assert {guest["daemon"] for guest in reload(served)} == {served.pid}
        converse(console, peer)
        assert served.status()[0]["frontend"] == os.getpid()


def test_nothing_is_lost_or_doubled_under_load(daemon: StartDaemon) -> None:
    served = daemon("network", 1)
    data = noise(2 << 20)
    part = len(data) // 4
    with attach(served) as peer, boot(served) as console:
        sender = threading.Thread(target=peer.sendall, args=[data])
        sender.start()
        got = b""
        for at in range(0, len(data), part):
            writer = threading.Thread(target=console.write, args=[data[at : at + part]])
            writer.start()
            reload(served)
            got += exactly(peer, part)
            writer.join()
        back = console.read(len(data))
        sender.join()
    assert_same(got, data)
    assert_same(back, data)


def test_a_client_that_comes_meanwhile_is_let_in(daemon: StartDaemon) -> None:
    served = daemon("network", 1)
    with boot(served) as console:
        served.workers()
        served.signal(signal.SIGHUP)
        with attach(served) as peer:
            converse(console, peer)
        served.expect_log("begins anew")


def test_counters_go_on(daemon: StartDaemon) -> None:
    served = daemon("network", 1)
    with attach(served) as peer, boot(served) as console:
        converse(console, peer)
        before = served.until(lambda guests: guests[0]["sessions"] == 1, "no session")[0]
        after = reload(served)[0]
    counted = ("sessions", "refused", "chains")
    assert [after[what] >= before[what] for what in counted] == [True] * 3
    assert after["sessions"] == 1


# A configuration


def write(folder: Path, *guests: str) -> str:
    """Write a configuration with these guests, and return its path."""
    path = folder / "c.toml"
    tables = [
        f'[[guest]]\nsocket = "{folder}/{name}"\n'
        '[[guest.port]]\nname = "c"\nbackend = "unix"\nconsole = true\n'
        f'path = "{folder}/{name}.data"\n'
        for name in guests
    ]
    path.write_text("".join(tables))
    return str(path)


@pytest.fixture
def configured(folder: Path) -> Any:
    """Give a daemon with a configuration of two guests."""
    config = write(folder, "a", "b")
    with Daemon(folder, None, 0, "--config", config, socket_path=None) as served:
        yield served


def test_what_does_not_parse_changes_nothing(configured: Daemon) -> None:
    before = configured.workers()
    Path(configured.folder, "c.toml").write_text("[[guest]]\nsocket-path = 7\n")
    configured.signal(signal.SIGHUP)
    configured.expect_log("nothing is reloaded: the command line would fail")
    assert configured.workers() == before


def test_a_guest_comes_another_goes_and_the_third_does_not_notice(configured: Daemon) -> None:
    configured.sockets = [f"{configured.folder}/{name}" for name in "abc"]
    configured.data = [f"{path}.data" for path in configured.sockets]
    configured.workers()
    with attach(configured, 1) as peer, boot(configured, 1) as console:
        converse(console, peer)
        write(configured.folder, "b", "c")
        configured.signal(signal.SIGHUP)
        configured.until(
            lambda guests: (
                [guest["name"] for guest in guests if guest["state"] == "running"] == ["b", "c"]
            ),
            "not another set of guests",
        )
        converse(console, peer)
    assert not os.path.exists(configured.sockets[0])
    with boot(configured, 2) as console:
        console.write(b"new")


def test_a_port_comes_with_a_configuration(configured: Daemon) -> None:
    configured.sockets = [f"{configured.folder}/{name}" for name in "ab"]
    configured.data = [f"{path}.data" for path in configured.sockets]
    path = Path(write(configured.folder, "a", "b"))
    with attach(configured) as peer, boot(configured) as console:
        converse(console, peer)
        path.write_text(
            path.read_text().replace("[[guest]]", "[[guest]]\nmax-ports = 2")
            + f'[[guest.port]]\nname = "d"\nbackend = "unix"\npath = "{configured.folder}/d"\n'
        )
        configured.signal(signal.SIGHUP)
        configured.until(lambda guests: len(guests[1]["ports"]) == 2, "no second port")
        converse(console, peer)


OTHER_VERSION = """
import os
from vhost_device_console import cli
from vhost_device_console.worker import guest
if "VHOST_DEVICE_CONSOLE_STATE" in os.environ:
    guest.VERSION += 1
cli.main()
"""


def test_a_worker_stays_whose_snapshot_the_new_program_does_not_know(
    daemon: StartDaemon, folder: Path
) -> None:
    """When it ends its guest begins anew, and its log goes on."""
    log = folder / "log0"
    other = [sys.executable, "-c", OTHER_VERSION]
    served = daemon("network", 1, "--log-file", str(folder / "log"), program=other)
    before = served.workers()
    with attach(served) as peer, boot(served) as console:
        converse(console, peer)
        served.signal(signal.SIGHUP)
        served.expect_log("c.sock0 keeps its worker: this program cannot go on from what")
        converse(console, peer)
        assert served.workers() == before
        refused = command(served.folder, "attach", "c.sock0")
        assert refused.returncode == 1
        assert "is still served by an older program" in refused.stderr
        served.kill_worker()
        served.expect_log("c.sock0: frontend dropped: no worker can go on from what")
    with attach(served) as peer, boot(served) as console:
        converse(console, peer)
    served.close()
    assert log.read_bytes() == b"to people\n" * 3


def test_a_program_that_does_not_understand_this_one_changes_nothing(daemon: StartDaemon) -> None:
    code = (
        "import os, msgspec\n"
        "from vhost_device_console import cli, master\n"
        'if "VHOST_DEVICE_CONSOLE_TRIAL" in os.environ:\n'
        "    master._State = msgspec.defstruct('Other', [(f'f{n}', int) for n in range(20)])\n"
        "cli.main()\n"
    )
    served = daemon("network", 1, program=[sys.executable, "-c", code])
    before = served.workers()
    served.signal(signal.SIGHUP)
    served.expect_log("this program cannot go on from the one that runs")
    served.expect_log("nothing is reloaded")
    assert served.workers() == before
