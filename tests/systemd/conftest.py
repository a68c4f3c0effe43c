"""Fixtures for a systemd that runs our units."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

# behind tests/, which has a conftest too
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "integration")]

from pid1 import ROOT, Machine, UnavailableError
from service import Service, StartService, uid


def documented(heading: str) -> str:
    """Return the first commands under a heading of docs/systemd.md."""
    text = (ROOT / "docs/systemd.md").read_text()
    found = re.search(rf"^## {heading}\n.*?```sh\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert found, f"no commands under {heading}"
    return found[1]


@pytest.fixture(scope="module")
def booted() -> Iterator[Machine]:
    """Give a module's tests a machine that systemd runs, with our units installed as documented.

    Not all tests: those of other folders must find no process of ours when they end.
    """
    try:
        machine = Machine()
    except UnavailableError as why:
        if os.environ.get("CI"):
            pytest.fail(f"no systemd to run the units with: {why}")
        pytest.skip(f"no systemd to run the units with: {why}")
    with machine:
        machine.run("sh", "-ec", f"cd /opt\n{documented('Install')}")
        yield machine


@pytest.fixture
def machine(booted: Machine) -> Iterator[Machine]:
    """Give the machine, on which nothing of ours runs; the test fails unless it is so after it."""
    yield booted
    assert booted.processes(uid(booted)) == []


@pytest.fixture
def service(machine: Machine) -> Iterator[StartService]:
    """Give a function that starts an instance: see Service."""
    with ExitStack() as ends:

        def start(*arguments: Any, **more: Any) -> Service:
            service = ends.enter_context(Service(machine, *arguments, **more))
            service.systemctl("start")
            return service

        yield start
