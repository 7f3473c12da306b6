"""Rewards worked by hand, and what cannot be scored."""

import math
import subprocess
import sys

import pytest

from atlas_jax.rewards.combined import combine
from atlas_jax.rewards.pricing import price_lessons
from atlas_jax.rewards.verifiable import exact_match, teaching_gain
from atlas_jax.types import Completion, Question, Reward, Sample


def completion(text, num_tokens=1, finish_reason="stop"):
    zeros = (0.0,) * num_tokens
    return Completion((1,), (2,) * num_tokens, zeros, zeros, finish_reason, text, 0)


def rollout(baseline="", guided="", tokens=(100, 75), teaching="count on", truth="7"):
    return Sample(
        Question("q1", "3 + 4?", truth, {}),
        completion("<teaching>count on</teaching>"),
        teaching,
        completion(baseline, tokens[0]),
        None,
        completion(guided, tokens[1]),
    )


RIGHT, WRONG_TEXT = "<solution>7</solution>", "<solution>8</solution>"


@pytest.mark.parametrize(
    ("baseline", "guided", "expected"),
    [
        (WRONG_TEXT, RIGHT, 1 + 2.0 * 0.25),
        (RIGHT, RIGHT, 2.0 * 0.25),
        (RIGHT, WRONG_TEXT, -3.0),
        (WRONG_TEXT, WRONG_TEXT, 0.0),
    ],
)
def test_teaching_gain_of_the_four_outcomes(baseline, guided, expected):
    # 100 tokens became 75: efficiency 0.25
    reward = teaching_gain(efficiency_weight=2.0, degradation_penalty=3.0)
    (result,) = reward([rollout(baseline, guided)])
    assert result.value == expected
    assert result.details == {
        "baseline_correct": baseline == RIGHT,
        "correct": guided == RIGHT,
        "efficiency": 0.25,
    }


def test_longer_guided_answer_costs_nothing():
    samples = [rollout(WRONG_TEXT, RIGHT, (100, 150)), rollout(RIGHT, RIGHT, (0, 5))]
    assert [result.value for result in teaching_gain()(samples)] == [1.0, 0.0]


def test_a_leaked_answer_is_priced_in_its_group_in_every_outcome():
    outcomes = [(WRONG_TEXT, RIGHT), (RIGHT, RIGHT), (RIGHT, WRONG_TEXT), (WRONG_TEXT, WRONG_TEXT)]
    samples = [rollout(*texts, teaching="it is 7.") for texts in outcomes]
    results = teaching_gain()(samples)
    assert [result.value for result in results] == [1.25, 0.25, -1.0, 0.0]
    honest = rollout(RIGHT, RIGHT, (100, 90))
    rewards = [*results, *teaching_gain()([honest])]
    scored = [s._replace(reward=r) for s, r in zip([*samples, honest], rewards, strict=True)]
    results = [sample.reward for sample in price_lessons(scored, 0.5)]
    assert [result.value for result in results] == pytest.approx([-0.4, -0.4, -1.5, -0.5, 0.1])
    assert [bool(result.details.get("gaming")) for result in results] == [True] * 4 + [False]


def test_teaching_gain_is_none_where_it_cannot_be_told():
    failed = completion("", 0, "error: connection refused")
    sample = rollout(WRONG_TEXT, RIGHT)
    samples = {
        "no ground truth": rollout(WRONG_TEXT, RIGHT, truth=" "),
        "no baseline": sample._replace(baseline=None),
        "no guided answer": sample._replace(guided=None),
        "baseline: error: connection refused": sample._replace(baseline=failed),
        "guided answer: error: connection refused": sample._replace(guided=failed),
        "lesson: error: connection refused": sample._replace(completion=failed),
    }
    results = teaching_gain()(list(samples.values()))
    assert results == [
        Reward(None, {"unscored": reason}, is_skipped=reason == "no ground truth")
        for reason in samples
    ]


def test_a_text_that_could_not_come_about_is_no_outage():
    """A sample with a skipped and a failed text is skipped: no server would give it a score."""
    failed = completion("", 0, "error: connection refused")
    long = completion("", 0, "skipped: prompt of 9 tokens and 2 new ones exceed 10")
    sample = rollout(WRONG_TEXT, RIGHT)
    samples = [sample._replace(baseline=failed, guided=long), sample._replace(guided=failed)]
    gain, judge = teaching_gain(), fixed(0.5, None)
    results = combine({"gain": (gain, 1.0), "judge": (judge, 1.0)})(samples)
    assert [(r.value, r.is_skipped, r.is_outage) for r in results] == [
        (None, True, False), (None, False, True)
    ]  # fmt: skip
    assert gain(samples)[0].details == {"unscored": f"guided answer: {long.finish_reason}"}
    assert not exact_match()([sample])[0].is_outage


def test_exact_match_scores_the_answer_that_counts():
    taught = rollout(WRONG_TEXT, RIGHT)
    direct = taught._replace(completion=completion("so 8"), baseline=None, guided=None)
    silent = taught._replace(guided=completion("who knows"))
    unknown = rollout(truth="")
    failed = taught._replace(guided=completion("7", finish_reason="error: timeout"))
    assert exact_match()([taught, direct, silent, unknown, failed]) == [
        Reward(1.0, {"correct": True, "extracted": "7"}),
        Reward(0.0, {"correct": False, "extracted": "8"}),
        Reward(0.0, {"correct": False, "extracted": None}),
        Reward(None, {"unscored": "no ground truth"}, is_skipped=True),
        Reward(None, {"unscored": "answer: error: timeout"}),
    ]


def test_an_answer_that_was_cut_counts_only_if_it_is_marked():
    texts = {"count on from 3, which is 7": 0.0, "so \\boxed{7} and": 1.0}
    for text, score in texts.items():
        cut = completion(text, finish_reason="length")
        sample = rollout(WRONG_TEXT, RIGHT)._replace(guided=cut)
        assert exact_match()([sample])[0].value == score
        assert teaching_gain(efficiency_weight=0.0)([sample])[0].value == score
    whole = rollout(WRONG_TEXT, "count on from 3, which is 7")
    assert exact_match()([whole])[0].value == 1.0


def fixed(*scores):
    return lambda rollouts: [Reward(score, {"from": "judge"}) for score in scores]


def test_combined_reward_is_the_weighted_sum_with_details_by_name():
    reward = combine({"match": (exact_match(), 2.0), "judge": (fixed(0.5, 0.25), -1.0)})
    results = reward([rollout(guided=RIGHT), rollout(guided=WRONG_TEXT)])
    assert [result.value for result in results] == [1.5, -0.25]
    assert results[0].details == {
        "match": {"value": 1.0, "correct": True, "extracted": "7"},
        "judge": {"value": 0.5, "from": "judge"},
    }


def test_none_of_a_weighed_reward_makes_the_sample_none():
    samples = [rollout(), rollout()]
    weighed = combine({"a": (fixed(1.0, 1.0), 1.0), "b": (fixed(None, 3.0), 0.5)})
    assert [result.value for result in weighed(samples)] == [None, 2.5]
    assert weighed(samples)[0].details["a"]["value"] == 1.0
    recorded = combine({"a": (fixed(1.0, 1.0), 1.0), "b": (fixed(None, 3.0), 0.0)})
    assert [result.value for result in recorded(samples)] == [1.0, 1.0]
    assert recorded(samples)[1].details["b"]["value"] == 3.0


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_score_that_is_not_finite_is_an_error(score, weight):
    reward = combine({"a": (fixed(1.0, 1.0), 1.0), "judge": (fixed(1.0, score), weight)})
    with pytest.raises(ValueError, match=r"'judge' of sample 'q1' is -?(nan|inf); return a finite"):
        reward([rollout(), rollout()])


def test_list_of_the_wrong_length_is_an_error():
    with pytest.raises(ValueError, match=r"'judge' returned 1 rewards for 2 samples .*'q1'.*"):
        combine({"judge": (fixed(1.0), 1.0)})([rollout(), rollout()])


@pytest.mark.parametrize("weights", [(), (0.0,), (1.0, math.nan), (math.inf,)])
def test_weights_without_a_sum_are_refused(weights):
    with pytest.raises(ValueError, match="give finite ones"):
        combine({str(i): (fixed(1.0), weight) for i, weight in enumerate(weights)})


@pytest.mark.parametrize("option", ["efficiency_weight", "degradation_penalty"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_options_of_the_gain_are_finite_and_not_negative(option, value):
    with pytest.raises(ValueError, match=f"{option} of the reward is"):
        teaching_gain(**{option: value})


@pytest.mark.usefixtures("torch_to_find")
def test_rewards_are_imported_without_jax_or_torch():
    heavy = "{'jax', 'flax', 'torch', 'transformers'}"
    code = f"import sys, atlas_jax.rewards.verifiable; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
