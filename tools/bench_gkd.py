"""`tools/bench.py gkd`: seconds of a step of distillation on given completions."""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import jax
import numpy as np

from atlas_jax import metrics
from atlas_jax.checkpoint import hf
from atlas_jax.config import GKDConfig, ModelOptions
from atlas_jax.recipes import gkd
from atlas_jax.sharding import to_global
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import open_frozen
from atlas_jax.types import TeacherBatch


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the steps and returns the figures; the first step, which compiles, counts apart."""
    config = GKDConfig(
        model_name_or_path=args.model,
        teacher_model_name_or_path=args.teacher,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        beta=args.beta,
        lmbda=0.0,
        temperature=1.0,
        gradient_checkpointing=args.remat,
        attn_implementation=args.attention,
        loss_chunk_size=args.chunk,
        max_seq_length=args.length,
        model=ModelOptions(compute_dtype=args.dtype),
    )
    compute = Compute.of(config)
    policy, teacher = (open_frozen(compute, path) for path in (args.model, args.teacher))
    decoder = compute.decoder(policy.decoder.config)
    optimizer = compute.optimizer(decoder, args.steps)
    beside = {"teacher": hf.load(teacher.source, teacher.decoder)}
    state = compute.state(hf.load(policy.source, decoder), optimizer, beside)
    loss = gkd.make_loss(decoder, teacher.decoder, config)
    train_step = compute.train_step(loss, decoder, optimizer)
    wall, used, losses = [], [], []
    for batch in _batches(args, decoder.config.vocab_size):
        placed = to_global(batch, compute.sharding, 1)
        start, cpu = time.perf_counter(), time.process_time()
        state, found = train_step(state, placed)
        losses.append(metrics.means(metrics.add({}, jax.device_get(found)))["loss/total"])
        wall.append(time.perf_counter() - start)
        used.append(time.process_time() - cpu)  # which other work on the machine disturbs less
    median = float(np.median(wall[1:]))
    return {
        "system": "atlas_jax",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "step_s": median,
        "cpu_s": float(np.median(used[1:])),
        "tok_s": args.batch * args.length / median,
        "compile_s": wall[0] - median,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "loss": losses[:3],
    }


def _batches(args: argparse.Namespace, vocab: int) -> list[TeacherBatch]:
    """Returns rows of random tokens, the second half of each of which is its completion."""
    rng = np.random.default_rng(0)
    shape = (args.batch, args.length)
    positions = np.broadcast_to(np.arange(args.length, dtype=np.int32), shape).copy()
    return [
        TeacherBatch(
            tokens=rng.integers(3, vocab, shape, dtype=np.int32),
            positions=positions,
            segment_ids=np.ones(shape, np.int32),
            loss_mask=positions >= args.length // 2,
        )
        for _ in range(args.steps)
    ]


if __name__ == "__main__":
    raise SystemExit("error: this is a part of tools/bench.py gkd and no command; run that")
