"""Options to a description of the daemon; every mistake in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vhost_device_console.config import (
    Access,
    BackendKind,
    Daemon,
    Guest,
    Log,
    LogFormat,
    Nested,
    Network,
    Overflow,
    Port,
    PortTable,
    Pty,
    ResizeOrder,
    Tls,
    Unix,
    from_options,
    from_toml,
    parse_port,
    with_port,
    without_port,
)
from vhost_device_console.errors import ConfigError


def options(**changed: Any) -> Daemon:
    usual: dict[str, Any] = {"socket_path": "/tmp/c.sock", "fd": None}
    return from_options(**{**usual, "backend": BackendKind.NETWORK, **changed})


def ports(*texts: str, **changed: Any) -> tuple[Port, ...]:
    """Return a guest's ports, those of --port after a pty at port 0."""
    return options(backend=BackendKind.PTY, ports=texts, **changed).guests[0].ports


def one_line(error: ConfigError, line: str) -> None:
    assert line in str(error)
    assert str(error).isprintable()


def test_sockets_are_the_path_and_the_index_also_for_one() -> None:
    assert [guest.socket_path for guest in options().guests] == ["/tmp/c.sock0"]


def test_there_is_a_guest_for_each_socket() -> None:
    paths = [guest.socket_path for guest in options(socket_count=3).guests]
    assert paths == ["/tmp/c.sock0", "/tmp/c.sock1", "/tmp/c.sock2"]


def test_a_guest_is_named_after_its_socket() -> None:
    assert options(socket_count=2).guests[1].name == "c.sock1"


def test_an_inherited_socket_names_its_guest() -> None:
    (guest,) = options(socket_path=None, fd=7).guests
    assert (guest.name, guest.fd, guest.socket_path) == ("fd7", 7, None)


def test_tcp_ports_are_the_port_and_the_index_on_the_loopback() -> None:
    backends = [guest.ports[0].backend for guest in options(socket_count=2).guests]
    assert backends == [Network("127.0.0.1", 12345), Network("127.0.0.1", 12346)]


def test_the_last_port_may_be_65535() -> None:
    assert options(tcp_port=65534, socket_count=2).guests[1].ports[0].backend == Network(
        "127.0.0.1", 65535
    )


def test_a_unix_backend_lies_next_to_the_socket() -> None:
    guest = options(backend=BackendKind.UNIX, socket_count=2).guests[1]
    assert guest.ports[0].backend == Unix("/tmp/c.sock1.data")


def test_pty_links_are_numbered() -> None:
    guests = options(backend=BackendKind.PTY, pty_link="/tmp/p", socket_count=2).guests
    assert [guest.ports[0].backend for guest in guests] == [Pty("/tmp/p0"), Pty("/tmp/p1")]


def test_a_pty_needs_no_link() -> None:
    assert options(backend=BackendKind.PTY).guests[0].ports[0].backend == Pty(None)


def test_nested_is_the_terminal() -> None:
    assert options(backend=BackendKind.NESTED).guests[0].ports[0].backend == Nested()


def test_the_port_is_a_console() -> None:
    (port,) = options().guests[0].ports
    assert (port.id, port.console) == (0, True)


def test_limits_reach_the_guest() -> None:
    (guest,) = options(max_queue_size=64, poll_us=7).guests
    assert (guest.max_queue_size, guest.poll_us) == (64, 7)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"socket_path": None}, "give either --socket-path or --fd"),
        ({"fd": 3}, "give either --socket-path or --fd"),
        ({"socket_count": 0}, "--socket-count must be at least 1, not 0"),
        ({"socket_path": None, "fd": 3, "socket_count": 2}, "--fd is one socket"),
        ({"backend": BackendKind.NESTED, "socket_count": 2}, "nested backend is one terminal"),
        (
            {"backend": BackendKind.NESTED, "socket_path": None, "fd": 0},
            "--fd 0 is the terminal's place",
        ),
        ({"backend": BackendKind.UNIX, "socket_path": None, "fd": 3}, "needs --socket-path"),
        ({"pty_link": "/tmp/p"}, "--pty-link goes with --backend pty"),
        ({"max_queue_size": 0}, "power of two from 1 to 32768, not 0"),
        ({"max_queue_size": 100}, "power of two from 1 to 32768, not 100"),
        ({"max_queue_size": 65536}, "power of two from 1 to 32768, not 65536"),
        ({"cpus": ""}, "--cpus is empty: give a list of CPUs such as 2-5,8"),
        ({"user": ""}, "--user is empty: name one, or leave it out"),
        ({"cpus": "1,,2"}, "--cpus is '1,,2', not a list of CPUs such as 2-5,8"),
        ({"cpus": "1-"}, "--cpus is '1-', not a list of CPUs such as 2-5,8"),
        ({"cpus": "-1"}, "--cpus is '-1', not a list of CPUs such as 2-5,8"),
        ({"cpus": "5-2"}, "--cpus: 5-2 is no range of CPUs from 0 to 8191"),
        ({"cpus": "0-9999"}, "--cpus: 0-9999 is no range of CPUs from 0 to 8191"),
        ({"poll_us": -1}, "--poll-us must not be negative, not -1"),
        ({"tcp_port": 0}, "tcp-port must be from 1 to 65535, not 0"),
        ({"tcp_port": 1, "backend": None}, "--tcp-port goes with --backend network"),
        ({"tcp_port": 65535, "socket_count": 2}, "from 1 to 65535, not 65536"),
        ({"socket_path": "/tmp/" + "x" * 200}, "socket path is 206 bytes long"),
        ({"socket_path": "/tmp/a\0b"}, "names no file"),
        ({"socket_path": ""}, "--socket-path is empty"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_change(changed: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        options(**changed)
    one_line(raised.value, line)


def test_a_path_of_107_bytes_is_the_longest() -> None:
    path = "/tmp/" + "x" * 101
    (guest,) = options(socket_path=path).guests
    assert guest.socket_path is not None
    assert len(guest.socket_path) == 107
    with pytest.raises(ConfigError, match="108 bytes"):
        options(socket_path=path + "x")


def test_a_path_is_measured_in_bytes_not_characters() -> None:
    with pytest.raises(ConfigError, match="socket path is 126 bytes long"):
        options(socket_path="/tmp/" + "ü" * 60)


def test_a_data_socket_has_to_fit_too() -> None:
    with pytest.raises(ConfigError, match=r"109 bytes long.*\.data"):
        options(socket_path="/tmp/" + "x" * 98, backend=BackendKind.UNIX)


# --port


def test_a_port_is_generic_and_blocks_unless_it_is_said_otherwise() -> None:
    assert ports("name=agent,backend=unix,path=/tmp/a")[1] == Port(
        id=1,
        name="agent",
        backend=Unix("/tmp/a0"),
        console=False,
        overflow=Overflow.BLOCK,
    )


def test_a_console_port_drops_unless_it_is_said_otherwise() -> None:
    (_, port) = ports("name=c,backend=pty,console")
    assert (port.console, port.overflow) == (True, Overflow.DROP)


def test_everything_about_a_port_can_be_said() -> None:
    text = (
        "id=9,name=c,backend=network,host=0.0.0.0,insecure,tcp-port=7,console=true,overflow=block,"
        "output-bytes=131072,input-bytes=8192,stall-ms=0,max-clients=2"
    )
    assert ports(text)[1] == Port(
        id=9,
        name="c",
        backend=Network("0.0.0.0", 7),
        console=True,
        overflow=Overflow.BLOCK,
        output_bytes=131072,
        input_bytes=8192,
        stall_ms=0,
        max_clients=2,
    )


def test_each_guest_has_a_port_s_address_with_its_number() -> None:
    daemon = options(
        socket_count=2,
        ports=[
            "name=a,backend=network,tcp-port=2000",
            "name=b,backend=unix,path=/tmp/b",
            "name=c,backend=pty,link=/tmp/c",
        ],
    )
    backends = [port.backend for port in daemon.guests[1].ports[1:]]
    assert backends == [Network("127.0.0.1", 2001), Unix("/tmp/b1"), Pty("/tmp/c1")]


def test_a_port_without_id_gets_the_lowest_that_nobody_wants() -> None:
    given = ports(*(f"name={name},backend=pty" for name in ("a", "b,id=1", "c", "d,id=5")))
    assert [(port.id, port.name) for port in given[1:]] == [(1, "b"), (2, "a"), (3, "c"), (5, "d")]


def test_port_0_can_be_described_too() -> None:
    daemon = options(backend=None, ports=["id=0,name=g,backend=pty"])
    assert [(p.id, p.name, p.console) for p in daemon.guests[0].ports] == [(0, "g", False)]


def test_a_guest_has_room_for_its_ports_and_no_more() -> None:
    (guest,) = options(ports=["name=a,backend=pty,id=6"]).guests
    assert guest.max_ports == 7


def test_a_guest_may_have_room_for_more() -> None:
    (guest,) = options(max_ports=127).guests
    assert guest.max_ports == 127


def test_127_ports_are_possible() -> None:
    assert len(ports(*(f"name=p{n},backend=pty" for n in range(126)))) == 127


def test_how_sizes_and_notifications_go_reaches_the_guest() -> None:
    (guest,) = options(resize_order=ResizeOrder.LINUX_LEGACY, inband=True, packed=True).guests
    assert (guest.resize_order, guest.inband, guest.packed) == (
        ResizeOrder.LINUX_LEGACY,
        True,
        True,
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "--port '': '' is not key=value"),
        ("name", "--port 'name': 'name' is not key=value"),
        ("name=", "'name=' is not key=value"),
        ("=a", "'=a' is not key=value"),
        ("name=a,,backend=pty", "'' is not key=value"),
        ("name=a,name=b,backend=pty", "name is given twice"),
        ("name=a,backend=pty,console,console", "console is given twice"),
        ("name=a,backend=pty,color=red", "unknown key 'color': there are name, backend, id,"),
        ("backend=pty", "name is missing"),
        ("name=a", "backend is missing"),
        ("name=a,backend=serial", "'serial', not one of nested, network, unix, pty"),
        ("name=a,backend=pty,overflow=wait", "overflow is 'wait', not one of drop, block"),
        ("name=a,backend=pty,console=maybe", "console is 'maybe', not true or false"),
        ("name=a,backend=network,tcp-port=http", "tcp-port is 'http', not a whole number"),
        ("name=a,backend=network,tcp-port=0", "tcp-port must be from 1 to 65535, not 0"),
        ("name=a,backend=network,host=here,tcp-port=1", "host is 'here', not an IP address"),
        ("name=a,backend=network", "backend network needs tcp-port"),
        ("name=a,backend=unix", "backend unix needs path"),
        ("name=a,backend=pty,path=/tmp/a", "path does not go with backend pty"),
        ("name=a,backend=unix,path=/tmp/a,host=h", "host does not go with backend unix"),
        (
            "name=a,backend=unix,path=/tmp/" + "x" * 102,
            "path is 108 bytes long, the system's limit is 107",
        ),
        ("name=a,backend=pty,link=/tmp/a\0", "which nothing is called"),
        ("name=a,backend=pty,id=127", "id must be from 0 to 126, not 127"),
        ("name=a,backend=pty,id=-1", "id must be from 0 to 126, not -1"),
        ("name=a,backend=pty,id=0", "--backend describes port 0, and so does --port with id=0"),
        ("name=console0,backend=pty", "another port has the name console0"),
        (
            "name=a,backend=pty,output-bytes=5000",
            "a power of two from 65536 to 1073741824, not 5000",
        ),
        ("name=a,backend=pty,input-bytes=2048", "input-bytes must be a power of two from 4096"),
        ("name=a,backend=pty,output-bytes=2147483648", "output-bytes must be a power of two"),
        ("name=a,backend=pty,stall-ms=-1", "stall-ms must be from 0 to 3600000, not -1"),
        ("name=a/b,backend=pty", "'a/b' is no name: it must be printable, without '/'"),
        ("name=..,backend=pty", "'..' is no name"),
        ("name=a\nb,backend=pty", r"'a\nb' is no name"),
        ("name=a\0b,backend=pty", r"'a\x00b' is no name"),
        ("name=\x9bb,backend=pty", r"'\x9bb' is no name"),
        ("name=\udcff,backend=pty", r"'\udcff' is no name"),
        ("name=" + "ü" * 101 + ",backend=pty", "202 bytes long, the limit is 200"),
    ],
)
def test_a_mistake_in_a_port_is_one_line(text: str, line: str) -> None:
    with pytest.raises(ConfigError, match=r"^--") as raised:
        ports(text)
    one_line(raised.value, line)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"ports": ["name=a,backend=pty", "name=a,backend=pty"]}, "another port has the name a"),
        (
            {"ports": ["name=a,backend=pty,id=3", "name=b,backend=pty,id=3"]},
            "--port 'name=b,backend=pty,id=3': another port has id 3",
        ),
        (
            {"ports": [f"name=p{n},backend=pty" for n in range(127)]},
            "--port 'name=p126,backend=pty': a guest has at most 127 ports",
        ),
        (
            {"ports": ["name=a,backend=pty,id=4"], "max_ports": 4},
            "--max-ports must be from 5, for port 4, to 127, not 4",
        ),
        ({"max_ports": 0}, "--max-ports must be from 1, for port 0, to 127, not 0"),
        ({"max_ports": 128}, "--max-ports must be from 1, for port 0, to 127, not 128"),
        (
            {"ports": ["name=a,backend=network,tcp-port=12345"]},
            "127.0.0.1 port 12345 is given twice: to port 0 of c.sock0 and to port 1 of c.sock0",
        ),
        (
            {"ports": ["name=a,backend=network,tcp-port=12344"], "socket_count": 2},
            "127.0.0.1 port 12345 is given twice: to port 0 of c.sock0 and to port 1 of c.sock1",
        ),
        (
            {"ports": ["name=a,backend=unix,path=/tmp/c.sock"]},
            "/tmp/c.sock0 is given twice: to the vhost-user socket of c.sock0 and to port 1",
        ),
        (
            {"ports": ["name=a,backend=pty,link=/tmp/l", "name=b,backend=pty,link=/tmp/l"]},
            "/tmp/l0 is given twice",
        ),
        ({"ports": ["name=a,backend=network,tcp-port=65535"], "socket_count": 2}, "not 65536"),
        (
            {"ports": ["name=a,backend=nested"], "backend": BackendKind.NESTED},
            "one port of one guest can have it",
        ),
        (
            {"ports": ["name=a,backend=nested"], "socket_count": 2},
            "one port of one guest can have it",
        ),
        (
            {
                "ports": ["id=0,name=a,backend=nested"],
                "backend": None,
                "socket_path": None,
                "fd": 1,
            },
            "--fd 1 is the terminal's place",
        ),
    ],
)
def test_ports_that_do_not_go_together_are_one_line(changed: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        options(**changed)
    one_line(raised.value, line)


# Ports of a running guest


def guest(**changed: Any) -> Guest:
    return options(backend=BackendKind.PTY, max_ports=4, **changed).guests[0]


def table(text: str) -> PortTable:
    return parse_port(text, "port add")


def test_an_added_port_gets_the_lowest_free_id_and_its_address_as_it_stands() -> None:
    before = guest(ports=["name=a,backend=pty,id=2"])
    after, port = with_port(before, table("name=b,backend=unix,path=/tmp/b"))
    assert (port.id, port.backend) == (1, Unix("/tmp/b"))
    assert [each.id for each in after.ports] == [0, 1, 2]
    assert [each.id for each in before.ports] == [0, 2]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name=a,backend=pty", "port a: another port has the name a"),
        ("name=b,backend=pty,id=0", "port b: another port has id 0"),
        ("name=b,backend=pty,id=4", "port b: c.sock0 may have ports 0 to 3: start its daemon with"),
        ("name=b,backend=pty,id=127", "id must be from 0 to 126, not 127"),
        ("name=b,backend=nested", "port b: the terminal cannot become a port's"),
        ("name=b,backend=unix", "port b: backend unix needs path"),
    ],
)
def test_a_port_that_a_guest_cannot_have_is_one_line(text: str, line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        with_port(guest(ports=["name=a,backend=pty"]), table(text))
    one_line(raised.value, line)


def test_a_guest_that_is_full_has_room_for_no_more() -> None:
    full = guest(ports=[f"name=p{n},backend=pty" for n in range(3)])
    with pytest.raises(ConfigError, match="may have ports 0 to 3"):
        with_port(full, table("name=b,backend=pty"))


def test_a_removed_port_s_id_and_name_are_free_again() -> None:
    before = guest(ports=["name=a,backend=pty", "name=b,backend=pty"])
    after = without_port(before, 1)
    assert [port.id for port in after.ports] == [0, 2]
    assert with_port(after, table("name=a,backend=pty"))[1].id == 1


def test_the_terminal_s_port_cannot_be_removed() -> None:
    texts = ["id=0,name=a,backend=pty", "id=5,name=b,console,backend=nested"]
    (guest,) = options(backend=None, ports=texts).guests
    with pytest.raises(ConfigError, match="port 5 stays as long as its guest"):
        without_port(guest, 5)


def test_port_0_cannot_be_removed() -> None:
    with pytest.raises(ConfigError, match="port 0 stays as long as its guest"):
        without_port(guest(), 0)


# --config


def toml(text: str) -> Daemon:
    return from_toml(text.encode(), "f.toml")


def test_the_example_is_a_daemon() -> None:
    path = Path(__file__).parents[1] / "contrib" / "vhost-device-console.toml"
    web, build = from_toml(path.read_bytes(), path.name).guests
    assert [port.name for port in web.ports] == ["console", "org.qemu.guest_agent.0"]
    assert web.max_ports > len(web.ports)
    assert build.ports[0].console


def test_a_guest_s_table_is_a_guest_as_the_options_make_it() -> None:
    daemon = toml(
        """
        [[guest]]
        socket = "/tmp/c.sock0"
        [[guest.port]]
        name = "console0"
        backend = "network"
        tcp-port = 12345
        console = true
        """
    )
    assert daemon == options()


def test_workers_are_in_a_sandbox_unless_it_is_switched_off() -> None:
    assert options().guests[0].sandbox
    assert not options(no_sandbox=True).guests[0].sandbox
    assert [guest.sandbox for guest in toml(f"sandbox = false\n{ONE}").guests] == [False]


def test_a_daemon_has_one_user_or_whoever_starts_it() -> None:
    assert (options().user, options(user="a:b").user) == (None, "a:b")
    assert (toml(ONE).user, toml(f'user = "a"\n{ONE}').user) == (None, "a")


def test_sockets_are_the_user_s_unless_somebody_else_is_named() -> None:
    by_user = options(user="a:b").guests[0].access
    assert (by_user.owner, by_user.group) == ("a", "b")
    by_owner = options(user="a:b", socket_owner="c").guests[0].access
    assert (by_owner.owner, by_owner.group) == ("c", "b")
    (guest,) = toml(f'user = "a"\n{ONE}').guests
    assert (guest.access.owner, guest.access.group) == ("a", "")


def test_cpus_are_single_ones_and_ranges() -> None:
    (guest,) = options(cpus="8,2-5,3").guests
    assert guest.cpus == (2, 3, 4, 5, 8)


def test_no_cpus_are_chosen_by_default() -> None:
    assert options().guests[0].cpus == ()


def test_a_guest_s_own_cpus_come_before_everyone_s() -> None:
    first = ONE.replace('"/a"', '"/a"\ncpus = "1"')
    second = ONE.replace('"/a"', '"/b"')
    daemon = toml('cpus = "0,2"\n' + first + second)
    assert [guest.cpus for guest in daemon.guests] == [(1,), (0, 2)]


def test_everything_about_a_guest_can_be_said() -> None:
    daemon = toml(
        """
        [[guest]]
        name = "web"
        socket = "/run/web"
        max-queue-size = 64
        max-ports = 9
        poll-us = 0
        resize-order = "linux-legacy"
        inband = true
        packed = true
        socket-mode = "0660"
        socket-owner = "qemu"
        socket-group = "36"
        allow-uids = "qemu 0"
        [[guest.port]]
        id = 3
        name = "a"
        backend = "pty"
        link = "/tmp/l"
        overflow = "drop"
        output-bytes = 131072
        input-bytes = 8192
        stall-ms = 7
        max-clients = 1
        [[guest.port]]
        name = "c"
        console = true
        backend = "network"
        host = "::"
        tcp-port = 5
        tls-cert = "/c"
        tls-key = "/k"
        tls-client-ca = "/ca"
        [[guest.port]]
        name = "u"
        backend = "unix"
        path = "/run/u"
        socket-group = "people"
        """
    )
    access = Access(0o660, "qemu", "36", ("qemu", "0"))
    assert daemon.guests == (
        Guest(
            name="web",
            socket_path="/run/web",
            max_queue_size=64,
            max_ports=9,
            poll_us=0,
            resize_order=ResizeOrder.LINUX_LEGACY,
            inband=True,
            packed=True,
            access=access,
            ports=(
                Port(
                    id=0,
                    name="c",
                    backend=Network("::", 5, Tls("/c", "/k", "/ca")),
                    access=access,
                ),
                Port(
                    id=1,
                    name="u",
                    backend=Unix("/run/u"),
                    console=False,
                    overflow=Overflow.BLOCK,
                    access=Access(0o660, "qemu", "people", ("qemu", "0")),
                ),
                Port(
                    id=3,
                    name="a",
                    backend=Pty("/tmp/l"),
                    console=False,
                    output_bytes=131072,
                    input_bytes=8192,
                    stall_ms=7,
                    max_clients=1,
                    access=access,
                ),
            ),
        ),
    )


ONE = """
[[guest]]
socket = "/a"
[[guest.port]]
name = "c"
backend = "pty"
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "f.toml: one [[guest]] at least is needed"),
        ("guest = 5", "f.toml: one [[guest]] at least is needed"),
        ("guest = [1]", "f.toml: one [[guest]] at least is needed"),
        ("[[guest]]\nsocket =", "f.toml is not TOML: Invalid value"),
        ('color = "red"', "f.toml: unknown key 'color': there are [[guest]], cpus, tls-cert"),
        ("cpus = 2\n" + ONE, "f.toml: cpus is 2, not a text"),
        ("user = 2\n" + ONE, "f.toml: user is 2, not a text"),
        ('user = ""\n' + ONE, "f.toml: user is empty: name one, or leave it out"),
        ("sandbox = 2\n" + ONE, "f.toml: sandbox is 2, not true or false"),
        ('cpus = "x"\n' + ONE, "f.toml: cpus is 'x', not a list of CPUs"),
        (ONE.replace('"/a"', '"/a"\ncpus = "x"'), "guest 1: cpus is 'x', not a list of CPUs"),
        ("[[guest]]", "f.toml: guest 1: one [[guest.port]] at least is needed"),
        (ONE.replace('socket = "/a"', ""), "f.toml: guest 1: socket is missing"),
        (ONE.replace('"/a"', "5"), "f.toml: guest 1: socket is 5, not a text"),
        (ONE.replace('"/a"', '"/"'), "f.toml: guest 1: socket names no file"),
        (ONE + "color = 1", "f.toml: guest 1: port 1: unknown key 'color': there are name,"),
        (ONE + "tcp_port = 1", "f.toml: guest 1: port 1: unknown key 'tcp_port'"),
        (ONE + "id = true", "f.toml: guest 1: port 1: id is True, not a whole number"),
        (ONE + "id = '0'", "f.toml: guest 1: port 1: id is '0', not a whole number"),
        (ONE + "id = 1", "f.toml: guest 1: port 0 is missing: every guest has it"),
        (ONE + "console = 1", "f.toml: guest 1: port 1: console is 1, not true or false"),
        (ONE + "stall-ms = 1.5", "f.toml: guest 1: port 1: stall-ms is 1.5, not a whole number"),
        (ONE + "output-bytes = 1000000", "port 1: output-bytes must be a power of two"),
        (ONE + 'overflow = "wait"', "overflow is 'wait', not one of drop, block"),
        (ONE + 'link = "a\\u0000"', r"link is 'a\x00', which nothing is called"),
        (ONE + ONE, "f.toml: guest 2: another guest has the name a"),
        (ONE + ONE.replace('"/a"', '"/a"\nname = "b"'), "/a is given twice: to the vhost-user"),
        (ONE + ONE.replace('"/a"', '"/b"\ncolor = 1'), "guest 2: unknown key 'color': there are"),
        (ONE.replace('"/a"', '"/a"\nname = "a/b"'), "guest 1: 'a/b' is no name"),
        (ONE.replace('"/a"', '"/a"\nmax-ports = 0'), "guest 1: max-ports must be from 1"),
        (ONE.replace('"/a"', '"/a"\nmax-queue-size = 3'), "guest 1: max-queue-size must be a"),
        (ONE.replace('"/a"', '"/a"\npoll-us = -1'), "guest 1: poll-us must not be negative"),
        (ONE.replace('"/a"', '"/a"\nresize-order = "x"'), "not one of spec, linux-legacy"),
        (ONE.replace('"/a"', '"/a"\ninband = "yes"'), "inband is 'yes', not true or false"),
        (ONE.replace('"pty"', '"nested"') + ONE.replace("/a", "/b"), "one port of one guest"),
        (ONE + '[[guest.port]]\nname = "c"\nbackend = "pty"', "port 2: another port has the name"),
        ("tls-cert = 5\n" + ONE, "f.toml: tls-cert is 5, not a text"),
        ('tls-cert = ""\n' + ONE, "f.toml: tls-cert is empty"),
        ('tls-key = "k"\n' + ONE, "f.toml: tls-key needs tls-cert"),
        (ONE.replace('"/a"', '"/a"\nsocket-mode = "rw"'), "guest 1: socket-mode is 'rw', not an"),
        (ONE.replace('"/a"', '"/a"\nallow-uids = " "'), "guest 1: allow-uids is empty: name some"),
        (ONE.replace('"/a"', '"/a"\nallow-uids = 5'), "guest 1: allow-uids is 5, not a text"),
        (ONE + "max-clients = 257", "port 1: max-clients must be from 1 to 256, not 257"),
        (ONE + 'tls-cert = "c"', "port 1: tls-cert does not go with backend pty"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_its_table(text: str, line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        toml(text)
    one_line(raised.value, line)


def test_a_file_of_nothing_but_brackets_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"f\.toml is not TOML: ") as raised:
        toml("a = " + "[" * 5000)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_text_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"f\.toml is not TOML: ") as raised:
        from_toml(b"\xff", "f.toml")
    one_line(raised.value, "utf-8")


# Who is let in


def network_of(daemon: Daemon, port: int = 0) -> Network:
    backend = daemon.guests[0].ports[port].backend
    assert isinstance(backend, Network)
    return backend


def test_sockets_are_their_owner_s_alone_unless_options_say_otherwise() -> None:
    assert options().guests[0].access == Access(0o600, "", "", ())


def test_access_options_hold_for_the_guest_s_socket_and_its_ports() -> None:
    (guest,) = options(
        backend=BackendKind.UNIX,
        ports=["name=a,backend=unix,path=/a,socket-mode=666,allow-uids=me 5"],
        socket_mode="0660",
        socket_owner="qemu",
        socket_group="36",
        allow_uid=("0", "you"),
    ).guests
    everyones = Access(0o660, "qemu", "36", ("0", "you"))
    assert (guest.access, guest.ports[0].access) == (everyones, everyones)
    assert guest.ports[1].access == Access(0o666, "qemu", "36", ("me", "5"))


@pytest.mark.parametrize(
    "mode", ["", "9", "u+rw", "1777", "-1", "0o660", "\N{ARABIC-INDIC DIGIT SIX}"]
)
def test_a_mode_that_is_none_is_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match=r"--socket-mode is .+, not an octal number"):
        options(socket_mode=mode)


def test_other_machines_are_let_in_by_tls_or_on_demand_only() -> None:
    with pytest.raises(ConfigError) as raised:
        options(tcp_host="0.0.0.0")
    one_line(raised.value, "--backend network: at 0.0.0.0 other machines could read and type: give")
    assert network_of(options(tcp_host="0.0.0.0", tcp_insecure=True)).tls is None
    assert network_of(options(tcp_host="0.0.0.0", tls_cert="c")).tls == Tls("c", "c")


@pytest.mark.parametrize("host", ["127.0.0.9", "::1"])
def test_the_loopback_needs_no_tls(host: str) -> None:
    assert network_of(options(tcp_host=host)) == Network(host, 12345)


@pytest.mark.parametrize("host", ["::", "192.0.2.1", "fe80::1%eth0", "::ffff:192.0.2.1"])
def test_a_port_added_later_is_no_way_around_it(host: str) -> None:
    with pytest.raises(ConfigError, match=f"port b: at {host} other machines could read and type"):
        with_port(guest(), table(f"name=b,backend=network,tcp-port=5,host={host}"))


def test_a_port_has_the_daemon_s_tls_unless_it_says_otherwise() -> None:
    daemon = options(
        tls_cert="c",
        tls_key="k",
        tls_client_ca="ca",
        ports=[
            "name=a,backend=network,tcp-port=1",
            "name=b,backend=network,tcp-port=2,tls-cert=other",
            "name=c,backend=network,tcp-port=3,insecure",
        ],
    )
    found = [network_of(daemon, port).tls for port in range(4)]
    assert found == [Tls("c", "k", "ca"), Tls("c", "k", "ca"), Tls("other", "other"), None]


def test_a_port_added_later_has_the_daemon_s_tls() -> None:
    (before,) = options(tls_cert="c", max_ports=2).guests
    _, port = with_port(before, table("name=b,backend=network,tcp-port=5"))
    assert port.backend == Network("127.0.0.1", 5, Tls("c", "c"))


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"tls_cert": "c", "tcp_insecure": True}, "--tcp-insecure means without TLS"),
        ({"tls_client_ca": "c"}, "--tls-client-ca needs tls-cert"),
        ({"tls_cert": "c", "tls_key": ""}, "--tls-key is empty: give a file, or leave it out"),
        ({"allow_uid": ("",)}, "--allow-uid is empty: name somebody"),
        ({"socket_group": ""}, "--socket-group is empty: name somebody"),
        ({"backend": BackendKind.PTY, "tcp_host": "::1"}, "--tcp-host goes with --backend network"),
        ({"tcp_host": "localhost"}, "host is 'localhost', not an IP address"),
        ({"max_clients": 0}, "max-clients must be from 1 to 256, not 0"),
        (
            {"ports": ["name=a,backend=network,tcp-port=1,insecure,tls-cert=c"]},
            "insecure means without TLS: leave out one of the two",
        ),
        (
            {"ports": ["name=a,backend=unix,path=/a,insecure"]},
            "insecure does not go with backend unix",
        ),
    ],
)
def test_access_that_makes_no_sense_is_one_line(changed: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        options(**changed)
    one_line(raised.value, line)


def test_a_port_s_limit_of_clients_is_the_daemon_s_unless_it_has_its_own() -> None:
    (guest,) = options(max_clients=3, ports=["name=a,backend=pty,max-clients=5"]).guests
    assert [port.max_clients for port in guest.ports] == [3, 5]


# Logs


def test_each_guest_s_console_has_a_log_with_its_number() -> None:
    guests = options(log_file="/l/c.", socket_count=2).guests
    assert [guest.ports[0].log for guest in guests] == [Log("/l/c.0"), Log("/l/c.1")]


def test_a_port_has_no_log_unless_there_is_one_for_it() -> None:
    assert [port.log for port in ports("name=a,backend=pty")] == [None, None]


def test_everything_about_a_log_can_be_said() -> None:
    (port,) = options(log_file="/l", log_max_bytes=4096, log_keep=0).guests[0].ports
    assert port.log == Log("/l0", 4096, 0)
    port = ports("name=a,backend=pty,log=/l,log-max-bytes=5000,log-keep=99")[1]
    assert port.log == Log("/l0", 5000, 99)
    kept = Log("/l0", 5000, 99, LogFormat.JSON, 43200, True, 10000, False)
    (port,) = (
        options(
            log_file="/l",
            log_max_bytes=5000,
            log_format=LogFormat.JSON,
            log_max_age="12h",
            log_compress=True,
            log_total_bytes=10000,
            log_times=False,
        )
        .guests[0]
        .ports
    )
    assert port.log == kept
    text = (
        "name=a,backend=pty,log=/l,log-max-bytes=5000,log-format=json,log-max-age=12h,log-compress,"
        "log-total-bytes=10000,log-times=false"
    )
    assert ports(text)[1].log == kept
    text = ONE + 'log = "/l"\nlog-max-age = "1d"\nlog-compress = true\nlog-times = false'
    assert from_toml(text.encode(), "f.toml").guests[0].ports[0].log == Log(
        "/l", max_age=86400, compress=True, times=False
    )
    text = ONE + 'log = "/l"\nlog-max-bytes = 5000\nlog-keep = 2'
    assert from_toml(text.encode(), "f.toml").guests[0].ports[0].log == Log("/l", 5000, 2)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"log_file": ""}, "--log-file is empty"),
        ({"log_file": "a\0"}, "log names no file: 'a\\x000'"),
        ({"log_max_bytes": 4096}, "--log-max-bytes goes with --log-file"),
        ({"log_keep": 0}, "--log-keep goes with --log-file"),
        ({"log_file": "/l", "log_max_bytes": 4095}, "must be 0 or at least 4096, not 4095"),
        ({"log_file": "/l", "log_max_bytes": -1}, "must be 0 or at least 4096, not -1"),
        ({"log_file": "/l", "log_keep": 100}, "log-keep must be from 0 to 99, not 100"),
        ({"log_file": "/l", "log_keep": -1}, "log-keep must be from 0 to 99, not -1"),
        ({"log_compress": True}, "--log-compress goes with --log-file"),
        (
            {"log_file": "/l", "log_max_age": "soon"},
            "log-max-age is 'soon', not a time such as 30m, 12h or 1d",
        ),
        (
            {"log_file": "/l", "log_max_age": "400d"},
            "log-max-age must be from 1s to 366d, not 400d",
        ),
        (
            {"log_file": "/l", "log_total_bytes": 9999, "log_max_bytes": 5000},
            "log-total-bytes needs log-max-bytes of at most half as much",
        ),
        (
            {"log_file": "/l", "log_total_bytes": 9999},
            "log-total-bytes needs log-max-bytes of at most half as much",
        ),
        (
            {"log_file": "/l", "ports": ["name=a,backend=unix,path=/l0.times"]},
            None,
        ),
        (
            {"socket_path": "/l0.times", "log_file": "/l"},
            None,
        ),
        (
            {"ports": ["name=a,backend=pty,id=0"], "backend": None, "typing": "none"},
            "--typing is port 0's, which --port with id=0 describes: say typing= there",
        ),
        (
            {"ports": ["name=a,backend=pty,id=0"], "backend": None, "log_file": "/l"},
            "--log-file is port 0's, which --port with id=0 describes: say log= there",
        ),
        (
            {"ports": ["name=a,backend=pty,log-keep=1"]},
            "--port 'name=a,backend=pty,log-keep=1': log-keep goes with log",
        ),
        (
            {"log_file": "/l", "ports": ["name=a,backend=pty,log=/l"]},
            "/l0 is given twice: to the log of port 0 of c.sock0 and to the log of port 1",
        ),
        (
            {"log_file": "/l", "log_max_bytes": 4096, "ports": ["name=a,backend=pty,log=/l0."]},
            None,
        ),
        (
            {"log_file": "/l", "log_max_bytes": 4096, "ports": ["name=a,backend=unix,path=/l0.1"]},
            None,
        ),
        (
            {"socket_path": "/l0.", "log_file": "/l", "log_max_bytes": 4096, "socket_count": 2},
            "/l0.1 is given twice: to another log of port 0 of l0.0 and to the vhost-user",
        ),
    ],
)
def test_a_log_that_cannot_be_is_one_line(changed: dict[str, Any], line: str | None) -> None:
    if line is None:  # names alike, but not the same
        options(**changed)
        return
    with pytest.raises(ConfigError) as caught:
        options(**changed)
    one_line(caught.value, line)
