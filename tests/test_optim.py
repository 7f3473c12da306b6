"""Schedules, Muon and the average of the weights, against independent computations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atlas_jax import ema, optim, step
from atlas_jax.config import SFTConfig
from atlas_jax.recipes import sft
from atlas_jax.sharding import Sharding, to_global
from tests import tiny
from tests.test_step import MESHES

RATE = 0.1
DIMS = {
    "q": {"kernel": ("layers", "embed", "heads", None)},
    "o": {"kernel": ("layers", "heads", None, "embed")},
    "norm": {"scale": ("layers", None)},
    "embed": ("vocab", "embed"),
}
SHAPES = {"q": {"kernel": (2, 6, 2, 4)}, "o": {"kernel": (2, 2, 4, 6)}, "norm": {"scale": (2, 6)},
          "embed": (9, 6)}  # fmt: skip
COEFFICIENTS = 3.4445, -4.7750, 2.0315


def random_tree(seed):
    rng = np.random.default_rng(seed)
    leaves = jax.tree.leaves(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    structure = jax.tree.structure(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(structure, [jnp.float32(rng.normal(size=s)) for s in leaves])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (dict(lr_scheduler_type="cosine", min_lr_ratio=0.1),
         ("cosine_with_min_lr", dict(min_lr_rate=0.1))),
        (dict(lr_scheduler_type="wsd", lr_decay_ratio=0.3),
         ("warmup_stable_decay", dict(num_decay_steps=6, warmup_type="linear"))),
        (dict(lr_scheduler_type="linear", min_lr_ratio=0.25),
         ("polynomial", dict(lr_end=0.125, power=1.0))),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)  # fmt: skip
def test_schedules_with_a_floor_equal_transformers(ours, theirs):
    import torch
    from transformers import get_scheduler

    name, options = theirs
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    expected = get_scheduler(name, optimizer, 4, 20, scheduler_specific_kwargs=options)
    found = optim.schedule(SFTConfig(learning_rate=0.5, warmup_ratio=0.2, **ours), 20)
    for at in range(20):
        assert float(found(at)) == pytest.approx(expected.get_last_lr()[0], abs=1e-6), at
        optimizer.step()
        expected.step()


def test_wsd_stays_at_the_peak_and_ends_at_its_floor():
    config = SFTConfig(learning_rate=1.0, lr_scheduler_type="wsd", min_lr_ratio=0.5)
    rate = optim.schedule(config, 100)
    assert [float(rate(at)) for at in (0, 5, 10, 89, 90, 95, 100)] == pytest.approx(
        [0, 0.5, 1, 1, 1, 0.75, 0.5]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lr_scheduler_type="constant", min_lr_ratio=0.1), "min_lr_ratio=0.1 with"),
        (dict(lr_scheduler_type="wsd", lr_decay_ratio=0.95), "are more than all steps"),
    ],
)
def test_schedules_that_cannot_be_are_refused(options, message):
    config = SFTConfig(model_name_or_path="m", output_dir="o", **options)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, dataset_path="d"))
    with pytest.raises(ValueError, match=message):
        config.check()


def orthogonalized(matrix):
    """Five steps of Newton and Schulz, as Jordan's post has them, in float64."""
    a, b, c = COEFFICIENTS
    x = matrix / np.linalg.norm(matrix)
    flat = x.shape[0] > x.shape[1]
    x = x.T if flat else x
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if flat else x


def muon_by_hand(params, grads, beta, decay):
    """Parameters `[layers, rows, columns]` after updates with Nesterov's momentum."""
    momentum = np.zeros_like(params)
    for number, grad in enumerate(grads, 1):
        momentum = beta * momentum + (1 - beta) * grad
        ahead = beta * momentum / (1 - beta ** (number + 1)) + (1 - beta) * grad / (
            1 - beta**number
        )
        rows, columns = grad.shape[1:]
        update = np.stack([orthogonalized(x) for x in ahead]) * 0.2 * np.sqrt(max(rows, columns))
        params = params - RATE * (update + decay * params)
    return params


MUON = SFTConfig(
    optim="muon", muon_momentum=0.8, weight_decay=0.3, adam_beta1=0.7, adam_beta2=0.9,
    max_grad_norm=0.0,
)  # fmt: skip


def updated(transform, params, grads):
    state = transform.init(params)
    for grad in grads:
        updates, state = transform.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_muon_equals_its_formula_and_takes_adamw_for_the_rest():
    params, *grads = (random_tree(seed) for seed in range(4))
    found, _ = updated(optim.make(MUON, lambda _: RATE, DIMS), params, grads)
    for name, shape in (("q", (2, 6, 8)), ("o", (2, 8, 6))):
        start, *steps = (np.float64(tree[name]["kernel"]).reshape(shape)
                         for tree in (params, *grads))  # fmt: skip
        expected = muon_by_hand(start, steps, 0.8, 0.3)
        np.testing.assert_allclose(found[name]["kernel"].reshape(shape), expected, rtol=1e-4)
    adamw = dataclasses.replace(MUON, optim="adamw")
    others, _ = updated(optim.make(adamw, lambda _: RATE, DIMS), params, grads)
    np.testing.assert_allclose(found["embed"], others["embed"], rtol=1e-5)
    np.testing.assert_allclose(found["norm"]["scale"], others["norm"]["scale"], rtol=1e-5)


def test_the_first_step_of_muon_is_torchs():
    import torch

    params, grad = random_tree(0), random_tree(1)
    config = dataclasses.replace(MUON, weight_decay=0.0)
    found, _ = updated(optim.make(config, lambda _: RATE, DIMS), params, [grad])
    for layer in range(2):
        weight = torch.nn.Parameter(
            torch.tensor(np.array(params["q"]["kernel"][layer]).reshape(6, 8))
        )
        weight.grad = torch.tensor(np.array(grad["q"]["kernel"][layer]).reshape(6, 8))
        torch.optim.Muon(
            [weight], lr=RATE, weight_decay=0.0, momentum=0.8, adjust_lr_fn="match_rms_adamw"
        ).step()
        ours = found["q"]["kernel"][layer].reshape(6, 8)
        # torch computes the iteration in bfloat16.
        assert np.abs(ours - weight.detach().numpy()).max() < 0.03 * RATE


def test_the_average_of_the_weights_is_that_of_the_formula():
    params, *grads = (random_tree(seed) for seed in range(4))
    config = SFTConfig(ema_decay=0.6, max_grad_norm=0.0)
    plain = optim.make(dataclasses.replace(config, ema_decay=0.0), lambda _: RATE, DIMS)
    expected = params
    for count in range(1, 4):
        after, _ = updated(plain, params, grads[:count])
        expected = jax.tree.map(lambda a, p: 0.6 * a + 0.4 * p, expected, after)
    found, state = updated(optim.make(config, lambda _: RATE, DIMS), params, grads)
    jax.tree.map(np.testing.assert_array_equal, found, after)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), ema.averaged(state), expected
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.save("qwen3", tmp_path_factory.mktemp("model"))


def trained(saved, mesh, devices, mode="fsdp", offload="none", param_dtype="float32"):
    """Parameters and averages after two steps of Muon."""
    config = dataclasses.replace(MUON, ema_decay=0.5, learning_rate=1e-2, max_grad_norm=1.0)
    decoder, params = tiny.load(saved, mesh, devices, mode=mode)
    sharding = Sharding(decoder.sharding.mesh, mode, offload)
    decoder = dataclasses.replace(decoder, sharding=sharding, param_dtype=jnp.dtype(param_dtype))
    params = jax.tree.map(lambda x: x.astype(param_dtype), params)
    params = jax.device_put(params, decoder.placements())
    rate = lambda _: 1e-2  # noqa: E731
    optimizer = step.place_optimizer(
        optim.make(config, rate, decoder.dims), rate, decoder.shapes, decoder.dims, sharding
    )
    state = step.init_state(params, optimizer, sharding)
    train_step = step.make_train_step(sft.make_loss(decoder, 8), optimizer, decoder.dims, sharding)
    batch = to_global(tiny.batch([[20], [13], [5, 9], [17]] * 2, width=20), sharding, 1)
    for _ in range(2):
        state, _ = train_step(state, batch)
    return jax.device_get((state.params, ema.averaged(state.opt_state)))


@pytest.fixture(scope="module")
def on_one(saved):
    return trained(saved, *MESHES["one"])


@pytest.mark.parametrize(
    ("name", "mode", "offload"),
    [("fsdp8", "fsdp", "none"), ("2x2x2", "zero1", "none"), ("2x2x2", "fsdp", "none"),
     ("fsdp8", "fsdp", "optimizer")],
)  # fmt: skip
def test_muon_and_the_average_are_the_same_on_any_mesh(saved, on_one, name, mode, offload):
    found = trained(saved, *MESHES[name], mode=mode, offload=offload)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), found, on_one)


def test_the_average_of_bfloat16_weights_is_float32(saved, on_one):
    params, average = trained(saved, *MESHES["one"], param_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(average)} == {jnp.dtype("float32")}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-2), average, on_one[1])
