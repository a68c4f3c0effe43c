"""Certificates for tests: who signs them, and clients that show theirs."""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path
from typing import Any

import trustme

from launch import WITHIN


class Authority:
    """Who signs certificates; `path` has its own, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.path = folder / f"ca{id(self):x}.pem"
        self.ca.cert_pem.write_to_path(str(self.path))

    def server(self, path: Path) -> Path:
        """Put a server's certificate and key into one file, in place of what is there."""
        made = self.ca.issue_cert("127.0.0.1")
        with open(f"{path}.new", "wb") as file:
            for pem in (*made.cert_chain_pems, made.private_key_pem):
                file.write(pem.bytes())
        os.rename(f"{path}.new", path)
        return path

    def client(self, **options: Any) -> trustme.LeafCert:
        """Return a certificate for a client."""
        return self.ca.issue_cert("alice@example.org", common_name="alice", **options)

    def dial(
        self, port: int, cert: trustme.LeafCert | None = None, **options: Any
    ) -> ssl.SSLSocket:
        """Return a client's connection, which only a clean farewell ends without an error."""
        context = ssl.create_default_context(cafile=str(self.path))
        for name, value in options.items():
            setattr(context, name, value)
        if cert is not None:
            cert.configure_cert(context)
        sock = socket.create_connection(("127.0.0.1", port), WITHIN)
        try:
            return context.wrap_socket(
                sock, server_hostname="127.0.0.1", suppress_ragged_eofs=False
            )
        except BaseException:
            sock.close()
            raise
