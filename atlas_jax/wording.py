"""Wording of messages: long lists are shortened. Imports nothing of the package."""

from __future__ import annotations

from collections.abc import Sequence


def shorten(items: Sequence[str], count: int) -> list[str]:
    """Returns the first `count` texts of a list, then the number of the others: "and 3 more"."""
    rest = len(items) - count
    return [*items[:count], *([f"and {rest} more"] if rest > 0 else [])]
