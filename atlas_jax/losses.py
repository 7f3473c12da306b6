"""Losses: pure functions of arrays that return `(sum, weight)`.

The sum over all microbatches and devices is divided once by the sum of the weights, so that
microbatching, packing and data parallelism change nothing.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

LossSum = tuple[Float[Array, ""], Float[Array, ""]]


def cross_entropy(logprobs: Float[Array, "B T"], loss_mask: Bool[Array, "B T"]) -> LossSum:
    """Returns the negative log-likelihood of the masked tokens in nats, and how many they are."""
    total = -jnp.sum(jnp.where(loss_mask, logprobs, 0.0))
    return total, jnp.sum(loss_mask).astype(jnp.float32)
