"""The parts of a decoder layer: norm, rotary embedding, attention, gated MLP.

Parameters name their dims in the metadata `dims`, which `sharding` maps to mesh axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from atlas_jax.models.config import ModelConfig, Rope

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

Attend = Callable[..., jax.Array]
"""Attention `[B, T, N, H]` from query, key and value; the caller binds masks and windows."""


class KeysValues(NamedTuple):
    """Rotated keys, and values, that later positions attend to, each `[B, T, K, H]`."""

    keys: jax.Array
    values: jax.Array


class Rotation(NamedTuple):
    """Rotary angles of a batch: cosine and sine, each `[B, T, H/2]` float32."""

    cos: jax.Array
    sin: jax.Array


INIT_SCALE = 0.02
"""Standard deviation of random matrices."""


def rms_norm(
    x: Float[Array, "*B"], scale: Float[Array, "*D"], config: ModelConfig, divisor: float = 1.0
) -> Float[Array, "*B"]:
    """Returns `x` over its root mean square, times the scale (arXiv:1910.07467, eq. 4).

    It is computed in float32 and returned in the dtype of `x`.

    Args:
        x: the input; its last dims, as many as those of `scale`, are normed together.
        scale: the learned scale.
        config: the model, for epsilon and the offset of the scale.
        divisor: a divisor of the result.
    """
    wide = x.astype(jnp.float32)
    factor = _factor(scale, config) / divisor
    return (wide * _inverse_rms(wide, scale.ndim, config) * factor).astype(x.dtype)


def _inverse_rms(x: Float[Array, "*B"], num_dims: int, config: ModelConfig) -> Float[Array, "*S"]:
    """Returns the inverse root mean square over the last dims, which stay with size 1."""
    mean_square = jnp.mean(jnp.square(x), axis=tuple(range(-num_dims, 0)), keepdims=True)
    return jax.lax.rsqrt(mean_square + config.norm_eps)


def _factor(scale: Float[Array, "*D"], config: ModelConfig) -> Float[Array, "*D"]:
    """Returns the factor of a norm in float32."""
    return scale.astype(jnp.float32) + config.norm_offset


class Norm(nnx.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(
        self, shape: tuple[int, ...], config: ModelConfig, dims: tuple[str | None, ...] = (None,)
    ) -> None:
        self.scale = nnx.Param(jnp.full(shape, 1.0 - config.norm_offset), dims=dims)
        self.config = config

    def __call__(self, x: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Returns the norm of the last dims of `x`, those of the scale."""
        return rms_norm(x, self.scale[...], self.config)


def rotation(positions: Int[Array, "B T"], rope: Rope, head_dim: int) -> Rotation:
    """Returns the angles `position * theta ** (-2 i / H)`, stretched as `rope` says.

    Reference: RoFormer, arXiv:2104.09864, eq. 15; `llama3` stretches wavelengths as Llama 3.1 does
    (its model card and transformers' `_compute_llama3_parameters`); `yarn` is arXiv:2309.00071,
    section 3.2, with the factor of section 3.4 on cosine and sine; `longrope` divides each
    frequency by its own number (arXiv:2402.13753, eq. 2). H counts the rotated dims of a head.
    """
    head_dim = int(head_dim * rope.partial)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    frequencies = (1.0 / rope.theta**exponents).astype(np.float32)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(frequencies, rope)
    elif rope.kind == "yarn":
        frequencies = _yarn(frequencies, rope, head_dim)
    elif rope.kind == "longrope":
        frequencies = (frequencies / rope.divisors).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    scale = rope.attention_factor
    return Rotation(scale * jnp.cos(angles), scale * jnp.sin(angles))


def _llama3(frequencies: np.ndarray, rope: Rope) -> np.ndarray:
    """Divides low frequencies by the factor, keeps high ones, and blends in between."""
    turns = rope.original_max_positions * frequencies / (2 * np.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(blend, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def _yarn(frequencies: np.ndarray, rope: Rope, head_dim: int) -> np.ndarray:
    """Keeps frequencies with many turns, divides those with few, and blends by pair in between."""

    def pair(turns: float) -> float:
        """Returns the index of the frequency with this many turns in the original context."""
        length = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    first = pair(rope.beta_fast)
    last = pair(rope.beta_slow)
    if rope.truncate:
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, head_dim - 1)
    width = last - first or 0.001
    divided = np.clip((np.arange(head_dim // 2, dtype=np.float32) - first) / width, 0.0, 1.0)
    return divided * frequencies / rope.factor + (1 - divided) * frequencies


def rotate(x: Float[Array, "B T N H"], angles: Rotation) -> Float[Array, "B T N H"]:
    """Rotates the pairs `(x[i], x[i + R/2])` of every head, in float32.

    R is twice the number of angles. If R is less than H, the last H - R dims stay as they are.
    """
    half = angles.cos.shape[-1]
    low, high, passed = jnp.split(x, (half, 2 * half), axis=-1)
    low = low.astype(jnp.float32)
    high = high.astype(jnp.float32)
    cos = angles.cos[:, :, None]
    sin = angles.sin[:, :, None]
    rotated = [low * cos - high * sin, high * cos + low * sin]
    return jnp.concatenate([*(part.astype(x.dtype) for part in rotated), passed], axis=-1)


class Projection(nnx.Module):
    """A linear map between named dims, with an optional bias."""

    def __init__(
        self,
        inner: tuple[int, ...],
        outer: tuple[int, ...],
        dims: tuple[str | None, ...],
        bias: bool,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        kernel = INIT_SCALE * jax.random.normal(rngs.params(), (*inner, *outer))
        self.kernel = nnx.Param(kernel, dims=dims)
        self.bias = nnx.Param(jnp.zeros(outer), dims=dims[len(inner) :]) if bias else None
        self.inner = inner
        self.outer = outer
        self.delta: Callable[[jax.Array], jax.Array] | None = None  # what `lora` adds

    def __call__(self, x: Float[Array, "B T *inner"]) -> Float[Array, "B T *outer"]:
        """Returns the product of `x` and the kernel over the inner dims, plus the bias.

        Operands are reshaped to matrices first. With more dims, XLA copies them before it sums the
        kernel's gradient over tokens, which takes a fifth of a step's time on two CPU cores.
        """
        size = math.prod(self.inner)
        rows = x.reshape(-1, size)
        y = product(rows, self.kernel[...].reshape(size, -1))
        if self.delta is not None:
            y = checkpoint_name(y + self.delta(rows), "adapted")
        y = y.reshape(*x.shape[:2], *self.outer)
        return y if self.bias is None else (y + self.bias[...]).astype(x.dtype)


def product(x: Float[Array, "M I"], kernel: Float[Array, "I O"]) -> Float[Array, "M O"]:
    """Returns `x @ kernel` in the dtype of `x`, with a gradient in the dtype of the kernel."""
    return x @ kernel if x.dtype == kernel.dtype else _mixed_product(x, kernel)


@jax.custom_vjp
def _mixed_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel.astype(x.dtype)


def _mixed_product_fwd(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _mixed_product(x, kernel), (x, kernel)


def _mixed_product_bwd(
    operands: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns both gradients; that of the kernel leaves its product unrounded.

    A sum over devices takes place in the dtype of the product's result, whatever follows it.
    """
    x, kernel = operands
    d_kernel = jnp.einsum("mi,mo->io", x, g, preferred_element_type=kernel.dtype)
    return g @ kernel.astype(x.dtype).T, d_kernel


_mixed_product.defvjp(_mixed_product_fwd, _mixed_product_bwd)


class Attention(nnx.Module):
    """Grouped-query self-attention (arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        d = config.hidden_size
        n = config.num_heads
        k = config.num_kv_heads
        h = config.head_dim
        kv = ("embed", "kv_heads", None)
        bias = config.qkv_bias
        self.q = Projection((d,), (n, h), ("embed", "heads", None), bias, rngs=rngs)
        self.k = Projection((d,), (k, h), kv, bias, rngs=rngs)
        self.v = Projection((d,), (k, h), kv, bias, rngs=rngs)
        o_dims = ("heads", None, "embed")
        self.o = Projection((n, h), (d,), o_dims, config.output_bias, rngs=rngs)
        self.q_norm = _head_norm(config, n, "heads")
        self.k_norm = _head_norm(config, k, "kv_heads")

    def __call__(
        self, x: Float[Array, "B T D"], angles: Rotation, attend: Attend
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """Returns the attention of every position to those that `attend` lets it see."""
        query = _kept(self.q(x))
        key = _kept(self.k(x))
        value = _kept(self.v(x))
        query = rotated(self.q_norm, query, angles)
        key = rotated(self.k_norm, key, angles)
        out = self.o(attend(query, key, value))
        return _kept(out), KeysValues(key, value)


def rotated(
    norm: Norm | None, x: Float[Array, "B T N H"], angles: Rotation
) -> Float[Array, "B T N H"]:
    """Returns queries or keys after their norm, if there is one, and their rotation.

    A rotation leaves root mean squares as they are, so the division by them comes last. XLA writes
    a norm that stands before a rotation out in float32 on a GPU; this way it reads the projection
    twice and writes the result.
    """
    if norm is None:
        return rotate(x, angles)
    wide = x.astype(jnp.float32)
    scale = norm.scale[...]
    scaled = rotate(wide * _factor(scale, norm.config), angles)
    return (scaled * _inverse_rms(wide, scale.ndim, norm.config)).astype(x.dtype)


def _kept(projection: jax.Array) -> jax.Array:
    """Names a projection of attention for the policy that keeps those."""
    return checkpoint_name(projection, "attention_projection")


def _head_norm(config: ModelConfig, heads: int, dim: str) -> Norm | None:
    """Returns the norm of queries or keys, or None for a model without one."""
    if config.qk_norm == "projection":
        return Norm((heads, config.head_dim), config, (dim, None))
    return Norm((config.head_dim,), config) if config.qk_norm == "head" else None


class MLP(nnx.Module):
    """Gated feed-forward layer (GLU variants, arXiv:2002.05202): `down(act(gate x) * up x)`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        d = config.hidden_size
        f = config.intermediate_size
        bias = config.mlp_bias
        self.gate = Projection((d,), (f,), ("embed", "mlp"), bias, rngs=rngs)
        self.up = Projection((d,), (f,), ("embed", "mlp"), bias, rngs=rngs)
        self.down = Projection((f,), (d,), ("mlp", "embed"), bias, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the layer's output for every position."""
        return self.down(_ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One decoder layer: attention and MLP with residual connections, and norms around them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        def norm(*places: str) -> Norm | None:
            return Norm((config.hidden_size,), config) if config.norms in places else None

        self.attention_norm = norm("before", "both")
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = norm("before", "both")
        self.mlp = MLP(config, rngs=rngs)
        self.attention_post_norm = norm("after", "both")
        self.mlp_post_norm = norm("after", "both")
        self.residual_scale = config.residual_scale

    def __call__(
        self, x: Float[Array, "B T D"], angles: Rotation, attend: Attend
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """Returns the layer's output for every position, and its keys and values."""
        y, kept = self.attention(_normed(self.attention_norm, x), angles, attend)
        x = self._added(x, _normed(self.attention_post_norm, y))
        y = self.mlp(_normed(self.mlp_norm, x))
        return self._added(x, _normed(self.mlp_post_norm, y)), kept

    def _added(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + (y if self.residual_scale == 1.0 else self.residual_scale * y)


def _normed(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)
