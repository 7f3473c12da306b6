"""Options of the policy loss on three tokens, against numbers that were worked out by hand.

Completion a has the tokens a0 and a1, completion b has b0:

    token  pi    old   ref   r = pi/old  d = log(ref/pi)  A    w
    a0     0.5   0.4   0.25  1.25        -log 2            2   1.2
    a1     0.25  0.5   0.5   0.5          log 2            2   2
    b0     0.6   0.2   0.3   3           -log 2           -1   1

Ratios are clipped to 0.8 and 1.2. The policy terms are then a0: -min(2.5, 2.4), clipped; a1:
-min(1, 1.6) with the derivative -r A = -1; b0: -min(-3, -1.2) = 3 with the derivative 3. The mean
of a is -1.7, and the loss sum -1.7 + 3. A mean over the two tokens of a halves their derivatives.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import losses
from tests.policy_reference import OPTIONS, policy_batch

BASE = OPTIONS._replace(epsilon_high=0.2, beta=0.0)
PLACES = (0, slice(1, 4))


def row(*values):
    return jnp.asarray([[np.nan, *values, np.nan]], jnp.float32)


def make(advantages=(2.0, 2.0, -1.0)):
    pi, old, ref = (np.log(x) for x in ((0.5, 0.25, 0.6), (0.4, 0.5, 0.2), (0.25, 0.5, 0.3)))
    batch = policy_batch(
        jnp.asarray([[0, 1, 1, 2, 0]]),
        advantages=row(*advantages),
        rollout_logprobs=row(*(old - np.log([1.2, 2.0, 1.0]))),
        old_logprobs=row(*old),
        ref_logprobs=row(*ref),
    )
    return row(*pi), batch


def computed(options, **changes):
    logprobs, batch = make(**changes)

    def total(logprobs):
        (total, weight), metrics = losses.policy_loss(logprobs, batch, options)
        return total, (weight, metrics)

    (value, (weight, metrics)), grad = jax.value_and_grad(total, has_aux=True)(logprobs)
    assert grad[0, 0] == grad[0, 4] == 0
    return float(value), float(weight), np.asarray(grad[PLACES]), metrics


TABLE = {
    "plain": ({}, 1.3, 2, (0, -0.5, 3)),
    # b0 is cut at -delta A = 2 and has no derivative left.
    "delta": (dict(delta=2.0), 0.3, 2, (0, -0.5, 0)),
    # A third completion of the row trains nothing.
    "all": (dict(loss_divisor="all", num_sequences=3), 1.3, 3, (0, -0.5, 3)),
    "dr_grpo": (dict(loss_type="dr_grpo", num_sequences=3), -0.4, 2 * 50, (0, -1, 3)),
    "dr_grpo of all": (dict(loss_type="dr_grpo", loss_divisor="all", num_sequences=3),
                       -0.4, 3 * 50, (0, -1, 3)),
    # exp(d) - d - 1 is 0.193147, 0.306853, 0.193147, and its derivative 1 - exp(d) is 1/2, -1, 1/2.
    "k3": (dict(beta=0.1), 1.344315, 2, (0.025, -0.55, 3.05)),
    # r k3 is 0.241434, 0.153426, 0.579442; its derivative -r d is 0.866434, -0.346574, 2.079442.
    "unbiased": (dict(beta=0.1, kl_estimator="unbiased"),
                 1.377687, 2, (0.043322, -0.517329, 3.207944)),
    # log(old/ref) is 0.470004, 0, -0.405465, and from each token on the same, since a1 adds 0. The
    # advantages become 1.953000, 2, -0.959453.
    "in_reward": (dict(beta=0.1, kl_estimator="in_reward"), 1.206561, 2, (0, -0.5, 2.878360)),
    "truncate": (dict(importance_sampling="token", importance_sampling_cap=1.5),
                 0.81, 2, (0, -0.75, 3)),
    "mask": (dict(importance_sampling="token", importance_sampling_mode="mask",
                  importance_sampling_cap=1.5), 1.56, 2, (0, 0, 3)),
    # The weight of completion a is 1.2 x 2 = 2.4.
    "sequence mask": (dict(importance_sampling="sequence", importance_sampling_mode="mask",
                           importance_sampling_cap=2.2), 3.0, 2, (0, 0, 3)),
    # The ratio of a is sqrt(1.25 x 0.5) = 0.790569, below the clip that its advantage ignores.
    "gspo": (dict(loss_type="gspo"), 1.418861, 2, (-0.790569, -0.790569, 3)),
    "gspo_token": (dict(loss_type="gspo_token"), 1.418861, 2, (-0.790569, -0.790569, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_loss_weight_and_gradient_are_those_of_the_table(name):
    change, total, weight, gradient = TABLE[name]
    found = computed(BASE._replace(**change))
    np.testing.assert_allclose(found[0], total, atol=2e-6)
    assert found[1] == weight
    np.testing.assert_allclose(found[2], gradient, atol=2e-6)


def test_the_kl_in_the_reward_is_that_of_the_tokens_from_each_on():
    """With pi = old: log(pi/ref) is log 2, -log 2, log 2, and from each token on 0, -log 2, log 2.

    The derivative of -(A - beta x sum) log pi is then -A + beta x sum.
    """
    logprobs, batch = make()
    batch = batch._replace(old_logprobs=None)
    options = BASE._replace(loss_type="dr_grpo", beta=0.1, kl_estimator="in_reward")
    grad = jax.grad(lambda x: losses.policy_loss(x, batch, options)[0][0])(logprobs)
    log2 = 0.693147
    np.testing.assert_allclose(grad[PLACES], (-2, -2 - 0.1 * log2, 1 + 0.1 * log2), rtol=1e-5)


def test_a_token_of_gspo_token_moves_by_its_own_advantage():
    """a1 has the advantage -1: -min(-0.790569, -0.8) = 0.8, clipped, so that only a0 has a slope.

    Its term -0.790569 x 2 is shared by both tokens in gspo, and is that of a0 in gspo_token.
    """
    mixed = dict(advantages=(2.0, -1.0, -1.0))
    for name, gradient in (
        ("gspo", (-0.395285, -0.395285, 3)),
        ("gspo_token", (-0.790569, 0, 3)),
    ):
        found = computed(BASE._replace(loss_type=name), **mixed)
        np.testing.assert_allclose(found[0], 2.609431, atol=2e-6)
        np.testing.assert_allclose(found[2], gradient, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "total", "gradient"),
    [("grpo", 1.3 - 0.5 * (1.5 + 0.5), (-0.25, -0.25, -0.5)),
     ("dapo", -0.4 - 0.5 * (3.0 + 0.5), (-0.5, -0.5, -0.5))],
)  # fmt: skip
def test_the_entropy_is_averaged_as_the_loss_is(name, total, gradient):
    """Entropies 1, 2 and 0.5 with the coefficient 0.5."""
    logprobs, batch = make()
    options = BASE._replace(loss_type=name, entropy_coef=0.5)
    loss, _ = losses.policy_loss(logprobs, batch, options)

    def with_bonus(entropy):
        return losses.with_entropy(loss, entropy, batch, options)[0]

    found, grad = jax.value_and_grad(with_bonus)(row(1.0, 2.0, 0.5))
    np.testing.assert_allclose(found, total, atol=2e-6)
    np.testing.assert_allclose(grad[PLACES], gradient)


@pytest.mark.parametrize(
    ("estimator", "toward"),
    [("k3", "forward"), ("unbiased", "reverse"), ("in_reward", "reverse")],
)
def test_the_mean_gradient_is_that_of_the_divergence_that_the_estimator_names(estimator, toward):
    """Every completion of two tokens of a vocabulary of 4, weighted with its probability.

    `k3` and `unbiased` see the divergence of each token given what is before it, without the
    derivative of what comes before; `in_reward` sees that of whole completions.
    """
    rng = np.random.default_rng(0)
    size = 4
    logits = jnp.asarray(rng.normal(0, 1, (size + 1, size)), jnp.float32)
    ref = jax.nn.log_softmax(jnp.asarray(rng.normal(0, 1, (size + 1, size)), jnp.float32))
    first, second = np.divmod(np.arange(size**2), size)
    options = BASE._replace(loss_type="dr_grpo", beta=1.0, kl_estimator=estimator, num_sequences=1)
    ids = jnp.ones((size**2, 2), jnp.int32)
    zeros = jnp.zeros((size**2, 2))

    def tokens(table):
        """Log-probabilities of all completions; row 1 + v of the table follows token v."""
        return jnp.stack([table[0, first], table[1 + first, second]], axis=1)

    at = tokens(jax.nn.log_softmax(logits))
    chance = jnp.exp(at.sum(axis=1))

    def loss(logits):
        logprobs = tokens(jax.nn.log_softmax(logits))
        batch = policy_batch(ids, zeros, zeros, ref_logprobs=tokens(ref))

        def one(row, logprobs):
            return losses.policy_loss(logprobs[None], row, options)[0][0]

        rows = jax.tree.map(lambda x: x[:, None], batch)
        return jnp.sum(chance * jax.vmap(one)(rows, logprobs))

    def divergence(logits):
        pi = jax.nn.log_softmax(logits)
        p, q = (pi, ref) if toward == "reverse" else (ref, pi)
        each = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        reached = jnp.exp(pi[0])
        if estimator != "in_reward":
            reached = jax.lax.stop_gradient(reached)
        return each[0] + jnp.sum(reached * each[1:])

    np.testing.assert_allclose(jax.grad(loss)(logits), jax.grad(divergence)(logits), atol=2e-6)
