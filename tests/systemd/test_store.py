"""What a real systemd keeps for a program that speaks to it as we do, and gives back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pid1 import Machine

UNIT = "store.service"

#: Says what it was given, then does what the file /run/store.py says, and waits.
PROGRAM = """
import json, os, select
from vhost_device_console import systemd

def content(fd):
    return os.pread(fd, 100, 0).decode()

def file(text):
    fd = os.memfd_create(text)
    os.write(fd, text.encode())
    return fd

given = systemd.listen_fds()
with open("/run/given.json", "w") as out:
    json.dump([(name, content(fd)) for name, fd in given], out)
exec(open("/run/store.py").read())
systemd.notify("READY=1")
select.select([], [], [])
"""

SERVICE = """
[Service]
Type=notify
ExecStart=/usr/local/bin/store
FileDescriptorStoreMax=700
"""


class Store:
    """A service whose program does `does` when it is started, and says what it was given."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def restart(self, does: str = "") -> list[tuple[str, str]]:
        self.machine.write("/run/store.py", does)
        self.machine.systemctl("restart", UNIT)
        given = json.loads(Path(self.machine.path("/run/given.json")).read_text())
        return sorted((name, text) for name, text in given)

    def kept(self) -> int:
        return int(self.machine.show(UNIT, "NFileDescriptorStore")["NFileDescriptorStore"])


@pytest.fixture
def store(machine: Machine) -> Iterator[Store]:
    """Give a store with nothing in it."""
    ours = Path(machine.path("/usr/local/bin/vhost-device-console")).read_text()
    program = Path(machine.path("/usr/local/bin/store"))
    program.write_text(ours.splitlines()[0] + PROGRAM)
    program.chmod(0o755)
    machine.write(f"/etc/systemd/system/{UNIT}", SERVICE)
    machine.systemctl("daemon-reload")
    yield Store(machine)
    machine.systemctl("stop", UNIT)
    Path(machine.path(f"/etc/systemd/system/{UNIT}")).unlink()
    machine.systemctl("daemon-reload")


def test_what_is_stored_comes_back_with_its_name_and_content(store: Store) -> None:
    store.restart("systemd.store('one', [file('a')]); systemd.store('two', [file('b'), file('c')])")
    assert store.restart() == [("one", "a"), ("two", "b"), ("two", "c")]


def test_it_comes_back_again_without_being_stored_again(store: Store) -> None:
    store.restart("systemd.store('one', [file('a')])")
    assert store.restart() == store.restart() == [("one", "a")]


def test_what_is_removed_does_not_come_back(store: Store) -> None:
    store.restart("systemd.store('one', [file('a')]); systemd.store('two', [file('b')])")
    store.restart("systemd.remove('one')")
    assert store.restart() == [("two", "b")]


def test_hundreds_come_back(store: Store) -> None:
    store.restart("systemd.store('many', [file(str(n)) for n in range(600)])")
    assert {text for _, text in store.restart()} == {str(n) for n in range(600)}


def test_an_open_file_is_kept_once_and_by_its_first_name(store: Store) -> None:
    store.restart("fd = file('a'); systemd.store('one', [fd]); systemd.store('two', [os.dup(fd)])")
    assert store.restart() == [("one", "a")]


def test_one_whose_other_end_hung_up_is_kept(store: Store) -> None:
    store.restart(
        "import socket; a, b = socket.socketpair(); systemd.store('end', [a.fileno()]); b.close();"
        "content = lambda fd: 'socket'"
    )
    store.machine.systemctl("daemon-reload")
    assert store.kept() == 1


def test_what_has_no_room_is_not_kept_and_harms_nothing(store: Store) -> None:
    store.restart("systemd.store('many', [file(str(n)) for n in range(705)])")
    assert len(store.restart()) == 700


def test_a_stop_empties_the_store(store: Store) -> None:
    store.restart("systemd.store('one', [file('a')])")
    store.machine.systemctl("stop", UNIT)
    assert store.kept() == 0
    assert store.restart() == []
