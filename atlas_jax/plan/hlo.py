"""Computations and communication of a device, from the text of a compiled program.

A loop counts as often as it runs, or as it can run at most if that depends on data. A loop whose
number of runs is not in the text counts once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

_BYTES: dict[str, float] = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1,
    "c64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
CALLED = re.compile(r"(?:calls|body|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)
FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "call-start", "async-start", "after-all", "partition-id", "replica-id", "iota",
    "opt-barrier",
})  # fmt: skip
"""Instructions that take no time of their own; what they call is counted by itself."""
_COMBINING = ("reduce", "scatter", "sort", "reduce-window", "map", "custom-call")

WIRE: dict[str, Callable[[float, int], float]] = {
    "all-gather": lambda size, n: size * (n - 1),
    "reduce-scatter": lambda size, n: size * (n - 1) / n,
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
}
"""Bytes that a device sends in a ring, from the bytes of its operands and the size of the group."""


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    inside: str
    """Text between the brackets: operands, or the value of a constant."""
    rest: str
    """Text after the brackets."""


@dataclasses.dataclass
class Module:
    """The computations of a program, by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


class Collective(NamedTuple):
    """One kind of communication over one group of devices, in a run of the program."""

    opcode: str
    group: tuple[int, ...]
    """Mesh positions of the devices of the first such group."""
    wire_bytes: float
    """Bytes that a device sends."""
    runs: float


def parse(text: str) -> Module:
    """Returns the computations of `compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    current = {}
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if found:
            current[found[1]] = _instruction(found[1], re.sub(r"/\*.*?\*/", "", found[2]))
    return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape = text[:end]
    text = text[end:].lstrip()
    opening = text.index("(")
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(
        name=name,
        opcode=text[:opening],
        shape=shape,
        operands=operands,
        inside=inside,
        rest=text[closing + 1 :],
    )


def _closing(text: str, start: int) -> int:
    """Returns the index at which the bracket that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    raise ValueError(f"a bracket does not close in {text[:80]!r}")


def arrays(shape: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yields dtype, dims and layout of each array of a shape."""
    for kind, dims, layout in _ARRAY.findall(shape):
        if kind in _BYTES:
            yield kind, tuple(int(d) for d in dims.split(",") if d), layout


def num_bytes(shape: str) -> float:
    """Returns the bytes of a shape, in any memory."""
    return sum((_BYTES[kind] * math.prod(dims) for kind, dims, _ in arrays(shape)), 0.0)


def in_memory(shape: str) -> float:
    """Returns the bytes of a shape in device memory; 0 in host memory or on a TPU's core."""
    return sum(
        (
            _BYTES[kind] * math.prod(dims)
            for kind, dims, layout in arrays(shape)
            if not re.search(r"S\([15]\)", layout)
        ),
        0.0,
    )


def executed(module: Module) -> Iterator[tuple[str, float, bool]]:
    """Yields each computation, the number of its runs, and whether it is inside a fusion."""
    work = [(module.entry, 1.0, False)]
    while work:
        name, times, fused = work.pop()
        yield name, times, fused
        for instruction in module.computations[name].values():
            inside = fused or instruction.opcode.startswith("fusion")
            work += [(c, times * runs, inside) for c, runs in called(module, instruction)]


def called(module: Module, instruction: Instruction) -> Iterator[tuple[str, float]]:
    """Yields the computations that an instruction calls, and how often it runs each.

    Each branch of a conditional counts as its share. Computations that combine two numbers are left
    out.
    """
    if instruction.opcode in _COMBINING or instruction.opcode.startswith(
        ("all-reduce", "reduce-scatter")
    ):
        return
    runs = float(_trips(module, instruction) if instruction.opcode == "while" else 1)
    for name in CALLED.findall(instruction.rest):
        if name in module.computations:
            yield name, runs
    for several, single in _BRANCHES.findall(instruction.rest):
        names = re.findall(r"[\w.\-]+", several) or [single]
        share = 1 / len(names) if several else 1 / 2  # `true_computation` and `false_computation`
        for name in names:
            yield name, share


def _trips(module: Module, loop: Instruction) -> int:
    """Returns the number of runs of a loop, the largest possible one if it depends on data."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    if not condition:
        return 1
    body = list(module.computations[condition[1]].values())
    called = (c for one in body for c in CALLED.findall(one.rest) if c in module.computations)
    body += [one for c in called for one in module.computations[c].values()]
    bounds = {i.inside for i in body if i.opcode == "constant" and i.inside.isdigit()}
    return max(int(bounds.pop()), 1) if len(bounds) == 1 else 1


def wire_bytes(body: dict[str, Instruction], instruction: Instruction) -> float:
    """Returns the bytes that a device sends in one run of an instruction; 0 if it sends none."""
    opcode = instruction.opcode.removesuffix("-start")
    group = first_group(instruction.rest) if opcode in WIRE else ()
    if len(group) < 2:
        return 0.0
    size = sum(num_bytes(body[o].shape) for o in instruction.operands if o in body)
    return WIRE[opcode](size, len(group))


def collectives(module: Module) -> list[Collective]:
    """Returns the communication of a device, by kind and group."""
    sent: dict[tuple[str, tuple[int, ...]], float] = defaultdict(float)
    runs: dict[tuple[str, tuple[int, ...]], float] = defaultdict(float)
    seen: set[tuple[str, str, float]] = set()
    for name, times, fused in executed(module):
        body = module.computations[name]
        for instruction in body.values():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode not in WIRE:
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            # On a TPU, fusions begin, continue and end one transfer.
            transfer = {(opcode, channel[1], times)} if fused and channel else set()
            if transfer & seen:
                continue
            seen |= transfer
            group = first_group(instruction.rest)
            if len(group) < 2:
                continue
            sent[opcode, group] += times * wire_bytes(body, instruction)
            runs[opcode, group] += times
    return [Collective(*key, sent[key], runs[key]) for key in sent]


def first_group(attributes: str) -> tuple[int, ...]:
    """Returns the devices of an instruction's first group.

    Raises:
        ValueError: if the notation of the groups is unknown.
    """
    explicit = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes)
    if explicit:
        return tuple(int(d) for d in explicit[1].split(","))
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes
    )
    if named:
        sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = named[2] + ")" if named[2] else f"[{math.prod(sizes.values())}]"
        devices = _ordered(order).reshape(list(sizes.values()))
        over = [list(sizes).index(a) for a in re.findall(r"'(\w+)'", named[3])]
        others = [a for a in range(len(sizes)) if a not in over]
        size = math.prod(devices.shape[a] for a in over)
        return tuple(devices.transpose([*others, *over]).reshape(-1, size)[0].tolist())
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        shape = [int(d) for d in iota[1].split(",")]
        return tuple(_ordered(iota[2]).reshape(shape)[0].ravel().tolist())
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"groups of devices are not understood: {attributes[:120]}")
    return ()


def _ordered(text: str) -> np.ndarray:
    """Returns the devices that `[2,8]T(1,0)` denotes: counted row by row, then transposed."""
    dims = [int(d) for d in text[1 : text.index("]")].split(",")]
    axes = re.search(r"T\(([\d,]+)\)", text)
    devices = np.arange(math.prod(dims)).reshape(dims)
    return devices.transpose([int(a) for a in axes[1].split(",")]) if axes else devices
