#!/usr/bin/env python3
"""Fuzz the targets one after another, guided by coverage (atheris, which is libFuzzer).

    fuzz.py [--seconds N] [--seed N] [TARGET...]    fuzz each for so long
    fuzz.py --again TARGET FILE...                  run these inputs once, as a test would
    fuzz.py --keep [TARGET...]                      put what was found into the corpus

What is found, inputs with coverage of their own and those that fail, goes into build/fuzz. The
corpus in the repository is what `--keep` makes of that: the smallest inputs that together reach
all that was reached. It fails when a target does; the input that did it is named.
"""

from __future__ import annotations

import argparse
import base64
import gc
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

HERE = Path(__file__).parent
FOUND = HERE.parents[1] / "build" / "fuzz"
CORPUS = HERE / "corpus"

sys.path.append(str(HERE))

import targets  # noqa: E402

#: Inputs are no longer than this; each target makes at most a few hundred steps of it.
LARGEST = 4096

#: Targets whose every input takes long: few are kept.
SLOW = ("worker",)

#: One input may take so long, on a machine that is busy with other things.
TIMEOUT_S = 30

#: And a target so much memory: what grows without end is a mistake.
MEMORY_MB = 1024

_DONE = re.compile(
    r"#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)/\S+ .*exec/s: (\d+) rss: (\d+)"
)


def corpus(name: str) -> list[bytes]:
    """Return a target's inputs: its seeds, and what the repository keeps, a line of base64 each."""
    kept = CORPUS / f"{name}.txt"
    lines = kept.read_text().split() if kept.exists() else []
    return [*targets.load(name).seeds(), *map(base64.b64decode, lines)]


def fuzz(name: str, seconds: int, seed: int) -> bool:
    """Fuzz one target in a process of its own; return whether it held."""
    folder = FOUND / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, __file__, "--one", name, str(folder)),
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={LARGEST}",
        f"-timeout={TIMEOUT_S}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-artifact_prefix={FOUND}/{name}-",
    ]
    log = FOUND / f"{name}.log"
    # Else even those targets that nothing else makes vary would find something else each time.
    same = {**os.environ, "PYTHONHASHSEED": "0"}
    with open(log, "wb") as output:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=same, check=False
        )
    said = log.read_text(errors="replace")
    done = _DONE.search(said)
    if ended.returncode or done is None:
        print(said[said.find(" === Uncaught") :][-4000:])
        print(f"{name}: FAILED, see {log}")
        return False
    runs, blocks, features, inputs, speed, memory = done.groups()
    print(
        f"{name}: {runs} inputs, {speed} a second, {blocks} places and {features} features reached "
        f"by {inputs}, {memory} MiB",
        flush=True,
    )
    return True


def one(name: str, folder: str, options: list[str]) -> None:
    """Be the process that fuzzes `name`; does not return."""
    import atheris

    with atheris.instrument_imports(include=["vhost_device_console"]):
        target = targets.load(name)
    seeds = Path(folder).with_suffix(".seeds")
    seeds.mkdir(exist_ok=True)
    for old in seeds.iterdir():
        old.unlink()
    for at, data in enumerate(corpus(name)):
        (seeds / f"{at:04}").write_bytes(data)
    gc.freeze()  # a target may collect its garbage each time, and this is none
    atheris.Setup([sys.argv[0], *options, folder, str(seeds)], target.run)
    atheris.Fuzz()


class Reached:
    """Counts which steps from line to line an input makes that none before it made (as `often`)."""

    def __init__(self, *, often: bool) -> None:
        self._often = often
        self._known: set[tuple[CodeType, int, int, int]] = set()
        self._steps: Counter[tuple[CodeType, int, int]] = Counter()

    def adds(self, name: str, data: bytes) -> int:
        before = len(self._known)
        self._steps.clear()
        sys.settrace(self._enter)
        try:
            targets.load(name).run(data)
        finally:
            sys.settrace(None)
        for step, count in self._steps.items():
            self._known.add((*step, count.bit_length() if self._often else 1))
        return len(self._known) - before

    def _enter(self, frame: FrameType, _event: str, _: object) -> Any:
        if "vhost_device_console" not in frame.f_globals.get("__name__", ""):
            return None
        code, last = frame.f_code, 0
        steps = self._steps

        def line(frame: FrameType, _event: str, _: object) -> Any:
            nonlocal last
            steps[code, last, frame.f_lineno] += 1
            last = frame.f_lineno
            return line

        return line


def keep(name: str) -> None:
    """Rewrite the corpus of one target: what reaches something that shorter inputs do not."""
    seeds = set(targets.load(name).seeds())
    found = {path.read_bytes() for path in (FOUND / name).glob("*")}
    found |= set(corpus(name))
    reached = Reached(often=name not in SLOW)
    for data in sorted(seeds, key=len):
        reached.adds(name, data)
    kept = [
        data
        for data in sorted(found - seeds, key=lambda data: (len(data), data))
        if len(data) <= LARGEST and reached.adds(name, data)
    ]
    CORPUS.mkdir(exist_ok=True)
    lines = [base64.b64encode(data).decode() for data in kept]
    (CORPUS / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    print(f"{name}: {len(kept)} of {len(found)} inputs kept, beside {len(seeds)} seeds")


def main(arguments: list[str]) -> int:
    logging.disable(logging.CRITICAL)
    if arguments[:1] == ["--one"]:
        one(arguments[1], arguments[2], arguments[3:])
    parser = argparse.ArgumentParser(description="Fuzz this project.")
    seconds = int(os.environ.get("FUZZ_SECONDS", "20"))
    parser.add_argument("--seconds", type=int, default=seconds, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="make the corpus from what was found")
    parser.add_argument("--again", metavar="TARGET", choices=targets.NAMES, help="with these files")
    parser.add_argument("what", nargs="*", help=f"targets ({' '.join(targets.NAMES)}), or files")
    given = parser.parse_args(arguments)
    if given.again:
        for path in given.what:
            targets.load(given.again).run(Path(path).read_bytes())
        return 0
    names: Iterable[str] = given.what or targets.NAMES
    for name in names:
        if name not in targets.NAMES:
            parser.error(f"there is no target {name}")
    if given.keep:
        for name in names:
            keep(name)
        return 0
    held = [fuzz(name, given.seconds, given.seed) for name in names]
    return 0 if all(held) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
