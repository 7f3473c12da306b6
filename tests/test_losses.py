"""The GRPO family against its papers' formulas in float64 loops, and identities of the sums."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.losses import group_advantages, policy_loss
from tests.compare import close
from tests.policy_reference import (
    LOSS_TYPES,
    NUMBERS,
    OPTIONS,
    ROWS,
    differences,
    make,
    policy_batch,
    reference,
)


@jax.jit(static_argnums=2)
def loss_and_grad(logprobs, batch, options):
    def total(logprobs):
        loss, metrics = policy_loss(logprobs, batch, options)
        return loss[0], (loss[1], metrics)

    (value, (weight, metrics)), grad = jax.value_and_grad(total, has_aux=True)(logprobs)
    return (value, weight), metrics, grad


def one_token(logprob, advantage, rollout=None, old=None, ref=None):
    """Returns log-probabilities and a batch of one prompt token and one trained token."""

    def row(value):
        return None if value is None else np.array([[0.0, value]], np.float32)

    batch = policy_batch(
        np.array([[0, 1]], np.int32),
        advantages=row(advantage),
        rollout_logprobs=row(logprob if rollout is None else rollout),
        old_logprobs=row(old),
        ref_logprobs=row(ref),
    )
    return row(logprob), batch


@pytest.mark.parametrize("own_old", [False, True], ids=["old", "own_old"])
@pytest.mark.parametrize("sampling", ["none", "token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_value_metrics_and_gradient_equal_the_paper(loss_type, sampling, own_old):
    logprobs, batch = make(seed=2)
    batch = batch._replace(old_logprobs=None) if own_old else batch
    options = OPTIONS._replace(loss_type=loss_type, importance_sampling=sampling)
    total, weight, means = reference(np.float64(logprobs), batch, options)
    found, metrics, grad = loss_and_grad(logprobs, batch, options)
    close(found, (total, weight))
    close({k: s / w for k, (s, w) in metrics.items()}, means)
    assert metrics.keys() == means.keys()
    close(grad, differences(logprobs, batch, options))


@pytest.mark.parametrize(
    ("change", "loss_types"),
    [
        (dict(kl_estimator="unbiased", beta=0.3), ("grpo", "gspo", "cispo")),
        (dict(kl_estimator="in_reward", beta=0.3), ("dr_grpo", "gspo", "gspo_token", "cispo")),
        (dict(delta=1.35), ("grpo", "dapo")),
        (dict(importance_sampling_mode="mask", importance_sampling="token"), ("dapo",)),
        (dict(importance_sampling_mode="mask", importance_sampling="sequence"), ("grpo", "cispo")),
        (dict(loss_divisor="all"), ("grpo", "dr_grpo", "gspo_token")),
    ],
    ids=str,
)
def test_further_options_equal_their_formulas(change, loss_types):
    logprobs, whole = make(seed=2, spread=0.8)
    for loss_type, own_old in itertools.product(loss_types, (False, True)):
        batch = whole._replace(old_logprobs=None) if own_old else whole
        options = OPTIONS._replace(loss_type=loss_type, **change)
        total, weight, means = reference(np.float64(logprobs), batch, options)
        found, metrics, grad = loss_and_grad(logprobs, batch, options)
        close(found, (total, weight))
        close({k: s / w for k, (s, w) in metrics.items()}, means)
        assert metrics.keys() == means.keys()
        close(grad, differences(logprobs, batch, options))
        if not own_old:
            plain = options._replace(**{name: getattr(OPTIONS, name) for name in change})
            assert reference(np.float64(logprobs), batch, plain)[:2] != (total, weight)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_compared_batch_has_both_clipped_and_free_terms(loss_type):
    logprobs, batch = make(seed=2)
    options = OPTIONS._replace(loss_type=loss_type, importance_sampling="sequence")
    means = reference(np.float64(logprobs), batch, options)[2]
    assert {-1.0, 1.0} == set(np.sign(batch.advantages[batch.loss_mask]))
    assert 0.1 < means["policy/clip_frac"] < 0.9
    assert 0.1 < means["rollout/importance_capped_frac"] < 0.9


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),
        (1.5, 2.0, -2 * 1.28, 0.0, 1),  # good and already likelier: no further
        (1.5, -2.0, 3.0, 3.0, 0),  # bad and likelier: pushed back
        (0.5, 2.0, -1.0, -1.0, 0),  # good and less likely: pulled up
        (0.5, -2.0, 2 * 0.8, 0.0, 1),  # bad and already less likely: no further
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_clipping_by_hand(ratio, advantage, value, slope, clipped):
    logprobs, batch = one_token(-1.0, advantage, old=-1.0 - np.log(ratio))
    for loss_type in ("grpo", "bnpo", "dapo", "gspo", "gspo_token"):
        options = OPTIONS._replace(loss_type=loss_type, beta=0.0)
        found, metrics, grad = loss_and_grad(logprobs, batch, options)
        close(found, (value, 1))
        close(grad[0, 1], slope)
        close(metrics["policy/clip_frac"], (clipped, 1))
        close(metrics["policy/ratio_mean"], (ratio, 1))


@pytest.mark.parametrize("ratio", [1.0, 1.5, 0.5, 0.01])
def test_cispo_keeps_the_gradient_of_every_token(ratio):
    logprobs, batch = one_token(-1.0, 2.0, old=-1.0 - np.log(ratio))
    options = OPTIONS._replace(loss_type="cispo", beta=0.0, epsilon_low=10.0)
    found, metrics, grad = loss_and_grad(logprobs, batch, options)
    weight = min(ratio, 1.28)
    close(found, (2 * weight, 1))
    close(grad[0, 1], -2 * weight)
    close(metrics["policy/clip_frac"], (float(ratio > 1.28), 1))


def test_no_clipping_at_the_ratio_one_even_with_bounds_of_zero_width():
    logprobs, batch = one_token(-1.0, 2.0)
    options = OPTIONS._replace(beta=0.0, epsilon_low=0.0, epsilon_high=0.0)
    found, _, grad = loss_and_grad(logprobs, batch, options)
    close(found, (-2, 1))
    close(grad[0, 1], -2)


def test_a_clipped_ratio_may_overflow():
    logprobs, batch = one_token(-1.0, 2.0, old=-200.0)
    found, _, grad = loss_and_grad(logprobs, batch, OPTIONS._replace(beta=0.0))
    close(found, (-2 * 1.28, 1))
    close(grad[0, 1], 0.0)


def test_importance_weight_scales_the_policy_term_and_not_the_kl():
    # The trainer finds the token twice as likely as the engine, the reference half as likely.
    half = np.log(0.5)
    logprobs, batch = one_token(-1.0, 3.0, rollout=-1.0 + half, ref=-1.0 + half)
    kl = 0.5 - half - 1
    for cap, weight in [(5.0, 2.0), (1.5, 1.5)]:
        for sampling in ("token", "sequence"):
            options = OPTIONS._replace(
                beta=0.1, importance_sampling=sampling, importance_sampling_cap=cap
            )
            found, metrics, grad = loss_and_grad(logprobs, batch, options)
            close(found, (-3 * weight + 0.1 * kl, 1))
            close(grad[0, 1], -3 * weight + 0.1 * (1 - 0.5))
            close(metrics["loss/kl"], (kl, 1))
            close(metrics["rollout/importance_weight"], (weight, 1))
            close(metrics["rollout/importance_capped_frac"], (float(cap < 2), 1))
            close(metrics["rollout/mismatch_kl"], (2 + half - 1, 1))


def test_an_importance_weight_beyond_float32_is_the_cap():
    logprobs, batch = one_token(-1.0, 3.0, rollout=-200.0)
    options = OPTIONS._replace(beta=0.0, importance_sampling="sequence")
    found, _, grad = loss_and_grad(logprobs, batch, options)
    close(found, (-3 * 1.25, 1))
    close(grad[0, 1], -3 * 1.25)


@pytest.mark.parametrize(
    ("loss_type", "weight"),
    [
        ("grpo", 7),
        ("gspo", 7),
        ("gspo_token", 7),
        ("bnpo", 24),
        ("dapo", 24),
        ("cispo", 24),
        ("dr_grpo", 7 * 50),
    ],
)
def test_weights_count_what_is_trained(loss_type, weight):
    logprobs, batch = make()
    found, metrics, _ = loss_and_grad(logprobs, batch, OPTIONS._replace(loss_type=loss_type))
    assert found[1] == metrics["loss/policy"][1] == metrics["loss/kl"][1] == weight
    assert metrics["policy/kl"][1] == metrics["rollout/mismatch_kl"][1] == 24


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equal_rewards_give_no_policy_gradient(loss_type):
    logprobs, batch = make()
    advantages = group_advantages(np.full((len(ROWS), 4), 0.1), "group")
    batch = batch._replace(advantages=np.take_along_axis(advantages, batch.sequence_ids, axis=1))
    options = OPTIONS._replace(loss_type=loss_type, beta=0.0, importance_sampling="token")
    found, _, grad = loss_and_grad(logprobs, batch, options)
    assert found[0] == 0
    assert not grad.any()


@pytest.mark.parametrize("sampling", ["none", "token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_microbatches_add_up_to_the_whole(loss_type, sampling):
    logprobs, batch = make()
    options = OPTIONS._replace(loss_type=loss_type, importance_sampling=sampling)
    whole, whole_metrics, whole_grad = loss_and_grad(logprobs, batch, options)
    parts = [
        loss_and_grad(*jax.tree.map(lambda x, r=rows: x[r], (logprobs, batch)), options)
        for rows in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    sums = jax.tree.map(lambda *x: sum(x), *[(loss, metrics) for loss, metrics, _ in parts])
    close(sums, (whole, whole_metrics), 1e-6)
    close(np.concatenate([grad for _, _, grad in parts]), whole_grad, 1e-6)


@pytest.mark.parametrize("sampling", ["none", "token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_completions_of_one_row_equal_completions_in_rows_of_their_own(loss_type, sampling):
    logprobs, batch = make()
    alone = [[trained] for completions in ROWS for trained in completions]
    apart_logprobs, apart = make(seed=1, rows=alone)
    shared, own = np.nonzero(batch.sequence_ids), np.nonzero(apart.sequence_ids)
    apart_logprobs[own] = logprobs[shared]
    for name in NUMBERS:
        getattr(apart, name)[own] = getattr(batch, name)[shared]
    options = OPTIONS._replace(loss_type=loss_type, importance_sampling=sampling)
    loss, metrics, grad = loss_and_grad(logprobs, batch, options)
    apart_loss, apart_metrics, apart_grad = loss_and_grad(
        apart_logprobs, apart, options._replace(num_sequences=1)
    )
    close((apart_loss, apart_metrics), (loss, metrics), 1e-6)
    close(np.asarray(apart_grad)[own], np.asarray(grad)[shared], 1e-6)


@pytest.mark.parametrize("own_old", [False, True], ids=["old", "own_old"])
@pytest.mark.parametrize("sampling", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_is_not_trained_never_matters(loss_type, sampling, own_old):
    logprobs, batch = make()
    batch = batch._replace(old_logprobs=None) if own_old else batch
    options = OPTIONS._replace(loss_type=loss_type, importance_sampling=sampling)
    clean = np.where(batch.loss_mask, logprobs, 0).astype(np.float32)
    dirty = {
        name: np.where(batch.loss_mask, getattr(batch, name), np.nan).astype(np.float32)
        for name in NUMBERS
        if getattr(batch, name) is not None
    }
    expected = loss_and_grad(clean, batch, options)
    assert np.isfinite(jax.tree.reduce(lambda a, b: a + jnp.sum(b), expected, 0.0))
    assert not np.asarray(expected[2])[~batch.loss_mask].any()
    for found in (
        loss_and_grad(logprobs, batch, options),
        loss_and_grad(logprobs, batch._replace(**dirty), options),
    ):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("sampling", ["none", "token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_batch_without_trained_tokens_is_zero(loss_type, sampling):
    logprobs, batch = make()
    batch = batch._replace(loss_mask=np.zeros_like(batch.loss_mask))
    options = OPTIONS._replace(loss_type=loss_type, importance_sampling=sampling)
    loss, metrics, grad = loss_and_grad(logprobs, batch, options)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves((loss, metrics, grad)))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_without_reference_there_is_no_kl(loss_type):
    logprobs, batch = make()
    options = OPTIONS._replace(loss_type=loss_type, beta=0.0)
    (total, _), metrics, _ = loss_and_grad(logprobs, batch._replace(ref_logprobs=None), options)
    assert not {"loss/kl", "policy/kl"} & metrics.keys()
    assert total == metrics["loss/policy"][0]
    measured, more, _ = loss_and_grad(logprobs, batch, options)
    close(measured[0], total)
    assert more["loss/kl"][0] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(beta=0.1), "beta=0.1; compute ref_logprobs"),
        (dict(loss_type="ppo"), "loss_type='ppo' must be one of grpo, bnpo"),
        (dict(importance_sampling="tis"), "importance_sampling='tis' must be one of none"),
    ],
)
def test_options_that_cannot_be_computed_are_refused(change, message):
    logprobs, batch = one_token(-1.0, 1.0)
    with pytest.raises(ValueError, match=message):
        policy_loss(jnp.asarray(logprobs), batch, OPTIONS._replace(**{"beta": 0.0} | change))
