"""The whole run, as the `check` command has it: try, print, write, and say how it went."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import BinaryIO

from . import report
from .bench import Backend, CannotRunError
from .process import Process
from .runner import Result, run, select
from .statement import Outcome


def address(text: str) -> tuple[str, int] | str:
    """Return what HOST:PORT or a path means. Raises CannotRunError."""
    if "/" in text:
        return text
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise CannotRunError(f"--data {text} is neither HOST:PORT nor a path with a / in it")
    return host.strip("[]"), int(port)


def check(
    path: str | None,
    *,
    version: str,
    data: str | None = None,
    start: str | None = None,
    only: Sequence[str] = (),
    timeout: float = 3.0,
    strict: bool = False,
    only_list: bool = False,
    as_json: bool = False,
    junit: str | None = None,
) -> int:
    """Check the backend at `path`, print, and return the exit status.

    `start` is the command that starts it, whenever it is not there.
    0: every MUST holds (and, if `strict`, every SHOULD), 1: not so. Raises CannotRunError when
    there is nothing to check.
    """
    statements = select(only)
    if not statements:
        raise CannotRunError(f"no statement is called {' or '.join(only)}: --list shows all")
    if only_list:
        print("\n".join(report.listing(statements)))
        return 0
    if path is None:
        raise CannotRunError("which backend? Give its vhost-user socket")
    if timeout <= 0:
        raise CannotRunError("--timeout must be more than 0 seconds")
    if start is None and not os.path.exists(path):
        raise CannotRunError(f"cannot check {path}: there is no such socket")
    client = None if data is None else address(data)
    with ExitStack() as stack:
        process = None if start is None else stack.enter_context(Process(start, path))
        file = None if junit is None else stack.enter_context(_writable(junit))
        backend = Backend.find(path, client, timeout)
        tried = run(backend, statements, process)
        results = list(tried) if as_json else _print(tried, backend)
        if as_json:
            print(json.dumps(report.as_json(backend, version, results), indent=2))
        if file is not None:
            file.write(report.as_junit(backend, results, strict=strict))
    bad = {Outcome.FAIL, Outcome.WARN} if strict else {Outcome.FAIL}
    return int(any(result.outcome in bad for result in results))


def _print(tried: Iterable[Result], backend: Backend) -> list[Result]:
    """Return all results, each printed as it comes."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n".join(report.heading(backend)), flush=True)
    results = []
    for result in tried:
        results.append(result)
        print("\n".join(report.line(result, colour=colour)), flush=True)
    print(f"\n{report.summary(results)}")
    return results


def _writable(path: str) -> BinaryIO:
    try:
        return open(path, "wb")
    except OSError as error:
        raise CannotRunError(f"cannot write {path}: {error.strerror}") from None
