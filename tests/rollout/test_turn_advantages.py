"""Rewards of an episode's turns: how they are given, compared, and added to tokens."""

import json

import numpy as np
import pytest

from atlas_jax import losses
from atlas_jax.rollout import record, stored, turn_advantages
from atlas_jax.rollout.rows import collate_policy, token_advantages
from atlas_jax.types import Completion, Question, Reward, Sample
from tests.rollout.scripts import Script
from tests.rollout.test_episodes import talk


def sample(length, turns, value=1.0, place=0, **more):
    zeros = (0.0,) * length
    text = Completion((8, 9), (7,) * length, zeros, zeros, "stop", "", 0, turn_rewards=turns)
    made = Sample(Question("q", "", "", {}), text, place=place, trains=True, **more)
    return made._replace(reward=Reward(value, {}))


def test_an_episode_rewards_its_turns():
    async def ask(policy, question):
        with pytest.raises(ValueError, match="no turn to reward; await"):
            policy.reward(1)
        await policy.say(question.text)
        policy.reward(1)
        policy.reward(0.5)
        await policy.say("unrewarded")
        await policy.say("more")
        with pytest.raises(ValueError, match="reward of a turn is nan; use"):
            policy.reward(float("nan"))
        policy.reward(-2)

    [found] = talk(ask, Script(lambda *_: "ab"))
    assert found.completion.finish_reason == "stop"
    first, last = 3, found.completion.num_tokens
    assert found.completion.turn_rewards == ((first, 1.5), (last, -2.0))


def test_turns_are_compared_within_their_question_and_count_for_the_tokens_before():
    """The turns 1, 0 and 0.5 have the mean 0.5 and, with ddof 1, the deviation 0.5."""
    a = sample(5, ((2, 1.0), (5, 0.0)), advantage=2.0)
    b = sample(4, ((3, 0.5),), advantage=-1.0)
    unscored = sample(4, ((4, 100.0),), value=None)
    other = sample(2, ((2, 7.0),), place=1, advantage=3.0)
    group = [a, b, unscored, other]
    expected = {
        "none": [((2, 0.5), (5, -0.5)), ((3, 0.0),)],
        "group": [((2, 0.5 / 0.5001), (5, -0.5 / 0.5001)), ((3, 0.0),)],
    }
    for scale, turns in expected.items():
        found = turn_advantages.add(group, lambda r, s=scale: losses.group_advantages(r, s))
        for one, pairs in zip(found, turns, strict=False):
            np.testing.assert_allclose(one.turn_advantages, pairs, rtol=1e-6)
        assert (found[2].turn_advantages, found[3].turn_advantages) == ((), ((2, 0.0),))
    plain = turn_advantages.add(group, lambda r: losses.group_advantages(r, "none"))
    # Turn 1 of a gets 0.5 for itself and -0.5 for what came after it.
    assert token_advantages(plain[0]).tolist() == [2.0, 2.0, 1.5, 1.5, 1.5]
    assert token_advantages(plain[1]).tolist() == [-1.0] * 4
    batch = collate_policy(plain[:2], 2, 12)
    assert batch.advantages.tolist() == [[0, 0, 2, 2, 1.5, 1.5, 1.5, -1, -1, -1, -1, 0]]
    assert turn_advantages.differ(group[:2]) and not turn_advantages.differ([b])
    assert turn_advantages.metrics(group[:2]) == {"reward/turn_mean": (1.5, 3)}


def test_episodes_without_rewards_of_turns_stay_as_they_are():
    plain = [sample(3, (), advantage=1.0), sample(2, (), place=1)]
    assert turn_advantages.add(plain, pytest.fail) == plain


def test_a_record_keeps_what_a_replay_needs(tmp_path):
    before = sample(5, ((2, 1.0), (5, 0.0)), turn_advantages=((2, 0.5), (5, -0.5)))
    record.write(str(tmp_path), 1, 0, [before], record.StepFacts(1, 1))
    [after] = stored.read(tmp_path / "rollouts", 1).samples
    assert after.turn_advantages == before.turn_advantages
    assert after.completion.turn_rewards == before.completion.turn_rewards
    path = tmp_path / "rollouts" / "step_000001_process_0.jsonl"
    line = json.loads(path.read_text())
    del line["turn_advantages"], line["completion"]["turn_rewards"]  # of earlier versions
    path.write_text(json.dumps(line) + "\n")
    [old] = stored.read(tmp_path / "rollouts", 1).samples
    assert (old.turn_advantages, old.completion.turn_rewards) == ((), ())
