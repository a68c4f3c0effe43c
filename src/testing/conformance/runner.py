"""Trying statements on a backend, one after the other, whatever becomes of each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ...errors import ConsoleError
from .bench import Backend, Bench, GoneError
from .process import Process
from .statement import (
    GROUPS,
    STATEMENTS,
    BrokenError,
    Level,
    NotApplicableError,
    Outcome,
    SkippedError,
    Statement,
)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a statement; why, and what it was measured against, where there is more."""

    statement: Statement
    outcome: Outcome
    seen: str = ""
    expected: str = ""
    seconds: float = 0.0


def select(patterns: Iterable[str]) -> list[Statement]:
    """Return the statements whose ids match any shell pattern, all without patterns.

    Those of a group, the part of the id before the dot, are together.
    """
    wanted = list(patterns) or ["*"]
    return sorted(
        (
            statement
            for statement in STATEMENTS
            if any(fnmatchcase(statement.id, pattern) for pattern in wanted)
        ),
        key=lambda statement: GROUPS.index(statement.group),
    )


def run(
    backend: Backend, statements: Iterable[Statement], process: Process | None = None
) -> Iterator[Result]:
    """Try each statement and yield its result at once.

    A statement after which the backend is gone has failed, and so have all after it, unless
    it is started again: here, if it is that `process`, or by somebody else in time.
    """
    gone = ""
    pid = 0
    for statement in statements:
        missing = statement.missing(backend.features, backend.protocol)
        if missing:
            yield Result(statement, Outcome.NOT_OFFERED, ", ".join(missing))
        elif statement.client and backend.data is None:
            yield Result(statement, Outcome.SKIPPED, "--data does not say where a client attaches")
        elif gone:
            yield Result(statement, Outcome.FAIL, f"backend is gone: {gone}", "a backend")
        else:
            start = time.monotonic()
            outcome, seen, expected, trouble = Outcome.FAIL, "", "", ""
            try:
                pid = pid or backend.process()
                outcome, seen, expected = _try(backend, statement)
                pid, before = backend.process(), pid
                if pid != before:
                    trouble = "the backend ended, and was started again"
                elif statement.hostile:
                    _use(backend, statement)
            except GoneError as error:
                trouble = gone = str(error)
            except (ConsoleError, OSError) as error:
                trouble = f"the console does not work any more: {error}"
            if trouble and process is not None:
                trouble = process.ended() or trouble
            if trouble:
                outcome, expected = Outcome.FAIL, "the backend to be as before"
                if seen != trouble:
                    seen = f"{seen}; then {trouble}" if seen else f"afterwards {trouble}"
            yield Result(statement, outcome, seen, expected, time.monotonic() - start)
            if trouble and process is not None:
                process.start()
                gone, pid = "", 0


def _try(backend: Backend, statement: Statement) -> tuple[Outcome, str, str]:
    holds = "what the statement says"
    try:
        with Bench(backend, statement) as bench:
            statement.check(bench)
    except BrokenError as error:
        seen, holds = error.seen, error.expected
    except NotApplicableError as error:
        return Outcome.NOT_OFFERED, str(error), ""
    except SkippedError as error:
        return Outcome.SKIPPED, str(error), ""
    except TimeoutError as error:
        seen, holds = str(error), f"it within {backend.timeout:g} s"
    except ConnectionError as error:
        seen, holds = f"the backend hung up ({error})", "the connection to stay"
    except (ConsoleError, OSError) as error:
        seen = str(error)
    except Exception as error:  # what a backend did that nobody thought of
        seen = f"{type(error).__name__}: {error}"
    else:
        return Outcome.PASS, "", ""
    return (Outcome.FAIL if statement.level is Level.MUST else Outcome.WARN), seen, holds


def _use(backend: Backend, statement: Statement) -> None:
    """Write something to a console that is as new."""
    with Bench(backend, statement) as bench:
        bench.console().write(b"\r\n")
