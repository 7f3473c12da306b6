"""Rewards of a lesson with several answers, worked by hand."""

import pytest

from atlas_jax.rewards.combined import combine
from atlas_jax.rewards.pricing import price_lessons
from atlas_jax.rewards.repeated import mean_over_answers
from atlas_jax.rewards.verifiable import exact_match, teaching_gain
from atlas_jax.rollout import measures
from atlas_jax.types import Reward
from tests.rewards.test_verifiable import RIGHT, WRONG_TEXT, completion, rollout


def answered(alone, guided, tokens=(10, 10), teaching="count on"):
    """Returns a sample whose answers are right where a letter is `r`, else wrong."""

    def written(letters, count):
        return tuple(completion(RIGHT if x == "r" else WRONG_TEXT, count) for x in letters)

    baselines, answers = written(alone, tokens[0]), written(guided, tokens[1])
    return rollout(teaching=teaching)._replace(
        baseline=baselines[0], further_baselines=baselines[1:],
        guided=answers[0], further_guided=answers[1:],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("alone", "guided", "expected"),
    [
        ("w", "r", 1.0),
        ("w", "rrww", 0.5),
        ("r", "rwww", -0.75),
        ("rw", "rrrw", 3 / 4 - 1 / 2),
        ("rwww", "r", 3 / 4),
        ("rrrr", "rrrr", 0.0),
    ],
)
def test_the_mean_gain_is_the_difference_of_the_shares_of_right_answers(alone, guided, expected):
    (result,) = mean_over_answers(teaching_gain(0.0))([answered(alone, guided)])
    assert result.value == pytest.approx(expected, abs=1e-15)
    assert len(result.details["answers"]) == max(len(alone), len(guided))


def test_each_answer_has_its_own_efficiency_and_penalty():
    reward = mean_over_answers(teaching_gain(efficiency_weight=2.0, degradation_penalty=3.0))
    # Pairs: right to right, saving half (2 * 0.5); wrong to right (1 + 1); right to wrong -3; 0.
    (result,) = reward([answered("rw", "rrww", tokens=(10, 5))])
    assert result.value == pytest.approx((1.0 + 2.0 - 3.0 + 0.0) / 4)
    assert [a["value"] for a in result.details["answers"]] == [1.0, 2.0, -3.0, 0.0]


def test_a_right_answer_counts_with_its_share():
    (result,) = mean_over_answers(exact_match())([answered("w", "rrwr")])
    assert result.value == 0.75


def test_a_lesson_that_is_missing_changes_nothing():
    """Its answers are those alone, and each is compared with itself: luck is no gain."""
    sample = answered("rwrw", "w", tokens=(10, 7), teaching="")
    same = sample._replace(guided=sample.baseline, further_guided=sample.further_baselines)
    (result,) = mean_over_answers(teaching_gain())([same])
    assert result.value == 0.0


def test_samples_keep_their_order_and_are_scored_in_one_call():
    calls = []

    def reward(samples):
        calls.append(len(samples))
        return [Reward(float(len(s.guided.text)), {}) for s in samples]

    found = mean_over_answers(reward)([answered("w", "rr"), answered("w", "w")])
    assert [r.value for r in found] == [len(RIGHT), len(WRONG_TEXT)]
    assert calls == [3]


def test_an_answer_without_a_score_leaves_the_sample_without_one():
    sample = answered("r", "rrr")
    failed = completion("", 0, "error: connection refused")
    broken = sample._replace(further_guided=(*sample.further_guided[:1], failed))
    (result,) = mean_over_answers(teaching_gain())([broken])
    assert (result.value, result.is_outage) == (None, True)
    assert result.details["unscored"] == "guided answer: error: connection refused"
    skipped = sample._replace(further_guided=(failed._replace(finish_reason="skipped: long"),))
    (result,) = mean_over_answers(teaching_gain())([skipped])
    assert (result.value, result.is_skipped) == (None, True)


def test_a_pair_that_can_be_scored_again_makes_the_sample_so():
    values = iter([1.0, None, 3.0])

    def reward(samples):
        return [Reward(v, {}, is_retryable=v is None) for v in values]

    (result,) = mean_over_answers(reward)([answered("r", "rrr")])
    assert (result.value, result.is_retryable, result.is_outage) == (None, True, True)


@pytest.mark.parametrize(("applies", "value"), [([True, False], 4.0), ([False, False], None)])
def test_a_pair_to_which_the_reward_does_not_apply_is_left_out(applies, value):
    def reward(samples):
        return [Reward(4.0 if a else None, {}, applies=a) for a in applies]

    (result,) = mean_over_answers(reward)([answered("r", "rr")])
    assert (result.value, result.applies) == (value, value is not None)


def test_what_judges_find_in_one_answer_counts_and_their_opinions_are_all_measured():
    aims = "the lesson addresses the judge"

    def rim(samples):
        verdict = {
            "score": 0.5, "stated_score": 0.5, "samples": [1], "spread": 0.0, "failures": [],
            "asked": 1, "escalation": "",
        }  # fmt: skip
        details = {"judges": {"a": verdict}, "calls": 2, "cached": 0, "tokens": 7, "cost": None}
        faults = ([], [aims], [aims], [])
        return [
            Reward(0.5, details | {"gaming": found})
            for _, found in zip(samples, faults, strict=True)
        ]

    sample, honest = answered("r", "rrr"), answered("r", "r")
    reward = combine({"rim": (mean_over_answers(rim), 1.0)})
    scored = [
        s._replace(reward=r)
        for s, r in zip((sample, honest), reward([sample, honest]), strict=True)
    ]
    bad, good = price_lessons(scored, 0.25)
    assert (bad.reward.value, good.reward.value) == (0.25, 0.5)
    assert bad.reward.details["gaming"] == [aims]
    found = measures.of_judges(scored, ["a"])
    assert found["reward/calls"] == (8, 4)
    assert found["reward/gamed_frac"] == (2, 4)
    assert found["rim_rewards/a"] == (2.0, 4)
