"""Fixtures for what is shown in a browser: a Chromium for a module, daemons, guests and a page."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

# Behind the folder of launch.py.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "integration")]
sys.path.append(str(Path(__file__).parents[1] / "guests"))

import browser as chromium
import uml
from browser import Browser, Page
from uml import StartGuest

from launch import need
from page import Web


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Give a Chromium that a module's tests share; each opens pages that share nothing."""
    need(chromium.CHROMIUM, "Chromium", "apt install chromium")
    with Browser() as made:
        yield made


@pytest.fixture
def web(folder: Path) -> Iterator[Web]:
    """Give a page's server for the daemons of `folder`."""
    with Web(folder) as server:
        yield server


@pytest.fixture
def a_kernel() -> Path:
    """Give one kernel."""
    need(uml.KERNELS, "Linux guest")
    return uml.KERNELS[0]


@pytest.fixture
def boot() -> Iterator[StartGuest]:
    """Give a function that boots guests: see uml.Guest."""
    with ExitStack() as ends:
        yield lambda *arguments, **more: ends.enter_context(uml.Guest(*arguments, **more))


@pytest.fixture
def page(browser: Browser, web: Web) -> Iterator[Page]:
    """Give somebody who has logged in by the printed address; what goes wrong fails the test."""
    with browser.page() as made:
        made.log_in(web.url)
        yield made
