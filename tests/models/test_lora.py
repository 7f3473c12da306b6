"""LoRA computes what PEFT computes, whatever the mesh, and leaves the model as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from atlas_jax import step
from atlas_jax.checkpoint import adapters
from atlas_jax.config import MeshConfig, SFTConfig
from atlas_jax.models import cache, lora
from atlas_jax.options.train import LoraOptions
from atlas_jax.recipes import sft
from atlas_jax.sharding import to_global
from atlas_jax.startup.compute import Compute
from tests import tiny
from tests.compare import close

ONE = jax.devices()[:1]
MESHES = {
    "fsdp8": MeshConfig(fsdp=8),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
}


def adapted(path, options, mesh=None, devices=ONE, **more):
    """A decoder with factors, the frozen parameters, and factors of which none is zero."""
    decoder, params = tiny.load(path, mesh, devices, **more)
    factors = adapters.factors(options, decoder.config, jnp.dtype("float32"))
    decoder = dataclasses.replace(decoder, lora=factors)
    shapes, _, placements = decoder.trained
    rng = np.random.default_rng(0)
    new = jax.tree.map(lambda s: 0.1 * rng.standard_normal(s.shape, np.float32), shapes)
    return decoder, params, jax.device_put(new, placements)


def loss_of(decoder, rows):
    return lambda new, params: tiny.loss_sum(decoder, step.joined(params, new), rows)


def with_factors(family, options, decoder, new):
    """PEFT's model with the same factors."""
    base = type(tiny.hf_model(family))(tiny.hf_model(family).config)
    base.load_state_dict(tiny.hf_model(family).state_dict())
    targets = options.targets if options.targets != ("all-linear",) else "all-linear"
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, use_rslora=options.rslora, task_type="CAUSAL_LM",
        target_modules=targets if isinstance(targets, str) else list(targets),
    )  # fmt: skip
    model = peft.get_peft_model(base, config).eval()
    state = {k: torch.tensor(v) for k, v in peft_names(decoder, new).items()}
    peft.set_peft_model_state_dict(model, state)
    return model


def peft_names(decoder, new):
    """The factors under PEFT's names and in its shapes, `[r, in]` and `[out, r]`."""
    found = {}
    for part, name in decoder.lora.targets:
        module = {"attention": "self_attn", "mlp": "mlp"}[part]
        pair = new["layers"][part][name]
        for i in range(decoder.config.num_layers):
            stem = f"base_model.model.model.layers.{i}.{module}.{name}_proj"
            a, b = (np.asarray(pair[key][i]) for key in ("lora_a", "lora_b"))
            found[f"{stem}.lora_A.weight"] = a.reshape(-1, a.shape[-1]).T.copy()
            found[f"{stem}.lora_B.weight"] = b.reshape(b.shape[0], -1).T.copy()
    return found


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("smollm2", LoraOptions(rank=4, alpha=6.0)),
        ("qwen3", LoraOptions(rank=3, alpha=5.0, rslora=True, targets=("q_proj", "o_proj"))),
        ("llama_bias", LoraOptions(rank=2, alpha=2.0, targets=("v_proj", "down_proj"))),
    ],
)
def test_loss_and_gradients_equal_peft(family, options, tmp_path):
    decoder, params, new = adapted(tiny.save(family, tmp_path), options, remat="full")
    rows = tiny.batch([[21], [17]], width=21)
    loss, grads = jax.jit(jax.value_and_grad(loss_of(decoder, rows)))(new, params)
    model = with_factors(family, options, decoder, new)
    total = 0.0
    for row, length in enumerate((21, 17)):
        tokens = torch.tensor(rows.tokens[row, :length][None], dtype=torch.long)
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
        part = -logprobs.gather(1, tokens[0, 1:, None]).sum()
        part.backward()
        total += part.item()
    assert abs(float(loss) - total) / total < 1e-5
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    ours = peft_names(decoder, grads)
    assert {k.replace(".default", "") for k in trained} == ours.keys()
    for name, parameter in trained.items():
        expected = parameter.grad.numpy()
        scale = np.abs(expected).max()
        found = ours[name.replace(".default", "")]
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.save("smollm2", tmp_path_factory.mktemp("model"))


def test_without_factors_the_decoder_computes_the_model_itself(saved):
    decoder, params, _ = adapted(saved, LoraOptions(rank=4))
    rows = tiny.batch([[13]], width=13)
    plain = tiny.hidden(dataclasses.replace(decoder, lora=None), params, rows)
    np.testing.assert_array_equal(tiny.hidden(decoder, params, rows), plain)


def test_new_factors_are_those_of_peft_and_change_nothing(saved):
    decoder, params, _ = adapted(saved, LoraOptions(rank=4))
    new = lora.init(decoder, seed=1)
    rows = tiny.batch([[13]], width=13)
    close(
        tiny.hidden(decoder, step.joined(params, new), rows), tiny.hidden(decoder, params, rows), 0
    )
    down = new["layers"]["mlp"]["down"]
    values = np.asarray(down["lora_a"])  # uniform within 1 / sqrt(96 inputs)
    assert not np.asarray(down["lora_b"]).any()
    assert 0.9 / 96**0.5 < np.abs(values).max() <= 1 / 96**0.5
    assert abs(values.std() * (3 * 96) ** 0.5 - 1) < 0.1


def test_merged_weights_compute_the_same(saved):
    decoder, params, new = adapted(saved, LoraOptions(rank=4, alpha=6.0))
    rows = tiny.batch([[13]], width=13)
    expected = tiny.hidden(decoder, step.joined(params, new), rows)
    weights = cache.weights(decoder, step.joined(params, new))
    layers = jax.tree.map(lambda *each: jnp.stack(each), *weights["layers"])
    found = tiny.hidden(cache.resident(decoder), weights | {"layers": layers}, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def trained(saved, mesh=None, devices=ONE, microbatches=1, dropout=0.0, widths=(), steps=2):
    """Metrics, factors and optimizer state after some steps, and the frozen parameters."""
    options = LoraOptions(rank=4, alpha=6.0, dropout=dropout)
    decoder, params, new = adapted(saved, options, mesh, devices, remat="full")
    config = SFTConfig(learning_rate=1e-3, lr_scheduler_type="constant", warmup_ratio=0.0)
    compute = Compute(config, decoder.sharding)
    optimizer = compute.optimizer(decoder, 10)
    train_step = compute.train_step(sft.make_loss(decoder, 8), decoder, optimizer)
    state = compute.state(new, optimizer, params)
    rows = tiny.batch([[20], [13], [5, 9], [17], [3], [8, 8], [20], [2]], width=20)
    batch = to_global(rows, decoder.sharding, microbatches)
    if widths:
        batch = [to_global(jax.tree.map(lambda x: x[:4], rows), decoder.sharding, 1),
                 to_global(jax.tree.map(lambda x: x[4:], rows), decoder.sharding, 1)]  # fmt: skip
    for _ in range(steps):
        state, metrics = train_step(state, batch)
    return jax.device_get((metrics, state.params, state.opt_state)), state


@pytest.fixture(scope="module")
def reference(saved):
    return trained(saved)


@pytest.mark.parametrize("name", MESHES)
def test_meshes_agree(saved, reference, name):
    found, _ = trained(saved, MESHES[name], None)
    close(found, reference[0], 2e-4)


@pytest.mark.parametrize("options", [dict(microbatches=4), dict(widths=(20, 20))], ids=str)
def test_microbatches_agree(saved, reference, options):
    found, _ = trained(saved, **options)
    close(found, reference[0], 2e-4)


def test_the_model_stays_to_the_bit_and_the_optimizer_holds_the_factors_alone(saved, reference):
    _, before, _ = adapted(saved, LoraOptions(rank=4))
    _, state = reference
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before)
    factors = {x.shape for x in jax.tree.leaves(state.params)}
    assert {x.shape for x in jax.tree.leaves(state.opt_state)} - {()} == factors
    names = {p[-1].key for p, _ in jax.tree.leaves_with_path(state.params)}
    assert names == {"lora_a", "lora_b"}


def test_dropout_is_drawn_by_seed_and_step(saved, reference):
    once = trained(saved, microbatches=2, dropout=0.3)[0]
    again = trained(saved, microbatches=2, dropout=0.3)[0]
    jax.tree.map(np.testing.assert_array_equal, once, again)
    with_all = reference[0][0]["loss/total"][0]
    assert abs(once[0]["loss/total"][0] - with_all) > 1e-3 * with_all


def test_dropout_keeps_the_mean_of_what_the_factors_add():
    targets = (("mlp", "down"),)
    factors = lora.Lora(
        rank=2, scale=0.5, targets=targets, dtype=jnp.dtype("float32"), dropout=0.25
    )
    a = jnp.eye(6, 2)
    b = jnp.ones((2, 5))
    x = jnp.ones((4000, 6))
    pair = {"lora_a": a, "lora_b": b}
    found = lora._delta(pair, factors, jax.random.key(0), x)
    values = sorted({round(float(v), 4) for v in np.asarray(found).ravel()})
    # Two inputs count, each with 4/3 or 0, and the scale is 1/2.
    np.testing.assert_allclose(values, [0, 2 / 3, 4 / 3], atol=1e-4)
    assert abs(float(found.mean()) - 1.0) < 0.02
