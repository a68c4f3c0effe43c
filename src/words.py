"""Text of others as it may be shown."""

from __future__ import annotations


def clean(text: str) -> str:
    """Return `text` with everything that could steer a terminal spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
