"""Architectures of the models that `configs/model/` names, as their `config.json` has them.

Used by the plan alone, and only where the model itself is not on this machine.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from atlas_jax.checkpoint import hf
from atlas_jax.models.config import ModelConfig, from_hf


def _qwen3(width: int, hidden: int, layers: int, heads: int, tied: bool, theta: float = 1e6) -> Any:
    return {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": width,
        "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": tied, "rope_theta": theta,
        "hidden_act": "silu", "attention_bias": False,
    }  # fmt: skip


_LLAMA3 = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_theta": 500000.0, "hidden_act": "silu", "attention_bias": False,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip

KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-4B-Instruct-2507": _qwen3(2560, 9728, 36, 32, tied=True, theta=5e6)
    | {"max_position_embeddings": 262144},
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "rope_theta": 1e6, "hidden_act": "silu",
    },
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3,
    "meta-llama/Meta-Llama-3.1-8B-Instruct": _LLAMA3,
}  # fmt: skip


def find(name: str, config_json: str = "") -> ModelConfig:
    """Returns the architecture of a model.

    Args:
        name: directory, `.gguf` file or hub id.
        config_json: a `config.json` to read instead; empty reads the model's own, or `KNOWN`.

    Raises:
        ValueError: if there is none on this machine.
    """
    if config_json:
        return from_hf(json.loads(pathlib.Path(config_json).read_text()))
    if name in KNOWN and not pathlib.Path(name).exists():
        return from_hf(KNOWN[name])
    return from_hf(hf.open_source(hf.resolve(name)).config)
