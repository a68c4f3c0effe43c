"""The gateways' unit, and the daemon's entries in the journal, under a real systemd."""

from __future__ import annotations

import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import asyncssh
import pytest
from pid1 import ROOT, Machine
from prometheus_client.parser import text_string_to_metric_families
from scene import boot
from service import StartService, uid
from vhost_device_console.events import Happening
from vhost_device_console.logbook import MESSAGE_IDS

from launch import WITHIN, Ports, until

UNIT = "vhost-device-console-gateway@{}.service"
METRICS = UNIT.format("metrics")
GATEWAYS = ("metrics", "ssh", "web")


@pytest.fixture
def installed(machine: Machine) -> Machine:
    """Give the machine with the unit installed as documented."""
    text = (ROOT / "docs/metrics.md").read_text().partition("\n## Under systemd\n")[2]
    found = re.search(r"```sh\n(.*?)systemctl enable", text, re.DOTALL)
    assert found
    machine.run("sh", "-ec", f"cd /opt\n{found[1]}")
    return machine


@pytest.fixture
def served(installed: Machine, ports: Ports) -> Iterator[str]:
    """Give where the unit serves metrics."""
    with started(installed, "metrics", f"--listen {(where := f'127.0.0.1:{ports()}')}"):
        yield f"http://{where}/metrics"


def documented(after: str) -> str:
    """Return the first commands of docs/web.md after these words, up to what is enabled."""
    text = (ROOT / "docs/web.md").read_text().partition(after)[2]
    return text.partition("```sh\n")[2].partition("```")[0].partition("systemctl enable")[0]


@contextmanager
def started(machine: Machine, what: str, options: str) -> Iterator[None]:
    machine.write(f"/etc/vhost-device-console/gateway-{what}.env", f"OPTIONS={options}\n")
    unit = UNIT.format(what)
    try:
        machine.systemctl("start", unit)
        yield
    finally:
        print(machine.journal(unit))
        machine.systemctl("stop", unit)


def login(where: str, **said: str) -> int:
    """Return the status that the page at `where` answers with."""
    text = json.dumps(said).encode()
    request = urllib.request.Request(f"{where}/login", text, {"Origin": where})
    try:
        with urllib.request.urlopen(request) as answer:
            status: int = answer.status
    except urllib.error.HTTPError as error:
        with error:
            status = error.code
    return status


def scrape(where: str) -> dict[tuple[str, str, str], float]:
    """Return the samples by their names and the daemon's label and the state's."""
    with urllib.request.urlopen(where) as answer:
        text = answer.read().decode()
    return {
        (sample.name, sample.labels.get("daemon", ""), sample.labels.get("state", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_instance_s_metrics_are_served_by_a_confined_process_of_their_user(
    served: str, service: StartService, machine: Machine
) -> None:
    service("web"), service("mail")
    state = "vhost_device_console_guest_state"

    def running() -> bool:
        found = scrape(served)
        return all(found.get((state, name, "running")) == 1 for name in ("web", "mail"))

    until(running, "not both instances are there")
    assert scrape(served)["vhost_device_console_daemons", "", "silent"] == 0
    pid = machine.show(METRICS, "MainPID")["MainPID"]
    with open(machine.path(f"/proc/{pid}/status")) as file:
        status = dict(line.split(":\t", 1) for line in file)
    assert {*status["Uid"].split()} == {str(uid(machine))}
    assert status["NoNewPrivs"].strip() == "1"
    assert status["Seccomp"].strip() == "2"


def test_an_instance_that_was_stopped_is_not_taken_for_a_silent_one(
    served: str, service: StartService
) -> None:
    web = service("web")
    daemons = "vhost_device_console_daemons"
    until(lambda: scrape(served)[daemons, "", "answering"] == 1, "it is not there")
    web.kill(web.pid)  # its monitor socket stays
    web.machine.wait(web.name, ActiveState="active", NRestarts="1")
    found = scrape(served)
    assert (found[daemons, "", "answering"], found[daemons, "", "silent"]) == (1, 0)


def test_the_page_is_served_to_who_has_the_token(
    installed: Machine, ports: Ports, service: StartService
) -> None:
    service("web")
    installed.run("sh", "-ec", f"cd /opt\n{documented('As a service')}")
    token = installed.run("cat", "/etc/vhost-device-console/token").stdout.strip()
    options = installed.run("cat", "/etc/vhost-device-console/gateway-web.env").stdout.strip()
    where = f"127.0.0.1:{ports()}"
    with started(installed, "web", f"{options.removeprefix('OPTIONS=')} --listen {where}"):
        with urllib.request.urlopen(f"http://{where}/") as answer:
            assert b"<title>Consoles</title>" in answer.read()
        assert login(f"http://{where}", token=token) == 200


def test_a_proxy_of_another_user_reaches_the_page(installed: Machine) -> None:
    installed.run("sh", "-ec", "getent passwd www-data || useradd --user-group www-data")
    unit = UNIT.format("web")
    try:
        installed.run("sh", "-ec", documented("The socket is for its owner"))
        proxy = ("setpriv", "--reuid=www-data", "--regid=www-data", "--clear-groups")
        installed.run(*proxy, "test", "-w", "/run/console-web/sock")
    finally:
        print(installed.journal(unit))
        installed.systemctl("stop", unit)
        installed.run("sh", "-ec", f"rm -r /etc/systemd/system/{unit}.d; systemctl daemon-reload")


def test_users_of_the_system_log_in_with_their_passwords(installed: Machine, ports: Ports) -> None:
    """By PAM, and as root: nobody else may look at others' passwords."""
    installed.run("sh", "-ec", "useradd ann; echo ann:right | chpasswd; useradd --password '' bob")
    modules = "".join(f"{what} required pam_unix.so nullok\n" for what in ("auth", "account"))
    installed.write("/etc/pam.d/consoles", modules)
    where = f"http://127.0.0.1:{(port := ports())}"
    web = f"vhost-device-console web --listen 127.0.0.1:{port} --pam consoles"
    installed.run(
        *("systemd-run", "--unit=pam", "--service-type=notify"),
        *("--setenv=RUNTIME_DIRECTORY=/run/vhost-device-console", *web.split()),
    )

    try:
        assert login(where, user="ann", password="wrong") == 401
        assert login(where, user="ann", password="right") == 200
        assert login(where, user="bob", password="") == 401
        assert login(where, user="nobody", password="right") == 401
    finally:
        print(installed.journal("pam.service"))
        installed.systemctl("stop", "pam.service")


def test_ssh_is_served(installed: Machine, ports: Ports) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    installed.write("/etc/vhost-device-console/people", key)
    port = ports()
    options = f"--listen 127.0.0.1:{port} --authorized-keys /etc/vhost-device-console/people"
    with (
        started(installed, "ssh", options),
        socket.create_connection(("127.0.0.1", port), WITHIN) as client,
    ):
        assert client.recv(100).startswith(b"SSH-2.0-vhost-device-console")


@pytest.mark.parametrize("what", GATEWAYS)
def test_systemd_finds_nothing_wrong_with_the_unit(installed: Machine, what: str) -> None:
    said = installed.run("systemd-analyze", "verify", "--man=no", UNIT.format(what))
    assert (said.stdout, said.stderr) == ("", "")


def test_systemd_rates_the_unit_as_confined(installed: Machine) -> None:
    said = installed.run("systemd-analyze", "security", "--no-pager", METRICS)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", said.stdout)
    assert found
    assert float(found[1]) <= 2.0


def test_the_journal_is_asked_by_guest_and_by_what_happened(service: StartService) -> None:
    web = service("web", "OPTIONS=--backend=unix --socket-mode=0660 --log-style=journald")
    with boot(web):
        web.until(lambda guests: guests[0]["ports"][0]["open"], "its console never opened")
    event = Happening.FRONTEND_CONNECTED

    def entries() -> list[dict[str, str]]:
        web.machine.run("journalctl", "--sync")
        which = ("GUEST=console.sock0", f"MESSAGE_ID={MESSAGE_IDS[event]}")
        said = web.machine.run("journalctl", "--quiet", "--output=json", *which)
        return [json.loads(line) for line in said.stdout.splitlines()]

    (entry,) = until(entries, "nothing is in the journal")
    assert entry["_SYSTEMD_UNIT"] == web.name
    assert entry["PRIORITY"] == "6"
    assert entry["MESSAGE"].startswith("console.sock0: frontend ")
    assert entry["SYSLOG_IDENTIFIER"] == "vhost-device-console"
