"""Lookups in an embedding table that is split over devices, against indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.config import MeshConfig
from atlas_jax.models import vocab
from atlas_jax.sharding import Sharding, make_mesh


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (1, 4, 2), (8, 1, 1)])
@pytest.mark.parametrize("mode", ["fsdp", "zero1", "replicated"])
def test_a_lookup_and_its_gradient_equal_indexing(mesh, mode):
    sharding = Sharding(make_mesh(MeshConfig(*mesh)), mode)
    rng = np.random.default_rng(0)
    table = rng.normal(size=(30, 16)).astype(np.float32)
    tokens = jnp.asarray(rng.integers(0, 30, (8, 7)))
    g = rng.normal(size=(8, 7, 16)).astype(np.float32)
    placed = jax.device_put(table, sharding.params(vocab.DIMS))

    def total(table, dtype):
        found = vocab.lookup(table, tokens, sharding, jnp.dtype(dtype))
        return jnp.sum(found * g), found

    compiled = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)
    gradient, found = compiled(placed, "float32")
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, g)
    np.testing.assert_array_equal(found, table[tokens])
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)
    gradient, found = compiled(placed, "bfloat16")
    np.testing.assert_array_equal(found, table[tokens].astype(jnp.bfloat16))
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=0.05)
