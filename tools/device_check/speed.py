"""Speed and memory of the programs of a run, beside what the plan says of them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from programs_at_hand import QWEN, TINY, batch_of, build, configs, sft_config, state_of
from results import GIB, OUT, memory, profile, say, timed

from atlas_jax import metrics
from atlas_jax.plan import estimate, hlo, kernels, rates, targets
from atlas_jax.plan.programs import PlannedRun, Program
from atlas_jax.plan.rates import Rates
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.local import LocalEngine
from atlas_jax.rollout.sampling import Sampling

MEASURED = ("logprobs", "train", "update")
"""Programs that are measured one by one; generation is measured as a whole."""


def predict(tiny: bool) -> None:
    """Writes plan.json: what the compiler for an absent H100 says of each program."""
    found: dict[str, Any] = {}
    target = targets.parse("h100:1")
    for name, config in configs(tiny).items():
        run = build(config, tiny, targets.devices(target))
        for program in (p for p in run.programs if p.name in MEASURED):
            result = estimate.measure(run, program, target)
            key = f"{name}.{program.name}"
            if isinstance(result, estimate.OutOfMemory):
                found[key] = {"refused": result.message}
                continue
            found[key] = {
                "total_gib": round(result.memory.total / GIB, 3),
                "secs": float(f"{result.cost.secs:.4g}"),
                "flops": result.cost.flops,
                "bytes": result.cost.traffic_bytes,
            }
            print(key, found[key], flush=True)
    _plan_file(tiny).write_text(json.dumps(found, indent=1) + "\n")


def _plan_file(tiny: bool) -> pathlib.Path:
    name = "plan_tiny.json" if tiny else "plan.json"
    return (OUT if tiny else pathlib.Path(__file__).parent) / name


def _predicted(key: str, tiny: bool) -> dict[str, float]:
    path = _plan_file(tiny)
    return json.loads(path.read_text()).get(key, {}) if path.exists() else {}


def device_rates() -> Rates:
    """Returns the rates that case `rates` has measured, or those of an H100's or H200's sheet."""
    kind = "h200" if "H200" in jax.devices()[0].device_kind else "h100"
    device = targets.parse(f"{kind}:1").device
    path = OUT / "rates.json"
    return rates.read(str(path), device) if path.exists() else rates.published(device)


def train(name: str, tiny: bool) -> None:
    """Measures the training program of a run, and for GRPO the log-probabilities before it."""
    run = build(configs(tiny)[name], tiny, jax.devices()[:1])
    state = state_of(run)
    chosen = {p.name: p for p in run.programs if p.name in MEASURED}
    for program in (chosen[n] for n in MEASURED if n in chosen):
        state = _measure(f"{name}.{program.name}", run, program, state, tiny)


def _measure(key: str, run: PlannedRun, program: Program, state: Any, tiny: bool) -> Any:
    """Measures one program, and returns the state after it."""
    batch = batch_of(run, program)
    held = [state]
    losses: list[float] = []
    first = state
    if program.name == "logprobs":
        cast = lambda x, s: x.astype(s.dtype)  # noqa: E731
        first = jax.tree.map(cast, state.params, program.arguments[0])
    rest = program.arguments[2:]  # nothing is frozen: None
    start = time.perf_counter()
    compiled = program.function.lower(first, batch, *rest).compile()  # type: ignore[attr-defined]
    compile_secs = time.perf_counter() - start

    def step() -> None:
        held[0], found = compiled(held[0], batch, *rest)
        total, weight = jax.device_get(found["loss/total"])
        losses.append(float(total / max(weight, 1)))

    def score() -> None:
        jax.block_until_ready(compiled(first, batch, *rest))

    once = step
    if program.name == "logprobs":
        once = score
    else:
        first = state = None  # the step takes the state's memory
    timed(once, 2)
    times = timed(once, 5)
    tokens = int((np.asarray(batch.segment_ids) > 0).sum())
    secs = float(np.median(times))
    peak = metrics.peak_flops(jax.devices()[0])
    mfu = program.model_flops / secs / peak if peak else float("nan")
    say(
        key,
        step_s=round(secs, 4),
        spread_s=[round(t, 4) for t in times],
        tok_s=round(tokens / secs),
        mfu=round(mfu, 4),
        compile_s=round(compile_secs, 1),
        losses=[round(x, 4) for x in losses[:4]],
        **memory(),
        **_compiled(compiled, program, key),
        plan=_predicted(key, tiny),
    )
    profile(key, once)
    return held[0]


def _compiled(compiled: Any, program: Program, key: str) -> dict[str, Any]:
    """Returns what the program says that was compiled here; its text goes to `hlo_KEY.txt`."""
    text = compiled.as_text()
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"hlo_{key}.txt").write_text(text)
    analysis = compiled.memory_analysis()
    used = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    used += analysis.temp_size_in_bytes - analysis.alias_size_in_bytes
    spent = kernels.run(hlo.parse(text), program.content, device_rates(), lambda group: 1e12)
    return {
        "compiled_gib": round(used / GIB, 3),
        "estimated_s": float(f"{spent.total:.4g}"),
        "estimated_by_kind_s": {k: float(f"{v:.4g}") for k, v in spent.by_kind.items()},
        "kernels": spent.num_kernels,
        "rates": device_rates().source,
    }


class _NoText:
    """Stands for a tokenizer, of which generation needs `decode` and a name."""

    name_or_path = "random"

    def decode(self, ids: object, skip_special_tokens: bool = True) -> str:
        """Returns no text."""
        return ""


def generate(tiny: bool) -> None:
    """Measures local generation: the run's own engine, full length, by rows and sampling."""
    prompt, new = (32, 64) if tiny else (512, 256)
    run = build(sft_config(1024, 1), tiny, jax.devices()[:1])
    params = run.decoder.init(0)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    narrow = dataclasses.replace(run.decoder, param_dtype=jnp.dtype("bfloat16"))
    decoders = {"float32 weights": (run.decoder, params), "bfloat16 weights": (narrow, half)}
    sizes = [(8, 4, 0.95)] if tiny else [(64, 4, 0.95), (256, 16, 0.95), (256, 16, 1.0)]
    vocab = (TINY if tiny else QWEN)["vocab_size"]
    rng = np.random.default_rng(0)
    for what, (decoder, weights) in decoders.items():
        for rows, group, top_p in sizes:
            engine = LocalEngine(decoder, _NoText(), (), rows)
            requests = [
                Request(tuple(rng.integers(3, vocab, prompt).tolist()), new, seed, group)
                for seed in range(rows // group)
            ]
            sampling = Sampling(0.7, top_p)

            def once(
                engine: Any = engine,
                weights: Any = weights,
                asked: Any = requests,
                sampling: Sampling = sampling,
            ) -> None:
                engine.generate(weights, 0, asked, sampling)

            first, *times = timed(once, 3)
            secs = min(times)
            say(
                "generate",
                weights=what,
                rows=rows,
                group=group,
                prompt=prompt,
                new=new,
                top_p=top_p,
                s=round(secs, 3),
                tok_s=round(rows * new / secs),
                ms_a_token=round(secs / new * 1e3, 3),
                compile_s=round(first - secs, 1),
                **memory(),
            )
            if rows == 256 and top_p == 0.95:
                profile("generate_" + what.split()[0], once)
