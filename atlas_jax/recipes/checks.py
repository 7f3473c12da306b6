"""Checks in which recipes differ, of templates, rows and devices. Imports no JAX.

`preflight` makes them before a run begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from atlas_jax.data import examples, questions, sources
from atlas_jax.options.gkd import GKDConfig
from atlas_jax.options.grpo import GRPOConfig
from atlas_jax.options.train import BatchPlan, TrainConfig
from atlas_jax.recipes.layout import make_layout
from atlas_jax.types import Given


class Checks(NamedTuple):
    """Checks of one recipe; each raises a ValueError."""

    templates: Callable[[Any], object]
    """Presence and placeholders of the templates, by config."""
    row: Callable[[Any, Given, sources.Row], object]
    """Use of one row, by config and what the caller has given."""
    rows_of_a_step: Callable[[Any, BatchPlan, int], object] = lambda *_: None
    """Division of what is more than a row, by config, plan and number of replicas."""


def of(config: TrainConfig) -> Checks:
    """Returns the checks of the recipe that a config names."""
    return {
        "sft": Checks(_lessons, _example),
        "grpo": Checks(questions.check_templates, _question, make_layout),
        "gkd": Checks(_lessons, _continuation),
    }[config.algorithm]


def _lessons(config: TrainConfig) -> None:
    for option in ("teacher_template", "lesson_template"):
        if config.data.format in ("teaching", "session") and not getattr(config.teaching, option):
            raise ValueError(
                f"teaching.{option} is empty, and data.format={config.data.format} needs it; take "
                "configs/data/arc_atlas_sft.py with --config NAME:data=arc_atlas_sft, or set it"
            )


def _example(config: TrainConfig, _: Given, row: sources.Row) -> None:
    examples.to_sample(row, config.data, config.teaching)


def _question(config: GRPOConfig, given: Given, row: sources.Row) -> None:
    questions.to_question(
        row,
        config.reward.needs_truth(given.rewards),
        config.rollout.question_fields,
        vars(config.data.columns),
    )


def _continuation(config: GKDConfig, given: Given, row: sources.Row) -> None:
    if config.teacher_reads == "prompt":
        _example(config, given, row)
        return
    for name in ("ground_truth", "baseline", "guided"):
        if not row.fields.get(name):
            raise ValueError(
                f"is no sample of a GRPO run with a student: it has no {name}; give the rollouts/ "
                "of a run with rollout.protocol=teaching"
            )
