"""Rows of every kind that attention meets, and attention by a mask in float32 as their oracle."""

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.models import attention


def packed(length: int, *rows: list[int]) -> jax.Array:
    """Returns segment ids of rows with segments of these lengths; the rest is padding."""
    ids = np.zeros((len(rows), length), np.int32)
    for row, lengths in enumerate(rows):
        ids[row, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return jnp.asarray(ids)


def shared(length: int, *rows: list[int]) -> tuple[jax.Array, jax.Array]:
    """Returns segment and sequence ids of rows of a prompt and completions of these lengths."""
    of_segment = np.zeros((len(rows), length), np.int32)
    of_sequence = np.zeros((len(rows), length), np.int32)
    for row, lengths in enumerate(rows):
        of_segment[row, : sum(lengths)] = 1
        of_sequence[row, : sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
    return jnp.asarray(of_segment), jnp.asarray(of_sequence)


def arrays(rows: int, length: int, heads: tuple[int, int], size: int, dtype=jnp.float32):
    """Returns query, key, value and a gradient of the output, of standard normal numbers."""
    rng = np.random.default_rng(0)
    query, key, value, gradient = (
        jnp.asarray(rng.standard_normal((rows, length, n, size)), dtype)
        for n in (heads[0], heads[1], heads[1], heads[0])
    )
    return query, key, value, gradient


def by_mask(query, key, value, segment_ids, sequence_ids=None, *, scale, window=0):
    """Attention by a mask, in float32."""
    wide = [
        jnp.repeat(x, query.shape[2] // x.shape[2], 2).astype(jnp.float32) for x in (key, value)
    ]
    scores = jnp.einsum("btnh,bsnh->bnts", query.astype(jnp.float32), wide[0]) * scale
    mask = attention.visible(segment_ids, sequence_ids, window)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, wide[1])


def errors(attend, data, segment_ids, expected=by_mask, **options) -> dict[str, float]:
    """Returns relative errors in norm of output and gradients over all positions but padding."""
    query, key, value, gradient = data
    held = (segment_ids > 0)[..., None, None]

    def run(attend, qkv):
        def output(*qkv):
            out = attend(*qkv, segment_ids, **options)
            return jnp.where(held, out, 0).astype(jnp.float32)

        out, back = jax.vjp(output, *qkv)
        return out, *back(jnp.where(held, gradient, 0).astype(jnp.float32))

    found = jax.jit(lambda *qkv: run(attend, qkv))(query, key, value)
    wide = (x.astype(jnp.float32) for x in (query, key, value))
    exact = jax.jit(lambda *qkv: run(expected, qkv))(*wide)
    return {
        name: float(np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b))
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, exact, strict=True)
    }
