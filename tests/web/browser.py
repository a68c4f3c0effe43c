"""A headless Chromium, driven over its DevTools protocol.

See chromedevtools.github.io/devtools-protocol.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import ClientConnection, connect

from launch import WITHIN, wait_readable

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

#: Seconds for which a page may be busy: browsers draw on the processor here, and many share it.
PATIENCE = 3 * WITHIN

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-gpu-rasterization",  # Debian's way to start it has it enabled
    "--disable-quic",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)

#: Keeps, in the page: what it was forbidden, the messages it `said` and `heard`, and the `most`
#: bytes of output that one of its consoles had received and not yet said it has shown.
_WATCH = """
Object.assign(window, { forbidden: [], said: [], heard: [], most: 0 });
addEventListener("securitypolicyviolation", (event) =>
  forbidden.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
window.WebSocket = class extends WebSocket {
  received = 0;
  shown = 0;
  constructor(url) {
    super(url);
    this.addEventListener("message", ({ data }) => {
      if (typeof data === "string") {
        heard.push(JSON.parse(data));
      } else {
        this.received += data.byteLength - 8;
        most = Math.max(most, this.received - this.shown);
      }
    });
  }
  send(data) {
    if (typeof data === "string") {
      const message = JSON.parse(data);
      said.push(message);
      this.shown = message.type === "shown" ? message.count : this.shown;
    }
    super.send(data);
  }
};
"""

#: Finds what stands in a pane's terminal, history and all.
_TEXT = """
(index) => {
  const pane = document.querySelectorAll(".pane")[index]?.pane;
  const buffer = pane?.terminal.buffer.active;
  const lines = [];
  for (let row = 0; row < (buffer?.length ?? 0); row++) {
    const line = buffer.getLine(row);
    const text = line.translateToString(true);
    if (line.isWrapped) lines[lines.length - 1] += text; else lines.push(text);
  }
  return lines.join("\\n");
}
"""

_KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Tab": ("Tab", 9, ""),
    "Escape": ("Escape", 27, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
}


class LeftError(Exception):
    """The page that was asked is not there any more."""


class Page:
    """A tab in a browser context of its own; a context manager that checks it and closes it."""

    def __init__(self, browser: Browser, context: str, session: str) -> None:
        self._browser = browser
        self._context = context
        self._session = session
        self.call("Page.enable")
        self.call("Runtime.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=_WATCH)

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call a method of the protocol's."""
        return self._browser.call(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """Return what a JavaScript expression gives, awaited if it is a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise AssertionError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def until(self, condition: str, within: float = PATIENCE) -> Any:
        """Wait until a JavaScript expression gives something true, and return that."""
        expression = f"""
          new Promise((done) => {{
            const began = Date.now();
            const look = () => {{
              let found;
              try {{ found = {condition}; }} catch {{ found = null; }}
              if (found instanceof Node) done(true);
              else if (found || Date.now() - began > {within * 1000}) done(found);
              else setTimeout(look, 20);
            }};
            look();
          }})
        """
        while True:
            try:
                found = self.evaluate(expression)
                break
            except LeftError:  # for another page: there it goes on
                continue
        if not found:
            seen = self.evaluate("document.body.innerText + '\\n' + location")
            raise TimeoutError(f"never {condition} in {seen}, {self.text()[-500:]!r}")
        return found

    def go(self, url: str) -> None:
        """Load a page, anew."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def click(self, selector: str, index: int = 0) -> None:
        """Click the middle of an element, once it is there."""
        element = f"document.querySelectorAll({json.dumps(selector)})[{index}]"
        box = self.until(
            f"(() => {{ const e = {element}; if (!e || e.disabled) return null;"
            " e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect();"
            " return b.width && [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.click_at(*box)

    def click_at(self, x: float, y: float) -> None:
        """Click a place of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key; `modifiers` are Alt 1, Ctrl 2, Shift 8."""
        if key in _KEYS:
            name, code, text = _KEYS[key]
            fields: dict[str, Any] = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        else:
            text = key
            fields = {"key": key, "windowsVirtualKeyCode": ord(key.upper()) if key.isalnum() else 0}
            if key.isalpha():
                fields["code"] = f"Key{key.upper()}"
        if modifiers & 3:
            text = ""
        self.call(
            "Input.dispatchKeyEvent",
            type="keyDown" if text else "rawKeyDown",
            modifiers=modifiers,
            **fields,
            **({"text": text} if text else {}),
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **fields)

    def type(self, text: str) -> None:
        """Press the keys that make `text`; a newline is Enter."""
        for character in text:
            self.press("Enter" if character == "\n" else character)

    def text(self, pane: int = 0) -> str:
        """Return what stands in a pane's terminal."""
        return str(self.evaluate(f"({_TEXT})({pane})"))

    def until_text(self, pattern: str, pane: int = 0) -> str:
        """Wait until a pane's terminal has a line with `pattern`, and return what matched."""
        return str(
            self.until(
                f"new RegExp({json.dumps(pattern)}, 'm').exec(({_TEXT})({pane}))?.[0] || null"
            )
        )

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """Give the page another size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        if phone:
            self.call("Emulation.setTouchEmulationEnabled", enabled=True)

    def prefer(self, scheme: str) -> None:
        """Prefer dark or light."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def log_in(self, url: str) -> None:
        """Follow the address that the page's server has printed, to the list."""
        self.go(url)
        self.until("!document.querySelector('#main').hidden")

    def picture(self, name: str) -> None:
        """Write what the page looks like to $SCREENSHOTS/NAME.png, if that is set."""
        if folder := os.environ.get("SCREENSHOTS"):
            self.screenshot(Path(folder) / f"{name}.png")

    def screenshot(self, path: Path) -> None:
        """Write what the page looks like, as PNG."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)

    def check(self) -> None:
        """Check that nothing was forbidden, and nothing went wrong."""
        assert self.evaluate("window.forbidden") == []
        assert self._browser.wrong(self._session) == []


class Browser:
    """A Chromium with nothing remembered; a context manager that always ends it.

    `folder` is where downloads go. Without `webgl` pages draw in plainer ways, and far cheaper
    ones where a processor has to draw.
    """

    def __init__(self, *, webgl: bool = False) -> None:
        assert CHROMIUM is not None
        self._home = tempfile.TemporaryDirectory(
            prefix="chr", dir="/tmp", ignore_cleanup_errors=True
        )
        self.folder = Path(self._home.name) / "downloads"
        self.folder.mkdir()
        self.process = subprocess.Popen(
            [
                # As root, it would give itself more of the processor than anybody else.
                *("setpriv", "--inh-caps=-sys_nice", "--bounding-set=-sys_nice"),
                *(CHROMIUM, *_FLAGS, *([] if webgl else ["--disable-3d-apis"])),
                *(f"--user-data-dir={self._home.name}/user", "about:blank"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "HOME": self._home.name, "XDG_RUNTIME_DIR": self._home.name},
        )
        self._count = 0
        self._wrong: dict[str, list[str]] = {}
        self._ends = ExitStack()
        self._connection: ClientConnection | None = None
        try:
            self._connection = self._ends.enter_context(
                connect(self._address(), max_size=None, proxy=None, compression=None)
            )
        except BaseException:
            self.__exit__()
            raise
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.folder))

    def _address(self) -> str:
        assert self.process.stderr is not None
        fd = self.process.stderr.fileno()
        deadline = time.monotonic() + PATIENCE
        seen = b""
        while not (match := re.search(rb"listening on (ws://\S+)\n", seen)):
            wait_readable(fd, deadline, f"no browser: {seen!r}")
            data = os.read(fd, 4096)
            if not data:
                raise EOFError(f"no browser: {seen!r}")
            seen += data
        return match[1].decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._home.cleanup()

    def call(self, method: str, session: str | None = None, **parameters: object) -> dict[str, Any]:
        """Call a method of the protocol's, of a session or of the browser itself."""
        assert self._connection is not None
        self._count += 1
        request: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if session is not None:
            request["sessionId"] = session
        self._connection.send(json.dumps(request))
        while True:
            answer = json.loads(self._connection.recv(PATIENCE * 2))
            if answer.get("id") == self._count:
                if "error" in answer:
                    if "navigated" in answer["error"]["message"]:
                        raise LeftError
                    raise AssertionError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            if answer.get("method") == "Runtime.exceptionThrown":
                details = json.dumps(answer["params"]["exceptionDetails"])
                self._wrong.setdefault(answer["sessionId"], []).append(details)

    def wrong(self, session: str) -> list[str]:
        """Return what was thrown in a page and not caught."""
        return self._wrong.get(session, [])

    def page(self, width: int = 1280, height: int = 800) -> Page:
        """Open a tab that shares nothing with the others, as in another browser."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        self.call(
            "Browser.setDownloadBehavior",
            behavior="allow",
            downloadPath=str(self.folder),
            browserContextId=context,
        )
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)[
            "sessionId"
        ]
        page = Page(self, context, session)
        page.resize(width, height)
        return page
