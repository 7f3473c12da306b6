"""Measures one recipe and prints one JSON line: `python tools/bench.py sft|grpo|gkd --model DIR …`.

`rollout` measures how busy servers are, with --simulate without any: see `bench_rollout`.

`traces --database-url URL` measures reading sessions, with `--fill COUNT` after it has made them.

The batches of `sft` are fixed random tokens, or with --packing the rows of a JSONL file packed; the
model may be a directory that holds a `config.json` only, whose weights are then random. `grpo` is
the direct protocol with completions of full length and a reward of constant cost.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import time

import _checkout  # noqa: F401  (comes first: see there)
import bench_gkd
import bench_grpo
import bench_rollout
import bench_traces
import jax
import numpy as np

from atlas_jax import cli, metrics
from atlas_jax.checkpoint import hf
from atlas_jax.config import DataConfig, ModelOptions, SFTConfig
from atlas_jax.data import loader, sources
from atlas_jax.data.chat_template import ChatTemplate
from atlas_jax.models import lora
from atlas_jax.models.config import from_hf
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.train import LoraOptions
from atlas_jax.recipes import sft
from atlas_jax.sharding import to_global
from atlas_jax.startup import model as models
from atlas_jax.startup.compute import Compute
from atlas_jax.types import Batch, Params, RowBounds


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = cli.ToolParser(__doc__)
    recipes = parser.add_subparsers(dest="recipe", required=True)
    sft_parser, grpo_parser = recipes.add_parser("sft"), recipes.add_parser("grpo")
    gkd_parser = recipes.add_parser("gkd")
    for each in (sft_parser, grpo_parser, gkd_parser):
        each.add_argument("--model", required=True, help="Hugging Face directory or .gguf file")
        each.add_argument("--steps", type=int, default=6)
        each.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
        each.add_argument("--remat", default="none", choices=["none", "dots", "mlp", "full"])
        each.add_argument("--attention", default="auto", choices=["auto", "xla", "cudnn", "splash"])
        each.add_argument("--chunk", type=int, default=1024, help="loss_chunk_size")
    sft_parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="trains factors")
    for each in (sft_parser, gkd_parser):
        each.add_argument("--batch", type=int, default=4, help="rows a step, over all devices")
        each.add_argument("--length", type=int, default=256, help="tokens a row")
    gkd_parser.add_argument("--teacher", required=True, help="Hugging Face directory or .gguf file")
    gkd_parser.add_argument("--beta", type=float, default=0.5)
    sft_parser.add_argument("--packing", default="", metavar="FILE", help="rows to pack")
    grpo_parser.add_argument("--prompts", type=int, default=4, help="questions a step")
    grpo_parser.add_argument("--generations", type=int, default=4)
    grpo_parser.add_argument("--max-new-tokens", type=int, default=64)
    grpo_parser.add_argument("--beta", type=float, default=0.04)
    grpo_parser.add_argument("--top-p", type=float, default=1.0)
    grpo_parser.add_argument("--unshared", action="store_true", help="a prompt for each completion")
    traces_parser = recipes.add_parser("traces")
    traces_parser.add_argument("--database-url", required=True)
    traces_parser.add_argument("--fill", type=int, default=0, help="sessions made before, if empty")
    traces_parser.add_argument("--events", type=int, default=20, help="of each session made")
    bench_rollout.add_arguments(recipes.add_parser("rollout"))
    args = parser.parse_args()
    measures = {
        "sft": measure,
        "grpo": bench_grpo.measure,
        "gkd": bench_gkd.measure,
        "rollout": bench_rollout.measure,
        "traces": bench_traces.measure,
    }
    print(json.dumps(measures[args.recipe](args)))


def measure(args: argparse.Namespace) -> dict[str, float | str | list[float] | None]:
    """Runs the steps and returns the figures; the first step, which compiles, counts apart."""
    compute = Compute.of(_config(args))
    decoder, params = _model(args, compute)
    optimizer = compute.optimizer(decoder, args.steps)
    factors = lora.init(decoder, 0) if args.lora else None
    state = compute.state(factors or params, optimizer, params if args.lora else None)
    del params
    batches, segments = _batches(args, decoder.config.vocab_size)
    loss = sft.make_loss(decoder, args.chunk, RowBounds(segments=segments))
    train_step = compute.train_step(loss, decoder, optimizer)
    times, losses, tokens = [], [], 0
    used = []  # seconds of all cores, which other work on the machine disturbs less
    for batch in batches:
        placed = to_global(batch, compute.sharding, 1)
        tokens = int((batch.segment_ids > 0).sum())
        start, cpu = time.perf_counter(), time.process_time()
        state, found = train_step(state, placed)
        losses.append(metrics.means(metrics.add({}, jax.device_get(found)))["loss/total"])
        times.append(time.perf_counter() - start)
        used.append(time.process_time() - cpu)
    return _figures(decoder, times, tokens, args) | {
        "cpu_s": float(np.median(used[1:])),
        "loss": losses[:3],
    }


def _figures(
    decoder: Decoder, times: list[float], tokens: int, args: argparse.Namespace
) -> dict[str, float | str | list[float] | None]:
    median, device = float(np.median(times[1:])), jax.devices()[0]
    speed = tokens / median
    peak = metrics.peak_flops(device)
    flops = decoder.flops_per_token(args.length)
    memory = device.memory_stats() or {}
    device_bytes = memory.get("peak_bytes_in_use")
    return {
        "system": "atlas_jax",
        "device": f"{jax.device_count()} x {device.device_kind}",
        "step_s": median,
        "tok_s": speed,
        "tok_s_device": speed / jax.device_count(),
        "tflops_device": speed * flops / jax.device_count() / 1e12,
        "mfu": speed * flops / jax.device_count() / peak if peak else None,
        "compile_s": times[0] - median,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_device_gib": device_bytes / 2**30 if device_bytes else None,
    }


def _config(args: argparse.Namespace) -> SFTConfig:
    return SFTConfig(
        model_name_or_path=args.model,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        gradient_checkpointing=args.remat,
        attn_implementation=args.attention,
        max_seq_length=args.length,
        packing=bool(args.packing),
        data=DataConfig(dataset_path=args.packing),
        model=ModelOptions(compute_dtype=args.dtype, lora=LoraOptions(rank=args.lora)),
    )


def _model(args: argparse.Namespace, compute: Compute) -> tuple[Decoder, Params]:
    path = pathlib.Path(args.model)
    only_config = path.is_dir() and not list(path.glob("*.safetensors"))
    source = None if only_config else hf.open_source(args.model)
    shape = json.loads((path / "config.json").read_text()) if source is None else source.config
    decoder = compute.decoder(from_hf(shape))
    return decoder, decoder.init(0) if source is None else hf.load(source, decoder)


def _batches(args: argparse.Namespace, vocab: int) -> tuple[list[Batch], int]:
    """Returns the batches, and the most segments of a row."""
    if args.packing:
        config = _config(args)
        rows, _ = sources.load_rows(config.data, config.seed)
        tokenizer = models.load_tokenizer(args.model)
        packed = loader.build(rows, config, ChatTemplate(tokenizer), loader.HostRows(args.batch))
        return [packed.batch(i) for i in range(args.steps)], packed.max_segments
    rng = np.random.default_rng(0)
    shape = (args.batch, args.length)
    positions = np.broadcast_to(np.arange(args.length, dtype=np.int32), shape).copy()
    ones = np.ones(shape, np.int32)
    batches = [
        Batch(rng.integers(3, vocab, shape, dtype=np.int32), positions, ones, positions > 0)
        for _ in range(args.steps)
    ]
    return batches, 1


if __name__ == "__main__":
    cli.tool(main)
