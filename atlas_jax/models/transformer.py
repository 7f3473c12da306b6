"""The decoder, as pure functions of an explicit tree of parameters.

Layers are Flax NNX modules, which stay inside this package: callers hold a `Decoder`, which has the
shapes and dims and computes `hidden(params, tokens, positions, segment_ids)`. Layers are stacked on
a leading dim and scanned, so compile time does not grow with depth.

The tree has `embed [V, D]`, `layers` (one `Block`, every leaf with a leading L), `norm [D]`, and
`head [V, D]` unless it is tied to `embed`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from atlas_jax import sharding as shd
from atlas_jax.models import attention, vocab
from atlas_jax.models.attention import AttentionFn
from atlas_jax.models.config import ModelConfig
from atlas_jax.models.layers import (
    INIT_SCALE,
    Block,
    KeysValues,
    Rotation,
    rms_norm,
    rotation,
)
from atlas_jax.types import UNKNOWN, Params, RowBounds

if TYPE_CHECKING:
    from atlas_jax.models.lora import Lora


def _attention(prim: Any, *_: Any, **params: Any) -> bool:
    """Returns whether an operation's result is the output or the statistics of attention.

    cuDNN's kernel returns both, without names.
    """
    kept = ("attention_out", "attention_stats")
    return prim.name.startswith("dot_product_attention_fwd") or params.get("name") in kept


_policies = jax.checkpoint_policies
_both = _policies.save_from_both_policies

_adapted = _policies.save_only_these_names("adapted")  # else both parts of LoRA's sums were kept

# Every policy keeps what attention returns, which is small beside the time that computing it again
# takes. Elementwise results are recomputed by every policy: writing them out costs more (on two CPU
# cores 14 % of a step's time and 1.8 GiB for SmolLM2-135M).
REMAT_POLICIES = {
    "none": _both(_policies.dots_saveable, _both(_adapted, _attention)),
    "dots": _both(_policies.dots_with_no_batch_dims_saveable, _both(_adapted, _attention)),
    "mlp": _both(_policies.save_only_these_names("attention_projection"), _attention),
    "full": _attention,
}

_KEPT_IN_HOST = _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["kept"],
    offload_src="device",
    offload_dst="pinned_host",
)

FLOAT32 = jnp.dtype("float32")


class Trained(NamedTuple):
    """The parameters that training changes: three trees of one structure."""

    shapes: Params
    dims: Params
    placements: Params


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder of one architecture, with its placement on devices and its dtypes.

    It is a static argument of compiled programs. Equality compares the fields, of which `attention`
    may be a `functools.partial`, equal only to itself: a decoder made again compiles again.

    Attributes:
        config: the architecture.
        sharding: the placement of arrays.
        attention: the attention implementation.
        param_dtype: the dtype of parameters between steps.
        compute_dtype: the dtype of activations, and of weights in matrix products.
        gradient_dtype: the dtype of the gradients of layers as they are summed over devices; not
            narrower than `compute_dtype`.
        remat: key of `REMAT_POLICIES`.
        lora: the factors that are trained in place of the parameters, which then stay; None for
            none.
    """

    config: ModelConfig
    sharding: shd.Sharding
    attention: AttentionFn
    param_dtype: jnp.dtype = FLOAT32
    compute_dtype: jnp.dtype = FLOAT32
    gradient_dtype: jnp.dtype = FLOAT32
    remat: str = "none"
    lora: Lora | None = None

    @functools.cached_property
    def _block(self) -> tuple[Any, Any]:
        """The graph of one layer and its abstract state."""
        block = nnx.eval_shape(lambda: Block(self.config, rngs=nnx.Rngs(0)))
        return nnx.split(block, nnx.Param)

    @functools.cached_property
    def shapes(self) -> Params:
        """Parameter shapes, a tree of `jax.ShapeDtypeStruct`."""
        config = self.config
        table = jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), self.param_dtype)
        norm = jax.ShapeDtypeStruct((config.hidden_size,), self.param_dtype)
        layers = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((config.num_layers, *x.shape), self.param_dtype),
            nnx.to_pure_dict(self._block[1]),
        )
        return self._tree(table, layers, norm)

    @functools.cached_property
    def dims(self) -> Params:
        """Names of the dims of each parameter, a tree of `sharding.Dims`."""
        layers = nnx.to_pure_dict(
            jax.tree.map(
                lambda x: x.replace((None, *x.get_metadata("dims"))),
                self._block[1],
                is_leaf=lambda x: isinstance(x, nnx.Variable),
            )
        )
        return self._tree(("vocab", "embed"), layers, (None,))

    def _tree(self, table: Any, layers: Any, norm: Any) -> Params:
        tree = {"embed": table, "layers": layers, "norm": norm}
        return tree if self.config.tie_embeddings else tree | {"head": table}

    def init(self, seed: int) -> Params:
        """Returns random parameters, created in place on the mesh; norms are 1, biases 0."""
        config = self.config

        def layer(key: jax.Array) -> Params:
            return nnx.to_pure_dict(nnx.state(Block(config, rngs=nnx.Rngs(key)), nnx.Param))

        def create() -> Params:
            embed, head, layers = jax.random.split(jax.random.key(seed), 3)
            table = functools.partial(jax.random.normal, shape=self.shapes["embed"].shape)
            tree = self._tree(
                INIT_SCALE * table(embed),
                jax.vmap(layer)(jax.random.split(layers, config.num_layers)),
                jnp.full((config.hidden_size,), 1.0 - config.norm_offset),
            )
            if "head" in tree:
                tree["head"] = INIT_SCALE * table(head)
            return jax.tree.map(lambda x: x.astype(self.param_dtype), tree)

        return jax.jit(create, out_shardings=self.placements())()

    def placements(self) -> Params:
        """Returns the placement of each parameter between steps, a tree of `NamedSharding`.

        Raises:
            ValueError: if a parameter does not divide over the mesh; the message names it.
        """
        return self._placed(self.shapes, self.dims)

    @property
    def trained(self) -> Trained:
        """The trained parameters, which are all of them without `lora`; raises as `placements`."""
        shapes = self.shapes
        dims = self.dims
        if self.lora is not None:
            from atlas_jax.models import lora  # most runs train whole models

            shapes = lora.shapes(self.lora, self.config)
            dims = lora.dims(self.lora, self.config)
        return Trained(shapes, dims, self._placed(shapes, dims))

    def _placed(self, shapes: Params, dims: Params) -> Params:
        def place(path: Any, shape: jax.ShapeDtypeStruct, dims: shd.Dims) -> NamedSharding:
            self.sharding.check(jax.tree_util.keystr(path), shape.shape, dims)
            return self.sharding.params(dims)

        return jax.tree.map_with_path(place, shapes, dims)

    def flops_per_token(self, length: float) -> float:
        """Returns the operations of a step per token, see `ModelConfig.flops_per_token`.

        Matrices that stay have no gradient, which is a third of their operations; those of the
        factors are not counted.
        """
        total = self.config.flops_per_token(length)
        return total - self.config.flops_per_token(0) / 3 if self.lora else total

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        sequence_ids: Int[Array, "B T"] | None = None,
        bounds: RowBounds = UNKNOWN,
    ) -> Float[Array, "B T D"]:
        """Returns the last hidden states after the final norm, in the compute dtype.

        Args:
            params: the tree of parameters.
            tokens: token ids.
            positions: rotary positions.
            segment_ids: segments, within which positions attend; 0 is padding.
            sequence_ids: sequences that share a prompt (`types.PolicyBatch`), or None. Positions of
                a sequence other than 0 are seen by that sequence only.
            bounds: what is known of the rows, with which flash kernels need no mask.
        """
        over_rows = attention.over(self.attention, segment_ids, sequence_ids, bounds)

        def attend(window: int, *qkv: jax.Array) -> jax.Array:
            return over_rows(*qkv, scale=self.config.score_scale, window=window)

        def step(x: jax.Array, scanned: tuple[Params, Any]) -> tuple[jax.Array, None]:
            return self.layer(scanned, checkpoint_name(x, "kept"), angles, attend)[0], None

        angles = self.angles(positions)
        policy = REMAT_POLICIES[self.remat]
        if "activations" in self.sharding.offload:
            policy = _KEPT_IN_HOST
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        x = jax.lax.scan(step, self.embed(params, tokens), self.stacked(params))[0]
        return self.norm(params, x)

    def embed(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the inputs of the first layer."""
        x = vocab.lookup(params["embed"], tokens, self.sharding, self.compute_dtype)
        return x * jnp.asarray(self.config.embed_scale, self.compute_dtype)

    def norm(self, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the final norm of the last layer's output, divided by the divisor of logits."""
        return rms_norm(x, params["norm"], self.config, self.config.logit_divisor)

    def output_table(self, params: Params) -> Float[Array, "V D"]:
        """Returns the output embedding as it is placed between steps, for `logprobs`."""
        return params["embed" if self.config.tie_embeddings else "head"]

    def angles(self, positions: Int[Array, "B T"]) -> tuple[Rotation, Rotation]:
        """Returns the rotary angles of global and of local layers."""
        config = self.config
        ropes = config.rope, config.local_rope or config.rope
        full, local = (rotation(positions, rope, config.head_dim) for rope in ropes)
        return full, local

    def stacked(self, params: Params) -> tuple[Params, Any]:
        """Returns the operands of a scan over layers.

        They are each layer's parameters, whether it is local, and whether it rotates. A key
        `dropout` of the parameters is divided among the layers.
        """
        local, rotates = zip(*self.kinds, strict=True)
        layers = params["layers"]
        if "dropout" in params:
            keys = jax.random.split(params["dropout"], self.config.num_layers)
            layers = layers | {"dropout": keys}
        return layers, (np.asarray(local), np.asarray(rotates))

    @property
    def kinds(self) -> list[tuple[bool, bool]]:
        """Flags of each layer: whether it is local, and whether it rotates."""
        size = self.config.num_layers
        local = self.config.local_layers or (False,) * size
        return list(zip(local, self.config.rope_layers or (True,) * size, strict=True))

    def layer(
        self,
        scanned: tuple[Params, tuple[jax.Array | bool, jax.Array | bool]],
        x: Float[Array, "B T D"],
        angles: tuple[Rotation, Rotation],
        attend: Callable[..., jax.Array],
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """Runs one layer of `stacked`, whose parameters are gathered for it alone.

        Args:
            scanned: one layer's part of `stacked`, or its parameters and its `kinds`.
            x: the layer's input.
            angles: the rotary angles, from `angles`.
            attend: the attention `(window, query, key, value) -> [B, T, N, H]`; window 0 sees
                everything. If only some layers are local, the choice is made on the device unless
                the layer's kind is known.
        """
        config = self.config
        params, (is_local, rotates) = scanned
        block = self._bound(params)
        full, local = (functools.partial(attend, window) for window in (0, config.window))
        if config.rope_layers:
            angles = _where(rotates, angles[0]), _where(rotates, angles[1])
        if isinstance(is_local, bool):
            x, cached = block(x, angles[is_local], local if is_local else full)
        elif not any(config.local_layers):
            x, cached = block(x, angles[0], full)
        elif all(config.local_layers):
            x, cached = block(x, angles[1], local)
        else:
            chosen = jax.tree.map(lambda f, w: jnp.where(is_local, w, f), *angles)
            x, cached = block(x, chosen, lambda *qkv: jax.lax.cond(is_local, local, full, *qkv))
        return self._rows(x), cached

    def _bound(self, params: Params) -> Block:
        """Returns a layer with its parameters, which are gathered for it alone."""
        dtypes = self.compute_dtype, self.gradient_dtype
        if self.lora is None:
            params = shd.gather(self.sharding, params, self._layer_dims, *dtypes)
            return nnx.merge(self._block[0], nnx.State(params))
        from atlas_jax.models import lora

        params, factors = lora.split(params)
        key = params.pop("dropout", None)
        # What stays has no gradient, for which its dtype would be wider.
        params = shd.gather(self.sharding, params, self._layer_dims, dtypes[0], dtypes[0])
        block = nnx.merge(self._block[0], nnx.State(params))
        if factors:
            dims = _of_layer(lora.dims(self.lora, self.config))
            factors = shd.gather(self.sharding, factors, dims, *dtypes)
            lora.attach(block, factors, self.lora, key)
        return block

    @functools.cached_property
    def _layer_dims(self) -> Params:
        return _of_layer(self.dims)

    def _rows(self, x: jax.Array) -> jax.Array:
        where = NamedSharding(self.sharding.mesh, PartitionSpec(shd.BATCH_AXES))
        return jax.lax.with_sharding_constraint(x, where)


def _where(rotates: jax.Array | bool, angles: Rotation) -> Rotation:
    """Returns the angles, or angles of zero for a layer that does not rotate."""
    return Rotation(jnp.where(rotates, angles.cos, 1.0), jnp.where(rotates, angles.sin, 0.0))


def _of_layer(dims: Params) -> Params:
    """Returns the dims of one layer's parameters."""
    return jax.tree.map(lambda d: d[1:], dims["layers"], is_leaf=_is_dims)


def _is_dims(x: Any) -> bool:
    return isinstance(x, tuple)
