"""Floating-point operations of a traced program, recomputation included.

Attention of cuDNN is counted in compiled programs (`plan.kernels`), which alone are for GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import Literal, jaxprs_in_params

from atlas_jax.models.config import ModelConfig
from atlas_jax.plan.pairs import AttentionCall, RowContent, even, needed, operations

_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""Number of matrix products of T x T x head size for each head in a kernel of splash attention."""


class Work(NamedTuple):
    """A part of a program that is computed `times` times, over all devices."""

    times: float
    products: float
    """Operations of a matrix product; 0 for a kernel."""
    call: AttentionCall | None
    """A call of an attention kernel, if it is one."""


def forward(architecture: ModelConfig, rows: int, content: RowContent) -> float:
    """Returns the operations that a forward pass of a model needs, over all devices.

    Two for each weight of a matrix product and each token, and four for each number of a head and
    each pair of tokens that see each other (PaLM, arXiv:2204.02311, appendix B, where every pair
    counts). The output head counts for every token.
    """
    c = architecture
    local = sum(c.local_layers)
    pairs = local * needed(content, c.window) + (c.num_layers - local) * needed(content)
    tokens = sum(content.parts)
    return rows * (tokens * c.flops_per_token(0) / 3 + 4.0 * c.num_heads * c.head_dim * pairs)


def work(jaxpr: Any, num_devices: int) -> tuple[float, list[tuple[AttentionCall, float]]]:
    """Returns a device's operations of matrix products, and its attention calls with their runs."""
    found = list(count(jaxpr))
    products = sum((part.products * part.times for part in found), 0.0)
    calls = [(part.call, part.times / num_devices) for part in found if part.call]
    return products / num_devices, calls


def count(jaxpr: Any, times: float = 1.0) -> Iterator[Work]:
    """Yields the matrix products and the attention kernels of a program."""
    for equation in jaxpr.eqns:
        yield from _equation(equation, times)


def _equation(equation: Any, times: float) -> Iterator[Work]:
    name = equation.primitive.name
    params = equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        depth = math.prod(left[d] for d in contracted)
        yield Work(times, 2.0 * math.prod(equation.outvars[0].aval.shape) * depth, None)
        return
    kernel = _splash(name, params)
    if kernel:
        yield Work(times, 0.0, _call(kernel, equation))
        return
    if name == "cond":
        branches = [list(count(branch.jaxpr, times)) for branch in params["branches"]]
        yield from max(branches, key=_size)
        return
    repeats = 1
    if name == "scan":
        repeats = params["length"]
    elif name == "while":
        repeats = _most_trips(params["cond_jaxpr"].jaxpr)
    elif name == "shard_map":
        repeats = params["mesh"].size
    for inner in jaxprs_in_params(params):
        yield from count(inner, times * repeats)


def _size(branch: list[Work]) -> float:
    calls = (w.times * operations(w.call, even(w.call.queries, 1), 1) for w in branch if w.call)
    return sum((w.times * w.products for w in branch), sum(calls, 0.0))


def _most_trips(condition: Any) -> int:
    """Returns the constant bound of a loop's counter; 1 if the bound is not a constant."""
    bounds = [e.invars[1] for e in condition.eqns if e.primitive.name == "lt"]
    return next((int(b.val) for b in bounds if isinstance(b, Literal)), 1)


def _splash(name: str, params: dict[str, Any]) -> str:
    """Returns the name of the splash kernel that an equation calls; "" if none."""
    if name != "pallas_call":
        return ""
    called = str(params["name"] if "name" in params else params["name_and_src_info"])
    return next((kernel for kernel in _SPLASH if called.startswith(kernel)), "")


def _call(kernel: str, equation: Any) -> AttentionCall:
    """Returns what a splash kernel computes: of causal rows the blocks on or below the diagonal.

    The query, its first array of floats, is `[B, N, T, H]` or `[N, T, H]`. Fewer keys than queries
    are a prompt that all of them see. A window shows in the number of blocks that a block meets, so
    it is counted in whole blocks. Segment ids save no block.
    """
    floats = (v.aval.shape for v in equation.invars if v.aval.dtype.kind not in "iub")
    query, key, *_ = floats
    rows, heads, length, size = (1, *query)[-4:]
    mapping = equation.params["grid_mapping"]
    last = mapping.block_mappings[0].block_shape[-2]
    block = getattr(last, "block_size", last)
    met = mapping.grid[-1]
    causal = key[-2] == length
    forward = kernel == "splash_mha_fwd"
    return AttentionCall(
        kind="attention_forward" if forward else "attention_backward",
        rows=rows,
        heads=heads,
        queries=length,
        keys=key[-2],
        head_dim=size,
        num_products=_SPLASH[kernel],
        causal=causal,
        packed=False,
        window=(met - 1) * block + 1 if causal and met * block < length else 0,
        block=block,
    )
