"""Tiny models of every family, made by transformers, and batches for them."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from atlas_jax import logprobs
from atlas_jax.checkpoint import hf
from atlas_jax.config import MeshConfig
from atlas_jax.models import attention
from atlas_jax.models.config import from_hf
from atlas_jax.models.transformer import Decoder
from atlas_jax.sharding import Sharding, make_mesh
from atlas_jax.types import Batch

if TYPE_CHECKING:
    import torch
    import transformers

_SIZES = dict(
    vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
_LLAMA3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=32,
)  # fmt: skip

_YARN = dict(
    rope_type="yarn", rope_theta=500000.0, factor=4.0, original_max_position_embeddings=64,
)  # fmt: skip
_IDS = dict(pad_token_id=0, eos_token_id=0, bos_token_id=0)  # the usual ids are outside

FAMILIES = {
    "llama2": ("LlamaConfig", dict(tie_word_embeddings=False)),
    "llama3.1": ("LlamaConfig", dict(rope_parameters=_LLAMA3, tie_word_embeddings=True)),
    "llama_linear": (
        "LlamaConfig",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
    ),
    "llama_bias": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True)),
    "smollm2": ("LlamaConfig", dict(tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "mistral": ("MistralConfig", dict(sliding_window=None)),
    "mistral_window": ("MistralConfig", dict(sliding_window=7)),
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=False)),
    "qwen3": ("Qwen3Config", dict(head_dim=32, tie_word_embeddings=True)),
    "gemma3": (
        "Gemma3TextConfig",
        dict(head_dim=32, sliding_window=6, query_pre_attn_scalar=24, tie_word_embeddings=True,
             layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ),
    "smollm3": ("SmolLM3Config", dict(no_rope_layers=[1, 0, 1], **_IDS)),
    "olmo2": ("Olmo2Config", dict(tie_word_embeddings=False)),
    "olmo3": (
        "Olmo3Config",
        dict(sliding_window=6,
             layer_types=["sliding_attention", "full_attention", "sliding_attention"],
             rope_parameters={
                 "full_attention": _YARN, "sliding_attention": dict(rope_type="default",
                                                                    rope_theta=1e4)}),
    ),
    "granite": (
        "GraniteConfig",
        dict(embedding_multiplier=12.0, attention_multiplier=0.1, residual_multiplier=0.3,
             logits_scaling=6.0, attention_bias=True),
    ),
    "phi3": ("Phi3Config", dict(sliding_window=9, **_IDS)),
    "phi4": (
        "Phi3Config",
        dict(tie_word_embeddings=True, original_max_position_embeddings=64, **_IDS,
             rope_parameters=dict(
                 rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75,
                 short_factor=[1.0, 1.1, 1.3, 2.0, 2.5, 4.0], long_factor=[2.0] * 6)),
    ),
}  # fmt: skip
ADDED = ("smollm3", "olmo2", "olmo3", "granite", "phi3", "phi4")


@functools.lru_cache
def hf_model(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """Returns a random float32 model; norms and biases are random too, so that each matters."""
    import torch  # programs that load what `save` wrote find none
    import transformers

    torch.manual_seed(seed)
    name, options = FAMILIES[family]
    config = getattr(transformers, name)(**_SIZES, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


def save(family: str, directory: pathlib.Path, dtype: torch.dtype | None = None, **kw) -> str:
    """Saves the tiny model, in float32 by default, as transformers does and returns the path."""
    model = hf_model(family)
    target = type(model)(model.config).to(dtype)
    target.load_state_dict(model.state_dict())
    target.save_pretrained(directory, **kw)
    return str(directory)


def load(path: str, mesh: MeshConfig | None = None, devices=None, **options):
    """Returns decoder and parameters of a saved model."""
    config = from_hf(json.loads((pathlib.Path(path) / "config.json").read_text()))
    return decoder_and_params(config, hf.SafetensorsSource(path), mesh, devices, **options)


def decoder_and_params(config, source, mesh=None, devices=None, mode="fsdp", **options):
    grid = make_mesh(mesh or MeshConfig(), devices)
    attend = attention.select("xla", grid, packed=True, dtype=jnp.dtype("float32"))
    decoder = Decoder(config, Sharding(grid, mode), attend, **options)
    return decoder, hf.load(source, decoder)


def batch(lengths: list[list[int]], width: int, vocab: int = 400, seed: int = 0) -> Batch:
    """Returns rows that hold sequences of these lengths, each token but the first a target."""
    rng = np.random.default_rng(seed)
    tokens, positions, segments = (np.zeros((len(lengths), width), np.int32) for _ in range(3))
    for row, parts in enumerate(lengths):
        at = 0
        for number, size in enumerate(parts):
            tokens[row, at : at + size] = rng.integers(1, vocab, size)
            positions[row, at : at + size] = np.arange(size)
            segments[row, at : at + size] = number + 1
            at += size
    return Batch(tokens, positions, segments, (segments > 0) & (positions > 0))


def hidden(decoder: Decoder, params, rows: Batch):
    """Returns the last hidden states of a batch."""
    return decoder.hidden(params, *map(jnp.asarray, rows[:3]))


def loss_sum(decoder: Decoder, params, rows: Batch, chunk: int = 16):
    """Returns the summed negative log-likelihood of the targets."""
    rows = Batch(*map(jnp.asarray, rows))
    table = decoder.output_table(params)
    head = logprobs.Head(decoder.sharding, chunk)
    return logprobs.cross_entropy(hidden(decoder, params, rows), table, rows, head)[0]
