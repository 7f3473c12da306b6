"""Ground truths that no answer could match, found before a run trains on zeros."""

from __future__ import annotations

from collections.abc import Sequence

from absl import logging

from atlas_jax.rewards.answers import is_correct, marked_answer
from atlas_jax.types import Question

_MAX_CHARS = 200  # of an answer that is not marked as one
_SHOWN = 3  # questions that are named


def check_truths(questions: Sequence[Question]) -> list[Question]:
    """Tries each ground truth against itself, as a model that knows it would write it.

    Counts and names, in one line of the log, those that cannot match, and long texts that do not
    mark an answer, which no model would write again.

    Args:
        questions: those that a rule will compare answers with; without ground truth they are left
            out.

    Returns:
        The questions whose ground truth cannot be matched.

    Raises:
        ValueError: if none can be matched.
    """
    known = [q for q in questions if q.ground_truth.strip()]
    lost = [q for q in known if not _can_match(q.ground_truth)]
    if not lost:
        return []
    named = "; ".join(f"{q.id}: {_short(q.ground_truth)!r}" for q in lost[:_SHOWN])
    found = (
        f"{len(lost)} of {len(known)} ground truths can be matched by no answer, so that all score "
        f"0: {named}; give the answer alone, or mark it by \\boxed{{}} or ####"
    )
    if len(lost) == len(known):
        raise ValueError(found)
    logging.warning("%s", found)
    return lost


def _can_match(truth: str) -> bool:
    if len(truth) > _MAX_CHARS and marked_answer(truth) is None:
        return False
    return is_correct(f"<solution>{truth}</solution>", truth)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else f"{line[:39]}…"
