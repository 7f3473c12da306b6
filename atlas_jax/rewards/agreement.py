"""How well scores agree with what is known: correlation, ranking, calibration.

Every function leaves out pairs of which one side is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Column = Sequence[float | None]
"""One number a sample; None is not known."""

_NUM_BINS = 5
_FEWEST = 3  # pairs that a correlation is computed of


class Bin(NamedTuple):
    """Samples whose scores lie between two bounds."""

    low: float
    high: float
    num_samples: int
    score: float  # mean of the scores
    target: float  # mean of what is known


def pearson(scores: Column, targets: Column) -> float | None:
    """Returns the linear correlation; None where one side does not vary, or pairs are too few."""
    x, y = _pairs(scores, targets)
    if len(x) < _FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def spearman(scores: Column, targets: Column) -> float | None:
    """Returns the correlation of ranks, equal values at their mean rank; None as `pearson`."""
    x, y = _pairs(scores, targets)
    return pearson(_ranks(x).tolist(), _ranks(y).tolist())


def auc(scores: Column, labels: Column) -> float | None:
    """Returns how often a sample of label 1 scores above one of label 0, ties half.

    None where one of the labels is absent.
    """
    x, y = _pairs(scores, labels)
    positive = y > 0.5
    num = int(positive.sum())
    rest = int((~positive).sum())
    if not num or not rest:
        return None
    above = _ranks(x)[positive].sum() - num * (num + 1) / 2
    return float(above / (num * rest))


def calibration(scores: Column, targets: Column) -> list[Bin]:
    """Returns the mean of what is known for scores of each fifth of 0..1; empty ones are absent."""
    x, y = _pairs(scores, targets)
    places = np.minimum((x * _NUM_BINS).astype(int), _NUM_BINS - 1)
    return [
        Bin(
            low=i / _NUM_BINS,
            high=(i + 1) / _NUM_BINS,
            num_samples=int((places == i).sum()),
            score=float(x[places == i].mean()),
            target=float(y[places == i].mean()),
        )
        for i in sorted(set(places.tolist()))
    ]


def report(
    scores: Mapping[str, Column], targets: Mapping[str, Column], good: float
) -> dict[str, dict[str, Any]]:
    """Returns the agreement of each column of scores with each target.

    Args:
        scores: the sum and each judge.
        targets: in 0..1; a target is 1 for `auc` where it is `good` or more.
        good: the bound.
    """
    return {
        f"{name} ~ {target}": {
            "pairs": len(_pairs(column, known)[0]),
            "pearson": pearson(column, known),
            "spearman": spearman(column, known),
            "auc": auc(column, [None if v is None else float(v >= good) for v in known]),
            "calibration": [bin_._asdict() for bin_ in calibration(column, known)],
        }
        for name, column in scores.items()
        for target, known in targets.items()
    }


def _pairs(first: Column, second: Column) -> tuple[np.ndarray, np.ndarray]:
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    x, y = np.asarray(both, np.float64).reshape(-1, 2).T
    return x, y


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns the ranks from 1, equal values at the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
