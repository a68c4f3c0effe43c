"""How much is tried: little and always the same, unless VDC_EXAMPLES=n asks for n other examples.

`VDC_EXAMPLES=2000 pytest tests/properties` tries 2000 fresh random examples of each test, twice as
long each. A failure is shrunk to the fewest steps, printed as a program, and with what to add to
the test to see it again.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

_ASKED = int(os.environ.get("VDC_EXAMPLES", "0"))


def run(machine: type[RuleBasedStateMachine], *arguments: Any, examples: int, steps: int) -> None:
    """Run so many examples of `machine(*arguments)`, each of so many steps at most."""
    chosen = settings(
        max_examples=_ASKED or examples,
        stateful_step_count=2 * steps if _ASKED else steps,
        derandomize=not _ASKED,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    run_state_machine_as_test(lambda: machine(*arguments), settings=chosen)
