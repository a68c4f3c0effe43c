"""An input of bytes, read as the numbers and choices that a target makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Source:
    """Reads `data` from its front; true while there is more. Past the end everything is zero."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes, fewer at the end."""
        data = self._data[self._at : self._at + count]
        self._at += count
        return data

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(len(self._data))

    def number(self, size: int) -> int:
        """Return the next `size` bytes as a number without a sign, the lowest first."""
        return int.from_bytes(self.take(size), "little")

    def peek(self) -> int | None:
        """Return the next byte and leave it there, None at the end."""
        return self._data[self._at] if self else None

    def byte(self) -> int:
        return self.number(1)

    def pick(self, choices: Sequence[T]) -> T:
        """Choose one by the next byte."""
        return choices[self.byte() % len(choices)]
