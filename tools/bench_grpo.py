"""`tools/bench.py grpo`: seconds of a GRPO step, and where they go."""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from atlas_jax import metrics
from atlas_jax.checkpoint import hf
from atlas_jax.config import DataConfig, GRPOConfig, ModelOptions, RolloutConfig
from atlas_jax.data.questions import QuestionOrder
from atlas_jax.recipes import chat_models, feed, grpo, local_backend
from atlas_jax.rollout.student_cache import StudentCache
from atlas_jax.sharding import Sharding
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import Model, open_frozen
from atlas_jax.types import Question, Reward, Sample

_PHASES = ("generate", "score", "logprobs")
_LONGEST_PROMPT = 64


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the steps and returns the figures; the first step, which compiles, counts apart."""
    with tempfile.TemporaryDirectory() as directory:
        return _measure(args, _config(args, directory))


def _config(args: argparse.Namespace, directory: str) -> GRPOConfig:
    longest = _LONGEST_PROMPT + args.generations * args.max_new_tokens
    return GRPOConfig(
        model_name_or_path=args.model,
        output_dir=directory,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        per_device_train_batch_size=args.prompts * args.generations,
        num_generations=args.generations,
        max_prompt_length=_LONGEST_PROMPT,
        max_new_tokens=args.max_new_tokens,
        max_seq_length=longest,
        temperature=1.0,
        top_p=args.top_p,
        beta=args.beta,
        gradient_checkpointing=args.remat,
        attn_implementation=args.attention,
        loss_chunk_size=args.chunk,
        data=DataConfig(length_buckets=tuple(range(64, longest, 64))),
        model=ModelOptions(compute_dtype=args.dtype),
        rollout=RolloutConfig(protocol="direct", share_prompt=not args.unshared),
    )


def _measure(args: argparse.Namespace, config: GRPOConfig) -> dict[str, Any]:
    compute = Compute.of(config)
    layout = grpo.make_layout(config, compute.plan, compute.sharding.num_replicas)
    model = open_frozen(compute, args.model)
    decoder = model.decoder
    optimizer = compute.optimizer(decoder, args.steps)
    state = compute.state(hf.load(model.source, decoder), optimizer)
    reference = hf.load(model.source, decoder) if config.beta else None
    source = feed.Feed(_parts(args, config, model, layout, compute.sharding), reference)
    loss_fn = grpo.make_loss(decoder, config, layout.per_row)
    train_step = compute.train_step(loss_fn, decoder, optimizer)
    rows: list[dict[str, float]] = []
    for _ in range(args.steps):
        start = time.perf_counter()
        given = source.next(state, time.sleep)
        ready = time.perf_counter()
        state, found = train_step(state, given.batch)
        values = metrics.means(metrics.add(metrics.add({}, given.metrics), jax.device_get(found)))
        end = time.perf_counter()
        split = {f"{name}_s": values[f"perf/{name}_secs"] for name in _PHASES}
        mismatch = values["rollout/mismatch_kl"]
        rows.append(
            {"step_s": end - start, "update_s": end - ready, **split, "mismatch_kl": mismatch}
        )
    return _figures(args, rows)


def _figures(args: argparse.Namespace, rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    median = {name: float(np.median([row[name] for row in rows[1:]])) for name in rows[0]}
    completions = args.prompts * args.generations
    return {
        "system": "atlas_jax",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        **median,
        "completions_s": completions / median["step_s"],
        "generated_tok_s": completions * args.max_new_tokens / median["generate_s"],
        "compile_s": rows[0]["step_s"] - median["step_s"],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _parts(
    args: argparse.Namespace,
    config: GRPOConfig,
    model: Model,
    layout: feed.Layout,
    sharding: Sharding,
) -> feed.Parts:
    questions = [
        Question(str(i), f"Write the number {i} in words and explain how you know.", "", {})
        for i in range(args.prompts * args.steps)
    ]
    bind = chat_models.local(model, "", config.rollout.max_rows, ())  # no stop: full length
    return feed.Parts(
        config=config,
        layout=layout,
        order=QuestionOrder(questions, 0, False),
        backend=local_backend.LocalBackend(bind, None),
        protocol=chat_models.make_protocol(config, args.generations),
        reward=_distinct_characters,
        logprobs_fn=grpo.make_logprobs_fn(model.decoder, config, layout.per_row),
        sharding=sharding,
        writer=metrics.MetricWriter("", 0, enabled=False),
        student_cache=StudentCache("never"),
    )


def _distinct_characters(samples: Sequence[Sample]) -> list[Reward]:
    return [Reward(float(len(set(s.completion.text))), {}) for s in samples]


if __name__ == "__main__":
    raise SystemExit("error: this is a part of tools/bench.py grpo and no command; run that")
