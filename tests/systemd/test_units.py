"""The units under a real systemd: start, stop, configuration, confinement."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
from pid1 import ROOT, Machine
from scene import attach, boot, converse
from service import Service, StartService, uid

from launch import Ports, until, wait_readable

#: With this a system call that the unit forbids ends the daemon, though it would take a refusal.
DEADLY = "SystemCallErrorNumber=kill"


def test_a_service_is_started_once_its_sockets_are_there(service: StartService) -> None:
    web = service("web")
    assert web.show("ActiveState") == "active"
    with boot(web):
        pass


def test_a_stop_ends_every_process_and_nobody_listens_any_more(service: StartService) -> None:
    web = service("web")
    with boot(web) as console, attach(web) as peer:
        converse(console, peer)
        web.systemctl("stop")
        wait_readable(peer.fileno(), 0, "the client was not hung up on")
    assert web.show("Result") == "success"
    assert web.machine.processes(uid(web.machine)) == []
    # A restart would find the files again; what is no daemon's is cleared by the next start.
    for path in (*web.sockets, *web.data):
        with socket.socket(socket.AF_UNIX) as stranger, pytest.raises(ConnectionRefusedError):
            stranger.connect(path)


def test_two_instances_run_beside_each_other_and_one_goes_on_alone(service: StartService) -> None:
    web, mail = service("web"), service("mail")
    with boot(web) as console, attach(web) as peer, boot(mail) as other, attach(mail) as friend:
        converse(console, peer)
        converse(other, friend)
        web.systemctl("stop")
        converse(other, friend)
    names = mail.machine.run("vhost-device-console", "status").stdout
    assert "/run/vhost-device-console/mail/" in names
    assert "/run/vhost-device-console/web/" not in names


def test_a_killed_master_is_replaced(service: StartService) -> None:
    web = service("web")
    before = web.pid
    web.kill(before)
    web.machine.wait(web.name, ActiveState="active", NRestarts="1")
    assert web.pid not in (0, before)
    with boot(web) as console, attach(web) as peer:
        converse(console, peer)


def test_what_cannot_be_had_is_said_once_and_not_tried_again(machine: Machine) -> None:
    with Service(machine, "web", "OPTIONS=--backend=network --tcp-port=99999") as web:
        machine.systemctl("start", web.name, check=False)
        assert (web.show("ActiveState"), web.show("NRestarts")) == ("failed", "0")
        assert web.show("ExecMainStatus") == "2"
        said = [line for line in web.log().splitlines() if "error:" in line]
        assert len(said) == 1
        assert "tcp-port must be from 1 to 65535" in said[0]


def test_the_environment_file_says_what_is_served(service: StartService, ports: Ports) -> None:
    port = ports(2)
    options = f"OPTIONS=--backend=network --tcp-port={port} --socket-count=2"
    web = service("web", options, guests=2, tcp=port)
    with boot(web, 1) as console, attach(web, 1) as peer:
        converse(console, peer)


def test_the_example_configuration_serves_its_guests(machine: Machine, ports: Ports) -> None:
    port = ports()
    example = (ROOT / "contrib/systemd/example.toml").read_text()
    machine.write("/etc/vhost-device-console/web.toml", example.replace("12345", str(port)))
    environment = "GUESTS=--config=/etc/vhost-device-console/web.toml\nOPTIONS=\n"
    with Service(machine, "web", environment, guests=2, tcp=port) as web:
        web.systemctl("start")
        with boot(web) as console, attach(web) as peer:
            converse(console, peer)
        log = Path(machine.path("/var/log/vhost-device-console/web/shop.log"))
        until(lambda: log.read_bytes() == b"to people\n", f"the log has {log.read_bytes()!r}")
    os.unlink(machine.path("/etc/vhost-device-console/web.toml"))


PLACES = {
    "terminals": "--backend=pty --pty-link=/run/vhost-device-console/web/pty",
    "sockets": "--backend=unix",
    "cpus": "--backend=unix --cpus=0",
}


@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES)
def test_nothing_that_the_daemon_asks_for_is_refused(service: StartService, options: str) -> None:
    web = service("web", f"OPTIONS={options}", DEADLY)
    with boot(web):
        web.until(lambda guests: guests[0]["ports"][0]["open"], "its console never opened")
    assert web.status()[0]["restarts"] == 0


def test_systemd_rates_the_service_as_confined(machine: Machine) -> None:
    said = machine.run("systemd-analyze", "security", "--no-pager", "vhost-device-console@web")
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", said.stdout)
    assert found
    assert float(found[1]) <= 2.0


@pytest.mark.parametrize("kind", ["service", "socket"])
def test_systemd_finds_nothing_wrong_with_the_units(machine: Machine, kind: str) -> None:
    unit = f"vhost-device-console@web.{kind}"
    said = machine.run("systemd-analyze", "verify", "--man=no", unit)
    assert (said.stdout, said.stderr) == ("", "")


def test_the_daemon_runs_as_a_user_of_its_own_without_capabilities(service: StartService) -> None:
    web = service("web")
    for pid in (web.pid, *web.workers()):
        lines = Path(web.machine.path(f"/proc/{pid}/status")).read_text().splitlines()
        status = dict(line.split(":	", 1) for line in lines)
        assert {*status["Uid"].split()} == {str(uid(web.machine))}
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"].strip() == "1"


def test_members_of_the_group_may_connect_and_nobody_else(service: StartService) -> None:
    web = service("web")

    def may_connect(group: str) -> bool:
        stranger = ("setpriv", "--reuid=54321", "--regid=54321", f"--groups={group}")
        asked = ("test", "-w", f"{web.folder}/console.sock0")
        return not web.machine.run(*stranger, *asked, check=False).returncode

    assert may_connect(str(uid(web.machine, "--group")))
    assert not may_connect("54321")


def test_a_worker_gives_up_more_than_the_unit_forbids(service: StartService) -> None:
    web = service("web")
    status = web.until(lambda guests: guests[0]["privileges"], "it never said what it may do")
    assert status[0]["privileges"]["seccomp"]
    assert status[0]["privileges"]["missing"] == []
