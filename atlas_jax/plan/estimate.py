"""Memory and time of a run from its compiled programs."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, NamedTuple

import jax
import numpy as np

from atlas_jax.plan import flops, hlo
from atlas_jax.plan.programs import PlannedRun, Program
from atlas_jax.plan.targets import Target
from atlas_jax.sharding import AXES


class Memory(NamedTuple):
    """Bytes of one device while a program runs, by content."""

    params: float
    optimizer: float
    gradients: float
    """Accumulated gradients of all parameters; 0 in programs without gradients."""
    resident: float
    """Parameters of the reference and of a student in this process."""
    temporaries: float
    """Everything else: activations, gathered parameters, workspaces."""
    host: float
    """Bytes in host memory, for each device."""

    @property
    def total(self) -> float:
        """Bytes of device memory."""
        return self.params + self.optimizer + self.gradients + self.resident + self.temporaries


class Cost(NamedTuple):
    """Work of a device in one run of a program, and lower bounds of its time."""

    flops: float
    traffic_bytes: float
    wire_bytes: dict[str, float]
    """Bytes sent, by mesh axis."""
    compute_secs: float
    memory_secs: float
    network_secs: float

    @property
    def secs(self) -> float:
        """The longest of the three times: data sheet's speeds, perfect overlap."""
        return max(self.compute_secs, self.memory_secs, self.network_secs)


class Measured(NamedTuple):
    """One program of the plan."""

    name: str
    times: int
    memory: Memory
    cost: Cost
    model_flops: float
    """FLOPs of the model over all devices."""


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


def measure(run: PlannedRun, program: Program, target: Target) -> Measured | OutOfMemory:
    """Compiles a program, and returns its memory and the cost of its operations."""
    traced = program.function.trace(*program.arguments)  # type: ignore[attr-defined]
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used [\d.]+\w? of [\d.]+\w? hbm[^.]*", str(error))
        return OutOfMemory(program.name, used[0] if used else str(error).splitlines()[0])
    # Counted before compilation, since XLA's own analysis counts the body of a loop once.
    total = flops.count(traced.jaxpr.jaxpr) / target.num_devices
    cost = _cost(hlo.parse(compiled.as_text()), total, run, target)
    memory = _memory(run, program, compiled.memory_analysis(), target)
    return Measured(
        name=program.name,
        times=program.times,
        memory=memory,
        cost=cost,
        model_flops=program.model_flops,
    )


def _memory(run: PlannedRun, program: Program, analysis: Any, target: Target) -> Memory:
    argument = program.arguments[0]
    trains = isinstance(argument, type(run.state))
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
    if trains:
        places = jax.tree.map(
            lambda d: run.decoder.sharding.optimizer(d, memory=False),
            run.decoder.dims,
            is_leaf=lambda d: isinstance(d, tuple),
        )
        shapes = run.decoder.shapes
        grads = device_bytes(
            jax.tree.map(
                lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places
            )
        )
    inputs = params + opt_state if trains else device_bytes(argument)
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


def _cost(module: hlo.Module, num_flops: float, run: PlannedRun, target: Target) -> Cost:
    device = target.device
    sent: dict[str, float] = defaultdict(float)
    network = 0.0
    for collective in hlo.collectives(module):
        sent[axes_of(collective.group, tuple(run.mesh.devices.shape))] += collective.wire_bytes
        hosts = {place // target.devices_a_host for place in collective.group}
        # The slowest link of a group sets the pace of all its members.
        speed = device.network_bandwidth if len(hosts) > 1 else device.link_bandwidth
        network += collective.wire_bytes / speed
    traffic = hlo.memory_traffic(module)
    return Cost(
        flops=num_flops,
        traffic_bytes=traffic,
        wire_bytes=dict(sent),
        compute_secs=num_flops / device.peak_flops,
        memory_secs=traffic / device.memory_bandwidth,
        network_secs=network,
    )


def axes_of(group: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """Returns the mesh axes along which the devices of a group differ, joined by `+`."""
    places = np.stack(np.unravel_index(np.asarray(group), shape))
    varies = (places != places[:, :1]).any(axis=1)
    return "+".join(axis for axis, differs in zip(AXES, varies, strict=True) if differs)
