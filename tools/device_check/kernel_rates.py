"""Rates of kernels by themselves, and the file of them that `tools/plan.py --rates` reads."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from programs_at_hand import SEGMENTS, sft_batch
from results import FAILURES, OUT, relative_error, say, seconds
from values import own_attention

from atlas_jax.config import MeshConfig
from atlas_jax.models import attention
from atlas_jax.plan import hlo, kernels, pairs
from atlas_jax.sharding import make_mesh
from atlas_jax.types import RowBounds


def rates(tiny: bool) -> None:
    """Measures products, attention, memory and, on several devices, a gather; writes rates.json."""
    device = jax.devices()[0]
    date = time.strftime("%Y-%m-%d", time.gmtime())
    found: dict[str, Any] = {
        "source": f"measured on {device.device_kind}, jax {jax.__version__}, {date}"
    }
    found["products"] = _products(tiny)
    found["memory"] = _memory(tiny)
    if jax.device_count() > 1:
        found["link"] = _link(tiny)
    found |= _attention(tiny)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "rates.json").write_text(json.dumps(found, indent=1) + "\n")
    say("rates", **found)


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")


def _products(tiny: bool) -> float:
    """Returns FLOP/s of products in the shapes of Qwen3-0.6B's layers at 32,768 tokens."""
    tokens = 256 if tiny else 32768
    keys = jax.random.split(jax.random.key(0), 2)
    flops = spent = 0.0
    for inner, outer in ((1024, 4096), (1024, 6144), (3072, 1024)):
        left = jax.random.normal(keys[0], (tokens, inner), jnp.bfloat16)
        right = jax.random.normal(keys[1], (inner, outer), jnp.bfloat16)
        flops += 2.0 * tokens * inner * outer
        spent += seconds(jax.jit(jnp.matmul), left, right)
    return _rounded(flops / spent)


def _memory(tiny: bool) -> float:
    """Returns bytes a second of reading and writing an array once."""
    x = jnp.ones((2**18 if tiny else 2**28,), jnp.float32)
    return _rounded(2 * x.nbytes / seconds(jax.jit(lambda x: x + 1), x))


def _link(tiny: bool) -> float:
    """Returns bytes a second that a device sends in a gather over all devices."""
    mesh = make_mesh(MeshConfig(fsdp=jax.device_count()))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    count = 2**16 if tiny else 2**26
    x = jax.device_put(jnp.ones((jax.device_count() * count,), jnp.bfloat16), split)
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return _rounded(2 * count * (jax.device_count() - 1) / seconds(whole, x))


def _attention(tiny: bool) -> dict[str, float]:
    """Returns FLOP/s of attention: causal rows, rows with a mask, and packed rows as runs do."""
    shape = (1, 256, 4, 64) if tiny else (4, 8192, 16, 128)
    rows, length, heads, size = shape
    keys = jax.random.split(jax.random.key(0), 4)
    query, gradient = (jax.random.normal(k, shape, jnp.bfloat16) for k in keys[:2])
    key_shape = (rows, length, heads // 2, size)
    key, value = (jax.random.normal(k, key_shape, jnp.bfloat16) for k in keys[2:])
    arrays = (query, key, value, gradient)
    segment_ids = jnp.asarray(sft_batch((rows, length), 100, SEGMENTS).segment_ids)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def of(packed: bool) -> Callable[..., jax.Array]:
        attend = attention.select(own_attention(), mesh, packed, jnp.dtype("bfloat16"))
        ids = segment_ids if packed else jnp.ones_like(segment_ids)
        bounds = RowBounds(segments=SEGMENTS if packed else 1)  # as a run knows them
        over_rows = attention.over(attend, ids, None, bounds)
        return lambda q, k, v: over_rows(q, k, v, scale=size**-0.5, window=0)

    def masked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        causal = jnp.tril(jnp.ones((length, length), bool))
        mask = causal & (segment_ids[:, :, None] == segment_ids[:, None, :])
        name: Any = "cudnn" if own_attention() == "cudnn" else "xla"
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], scale=size**-0.5, implementation=name
        )

    found: dict[str, float] = {}
    outputs = {}
    for what, way in (("causal", of(False)), ("masked", masked), ("packed", of(True))):
        try:
            outputs[what], measured = _one(what, way, arrays)
        except FAILURES as error:
            say("rates.attention", what=what, good=False, error=repr(error)[:600])
            continue
        found |= measured
    if {"masked", "packed"} <= set(outputs):
        both = zip(outputs["packed"], outputs["masked"], strict=True)
        errors = [round(relative_error(a, b), 6) for a, b in both]
        say("rates.attention", what="packed against masked", good=max(errors) < 0.02, errors=errors)
    return found


def _one(
    what: str, way: Callable[..., jax.Array], arrays: tuple[jax.Array, ...]
) -> tuple[list[jax.Array], dict[str, float]]:
    """Returns output and gradients of one way, and its rates by the kind of its kernels."""
    inputs = arrays[:-1]
    forward = jax.jit(way).lower(*inputs).compile()

    @jax.jit
    def both(*arrays: jax.Array) -> list[jax.Array]:
        out, back = jax.vjp(way, *arrays[:-1])
        return [out, *back(arrays[-1])]

    compiled = both.lower(*arrays).compile()
    length = inputs[0].shape[1]
    content = pairs.even(length, 1 if what == "causal" else SEGMENTS)
    forward_secs = seconds(forward, *inputs)
    secs = {"forward": forward_secs, "backward": seconds(compiled, *arrays) - forward_secs}
    _, calls = kernels.work(hlo.parse(compiled.as_text()), content)
    flops: dict[str, float] = {}
    for call, times in calls:
        flops[call.kind] = flops.get(call.kind, 0.0) + times * pairs.operations(call, content)
    say(
        "rates.attention",
        what=what,
        shape=list(inputs[0].shape),
        segments=len(content.segments),
        forward_ms=round(secs["forward"] * 1e3, 3),
        both_ms=round(sum(secs.values()) * 1e3, 3),
        kinds=sorted(flops),
    )
    rates = {k: _rounded(n / max(secs[k.rpartition("_")[2]], 1e-9)) for k, n in flops.items()}
    return compiled(*arrays), rates
