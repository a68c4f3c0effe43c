"""What is in the log of a port, whatever its files are called by now."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from load import Violation, check

#: How many full files stay.
KEPT = 5


class Follower:
    """A reader of one port's log, through all its files, that checks every byte."""

    def __init__(self, name: str, path: Path, phase: int) -> None:
        self.name = name
        self.path = path
        self.phase = phase
        self.offset = 0
        self.rotations = 0
        self._file: IO[bytes] = path.open("rb", buffering=0)

    def read(self) -> None:
        """Check what there is; go on to the next file when its worker has."""
        while True:
            following = self._following()
            while data := self._file.read(1 << 18):
                check(data, self.phase, self.offset, f"log of {self.name}")
                self.offset += len(data)
            if following is None:
                return
            self._file.close()
            self._file = following
            self.rotations += 1

    def _following(self) -> IO[bytes] | None:
        """Return the file after this one, once something is in it: then this one is finished."""
        names = [self.path, *(Path(f"{self.path}.{number}") for number in range(1, KEPT + 1))]
        ours = os.fstat(self._file.fileno())
        for _ in range(100):
            with suppress(FileNotFoundError):
                newer = None
                for name in names:
                    if os.path.samestat(name.stat(), ours):
                        break
                    newer = name
                if newer is None:
                    return None
                file = newer.open("rb", buffering=0)
                # They may have changed their names meanwhile.
                if os.path.samestat(names[names.index(newer) + 1].stat(), ours):
                    if os.fstat(file.fileno()).st_size:
                        return file
                    file.close()
                    return None
                file.close()
        raise Violation(f"log of {self.name}: a file was given up before it was read")

    def close(self) -> None:
        self._file.close()
