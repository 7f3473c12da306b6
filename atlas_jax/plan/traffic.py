"""Memory traffic of a device, and its largest array, from a compiled program."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from atlas_jax.plan.hlo import (
    CALLED,
    FREE,
    Instruction,
    Module,
    arrays,
    executed,
    in_memory,
    num_bytes,
)

_SAME_ELEMENTS = ("bitcast", "convert", "copy", "reshape", "transpose", "negate")
"""Operations in a fusion that read as many elements of their operand as others read of them."""


class Array(NamedTuple):
    """An array in device memory."""

    shape: str
    """dtype and dims, such as `f32[151936,1024]`."""
    num_bytes: float


def memory_traffic(module: Module) -> float:
    """Returns the bytes that a device reads from and writes to its memory.

    Each instruction reads its operands and writes its result once. If it reads or updates a part of
    an array in place, only the part counts.
    """
    total = 0.0
    for name, times, fused in executed(module):
        if fused:
            continue
        body = module.computations[name]
        for op in body.values():
            if is_kernel(op):
                total += times * of(module, body, op)
    return total


def num_kernels(module: Module) -> float:
    """Returns the number of instructions that a device runs, loops counted as often as they run."""
    bodies = ((module.computations[n], times) for n, times, fused in executed(module) if not fused)
    return sum((times * sum(map(is_kernel, body.values())) for body, times in bodies), 0.0)


def is_kernel(op: Instruction) -> bool:
    """Returns whether an instruction takes time of its own: an asynchronous one, at its start."""
    return op.opcode not in FREE and not op.opcode.endswith(("-done", "-update"))


def of(module: Module, body: dict[str, Instruction], op: Instruction) -> float:
    """Returns the bytes that one instruction of a computation reads and writes."""
    opcode = op.opcode.removesuffix("-start")
    shapes = [body[o].shape if o in body else "" for o in op.operands]
    result = result_shape(body, op)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * in_memory(result)
    if opcode == "dynamic-update-slice":
        return 2 * in_memory(shapes[1])
    called = CALLED.search(op.rest)
    if opcode != "fusion" or not called:
        return in_memory(result) + sum(map(in_memory, shapes), 0.0)
    inner = module.computations[called[1]]
    total = 0.0
    for parameter in (i for i in inner.values() if i.opcode == "parameter"):
        whole = in_memory(parameter.shape)
        share = min(_touched(inner, parameter.name) / max(_elements(parameter.shape), 1), 1.0)
        total += whole * share
    written = in_memory(result)
    for update in (i for i in inner.values() if _part(inner, i)):
        written -= in_memory(update.shape) - num_bytes(_part(inner, update))
    return total + max(written, 0.0)


def result_shape(body: dict[str, Instruction], op: Instruction) -> str:
    """Returns the shape of what an instruction computes.

    The shape of an asynchronous start also holds its operands and a state; its end has the result.
    """
    if not op.opcode.endswith("-start"):
        return op.shape
    ends = (i for i in body.values() if i.operands[:1] == (op.name,))
    end = next((i for i in ends if i.opcode.endswith("-done")), None)
    return end.shape if end else op.shape


def _touched(inner: dict[str, Instruction], name: str) -> float:
    """Returns the number of elements of the value `name` that a fused computation reads."""
    total = 0.0
    for user in (i for i in inner.values() if name in i.operands):
        whole = _elements(inner[name].shape)
        first = user.operands[0] == name
        if user.opcode in _SAME_ELEMENTS:
            total += _touched(inner, user.name) if _is_used(inner, user.name) else whole
        elif user.opcode in ("dynamic-slice", "slice", "gather") and first:
            total += _elements(user.shape)
        elif first and _part(inner, user):
            reads = 2 if user.opcode == "scatter" else 1
            total += reads * _elements(_part(inner, user))
        else:
            total += whole
    return total


def _is_used(inner: dict[str, Instruction], name: str) -> bool:
    return any(name in i.operands for i in inner.values())


def _part(inner: dict[str, Instruction], update: Instruction) -> str:
    """Returns the shape of the part that an update in place writes; "" for another instruction."""
    place = {"dynamic-update-slice": 1, "scatter": 2}.get(update.opcode, 0)
    if not place or len(update.operands) <= place or update.operands[place] not in inner:
        return ""
    return inner[update.operands[place]].shape


def _elements(shape: str) -> float:
    return float(sum(math.prod(dims) for _, dims, _ in arrays(shape)))


def largest_temporary(module: Module) -> Array:
    """Returns the largest array that a program makes and does not give back.

    Arguments that are updated in place are results, and so are not counted; nor is what a fusion
    or a kernel keeps to itself.
    """
    best = Array("", 0.0)
    entry = module.computations[module.entry]
    root = next((i for i in reversed(entry.values()) if i.opcode == "tuple"), None)
    given: set[tuple[str, int]] = set()
    for name in root.operands if root else tuple(entry)[-1:]:
        given.add(_origin(entry, name))
    for name, _, fused in executed(module):
        if fused:
            continue
        results = given if name == module.entry else set()
        for place, array in _made(module.computations[name]):
            if array.num_bytes > best.num_bytes and place not in results:
                best = array
    return best


def _made(body: dict[str, Instruction]) -> Iterator[tuple[tuple[str, int], Array]]:
    """Yields the arrays that a computation makes, each with its instruction and its place there."""
    for op in filter(is_kernel, body.values()):
        for place, (kind, dims, layout) in enumerate(arrays(result_shape(body, op))):
            shape = f"{kind}[{','.join(map(str, dims))}]"
            yield (op.name, place), Array(shape, in_memory(shape + layout))


def _origin(body: dict[str, Instruction], name: str) -> tuple[str, int]:
    """Returns the instruction that computes a value, and the value's place in its result."""
    place = 0
    while name in body:
        op = body[name]
        if op.opcode not in ("bitcast", "get-tuple-element") and not op.opcode.endswith("-done"):
            break
        if op.opcode == "get-tuple-element":
            place = int(op.rest.partition("index=")[2].split(",")[0])
        name = op.operands[0]
    return name, place
