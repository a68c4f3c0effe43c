"""A whole mock guest: a local shell on a virtio console.

`python -m vhost_device_console.testing.guest SOCKET` connects to a backend's vhost-user socket and
runs until its shell ends. The data path is a real guest's, only the guest is not.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
from collections.abc import Sequence

from ..errors import ConsoleError
from .console import ConsoleDriver
from .conversation import connect_like_qemu, stop_like_qemu
from .memory import GuestMemory

_BANNER = b"This is the built-in mock guest: a local shell behind real virtio rings.\r\n"

#: What an interactive shell reads first: a guest ends by `poweroff -f`, here the shell just ends.
_PROFILE = b"PS1='mock-guest# '\npoweroff() { exit 0; }\nhalt() { exit 0; }\n"

_CHUNK = 4096
_MOST_INPUT = 1 << 16
_OUTPUTS = 16


class _Shell:
    """/bin/sh in a session and on a terminal of its own; `fd` is the terminal's master side."""

    def __init__(self) -> None:
        profile = os.memfd_create("profile", 0)
        os.write(profile, _PROFILE)
        environment = {**os.environ, "ENV": f"/proc/self/fd/{profile}", "TERM": "vt100"}
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                os.execve("/bin/sh", ["sh", "-i"], environment)  # noqa: S606
            finally:
                os._exit(127)
        os.close(profile)
        os.set_blocking(self.fd, False)

    def read(self) -> bytes | None:
        """Return output, b"" when there is none now, None when there will be none any more."""
        try:
            return os.read(self.fd, _CHUNK) or None
        except BlockingIOError:
            return b""
        except OSError:  # EIO: every process has closed the terminal
            return None

    def write(self, data: bytearray) -> None:
        """Type as much of `data` as the terminal takes, and remove that."""
        try:
            del data[: os.write(self.fd, data)]
        except BlockingIOError:
            pass
        except OSError:
            data.clear()

    def close(self) -> None:
        """Hang up, and wait for the shell's end."""
        os.close(self.fd)
        os.kill(self.pid, signal.SIGHUP)
        os.waitpid(self.pid, 0)


def _relay(console: ConsoleDriver, shell: _Shell) -> None:
    """Move bytes between the console and the shell until the shell has ended."""
    port = console.port
    connection = console.frontend.socket.fileno()
    typed = bytearray()
    while True:
        console.pump()
        typed += port.received
        port.received.clear()
        if typed:
            shell.write(typed)
        # A guest whose terminal is full keeps its receive buffers.
        if len(typed) >= _MOST_INPUT:
            port.throttle()
        elif not typed:
            port.unthrottle()
        room = port.in_flight < _OUTPUTS
        if room:
            output = shell.read()
            if output is None:
                port.flush()
                return
            if output:
                port.submit(output)
                continue
        if console.arm():
            continue
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)
        poll.register(shell.fd, (select.POLLIN * room) | (select.POLLOUT * bool(typed)))
        for queue in console.queues:
            if queue.call_fd is not None:
                poll.register(queue.call_fd, select.POLLIN)
        if any(fd == connection for fd, _ in poll.poll()):
            raise ConnectionError("the backend hung up")
        for queue in console.queues:
            queue.take_calls()


def run(path: str) -> None:
    """Be a guest on the backend at socket `path` until the guest's shell ends.

    Raises OSError, TimeoutError or ConsoleError when the backend cannot be reached, hangs up or
    breaks the protocol.
    """
    with GuestMemory() as memory, connect_like_qemu(path, memory) as frontend:
        console = ConsoleDriver(frontend)
        console.wait_open()
        console.write(_BANNER)
        shell = _Shell()
        try:
            _relay(console, shell)
        finally:
            shell.close()
        stop_like_qemu(frontend)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the module's command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: python -m vhost_device_console.testing.guest SOCKET", file=sys.stderr)
        return 2
    (path,) = arguments
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        run(path)
    except (ConsoleError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"mock guest on {path}: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
