"""The unix backend."""

from __future__ import annotations

import socket

from vhost_device_console.worker.backends import unix


def test_a_unix_client_types_and_reads() -> None:
    ours, user = socket.socketpair()
    with user:
        client = unix.client(ours.detach())
        user.send(b"typed")
        room = bytearray(16)
        assert client.read([memoryview(room)]) == 5
        assert client.write(b"shown") == 5
        assert user.recv(16) == b"shown"
        assert (client.name, client.stays) == ("unix client", False)
        client.close()
