"""Kernels of a program compiled for a GPU: their operations, their bytes and the time they take.

A GPU runs them one after the other. Collectives that have a start and an end run beside those in
between, on a stream of their own.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from atlas_jax.plan import hlo, traffic
from atlas_jax.plan.hlo import Instruction, Module
from atlas_jax.plan.pairs import AttentionCall, RowContent, operations
from atlas_jax.plan.rates import Rates

_CUDNN_BLOCK = 128
"""Side of the blocks in which cuDNN's flash attention is taken to compute."""


class Kernel(NamedTuple):
    """One kernel, each time that it runs."""

    kind: str
    """Name of its rate in a file of rates: `products`, `memory` or a kind of attention."""
    flops: float
    num_bytes: float
    call: AttentionCall | None = None
    """Attention that it computes; None for another kernel."""


class DeviceTime(NamedTuple):
    """Time of a device in one run of a program, in seconds."""

    total: float
    by_kind: dict[str, float]
    """Time by kind of kernel; `communication` is what no kernel hides."""
    num_kernels: float
    """Number of kernels that are started."""


def of(
    module: Module, body: dict[str, Instruction], op: Instruction, content: RowContent
) -> Kernel:
    """Returns the kernel of an instruction that is no collective."""
    moved = traffic.of(module, body, op)
    call = _attention(op)
    if call:
        flops = operations(call, content)
        return Kernel(kind=call.kind, flops=flops, num_bytes=moved, call=call)
    flops = _dots(module, body, op)
    return Kernel("products" if flops else "memory", flops, moved)


def executed(module: Module, content: RowContent) -> Iterator[tuple[Kernel, float]]:
    """Yields each kernel with the number of its runs, collectives left out."""
    for name, times, fused in hlo.executed(module):
        body = module.computations[name]
        for op in () if fused else body.values():
            if traffic.is_kernel(op) and op.opcode.removesuffix("-start") not in hlo.WIRE:
                yield of(module, body, op, content), times


def secs(kernel: Kernel, rates: Rates) -> float:
    """Returns the time of a kernel: of its operations, its bytes or its start."""
    arithmetic = kernel.flops / rates.flops.get(kernel.kind, math.inf)
    return max(arithmetic, kernel.num_bytes / rates.memory, rates.launch_secs)


def _attention(op: Instruction) -> AttentionCall | None:
    """Returns what a call of cuDNN's attention computes; None for another instruction."""
    target = _target(op)
    if "fmha" not in target:
        return None
    config = json.loads(op.rest.partition("backend_config=")[2])["cudnn_fmha_backend_config"]
    sizes = [int(n) for n in config["intermediate_tensor_shape"]["dimensions"]]
    rows, heads, queries, keys = sizes
    _, dims, _ = next(hlo.arrays(op.shape))  # the output or the query's gradient, [B, N, T, H]
    packed = config.get("max_seg_per_batch", 1) > 1
    variant = "masked_" if "Bias" in target else "packed_" if packed else ""
    backward = "Backward" in target
    return AttentionCall(
        kind=variant + ("attention_backward" if backward else "attention_forward"),
        rows=rows,
        heads=heads,
        queries=queries,
        keys=keys,
        head_dim=dims[-1],
        num_products=5 if backward else 2,
        causal="CAUSAL" in config["mask_type"],
        packed=packed,
        window=config.get("sliding_window_length", 0),
        block=_CUDNN_BLOCK,
    )


def _target(op: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', op.rest)
    return found[1] if found and op.opcode == "custom-call" else ""


def _dots(module: Module, body: dict[str, Instruction], op: Instruction) -> float:
    """Returns the operations of the matrix products that an instruction computes."""
    if op.opcode == "dot":
        return _dot(body, op, re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest))
    if "gemm" in _target(op):
        found = re.search(r'lhs_contracting_dimensions": ?\[([^\]]*)\]', op.rest)
        return _dot(body, op, found)
    if not op.opcode.startswith("fusion"):
        return 0.0
    called = (c for c in hlo.CALLED.findall(op.rest) if c in module.computations)
    inner = (module.computations[c] for c in called)
    return sum((_dots(module, part, i) for part in inner for i in part.values()), 0.0)


def _dot(body: dict[str, Instruction], op: Instruction, dims: re.Match[str] | None) -> float:
    if dims is None or op.operands[0] not in body:
        return 0.0
    _, out, _ = next(hlo.arrays(op.shape))
    _, left, _ = next(hlo.arrays(body[op.operands[0]].shape))
    depth = math.prod(left[int(d)] for d in re.findall(r"\d+", dims[1]))
    return 2.0 * math.prod(out) * depth


class _Timeline:
    """Clock of the kernels' stream and of the collectives' stream in one computation."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.network_free = 0.0
        self.ends: dict[str, float] = {}
        self.by_kind: dict[str, float] = defaultdict(float)
        self.count = 0.0

    def kernel(self, kind: str, spent: float) -> None:
        self.clock += spent
        self.by_kind[kind] += spent
        self.count += 1

    def collective(self, op: Instruction, spent: float) -> None:
        end = max(self.clock, self.network_free) + spent
        self.network_free = end
        self.count += 1
        self.ends[op.name] = end
        if not op.opcode.endswith("-start"):
            self.wait(op.name)

    def wait(self, name: str) -> None:
        """Lets the kernels' stream wait for a collective."""
        end = self.ends.pop(name, 0.0)
        self.by_kind["communication"] += max(end - self.clock, 0.0)
        self.clock = max(self.clock, end)

    def add(self, inner: DeviceTime, times: float) -> None:
        self.clock += times * inner.total
        self.count += times * inner.num_kernels
        for kind, spent in inner.by_kind.items():
            self.by_kind[kind] += times * spent


def run(
    module: Module, content: RowContent, rates: Rates, speed: Callable[[tuple[int, ...]], float]
) -> DeviceTime:
    """Returns the time of a program: its instructions in the order of the compiler's schedule.

    Args:
        module: the program.
        content: what rows hold.
        rates: rates of the kernels.
        speed: a group of devices -> bytes a second between them.
    """

    def one_computation(name: str) -> DeviceTime:
        body = module.computations[name]
        line = _Timeline()
        for op in body.values():
            opcode = op.opcode.removesuffix("-start")
            if op.opcode.endswith("-done"):
                line.wait(op.operands[0])
            elif opcode in hlo.WIRE:
                sent = hlo.wire_bytes(body, op)
                spent = sent / speed(hlo.first_group(op.rest)) if sent else 0.0
                line.collective(op, max(spent, rates.launch_secs))
            elif traffic.is_kernel(op):
                kernel = of(module, body, op, content)
                line.kernel(kernel.kind, secs(kernel, rates))
            else:
                for called, times in hlo.called(module, op):
                    line.add(one_computation(called), times)
        for name in list(line.ends):
            line.wait(name)
        return DeviceTime(line.clock, dict(line.by_kind), line.count)

    return one_computation(module.entry)


def work(module: Module, content: RowContent) -> tuple[float, list[tuple[AttentionCall, float]]]:
    """Returns the operations of matrix products, and the calls of attention with their runs."""
    products = 0.0
    calls = []
    for kernel, times in executed(module, content):
        if kernel.call:
            calls.append((kernel.call, times))
        else:
            products += times * kernel.flops
    return products, calls
