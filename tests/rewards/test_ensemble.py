"""The ensemble against a table worked by hand."""

import itertools

import pytest

from atlas_jax.options.judges import ConsistencyRules, RIMConfig
from atlas_jax.rewards.ensemble import Opinion, aggregate, choose, consistent, escalation, spread

CONFIG = RIMConfig(variance_threshold=0.15, uncertainty_threshold=0.3)
RULES = ConsistencyRules()


def opinions(*pairs):
    """Opinions of (score, uncertainty), in the order of their temperatures."""
    return tuple(Opinion(s, u, f"why {s}", (), "m", 0.1 * i) for i, (s, u) in enumerate(pairs))


@pytest.mark.parametrize(
    ("given", "deviation", "reason", "chosen"),
    [
        # agreement: the least uncertain opinion counts, not the mean
        (((0.6, 0.2), (0.7, 0.1), (0.8, 0.3)), 0.0816497, "", 0.7),
        # standard deviation exactly at the threshold: the mean is 0.65, each 0.15 from it
        (((0.5, 0.1), (0.8, 0.0)), 0.15, "", 0.8),
        # disagreement: mean 0.5, deviations 0.3, 0, 0.3, variance 0.06
        (((0.2, 0.0), (0.5, 0.0), (0.8, 0.0)), 0.2449490, "disagreement 0.245 > 0.15", 0.2),
        # agreement, but one is not sure
        (((0.6, 0.0), (0.6, 0.31), (0.6, 0.1)), 0.0, "uncertainty 0.310 > 0.3", 0.6),
        (((0.6, 0.3), (0.6, 0.3), (0.6, 0.3)), 0.0, "", 0.6),
        # both: the first reason is named
        (((0.0, 0.9), (1.0, 0.9)), 0.5, "disagreement 0.500 > 0.15", 0.0),
        # ties go to the first temperature
        (((0.5, 0.1), (0.6, 0.1), (0.7, 0.1)), 0.0816497, "", 0.5),
        # missing samples: two of three, one of three, none
        (((0.4, 0.2), (0.5, 0.1)), 0.05, "", 0.5),
        (((0.9, 0.2),), 0.0, "", 0.9),
        ((), 0.0, "no valid sample", None),
    ],
)
def test_opinions_become_what_was_worked_by_hand(given, deviation, reason, chosen):
    samples = opinions(*given)
    assert spread(samples) == pytest.approx(deviation, abs=1e-6)
    assert escalation(samples, CONFIG) == reason
    found = choose(samples)
    assert (found.score if found else None) == chosen


@pytest.mark.parametrize(
    ("given", "expected", "rules"),
    [
        # nothing contradicts
        (
            {"accuracy": 0.8, "helpfulness": 0.7, "process": 0.9, "diagnostic": 0.7},
            {"accuracy": 0.8, "helpfulness": 0.7, "process": 0.9, "diagnostic": 0.7},
            [],
        ),
        # process is brought to accuracy + 0.1
        ({"accuracy": 0.5, "process": 0.9}, {"accuracy": 0.5, "process": 0.6}, ["process"]),
        # helpfulness is at most 0.5 where process is below 0.5
        (
            {"helpfulness": 0.9, "process": 0.4},
            {"helpfulness": 0.5, "process": 0.4},
            ["helpfulness"],
        ),
        ({"helpfulness": 0.9, "process": 0.5}, {"helpfulness": 0.9, "process": 0.5}, []),
        # helpfulness is brought to diagnostic + 0.1
        (
            {"helpfulness": 0.9, "diagnostic": 0.3},
            {"helpfulness": 0.4, "diagnostic": 0.3},
            ["helpfulness"],
        ),
        # in order: process falls to 0.3, therefore helpfulness to 0.5, and then to 0.2
        (
            {"accuracy": 0.2, "helpfulness": 0.9, "process": 0.9, "diagnostic": 0.1},
            {"accuracy": 0.2, "helpfulness": 0.2, "process": 0.3, "diagnostic": 0.1},
            ["process", "helpfulness", "helpfulness"],
        ),
        # inactive judges: their rules are left out
        ({"helpfulness": 1.0}, {"helpfulness": 1.0}, []),
        ({"process": 1.0, "diagnostic": 0.0}, {"process": 1.0, "diagnostic": 0.0}, []),
        ({"accuracy": 0.0, "helpfulness": 1.0}, {"accuracy": 0.0, "helpfulness": 1.0}, []),
    ],
)
def test_consistency_rules_change_what_was_worked_by_hand(given, expected, rules):
    found, applied = consistent(given, RULES)
    assert found == pytest.approx(expected)
    assert [rule.split()[0] for rule in applied] == rules
    assert aggregate(found, {}) == pytest.approx(sum(expected.values()) / len(expected))


def test_a_rule_can_be_switched_off():
    off = ConsistencyRules(1.0, 0.0, 1.0)
    given = {"accuracy": 0.0, "helpfulness": 1.0, "process": 1.0, "diagnostic": 0.0}
    assert consistent(given, off) == (given, [])
    lower = {"helpfulness": 1.0, "process": 0.1}
    assert consistent(lower, off) == (lower, [])


def test_the_order_of_judges_changes_nothing():
    given = {"accuracy": 0.2, "helpfulness": 0.9, "process": 0.9, "diagnostic": 0.1}
    results = [consistent(dict(p), RULES) for p in itertools.permutations(given.items())]
    assert all(result == results[0] for result in results)


def test_no_judge_is_no_score():
    assert aggregate({}, {}) is None
