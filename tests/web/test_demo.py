"""The demo's page in a real browser, with real guests."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from browser import Browser

from launch import WITHIN, environment, wait_readable

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

DEMO = Path(__file__).parents[2] / "contrib" / "demo"


@pytest.mark.usefixtures("a_kernel")
def test_two_guests_are_on_a_page_and_nothing_stays(folder: Path, browser: Browser) -> None:
    with subprocess.Popen(
        [sys.executable, DEMO, "--web"],
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as demo:
        assert demo.stdout is not None
        family: list[psutil.Process] = []
        try:
            wait_readable(demo.stdout.fileno(), time.monotonic() + WITHIN, "it says no address")
            with browser.page() as page:
                page.log_in(demo.stdout.readline().decode().strip())
                page.until("document.querySelectorAll('.card[data-state=live]').length === 2")
            family = psutil.Process(demo.pid).children(recursive=True)
        finally:
            demo.send_signal(signal.SIGINT)
        assert demo.wait(WITHIN) == 128 + signal.SIGINT
    assert not psutil.wait_procs(family, timeout=WITHIN)[1]
