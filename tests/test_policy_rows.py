"""Completions that share their prompt's row compute what completions in rows of their own do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from atlas_jax import logprobs
from atlas_jax.config import MeshConfig
from atlas_jax.losses import policy_loss
from atlas_jax.models import attention, splash
from atlas_jax.policy_logprobs import policy_logprobs
from atlas_jax.recipes.grpo import fit_attention
from atlas_jax.recipes.layout import Layout
from atlas_jax.rollout.rows import collate_policy
from atlas_jax.types import Completion, PolicyBatch, Question, Sample
from tests import tiny
from tests.compare import close
from tests.policy_reference import OPTIONS

ONE = jax.devices()[:1]
CUBE = MeshConfig(data=2, fsdp=2, tensor=2)
FAMILY = "qwen3"
SIZES = [[7, 1, 4], [3, 0, 12], [9, 9, 2], [5, 6, 1]]  # tokens of each completion; 0: it failed
PROMPTS = [6, 1, 4, 9]
UNTRAINED = (2, 1)  # a completion that has tokens and is not trained on
TEMPERATURE = 0.7
QUESTION = Question("q", "?", "", {})


def scored(prompt, tokens, advantage=0.0, trains=True, rollout=None):
    rollout = (0.0,) * len(tokens) if rollout is None else rollout
    reason = "stop" if tokens else "error: the engine is away"
    completion = Completion(tuple(prompt), tuple(tokens), rollout, rollout, reason, "", 0)
    trains = trains and bool(tokens)
    return Sample(QUESTION, completion, advantage=advantage, trains=trains)


def flat(groups):
    return [sample for group in groups for sample in group]


def make_groups(seed=0):
    """Returns random groups of the sizes above."""
    rng = np.random.default_rng(seed)
    groups = []
    for g, (prompt_size, sizes) in enumerate(zip(PROMPTS, SIZES, strict=True)):
        prompt = rng.integers(1, 400, prompt_size).tolist()
        groups.append(
            [
                scored(
                    prompt,
                    rng.integers(1, 400, size).tolist(),
                    float(rng.normal()),
                    (g, i) != UNTRAINED,
                    tuple(-rng.exponential(6.0, size)),
                )
                for i, size in enumerate(sizes)
            ]
        )
    return groups


def places(batch, per_row):
    """Returns {(group, completion): (row, places of its tokens)} of a collated batch."""
    found = {}
    for g in range(len(SIZES)):
        for i in range(3):
            row, number = g * (3 // per_row) + i // per_row, i % per_row + 1
            found[g, i] = row, np.nonzero(batch.sequence_ids[row] == number)[0]
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.save(FAMILY, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one(saved):
    return tiny.load(saved, devices=ONE)


def head(decoder, temperature=TEMPERATURE):
    return logprobs.Head(decoder.sharding, 16, temperature, with_entropy=True)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def compiled(decoder, per_row, share, params, batch):
    options = OPTIONS._replace(beta=0.0, importance_sampling="sequence", num_sequences=per_row)

    def total(params):
        shared = batch.sequence_ids if share else None
        hidden = decoder.hidden(params, batch.tokens, batch.positions, batch.segment_ids, shared)
        table = decoder.output_table(params)
        found, entropy = policy_logprobs(hidden, table, batch, head(decoder))
        (loss, weight), _ = policy_loss(found, batch, options)
        return loss, (found, entropy, weight)

    return jax.value_and_grad(total, has_aux=True)(params)


def evaluate(model, batch, per_row, share=True):
    """Returns log-probabilities, entropies, the loss with its weight, and the gradient."""
    (loss, (found, entropy, weight)), grads = jax.device_get(
        compiled(model[0], per_row, share, model[1], batch)
    )
    return found, entropy, (loss, weight), grads


def same_completions(found, found_batch, per_row, expected, expected_batch, expected_per_row):
    """Compares log-probabilities and entropies, completion by completion."""
    ours, theirs = places(found_batch, per_row), places(expected_batch, expected_per_row)
    for key, (row, at) in ours.items():
        other_row, other_at = theirs[key]
        assert len(at) == len(other_at) == SIZES[key[0]][key[1]]
        for x, y in zip(found[:2], expected[:2], strict=True):
            np.testing.assert_allclose(x[row, at], y[other_row, other_at], atol=2e-5)


@pytest.fixture(scope="module")
def apart(one):
    """Rows of one completion each."""
    batch = collate_policy(flat(make_groups()), 1, 24)
    return batch, evaluate(one, batch, 1, share=False)


def test_collate_policy_by_hand():
    groups = [
        [
            scored([5, 6], [7, 8], 0.5, True, (-1.0, -2.0)),
            scored([5, 6], [9], -0.5, True, (-3.0,)),
        ],
        [scored([4], [], 0.25), scored([4], [3, 2], -0.25, False, (-4.0, -5.0))],
    ]
    found = collate_policy(flat(groups), 2, 6)
    np.testing.assert_array_equal(found.tokens, [[5, 6, 7, 8, 9, 0], [4, 3, 2, 0, 0, 0]])
    np.testing.assert_array_equal(found.positions, [[0, 1, 2, 3, 2, 0], [0, 1, 2, 0, 0, 0]])
    np.testing.assert_array_equal(found.segment_ids, [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(found.sequence_ids, [[0, 0, 1, 1, 2, 0], [0, 2, 2, 0, 0, 0]])
    np.testing.assert_array_equal(found.loss_mask, [[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(found.advantages, [[0, 0, 0.5, 0.5, -0.5, 0], [0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(
        found.rollout_logprobs, [[0, 0, -1, -2, -3, 0], [0, 0, 0, 0, 0, 0]]
    )
    assert found.old_logprobs is None
    assert found.ref_logprobs is None


def test_collate_policy_repeats_the_prompt_in_each_row():
    group = [scored([5, 6], tokens) for tokens in ([7, 8], [9], [], [3])]
    found = collate_policy(group, 2, 5)
    np.testing.assert_array_equal(found.tokens, [[5, 6, 7, 8, 9], [5, 6, 3, 0, 0]])
    np.testing.assert_array_equal(found.sequence_ids, [[0, 0, 1, 1, 2], [0, 0, 2, 0, 0]])
    assert collate_policy(group, 1, 5).tokens.shape == (4, 5)


def test_a_row_without_room_is_refused():
    group = [scored([5, 6], [7, 8]), scored([5, 6], [9])]
    with pytest.raises(ValueError, match="row 0 holds 5 tokens, but has room for 4"):
        collate_policy(group, 2, 4)


def test_rows_of_one_equal_transformers(apart):
    batch, (found, *_) = apart
    model = tiny.hf_model(FAMILY)
    for (g, i), (row, at) in places(batch, 1).items():
        if batch.loss_mask[row, at].any():
            tokens = torch.tensor(batch.tokens[row, : at[-1] + 1][None], dtype=torch.long)
            with torch.no_grad():
                logits = model(tokens).logits[0] / TEMPERATURE
            expected = logits.log_softmax(-1)[at - 1, batch.tokens[row, at]].numpy()
            np.testing.assert_allclose(found[row, at], expected, atol=1e-4, err_msg=f"{g} {i}")


def test_shared_prompts_equal_rows_of_one(one, apart):
    batch = collate_policy(flat(make_groups()), 3, 32)
    found = evaluate(one, batch, 3)
    same_completions(found, batch, 3, apart[1], apart[0], 1)
    close(found[2:], apart[1][2:])
    assert found[2][1] == 10  # completions that train: not the failed one, not the untrained one


@pytest.mark.parametrize("per_row", [1, 3])
def test_meshes_agree(saved, apart, per_row):
    batch = collate_policy(flat(make_groups()), per_row, 32)
    found = evaluate(tiny.load(saved, CUBE), batch, per_row)
    same_completions(found, batch, per_row, apart[1], apart[0], 1)
    close(found[2:], apart[1][2:])


def test_the_untrained_and_the_padding_never_matter(one):
    groups = make_groups()
    batch = collate_policy(flat(groups), 3, 32)
    expected = evaluate(one, batch, 3)
    rng = np.random.default_rng(1)
    g, i = UNTRAINED
    changed = rng.integers(1, 400, SIZES[g][i]).tolist()
    groups[g][i] = scored(groups[g][i].completion.prompt_ids, changed, 7.0, trains=False)
    other = collate_policy(flat(groups), 3, 32)
    blank = other.segment_ids == 0
    other.tokens[blank] = rng.integers(1, 400, blank.sum())
    other.positions[blank] = rng.integers(0, 99, blank.sum())
    for numbers in (other.advantages, other.rollout_logprobs):
        numbers[~other.loss_mask] = np.nan
    found = evaluate(one, other, 3)
    for x, y in zip(found[:2], expected[:2], strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x[batch.loss_mask], y[batch.loss_mask], atol=1e-5)
    close(found[2:], expected[2:])


def test_a_failed_completion_contributes_nothing(one):
    groups = make_groups()
    whole = collate_policy(flat(groups), 3, 32)
    g, i = 1, 1
    assert not groups[g][i].completion.token_ids
    rest = [list(group) for group in groups]
    rest[g].append(rest[g].pop(i))  # behind the others it takes no number between theirs
    found, expected = evaluate(one, whole, 3), evaluate(one, collate_policy(flat(rest), 3, 32), 3)
    for x, y in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(x[whole.loss_mask], y[whole.loss_mask], atol=1e-6)
    close(found[2:], expected[2:], 1e-6)


def test_a_row_of_failed_completions_has_no_loss_and_no_gradient(one):
    failed = [[scored([5, 6, 7], [], 0.5)] * 3] * 4
    found, entropy, (loss, weight), grads = evaluate(one, collate_policy(flat(failed), 3, 32), 3)
    assert np.isfinite(found).all()
    assert np.isfinite(entropy).all()
    assert loss == weight == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_a_completion_sees_no_other(one):
    decoder, params = one
    batch = collate_policy(flat(make_groups()), 3, 32)
    run = jax.jit(decoder.hidden)
    before = np.asarray(run(params, *batch[:4]))
    row, number = 2, 1
    mine = batch.sequence_ids[row] == number
    batch.tokens[row, mine] = batch.tokens[row, mine] % 399 + 1
    differs = np.any(np.asarray(run(params, *batch[:4])) != before, axis=-1)
    np.testing.assert_array_equal(differs[row], mine)
    assert not np.delete(differs, row, axis=0).any()


def test_log_probabilities_and_entropy_equal_plain_computation_at_any_temperature(saved):
    batch = collate_policy(flat(make_groups()), 3, 32)
    for mesh, devices in ((MeshConfig(), ONE), (CUBE, None)):
        decoder, params = tiny.load(saved, mesh, devices)
        table = decoder.output_table(params)
        hidden = jax.jit(decoder.hidden)(params, *batch[:4])
        logits = np.float64(hidden) @ np.float64(table).T
        for temperature in (1.0, 0.5, 3.0):
            run = jax.jit(policy_logprobs, static_argnums=3)
            found, entropy = run(hidden, table, batch, head(decoder, temperature))
            plain = logits / temperature
            plain = plain - np.log(np.exp(plain).sum(-1, keepdims=True))
            for row, t in np.argwhere(batch.loss_mask):
                number = batch.sequence_ids[row, t]
                first = np.argmax(batch.sequence_ids[row] == number)
                before = plain[row, PROMPTS[row] - 1 if t == first else t - 1]
                expected = before[batch.tokens[row, t]]
                np.testing.assert_allclose(found[row, t], expected, rtol=1e-5)
                expected = -np.sum(np.exp(before) * before)
                np.testing.assert_allclose(entropy[row, t], expected, rtol=1e-4)


def test_gradients_equal_plain_computation_at_a_temperature(one):
    decoder, params = one
    batch = collate_policy(flat(make_groups()), 1, 24)
    batch = PolicyBatch(*(None if x is None else jnp.asarray(x) for x in batch))
    table = decoder.output_table(params)
    hidden = jax.jit(decoder.hidden)(params, *batch[:3])

    def ours(hidden, table):
        found, _ = policy_logprobs(hidden, table, batch, head(decoder))
        return jnp.sum(jnp.where(batch.loss_mask, found, 0.0))

    def plain(hidden, table):  # a row of one: the token before is the place before
        found = jax.nn.log_softmax(hidden @ table.T / TEMPERATURE)[:, :-1]
        picked = jnp.take_along_axis(found, batch.tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(batch.loss_mask[:, 1:], picked, 0.0))

    found, expected = (jax.jit(jax.grad(f, (0, 1)))(hidden, table) for f in (ours, plain))
    close(found, expected)


def test_splash_of_an_unknown_interface_gives_each_completion_its_own_prompt(tmp_path, monkeypatch):
    layout = Layout(questions=1, per_row=4, microbatches=1, buckets=(64, 128))
    decoder, _ = tiny.load(tiny.save("qwen3", tmp_path), MeshConfig(), ONE)
    decoder = dataclasses.replace(decoder, attention=attention.Splash(decoder.sharding.mesh))
    for known, per_row in ((True, 4), (False, 1)):
        monkeypatch.setattr(splash, "is_known", lambda known=known: known)
        assert fit_attention(layout, decoder).per_row == per_row


def test_a_window_shorter_than_a_row_gives_each_completion_its_own_prompt(tmp_path):
    layout = Layout(questions=1, per_row=4, microbatches=1, buckets=(64, 128))
    for family, per_row in (("gemma3", 1), ("mistral_window", 1), ("qwen3", 4)):
        decoder, _ = tiny.load(tiny.save(family, tmp_path / family), devices=ONE)
        assert fit_attention(layout, decoder).per_row == per_row
