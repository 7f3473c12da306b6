"""Values of attention and of whole training steps against XLA's in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from programs_at_hand import (
    TINY,
    batch_of,
    build,
    grpo_config,
    policy_batch,
    sft_batch,
    sft_config,
    state_of,
)
from results import FAILURES, relative_error, say

from atlas_jax.config import MeshConfig, ModelOptions
from atlas_jax.models import attention
from atlas_jax.recipes import sft
from atlas_jax.sharding import make_mesh
from atlas_jax.types import RowBounds

_LENGTH = 256
_LAYOUTS = {
    "causal": (1, 0, 0),
    "packed": (4, 0, 0),
    "shared prompt": (1, 5, 0),
    "window": (1, 0, 64),
    "packed window": (4, 0, 64),
}
"""Segments of a row, completions that share its prompt, and window."""
_SHAPES = {
    (16, 8, 128): tuple(_LAYOUTS),
    (4, 1, 256): ("causal", "packed", "window", "packed window"),
    (4, 2, 64): ("causal", "packed"),
}
"""Heads, key/value heads and head size."""
_WORST = 0.02


def own_attention() -> str:
    """Returns the attention that `auto` takes on this device in bfloat16."""
    return {"gpu": "cudnn", "tpu": "splash"}.get(jax.devices()[0].platform, "xla")


def values(tiny: bool) -> None:
    """Compares attention, losses and gradients, and takes ten steps of a tiny model."""
    jax.config.update("jax_default_matmul_precision", "highest")  # of the reference, not TF32
    shapes = dict(list(_SHAPES.items())[-1:]) if tiny else _SHAPES
    for heads, layouts in shapes.items():
        for layout in layouts:
            what = f"{layout}, heads {heads[0]}/{heads[1]} x {heads[2]}"
            try:
                found = _attention_errors(heads, *_LAYOUTS[layout])
            except FAILURES as error:
                say("values.attention", what=what, good=False, error=repr(error)[:600])
                continue
            good = max(found.values()) < _WORST
            say("values.attention", what=what, good=good, **found)
    for packing in (True, False):
        _sft(packing)
    _policy()


def _attention_errors(
    heads: tuple[int, int, int], segments: int, completions: int, window: int
) -> dict[str, float]:
    """Returns the relative errors of the output and of the three gradients."""
    num_heads, num_kv_heads, size = heads
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    query_shape = (2, _LENGTH, num_heads, size)
    key_shape = (2, _LENGTH, num_kv_heads, size)
    keys = jax.random.split(jax.random.key(0), 4)
    query, gradient = (jax.random.normal(k, query_shape, jnp.bfloat16) for k in keys[:2])
    key, value = (jax.random.normal(k, key_shape, jnp.bfloat16) for k in keys[2:])
    segment_ids = jnp.asarray(sft_batch((2, _LENGTH), 100, segments).segment_ids)
    sequence_ids = None
    if completions:
        policy = policy_batch((2, _LENGTH), 100, 56, 40, completions)
        segment_ids = jnp.asarray(policy.segment_ids)
        sequence_ids = jnp.asarray(policy.sequence_ids)
    is_token = (segment_ids > 0)[..., None, None]

    def one(name: str, dtype: str) -> list[Any]:
        packed = segments > 1 or completions > 0
        attend = attention.select(name, mesh, packed, jnp.dtype(dtype), size, window)
        bounds = RowBounds(segments=completions + 1 if completions else segments)

        @jax.jit
        def both(query: Any, key: Any, value: Any, gradient: Any) -> list[Any]:
            def forward(*qkv: Any) -> jax.Array:
                over_rows = attention.over(attend, segment_ids, sequence_ids, bounds)
                out = over_rows(*qkv, scale=size**-0.5, window=window)
                return jnp.where(is_token, out, 0).astype(jnp.float32)

            out, back = jax.vjp(forward, *(x.astype(dtype) for x in (query, key, value)))
            return [out, *back(jnp.where(is_token, gradient, 0).astype(jnp.float32))]

        return both(query, key, value, gradient)

    pairs = zip(one(own_attention(), "bfloat16"), one("xla", "float32"), strict=True)
    errors = [round(relative_error(a, b), 5) for a, b in pairs]
    return dict(zip(("out", "dq", "dk", "dv"), errors, strict=True))


def _sft(packing: bool) -> None:
    """Compares loss and gradients of a tiny model with those in float32, and trains it."""
    found: dict[str, Any] = {}
    segments = 8 if packing else 1
    for dtype, name in (("float32", "xla"), ("bfloat16", own_attention())):
        config = sft_config(
            _LENGTH,
            2,
            packing=packing,
            attn_implementation=name,
            model=ModelOptions(compute_dtype=dtype),
            loss_chunk_size=128,
        )
        run = build(config, True, jax.devices()[:1])
        bounds = RowBounds(segments=segments)
        loss = sft.make_loss(run.decoder, config.loss_chunk_size, bounds)
        batch = sft_batch((2, _LENGTH), TINY["vocab_size"], segments)

        def mean(params: Any, loss: Any = loss, batch: Any = batch) -> jax.Array:
            (value, weight), _ = loss(params, jax.tree.map(jnp.asarray, batch))
            return value / weight

        found[dtype] = jax.jit(jax.value_and_grad(mean))(run.decoder.init(1))
    program = run.programs[0]
    batches = batch_of(run, program)
    state = state_of(run)
    curve = []
    for _ in range(10):
        state, out = program.function(state, batches, *program.arguments[2:])
        total, weight = jax.device_get(out["loss/total"])
        curve.append(round(float(total / weight), 4))
    (exact, gradients), (value, others) = found["float32"], found["bfloat16"]
    errors = jax.tree.map(relative_error, others, gradients)
    worst = max(jax.tree.leaves(errors))
    close = abs(float(value) - float(exact)) < 0.005 * float(exact)
    say(
        "values.sft",
        packing=packing,
        loss=round(float(value), 5),
        reference=round(float(exact), 5),
        worst_gradient=round(worst, 4),
        curve=curve,
        good=close and worst < 0.1 and curve[-1] < curve[0],
    )


def _policy() -> None:
    """Compares log-probabilities of rows that share a prompt with those in float32."""
    found = []
    for dtype, name in (("float32", "xla"), ("bfloat16", own_attention())):
        config = grpo_config(
            56, 40, 4, attn_implementation=name, model=ModelOptions(compute_dtype=dtype)
        )
        run = build(config, True, jax.devices()[:1])
        program = next(p for p in run.programs if p.name == "logprobs")
        cast = lambda x, s: x.astype(s.dtype)  # noqa: E731
        params = jax.tree.map(cast, run.decoder.init(1), program.arguments[0])
        found.append(np.asarray(program.function(params, batch_of(run, program))))
    apart = np.abs(found[0] - found[1])
    say(
        "values.policy",
        mean=float(apart.mean()),
        largest=float(apart.max()),
        good=bool(apart.max() < 0.1),
    )
