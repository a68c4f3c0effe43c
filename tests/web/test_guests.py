"""The page in a real browser, with real guests."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from browser import Browser, Page
from uml import StartGuest
from vhost_device_console.people.web.console import WINDOW

from conftest import StartDaemon
from launch import until
from page import Web

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

PROMPT = "guest# $"

SHOW = "vdc() { clear; stty size; uname -a; free -m; ls --color=always /; }; vdc"


def open_console(page: Page, guest: int = 0) -> None:
    page.until(f"document.querySelectorAll('.card[data-state=live]').length > {guest}")
    page.click(".card .open", guest)
    page.until("document.querySelector('.pane')?.dataset.state === 'live'")


def run(page: Page, command: str, pattern: str, pane: int = 0) -> str:
    """Type a command and return what of its output, never of the command itself, matches."""
    page.type(f"{command}\n")
    return page.until_text(pattern, pane)


def size(page: Page) -> str:
    """Return the terminal's rows and columns, as stty says them."""
    return str(
        page.evaluate(
            "(({rows, cols}) => `${rows} ${cols}`)(document.querySelector('.pane').pane.terminal)"
        )
    )


def test_a_guest_is_listed_typed_to_resized_and_outlives_its_worker(
    a_kernel: Path, daemon: StartDaemon, boot: StartGuest, page: Page
) -> None:
    """What is typed is answered, `stty size` follows the window, a killed worker is not noticed."""
    served = daemon("unix", 1)
    boot(a_kernel, served.sockets[0])
    open_console(page)
    page.until_text(PROMPT)
    run(page, "echo the ans''wer is $((6 * 7))", "^the answer is 42$")
    page.until("document.querySelector('.role').textContent === 'You type'")
    run(page, "echo size: $(stty size)", f"^size: {size(page)}$")
    before = size(page)
    page.resize(900, 500)
    until(lambda: size(page) != before, "another size")
    served.until(
        lambda g: f"{g[0]['ports'][0]['rows']} {g[0]['ports'][0]['columns']}" == size(page),
        "the new size",
    )
    run(page, "clear; echo size: $(stty size)", f"^size: {size(page)}$")
    worker = served.workers()[0]
    os.kill(worker, signal.SIGKILL)
    run(page, "echo st''ill here", "^still here$")
    served.until(lambda g: g[0]["restarts"] == 1, "a restart")
    assert page.evaluate("document.querySelector('.status').textContent") == ""


def test_two_browsers_at_a_guest(
    a_kernel: Path,
    daemon: StartDaemon,
    boot: StartGuest,
    browser: Browser,
    web: Web,
    page: Page,
) -> None:
    """Both see it; the second, which watches first, takes the keyboard."""
    served = daemon("unix", 1)
    boot(a_kernel, served.sockets[0])
    open_console(page)
    page.until_text(PROMPT)
    with browser.page() as other:
        other.log_in(web.url)
        open_console(other)
        other.until_text(PROMPT)
        run(page, "echo one ty''pes", "^one types$")
        other.until_text("^one types$")
        other.click(".role")
        other.click(".role")
        other.until("document.querySelector('.role').textContent === 'You type'")
        other.until("document.activeElement.closest('.screen')")
        run(other, "echo two ty''pes", "^two types$")
        page.until_text("^two types$")


def test_the_page_answers_while_a_guest_writes_20_mib(
    a_kernel: Path, daemon: StartDaemon, boot: StartGuest, page: Page, folder: Path
) -> None:
    """On a port that takes more than 16 bytes at a time; beside it the console is typed at."""
    port = f"name=bulk,backend=unix,path={folder}/bulk,overflow=drop"
    served = daemon("unix", 1, "--port", port)
    boot(a_kernel, served.sockets[0])
    open_console(page)
    page.until_text(PROMPT)
    page.press("m", 3)
    page.press("Enter")
    page.click(".card .ports button")
    page.until("document.querySelectorAll('.pane[data-state=live]').length === 2")
    page.click(".pane .bar h2")
    lines = "yes $(printf '0123456789012345678901234567890123456789\\r')"
    page.type(f"{lines} | head -c 20971520 >/dev/virtio-ports/bulk; echo all''done\n")
    slowest, asked = 0.0, 0
    while served.status()[0]["ports"][1]["output"] < 20 << 20:
        began = time.monotonic()
        page.click(".pane .bar h2")
        page.evaluate("new Promise((done) => setTimeout(done))")
        slowest = max(slowest, time.monotonic() - began)
        asked += 1
    print(f"{asked} answers while it wrote, the slowest after {slowest:.3f} s")
    assert asked > 0
    assert slowest < 2
    assert 0 < page.evaluate("most") <= WINDOW
    page.until_text("^alldone$")
    page.until_text("^0123456789", 1)
    run(page, "echo go''es on", "^goes on$")


def test_pictures_of_the_page(
    a_kernel: Path, daemon: StartDaemon, boot: StartGuest, page: Page
) -> None:
    """The list and a desk with two guests, in the dark and in the light."""
    served = daemon("unix", 3)
    boot(a_kernel, served.sockets[0])
    boot(a_kernel, served.sockets[1])
    page.prefer("dark")
    open_console(page)
    page.until_text(PROMPT)
    run(page, SHOW, "^Linux .*")
    page.until_text(PROMPT)
    page.press("o", 3)
    page.until("document.querySelectorAll('.card[data-state=live]').length === 2")
    page.until(
        "document.querySelector('canvas').getContext('2d').getImageData(0, 0, 400, 200).data"
        ".some((part, index) => index % 4 === 0 && part > 128)"
    )
    page.until(
        "document.querySelectorAll('canvas')[1].getContext('2d').getImageData(0, 0, 400, 200).data"
        ".some((part, index) => index % 4 === 0 && part > 128)"
    )
    page.picture("web-list")
    page.click(".card .open")
    page.until_text(PROMPT)
    page.press("m", 3)
    page.press("Enter")
    page.click(".card .open", 1)
    page.until_text(PROMPT, 1)
    page.type("top -n 1\n")
    page.until_text("^Mem:.*", 1)
    page.prefer("light")
    page.picture("web-beside")
