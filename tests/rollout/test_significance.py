"""Tests of paired comparisons, against scipy, enumeration, simulation and numbers by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from atlas_jax.rollout import significance


@pytest.mark.parametrize(("improved", "degraded"), [(0, 0), (5, 0), (7, 1), (13, 4), (6, 17)])
def test_mcnemar_is_the_binomial_test_of_scipy(improved, degraded):
    changed = improved + degraded
    expected = stats.binomtest(improved, changed).pvalue if changed else 1.0
    assert significance.mcnemar(improved, degraded) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("improved", "degraded", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 2 / 32),
        (8, 1, 2 * (1 + 9) / 512),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (3, 3, 1.0),
        (2, 1, 1.0),  # 2 * (1 + 3) / 8
    ],
)
def test_mcnemar_is_the_two_sided_binomial(improved, degraded, p):
    assert significance.mcnemar(improved, degraded) == pytest.approx(p, rel=1e-12)
    assert significance.mcnemar(degraded, improved) == significance.mcnemar(improved, degraded)


def test_mcnemar_holds_for_large_counts():
    assert 0 < significance.mcnemar(3000, 2000) < 1e-40


def test_holm_by_hand():
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, of which the last may not fall below 0.06.
    corrected = significance.holm([0.01, 0.04, 0.03, 0.005])
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.6, 0.7]) == [1.0, 1.0]
    assert significance.holm([0.2]) == [0.2]
    assert significance.holm([]) == []


@pytest.mark.parametrize(("effect", "changed"), [(0.3, 0.4), (0.2, 0.7), (0.5, 0.5), (0.1, 0.2)])
def test_power_is_the_probability_of_all_rejected_outcomes(effect, changed):
    """Every outcome of 14 questions, judged by scipy's test."""
    count = 14
    better = (changed + effect) / 2
    expected = 0.0
    for won, lost in itertools.product(range(count + 1), repeat=2):
        if 0 < won + lost <= count and stats.binomtest(won, won + lost).pvalue <= 0.05:
            shares = [better, changed - better, 1 - changed]
            expected += stats.multinomial.pmf([won, lost, count - won - lost], count, shares)
    assert significance.power(effect, changed, count) == pytest.approx(expected, rel=1e-9)


def test_power_is_the_share_of_simulated_evaluations_that_find_the_effect():
    effect, changed, count, trials = 0.1, 0.3, 200, 20_000
    rng = np.random.default_rng(0)
    better = (changed + effect) / 2
    drawn = rng.multinomial(count, [better, changed - better, 1 - changed], size=trials)
    outcomes, times = np.unique(drawn[:, :2], axis=0, return_counts=True)
    found = sum(
        n for (won, lost), n in zip(outcomes.tolist(), times, strict=True)
        if stats.binomtest(won, won + lost).pvalue < 0.05
    )  # fmt: skip
    error = 3 * math.sqrt(0.25 / trials)
    assert significance.power(effect, changed, count) == pytest.approx(found / trials, abs=error)


@pytest.mark.parametrize(
    ("effect", "changed", "asymptotic"),
    [
        # (1.959964 sqrt(0.3) + 0.841621 sqrt(0.3 - 0.01))^2 / 0.01
        (0.1, 0.3, 233.1),
        # (1.959964 sqrt(0.2) + 0.841621 sqrt(0.2 - 0.0025))^2 / 0.0025
        (0.05, 0.2, 626.3),
    ],
)
def test_questions_needed_are_the_fewest_with_that_power(effect, changed, asymptotic):
    count = significance.questions_needed(effect, changed)
    assert significance.power(effect, changed, count) >= 0.8
    assert significance.power(effect, changed, count - 1) < 0.8
    assert asymptotic < count < 1.12 * asymptotic  # the exact test needs some more
    assert significance.questions_needed(effect, changed, 0.5) < count


def test_an_effect_that_all_changes_have_is_found_with_few_questions():
    """Six changes the same way are significant, and five are not: 2 / 2^5 > 0.05."""
    assert significance.questions_needed(1.0, 1.0) == 6


@pytest.mark.parametrize(("effect", "changed"), [(0.0, 0.3), (0.4, 0.3), (-0.1, 0.3)])
def test_an_effect_above_the_changes_cannot_be(effect, changed):
    with pytest.raises(ValueError, match="at most that share"):
        significance.questions_needed(effect, changed)


def test_an_effect_that_is_too_small_has_no_number():
    assert significance.questions_needed(0.0005, 0.5) is None


def test_two_ways_are_compared_where_both_are_known():
    first = [True, True, False, False, None, True]
    second = [True, False, True, True, True, None]
    found = significance.compare(first, second)
    assert (found.compared, found.improved, found.degraded) == (4, 2, 1)
    assert found.difference.value == 0.25
    assert found.p_value == 1.0
    nothing = significance.compare([None], [True])
    assert nothing.compared == 0 and math.isnan(nothing.difference.value)


def test_the_interval_of_a_difference_is_about_that_of_the_normal_approximation():
    """Of 400 questions 90 improve and 30 degrade; the variance is (p10 + p01 - d^2) / n."""
    first = [False] * 90 + [True] * 30 + [True] * 280
    second = [True] * 90 + [False] * 30 + [True] * 280
    difference = significance.compare(first, second).difference
    deviation = math.sqrt((0.3 - 0.15**2) / 400)
    assert difference.value == pytest.approx(0.15)
    assert difference.low == pytest.approx(0.15 - 1.96 * deviation, abs=0.006)
    assert difference.high == pytest.approx(0.15 + 1.96 * deviation, abs=0.006)
