"""The decoder, as pure functions of an explicit tree of parameters.

The layers are Flax NNX modules, which nothing outside this package sees: callers hold a `Decoder`,
which knows shapes and dims and computes `hidden(params, tokens, positions, segment_ids)`. Layers
are stacked on a leading dim and scanned, so compile time does not grow with depth.

The tree: `embed [V, D]`, `layers` (one `Block`, every leaf with a leading L), `norm [D]`, and
`head [V, D]` where it is not tied to `embed`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from atlas_jax import sharding as shd
from atlas_jax.models import vocab
from atlas_jax.models.attention import AttentionFn
from atlas_jax.models.config import ModelConfig
from atlas_jax.models.layers import INIT_SCALE, Block, Rotation, rms_norm, rotation
from atlas_jax.types import Params

REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

FLOAT32 = jnp.dtype("float32")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder of one architecture, computed in one way.

    Attributes:
        config: what the model is.
        sharding: where its arrays live.
        attention: how it attends.
        param_dtype: of the parameters at rest.
        compute_dtype: of activations and of the weights in matrix products.
        remat: key of `REMAT_POLICIES`.
    """

    config: ModelConfig
    sharding: shd.Sharding
    attention: AttentionFn
    param_dtype: jnp.dtype = FLOAT32
    compute_dtype: jnp.dtype = FLOAT32
    remat: str = "none"

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
        """What each dim of each parameter is, a tree of `sharding.Dims`."""
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
        """Returns random parameters in place on the mesh; norms are 1, biases 0."""
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
        """Returns where each parameter rests, a tree of `NamedSharding`.

        Raises:
            ValueError: names the parameter that does not divide over the mesh.
        """

        def place(path: Any, shape: jax.ShapeDtypeStruct, dims: shd.Dims) -> NamedSharding:
            self.sharding.check(jax.tree_util.keystr(path), shape.shape, dims)
            return self.sharding.params(dims)

        return jax.tree.map_with_path(place, self.shapes, self.dims)

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Returns the last hidden states after the final norm, in the compute dtype."""
        config = self.config
        x = vocab.lookup(params["embed"], tokens, self.sharding).astype(self.compute_dtype)
        x = x * jnp.asarray(config.embed_scale, self.compute_dtype)
        angles = [
            rotation(positions, rope, config.head_dim)
            for rope in (config.rope, config.local_rope or config.rope)
        ]
        x = self._scan(params["layers"], x, angles, segment_ids)
        return rms_norm(x, params["norm"], config)

    def output_table(self, params: Params) -> Float[Array, "V D"]:
        """Returns the output embedding as it rests, for `logprobs`."""
        return params["embed" if self.config.tie_embeddings else "head"]

    def _scan(
        self, layers: Params, x: jax.Array, angles: list[Rotation], segment_ids: jax.Array
    ) -> jax.Array:
        """Runs `x` through the stacked layers, gathering each layer's parameters as it comes."""
        dims = jax.tree.map(lambda d: d[1:], self.dims["layers"], is_leaf=_is_dims)

        def step(x: jax.Array, scanned: tuple[Params, jax.Array]) -> tuple[jax.Array, None]:
            layer, is_local = scanned
            layer = shd.gather(self.sharding, layer, dims, self.compute_dtype)
            block = nnx.merge(self._block[0], nnx.State(layer))
            return self._rows(self._run(block, x, angles, segment_ids, is_local)), None

        step = jax.checkpoint(step, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        local = self.config.local_layers or (False,) * self.config.num_layers
        return jax.lax.scan(step, x, (layers, np.asarray(local)))[0]

    def _run(
        self,
        block: Block,
        x: jax.Array,
        angles: list[Rotation],
        segment_ids: jax.Array,
        is_local: jax.Array,
    ) -> jax.Array:
        """Runs one layer; where only some layers are local, the device chooses."""
        config = self.config

        def attend(window: int, *qkv: jax.Array) -> jax.Array:
            scale = config.score_scale
            return self.attention(*qkv, segment_ids, scale=scale, window=window)

        full, local = (functools.partial(attend, window) for window in (0, config.window))
        if not any(config.local_layers):
            return block(x, angles[0], full)
        if all(config.local_layers):
            return block(x, angles[1], local)
        chosen = jax.tree.map(lambda f, w: jnp.where(is_local, w, f), *angles)
        return block(x, chosen, lambda *qkv: jax.lax.cond(is_local, local, full, *qkv))

    def _rows(self, x: jax.Array) -> jax.Array:
        where = NamedSharding(self.sharding.mesh, PartitionSpec(shd.BATCH_AXES))
        return jax.lax.with_sharding_constraint(x, where)


def _is_dims(x: Any) -> bool:
    return isinstance(x, tuple)
