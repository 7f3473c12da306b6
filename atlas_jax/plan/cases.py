"""The programs of `--table`: a fixed list, so that changes of the code can be compared by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from atlas_jax.options.grpo import GRPOConfig
from atlas_jax.options.rollout import RolloutConfig
from atlas_jax.options.train import SFTConfig, TrainConfig
from atlas_jax.plan import planner, report
from atlas_jax.plan.planner import Assumptions
from atlas_jax.plan.report import Plan

_SMALL = "Qwen/Qwen3-0.6B"
_LARGE = "Qwen/Qwen3-8B"


class PlannedCase(NamedTuple):
    """One row of the table."""

    name: str
    config: TrainConfig
    target: str
    program: str
    """Beginning of the program's name."""
    segments: int = 1


def _sft(model: str, rows: int, length: int, **changes: Any) -> SFTConfig:
    values = {
        "model_name_or_path": model,
        "per_device_train_batch_size": rows,
        "max_seq_length": length,
        "gradient_accumulation_steps": 1,
        "packing": False,
    }
    return SFTConfig(**values | changes)  # type: ignore[arg-type]


def _grpo(model: str, completions: int) -> GRPOConfig:
    """Returns groups of 16 completions of 512 tokens to prompts of 1,024, a row for each group."""
    return GRPOConfig(
        model_name_or_path=model,
        max_prompt_length=1024,
        max_new_tokens=512,
        num_generations=16,
        per_device_train_batch_size=completions,
        gradient_accumulation_steps=1,
        max_seq_length=1024 + 16 * 512,
        beta=0.04,
        top_p=0.95,
        rollout=RolloutConfig(protocol="direct", max_rows=max(completions, 16)),
    )


def _small(name: str, config: TrainConfig, program: str, segments: int = 1) -> PlannedCase:
    return PlannedCase(
        name=name, config=config, target="h100:1", program=program, segments=segments
    )


def cases() -> list[PlannedCase]:
    """Returns the rows of the table."""
    group = _grpo(_SMALL, 16)
    small = [
        _small("SFT 8 x 4,096", _sft(_SMALL, 8, 4096), "train"),
        _small("SFT 8 x 4,096, 8 segments", _sft(_SMALL, 8, 4096, packing=True), "train", 8),
        _small("SFT 1 x 8,192, 8 segments", _sft(_SMALL, 1, 8192, packing=True), "train", 8),
        _small("SFT 1 x 65,536, 32 segments", _sft(_SMALL, 1, 65536, packing=True), "train", 32),
        _small("GRPO update, 1,024 + 16 x 512", group, "update"),
        _small("log-probabilities of that row", group, "logprobs"),
        _small("decode, 64 rows", _grpo(_SMALL, 64), "decode"),
        _small("decode, 256 rows", _grpo(_SMALL, 256), "decode"),
    ]
    accumulated = _sft(_LARGE, 1, 4096, gradient_accumulation_steps=8, packing=True)
    large = [
        PlannedCase(
            name="8B SFT 8 x 4,096 in turn", config=accumulated, target=target, program="train"
        )
        for target in ("h100:8", "v5e:4x4", "v5p:2x2x4")
    ]
    decode = PlannedCase(
        name="8B decode, 16 rows a device",
        config=_grpo(_LARGE, 16),
        target="h100:8",
        program="decode",
    )
    return [*small, *large, decode]


def plans(rates_file: str) -> Iterator[tuple[PlannedCase, Plan]]:
    """Yields each row with its plan, compiled one after the other."""
    for case in cases():
        assumptions = Assumptions(segments=case.segments, rates_file=rates_file)
        yield case, planner.plan(case.config, case.target, assumptions, case.program)


HEADER = """\
| program | target | TFLOP | needed | again | pairs | GB | sent GB | kernels | largest temporary | \
GiB | step s | MFU | compiled in s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def line(case: PlannedCase, plan: Plan) -> str:
    """Returns a row in Markdown."""
    [figures] = [report.figures(p) for p in plan.programs]
    if "message" in figures:
        return f"| {case.name} | {case.target} | refused: {figures['message']} |" + " |" * 11
    largest = figures["largest_temporary"]
    cells = [
        case.name,
        case.target,
        *(f"{figures[k] / 1e12:.4g}" for k in ("flops", "flops_needed", "flops_recomputed")),
        f"{figures['attention_pairs']:.3g}" if figures["attention_pairs"] else "",
        f"{figures['bytes'] / 1e9:.4g}",
        f"{sum(figures['collective_bytes'].values()) / 1e9:.4g}",
        f"{figures['kernels']:.0f}",
        f"{largest['shape']} {largest['num_bytes'] / 2**30:.2f} GiB",
        f"{figures['peak_gib']:.2f}" + ("" if plan.fits else " (does not fit)"),
        f"{figures['estimated_secs']:.4g}",
        f"{plan.mfu:.0%}",
        f"{figures['compile_secs']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def as_json(case: PlannedCase, plan: Plan) -> dict[str, Any]:
    """Returns a row as JSON, in bytes, seconds and operations of one device."""
    [figures] = [report.figures(p) for p in plan.programs]
    description = {
        "row": case.name,
        "model": case.config.model_name_or_path,
        "target": case.target,
        "segments": case.segments,
        "fits": plan.fits,
        "usable_bytes": plan.target.usable_bytes,
        "rates": plan.rates.source,
        "mfu": plan.mfu,
    }
    return description | figures
