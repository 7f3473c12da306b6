"""The plan as a table and as JSON."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from atlas_jax.models.config import ModelConfig
from atlas_jax.options.train import TrainConfig
from atlas_jax.plan.estimate import Measured, OutOfMemory
from atlas_jax.plan.programs import PlannedRun
from atlas_jax.plan.rates import PUBLISHED, Rates
from atlas_jax.plan.targets import Target

_GIB = 2**30
ASSUMPTIONS = (
    "Rows are taken to be full and trained throughout. On a GPU a step is its kernels one after "
    "the other, each as long as its operations, its bytes or its start take, and the communication "
    "that no kernel hides; on a TPU the longest of arithmetic, memory and communication. Runtime, "
    "host and (GPU) workspaces that libraries take by themselves are not counted; a GPU program's "
    "memory is arguments plus temporaries, a TPU's the compiler's peak."
)


class Plan(NamedTuple):
    """Memory and time of one run on one target."""

    target: Target
    run: PlannedRun
    programs: list[Measured | OutOfMemory]
    rates: Rates

    @property
    def fits(self) -> bool:
        """True if every program fits."""
        limit = self.target.usable_bytes
        return all(isinstance(p, Measured) and p.memory.total <= limit for p in self.programs)

    @property
    def peak_bytes(self) -> float:
        """Bytes of the program that needs most; infinite where the compiler refuses one."""
        totals = [p.memory.total if isinstance(p, Measured) else math.inf for p in self.programs]
        return max(totals)

    @property
    def step_secs(self) -> float:
        """All programs of a step, one after the other."""
        return sum(p.cost.secs * p.times for p in self.programs if isinstance(p, Measured))

    @property
    def mfu(self) -> float:
        """Share of the peak that the model's own operations take, at most."""
        known = [p for p in self.programs if isinstance(p, Measured)]
        secs = self.step_secs
        peak = self.target.device.peak_flops * self.target.num_devices
        return sum(p.model_flops * p.times for p in known) / (secs * peak) if secs else 0.0


def figures(program: Measured | OutOfMemory) -> dict[str, Any]:
    """Returns what is known of one run of a program on a device.

    Operations, bytes, GiB of memory and seconds; `message` if the compiler refuses it.
    """
    if isinstance(program, OutOfMemory):
        return program._asdict()
    cost = program.cost._asdict()
    return {
        "name": program.name,
        "times": program.times,
        "model_flops": program.model_flops,
        **{k: cost[k] for k in ("flops", "flops_needed", "flops_recomputed", "attention_pairs")},
        "bytes": program.cost.traffic_bytes,
        "collective_bytes": program.cost.wire_bytes,
        "largest_temporary": program.cost.largest_temporary._asdict(),
        **{k: cost[k] for k in ("kernels", "compute_secs", "memory_secs", "network_secs")},
        "estimated_secs": program.cost.secs,
        "secs_by_kind": program.cost.secs_by_kind,
        "peak_gib": program.memory.total / _GIB,
        "memory": program.memory._asdict() | {"total": program.memory.total},
        "compile_secs": program.compile_secs,
    }


def as_json(plan: Plan, config: TrainConfig) -> dict[str, Any]:
    """Returns everything that the table shows, in bytes, seconds and operations."""
    length = config.longest_generation
    return {
        "target": plan.target.name,
        "mesh": dict(plan.run.mesh.shape),
        "memory_bytes": plan.target.device.memory_bytes,
        "usable_bytes": plan.target.usable_bytes,
        "fits": plan.fits,
        "segments": plan.run.segments,
        "rates": plan.rates._asdict(),
        "programs": [figures(program) for program in plan.programs],
        "step_secs": plan.step_secs,
        "mfu": plan.mfu,
        "tokens": plan.run.num_tokens,
        "checkpoint_bytes": checkpoint_bytes(plan.run),
        "export_bytes": export_bytes(plan.run, config),
        "vllm": vllm(plan.run.decoder.config, length) if length else None,
    }


def num_params(run: PlannedRun) -> int:
    """Returns the parameters of the model."""
    import jax

    return sum(math.prod(s.shape) for s in jax.tree.leaves(run.decoder.shapes))


def export_bytes(run: PlannedRun, config: TrainConfig) -> int:
    """Returns the bytes of `final/`: of the model in bfloat16, or of an adapter."""
    import jax

    lora = config.model.lora
    if not (lora.rank and lora.export == "adapter"):
        return num_params(run) * 2
    trained = jax.tree.leaves(run.decoder.trained.shapes)
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in trained)


def checkpoint_bytes(run: PlannedRun) -> float:
    """Returns the bytes of one training checkpoint, uncompressed."""
    import jax

    return float(sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(run.state)))


def vllm(architecture: ModelConfig, length: int) -> dict[str, float]:
    """Returns the memory of a vLLM server of this model in bfloat16, over all of its GPUs.

    Args:
        architecture: the model's architecture.
        length: tokens of the longest sequence.
    """
    c = architecture
    per_token = 2 * 2 * c.num_layers * c.num_kv_heads * c.head_dim
    layer = 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads)
    layer += 3 * c.hidden_size * c.intermediate_size
    tables = c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)
    return {
        "weight_bytes": 2.0 * (c.num_layers * layer + tables),
        "kv_bytes_per_token": float(per_token),
        "kv_bytes_per_sequence": float(per_token * length),
    }


def table(plan: Plan, config: TrainConfig) -> str:
    """Returns the plan for a person."""
    run = plan.run
    mesh = " x ".join(f"{k} {v}" for k, v in run.mesh.shape.items() if v > 1) or "one device"
    lines = [
        f"{config.model_name_or_path} ({num_params(run) / 1e9:.2f}B) on {plan.target.name}: {mesh}",
        "",
        f"{'GiB a device':<20}{'params':>8}{'optim':>8}{'grads':>8}{'other':>8}{'temp':>8}"
        f"{'total':>8}{'free':>8}{'host':>8}",
    ]
    for program in plan.programs:
        if isinstance(program, OutOfMemory):
            lines.append(f"{program.name:<20}does not fit: {program.message}")
            continue
        m = program.memory
        values = (m.params, m.optimizer, m.gradients, m.resident, m.temporaries, m.total)
        free = plan.target.usable_bytes - m.total
        cells = "".join(f"{v / _GIB:>8.2f}" for v in (*values, free, m.host))
        lines.append(f"{program.name:<20}{cells}")
    lines += [
        "",
        f"{'a run, a device':<20}{'TFLOP':>9}{'needed':>9}{'again':>9}{'pairs':>7}"
        f"{'mem GB':>9}{'kernels':>9}{'arith s':>9}{'mem s':>9}{'comm s':>9}{'s':>9}"
        f"{'runs':>6}  sent GB by axis; largest temporary",
    ]
    for program in plan.programs:
        if isinstance(program, Measured):
            lines.append(_cost_line(program))
    lines += ["", *_summary(plan, config)]
    return "\n".join(lines)


def _cost_line(program: Measured) -> str:
    c = program.cost
    sent = " ".join(f"{k} {v / 1e9:.3g}" for k, v in c.wire_bytes.items()) or "0"
    largest = c.largest_temporary
    return (
        f"{program.name:<20}{c.flops / 1e12:>9.3g}{c.flops_needed / 1e12:>9.3g}"
        f"{c.flops_recomputed / 1e12:>9.3g}{c.attention_pairs:>7.3g}{c.traffic_bytes / 1e9:>9.3g}"
        f"{c.kernels:>9.0f}{c.compute_secs:>9.3g}{c.memory_secs:>9.3g}{c.network_secs:>9.3g}"
        f"{c.secs:>9.3g}{program.times:>6}  {sent}; {largest.shape} "
        f"{largest.num_bytes / _GIB:.2f} GiB"
    )


def _summary(plan: Plan, config: TrainConfig) -> list[str]:
    run = plan.run
    is_bound = plan.rates.source == PUBLISHED
    at_least = " at least" if is_bound else ""
    at_most = " at most" if is_bound else ""
    lines = [
        f"step {plan.step_secs:.3g} s{at_least}, {run.num_tokens} positions, MFU {plan.mfu:.0%}"
        f"{at_most}; rates: {plan.rates.source}",
        _memory_line(plan),
        f"disk: {checkpoint_bytes(run) / _GIB:.1f} GiB a checkpoint, "
        f"{export_bytes(run, config) / _GIB:.1f} GiB final/ in bfloat16",
    ]
    if config.longest_generation:
        v = vllm(run.decoder.config, config.longest_generation)
        room = 0.9 * plan.target.device.memory_bytes - v["weight_bytes"]
        lines.append(
            f"vLLM on one such device: {v['weight_bytes'] / _GIB:.1f} GiB weights, "
            f"{v['kv_bytes_per_sequence'] / _GIB:.2f} GiB a full sequence, so "
            f"{max(int(room // v['kv_bytes_per_sequence']), 0)} of them at 90 % of its memory"
        )
    lines.append(ASSUMPTIONS)
    lines.append("VERDICT: fits" if plan.fits else "VERDICT: does not fit")
    return lines


def _memory_line(plan: Plan) -> str:
    """Returns the memory of a device, and how much of it JAX takes."""
    whole = plan.target.device.memory_bytes
    usable = plan.target.usable_bytes
    share = "all of it" if usable == whole else f"{usable / whole:.0%} of it, {usable / _GIB:.1f}"
    how = "" if plan.target.device.platform == "tpu" else "; XLA_CLIENT_MEM_FRACTION sets the share"
    return f"memory: {whole / _GIB:.1f} GiB a device, JAX takes {share}{how}"


def row(plan: Plan) -> str:
    """Returns one line of a comparison of targets."""
    measured = [p for p in plan.programs if isinstance(p, Measured)]
    total = sum(p.cost.flops * p.times for p in measured) / 1e12
    traffic = sum(p.cost.traffic_bytes * p.times for p in measured) / 1e9
    sent = sum(sum(p.cost.wire_bytes.values()) * p.times for p in measured) / 1e9
    times = [
        sum(getattr(p.cost, k) * p.times for p in measured)
        for k in ("compute_secs", "memory_secs", "network_secs")
    ]
    peak = f"{plan.peak_bytes / _GIB:.1f}" if math.isfinite(plan.peak_bytes) else "refused"
    cells = (f"{total:.4g}", f"{traffic:.4g}", f"{sent:.4g}", *(f"{t:.3g}" for t in times))
    verdict = "fits" if plan.fits else "does not fit"
    end = f"{plan.step_secs:.3g} | {plan.mfu:.0%} | {verdict}"
    return f"| {plan.target.name} | {peak} | {' | '.join(cells)} | {end} |"


HEADER = """\
| target | GiB | TFLOP | memory GB | sent GB | arithmetic s | memory s | comm. s | step s | MFU | |
|---|---|---|---|---|---|---|---|---|---|---|"""
