"""What `web`, `ssh` and `metrics` have in common."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch import COMMAND, WITHIN, command, environment, wait_readable

GATEWAYS = ("web", "ssh", "metrics")


@contextmanager
def serving(folder: Path, gateway: str, *options: str) -> Iterator[tuple[int, str]]:
    """Run a gateway; give its process id and what it says first."""
    if gateway == "ssh":
        (folder / "keys").touch(mode=0o600)
        options += (f"--authorized-keys={folder}/keys", f"--host-key={folder}/host")
    with subprocess.Popen(
        [*COMMAND, gateway, *options],
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        said = b""
        try:
            deadline = time.monotonic() + WITHIN
            while not re.search(rb"listening at|http://|unix:.*\n", said):
                wait_readable(process.stdout.fileno(), deadline, f"it does not serve: {said!r}")
                data = os.read(process.stdout.fileno(), 1 << 12)
                assert data, said
                said += data
            yield process.pid, said.decode()
        finally:
            process.terminate()
            assert process.wait(WITHIN) == 0


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_it_has_no_privilege_but_root_s_way_to_others_sockets(gateway: str, folder: Path) -> None:
    with serving(folder, gateway, "--listen=127.0.0.1:0") as (process, _):
        status = Path(f"/proc/{process}/status").read_text()
    has = dict(re.findall(r"^(Cap\w+|NoNewPrivs):\t(\w+)$", status, re.MULTILINE))
    assert int(has["CapEff"], 16) == int(has["CapPrm"], 16) == (2 if os.geteuid() == 0 else 0)
    assert has["NoNewPrivs"] == "1"


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_a_unix_socket_is_its_users_and_gone_at_the_end(gateway: str, folder: Path) -> None:
    path = folder / "place"
    with serving(folder, gateway, f"--listen=unix:{path}") as (_, said):
        assert f"unix:{path}" in said
        assert path.is_socket()
        assert path.stat().st_mode & 0o007 == 0
    assert not path.exists()


@pytest.mark.parametrize("gateway", ["web", "metrics"])
@pytest.mark.parametrize("where", [":0", "*:0", "0.0.0.0:0", "[::]:0"])
def test_other_machines_are_not_served_unasked(gateway: str, where: str, folder: Path) -> None:
    done = command(folder, gateway, f"--listen={where}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"vhost-device-console: error: cannot listen at {where}: ")
    assert done.stderr.count("\n") == 1
