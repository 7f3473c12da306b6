"""Number formats: what bfloat16 parameters learn, and which products are float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from atlas_jax import optim, step
from atlas_jax.config import MeshConfig, ModelOptions, SFTConfig
from atlas_jax.models import attention, layers, vocab
from atlas_jax.models.config import from_hf
from atlas_jax.recipes import sft
from atlas_jax.sharding import Sharding, gather, make_mesh, to_global
from atlas_jax.startup.compute import Compute
from tests import tiny

ONE = jax.devices()[:1]
STEPS = 30


def make_decoder(config, mesh=None, devices=ONE, **formats):
    """A tiny Qwen3 of a width where initial weights are as small as in a real model."""
    options = dataclasses.replace(config, model=ModelOptions(**formats), mesh=mesh or MeshConfig())
    sizes = {
        "model_type": "qwen3", "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 256, "tie_word_embeddings": True, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "attention_bias": False,
    }  # fmt: skip
    compute = Compute.of(options, devices)
    return compute.decoder(from_hf(sizes)), compute


def train(rate, mesh=None, devices=ONE, microbatches=1, steps=STEPS, seed=0, **formats):
    """Returns the losses, and the parameters before and after training on one batch."""
    config = SFTConfig(
        learning_rate=rate,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
        seed=seed,
    )
    decoder, compute = make_decoder(config, mesh, devices, compute_dtype="bfloat16", **formats)
    optimizer = compute.optimizer(decoder, steps)
    params = decoder.init(0)
    before = jax.device_get(params)
    state = compute.state(params, optimizer)
    train_step = compute.train_step(sft.make_loss(decoder, 64), decoder, optimizer)
    rows = tiny.batch([[40], [33], [20, 17], [38], [12], [40], [25, 9], [31]], width=40)
    batch = to_global(rows, decoder.sharding, microbatches)
    losses = []
    for _ in range(steps):
        state, metrics = train_step(state, batch)
        total, weight = metrics["loss/total"]
        losses.append(float(total / weight))
    return losses, before, jax.device_get(state)


def never_moved(before, after):
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    return sum(int((a == b).sum()) for a, b in pairs) / sum(a.size for a, _ in pairs)


@pytest.mark.parametrize("rate", [5e-7, 2e-5])
def test_bfloat16_parameters_learn_as_float32_ones_do(rate):
    expected, _, _ = train(rate)
    found, before, state = train(rate, param_dtype="bfloat16")
    fall = expected[0] - expected[-1]
    assert fall > 0
    # The first losses differ by the rounding of the initial weights.
    assert abs((found[0] - found[-1]) - fall) <= 0.1 * fall
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state.params))
    if rate == 2e-5:
        assert never_moved(before, state.params) <= 0.05


def test_the_second_moment_is_float32_and_decays():
    config = dataclasses.replace(SFTConfig(), model=ModelOptions(param_dtype="bfloat16"))
    transform = optim.make(dataclasses.replace(config, max_grad_norm=0.0), lambda _: 1e-3, {})
    params = {"kernel": jnp.ones((4,), jnp.bfloat16)}
    state = transform.init(params)

    @jax.jit
    def repeat(state, gradient, count):
        def one(_, state):
            return transform.update({"kernel": jnp.full((4,), gradient)}, state, params)[1]

        return jax.lax.fori_loop(0, count, one, state)

    state = repeat(repeat(state, jnp.bfloat16(1), 2000), jnp.bfloat16(0.01), 8000)
    moments = {"mu": state[0].mu["kernel"], "nu": state[0].nu["kernel"]}
    assert moments["mu"].dtype == jnp.bfloat16  # adam_mu_dtype=auto
    assert moments["nu"].dtype == jnp.float32
    by_hand = 0.999**8000 * (1 - 0.999**2000) + (1 - 0.999**8000) * float(jnp.bfloat16(0.01)) ** 2
    np.testing.assert_allclose(moments["nu"], by_hand, rtol=1e-3)


def test_a_token_that_stands_often_keeps_its_whole_gradient():
    sharding = Sharding(make_mesh(MeshConfig(), ONE))
    table = jnp.zeros((8, 4), jnp.bfloat16)
    tokens = jnp.full((1, 4000), 3)

    def total(table):
        return vocab.lookup(table, tokens, sharding, table.dtype).astype(jnp.float32).sum()

    assert float(jax.grad(total)(table)[3, 0]) == 4000


@pytest.mark.parametrize(("gradient_dtype", "exact"), [("float32", True), ("bfloat16", False)])
def test_gradients_are_summed_over_devices_in_their_dtype(gradient_dtype, exact):
    """Eight devices have 256 and seven times 1, whose sum of 263 is no bfloat16 number."""
    sharding = Sharding(make_mesh(MeshConfig(fsdp=8)))
    dims = {"kernel": ("embed", None), "bias": (None,)}
    module = layers.Projection((8,), (4,), dims["kernel"], True, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    params = {
        name: jax.device_put(x, sharding.params(dims[name]))
        for name, x in nnx.to_pure_dict(state).items()
    }
    scale = jnp.where(jnp.arange(8) == 0, 256, 1).astype(jnp.bfloat16)
    x = jax.device_put(jnp.broadcast_to(scale[:, None, None], (8, 1, 8)), sharding.rows())

    def total(params):
        dtypes = jnp.dtype("bfloat16"), jnp.dtype(gradient_dtype)
        gathered = gather(sharding, params, dims, *dtypes)
        y = nnx.merge(graph, nnx.State(gathered))(x)
        assert y.dtype == jnp.bfloat16
        return y.astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(total))(params)
    assert gradients["kernel"].dtype == jnp.float32
    assert bool(jnp.all(gradients["kernel"] == 263)) == exact
    np.testing.assert_allclose(gradients["kernel"], 263, rtol=2**-6)
    np.testing.assert_array_equal(gradients["bias"], 8)


def test_gradients_of_microbatches_are_added_in_float32():
    """768 times 1 is 768; in bfloat16 a sum of ones stops at 256."""
    sharding = Sharding(make_mesh(MeshConfig(), ONE))
    params = {"kernel": jax.device_put(jnp.zeros((4,), jnp.bfloat16), sharding.replicated)}
    dims = {"kernel": (None,)}

    def loss(params, batch):
        total = (params["kernel"].astype(jnp.float32) * batch.tokens[0, 0]).sum()
        return (total, jnp.float32(0)), {}

    transform = optim.in_float32(optax.sgd(1.0, momentum=0.0))
    shapes = jax.eval_shape(lambda: params)
    optimizer = step.place_optimizer(transform, lambda _: 1.0, shapes, dims, sharding)
    train_step = step.make_train_step(loss, optimizer, dims, sharding)
    rows = tiny.batch([[2]] * 768, width=2)._replace(tokens=np.ones((768, 2), np.int32))
    state = step.init_state(params, optimizer, sharding)
    state, metrics = train_step(state, to_global(rows, sharding, 768))
    assert float(metrics["optim/grad_norm"][0]) == 2 * 768  # of four equal entries
    np.testing.assert_array_equal(np.asarray(state.params["kernel"], np.float32), -768)


def test_stochastic_rounding_is_unbiased_and_leaves_what_is_exact():
    low, high = np.float32(1.0), np.float32(1.0 + 2**-7)  # neighbours in bfloat16
    x = jnp.full((200_000,), low + (high - low) * 0.3)
    found = np.asarray(optim.stochastic_round(x, jax.random.key(0)), np.float32)
    assert set(np.unique(found)) == {low, high}
    assert abs((found == high).mean() - 0.3) < 0.005  # five standard deviations
    exact = jnp.asarray([0.0, -1.5, 3.0, 2.0**-130, np.inf, -np.inf, np.nan], jnp.float32)
    np.testing.assert_array_equal(
        np.asarray(optim.stochastic_round(exact, jax.random.key(1)), np.float32), exact
    )


def test_rounding_depends_on_seed_and_step_alone():
    """Not on the mesh, nor on how the batch is divided; a resumed run draws the same."""
    runs = [
        train(2e-5, steps=2, param_dtype="bfloat16"),
        train(2e-5, MeshConfig(fsdp=8), None, steps=2, param_dtype="bfloat16"),
        train(2e-5, steps=2, seed=1, param_dtype="bfloat16"),
    ]
    first, mesh, seed = ([np.asarray(x) for x in jax.tree.leaves(r[2].params)] for r in runs)
    same = [np.mean(a == b) for a, b in zip(first, mesh, strict=True)]
    other = [np.mean(a == b) for a, b in zip(first, seed, strict=True)]
    # Sums in another order change a few updates in their last digits.
    assert min(same) > 0.98
    assert min(o for o, x in zip(other, first, strict=True) if x.size > 1000) < 0.9


def test_float32_means_float32_products_on_every_device():
    """The program says so before a compiler chooses: TF32 or one bfloat16 pass is its default."""
    rows = jax.tree.map(jnp.asarray, tiny.batch([[20]], width=20))
    found = {}
    for dtype in ("float32", "bfloat16"):
        decoder, _ = make_decoder(SFTConfig(), compute_dtype=dtype)
        loss = sft.make_loss(decoder, 16)
        shapes = step.abstract(decoder.shapes, decoder.placements())
        text = jax.jit(lambda p, loss=loss: loss(p, rows)[0][0]).lower(shapes).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert len(products) > 5
        found[dtype] = {"HIGHEST" in line for line in products}
    assert found == {"float32": {True}, "bfloat16": {False}}


def test_scores_are_scaled_in_float32():
    """A scale in bfloat16 is off by up to 0.4 %, which is another temperature."""
    scale = 0.3
    shapes = {"query": (1, 16, 4, 32), "key": (1, 16, 2, 32), "value": (1, 16, 2, 32)}
    inputs = [
        (4 if name != "value" else 1) * jax.random.normal(jax.random.key(i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    ]
    half = [x.astype(jnp.bfloat16) for x in inputs]
    segments = jnp.ones((1, 16), jnp.int32)
    expected = attention.xla(*(x.astype(jnp.float32) for x in half), segments, scale=scale)
    found = attention.xla(*half, segments, scale=scale).astype(jnp.float32)
    assert float(jnp.abs(found - expected).max()) < 0.015


def test_checkpoints_of_another_format_or_optimizer_are_refused_by_name(tmp_path):
    from atlas_jax.checkpoint.manager import Checkpoints

    decoder, compute = make_decoder(SFTConfig())
    state = compute.state(decoder.init(0), compute.optimizer(decoder, 10))
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(state, {"position": 1}, {})
    checkpoints.close()
    again = Checkpoints(str(tmp_path), create=False)

    def wanted(config, param_dtype="float32"):
        decoder, compute = make_decoder(config, param_dtype=param_dtype)
        return compute.abstract_state(decoder, compute.optimizer(decoder, 10))

    with pytest.raises(ValueError, match=r"are float32; this run's are bfloat16; set model\.param"):
        again.restore(0, wanted(SFTConfig(), "bfloat16"))
    for change in ({"adam_mu_dtype": "bfloat16"}, {"max_grad_norm": 0.0}):
        other = wanted(dataclasses.replace(SFTConfig(), **change))
        with pytest.raises(ValueError, match=r"optimizer state is .*mu float32.*; this run's is"):
            again.restore(0, other)
    found = again.restore(0, wanted(SFTConfig()))
    assert found.data == {"position": 1}
