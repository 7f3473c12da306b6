"""A `config.json` means what it means to transformers, or is refused by name."""

import copy
import json
import random

import jax
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from atlas_jax.models import config
from tests import tiny

ONE = jax.devices()[:1]
SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.2, 2.0, 3.5], "long_factor": [9.0] * 4}
IDS = {"pad_token_id": [0, None], "bos_token_id": [0], "eos_token_id": [[1, 2]]}
COMMON = {
    "rms_norm_eps": [1e-5, 1e-2], "rope_theta": [500.0, 10000.0], "tie_word_embeddings": [True],
    "use_cache": [False], "_model_name_or_path": ["a.gguf"], "head_dim": [8, 16],
    "architectures": [None, ["Other"]], "bos_token_id": [0, None], "eos_token_id": [[1, 2]],
    "rope_scaling": [
        None, {"type": "linear", "factor": 4.0}, YARN, {"type": "dynamic", "factor": 2.0},
        YARN | {"beta_fast": 8, "beta_slow": 2, "truncate": False, "attention_factor": 1.3},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}, YARN | {"factor": None},
    ],
    "initializer_range": [0.3],
    "some_tool_version": ["2026.11"], "torch_dtype": ["float32"], "attention_dropout": [0.1],
}  # fmt: skip
LOCAL = {
    "sliding_window": [5, 7], "use_sliding_window": [True], "max_window_layers": [1, 3],
    "layer_types": [["sliding_attention", "full_attention", "full_attention"]],
}  # fmt: skip
OPTIONS = {
    "llama": COMMON | {
        "attention_bias": [True], "mlp_bias": [True], "hidden_act": ["silu", "gelu_new"],
        "pretraining_tp": [2], "rope_scaling": [{"rope_type": "llama3"} | LLAMA_ROPE],
        "rope_parameters": [{"rope_type": "llama3", "rope_theta": 900.0} | LLAMA_ROPE],
        "sliding_window": [4],
    },
    "mistral": COMMON | {"sliding_window": [5, None], "attention_bias": [True],
                         "layer_types": LOCAL["layer_types"]},
    "qwen2": COMMON | LOCAL | {"attention_bias": [False]},
    "qwen3": COMMON | LOCAL | {"attention_bias": [True]},
    "gemma3_text": COMMON | {
        "sliding_window": [5], "query_pre_attn_scalar": [8, 64], "sliding_window_pattern": [2],
        "_sliding_window_pattern": [3], "rope_local_base_freq": [300.0],
        "layer_types": LOCAL["layer_types"], "rope_parameters": [None], "attention_bias": [True],
        "hidden_activation": ["gelu_pytorch_tanh"], "rope_scaling": [None],
    },
    "smollm3": COMMON | LOCAL | IDS | {
        "no_rope_layers": [[1, 0, 1], [1, 1, 1], [0, 1, 1, 0]], "no_rope_layer_interval": [2, 3],
        "attention_bias": [True], "mlp_bias": [True],
    },
    "olmo2": COMMON | IDS | {"attention_bias": [True], "sliding_window": [5]},
    "olmo3": COMMON | IDS | {
        "sliding_window": [5], "layer_types": LOCAL["layer_types"], "attention_bias": [True],
    },
    "granite": COMMON | IDS | {
        "embedding_multiplier": [12.0, 3], "attention_multiplier": [0.2, 0.015625],
        "residual_multiplier": [0.22], "logits_scaling": [8, 0.5], "attention_bias": [True],
        "mlp_bias": [True],
    },
    "phi3": COMMON | IDS | {
        "sliding_window": [5, 40], "attention_bias": [True], "partial_rotary_factor": [0.5],
        "original_max_position_embeddings": [32], "resid_pdrop": [0.2], "head_dim": [8],
        "rope_scaling": [None, LONG | {"type": "longrope"}, LONG | {"type": "su"}],
    },
}  # fmt: skip


def generate(family, seed):
    """Returns a config with some of the options, each with one of its values."""
    draws = random.Random(f"{family} {seed}")
    found = {"model_type": family, "pad_token_id": 0} | SIZES
    for name, values in OPTIONS[family].items():
        if draws.random() < 0.4:
            found[name] = draws.choice(values)
    return found


def model_of(options):
    """Returns what transformers makes of a config, with random parameters."""
    torch.manual_seed(0)
    kind = transformers.CONFIG_MAPPING[options["model_type"]]
    model = transformers.AutoModelForCausalLM.from_config(
        kind.from_dict(copy.deepcopy(options)), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.float().eval()


@pytest.mark.parametrize("family", OPTIONS)
@pytest.mark.parametrize("seed", range(6))
def test_a_generated_config_means_what_it_means_to_transformers(family, seed, tmp_path):
    options = generate(family, seed)
    rows = tiny.batch([[23]], width=23, vocab=SIZES["vocab_size"])
    try:
        model = model_of(options)
        with torch.no_grad():
            expected = model(torch.tensor(np.asarray(rows.tokens, np.int64))).logits[0].numpy()
    except (KeyError, TypeError, ValueError, StrictDataclassError):  # such as a window of none
        with pytest.raises(ValueError, match=r"config\.json"):
            config.from_hf(options)
        return
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(options))
    decoder, params = tiny.load(str(tmp_path), devices=ONE)
    hidden = tiny.hidden(decoder, params, rows)
    ours = np.asarray(hidden @ decoder.output_table(params).T)[0]
    np.testing.assert_allclose(ours, expected, atol=2e-4 * np.abs(expected).max())


def accepted(options):
    try:
        return bool(config.from_hf(options))
    except ValueError:
        return False


@pytest.mark.parametrize("family", OPTIONS)
def test_most_of_the_generated_configs_are_accepted(family):
    assert sum(accepted(generate(family, seed)) for seed in range(6)) >= 3


LLAMA = {"model_type": "llama"} | SIZES


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": None}, "None"),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "proportional"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 8}}, "factor"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"hidden_act": "relu"}, "relu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: the weights are quantised"),
        ({"compression_config": {}}, "compression_config"),
        ({"auto_map": {"AutoModel": "mine.Model"}}, "auto_map: the model brings code"),
        ({"hidden_size": "wide"}, "hidden_size.*expected int"),
        ({"num_attention_heads": 5}, "hidden size.*heads"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        config.from_hf(LLAMA | change)


def test_what_transformers_does_not_know_is_named_and_left_alone():
    options = LLAMA | {"_model_name_or_path": "a.gguf", "unsloth_version": "1", "use_cache": False}
    before = copy.deepcopy(options)
    assert config.from_hf(options) == config.from_hf(LLAMA)
    assert options == before
    assert config.ignored(options) == ["_model_name_or_path", "unsloth_version"]
    assert config.ignored(LLAMA | {"rope_scaling": None, "sliding_window_pattern": 2}) == []
