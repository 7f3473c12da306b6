"""The header of a run: how large it is, in a few lines before its first step."""

from __future__ import annotations

import math

import jax

from atlas_jax import step
from atlas_jax.options.train import TrainConfig
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import Model

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def describe(model: Model, compute: Compute, state: step.TrainState, num_steps: int) -> str:
    """Returns the header as lines that fit 80 columns, but for the names of models.

    Args:
        model: the one that is trained.
        compute: its computation.
        state: where training begins.
        num_steps: steps of the whole run.
    """
    config = compute.config
    against = f" against {config.student}" if config.student else ""
    against += f" from {config.teacher}" if config.teacher else ""
    lines = [f"{config.algorithm.upper()} of {config.model_name_or_path}{against}"]
    facts = {
        "model": _model(model, compute),
        "step": _rows(config, compute),
        "run": _steps(config, int(state.step), num_steps),
        "mesh": _mesh(compute),
        "checkpoint": _checkpoint(config, state),
    }
    return "\n".join([*lines, *(f"  {name:<10}  {text}" for name, text in facts.items())])


def _model(model: Model, compute: Compute) -> str:
    decoder = model.decoder
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(decoder.shapes))
    formats = f"{decoder.param_dtype} kept, {compute.dtype} computed"
    if decoder.lora:
        trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(decoder.trained.shapes))
        formats = f"{trained:,} of LoRA trained; {formats}"
    return f"{count:,} parameters, {decoder.config.num_layers} layers; {formats}"


def _rows(config: TrainConfig, compute: Compute) -> str:
    plan = compute.plan
    longest = config.longest_sequence
    kinds = f"{plan.global_rows} rows"
    if config.group_size > 1:
        questions = plan.global_rows // config.group_size
        kinds = f"{questions} questions x {config.group_size} completions"
    most = f"at most {plan.global_rows * longest:,} tokens"
    parts = f"{plan.microbatches} x {plan.device_rows} on {compute.sharding.num_replicas}"
    return f"{kinds}, {most} ({parts})"


def _steps(config: TrainConfig, done: int, num_steps: int) -> str:
    save = f"a checkpoint every {config.save_steps}" if config.save_steps else "saved at the end"
    look = f"evaluated every {config.eval_steps}" if config.eval_steps else "evaluated at the end"
    return f"steps {done + 1} to {num_steps}, {save}, {look}"


def _mesh(compute: Compute) -> str:
    mesh = compute.sharding.mesh
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    offload = compute.config.offload
    host = f"; in host memory: {offload}" if offload != "none" else ""
    return f"{mesh.devices.size} x {', '.join(kinds)}: {sizes}, {compute.config.sharding}{host}"


def _checkpoint(config: TrainConfig, state: step.TrainState) -> str:
    stored = state._replace(frozen=None)
    size = sum(float(x.size * x.dtype.itemsize) for x in jax.tree.leaves(stored))
    most = f"at most {config.save_total_limit}" if config.save_total_limit else "all"
    return f"{amount(size)}, {most} kept"


def amount(size: float) -> str:
    """Returns a number of bytes for people, in powers of 1,000."""
    place = min(int(math.log10(max(size, 1)) // 3), len(_UNITS) - 1)
    return f"{size / 1000**place:.3g} {_UNITS[place]}"
