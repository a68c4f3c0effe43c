"""This terminal while a command has it, and how it is given back."""

from __future__ import annotations

import os
import signal
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn


@contextmanager
def kept(when: int = termios.TCSANOW) -> Iterator[list[Any]]:
    """Give the terminal's modes, and have it get them back; one that is gone gets nothing."""
    before = termios.tcgetattr(0)
    try:
        yield before
    finally:
        with suppress(termios.error, OSError):
            termios.tcsetattr(0, when, before)


@contextmanager
def ending() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the block by SystemExit, with status 128 + N.

    So what it has changed is put back. Only the first one counts: nothing interrupts that. So does
    the terminal when it is gone, as a SIGHUP.
    """
    screen = os.isatty(1)
    status = 128 + signal.SIGHUP

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)
        nonlocal status
        status = 128 + number
        raise SystemExit(status)

    handlers = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except OSError:
        if not screen or os.isatty(1):
            raise
        # What could not be written would be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(status) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
