"""Segments of a row: which positions a flash attention kernel lets see each other."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from atlas_jax.models.passes import Pass
from atlas_jax.types import RowBounds


class Ids(NamedTuple):
    """Segments of queries and of keys: a query sees keys of its own segment."""

    query: Int[Array, "B T"]
    key: Int[Array, "B S"]
    sequence: Int[Array, "B T"] | None = None
    """Sequences that share a prompt (`types.PolicyBatch`): keys of a sequence other than 0 are seen
    by that sequence alone. Queries and keys are the same positions then."""


def prompt_room(bounds: RowBounds, length: int, block: int = 128) -> int:
    """Returns how many keys at the beginning of a row may belong to its prompt.

    Args:
        bounds: the bound of the prompt.
        length: positions of the row.
        block: positions of a kernel's block, of which the result is a multiple, or the row itself.
    """
    most = -(-bounds.prompt // block) * block
    return min(most, length) if most else length


def keeps(
    bounds: RowBounds, segment_ids: Int[Array, "B T"], sequence_ids: Int[Array, "B T"] | None
) -> Bool[Array, " B"]:
    """Returns which rows keep to the bounds of lengths."""
    length = segment_ids.shape[1]
    mine = own(segment_ids, sequence_ids)
    differs = jnp.pad(mine[:, 1:] != mine[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    here = jnp.arange(length)
    first = jax.lax.cummax(jnp.where(differs, here, 0), axis=1)
    longest = jnp.max(jnp.where(segment_ids > 0, here - first + 1, 0), axis=1)
    within = longest <= (bounds.longest or length)
    if sequence_ids is not None:
        prompt = jnp.sum((sequence_ids == 0) & (segment_ids > 0), axis=1)
        within &= prompt <= (bounds.prompt or length)
    return within


def own(
    segment_ids: Int[Array, "B T"], sequence_ids: Int[Array, "B T"] | None
) -> Int[Array, "B T"]:
    """Returns the causal segment of each position: of a prompt, of one completion, of padding."""
    if sequence_ids is None:
        return segment_ids
    return segment_ids * (segment_ids.shape[1] + 1) + sequence_ids


def sees_prompt(
    segment_ids: Int[Array, "B T"], sequence_ids: Int[Array, "B T"]
) -> Bool[Array, "B T"]:
    """Returns which positions see a prompt that is not their own segment: those of completions."""
    return (sequence_ids > 0) & (segment_ids > 0)


def passes(segment_ids: Int[Array, "B T"], sequence_ids: Int[Array, "B T"]) -> tuple[Pass, Pass]:
    """Returns the two passes of rows whose completions share a prompt; their rows are `Ids`.

    In the first, prompt and completions are causal segments. In the second, which is not causal,
    the completions see their prompt.
    """
    mine = own(segment_ids, sequence_ids)
    completion = sees_prompt(segment_ids, sequence_ids)
    prompt = (sequence_ids == 0) & (segment_ids > 0)
    query = jnp.where(completion, segment_ids, -1)
    key = jnp.where(prompt, segment_ids, -2)
    return Pass(Ids(mine, mine)), Pass(Ids(query, key), completion)
