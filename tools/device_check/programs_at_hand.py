"""Runs whose programs are checked: configs, shapes of models, and batches of random numbers."""

from __future__ import annotations

from typing import Any

import _checkout  # noqa: F401  (comes first: see there)
import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import GRPOConfig, RolloutConfig, SFTConfig
from atlas_jax.models.config import from_hf
from atlas_jax.plan import programs, targets
from atlas_jax.types import Batch, PolicyBatch

SEGMENTS = 8
"""Texts in each packed row."""
QWEN = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "attention_bias": False,
}
TINY = QWEN | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def sft_config(length: int, rows: int, **changes: Any) -> SFTConfig:
    """Returns an SFT run of rows of `length` tokens, `rows` a device, without accumulation."""
    values = {
        "model_name_or_path": "random",
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "max_seq_length": length,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "packing": False,
    }
    return SFTConfig(**(values | changes))


def grpo_config(
    prompt: int, new: int, group: int, share: bool = True, **changes: Any
) -> GRPOConfig:
    """Returns a GRPO run of one group a device: a prompt and completions of `new` tokens."""
    values = {
        "model_name_or_path": "random",
        "max_prompt_length": prompt,
        "max_new_tokens": new,
        "num_generations": group,
        "per_device_train_batch_size": group,
        "gradient_accumulation_steps": 1,
        "max_seq_length": prompt + group * new,
        "beta": 0.04,
        "rollout": RolloutConfig(protocol="direct", share_prompt=share, max_rows=group),
    }
    return GRPOConfig(**(values | changes))


def configs(tiny: bool) -> dict[str, SFTConfig | GRPOConfig]:
    """Returns the runs that are measured, by the name of their case."""
    short, long, rows = (128, 256, 2) if tiny else (4096, 8192, 8)
    sizes = (32, 16, 4) if tiny else (1024, 512, 16)
    return {
        "sft_8x4096": sft_config(short, rows),
        "sft_1x8192": sft_config(long, 1),
        "sft_8x4096_dots": sft_config(short, rows, gradient_checkpointing="dots"),
        "sft_8x4096_packed": sft_config(short, rows, packing=True),
        "grpo": grpo_config(*sizes),
        "grpo_unshared": grpo_config(*sizes, share=False),
    }


def build(
    config: SFTConfig | GRPOConfig, tiny: bool, devices: list[jax.Device]
) -> programs.PlannedRun:
    """Returns the programs of a run on devices, which may be absent."""
    segments = SEGMENTS if config.algorithm == "sft" and config.packing else 1
    architecture = from_hf(TINY if tiny else QWEN)
    return programs.build(config, targets.parse("h100:1"), devices, architecture, None, segments)


def sft_batch(shape: tuple[int, ...], vocab: int, segments: int) -> Batch:
    """Returns full rows of random tokens, `segments` texts in each."""
    *_, length = shape
    rng = np.random.default_rng(0)
    bounds = np.linspace(0, length, segments + 1).astype(int)
    sizes = np.diff(bounds)
    position = np.concatenate([np.arange(size) for size in sizes])
    segment = np.repeat(np.arange(1, segments + 1), sizes)
    positions = np.broadcast_to(position, shape).astype(np.int32)
    segment_ids = np.broadcast_to(segment, shape).astype(np.int32)
    tokens = rng.integers(3, vocab, shape, dtype=np.int32)
    return Batch(tokens, positions, segment_ids, positions > 0)


def policy_batch(
    shape: tuple[int, ...], vocab: int, prompt: int, new: int, group: int
) -> PolicyBatch:
    """Returns rows of a prompt and as many completions as fit, at most `group`."""
    length = shape[-1]
    rng = np.random.default_rng(0)
    each = min(group, (length - prompt) // new)
    positions = np.zeros(length, np.int32)
    segment_ids = np.zeros(length, np.int32)
    sequence_ids = np.zeros(length, np.int32)
    positions[:prompt] = np.arange(prompt)
    segment_ids[: prompt + each * new] = 1
    for i in range(each):
        at = slice(prompt + i * new, prompt + (i + 1) * new)
        positions[at] = prompt + np.arange(new)
        sequence_ids[at] = i + 1
    wide = [np.broadcast_to(x, shape).copy() for x in (positions, segment_ids, sequence_ids)]
    mask = wide[2] > 0
    logprobs = np.where(mask, -np.log(vocab), 0).astype(np.float32)
    return PolicyBatch(
        tokens=rng.integers(3, vocab, shape, dtype=np.int32),
        positions=wide[0],
        segment_ids=wide[1],
        sequence_ids=wide[2],
        loss_mask=mask,
        advantages=np.where(mask, rng.standard_normal(shape), 0).astype(np.float32),
        rollout_logprobs=logprobs,
        ref_logprobs=logprobs,
    )


def batch_of(run: programs.PlannedRun, program: programs.Program) -> Any:
    """Returns a batch of the program's shapes, on its devices."""
    config = run.config
    abstract = program.arguments[1]
    shape = abstract.tokens.shape
    vocab = run.decoder.config.vocab_size
    values: Batch | PolicyBatch
    if isinstance(config, GRPOConfig):
        group = config.num_generations if config.rollout.share_prompt else 1
        values = policy_batch(shape, vocab, config.max_prompt_length, config.max_new_tokens, group)
        fields = zip(values, abstract, strict=True)
        values = type(values)(*(v if a is not None else None for v, a in fields))
    else:
        values = sft_batch(shape, vocab, run.segments)
    return jax.tree.map(lambda a, v: jax.device_put(v, a.sharding), abstract, values)


def state_of(run: programs.PlannedRun) -> Any:
    """Returns the training state of step 0 with random parameters."""
    shapes = run.state._replace(params=None)
    places = jax.tree.map(lambda s: s.sharding, shapes)
    make = jax.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), out_shardings=places
    )
    return make()._replace(params=run.decoder.init(0))
