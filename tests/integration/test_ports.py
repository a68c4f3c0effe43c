"""Consoles of several ports: each carries its own, opens by itself, comes and goes."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scene import boot, exactly, footprint, noise, nothing_to_read, wait_footprint
from vhost_device_console import config, monitor
from vhost_device_console.testing import (
    ConsoleDriver,
    Control,
    Event,
    Feature,
    GuestMemory,
    connect_like_qemu,
)
from vhost_device_console.testing.features import DRIVER_FEATURES

from conftest import StartDaemon
from launch import WITHIN, Daemon

GENERIC = "org.test.pipe"


def port(daemon: Daemon, number: int) -> dict[str, Any]:
    """Return the status of one port of the first guest."""
    (found,) = [port for port in daemon.status()[0]["ports"] if port["id"] == number]
    return dict(found)


def wait_for(daemon: Daemon, number: int, **wanted: object) -> None:
    """Wait until the status of one port has these values."""
    daemon.until(
        lambda guests: any(
            {"id": number, **wanted}.items() <= port.items() for port in guests[0]["ports"]
        ),
        f"port {number} never {wanted}",
    )


@contextmanager
def client(path: str) -> Iterator[socket.socket]:
    """Give a client of a unix backend."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(WITHIN)
        peer.connect(path)
        yield peer


@pytest.fixture
def pipes(daemon: StartDaemon, folder: Path) -> Callable[..., Daemon]:
    """Give a function that starts a daemon with generic ports at `folder`/p1, p2 and so on."""

    def start(count: int = 1, *options: str, rest: str = "") -> Daemon:
        for number in range(1, count + 1):
            name = GENERIC if number == 1 else f"{GENERIC}.{number}"
            options += ("--port", f"name={name},backend=unix,path={folder}/p{number}.{rest}")
        return daemon("unix", 1, *options)

    return start


def path(folder: Path, number: int) -> str:
    """Return where the client of a generic port of the first guest attaches."""
    return f"{folder}/p{number}.0"


@contextmanager
def ready(daemon: Daemon, ports: int = 2, **options: Any) -> Iterator[ConsoleDriver]:
    """Give a guest with so many ports, the console open, the others added."""
    with boot(daemon, queue_count=2 * ports + 2, **options) as console:
        console.wait_until(lambda: len(console.ports) == ports, "all ports")
        for each in [*console.ports.values()]:
            console.wait_until(lambda each=each: each.name is not None, "a name")  # type: ignore[misc]
        yield console


def test_a_guest_is_told_the_kind_and_name_of_each_port(pipes: Callable[..., Daemon]) -> None:
    with ready(pipes(2), 3) as console:
        seen = [(p.number, p.is_console, p.name) for p in console.ports.values()]
        assert seen == [
            (0, True, b"console0"),
            (1, False, GENERIC.encode()),
            (2, False, f"{GENERIC}.2".encode()),
        ]


def test_each_port_carries_its_own_bytes(pipes: Callable[..., Daemon], folder: Path) -> None:
    daemon = pipes(3)
    with ready(daemon, 4) as console, client(daemon.data[0]) as zero:
        peers = [client(path(folder, number)) for number in (1, 2, 3)]
        with peers[0] as one, peers[1] as two, peers[2] as three:
            for number, peer in enumerate((zero, one, two, three)):
                each = console.ports[number]
                each.open()
                each.write(b"from port %d" % number)
                peer.sendall(b"to port %d" % number)
                assert exactly(peer, 11) == b"from port %d" % number
                assert each.read(9) == b"to port %d" % number


def test_127_ports_work(daemon: StartDaemon, folder: Path) -> None:
    options = [
        option
        for number in range(1, 127)
        for option in ("--port", f"name=p{number},backend=unix,path={folder}/p{number}.")
    ]
    started = daemon("unix", 1, *options)
    with (
        ready(started, 127, queue_size=2) as console,
        client(path(folder, 126)) as peer,
    ):
        last = console.ports[126]
        last.open()
        last.write(b"out")
        assert exactly(peer, 3) == b"out"
        peer.sendall(b"in")
        assert last.read(2) == b"in"


# Open and closed


def test_a_generic_port_is_open_to_the_guest_while_a_client_is_there(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    with ready(pipes()) as console:
        console.wait_control(Event.PORT_OPEN, port=1, value=0)
        with client(path(folder, 1)):
            console.wait_control(Event.PORT_OPEN, port=1, value=1)
        console.wait_control(Event.PORT_OPEN, port=1, value=0)


def test_a_client_that_was_first_is_told_of_at_once(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    daemon = pipes()
    with client(path(folder, 1)):
        wait_for(daemon, 1, readers=1)
        with ready(daemon) as console:
            assert console.wait_control(Event.PORT_OPEN, port=1).value == 1


def test_input_waits_until_the_guest_opens_the_port(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    daemon = pipes()
    with ready(daemon) as console, client(path(folder, 1)) as peer:
        peer.sendall(b"early")
        console.wait_control(Event.PORT_OPEN, port=1, value=1)
        console.pump()
        assert port(daemon, 1)["input"] == 0
        console.ports[1].open()
        assert console.ports[1].read(5) == b"early"


def test_what_a_client_typed_before_it_left_arrives_before_the_port_is_closed(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    daemon = pipes()
    with ready(daemon) as console:
        pipe = console.ports[1]
        pipe.open()
        pipe.throttle()
        with client(path(folder, 1)) as peer:
            console.wait_control(Event.PORT_OPEN, port=1, value=1)
            peer.sendall(noise(1 << 20)[: 1 << 16])
        wait_for(daemon, 1, readers=0)
        pipe.unthrottle()
        assert pipe.read(1 << 16) == noise(1 << 20)[: 1 << 16]
        console.wait_control(Event.PORT_OPEN, port=1, value=0)


def test_a_port_closed_in_the_guest_is_shown(pipes: Callable[..., Daemon]) -> None:
    daemon = pipes()
    with ready(daemon) as console:
        console.ports[1].open()
        wait_for(daemon, 1, open=True)
        console.ports[1].close()
        wait_for(daemon, 1, open=False)


# Overflow


def test_a_generic_port_loses_nothing_to_a_reader_that_pauses(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    """Three journals' worth, none of it read until the reader has counted as stuck."""
    daemon = pipes()
    data = noise(3 << 20)
    with ready(daemon) as console, client(path(folder, 1)) as peer:
        pipe = console.ports[1]
        console.wait_control(Event.PORT_OPEN, port=1, value=1)
        sent = 0
        while not port(daemon, 1)["stalls"]:
            console.pump()
            while pipe.in_flight < 16 and sent < len(data):
                pipe.submit(data[sent : sent + 32768])
                sent += 32768
        got = hashlib.sha256()
        left = len(data)
        peer.setblocking(False)
        while left:
            console.pump()
            while pipe.in_flight < 16 and sent < len(data):
                pipe.submit(data[sent : sent + 32768])
                sent += 32768
            try:
                piece = peer.recv(1 << 20)
            except BlockingIOError:
                continue
            got.update(piece)
            left -= len(piece)
        assert got.digest() == hashlib.sha256(data).digest()
        assert port(daemon, 1)["missed"] == 0


def test_a_generic_port_keeps_what_nobody_was_there_to_read(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    daemon = pipes()
    data = noise((1 << 20) + 4096)
    with ready(daemon) as console:
        for at in range(0, len(data), 4096):
            console.ports[1].submit(data[at : at + 4096])
            console.wait_until(lambda: console.ports[1].in_flight <= 1, "completion")
        wait_for(daemon, 1, held=True)
        with client(path(folder, 1)) as peer:
            assert exactly(peer, len(data)) == data


def test_a_held_port_holds_no_other(pipes: Callable[..., Daemon]) -> None:
    daemon = pipes()
    with ready(daemon) as console, client(daemon.data[0]) as peer:
        for _ in range((1 << 20) // 4096 + 1):
            console.ports[1].submit(bytes(4096))
            console.wait_until(lambda: console.ports[1].in_flight <= 1, "completion")
        console.write(b"the console lives")
        assert exactly(peer, 17) == b"the console lives"


def test_a_generic_port_may_drop(daemon: StartDaemon, folder: Path) -> None:
    description = f"name={GENERIC},backend=unix,path={folder}/p1.,overflow=drop"
    started = daemon("unix", 1, "--port", description)
    with ready(started) as console:
        console.ports[1].write(bytes(2 << 20), chunk=32768, depth=8)
        with client(path(folder, 1)):
            wait_for(started, 1, missed=1 << 20)


# The guest's side of the dialogue


def test_a_port_the_guest_could_not_add_is_shown_as_failed(pipes: Callable[..., Daemon]) -> None:
    daemon = pipes()
    with ready(daemon) as console:
        console.send_control(1, Event.PORT_READY, 0)
        wait_for(daemon, 1, state="failed")
        assert port(daemon, 0)["state"] == "ready"


def test_a_device_the_guest_could_not_set_up_is_shown_as_failed(
    pipes: Callable[..., Daemon],
) -> None:
    daemon = pipes()
    with ready(daemon) as console:
        console.send_control(0xFFFF_FFFF, Event.DEVICE_READY, 0)
        for number in (0, 1):
            wait_for(daemon, number, state="failed")


def test_a_guest_back_from_hibernation_is_answered(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    """It says PORT_READY and PORT_OPEN with no DEVICE_READY before, on rings that are new."""
    daemon = pipes()
    with ready(daemon) as console:
        frontend = console.frontend
        for queue in frontend.queues.values():
            queue.driver.reset()
        frontend.reconnect()
        again = ConsoleDriver(frontend, woken=[0, 1])
        assert again.wait_control(Event.PORT_NAME, port=1).data == GENERIC.encode()
        with client(path(folder, 1)) as peer:
            peer.sendall(b"still here")
            assert again.ports[1].read(10) == b"still here"


def test_control_messages_for_ports_there_are_not_are_counted(
    pipes: Callable[..., Daemon],
) -> None:
    daemon = pipes()
    with ready(daemon) as console:
        for number in (2, 127, 0xFFFF_FFFF):
            console.send_control(number, Event.PORT_OPEN, 1)
        daemon.until(lambda guests: guests[0]["ignored"] == 3, "never counted")


def test_a_guest_that_finds_another_worker_goes_on_typing(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    """Its driver knows of no change and says nothing of its ports again."""
    daemon = pipes()
    with ready(daemon) as console:
        daemon.kill_worker()
        console.frontend.reconnect()
        wait_for(daemon, 0, open=True, state="ready")
        with client(daemon.data[0]) as peer, client(path(folder, 1)) as pipe:
            peer.sendall(b"typed")
            assert console.read(5) == b"typed"
            console.wait_control(Event.PORT_OPEN, port=1, value=1)
            console.ports[1].write(b"out")
            assert exactly(pipe, 3) == b"out"


def test_a_guest_whose_question_went_down_with_a_worker_is_answered_by_the_next(
    pipes: Callable[..., Daemon],
) -> None:
    """The worker took DEVICE_READY and died before the guest had buffers for the answer."""
    daemon = pipes(0)
    with (
        GuestMemory() as memory,
        connect_like_qemu(daemon.sockets[0], memory, timeout=WITHIN) as frontend,
    ):
        heard = frontend.queues[3]
        heard.driver.add([Control(0, Event.DEVICE_READY, 1).encode()])
        heard.notify()
        heard.wait(WITHIN)
        daemon.kill_worker()
        frontend.reconnect()
        said = frontend.queues[2]
        said.driver.add(writable=[64])
        said.notify()
        (used,) = said.wait(WITHIN)
        assert used.data == Control(0, Event.PORT_ADD, 0).encode()


# Frontends with more or fewer queues


def test_without_multiport_the_first_port_works_on_two_queues(
    pipes: Callable[..., Daemon],
) -> None:
    daemon = pipes()
    with (
        boot(daemon, queue_count=2, features=DRIVER_FEATURES & ~Feature.MULTIPORT) as console,
        client(daemon.data[0]) as peer,
    ):
        console.write(b"out")
        assert exactly(peer, 3) == b"out"
        peer.sendall(b"in")
        assert console.read(2) == b"in"


@pytest.mark.parametrize(("queues", "promised"), [(4, 1), (6, 2), (7, 2), (10, 4), (40, 4)])
def test_a_guest_is_promised_the_ports_its_frontend_has_queues_for(
    pipes: Callable[..., Daemon], queues: int, promised: int
) -> None:
    daemon = pipes(1, "--max-ports", "4")
    with boot(daemon, queue_count=queues) as console:
        assert int.from_bytes(console.frontend.get_config(4, 4), "little") == promised


def test_a_guest_with_more_queues_than_ports_has_its_ports(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    with (
        ready(
            pipes(),
            2,
        ) as console,
        client(path(folder, 1)) as peer,
    ):
        console.ports[1].write(b"out")
        assert exactly(peer, 3) == b"out"


# Ports come and go


def add(daemon: Daemon, folder: Path, name: str = "added", **more: object) -> str:
    """Add a unix port and return its path."""
    place = f"{folder}/{name}"
    text = ",".join(
        [f"name={name},backend=unix,path={place}", *(f"{k}={v}" for k, v in more.items())]
    )
    monitor.change(daemon.monitor, monitor.PortAdd("c.sock0", config.parse_port(text, "a test")))
    return place


def remove(daemon: Daemon, which: str) -> None:
    """Remove a port by its name or number."""
    monitor.change(daemon.monitor, monitor.PortRemove("c.sock0", which))


def test_a_port_added_to_a_guest_that_runs_works(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    daemon = pipes(1, "--max-ports", "4")
    with boot(daemon, queue_count=10) as console:
        console.wait_until(lambda: len(console.ports) == 2, "the first ports")
        with client(add(daemon, folder)) as peer:
            console.wait_until(lambda: 2 in console.ports, "the new port")
            added = console.ports[2]
            console.wait_control(Event.PORT_OPEN, port=2, value=1)
            assert added.name == b"added"
            added.open()
            added.write(b"out")
            assert exactly(peer, 3) == b"out"
            peer.sendall(b"in")
            assert added.read(2) == b"in"


def test_an_added_port_may_be_a_console(pipes: Callable[..., Daemon], folder: Path) -> None:
    daemon = pipes(0, "--max-ports", "2")
    with boot(daemon, queue_count=6) as console:
        monitor.change(
            daemon.monitor,
            monitor.PortAdd(
                "c.sock0",
                config.parse_port(f"name=second,backend=unix,path={folder}/s,console", "a test"),
            ),
        )
        console.wait_control(Event.CONSOLE_PORT, port=1)


def test_a_removed_port_is_gone_for_guest_and_clients(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    daemon = pipes()
    with ready(daemon) as console, client(path(folder, 1)) as peer:
        wait_for(daemon, 1, readers=1)
        remove(daemon, GENERIC)
        console.wait_until(lambda: 1 not in console.ports, "the port's removal")
        assert peer.recv(1) == b""
        assert not Path(path(folder, 1)).exists()
        assert [port["id"] for port in daemon.status()[0]["ports"]] == [0]


def test_what_the_guest_wrote_before_a_port_s_removal_reaches_its_reader(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    daemon = pipes()
    with ready(daemon) as console, client(path(folder, 1)) as peer:
        console.wait_control(Event.PORT_OPEN, port=1, value=1)
        console.ports[1].write(b"last words")
        remove(daemon, "1")
        assert exactly(peer, 10) == b"last words"
        assert peer.recv(1) == b""


def test_all_that_a_removed_port_has_reaches_a_slow_reader(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    daemon = pipes()
    data = noise(900 << 10)
    with ready(daemon) as console, client(path(folder, 1)) as peer:
        console.wait_control(Event.PORT_OPEN, port=1, value=1)
        console.ports[1].write(data, depth=8)
        remove(daemon, "1")
        console.wait_until(lambda: 1 not in console.ports, "the port's removal")
        assert exactly(peer, len(data)) == data
        assert peer.recv(1) == b""


def test_a_number_can_be_used_again(pipes: Callable[..., Daemon], folder: Path) -> None:
    """Its rings went on meanwhile; what is written to a port that is gone is nobody's."""
    daemon = pipes()
    with ready(daemon) as console:
        tx = console.ports[1].tx
        remove(daemon, "1")
        console.wait_until(lambda: 1 not in console.ports, "the port's removal")
        tx.driver.add([b"for nobody"])
        tx.notify()
        assert tx.wait(WITHIN)
        with client(add(daemon, folder, "again")) as peer:
            console.wait_until(lambda: 1 in console.ports, "the new port")
            console.wait_control(Event.PORT_OPEN, port=1, value=1)
            again = console.ports[1]
            again.open()
            again.write(b"out")
            assert exactly(peer, 3) == b"out"
            peer.sendall(b"in")
            assert again.read(2) == b"in"


def test_a_port_added_before_a_guest_boots_is_one_of_its_ports(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    daemon = pipes(0, "--max-ports", "2")
    add(daemon, folder)
    with ready(daemon) as console:
        assert console.ports[1].name == b"added"


def test_a_successor_has_the_ports_as_they_are(pipes: Callable[..., Daemon], folder: Path) -> None:
    daemon = pipes(1, "--max-ports", "3")
    remove(daemon, GENERIC)
    place = add(daemon, folder)
    daemon.kill_worker()
    with ready(daemon) as console, client(place) as peer:
        assert console.ports[1].name == b"added"
        console.ports[1].write(b"out")
        assert exactly(peer, 3) == b"out"


def test_fifty_ports_come_and_go_and_nothing_is_left(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    daemon = pipes(0, "--max-ports", "2")
    with boot(daemon, queue_count=6) as console:
        held = footprint(daemon.workers()[0])
        for _ in range(50):
            add(daemon, folder)
            console.wait_until(lambda: 1 in console.ports, "the port")
            remove(daemon, "added")
            console.wait_until(lambda: 1 not in console.ports, "the port's removal")
        wait_footprint(daemon.workers()[0], held)


def test_ports_that_come_and_go_disturb_no_other(
    pipes: Callable[..., Daemon], folder: Path
) -> None:
    daemon = pipes(0, "--max-ports", "2")
    with boot(daemon, queue_count=6) as console, client(daemon.data[0]) as peer:
        for turn in range(5):
            add(daemon, folder)
            console.write(b"turn %d" % turn)
            assert exactly(peer, 6) == b"turn %d" % turn
            remove(daemon, "added")
        assert nothing_to_read(peer)
