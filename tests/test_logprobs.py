"""The chunked cross entropy and log-probabilities against numbers worked by hand and plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from atlas_jax import logprobs
from atlas_jax.config import MeshConfig
from atlas_jax.models.attention import MASKED
from atlas_jax.models.vocab import lookup
from atlas_jax.policy_logprobs import token_logprobs
from atlas_jax.sharding import BATCH_AXES, Sharding, make_mesh
from atlas_jax.types import Batch
from tests.compilers import kernels, mesh_of, needs

MESHES = {
    "one": (MeshConfig(), jax.devices()[:1]),
    "fsdp8": (MeshConfig(fsdp=8), None),
    "2x2x2": (MeshConfig(data=2, fsdp=2, tensor=2), None),
    "1x4x2": (MeshConfig(fsdp=4, tensor=2), None),
}


def test_cross_entropy_by_hand():
    """Tokens 0, 1, 1: the table's logits are 0 and ln 3, so that token 1 has probability 3/4."""
    sharding = Sharding(make_mesh(MeshConfig(), jax.devices()[:1]))
    hidden, table = jnp.ones((1, 3, 1)), jnp.log(jnp.array([[1.0], [3.0]]))
    ids = jnp.ones((1, 3), jnp.int32)
    mask = jnp.array([[False, True, True]])
    batch = Batch(jnp.array([[0, 1, 1]]), ids, ids, mask)

    def loss(hidden, table):
        total, weight = logprobs.cross_entropy(hidden, table, batch, logprobs.Head(sharding, 2))
        return total, weight

    (total, weight), (d_hidden, d_table) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        hidden, table
    )
    assert weight == 2
    np.testing.assert_allclose(total, 2 * np.log(4 / 3), rtol=1e-6)
    np.testing.assert_allclose(d_table, [[0.5], [-0.5]], rtol=1e-6)  # 2 (p - onehot)
    expected = -0.25 * np.log(3)  # sum_v (p - onehot) table[v]; nothing stands behind the last
    np.testing.assert_allclose(d_hidden[0, :, 0], [expected, expected, 0.0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("mesh", "vocab"),
    [
        ("one", 96),
        ("fsdp8", 96),  # the table is gathered, as the devices' 168 positions are more
        ("2x2x2", 96),
        ("fsdp8", 498),  # split over fsdp: seven devices have 63 rows, the last one 57
        ("2x2x2", 498),
        ("1x4x2", 400),
        ("1x4x2", 362),  # three devices of each part have 46 rows, the fourth 43
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trained", [0.0, 0.3, 1.0])
def test_the_sum_equals_plain_computation(mesh, vocab, temperature, trained):
    """In value and in gradients, for any factor, mask, and mesh, whatever untrained rows hold."""
    sharding = Sharding(make_mesh(*MESHES[mesh]))
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(8, 21, 16)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(vocab, 16)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, hidden.shape[:2]))
    mask = jnp.asarray(rng.random(targets.shape) < trained)
    ahead = logprobs.Labels(targets, mask)
    head = logprobs.Head(sharding, 8, temperature)

    def fused(hidden, table):
        return 3.0 * logprobs.masked_sum(hidden, table, ahead, head)

    def apart(hidden, table):
        return 3.0 * jnp.sum(token_logprobs(hidden, table, ahead, head)[0])

    def plain(hidden, table):
        found = jax.nn.log_softmax(hidden @ table.T / temperature)
        picked = jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0]
        return 3.0 * jnp.sum(jnp.where(mask, picked, 0.0))

    expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, table)
    unread = jnp.where(mask[..., None], hidden, jnp.nan)
    for ours in (fused, apart):
        found = jax.jit(jax.value_and_grad(ours, (0, 1)))(unread, table)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["fsdp", "zero1", "replicated"])
def test_entropy_and_logprobs_equal_plain_computation_however_the_table_rests(mode):
    sharding = Sharding(make_mesh(*MESHES["1x4x2"]), mode)
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(8, 21, 16), scale=0.2).astype(np.float32)
    table = rng.normal(size=(362, 16)).astype(np.float32)
    targets = rng.integers(0, 362, hidden.shape[:2])
    mask = rng.random(targets.shape) < 0.5
    head = logprobs.Head(sharding, 8, 0.7, with_entropy=True)
    placed = jax.device_put(table, sharding.params(("vocab", "embed")))
    found = jax.jit(lambda *x: token_logprobs(*x, logprobs.Labels(targets, mask), head))
    ours = found(hidden, placed)
    plain = scipy.special.log_softmax(hidden.astype(np.float64) @ table.T / 0.7, axis=-1)
    picked = np.take_along_axis(plain, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(ours[0], np.where(mask, picked, 0), rtol=1e-5, atol=1e-5)
    entropy = -(np.exp(plain) * plain).sum(-1)
    np.testing.assert_allclose(ours[1], np.where(mask, entropy, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_entropy", [True, False])
def test_sums_at_once_equal_sums_in_turn(with_entropy):
    """Whatever the size of logits, and where a device has no row of the vocabulary at all."""
    logits = np.random.default_rng(0).normal(size=(5, 1187)).astype(np.float32)
    logits *= np.array([1e-3, 1, 30, 1e4, 1], np.float32)[:, None]
    logits[1, 700:] = MASKED
    logits[4] = MASKED
    at_once, in_turn = (
        jax.jit(sums, static_argnums=1)(logits, with_entropy)
        for sums in (logprobs.sums_at_once, logprobs.sums_in_turn)
    )
    assert len(at_once) == len(in_turn) == 2 + with_entropy
    for ours, expected in zip(at_once, in_turn, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@needs("gpu")
def test_a_gpu_reads_logits_once_for_the_entropy_and_the_partition():
    mesh = mesh_of("h100:1")
    head = logprobs.Head(Sharding(mesh), 128, with_entropy=True)
    hidden = jax.ShapeDtypeStruct((1, 256, 64), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((50304, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)

    def run(hidden, table, ids):
        return logprobs.logprobs_and_entropy(hidden, table, logprobs.Labels(ids, ids > 0), head)

    size = 128 * 50304 * 4
    large = [kernel for kernel in kernels(run, hidden, table, ids, mesh=mesh) if kernel[1] >= size]
    product, sums = large
    assert product[0].startswith("f32[128,50304]") and sums[0].count("f32[128,") == 3
    assert sums[1] < 1.01 * size


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mesh", ["fsdp8", "2x2x2", "1x4x2"])
def test_no_device_holds_a_float32_table_or_gradient_of_full_height(mesh, fused):
    sharding = Sharding(make_mesh(*MESHES[mesh]))
    vocab, width = 4096, 64
    place = sharding.params(("vocab", "embed"))
    table = jax.ShapeDtypeStruct((vocab, width), jnp.float32, sharding=place)
    tokens = jax.ShapeDtypeStruct((8, 21), jnp.int32, sharding=sharding.rows())
    head = logprobs.Head(sharding, 8)

    def loss(table, tokens):
        hidden = lookup(table, tokens, sharding, jnp.dtype("bfloat16"))
        labels = logprobs.Labels(tokens, tokens > 0)
        if fused:
            return logprobs.masked_sum(hidden, table, labels, head)
        return token_logprobs(hidden, table, labels, head)[0].sum()

    text = jax.jit(jax.grad(loss), out_shardings=place).lower(table, tokens).compile().as_text()
    height, part = place.shard_shape(table.shape)
    assert f"f32[{height},{part}]" in text
    assert f"[{height},{width}]" not in text


@pytest.mark.parametrize(("mesh", "chunks"), [("one", 4), ("fsdp8", 3), ("2x2x2", 4)])
def test_as_many_chunks_are_computed_as_the_fullest_device_needs(mesh, chunks):
    """Of 21, all positions, where the last rows have 9 and 21 trained ones."""
    head = logprobs.Head(Sharding(make_mesh(*MESHES[mesh])), 8)
    counts = jnp.array([0, 0, 0, 0, 0, 1, 9, 21])[:, None]
    mask = jnp.arange(21) < counts
    rows = jax.sharding.PartitionSpec(BATCH_AXES)

    def local(mask):
        start = jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)

        def chunk(at, sums):
            return sums[0] + 1, sums[1] + jnp.sum(at < mask.size)

        return logprobs.each_chunk(mask, head, chunk, start)

    mapped = jax.shard_map(
        local, mesh=head.sharding.mesh, in_specs=rows, out_specs=rows, check_vma=False
    )
    times, places = jax.jit(mapped)(mask)
    assert set(times.tolist()) == {chunks}
    assert sum(places.tolist()) == 31


@pytest.mark.parametrize("mesh", ["one", "1x4x2"])
def test_the_gradient_of_the_entropy_equals_that_of_the_plain_computation(mesh):
    sharding = Sharding(make_mesh(*MESHES[mesh]))
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(8, 21, 16), scale=0.2), jnp.float32)
    table = jnp.asarray(rng.normal(size=(362, 16)), jnp.float32)
    labels = logprobs.Labels(rng.integers(0, 362, (8, 21)), rng.random((8, 21)) < 0.5)
    of_logprobs, of_entropy = rng.normal(size=(2, 8, 21)).astype(np.float32)
    head = logprobs.Head(sharding, 8, 0.7, with_entropy=True, trains_entropy=True)

    def ours(hidden, table):
        found, entropy = token_logprobs(hidden, table, labels, head)
        return jnp.sum(of_logprobs * found + of_entropy * entropy)

    def plain(hidden, table):
        each = jax.nn.log_softmax(hidden @ table.T / 0.7)
        picked = jnp.take_along_axis(each, labels.targets[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(each) * each, axis=-1)
        return jnp.sum(jnp.where(labels.mask, of_logprobs * picked + of_entropy * entropy, 0.0))

    placed = jax.device_put(table, sharding.params(("vocab", "embed")))
    found = jax.jit(jax.grad(ours, (0, 1)))(hidden, placed)
    expected = jax.jit(jax.grad(plain, (0, 1)))(hidden, table)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    frozen = jax.jit(
        jax.grad(
            lambda h: token_logprobs(h, table, labels, head._replace(trains_entropy=False))[1].sum()
        )
    )(hidden)
    assert not np.any(frozen)
