"""Queries and keys after norm and rotation: values, and what a GPU's compiler makes of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.models import layers
from atlas_jax.models.config import ModelConfig, Rope
from tests.compilers import kernels, mesh_of, needs

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=4, num_kv_heads=2,
    head_dim=16, max_positions=64, norm_eps=1e-6, tie_embeddings=True, rope=Rope(),
    qk_norm="head", norm_offset=1.0,
)  # fmt: skip


@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(16,), (4, 16)], ids=["a head", "all heads"])
def test_a_norm_and_then_a_rotation_are_computed(shape, partial):
    """In value and gradients, although the division by the root mean square comes last."""
    keys = jax.random.split(jax.random.key(1), 3)
    x, weights = (jax.random.normal(key, (2, 5, 4, 16)) for key in keys[:2])
    positions = jnp.arange(10).reshape(2, 5)
    angles = layers.rotation(positions, Rope(partial=partial), 16)

    def ours(x, scale):
        norm = layers.Norm(shape, CONFIG)
        norm.scale[...] = scale
        return layers.rotated(norm, x, angles)

    def apart(x, scale):
        return layers.rotate(layers.rms_norm(x, scale, CONFIG), angles)

    inputs = x, jax.random.normal(keys[2], shape)
    np.testing.assert_allclose(ours(*inputs), apart(*inputs), rtol=1e-5, atol=1e-6)
    found, expected = (jax.vjp(way, *inputs)[1](weights) for way in (ours, apart))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@needs("gpu")
def test_a_gpu_reads_a_projection_twice_to_norm_and_rotate_it():
    """And writes nothing in float32, as it would with the rotation after the whole norm."""
    norm = layers.Norm((128,), dataclasses.replace(CONFIG, head_dim=128))
    x = jax.ShapeDtypeStruct((2, 4096, 16, 128), jnp.bfloat16)
    angles = jax.ShapeDtypeStruct((2, 4096, 64), jnp.float32)

    def run(x, cos, sin):
        return layers.rotated(norm, x, layers.Rotation(cos, sin))

    found = kernels(run, x, angles, angles, mesh=mesh_of("h100:1"))
    size = 2 * 4096 * 16 * 128 * 2
    assert not any(shape.startswith("f32[2,4096,16,128]") for shape, _, _ in found)
    assert sum(num_bytes for _, num_bytes, _ in found) < 3.3 * size
