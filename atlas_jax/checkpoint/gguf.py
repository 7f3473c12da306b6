"""GGUF files, read as a Hugging Face config, tensors in Hugging Face layout, and a tokenizer.

A GGUF file is one memory-mapped file with metadata (`llama.block_count`, `tokenizer.ggml.tokens`)
and with tensors that are plain or block-quantised. Content that this reader does not understand is
refused by name, because a model that is read almost right trains and answers wrongly.

References:
    File format: ggml, docs/gguf.md. Tensor names and the order of the rotary dims: llama.cpp,
    convert_hf_to_gguf.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from transformers import PreTrainedTokenizerFast

from atlas_jax import extras
from atlas_jax.checkpoint.gguf_config import generation_config, model_config
from atlas_jax.checkpoint.gguf_tokenizer import build_tokenizer

with extras.importing("gguf", "a .gguf file"):
    import gguf
    from gguf.gguf_reader import ReaderTensor

_QUANTISATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.attn_norm": "input_layernorm",
    "blk.attn_q": "self_attn.q_proj",
    "blk.attn_k": "self_attn.k_proj",
    "blk.attn_v": "self_attn.v_proj",
    "blk.attn_output": "self_attn.o_proj",
    "blk.attn_q_norm": "self_attn.q_norm",
    "blk.attn_k_norm": "self_attn.k_norm",
    "blk.ffn_norm": "post_attention_layernorm",
    "blk.ffn_gate": "mlp.gate_proj",
    "blk.ffn_up": "mlp.up_proj",
    "blk.ffn_down": "mlp.down_proj",
}

_ROPE_FACTORS = "rope_freqs.weight"


class GGUFSource:
    """An open GGUF file, whose tensors stay on disk until `read`.

    Attributes:
        path: the file.
        config: the content of the Hugging Face model's `config.json`. `dtype` is the dtype of an
            export: that of the file, or bfloat16 for a quantised file.
        generation_config: the ids that begin, end and pad a generation; `eos_token_id` is a list
            if several end it.
        shapes: shapes by Hugging Face tensor name; a matrix is `[out, in]`.
    """

    def __init__(self, path: str) -> None:
        """Opens a file and checks that its metadata and its tensors are understood.

        Raises:
            ValueError: if the file is missing, damaged or no GGUF file, or if its architecture, a
                quantisation, a tensor or an option is unsupported.
        """
        reader = _reader(path)
        self.path = path
        try:
            self.config, self.generation_config, self._tensors = _content(reader)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.shapes = {name: _shape(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor in Hugging Face layout, copied out of the file.

        Args:
            name: a key of `shapes`.

        Returns:
            The tensor: float16 and bfloat16 in their own dtype, every other one in float32.
        """
        values = _dequantised(self._tensors[name])
        projection = name.split(".")[-2]
        # llama.cpp's converter reorders these two projections for this architecture alone.
        if self.config["model_type"] == "llama" and projection in ("q_proj", "k_proj"):
            heads = "num_attention_heads" if projection == "q_proj" else "num_key_value_heads"
            return _halves_from_pairs(values, self.config[heads])
        return values


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a GGUF file, chat template included, without torch.

    Raises:
        ValueError: if the file is missing, damaged or no GGUF file, or if the tokenizer or one of
            its options is unsupported.
    """
    metadata = _metadata(_reader(path))
    try:
        return build_tokenizer(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _reader(path: str) -> gguf.GGUFReader:
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist or is no file; give the path of a .gguf file")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(
            f"{path} is not a GGUF file: it begins with {magic!r}, not with b'GGUF'; give a .gguf "
            "file, or the directory of a safetensors model"
        )
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{path} ({os.path.getsize(path)} bytes) cannot be read to its end ({error}); it is "
            "cut off, damaged, or newer than the installed gguf library: download it again"
        ) from error
    if reader.byte_order == "S":
        raise ValueError(f"{path} has the byte order of another machine; convert it again here")
    return reader


def _metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def _content(
    reader: gguf.GGUFReader,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, ReaderTensor]]:
    """Returns config, generation config, and the tensors under their Hugging Face names."""
    metadata = _metadata(reader)
    factors = [t.data for t in reader.tensors if t.name == _ROPE_FACTORS]
    config = model_config(metadata, factors[0] if factors else None)
    tensors = _hf_tensors(reader)
    config |= _told_by_tensors(config["model_type"], tensors)
    generation = generation_config(metadata, config["vocab_size"])
    for name, ids in generation.items():
        config[name] = ids[0] if isinstance(ids, list) else ids
    return config, generation, tensors


def _hf_tensors(reader: gguf.GGUFReader) -> dict[str, ReaderTensor]:
    tensors = {}
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in _QUANTISATIONS:
            raise ValueError(
                f"tensor {tensor.name} is stored as {tensor.tensor_type.name}, which is not "
                f"supported; use a file with {', '.join(_QUANTISATIONS)} only"
            )
        if tensor.name != _ROPE_FACTORS:
            tensors[_hf_name(tensor.name)] = tensor
    return tensors


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match:
        layer, part, kind = match.groups()
        key, prefix = (f"blk.{part}", f"model.layers.{layer}.") if layer else (part, "")
        if key in _NAMES:
            return f"{prefix}{_NAMES[key]}.{kind}"
    raise ValueError(f"tensor {name} is not part of any supported model; use another model")


def _told_by_tensors(arch: str, tensors: Mapping[str, ReaderTensor]) -> dict[str, Any]:
    """Returns the config options that only the tensors tell: vocabulary, ties, biases, dtype."""
    if "model.embed_tokens.weight" not in tensors:
        raise ValueError("tensor token_embd.weight is missing; the file holds no language model")
    # Matrices only, since norms are float32 in files of every dtype.
    stored = {t.tensor_type.name for t in tensors.values() if len(t.shape) == 2}
    plain = {"F32": "float32", "F16": "float16"}
    config = {
        "vocab_size": _shape(tensors["model.embed_tokens.weight"])[0],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "dtype": plain[stored.pop()] if len(stored) == 1 and stored <= set(plain) else "bfloat16",
    }
    if arch != "qwen2":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
    if arch == "llama":
        config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in tensors
    return config


def _dequantised(tensor: ReaderTensor) -> np.ndarray:
    if tensor.tensor_type.name in ("F32", "F16"):
        return np.array(tensor.data)
    if tensor.tensor_type.name == "BF16":
        return np.array(tensor.data).view(ml_dtypes.bfloat16)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def _halves_from_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Returns a matrix with the rotary dims of each head in Hugging Face's order.

    llama.cpp rotates the rows `2i, 2i + 1` together, Hugging Face the rows `i, i + H / 2`.
    """
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
