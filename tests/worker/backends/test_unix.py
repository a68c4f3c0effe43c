"""The unix backend."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from vhost_device_console.worker.backends import unix


def test_a_unix_client_types_and_reads(folder: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "s"))
    listener.listen()
    endpoint = unix.endpoint(os.dup(listener.fileno()))
    listener.close()
    with socket.socket(socket.AF_UNIX) as user:
        user.connect(str(folder / "s"))
        client = endpoint.accept()
        assert client is not None
        user.send(b"typed")
        room = bytearray(16)
        assert client.read([memoryview(room)]) == 5
        assert client.write(b"shown") == 5
        assert user.recv(16) == b"shown"
        assert (client.name, client.stays) == ("unix client", False)
        client.close()
    endpoint.close()
