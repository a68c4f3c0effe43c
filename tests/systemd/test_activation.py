"""The socket unit: systemd makes the sockets, and starts the service when somebody comes."""

from __future__ import annotations

import os
import socket

from pid1 import Machine
from scene import attach, boot, converse
from service import Service

from launch import Ports


def test_a_frontend_that_connects_starts_the_service(machine: Machine) -> None:
    with Service(machine, "web") as web:
        machine.systemctl("start", web.socket_unit)
        assert web.pid == 0
        with boot(web) as console, attach(web) as peer:
            assert web.show("ActiveState") == "active"
            converse(console, peer)


def test_a_socket_of_systemds_outlives_the_service_and_starts_it_again(machine: Machine) -> None:
    with Service(machine, "web") as web:
        machine.systemctl("start", web.socket_unit)
        for _ in range(2):
            with boot(web) as console, attach(web) as peer:
                converse(console, peer)
            web.systemctl("stop")
            assert web.pid == 0


def test_a_person_who_connects_starts_the_service(machine: Machine, ports: Ports) -> None:
    port = ports()
    options = f"OPTIONS=--backend=network --tcp-port={port}"
    with Service(machine, "web", options, tcp=port) as web:
        machine.write(
            f"/etc/systemd/system/{web.socket_unit}.d/test.conf",
            f"[Socket]\nListenStream=127.0.0.1:{port}\n",
        )
        machine.systemctl("daemon-reload")
        machine.systemctl("start", web.socket_unit)
        with socket.create_connection(("127.0.0.1", port)) as peer, boot(web) as console:
            converse(console, peer)
    os.unlink(machine.path(f"/etc/systemd/system/{web.socket_unit}.d/test.conf"))


def test_a_restart_goes_on_with_systemds_sockets_and_those_connected(machine: Machine) -> None:
    with Service(machine, "web") as web:
        machine.systemctl("start", web.socket_unit)
        with boot(web) as console, attach(web) as peer:
            for _ in range(2):
                web.systemctl("restart")
                converse(console, peer)
        with boot(web) as console, attach(web) as peer:
            converse(console, peer)
        assert "is no guest's" not in web.log()
