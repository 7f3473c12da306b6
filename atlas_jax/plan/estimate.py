"""Memory and time of a run from its compiled programs."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from typing import Any, NamedTuple

import jax
import numpy as np

from atlas_jax.plan import flops, hlo, kernels, pairs, traffic
from atlas_jax.plan.pairs import AttentionCall
from atlas_jax.plan.programs import PlannedRun, Program
from atlas_jax.plan.rates import Rates, published
from atlas_jax.plan.targets import Target, as_if_present
from atlas_jax.plan.traffic import Array
from atlas_jax.sharding import AXES
from atlas_jax.step import GradientSums, abstract_gradients


class Memory(NamedTuple):
    """Bytes of one device while a program runs, by content."""

    params: float
    optimizer: float
    gradients: float
    """Accumulated gradients of all parameters; 0 in programs without gradients."""
    resident: float
    """Parameters of the reference, and of a student or a teacher in this process."""
    temporaries: float
    """Everything else: activations, gathered parameters, workspaces."""
    host: float
    """Bytes in host memory, for each device."""

    @property
    def total(self) -> float:
        """Bytes of device memory."""
        return self.params + self.optimizer + self.gradients + self.resident + self.temporaries


class Cost(NamedTuple):
    """Work of a device in one run of a program, and its time."""

    flops: float
    """Operations that the program computes."""
    flops_needed: float
    """Operations that the model needs, nothing twice."""
    flops_recomputed: float
    """Operations that are computed again, without those of pairs that do not see each other. Where
    attention is no kernel of its own, such pairs count here."""
    attention_pairs: float
    """Pairs of query and key that attention computes, in its kernel's blocks, over those that see
    each other; 0 for programs without rows."""
    traffic_bytes: float
    wire_bytes: dict[str, float]
    """Bytes sent, by mesh axis."""
    largest_temporary: Array
    kernels: float
    """Number of kernels that are started; on a TPU of instructions."""
    compute_secs: float
    memory_secs: float
    network_secs: float
    secs: float
    """On a GPU the kernels one after the other, and what communication they do not hide; elsewhere
    the longest of the three times, as if each were hidden by the others."""
    secs_by_kind: dict[str, float]
    """Parts of `secs` on a GPU, by kind of kernel."""


class Measured(NamedTuple):
    """One program of the plan."""

    name: str
    times: int
    memory: Memory
    cost: Cost
    model_flops: float
    """FLOPs that the model needs, over all devices."""
    compile_secs: float
    """Seconds that tracing and compiling took."""


class OutOfMemory(NamedTuple):
    """A program that the compiler refuses because of its memory."""

    name: str
    message: str


def device_bytes(tree: Any, host: bool = False) -> float:
    """Returns the bytes of a tree of placed shapes on a device, in its memory or in its host's."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        if (leaf.sharding.memory_kind == "pinned_host") == host:
            total += np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return float(total)


def measure(
    run: PlannedRun, program: Program, target: Target, rates: Rates | None = None
) -> Measured | OutOfMemory:
    """Compiles a program, and returns its memory and the cost of its operations.

    Args:
        run: the run of the program.
        program: the program.
        target: the devices.
        rates: rates at which they work; None takes those of the data sheet.
    """
    begin = time.perf_counter()
    with as_if_present(target):
        traced = program.function.trace(*program.arguments)  # type: ignore[attr-defined]
        lowered = traced.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return OutOfMemory(program.name, _refusal(str(error)))
    spent = time.perf_counter() - begin
    module = hlo.parse(compiled.as_text())
    cost = _cost(
        module, traced.jaxpr.jaxpr, run, program, target, rates or published(target.device)
    )
    memory = _memory(run, program, compiled.memory_analysis(), target)
    return Measured(
        name=program.name,
        times=program.times,
        memory=memory,
        cost=cost,
        model_flops=program.model_flops,
        compile_secs=spent,
    )


def _refusal(message: str) -> str:
    """Returns how much memory a program needs of how much, from the compiler's error."""
    used = re.search(r"Used [\d.]+\w? of [\d.]+\w? hbm", message)
    needs = re.search(r"memory required [^(]*\(([\d.]+\w)\) exceeds [^(]*\(([\d.]+\w)\)", message)
    if used or not needs:
        return used[0] if used else message.splitlines()[0]
    return f"needs {needs[1]} of {needs[2]} HBM"


def _memory(run: PlannedRun, program: Program, analysis: Any, target: Target) -> Memory:
    argument = program.arguments[0]
    trains = isinstance(argument, type(run.state))
    accumulates = any(isinstance(given, GradientSums) for given in program.arguments)
    params = device_bytes(run.state.params)
    opt_state = device_bytes(run.state.opt_state)
    held = sum((device_bytes(tree) for tree in run.resident.values()), 0.0)
    used = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    used += analysis.temp_size_in_bytes
    # The temporaries of a TPU share memory, so their sum is too high.
    if target.device.platform == "tpu":
        used = min(used, analysis.peak_memory_in_bytes)
    grads = 0.0
    if trains or accumulates:
        trained = run.decoder.trained
        sharding = run.decoder.sharding
        grads = device_bytes(abstract_gradients(trained.shapes, trained.dims, sharding))
    # What stays between programs has columns of its own; all else that is given is temporary. The
    # weights that generation reads are a copy, so they are.
    counted = {id(leaf) for leaf in jax.tree.leaves((run.state, run.resident))}
    given = [leaf for leaf in jax.tree.leaves(program.arguments) if id(leaf) in counted]
    inputs = device_bytes(given)
    held_in_host = (device_bytes(t, host=True) for t in (run.state, *run.resident.values()))
    host = sum(held_in_host, 0.0)
    host += analysis.host_temp_size_in_bytes
    temporaries = max(used - inputs - grads, 0.0)
    return Memory(
        params=params,
        optimizer=opt_state,
        gradients=grads,
        resident=held,
        temporaries=temporaries,
        host=host,
    )


def _cost(
    module: hlo.Module,
    jaxpr: Any,
    run: PlannedRun,
    program: Program,
    target: Target,
    rates: Rates,
) -> Cost:
    def speed(group: tuple[int, ...]) -> float:
        hosts = {place // target.devices_a_host for place in group}
        # The slowest link of a group sets the pace of all its members.
        return rates.network if len(hosts) > 1 else rates.link

    sent: dict[str, float] = defaultdict(float)
    network = 0.0
    for collective in hlo.collectives(module):
        sent[axes_of(collective.group, tuple(run.mesh.devices.shape))] += collective.wire_bytes
        network += collective.wire_bytes / speed(collective.group)
    on_gpu = target.device.platform == "gpu"
    if on_gpu:
        products, calls = kernels.work(module, program.content)
    else:
        products, calls = flops.work(jaxpr, target.num_devices)
    attention = _attention(calls, program, rates)
    traffic_bytes = traffic.memory_traffic(module)
    compute = products / rates.flops["products"] + attention.secs
    memory = traffic_bytes / rates.memory
    spent = kernels.run(module, program.content, rates, speed) if on_gpu else None
    needed = program.model_flops / target.num_devices
    total = products + attention.flops
    return Cost(
        flops=total,
        flops_needed=needed,
        flops_recomputed=max(total - needed - attention.flops_in_vain, 0.0),
        attention_pairs=attention.ratio,
        traffic_bytes=traffic_bytes,
        wire_bytes=dict(sent),
        largest_temporary=traffic.largest_temporary(module),
        kernels=spent.num_kernels if spent else traffic.num_kernels(module),
        compute_secs=compute,
        memory_secs=memory,
        network_secs=network,
        secs=spent.total if spent else max(compute, memory, network),
        secs_by_kind=spent.by_kind if spent else {},
    )


class _AttentionWork(NamedTuple):
    """Attention kernels of a program on a device."""

    flops: float
    flops_in_vain: float
    """Part of `flops` for pairs that do not see each other."""
    ratio: float
    secs: float


def _attention(
    calls: list[tuple[AttentionCall, float]], program: Program, rates: Rates
) -> _AttentionWork:
    """Returns what the calls compute, each as often as it runs.

    Plain XLA operations, which are no calls, compute every pair of a row.
    """
    content = program.content
    length = sum(content.parts)
    if not calls:
        ratio = length**2 / pairs.needed(content) if length else 0.0
        return _AttentionWork(flops=0.0, flops_in_vain=0.0, ratio=ratio, secs=0.0)
    total = vain = secs = computed = seen = 0.0
    for call, times in calls:
        done = times * pairs.operations(call, content, 1)
        each = pairs.needed_by(call, content)
        total += done
        vain += done * (1 - each / pairs.computed_by(call, content, 1))
        secs += times * pairs.operations(call, content) / rates.flops[call.kind]
        computed += times * pairs.computed_by(call, content)
        seen += times * each
    return _AttentionWork(flops=total, flops_in_vain=vain, ratio=computed / seen, secs=secs)


def axes_of(group: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """Returns the mesh axes along which the devices of a group differ, joined by `+`."""
    places = np.stack(np.unravel_index(np.asarray(group), shape))
    varies = (places != places[:, :1]).any(axis=1)
    return "+".join(axis for axis, differs in zip(AXES, varies, strict=True) if differs)
