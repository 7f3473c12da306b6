"""Completions that several weights wrote, by hand: who wrote each token, its lag and its weight."""

import contextlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import losses
from atlas_jax.config import GRPOConfig
from atlas_jax.rollout import measures, record
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.rows import collate_policy
from atlas_jax.rollout.servers import PoolOptions, ServerPool
from atlas_jax.rollout.vllm import VllmEngine
from atlas_jax.types import Question, Sample
from tests import words
from tests.rollout import test_episodes
from tests.rollout.scripts import Script

STEP = 4  # of the weights that are trained
LABELS = {"3.0": 3, "3.1": 3, "4.0": 4}  # the second is a push that was tried again
SAMPLED = ([0.5, 0.1, 0.25], [0.5, 0.5])  # the probabilities with which the engine drew
TRAINED = ([0.25, 0.4, 0.25], [0.5, 0.4])  # those of the weights of STEP


def reply(probabilities, *spans):
    """Returns what vLLM answers of tokens 1, 2, … that (label, start, end) wrote."""
    tokens = list(range(1, len(probabilities) + 1))
    content = [
        {"token_id": t, "logprob": math.log(p)} for t, p in zip(tokens, probabilities, strict=True)
    ]
    choice = {
        "token_ids": tokens, "finish_reason": "length", "logprobs": {"content": content},
        "weight_versions": [
            {"version": label, "start": start, "end": end} for label, start, end in spans
        ],
    }  # fmt: skip
    return {"choices": [choice]}


def read(probabilities, *spans):
    pool = ServerPool("teacher", ["http://localhost:1"], PoolOptions(1, 1.0, 1.0))  # never asked
    engine = VllmEngine(pool, words.tokenizer(("a", "b", "c")), (0,), 10)
    with contextlib.closing(pool):
        return engine.read(Request((7, 8), 9, seed=0), reply(probabilities, *spans), LABELS)


@pytest.fixture
def samples():
    """One completion that version 3 began and 4 ended, and one that 4 wrote."""
    first = read(SAMPLED[0], ("3.0", 0, 1), ("3.1", 1, 2), ("4.0", 2, 3))
    second = read(SAMPLED[1], ("4.0", 0, 2))
    question = Question("q", "?", "", {})
    return [
        Sample(question, first, advantage=1.0, trains=True),
        Sample(question, second, advantage=-1.0, trains=True, member=1),
    ]


def test_each_token_has_the_version_of_the_weights_that_wrote_it(samples):
    first, second = (sample.completion for sample in samples)
    assert first.version_spans == ((3, 2), (4, 1))
    assert first.token_versions == (3, 3, 4)
    assert (first.weights_version, second.weights_version) == (3, 4)
    assert second.token_versions == (4, 4)
    stored = json.loads(json.dumps(record.as_record(STEP + 1, samples[0])))
    assert stored["completion"]["version_spans"] == [[3, 2], [4, 1]]
    assert measures.of_generation(samples, STEP)["rollout/version_lag"] == (1 + 1 + 0 + 0 + 0, 5)
    assert measures.of_generation(samples, STEP)["rollout/version_lag_max"] == (1, 1)


@pytest.mark.parametrize(
    "spans",
    [
        (), (("4.0", 0, 2),), (("4.0", 1, 3),), (("3.0", 0, 1), ("4.0", 2, 3)),
        (("3.0", 0, 2), ("4.0", 1, 3)), (("3.0", 0, 0), ("4.0", 0, 3)), (("3.0", 0, 4),),
    ],
)  # fmt: skip
def test_versions_that_leave_a_token_without_one_are_an_error(spans):
    found = read(SAMPLED[0], *spans)
    assert "do not cover its tokens" in found.finish_reason
    assert found.is_failed


@pytest.mark.parametrize("per_row", [1, 2])
def test_importance_weights_and_lags_of_two_versions_are_those_worked_by_hand(samples, per_row):
    batch = jax.tree.map(jnp.asarray, collate_policy(samples, per_row, 8, STEP))
    lags = np.asarray(batch.version_lags)[np.asarray(batch.loss_mask)]
    assert lags.tolist() == [1, 1, 0, 0, 0]
    logprobs = jnp.zeros(batch.tokens.shape)
    trained = jnp.log(jnp.asarray([*TRAINED[0], *TRAINED[1]]))
    places = np.nonzero(np.asarray(batch.loss_mask))
    logprobs = logprobs.at[places].set(trained)
    options = losses.PolicyOptions.of(GRPOConfig(beta=0.0), 8, per_row)

    def loss(logprobs):
        (total, weight), values = losses.policy_loss(logprobs, batch, options)
        return total, (weight, values)

    (total, (weight, values)), slopes = jax.value_and_grad(loss, has_aux=True)(logprobs)
    # Trained over sampled: 0.25/0.5, 0.4/0.1 (cut at 2), 0.25/0.25; 0.5/0.5, 0.4/0.5.
    weights = [0.5, 2.0, 1.0, 1.0, 0.8]
    assert float(total) == pytest.approx(-(0.5 + 2.0 + 1.0) / 3 + (1.0 + 0.8) / 2, abs=1e-6)
    assert float(weight) == 2
    by_hand = [-weights[0] / 3, -weights[1] / 3, -weights[2] / 3, weights[3] / 2, weights[4] / 2]
    np.testing.assert_allclose(np.asarray(slopes)[places], by_hand, rtol=1e-6)
    found = {name: [float(x) for x in pair] for name, pair in values.items()}
    assert found["rollout/importance_weight"] == pytest.approx([sum(weights), 5], rel=1e-6)
    assert found["rollout/importance_capped_frac"] == [1, 5]
    # The k3 estimate of a ratio r is r - 1 - ln r, before the cut.
    k3 = [r - 1 - math.log(r) for r in (0.5, 4.0, 1.0, 1.0, 0.8)]
    assert found["rollout/mismatch_kl"] == pytest.approx([sum(k3), 5], rel=1e-5)
    assert found["rollout/fresh_mismatch_kl"] == pytest.approx([k3[4], 3], rel=1e-5)


def test_turns_of_an_episode_keep_the_versions_that_wrote_them():
    async def ask(policy, question):
        await policy.say(question.text)
        await policy.say("more")

    script = Script(lambda prompt, _: "yz" if "more" in prompt else "x", version=3)
    generate = script._generate

    def newer(requests, sampling):
        found = generate(requests, sampling)
        script._version = 4  # the weights change between the turns
        return found

    script._generate = newer
    [sample] = test_episodes.talk(ask, script)
    completion = sample.completion
    read_only = completion.num_tokens - completion.num_sampled
    assert completion.version_spans == ((3, 2), (4, read_only + 3))
    assert completion.weights_version == 3
    assert measures.of_generation([sample], STEP)["rollout/version_lag"] == (2, 5)


def test_one_number_stands_for_all_tokens_of_a_completion_without_spans(samples):
    plain = samples[0].completion._replace(version_spans=())
    assert plain.token_versions == (3, 3, 3)
