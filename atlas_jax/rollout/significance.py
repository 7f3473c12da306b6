"""Significance of paired comparisons: McNemar's test, corrections for several, and power.

Two ways to answer the same questions differ in those that one has right and the other wrong. Every
function here is about these counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ALPHA = 0.05
"""Probability of a significant result without an effect."""
POWER = 0.8
"""Probability of a significant result with the effect, at which questions are counted."""
_MOST_QUESTIONS = 10**6


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def mcnemar(improved: int, degraded: int) -> float:
    """Returns the two-sided p-value that changes to right and to wrong are equally likely.

    The exact test of McNemar (Psychometrika 12, 1947): the smaller count under Binomial(n, 1/2).
    """
    changed = improved + degraded
    fewer = min(improved, degraded)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed
    return min(1.0, 2 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number, in order.

    Each may be compared with the level that all of them together shall keep.

    Reference: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal
    of Statistics 6 (1979): the k-th smallest of m is multiplied by m - k + 1, and none becomes
    smaller than the ones before it.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def power(effect: float, changed: float, questions: int) -> float:
    """Returns the probability that the exact test of McNemar finds an effect, at level `ALPHA`.

    The number of questions that change is Binomial(questions, changed), and that of the improved
    ones among them Binomial(n, (changed + effect) / (2 changed)); the probabilities of all outcomes
    that the test rejects are added up.

    Reference: Duffy, Asymptotic and exact power for the McNemar test and its analogue with R
    controls per case, Biometrics 40 (1984).

    Args:
        effect: share of questions that improve less the share that degrade, above 0.
        changed: share of questions that improve or degrade, at least `effect`.
        questions: number of questions that are compared.
    """
    from scipy import stats

    deviation = math.sqrt(questions * changed * (1 - changed))
    first = max(1, math.floor(questions * changed - 8 * deviation - 8))
    last = min(questions, math.ceil(questions * changed + 8 * deviation + 8))
    counts = np.arange(first, last + 1)
    share = min(1.0, (changed + effect) / (2 * changed))
    # The largest smaller count that is rejected: P(X <= k) <= ALPHA / 2 under one half.
    limit = stats.binom.ppf(ALPHA / 2, counts, 0.5).astype(int)
    limit -= stats.binom.cdf(limit, counts, 0.5) > ALPHA / 2
    rejected = stats.binom.cdf(limit, counts, share) + stats.binom.sf(
        counts - limit - 1, counts, share
    )
    rejected = np.where(limit < 0, 0.0, rejected)
    return float(np.sum(stats.binom.pmf(counts, questions, changed) * rejected))


def questions_needed(effect: float, changed: float, wanted: float = POWER) -> int | None:
    """Returns the number of questions at which an effect is found with probability `wanted`.

    The search begins at the number of the asymptotic test,
    n = (z[1 - alpha/2] sqrt(c) + z[power] sqrt(c - e^2))^2 / e^2 for an effect e and a share c of
    changes; the exact test needs some more. Beyond a million questions the result is None.

    Reference: Connor, Sample size for testing differences in proportions for the paired-sample
    design, Biometrics 43 (1987).

    Args:
        effect: see `power`.
        changed: see `power`.
        wanted: probability to find it.
    """
    from scipy import stats

    if not 0 < effect <= changed:
        raise ValueError(
            f"an effect of {effect:g} with {changed:g} of the questions changing cannot be; the "
            "effect must be above 0 and at most that share"
        )
    quantiles = stats.norm.ppf(1 - ALPHA / 2), stats.norm.ppf(wanted)
    root = quantiles[0] * math.sqrt(changed) + quantiles[1] * math.sqrt(changed - effect**2)
    low = 0
    high = max(math.ceil((root / effect) ** 2), 1)
    while power(effect, changed, high) < wanted:
        if high > _MOST_QUESTIONS:
            return None
        low = high
        high = math.ceil(1.1 * high) + 1
    # The power grows with the number but for ripples far below a percent.
    while high - low > 1:
        middle = (low + high) // 2
        if power(effect, changed, middle) < wanted:
            low = middle
        else:
            high = middle
    return high


class Comparison(NamedTuple):
    """Two ways to answer the same questions."""

    compared: int
    """Questions that were answered both ways and have a ground truth."""
    improved: int
    """Questions that the first way has wrong and the second one right."""
    degraded: int
    """Questions that the first way has right and the second one wrong."""
    difference: Interval
    """Share of right answers of the second way less that of the first; bootstrap."""

    @property
    def p_value(self) -> float:
        """The p-value of McNemar's test."""
        return mcnemar(self.improved, self.degraded)

    @property
    def changed(self) -> float:
        """Share of questions whose answers differ in being right; 0 without questions."""
        return (self.improved + self.degraded) / self.compared if self.compared else 0.0


def compare(
    first: Sequence[bool | None],
    second: Sequence[bool | None],
    seed: int = 0,
    resamples: int = 2000,
) -> Comparison:
    """Returns how two ways to answer the same questions compare.

    Args:
        first: whether each question is right, None where that is not known.
        second: the same of the other way, in the same order.
        seed: of the bootstrap.
        resamples: draws of the bootstrap, over questions with replacement.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    improved = sum(b and not a for a, b in pairs)
    degraded = sum(a and not b for a, b in pairs)
    count = len(pairs)
    if not count:
        return Comparison(
            compared=0, improved=0, degraded=0, difference=Interval(math.nan, math.nan, math.nan)
        )
    shares = np.asarray([improved, degraded, count - improved - degraded]) / count
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=resamples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / count, (0.025, 0.975))
    return Comparison(
        compared=count,
        improved=improved,
        degraded=degraded,
        difference=Interval((improved - degraded) / count, float(low), float(high)),
    )
