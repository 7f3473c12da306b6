"""Check for ground truths that no answer can match, before a run trains on rewards of 0."""

from __future__ import annotations

from collections.abc import Sequence

from absl import logging

from atlas_jax.rewards.answers import is_correct, marked_answer
from atlas_jax.types import Question

_MAX_CHARS = 200  # longest answer without a mark
_SHOWN = 3  # questions that are named


def check_truths(questions: Sequence[Question]) -> list[Question]:
    """Returns the questions whose ground truth does not match itself in a model's answer.

    One line of the log counts and names them, and the long texts without a marked answer, which no
    model would reproduce.

    Args:
        questions: the questions; those without ground truth are skipped.

    Returns:
        The questions whose ground truth cannot be matched.

    Raises:
        ValueError: if none can be matched.
    """
    with_truth = [q for q in questions if q.ground_truth.strip()]
    lost = [q for q in with_truth if not _can_match(q.ground_truth)]
    if not lost:
        return []
    named = "; ".join(f"{q.id}: {_short(q.ground_truth)!r}" for q in lost[:_SHOWN])
    warning = (
        f"{len(lost)} of {len(with_truth)} ground truths can be matched by no answer, so all score "
        f"0: {named}; give the answer alone, or mark it by \\boxed{{}} or ####"
    )
    if len(lost) == len(with_truth):
        raise ValueError(warning)
    logging.warning("%s", warning)
    return lost


def _can_match(truth: str) -> bool:
    if len(truth) > _MAX_CHARS and marked_answer(truth) is None:
        return False
    return is_correct(f"<solution>{truth}</solution>", truth)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else f"{line[:39]}…"
