"""The page in a real browser, with guests that the tests play."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import PATIENCE, Browser, Page
from scene import boot, numbered, wait_port
from test_attached import HASTY
from vhost_device_console.people.web.console import WINDOW

from conftest import StartDaemon
from launch import Daemon, until
from page import Web

#: Ctrl and Alt, which begin what is the page's.
OURS = 3
SHIFT = 8

#: PAM knows ann, and nobody else.
WITH_PAM = """
import sys, types
from vhost_device_console import cli
pamela = types.ModuleType("pamela")
class PAMError(Exception): pass
def authenticate(user, password, service):
    if (user, password, service) != ("ann", "right", "x"):
        raise PAMError
pamela.PAMError, pamela.authenticate = PAMError, authenticate
sys.modules["pamela"] = pamela
cli.main()
"""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def served(daemon: StartDaemon) -> Daemon:
    return daemon("unix", 2, program=HASTY)


def open_console(page: Page, guest: int = 0) -> None:
    page.until(f"document.querySelectorAll('.card').length > {guest}")
    page.click(".card .open", guest)
    page.until("document.querySelector('.pane')?.dataset.state === 'live'")


def is_writer(page: Page, *, writer: bool = True) -> None:
    wanted = "You type" if writer else "You watch"
    page.until(f"document.querySelector('.role').textContent === '{wanted}'")


@contextmanager
def beside(browser: Browser, web: Web) -> Iterator[Page]:
    """Give another person's browser, with the first console open."""
    with browser.page() as other:
        other.log_in(web.url)
        open_console(other)
        yield other


def test_a_token_is_typed_and_a_wrong_one_refused(browser: Browser, web: Web) -> None:
    with browser.page() as page:
        page.go(web.origin)
        page.until("document.activeElement.id === 'secret'")
        page.type("not the token\n")
        page.until("document.querySelector('#refused').textContent === 'that is not the token'")
        assert page.evaluate("document.querySelector('#main').hidden")
        page.type(f"{web.token}\n")
        page.until("!document.querySelector('#main').hidden")


def test_users_log_in_with_their_passwords(browser: Browser, folder: Path) -> None:
    with Web(folder, "--pam", "x", program=WITH_PAM) as web, browser.page() as page:
        page.go(web.origin)
        page.until("document.activeElement.id === 'user'")
        page.type("ann")
        page.press("Tab")
        page.type("wrong\n")
        page.until("document.querySelector('#refused').textContent === 'that is not the password'")
        page.type("right\n")
        page.until("!document.querySelector('#main').hidden")


def test_who_logs_in_or_out_while_the_server_is_away_is_told(
    browser: Browser, folder: Path
) -> None:
    with browser.page() as outside, browser.page() as inside:
        with Web(folder) as web:
            outside.go(web.origin)
            outside.until("document.activeElement.id === 'secret'")
            inside.log_in(web.url)
        silence = "The server does not answer."
        outside.type("any\n")
        outside.until(f"document.querySelector('#refused').textContent === '{silence}'")
        assert silence == inside.evaluate(
            "document.querySelector('#logout').onclick()"
            ".then(() => document.querySelector('#notice').textContent)"
        )


def test_the_token_does_not_stay_in_the_address(page: Page, web: Web) -> None:
    assert web.token not in page.evaluate("location.href")


def test_logging_out_leads_back_to_the_login(served: Daemon, page: Page) -> None:
    open_console(page)
    wait_port(served, readers=1)
    page.click("#logout")
    page.until("!document.querySelector('#login').hidden && !document.querySelector('.pane')")
    wait_port(served, readers=0)


def test_the_list_shows_each_guest_its_state_and_its_screen(served: Daemon, page: Page) -> None:
    page.until("document.querySelectorAll('.card').length === 2")
    with boot(served) as console:
        page.until("document.querySelectorAll('.card')[0].dataset.state === 'live'")
        colours = (
            "new Set(new Uint32Array(document.querySelector('canvas').getContext('2d')"
            ".getImageData(0, 0, 400, 100).data.buffer)).size"
        )
        assert page.evaluate(colours) <= 1
        console.write(b"\x1b[38;2;255;0;255mmagenta!!")
        page.until(f"{colours} > 1")
        page.until("document.querySelector('.facts').textContent.includes('26 B so far')")
    page.until("document.querySelectorAll('.card')[0].dataset.state !== 'live'")


def test_history_is_shown_and_what_is_typed_reaches_the_guest(served: Daemon, page: Page) -> None:
    with boot(served) as console:
        console.write(b"what came before\r\n# ")
        open_console(page)
        page.until_text("^what came before$")
        is_writer(page)
        page.type("ls -l\n")
        assert console.read(6) == b"ls -l\r"
        console.write("ls -l\r\n\u00fcn\u00efc\u00f6d\u00e9 \u6f22\u5b57\r\n".encode())
        page.until_text("^\u00fcn\u00efc\u00f6d\u00e9 \u6f22\u5b57$")


def test_the_size_follows_the_window(served: Daemon, page: Page) -> None:
    with boot(served):
        open_console(page)
        wide = served.until(lambda g: g[0]["ports"][0]["columns"] > 0, "a size")[0]["ports"][0]
        page.resize(640, 400)
        served.until(
            lambda g: (
                0 < g[0]["ports"][0]["columns"] < wide["columns"]
                and g[0]["ports"][0]["rows"] < wide["rows"]
            ),
            "a smaller size",
        )


def test_a_console_that_is_not_seen_keeps_its_size(served: Daemon, page: Page) -> None:
    with boot(served):
        open_console(page)
        page.press("m", OURS)
        page.press("Enter")  # another is chosen
        page.until("document.querySelector('#desk').hidden")
        # What is hidden is observed in one frame, and measured in the next.
        page.evaluate(
            "new Promise((done) => { let n = 4; (function frame() {"
            " n-- ? requestAnimationFrame(frame) : done(); })(); })"
        )
        page.evaluate("document.querySelector('.pane').pane.reconnect()")
        page.until("heard.filter(({ type }) => type === 'hello').length === 2")
        sizes = page.evaluate("said.filter((m) => m.columns).map((m) => [m.columns, m.rows])")
        assert len(sizes) >= 2
        assert all(size == sizes[0] for size in sizes)


def test_of_two_browsers_one_types_until_the_other_takes_it(
    served: Daemon, browser: Browser, web: Web, page: Page
) -> None:
    with boot(served) as console:
        open_console(page)
        is_writer(page)
        with beside(browser, web) as other:
            is_writer(other, writer=False)
            console.write(b"both see this\r\n")
            page.until_text("both see this")
            other.until_text("both see this")
            other.type("x")
            other.until("document.querySelector('.note').textContent.includes('types here')")
            other.click(".role")
            other.until("document.querySelector('.role').textContent.startsWith('Take it from')")
            other.click(".role")
            is_writer(other)
            is_writer(page, writer=False)
            other.type("mine")
            assert console.read(4) == b"mine"


def test_who_watches_sees_the_screen_as_large_as_it_is(
    served: Daemon, browser: Browser, web: Web, page: Page
) -> None:
    with boot(served):
        page.resize(800, 500)
        open_console(page)
        is_writer(page)
        size = (
            "(({cols, rows}) => `${cols}x${rows}`)(document.querySelector('.pane').pane.terminal)"
        )
        with beside(browser, web) as other:
            is_writer(other, writer=False)
            before = page.evaluate(size)
            other.until(f"{size} === '{before}'")
            page.resize(700, 420)
            page.until(f"{size} !== '{before}'")
            served.until(lambda g: g[0]["ports"][0]["columns"] < 100, "the new size")
            other.until(f"{size} === '{page.evaluate(size)}'")


def test_nothing_is_missed_or_doubled_when_workers_are_killed(served: Daemon, page: Page) -> None:
    with boot(served) as console:
        open_console(page)
        is_writer(page)
        for number in range(4):
            for line in range(50):
                console.write(b"line %d\r\n" % (number * 50 + line))
            served.kill_worker()
            page.type("k")
            assert console.read(1) == b"k"
        page.until_text("^line 199$")
        lines = [line for line in page.text().splitlines() if line.startswith("line")]
        assert lines == [f"line {number}" for number in range(200)]
        assert page.evaluate("document.querySelector('.status').textContent") == ""


def test_another_daemon_is_waited_for(daemon: StartDaemon, page: Page) -> None:
    served = daemon("unix", 1)
    with boot(served) as console:
        console.write(b"the first life\r\n")
        open_console(page)
        page.until_text("the first life")
    served.close()
    page.until("document.querySelector('.status').textContent.startsWith('Waiting')")
    served = daemon("unix", 1)
    with boot(served) as console:
        console.write(b"the second life\r\n")
        page.until_text("the second life")
        assert "another daemon" in page.evaluate("document.querySelector('.note').textContent")


def test_what_was_typed_to_a_daemon_that_died_may_be_lost(daemon: StartDaemon, page: Page) -> None:
    served = daemon("unix", 1)
    open_console(page)
    is_writer(page)
    (worker,) = served.workers()
    os.kill(worker, signal.SIGSTOP)  # it takes nothing any more
    page.type("typed")
    page.until("heard.some(({ type, count }) => type === 'taken' && count === 5)")
    served.signal(signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    served.wait()
    daemon("unix", 1)
    page.until("heard.some(({ type, count }) => type === 'dropped' && count === 5)")
    assert page.evaluate("document.querySelector('.note').textContent") == (
        "5 typed bytes may not have reached the guest."
    )


def test_a_page_whose_server_began_anew_asks_to_log_in_again(
    served: Daemon, browser: Browser, folder: Path
) -> None:
    with browser.page() as page:
        with Web(folder) as web:
            page.log_in(web.url)
            open_console(page)
        page.until("!document.querySelector('.notice[role=alert]').hidden")
        port = web.host.rpartition(":")[2]
        with Web(folder, listen=f"127.0.0.1:{port}"):
            page.until("!document.querySelector('#login').hidden")
    wait_port(served, readers=0)


def test_a_page_goes_on_where_it_was_when_its_connection_is_cut(served: Daemon, page: Page) -> None:
    with boot(served) as console:
        console.write(b"before\r\n")
        open_console(page)
        page.until_text("before")
        wait_port(served, readers=1)
        page.evaluate("document.querySelector('.pane').pane.reconnect()")
        console.write(b"after\r\n")
        page.until_text("^after$")
        page.until("document.querySelector('.pane').dataset.state === 'live'")
        assert [line for line in page.text().splitlines() if line] == ["before", "after"]


HOSTILE = (
    b"\x1b]52;c;c3RvbGVu\x07"  # the clipboard
    b"\x1b]0;<script>document.title='x'</script>\x07\x1b]2;a title\x1b\\"
    b"<script>document.title='x'</script><img src=x onerror=document.title='y'>"
    b"\x1b]8;;javascript:document.title='z'\x07a link\x1b]8;;\x07"
    b"\x1b[8;500;500t\x1b[5t\x1b[2t"  # the window
    b"\r\nend of it\r\n"
)


def test_output_reaches_neither_the_clipboard_nor_the_title_nor_runs(
    served: Daemon, page: Page
) -> None:
    with boot(served) as console:
        open_console(page)
        is_writer(page)
        page.evaluate(
            "(() => { window.stolen = []; for (const name of ['writeText', 'write', 'readText'])"
            " navigator.clipboard[name] = (text) => { stolen.push(text); };"
            " document.execCommand = (text) => { stolen.push(text); }; })()"
        )
        title = page.evaluate("document.title")
        console.write(HOSTILE)
        page.until_text("end of it")
        assert page.evaluate("document.title") == title == "c.sock0 - Consoles"
        assert page.evaluate("stolen") == []
        assert page.evaluate("document.querySelectorAll('script, img').length") == 2
        assert "<script>" in page.text()


LINK = "\x1b]8;;http://localhost/\x07a link\x1b]8;;\x07 to follow"


def click_link(page: Page, terminal: str) -> None:
    """Click where a terminal's text begins, which has to be a link."""
    x, y = page.evaluate(
        f"(({{ element, cols, rows }}) => {{ const screen = element.querySelector('.xterm-screen');"
        " const b = screen.getBoundingClientRect();"
        f" return [b.x + 1.5 * b.width / cols, b.y + 0.5 * b.height / rows]; }})({terminal})"
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    page.until(f"{terminal}.element.querySelector('.xterm-cursor-pointer')")
    page.click_at(x, y)


def test_a_link_in_output_leads_nowhere(served: Daemon, page: Page) -> None:
    with boot(served) as console:
        page.evaluate(
            "(() => { window.asked = []; for (const name of ['confirm', 'open'])"
            " window[name] = (text) => { asked.push(text); }; })()"
        )
        console.write(LINK.encode())
        open_console(page)
        page.until_text("^a link to follow$")
        click_link(page, "document.querySelector('.pane').pane.terminal")
        drop(page, {"version": 3, "term": {"cols": 40, "rows": 10}}, [0, "o", LINK])
        played(page, "^a link to follow")
        click_link(page, "document.getElementById('player').player.terminal")
        assert page.evaluate("asked") == []


def test_an_address_that_makes_no_sense_is_the_list_s(served: Daemon, page: Page) -> None:
    open_console(page)
    page.evaluate("location.hash = '#%:0'")
    page.until("!document.querySelector('#overview').hidden && !document.querySelector('.pane')")
    wait_port(served, readers=0)


def test_names_are_text_and_nothing_more(daemon: StartDaemon, page: Page) -> None:
    name = "<img src=x onerror=alert(1)>"
    daemon("unix", 1, "--port", f"name={name},backend=pty")
    page.until(f"document.querySelector('.ports button')?.textContent === {json.dumps(name)}")
    page.click(".ports button")
    page.until("document.querySelector('.pane')?.dataset.state === 'live'")
    assert page.evaluate("document.querySelectorAll('img').length") == 1


QUESTIONS = b"\x1b[c\x1b[>c\x1b[6n\x1b[?6n\x1b[5n\x1b]11;?\x07\x1b[?1$p\x1bP$qm\x1b\\\x1b[18t"


def test_what_history_asked_is_not_answered_but_what_is_asked_now(
    served: Daemon, page: Page
) -> None:
    with boot(served) as console:
        console.write(QUESTIONS + b"asked\r\n")
        open_console(page)
        page.until_text("asked")
        is_writer(page)
        page.type("k")
        assert console.read(1) == b"k"
        console.write(b"\x1b[5n")
        assert console.read(4) == b"\x1b[0n"


def test_the_page_answers_while_a_guest_writes_20_mib(served: Daemon, page: Page) -> None:
    with boot(served) as console:
        open_console(page)
        is_writer(page)
        text = b"".join(b"%07d %s\r\n" % (n, b"x" * 60) for n in range(1 << 20 >> 6))
        total = 20 << 20
        writer = threading.Thread(
            target=lambda: [console.write(text, depth=16) for _ in range(total // len(text) + 1)]
        )
        writer.start()
        slowest = 0.0
        asked = 0
        try:
            while writer.is_alive():
                began = time.monotonic()
                page.evaluate("new Promise((done) => setTimeout(done))")
                page.click(".bar h2")
                slowest = max(slowest, time.monotonic() - began)
                asked += 1
        finally:
            writer.join()
        print(f"{asked} answers, the slowest after {slowest:.3f} s")
        assert asked > 0
        assert slowest < 2
        console.write(b"the end of it\r\n")
        page.until_text("the end of it")
        assert 0 < page.evaluate("most") <= WINDOW
        page.type("q")
        assert console.read(1) == b"q"


def test_keys_of_the_page_s_own_work_in_a_console(served: Daemon, page: Page) -> None:
    with boot(served) as console:
        open_console(page)
        is_writer(page)
        page.press("t", OURS)
        is_writer(page, writer=False)
        page.press("t", OURS)
        is_writer(page)
        page.press("f", OURS)
        page.until("document.activeElement.type === 'search'")
        page.press("Escape")
        page.until("document.activeElement.closest('.screen')")
        page.type("k")
        assert console.read(1) == b"k"  # and none of the others
        page.press("o", OURS)
        page.until("document.querySelector('#desk').hidden")
        page.until("document.activeElement.matches('.card .open')")
        wait_port(served, readers=0)
        page.press("h", OURS)
        page.until("document.querySelector('#shortcuts').open")


def test_the_first_thing_a_keyboard_reaches_skips_what_is_above(page: Page) -> None:
    page.until("document.activeElement.id === 'main'")  # it goes there by itself
    page.evaluate("document.querySelector('#home').focus()")
    page.press("Tab", SHIFT)
    assert page.evaluate("document.activeElement.className") == "skip"
    page.press("Enter")
    page.until("document.activeElement.id === 'main'")


def test_what_skips_to_the_consoles_closes_none(served: Daemon, page: Page) -> None:
    open_console(page)
    address = page.evaluate("location.href")
    page.evaluate("document.querySelector('.skip').focus()")
    page.press("Enter")
    page.until("document.activeElement.closest('.pane .screen')")
    assert page.evaluate("location.href") == address
    wait_port(served, readers=1)


def test_two_consoles_beside_each_other(served: Daemon, page: Page) -> None:
    with boot(served) as first, boot(served, 1) as second:
        first.write(b"the first\r\n")
        second.write(b"the second\r\n")
        open_console(page)
        page.press("m", OURS)
        page.until("document.activeElement.dataset.do === 'split'")
        page.press("Enter")
        page.until("!document.querySelector('#overview').hidden")
        page.click(".card .open", 1)
        page.until_text("the first", 0)
        page.until_text("the second", 1)
        page.until("document.querySelectorAll('.pane.writer').length === 2")
        page.until(
            "document.activeElement.closest('.pane') === document.querySelectorAll('.pane')[1]"
        )
        page.type("two")
        assert second.read(3) == b"two"
        page.press("n", OURS)
        page.type("one")
        assert first.read(3) == b"one"
        page.call("Page.reload")  # what is open stands in the address
        page.until_text("the first", 0)
        page.until_text("the second", 1)
        page.click(".pane .close", 1)
        page.until("document.querySelectorAll('.pane').length === 1")


def test_find_goes_to_what_came_before(served: Daemon, page: Page) -> None:
    with boot(served) as console:
        console.write(b"a needle\r\n" + b"hay\r\n" * 200)
        open_console(page)
        page.until_text("hay")
        page.press("f", OURS)
        page.type("needle")
        page.until("document.querySelector('.found').textContent === '1 of 1'")
        assert (
            page.evaluate("document.querySelector('.pane').pane.terminal.getSelection()")
            == "needle"
        )


def downloaded(browser: Browser, kind: str) -> bytes:
    """Return the one file of a kind that was downloaded, and remove it."""
    path = until(
        lambda: next((p for p in browser.folder.glob(f"*.{kind}")), None), f"no {kind}", PATIENCE
    )
    content: bytes = path.read_bytes()
    os.unlink(path)
    return content


def test_the_history_is_saved_as_the_guest_wrote_it(
    served: Daemon, browser: Browser, page: Page
) -> None:
    with boot(served) as console:
        console.write(b"\x1b[1mbold\x1b[0m\r\n")
        open_console(page)
        page.until_text("bold")
        page.press("m", OURS)
        page.click("[data-do=history]")
        assert downloaded(browser, "log") == b"\x1b[1mbold\x1b[0m\r\n"


def test_a_recording_has_what_came_and_when(served: Daemon, browser: Browser, page: Page) -> None:
    with boot(served) as console:
        open_console(page)
        page.press("m", OURS)
        page.click("[data-do=record]")
        page.until("document.querySelector('.pane.recording')")
        console.write("b\u00fc".encode()[:2])  # a character in two pieces
        wait_port(served, output=2)
        page.until("document.querySelector('.pane').pane.at === 2")
        console.write("\u00fc".encode()[1:] + b" end\r\n")
        page.until_text("b\u00fc end")
        page.press("m", OURS)
        page.click("[data-do=record]")
    header, *events = map(json.loads, downloaded(browser, "cast").decode().splitlines())
    assert header["version"] == 3
    assert header["term"]["cols"] > 0
    assert "".join(data for _, code, data in events if code == "o") == "b\u00fc end\r\n"
    assert all(seconds >= 0 for seconds, _, _ in events)


def test_the_history_is_saved_as_a_recording(served: Daemon, browser: Browser, page: Page) -> None:
    with boot(served) as console:
        console.write(b"before \xc3\xbc\r\n")
        open_console(page)
        page.until_text("before")
        page.press("m", OURS)
        page.click("[data-do=recording]")
        header, *events = map(json.loads, downloaded(browser, "cast").decode().splitlines())
    assert header["version"] == 3
    assert "".join(data for _, code, data in events if code == "o") == "before \u00fc\r\n"


def drop(page: Page, *lines: object) -> None:
    """Drop a file of these lines on the page."""
    text = json.dumps("\n".join(map(json.dumps, lines)))
    page.evaluate(
        f"""(() => {{
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([{text}], "it.cast"));
          dispatchEvent(new DragEvent("drop", {{ dataTransfer, cancelable: true }}));
        }})()"""
    )


def played(page: Page, pattern: str) -> None:
    page.until(
        "(() => { const b = document.getElementById('player').player.terminal.buffer.active;"
        " return new RegExp("
        + json.dumps(pattern)
        + ").test(Array.from({length: b.length}, (_, row) =>"
        " b.getLine(row).translateToString(true)).join('\\n')); })()"
    )


@pytest.mark.parametrize(
    "lines",
    [
        (
            {"version": 3, "term": {"cols": 40, "rows": 10}},
            [0.1, "o", "one\r\n"],
            [0.2, "r", "50x12"],
            [9000, "o", "two"],
        ),
        (
            {"version": 2, "width": 40, "height": 10},
            [0.1, "o", "one\r\n"],
            [0.3, "r", "50x12"],
            [9000.3, "o", "two"],
        ),
    ],
)
def test_a_recording_is_played(page: Page, lines: tuple[object, ...]) -> None:
    """As it was, and anywhere in it at once; forward and back."""
    drop(page, *lines)
    played(page, "^one\\n")
    page.until("document.getElementById('player').player.terminal.cols === 50")
    at = "document.querySelector('#player .at')"
    page.evaluate(f"({at}.value = 9001, {at}.dispatchEvent(new Event('input')))")
    played(page, "^one\\ntwo")
    page.evaluate(f"({at}.value = 0, {at}.dispatchEvent(new Event('input')))")
    played(page, "^\\n*$")
    page.until("document.getElementById('player').player.terminal.cols === 40")
    page.press("Escape")
    page.until("!document.getElementById('player').open")


def test_a_large_recording_is_played_a_piece_at_a_time(page: Page) -> None:
    """More than a terminal holds at once, and with another place chosen meanwhile."""
    page.evaluate(
        """(() => {
          const large = JSON.stringify([0.1, "o", ("x".repeat(62) + "\\r\\n").repeat(1 << 14)]);
          const header = JSON.stringify({ version: 3, term: { cols: 80, rows: 24 } });
          const lines = [header, ...Array(60).fill(large), '[1, "o", "the end of it"]'];
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([lines.join("\\n")], "large.cast"));
          dispatchEvent(new DragEvent("drop", { dataTransfer, cancelable: true }));
        })()"""
    )
    at = "document.querySelector('#player .at')"
    played(page, "^x{62}\n")
    page.click("#player .pause")
    page.evaluate(
        f"for (const place of [{at}.max, 0])"
        f" ({at}.value = place, {at}.dispatchEvent(new Event('input')))"
    )
    played(page, "^\\n*$")
    page.evaluate(f"({at}.value = {at}.max, {at}.dispatchEvent(new Event('input')))")
    played(page, "\nthe end of it")


@pytest.mark.parametrize("lines", [("no recording",), ({"version": 1},), ()])
def test_what_is_no_recording_is_said_to_be_none(page: Page, lines: tuple[object, ...]) -> None:
    drop(page, *lines)
    page.until("/^it.cast cannot be played: /.test(document.querySelector('#notice').textContent)")


def test_on_a_phone_there_are_the_keys_that_it_lacks(
    served: Daemon, browser: Browser, web: Web
) -> None:
    with browser.page() as page, boot(served) as console:
        page.resize(390, 844, phone=True)
        page.log_in(web.url)
        console.write(b"Welcome to a small screen\r\n# ")
        open_console(page)
        is_writer(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.click("#keys button", 0)
        assert console.read(1) == b"\x1b"
        page.click("#keys button", 5)
        assert console.read(3) == b"\x1b[A"
        page.click("#keys .control")
        page.type("c")
        assert console.read(1) == b"\x03"
        page.picture("web-phone")


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_page_is_as_dark_as_is_preferred_until_it_is_told(
    browser: Browser, web: Web, scheme: str
) -> None:
    dark = (
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        ".every((part) => part < 64)"
    )
    with browser.page() as page:
        page.prefer(scheme)
        page.log_in(web.url)
        assert page.evaluate(dark) is (scheme == "dark")
        page.click("#theme")
        assert page.evaluate(dark) is (scheme != "dark")
        page.call("Page.reload")
        page.until("document.readyState === 'complete'")
        page.until(f"({dark}) === {str(scheme != 'dark').lower()}")


def test_without_webgl_the_terminal_is_drawn_with_elements(served: Daemon, page: Page) -> None:
    """Which needs style sheets of its own, and the policy stands."""
    with boot(served) as console:
        console.write(b"\x1b[38;2;1;2;3mtrue colour\x1b[0m\r\n")
        open_console(page)
        page.until("document.querySelector('.xterm-rows')")
        page.until(
            "getComputedStyle([...document.querySelectorAll('.xterm-rows span')]"
            ".find((span) => span.textContent === 'true colour')).color === 'rgb(1, 2, 3)'"
        )
        page.until(
            "getComputedStyle(document.querySelector('.xterm-rows')).color !== 'rgb(0, 0, 0)'"
        )


def test_with_webgl_the_terminal_is_drawn_on_a_canvas(served: Daemon, web: Web) -> None:
    with Browser(webgl=True) as able, able.page() as page, boot(served) as console:
        page.log_in(web.url)
        console.write(b"drawn\r\n")
        open_console(page)
        page.until("document.querySelector('.xterm-screen canvas')")
        page.until_text("^drawn$")
        assert not page.evaluate("document.querySelector('.xterm-rows')")


def test_a_reader_with_a_screen_reader_is_told_the_text(served: Daemon, page: Page) -> None:
    with boot(served) as console:
        page.click("#help")
        page.click("#reader")
        page.click("#shortcuts .primary")
        open_console(page)
        console.write(b"spoken\r\n")
        page.until("document.querySelector('.xterm-accessibility')?.textContent.includes('spoken')")


def test_numbered_output_is_whole_when_it_is_long(served: Daemon, page: Page) -> None:
    """Nothing is missing, nothing comes twice."""
    with boot(served) as console:
        open_console(page)
        is_writer(page)
        console.write(numbered(1 << 16).replace(b"\n", b"\r\n"), depth=4)
        page.until_text("^%07x$" % ((1 << 16) - 8))
        lines = page.text().split()
        assert lines == numbered(1 << 16).decode().split()
