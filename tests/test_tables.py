"""What people see of the status."""

from __future__ import annotations

from typing import Any

import pytest
from vhost_device_console import tables
from vhost_device_console.health import Privileges
from vhost_device_console.monitor import GuestStatus, PortStatus


def port(**changed: Any) -> PortStatus:
    usual: dict[str, Any] = {
        "id": 0,
        "name": "console0",
        "endpoint": "127.0.0.1:12345",
        "console": True,
        "overflow": "drop",
        "state": "ready",
        "open": True,
        "host_open": True,
        "held": False,
        "readers": 1,
        "output": 2048,
        "input": 3,
        "missed": 0,
        "discarded": 0,
        "stalls": 0,
        "columns": 80,
        "rows": 24,
        "size_by": "127.0.0.1:40000",
    }
    return PortStatus(**{**usual, **changed})


def guest(*ports: PortStatus, **changed: Any) -> GuestStatus:
    usual: dict[str, Any] = {
        "name": "web",
        "socket": "/tmp/web",
        "state": "running",
        "daemon": 1,
        "worker": 2,
        "frontend": 3,
        "uptime": 1.5,
        "restarts": 0,
        "rss": 20 << 20,
        "cpu": 0.5,
        "sessions": 1,
        "kicks": 0,
        "calls": 0,
        "chains": 0,
        "refused": 0,
        "broken": 0,
        "ignored": 0,
        "max_ports": 1,
        "ports": list(ports) or [port()],
    }
    return GuestStatus(**{**usual, **changed})


def test_a_guest_is_a_line_without_notes_when_all_is_well() -> None:
    assert tables.guests([guest()], None) == [
        "NAME  STATE    FRONTEND  PORTS            READERS  IN  OUT   DROPPED  RSS  CPU   NOTES",
        "web   running  3         127.0.0.1:12345  1        3   2.0K  0        20M  0.5%",
    ]


def test_a_guest_s_line_sums_up_its_ports() -> None:
    ports = [port(id=n, missed=n, discarded=10 * n) for n in range(3)]
    (_, line) = tables.guests([guest(*ports)], None)
    assert line.split()[3:9] == ["127.0.0.1:12345", "+2", "3", "9", "6.0K", "33"]


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"frontend": None}, "-"),
        ({"frontend": 0}, "?"),
    ],
)
def test_a_frontend_that_is_not_known_is_a_sign(changed: dict[str, Any], shown: str) -> None:
    (_, line) = tables.guests([guest(**changed)], None)
    assert line.split()[2] == shown


def test_without_a_worker_there_is_no_load() -> None:
    (_, line) = tables.guests([guest(rss=None, cpu=None)], None)
    assert line.split()[-2:] == ["-", "-"]


@pytest.mark.parametrize(
    ("changed", "note"),
    [
        ({"broken": 1}, "1 broken queue"),
        ({"broken": 2}, "2 broken queues"),
        ({"refused": 3}, "3 refused messages"),
        ({"ignored": 4}, "4 ignored control messages"),
        ({"restarts": 5}, "5 restarts"),
        ({"restarts": 1, "died": "SIGKILL"}, "1 restart, last one died: SIGKILL"),
        ({"refused": 1, "restarts": 1}, "1 refused message, 1 restart"),
    ],
)
def test_what_is_not_well_with_a_guest_is_noted(changed: dict[str, Any], note: str) -> None:
    (_, line) = tables.guests([guest(**changed)], None)
    assert line.endswith("  " + note)


@pytest.mark.parametrize(
    ("changed", "note"), [({"state": "failed"}, "1 failed port"), ({"held": True}, "1 held buffer")]
)
def test_what_is_not_well_with_a_guest_s_port_is_noted(changed: dict[str, Any], note: str) -> None:
    (_, line) = tables.guests([guest(port(), port(**changed))], None)
    assert line.endswith("  " + note)


def test_a_port_is_a_line() -> None:
    agent = port(
        id=1, name="agent", endpoint="/run/a", state="added", columns=0, rows=0, size_by=""
    )
    assert tables.ports([guest(port(), agent)], None) == [
        "PORT   NAME      ENDPOINT         STATE  OPEN  READERS  SIZE   BY               IN  OUT"
        "   NOTES",
        "web:0  console0  127.0.0.1:12345  ready  both  1        80x24  127.0.0.1:40000  3   2.0K",
        "web:1  agent     /run/a           added  both  1        -      -                3   2.0K",
    ]


@pytest.mark.parametrize(
    ("guest_has", "host_has", "shown"),
    [(True, True, "both"), (True, False, "guest"), (False, True, "host"), (False, False, "-")],
)
def test_who_has_a_port_open_is_a_word(guest_has: bool, host_has: bool, shown: str) -> None:
    (_, line) = tables.ports([guest(port(open=guest_has, host_open=host_has))], None)
    assert line.split()[4] == shown


@pytest.mark.parametrize(
    ("changed", "note"),
    [
        ({"held": True}, "a buffer is held"),
        ({"missed": 2048}, "2.0K missed"),
        ({"discarded": 7}, "7 discarded"),
        ({"stalls": 1}, "1 stall"),
        ({"missed": 5, "stalls": 2}, "5 missed, 2 stalls"),
    ],
)
def test_what_is_not_well_with_a_port_is_noted(changed: dict[str, Any], note: str) -> None:
    (_, line) = tables.ports([guest(port(**changed))], None)
    assert line.endswith("  " + note)


LONG = guest(
    port(endpoint="/run/user/1000/machines/a-rather-long-folder/c.sock0.data", name="n" * 200),
    port(id=100, size_by="/dev/pts/" + "1" * 50),
    name="a-guest-with-quite-a-name-" + "x" * 100,
    frontend=4194304,
    rss=999 << 20,
    cpu=100.0,
)


@pytest.mark.parametrize("table", [tables.guests, tables.ports])
def test_long_names_are_cut_to_the_width_before_their_end(table: Any) -> None:
    lines = table([LONG], 100)
    assert all(len(line) <= 100 + len("  NOTES") for line in lines)
    assert "…" in lines[1]
    assert "0.data" in lines[1]


@pytest.mark.parametrize("table", [tables.guests, tables.ports])
def test_nothing_is_cut_for_programs_or_without_need(table: Any) -> None:
    assert table([LONG], None) == table([LONG], 1000)
    assert LONG.name in table([LONG], None)[1]


@pytest.mark.parametrize("table", [tables.guests, tables.ports])
def test_names_that_could_steer_a_terminal_are_spelled_out(table: Any) -> None:
    bad = "a\x1b[2J\n\x9b\u202eü"
    lines = table([guest(port(name=bad, endpoint=bad, size_by=bad), name=bad)], None)
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    assert r"a\x1b[2J\n\x9b\u202eü" in lines[1]


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0K"),
        (1536, "1.5K"),
        (20 * 1024, "20K"),
        (1 << 20, "1.0M"),
        (5 << 30, "5.0G"),
        (3 << 50, "3072T"),
    ],
)
def test_sizes_are_short(count: int, shown: str) -> None:
    assert tables.size(count) == shown


# What workers may do


def confined(**changed: Any) -> GuestStatus:
    usual: dict[str, Any] = {
        "user": "console",
        "capabilities": [],
        "no_new_privileges": True,
        "landlock": 7,
        "seccomp": True,
        "files": 16384,
        "memory": 1 << 29,
        "missing": [],
    }
    return guest(privileges=Privileges(**{**usual, **changed}))


def test_a_confined_worker_needs_no_note() -> None:
    (_, line) = tables.guests([confined()], None)
    assert line.endswith("0.5%")


@pytest.mark.parametrize(
    ("missing", "note"),
    [
        ({"landlock": 0}, "no Landlock"),
        ({"seccomp": False}, "no seccomp"),
        ({"landlock": 0, "seccomp": False}, "no Landlock, no seccomp"),
    ],
)
def test_what_does_not_confine_a_worker_is_noted(missing: dict[str, Any], note: str) -> None:
    (_, line) = tables.guests([confined(**missing)], None)
    assert line.endswith(f"  {note}")


def test_what_a_worker_may_do_is_a_line_of_its_own() -> None:
    (line,) = tables.privileges(confined(user="a\x1b[1m"))
    assert line == (
        r"web is served with: user a\x1b[1m, capabilities none, no new privileges, "
        "Landlock 7, seccomp, 16384 descriptors, 512 MiB"
    )


def test_nothing_is_said_of_a_worker_that_there_is_not() -> None:
    assert tables.privileges(guest()) == []
