"""Losses of a user's own, `loss_type=package.module:function`."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import config, losses
from tests import policy_reference
from tests.policy_reference import OPTIONS

OWN = """
import jax.numpy as jnp

def constant(logprobs, batch, options):
    return (2, 1), {"own/half": (1, 2)}

def alone(logprobs, batch, options):
    return jnp.sum(logprobs)

def rows(logprobs, batch, options):
    return (jnp.sum(logprobs, axis=1), jnp.sum(batch.loss_mask)), {}

def bare(logprobs, batch, options):
    return (jnp.sum(logprobs), 1.0), {"own/number": 3.0}
"""


def make():
    return jax.tree.map(jnp.asarray, policy_reference.make())


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_losses"
    sys.modules.pop("own_losses", None)


def test_a_name_without_a_colon_is_the_loss_of_the_papers():
    assert losses.resolve("dr_grpo") is losses.policy_loss


def test_the_example_is_reinforce_with_the_squared_distance_to_the_reference():
    logprobs, batch = make()
    loss = losses.resolve("examples.custom_loss:reinforce")
    options = OPTIONS._replace(beta=0.5)
    (total, weight), found = loss(logprobs, batch, options)
    mask, x = np.asarray(batch.loss_mask), np.float64(logprobs)
    distance = 0.25 * (x - np.float64(batch.ref_logprobs)) ** 2
    np.testing.assert_allclose(total, (distance - batch.advantages * x)[mask].sum(), rtol=1e-5)
    assert weight == mask.sum()
    assert set(found) == {"policy/mean_logprob", "policy/kl", "rollout/mismatch_kl"}
    grad = jax.grad(lambda p: loss(p, batch, OPTIONS._replace(beta=0.0))[0][0])(logprobs)
    np.testing.assert_allclose(grad, np.where(mask, -batch.advantages, 0.0))


def test_what_is_not_trained_reaches_no_loss():
    logprobs, batch = make()
    loss = losses.resolve("examples.custom_loss:reinforce")
    spoilt = jnp.where(batch.loss_mask, logprobs, jnp.nan)
    assert loss(spoilt, batch, OPTIONS)[0] == loss(logprobs, batch, OPTIONS)[0]


def test_numbers_of_python_are_sums_too(own):
    (total, weight), found = losses.resolve(f"{own}:constant")(*make(), OPTIONS)
    assert (total, weight) == (2.0, 1.0)
    assert found["own/half"] == (1.0, 2.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alone", "is not ((sum, weight), {name: (sum, weight)})"),
        ("bare", "returns a tuple that is not ((sum, weight), {name: (sum, weight)})"),
        ("rows", "have the shapes (4,) and (); add them up, such as with jnp.sum"),
    ],
)
def test_what_is_no_loss_is_said_with_what_it_should_be(own, name, message):
    logprobs, batch = make()
    with pytest.raises(ValueError) as error:
        losses.resolve(f"{own}:{name}")(logprobs, batch, OPTIONS)
    assert str(error.value).startswith(f"loss_type={own}:{name}")
    assert message.replace("(4,)", str(logprobs.shape[:1])) in str(error.value)


def test_an_unknown_loss_is_answered_with_the_choices():
    draft = config.defaults(config.GRPOConfig)
    draft.model_name_or_path = draft.output_dir = draft.data.dataset_path = "x"
    made = dataclasses.replace(config.freeze(draft), loss_type="dapp", output_dir="y")
    with pytest.raises(ValueError) as error:
        config.validate(made)
    assert str(error.value) == (
        "loss_type='dapp' must be one of grpo, bnpo, dr_grpo, dapo, gspo, gspo_token, cispo, "
        "package.module:function; did you mean 'dapo'?"
    )
