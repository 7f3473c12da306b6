"""Division of the completions of a GRPO step into rows. Imports no JAX."""

from __future__ import annotations

import math
from typing import NamedTuple

from atlas_jax.data.packing import capped_buckets
from atlas_jax.options.grpo import GRPOConfig
from atlas_jax.options.train import BatchPlan, multiples_near
from atlas_jax.types import RowBounds


class Layout(NamedTuple):
    """Division of the completions of a step into rows."""

    questions: int
    """Groups a step, over all processes."""
    per_row: int
    """Completions that follow one copy of their prompt."""
    microbatches: int
    buckets: tuple[int, ...]
    """Row lengths, one compilation each."""


def make_layout(config: GRPOConfig, plan: BatchPlan, num_replicas: int) -> Layout:
    """Returns how a step's completions are divided.

    A microbatch has `plan.device_rows` completions a device, so a row holds a divisor of that and
    of the group.

    Raises:
        ValueError: if groups do not divide the step, or updates its microbatches.
    """
    size = config.num_generations
    if plan.global_rows % size:
        sizes = multiples_near(plan.global_rows, size, num_replicas)
        raise ValueError(
            f"{plan.global_rows} completions a step do not divide into groups of num_generations="
            f"{size}; set train_batch_size={sizes} and gradient_accumulation_steps=0, or another "
            "num_generations"
        )
    if plan.microbatches % config.steps_per_generation:
        share = plan.global_rows // num_replicas // config.steps_per_generation
        raise ValueError(
            f"{plan.global_rows} completions a step are {plan.microbatches} microbatches, which do "
            f"not divide into steps_per_generation={config.steps_per_generation} updates; set "
            f"per_device_train_batch_size={max(share, 1)} or a divisor of it and "
            "gradient_accumulation_steps=0, or another steps_per_generation"
        )
    longest = config.max_prompt_length + config.max_new_tokens
    room = max(config.max_seq_length, longest)
    per_row = 1
    if config.rollout.share_prompt:
        common = math.gcd(size, plan.device_rows)
        fitting = [
            k for k in range(1, common + 1) if common % k == 0 and longest_row(config, k) <= room
        ]
        per_row = max(fitting)
    buckets = capped_buckets(config.data.length_buckets, room)
    return Layout(
        questions=plan.global_rows // size,
        per_row=per_row,
        microbatches=plan.microbatches,
        buckets=buckets,
    )


def longest_row(config: GRPOConfig, per_row: int) -> int:
    """Returns the most tokens that a row of `per_row` completions may have.

    Episodes of one question may begin with different prompts, of which each then stands in the row.
    """
    prompts = per_row if config.has_episodes else 1
    return prompts * config.max_prompt_length + per_row * config.max_new_tokens


def row_bounds(config: GRPOConfig, per_row: int) -> RowBounds:
    """Returns what is known of rows of `per_row` completions.

    Turns of an episode are as long as what its tools say, so their lengths are not known.
    """
    if per_row == 1:
        return RowBounds(segments=1)
    if config.has_episodes:
        return RowBounds(segments=per_row + 1)
    return RowBounds(
        segments=per_row + 1,
        # What completions do not share of their prompts stands before each of them.
        longest=config.max_prompt_length + config.max_new_tokens,
        prompt=config.max_prompt_length,
    )
