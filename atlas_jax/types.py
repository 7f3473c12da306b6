"""Records that pass between modules. Imports no JAX, so that host-side code can use them.

Dimension legend, used in every shape annotation and einsum of the package:

    B rows · T positions · S key positions · G group · N query heads · K key/value heads
    H head dim · D model · F hidden · V vocabulary · L layers

`axis` always means a mesh axis (`data`, `fsdp`, `tensor`), `dim` an array dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias, TypedDict

import numpy as np

Array: TypeAlias = Any
"""NumPy on the host, `jax.Array` on devices, and whatever a tree of the same structure holds."""


class Message(TypedDict):
    """One turn of a chat, as chat templates take it."""

    role: str
    content: str


class Example(NamedTuple):
    """One tokenized training sequence, ready to be packed or padded.

    Example:
        # prompt "2+2?" -> P0 P1, completion "4<eos>" -> C0 EOS
        Example(tokens=[P0, P1, C0, EOS], loss_mask=[False, False, True, True])
    """

    tokens: np.ndarray  # [T] int32
    loss_mask: np.ndarray  # [T] bool, true where this very token is a trained target


class Batch(NamedTuple):
    """A rectangle of token sequences, several per row when packed.

    Example of one packed row with two sequences of lengths 3 and 2, padded to 6:
        tokens      = [a0, a1, a2, b0, b1, 0]
        positions   = [ 0,  1,  2,  0,  1, 0]
        segment_ids = [ 1,  1,  1,  2,  2, 0]
        loss_mask   = [ F,  F,  T,  F,  T, F]

    The logits that predict `tokens[:, t]` are computed at `t - 1` of the same segment; a segment's
    first token is therefore never a target.
    """

    tokens: Array  # [B, T] int32
    positions: Array  # [B, T] int32, restarting at 0 in each segment
    segment_ids: Array  # [B, T] int32, 0 is padding
    loss_mask: Array  # [B, T] bool, true where this token, as a target, is trained on


Params = dict[str, Any]
"""A pure nested dict of arrays: the whole model, or anything of the same structure."""

Metrics = dict[str, Any]
"""`area/name` -> `(sum, weight)` until written; the value is `sum / weight`."""
