"""Levers that may make a reward depend on the lesson, and shares of a reward's variance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Lever(NamedTuple):
    """A way to reward a lesson."""

    name: str
    guided: int = 1
    """Answers with the lesson whose mean is its reward."""
    baseline: int = 1
    """Answers alone that they are compared with."""
    greedy: bool = False
    reward: tuple[tuple[str, float], ...] = ()
    """Options of the reward that differ from the config's."""


class Shares(NamedTuple):
    """Parts of the variance of rewards, of lessons within their questions."""

    share: float
    compared: float
    lesson: float
    taught: float
    alone: float
    equal: float
    mean: float


def levers(answers: int) -> Iterator[Lever]:
    """Returns what is tried, as far as the number of answers leaves at least two repetitions."""
    yield Lever("one answer, one alone")
    sizes = [2**n for n in range(1, answers.bit_length()) if 2**n <= answers // 2]
    for size in sizes:
        yield Lever(f"num_guided={size}", guided=size)
    for size in sizes:
        yield Lever(f"num_guided={size} num_baseline={size}", guided=size, baseline=size)
    for name, value in (("efficiency_weight", 0.0), ("missing_lesson_penalty", 0.3)):
        yield Lever(f"{name}={value:g}", reward=((name, value),))
    yield Lever("student_temperature=0", greedy=True)
    yield Lever(
        "student_temperature=0 efficiency_weight=0", greedy=True,
        reward=(("efficiency_weight", 0.0),),
    )  # fmt: skip


def of(rewards: np.ndarray) -> Shares:
    """Returns the parts of the variance of rewards `[questions, lessons, repeats]`.

    Reference: Shrout and Fleiss, Intraclass correlations, Psychological Bulletin 86 (1979), with
    the lessons of a question as targets and repetitions as judges, since the lessons of a
    repetition share the answers alone; sums of squares are added up over questions. The share is
    ICC(2,1), and what is left of it after the mean of each group has been taken off is ICC(3,1).
    Both are 1 where repetitions cannot differ.
    """
    count, lessons, repeats = rewards.shape
    if not count:
        return Shares(*(math.nan,) * len(Shares._fields))
    of_lesson = rewards.mean(2, keepdims=True)
    of_repeat = rewards.mean(1, keepdims=True)
    whole = rewards.mean((1, 2), keepdims=True)
    again = max(repeats - 1, 1)
    targets = repeats * np.sum((of_lesson - whole) ** 2) / (count * (lessons - 1))
    judges = lessons * np.sum((of_repeat - whole) ** 2) / (count * again)
    rest = np.sum((rewards - of_lesson - of_repeat + whole) ** 2) / (count * (lessons - 1) * again)
    compared = targets + (repeats - 1) * rest
    return Shares(
        share=_ratio(targets - rest, compared + repeats * (judges - rest) / lessons),
        compared=_ratio(targets - rest, compared),
        lesson=math.sqrt(max(targets - rest, 0.0) / repeats),
        taught=math.sqrt(rest),
        alone=math.sqrt(max(judges - rest, 0.0) / lessons),
        equal=float(np.mean(np.ptp(rewards, axis=1) == 0)),
        mean=float(rewards.mean()),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def table(rows: Sequence[tuple[Lever, Shares, int]]) -> str:
    """Returns the levers as a table."""
    heads = (
        "share",
        "compared",
        "sd lesson",
        "sd taught",
        "sd alone",
        "equal",
        "reward",
        "questions",
    )
    lines = [f"{'lever':<44}" + "".join(f"{head:>11}" for head in heads)]
    for lever, found, count in rows:
        numbers = "".join(f"{number:>11.3f}" for number in found)
        lines.append(f"{lever.name:<44}{numbers}{count:>11}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit("error: this is a part of tools/reward_variance.py and no command; run that")
