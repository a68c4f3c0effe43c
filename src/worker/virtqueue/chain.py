"""A descriptor chain: one buffer of the guest's, in one or more pieces."""

from __future__ import annotations


class Chain:
    """One buffer: `head` names it in the used ring, `spans` are its `size` bytes in order.

    Every queue of a console moves bytes one way, so all spans are readable or all are writable.
    """

    __slots__ = ("head", "size", "spans")

    def __init__(self, head: int, size: int, spans: list[memoryview]) -> None:
        self.head = head
        self.size = size
        self.spans = spans
