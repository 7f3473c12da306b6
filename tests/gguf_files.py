"""Writes small GGUF files for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

_KINDS = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
    list: GGUFValueType.ARRAY,
}


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> str:
    """Writes a file and returns its path.

    A tensor is a float32 or float16 array, or a pair of its rows of bytes and the name of their
    quantisation.
    """
    writer = gguf.GGUFWriter(path, arch=metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, _KINDS[type(value)])
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=GGMLQuantizationType[tensor[1]])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def model_metadata(arch: str = "llama", **changes: Any) -> dict[str, Any]:
    """Returns the metadata of a one-layer model; `changes` are options of the architecture."""
    options = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 256,
        "feed_forward_length": 32,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    options |= {key.replace("__", "."): value for key, value in changes.items()}
    return {"general.architecture": arch} | {f"{arch}.{k}": v for k, v in options.items()}


def embedding(rows: int = 3) -> dict[str, Any]:
    """Returns the one tensor that every file needs."""
    return {"token_embd.weight": np.arange(rows * 256, dtype=np.float32).reshape(rows, 256)}
