"""How much is tried: little and always the same, unless VDC_EXAMPLES=n asks for n other examples.

`VDC_EXAMPLES=2000 pytest --timeout 0 tests/properties` tries 2000 fresh random examples of each
test, twice as long each. A failure is shrunk to the fewest steps, printed as a program, and with
what to add to the test to see it again.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import StopTest
from hypothesis.internal.conjecture import providers
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

_ASKED = int(os.environ.get("VDC_EXAMPLES", "0"))


class Machine(RuleBasedStateMachine):
    """A machine that gives back what it has even while a failure's traceback is kept."""

    def teardown(self) -> None:
        try:
            error = sys.exc_info()[1]
            if error is None or isinstance(error, StopTest):  # an example may be cut short
                self.finish()
        finally:
            traceback.clear_frames(sys.exc_info()[2])
            self.close()

    def finish(self) -> None:
        """Check what must be true at the end, unless something was found before."""

    def close(self) -> None:
        """Give everything back; `initialize` may not have been run."""


def run(machine: type[Machine], *arguments: Any, examples: int, steps: int) -> None:
    """Run so many examples of `machine(*arguments)`, each of so many steps at most."""
    chosen = settings(
        max_examples=_ASKED or examples,
        stateful_step_count=2 * steps if _ASKED else steps,
        derandomize=not _ASKED,
        database=None,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    # Hypothesis tries numbers that it finds in the modules loaded, and keeps them in files: which
    # examples there are would depend on the tests that ran before.
    none = getattr(providers, "Constants", None)
    with mock.patch.object(providers, "_get_local_constants", none, create=True):
        run_state_machine_as_test(lambda: machine(*arguments), settings=chosen)
