"""Identities of the training step: packing, microbatches, chunks and meshes change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

from atlas_jax import logprobs, optim, step
from atlas_jax.config import MeshConfig, SFTConfig
from atlas_jax.data.packing import split_rows
from atlas_jax.models import attention
from atlas_jax.policy_logprobs import token_logprobs
from atlas_jax.recipes import sft
from atlas_jax.sharding import Sharding, make_mesh, to_global
from tests import tiny
from tests.compare import close

ONE = jax.devices()[:1]
MESHES = {
    "one": (MeshConfig(), ONE),
    "fsdp8": (MeshConfig(fsdp=8), None),
    "2x2x2": (MeshConfig(data=2, fsdp=2, tensor=2), None),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.save("smollm2", tmp_path_factory.mktemp("model"))


def value_and_grad(decoder, params, rows, chunk=16):
    compiled = jax.jit(jax.value_and_grad(lambda p: tiny.loss_sum(decoder, p, rows, chunk)))
    return compiled(params)


def test_packed_equals_unpacked(saved):
    decoder, params = tiny.load(saved, devices=ONE)
    alone = tiny.batch([[9], [14], [5]], width=14)
    packed = tiny.batch([[9, 14, 5]], width=30)
    np.testing.assert_array_equal(
        alone.tokens[alone.segment_ids > 0], packed.tokens[packed.segment_ids > 0]
    )
    close(value_and_grad(decoder, params, packed), value_and_grad(decoder, params, alone), 1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_equals_plain(saved, chunk):
    decoder, params = tiny.load(saved, devices=ONE)
    rows = tiny.batch([[20], [13]], width=20)

    def plain(params):
        logits = tiny.hidden(decoder, params, rows) @ decoder.output_table(params).T
        found = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(found, rows.tokens[:, 1:, None], -1)[..., 0]
        return -jnp.sum(picked * rows.loss_mask[:, 1:])

    expected = jax.jit(jax.value_and_grad(plain))(params)
    close(value_and_grad(decoder, params, rows, chunk), expected, 1e-5)


def trained(
    saved, mesh, devices, microbatches=1, mode="fsdp", remat="none", offload="none", widths=()
):
    """Returns metrics and momentum, a sum of gradients, after two steps."""
    decoder, params = tiny.load(saved, mesh, devices, mode=mode, remat=remat)
    sharding = Sharding(decoder.sharding.mesh, mode, offload)
    decoder = dataclasses.replace(decoder, sharding=sharding)
    params = jax.device_put(params, decoder.placements())
    transform = optax.chain(optim.clip_by_global_norm(0.5), optax.sgd(1e-3, momentum=0.9))
    optimizer = step.place_optimizer(
        transform, lambda _: 1e-3, decoder.shapes, decoder.dims, sharding
    )
    state = step.init_state(params, optimizer, sharding)
    train_step = step.make_train_step(sft.make_loss(decoder, 8), optimizer, decoder.dims, sharding)
    rows = tiny.batch([[20], [13], [5, 9], [17], [3], [8, 8], [20], [2]] * 2, width=20)
    batch = to_global(rows, sharding, microbatches)
    if widths:
        order = np.argsort(-(rows.segment_ids > 0).sum(1), kind="stable")
        parts = split_rows(jax.tree.map(lambda x: x[order], rows), widths)
        batch = [to_global(part, sharding, 1) for part in parts]
    for _ in range(2):
        state, metrics = train_step(state, batch)
    return jax.device_get((metrics, state.opt_state))


@pytest.fixture(scope="module")
def reference(saved):
    return trained(saved, *MESHES["one"])


@pytest.mark.parametrize("name", ["fsdp8", "2x2x2"])
@pytest.mark.parametrize("mode", ["fsdp", "zero1", "replicated"])
def test_meshes_agree(saved, reference, name, mode):
    found = trained(saved, *MESHES[name], mode=mode)
    close(found, reference, 1e-5)


@pytest.mark.parametrize("options", [dict(microbatches=4), dict(widths=(20, 20, 16, 8))], ids=str)
def test_gradients_added_in_place_are_the_same(saved, reference, monkeypatch, options):
    monkeypatch.setattr(step, "platform", lambda mesh: "gpu")
    close(trained(saved, *MESHES["one"], **options), reference, 1e-5)


def test_lengths_of_microbatches_change_nothing_on_several_devices(saved, reference):
    close(trained(saved, *MESHES["fsdp8"], widths=(20, 16)), reference, 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(microbatches=4),
        dict(remat="full"),
        dict(remat="dots"),
        dict(remat="mlp"),
        dict(offload="optimizer"),
        dict(offload="optimizer,params"),
        dict(remat="full", offload="activations"),
        dict(widths=(20, 20, 16, 8)),
        dict(widths=(20, 16), offload="optimizer,params"),
    ],
    ids=str,
)
def test_ways_to_save_memory_change_nothing(saved, reference, options):
    close(trained(saved, *MESHES["one"], **options), reference, 1e-5)


@pytest.mark.parametrize(
    ("remat", "again"), [("none", 0), ("dots", 1), ("mlp", 1 + 2), ("full", 1 + 6)]
)
def test_a_policy_computes_again_what_it_says(saved, remat, again):
    """A layer has seven matrices and two products of attention, each three times in a step.

    Scores are computed again by all but `none`, gate and up by `mlp`, and q, k, v, o by `full`. The
    backward pass needs neither the MLP's output nor, again, that of attention.
    """
    decoder, params = tiny.load(saved, devices=ONE, remat=remat)

    def attend(*args, **options):
        return checkpoint_name(attention.xla(*args, **options), "attention_out")

    decoder = dataclasses.replace(decoder, attention=attend)
    rows = tiny.batch([[20]], width=20)

    def total(params):
        return tiny.hidden(decoder, params, rows).sum()

    jaxpr = jax.make_jaxpr(jax.grad(total))(params)
    assert str(jaxpr).count(" dot_general[") == 3 * 9 + again


@pytest.mark.parametrize("mesh", ["one", "fsdp8"])
def test_updates_take_equal_parts_of_a_batch_in_turn(saved, mesh):
    """Two passes over two parts are four steps on halves of the batch."""
    decoder, params = tiny.load(saved, *MESHES[mesh])
    sharding = decoder.sharding
    optimizer = step.place_optimizer(
        optax.sgd(0.1, momentum=0.9), lambda _: 0.1, decoder.shapes, decoder.dims, sharding
    )
    loss = sft.make_loss(decoder, 8)
    make = functools.partial(step.make_train_step, loss, optimizer, decoder.dims, sharding)
    counts = [20, 13, 5, 9, 17, 3, 8, 8] * 4
    batch = to_global(tiny.batch([[n] for n in counts], width=20), sharding, 4)
    state = step.init_state(params, optimizer, sharding)
    apart = jax.tree.map(jnp.copy, state)
    state, metrics = make(num_updates=4, num_parts=2)(state, batch)
    alone = make()
    total = 0.0
    for part in (slice(0, 4, 2), slice(1, 4, 2)) * 2:
        apart, found = alone(apart, jax.tree.map(lambda x, p=part: x[p], batch))
        total += found["loss/total"][0]
    close((state.params, state.opt_state), (apart.params, apart.opt_state), 1e-5)
    close(metrics["loss/total"][0], total)
    assert (int(state.step), float(metrics["optim/grad_norm"][1])) == (1, 4)


def test_microbatches_over_a_mesh_change_nothing(saved, reference):
    close(trained(saved, *MESHES["2x2x2"], microbatches=2), reference, 1e-5)


def compiled_step(decoder, microbatches=1, width=64, rows=8):
    config = SFTConfig()
    sharding = decoder.sharding
    rate = optim.schedule(config, 10)
    optimizer = step.place_optimizer(
        optim.make(config, rate, decoder.dims), rate, decoder.shapes, decoder.dims, sharding
    )
    state = step.abstract_state(decoder.shapes, decoder.placements(), optimizer, sharding)
    batch = to_global(tiny.batch([[width]] * rows, width=width), sharding, microbatches)
    train_step = step.make_train_step(sft.make_loss(decoder, 8), optimizer, decoder.dims, sharding)
    return train_step.whole.lower(state, batch, None).compile()


def test_no_device_holds_all_parameters_under_fsdp(saved):
    decoder, params = tiny.load(saved, MeshConfig(fsdp=8), remat="full")
    program = compiled_step(decoder)
    held = program.memory_analysis().argument_size_in_bytes
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    assert held < 3 * total / 8 * 1.2  # parameters and two moments, and the batch
    stacked = [x.shape for x in jax.tree.leaves(decoder.shapes["layers"]) if x.ndim > 2]
    for shape in stacked:
        text = "f32[" + ",".join(map(str, shape)) + "]"
        assert text not in program.as_text(), f"a whole {text} exists on a device"


@pytest.mark.parametrize("fused", [True, False])
def test_logits_never_exist(fused):
    """The step of a 150k vocabulary needs a quarter of the memory of one with whole logits."""
    mesh = make_mesh(MeshConfig(), ONE)
    sharding = Sharding(mesh)
    rows, length, width, vocab = 2, 512, 64, 150_000
    hidden = jax.ShapeDtypeStruct((rows, length, width), jnp.float32)
    table = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def chunked(hidden, table, targets):
        head = logprobs.Head(sharding, 32)
        ahead = logprobs.Labels(targets, targets > 0)
        if fused:
            return logprobs.masked_sum(hidden, table, ahead, head)
        return token_logprobs(hidden, table, ahead, head)[0].sum()

    def plain(hidden, table, targets):
        logits = jax.nn.log_softmax(hidden @ table.T)
        return jnp.take_along_axis(logits, targets[..., None], -1).sum()

    sizes = [
        jax.jit(jax.grad(f, (0, 1))).lower(hidden, table, targets).compile()
        .memory_analysis().temp_size_in_bytes
        for f in (chunked, plain)
    ]  # fmt: skip
    assert sizes[0] < sizes[1] / 4, sizes


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_equal_transformers(name):
    import torch
    from transformers import get_scheduler

    config = SFTConfig(learning_rate=0.5, lr_scheduler_type=name, warmup_ratio=0.2)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    theirs = get_scheduler({"constant": "constant_with_warmup"}.get(name, name), optimizer, 4, 20)
    ours = optim.schedule(config, 20)
    for at in range(20):
        assert float(ours(at)) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        theirs.step()


def test_updates_equal_torch_adamw():
    import torch

    config = SFTConfig(
        learning_rate=0.1, lr_scheduler_type="constant", warmup_ratio=0.0, weight_decay=0.3,
        max_grad_norm=1.0, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3,
    )  # fmt: skip
    start = {"kernel": np.float32([[1.0, -2.0]]), "scale": np.float32([3.0])}
    grads = {"kernel": np.float32([[3.0, 4.0]]), "scale": np.float32([-12.0])}
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    torch_optimizer = torch.optim.AdamW(
        [dict(params=[theirs["kernel"]], weight_decay=0.3),
         dict(params=[theirs["scale"]], weight_decay=0.0)],
        lr=0.1, betas=(0.8, 0.9), eps=1e-3,
    )  # fmt: skip
    transform = optim.make(config, optim.schedule(config, 10), {})
    ours, state = start, transform.init(start)
    for _ in range(3):
        updates, state = transform.update(jax.tree.map(jnp.asarray, grads), state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        torch_optimizer.step()
    for name, parameter in theirs.items():
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=1e-5)
