"""Floating-point operations of a traced program, recomputation included."""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import Literal, jaxprs_in_params

_KERNELS = {
    "dot_product_attention_fwd": 2, "dot_product_attention_bwd": 5, "splash_mha_fwd": 2,
    "splash_mha_dq": 3, "splash_mha_dkv": 4,
}  # fmt: skip
"""Number of matrix products of T x T x head size for each head in a fused attention kernel."""


_OFFSETS = 6  # operand of cuDNN's kernels with the first place of each segment


def count(jaxpr: Any) -> float:
    """Returns the operations of matrix products and of attention kernels, over all devices.

    The half above the diagonal, which a fused kernel of causal attention skips, is not counted.
    """
    return sum((_equation(equation) for equation in jaxpr.eqns), 0.0)


def _equation(equation: Any) -> float:
    name = equation.primitive.name
    params = equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        depth = math.prod(left[d] for d in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
    kernel = _kernel(name, params)
    if kernel:
        return _attention(kernel, equation)
    if name == "cond":
        return max(count(branch.jaxpr) for branch in params["branches"])
    inner = sum((count(sub) for sub in jaxprs_in_params(params)), 0.0)
    if name == "scan":
        return inner * params["length"]
    if name == "while":
        return inner * _most_trips(params["cond_jaxpr"].jaxpr)
    if name == "shard_map":
        return inner * params["mesh"].size
    return inner


def _most_trips(condition: Any) -> int:
    """Returns the constant bound of a loop's counter; 1 if the bound is not a constant."""
    bounds = [e.invars[1] for e in condition.eqns if e.primitive.name == "lt"]
    return next((int(b.val) for b in bounds if isinstance(b, Literal)), 1)


def _kernel(name: str, params: dict[str, Any]) -> str:
    """Returns the name of the attention kernel that an equation calls; "" if none."""
    if name == "pallas_call":
        name = str(params["name"] if "name" in params else params["name_and_src_info"])
    return next((kernel for kernel in _KERNELS if name.startswith(kernel)), "")


def _attention(kernel: str, equation: Any) -> float:
    """Returns the operations of an attention kernel.

    The query is `[B, T, N, H]` for cuDNN, and `[B, N, T, H]` or `[N, T, H]` for splash. Packed rows
    of cuDNN are counted as if their segments were equally long.
    """
    shapes = [v.aval.shape for v in equation.invars]
    if kernel.startswith("dot"):
        rows, length, heads, size = shapes[0]
        keys = shapes[1][1]
        offsets = shapes[_OFFSETS]
        pairs = length * keys / (offsets[1] - 1 if len(offsets) == 2 else 1)
        return _KERNELS[kernel] * rows * heads * pairs * size
    query = max(shapes, key=math.prod)
    rows, heads, length, size = (1, *query) if len(query) == 3 else query
    return _KERNELS[kernel] * 2.0 * rows * heads * length * length * size / 2
