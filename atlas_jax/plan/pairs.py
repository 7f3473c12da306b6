"""Pairs of query and key in causal attention: those that rows need, and those that kernels compute.

Counts are those of one head and one row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class RowContent(NamedTuple):
    """Content of a full row that a plan assumes."""

    segments: tuple[int, ...]
    """Tokens of each text; texts do not see each other."""
    prompt: int = 0
    """Tokens of a prompt that stands before the texts and that all of them see."""

    @property
    def parts(self) -> tuple[int, ...]:
        """Tokens of everything that stands in the row, in order."""
        return (self.prompt, *self.segments) if self.prompt else self.segments


class AttentionCall(NamedTuple):
    """One call of an attention kernel on a device."""

    kind: str
    """Name of its rate in a file of rates, such as `attention_forward`."""
    rows: int
    heads: int
    queries: int
    """Length of a row of queries."""
    keys: int
    """Length of a row of keys."""
    head_dim: int
    num_products: int
    """Matrix products of queries x keys x head size that the kernel computes for a head."""
    causal: bool
    """False if every query sees all keys of the prompt, as completions see a shared one."""
    packed: bool
    """True if the kernel knows where segments begin and computes nothing between them."""
    window: int = 0
    """Positions that a query sees, its own included; 0 for all before it."""
    block: int = 1
    """Side of the square blocks in which the kernel computes."""


def even(length: int, segments: int) -> RowContent:
    """Returns a full row of so many texts of equal length."""
    bounds = np.linspace(0, length, segments + 1).astype(int)
    return RowContent(tuple(int(n) for n in np.diff(bounds)))


def causal(length: int, window: int = 0, block: int = 1) -> float:
    """Returns the pairs of a causal text, in whole blocks of `block x block`.

    A block of queries meets the blocks of keys from the first position of its window to its own.
    """
    first = np.arange(0, length, block)
    oldest = np.maximum(first - (window or length) + 1, 0) // block
    return float(np.sum(first // block - oldest + 1)) * block**2


def needed(content: RowContent, window: int = 0) -> float:
    """Returns the pairs that see each other in a row."""
    own = sum(causal(n, window) for n in content.parts)
    return own + float(sum(content.segments) * content.prompt)


def needed_by(call: AttentionCall, content: RowContent) -> float:
    """Returns the pairs of one call that see each other, of all its rows and heads."""
    if not call.causal:
        each = float(sum(content.segments) * content.prompt)
    elif call.packed:
        each = sum(causal(n, call.window) for n in content.parts)
    else:
        each = needed(content, call.window)
    return each * call.rows * call.heads


def computed_by(call: AttentionCall, content: RowContent, block: int = 0) -> float:
    """Returns the pairs that one call computes, of all its rows and heads.

    Args:
        call: the call.
        content: the row, of which a packed call computes each part by itself.
        block: side of the blocks; 0 takes the kernel's own, 1 counts the triangle itself.
    """
    block = block or call.block
    if not call.causal:
        keys = min(call.keys, content.prompt or call.keys)
        queries = content.segments if call.packed else (call.queries,)
        each = float(sum(-(-n // block) * -(-keys // block) * block**2 for n in queries))
    elif call.packed:
        each = sum(causal(n, call.window, block) for n in content.parts)
    else:
        each = causal(call.queries, call.window, block)
    return each * call.rows * call.heads


def operations(call: AttentionCall, content: RowContent, block: int = 0) -> float:
    """Returns the floating-point operations of the pairs that one call computes."""
    return 2.0 * call.num_products * call.head_dim * computed_by(call, content, block)
