"""The soft penalty of long completions, against DAPO's eq. 13 by hand."""

import pytest

from atlas_jax.rewards import overlong
from atlas_jax.types import Question, Reward, Sample
from tests.rollout.scripts import completion

CASES = [(79, 0.0), (80, 0.0), (81, 0.05), (90, 0.5), (99, 0.95), (100, 1.0)]
"""Of at most 100 tokens the last 20 cost; (100 - 20 - 90) / 20 = -0.5."""


def sample(length, value=1.0):
    made = Sample(Question("q", "", "", {}), completion("text", length))
    return made._replace(reward=Reward(value, {"own": 3}))


@pytest.mark.parametrize(("length", "taken"), CASES)
@pytest.mark.parametrize("penalty", [1.0, 0.3])
def test_the_penalty_rises_over_the_last_tokens(length, taken, penalty):
    [found] = overlong.penalized([sample(length)], 100, 20, penalty)
    assert found.reward.value == pytest.approx(1 - penalty * taken)
    details = {"own": 3} | ({"overlong": pytest.approx(penalty * taken)} if taken else {})
    assert found.reward.details == details


def test_a_sample_without_a_reward_stays_without_one():
    samples = overlong.penalized([sample(100, None), sample(90), sample(1)], 100, 20, 1.0)
    assert [s.reward.value for s in samples] == [None, 0.5, 1.0]
    assert overlong.metrics(samples) == {"reward/overlong_penalty": (0.5, 2)}
