"""What leaks are worth beside the honest lessons of their group, worked by hand."""

import pytest

from atlas_jax.rewards.pricing import CUT, NO_HONEST, NO_LESSON, price_lessons
from atlas_jax.rewards.verifiable import teaching_gain
from atlas_jax.types import Reward
from tests.rewards.test_verifiable import RIGHT, WRONG_TEXT, rollout

LEAK, HONEST = "It is 7.", "Count on from 3."


def priced(samples, rewards, *penalties):
    """Returns the rewards of one question's samples as they are priced."""
    scored = [s._replace(reward=r) for s, r in zip(samples, rewards, strict=True)]
    return [sample.reward for sample in price_lessons(scored, *penalties)]


def scores(group, penalty=0.5, missing=0.0):
    """Returns what members are worth, each given as its lesson and its own score."""
    samples = [rollout(teaching=lesson) for lesson, _ in group]
    results = [Reward(score, {"judge": {"value": score}}) for _, score in group]
    return [result.value for result in priced(samples, results, penalty, missing)]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ([("", 0.0), (HONEST, 1.0)], [-0.3, 1.0]),  # its own is the lower
        ([("", 0.0), (HONEST, 1.0), (HONEST, -1.0)], [-1.3, 1.0, -1.0]),
        ([("", 0.0), ("", 0.0)], [-0.3, -0.3]),
        ([("", None), (HONEST, 1.0)], [None, 1.0]),
        ([("", 0.0), (LEAK, 1.0), (HONEST, 0.5)], [-0.3, 0.0, 0.5]),
        ([("", 0.0), (LEAK, 1.0)], [-0.3, None]),  # trains nothing: there is nothing to prefer
    ],
)
def test_a_missing_lesson_is_worth_less_than_every_honest_one(group, expected):
    assert scores(group, missing=0.3) == pytest.approx(expected)


@pytest.mark.parametrize("baseline", [RIGHT, WRONG_TEXT])
@pytest.mark.parametrize("guided", [RIGHT, WRONG_TEXT])
def test_no_outcome_makes_not_to_teach_the_better_choice(baseline, guided):
    """A lesson that harms costs 1, which a text without one would be spared."""
    honest = rollout(baseline, guided, teaching=HONEST)
    untaught = rollout(baseline, baseline, (100, 100), teaching="")
    samples = [untaught, honest]
    missing, taught = priced(samples, teaching_gain()(samples), 0.5, 0.3)
    assert missing.value <= taught.value - 0.3
    assert missing.details["gaming"] == [NO_LESSON]
    assert missing.details["own_value"] == 0.0


def test_a_text_that_does_not_end_is_worth_less_than_every_honest_one():
    """What follows its lesson changes no answer, so that its own reward cannot tell."""
    ended = rollout(teaching=HONEST)
    cut = ended._replace(completion=ended.completion._replace(finish_reason="length"))
    given = [Reward(1.0, {}), Reward(0.25, {})]
    assert [r.value for r in priced([cut, ended], given, 0.5, 0.3)] == pytest.approx([-0.05, 0.25])
    assert priced([cut, ended], given, 0.5, 0.3)[0].details["gaming"] == [CUT]
    assert [r.value for r in priced([cut, cut], given, 0.5, 0.3)] == pytest.approx([0.7, -0.05])
    assert [r.value for r in priced([cut, ended], given, 0.5)] == [1.0, 0.25]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ([(HONEST, 0.25), (HONEST, 1.5)], [0.25, 1.5]),
        ([(LEAK, 2.0), (HONEST, 0.25), (HONEST, 1.5)], [-0.25, 0.25, 1.5]),
        ([(HONEST, 0.25), (LEAK, -3.0)], [0.25, -3.5]),  # its own is the lower
        ([(LEAK, 2.0), (LEAK, 0.0), (HONEST, 1.0), (HONEST, None)], [0.5, -0.5, 1.0, None]),
        ([(LEAK, 2.0), (LEAK, 1.0)], [None, None]),
        ([(LEAK, 2.0), (HONEST, None)], [None, None]),
        ([(LEAK, None), (HONEST, 1.0)], [None, 1.0]),
        ([("", 0.25), (LEAK, 2.0)], [0.25, -0.25]),  # no lesson is an honest one
    ],
)
def test_a_leak_is_worth_less_than_every_honest_lesson(group, expected):
    assert scores(group) == expected


def test_without_a_penalty_it_is_worth_as_much_as_the_lowest():
    assert scores([(LEAK, 2.0), (HONEST, 0.25)], penalty=0.0) == [0.25, 0.25]


def test_the_record_says_why_and_what_the_score_was():
    samples = [rollout(teaching=LEAK), rollout(teaching=HONEST)]
    leak, honest = priced(samples, [Reward(2.0, {"a": 1}), Reward(1.0, {})], 0.5)
    assert leak.details == {"a": 1, "gaming": ["the lesson states the answer"], "own_value": 2.0}
    assert honest == Reward(1.0, {})


def test_a_group_without_an_honest_lesson_is_skipped_and_no_outage():
    (result,) = priced([rollout(teaching=LEAK)], [Reward(2.0, {})], 0.5)
    assert (result.value, result.is_skipped, result.is_outage) == (None, True, False)
    assert result.details["unscored"] == NO_HONEST


def test_what_the_judges_found_counts_like_a_leak():
    samples = [rollout(teaching=HONEST), rollout(teaching=HONEST)]
    found = {"rim": {"gaming": ["the lesson addresses the judge"], "value": 0.9}}
    results = [Reward(0.9, found), Reward(0.5, {"rim": {"gaming": [], "value": 0.5}})]
    bad, good = priced(samples, results, 0.25)
    assert (bad.value, good.value) == (0.25, 0.5)
    assert bad.details["gaming"] == ["the lesson addresses the judge"]


@pytest.mark.parametrize("guided", [RIGHT, WRONG_TEXT])
@pytest.mark.parametrize("baseline", [RIGHT, WRONG_TEXT])
def test_no_outcome_makes_a_leak_the_better_lesson(baseline, guided):
    """The student is right with the leak, and with the honest lesson whatever it is."""
    samples = [rollout(baseline, RIGHT, teaching=LEAK), rollout(baseline, guided, teaching=HONEST)]
    leak, honest = priced(samples, teaching_gain()(samples), 0.5)
    assert leak.value <= honest.value - 0.5


def test_without_a_ground_truth_nothing_is_stated():
    (result,) = priced([rollout(teaching=LEAK, truth="")], [Reward(0.9, {})], 0.5)
    assert result.value == 0.9
