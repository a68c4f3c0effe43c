"""Guests of User Mode Linux, with the kernels that `contrib/guest/fetch --all` made ready."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from machine import Machine

BUILD = Path(__file__).parents[2] / "build"

KERNELS = sorted(path.parent for path in (BUILD / "guest").glob("[!.]*/boot"))

#: An archive of QEMU's guest agent, to be appended to an initramfs.
AGENT = BUILD / "guest-agent" / "initramfs"


class Guest(Machine):
    """A running guest with its console on `socket`.

    `parameters` go to the kernel; `run` is a shell command for the guest to run before its shell
    starts.
    """

    def __init__(self, kernel: Path, socket: str, *parameters: str, run: str = ":") -> None:
        self._state = tempfile.TemporaryDirectory(prefix="uml", dir="/tmp")
        super().__init__(
            [
                kernel / "boot",
                socket,
                f"uml_dir={self._state.name}/",
                *parameters,
                f"vdc.run={run}",
            ]
        )

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._state.cleanup()


#: What the fixture of conftest.py gives.
StartGuest = Callable[..., Guest]
