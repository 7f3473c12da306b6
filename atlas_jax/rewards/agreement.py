"""Agreement of scores with known targets: correlation, ranking, calibration.

Every function leaves out pairs in which one side is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Column = Sequence[float | None]
"""One number a sample; None is unknown."""

_NUM_BINS = 5
_FEWEST = 3  # smallest number of pairs for a correlation


class Bin(NamedTuple):
    """The samples with scores between two bounds."""

    low: float
    high: float
    num_samples: int
    score: float  # mean of the scores
    target: float  # mean of the targets


def pearson(scores: Column, targets: Column) -> float | None:
    """Returns the linear correlation; None if one side is constant, or pairs are too few."""
    x, y = _pairs(scores, targets)
    if len(x) < _FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def spearman(scores: Column, targets: Column) -> float | None:
    """Returns the correlation of ranks, with equal values at their mean rank; None as `pearson`."""
    x, y = _pairs(scores, targets)
    return pearson(_ranks(x).tolist(), _ranks(y).tolist())


def auc(scores: Column, labels: Column) -> float | None:
    """Returns the frequency with which label 1 scores above label 0, counting ties half.

    It is None if one of the labels is absent.
    """
    x, y = _pairs(scores, labels)
    positive = y > 0.5
    num = int(positive.sum())
    num_others = int((~positive).sum())
    if not num or not num_others:
        return None
    above = _ranks(x)[positive].sum() - num * (num + 1) / 2
    return float(above / (num * num_others))


def calibration(scores: Column, targets: Column) -> list[Bin]:
    """Returns the mean target for scores in each fifth of 0..1, without empty fifths."""
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
        scores: the columns of the sum and of each judge.
        targets: the columns of targets in 0..1.
        good: the lowest target that `auc` counts as label 1.
    """
    return {
        f"{name} ~ {target}": {
            "pairs": len(_pairs(column, truth)[0]),
            "pearson": pearson(column, truth),
            "spearman": spearman(column, truth),
            "auc": auc(column, [None if v is None else float(v >= good) for v in truth]),
            "calibration": [bin_._asdict() for bin_ in calibration(column, truth)],
        }
        for name, column in scores.items()
        for target, truth in targets.items()
    }


def _pairs(first: Column, second: Column) -> tuple[np.ndarray, np.ndarray]:
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    x, y = np.asarray(both, np.float64).reshape(-1, 2).T
    return x, y


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns the ranks from 1; equal values have the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
