"""Model directories: their weight files, and checks from file names and headers alone.

The weight files are those that transformers would load. `diagnosis` names what else a directory
may be. Imports no JAX.
"""

from __future__ import annotations

import collections
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import safetensors
from absl import logging

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""dtypes of weights: the name in safetensors, and the name in NumPy."""

BUFFERS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
"""Suffixes of the names of tensors that are buffers, not weights."""

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_POINTER = b"version https://git-lfs"
_TOKENIZER_FILES = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_QUANTISED_TENSORS = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|input_scale|scales|SCB)$"
    r"|\.weight\.(absmax|quant_)"
)


def check(path: pathlib.Path) -> list[pathlib.Path]:
    """Checks that a directory is a model that can be trained, from names and headers alone.

    Returns:
        Its `weight_files`.

    Raises:
        ValueError: if the directory is something else, a file is damaged or missing, or the model
            cannot be trained.
    """
    usual = (path / WHOLE).exists() or (path / INDEX).exists()
    if not usual or (path / "adapter_config.json").exists():
        from atlas_jax.checkpoint import diagnosis  # most directories are models

        diagnosis.check_adapter(path)
    config = path / "config.json"
    if not config.exists():
        check_foreign(path)
        raise ValueError(f"{path} is no model: it has no config.json{_hint(path)}")
    content = read_json(config)
    if "model_type" not in content:
        raise ValueError(
            f"{path} is no model: its config.json is not that of a Hugging Face model (it has no "
            f"model_type){_hint(path)}"
        )
    if method := _quantised(path, content):
        raise ValueError(
            f"{path} is quantised ({method}); training needs weights in "
            f"{', '.join(DTYPES.values())}: give the model that it was made of"
        )
    files = weight_files(path)
    for file in files:
        with open_file(file) as tensors:
            check_tensors(file, tensors)
    return files


def has_weights(path: pathlib.Path) -> bool:
    """Returns whether a directory has weight files with the names that transformers uses."""
    named = any((path / name).exists() for name in (WHOLE, INDEX))
    return named or any(_SHARD.fullmatch(file.name) for file in path.glob("*.safetensors"))


def weight_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the weight files of a directory by transformers' precedence; logs the others.

    `model.safetensors` has precedence over the files that `model.safetensors.index.json` lists. A
    complete set of numbered shards without an index, which transformers refuses, is accepted too.

    Raises:
        ValueError: if there are none, or several sets are possible.
    """
    index = path / INDEX
    whole = path / WHOLE
    present = sorted(path.glob("*.safetensors"))
    if whole.exists():
        used = [whole]
    elif index.exists():
        used = indexed(index)
    else:
        used = _numbered(path, present)
    others = [file.name for file in present if file not in used]
    if whole.exists() and index.exists():
        others.append(index.name)
    if others:
        counted = some([file.name for file in used])
        logging.warning("%s: %s not read; the weights are in %s", path, some(others), counted)
    return used


def indexed(index: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that an index lists, whether they exist or not.

    Raises:
        ValueError: if the file is not an index, or lists a file outside its directory.
    """
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} has no weight_map; download it again")
    for file in files.values():
        parts = pathlib.PurePath(str(file)).parts
        if not parts or ".." in parts or pathlib.PurePath(str(file)).is_absolute():
            raise ValueError(f"{index} names {file!r}, which lies outside its directory; not read")
    return sorted({index.parent / str(file) for file in files.values()})


def _numbered(path: pathlib.Path, candidates: list[pathlib.Path]) -> list[pathlib.Path]:
    """Returns the only complete set of numbered shards."""
    sets: dict[int, list[pathlib.Path]] = collections.defaultdict(list)
    for file in candidates:
        if match := _SHARD.fullmatch(file.name):
            sets[int(match[2])].append(file)
    whole = [files for total, files in sets.items() if len(files) == total]
    if len(whole) == 1 and len(sets) == 1:
        return whole[0]
    if not sets:
        check_foreign(path)
    if not candidates:
        raise ValueError(f"{path} has no *.safetensors file, nor other weights{_hint(path)}")
    names = some([file.name for file in candidates])
    raise ValueError(
        f"{path} has neither {WHOLE} nor {INDEX}, and {names} is no whole set of numbered "
        f"shards; download the model again, or name its one file {WHOLE}"
    )


def check_foreign(path: pathlib.Path) -> None:
    """Checks a directory without weights that can be read for files of other tools.

    Raises:
        ValueError: names the tool, and what to do.
    """
    from atlas_jax.checkpoint import diagnosis

    if found := diagnosis.foreign(path):
        raise ValueError(found)


def open_file(file: pathlib.Path) -> Any:
    """Returns an open safetensors file.

    Raises:
        ValueError: if it is missing, empty, cut off, or not a safetensors file.
    """
    if not file.exists():
        raise ValueError(f"{file} is named in the index but does not exist; download it again")
    check_fetched(file)
    try:
        return safetensors.safe_open(file, "numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is truncated or no safetensors file: {error}; "
            "download it again"
        ) from None


def check_fetched(file: pathlib.Path) -> None:
    """Checks that a file is neither empty nor a pointer of Git LFS.

    Raises:
        ValueError: if it is one of them.
    """
    with file.open("rb") as content:
        beginning = content.read(len(_POINTER))
    if beginning == _POINTER:
        raise ValueError(
            f"{file} is a pointer of Git LFS, not the file itself; fetch it with git lfs pull"
        )
    if not beginning:
        raise ValueError(f"{file} is empty; download it again")


def check_tokenizer(path: pathlib.Path) -> None:
    """Checks that a directory has the files of a tokenizer.

    Raises:
        ValueError: if it has none, or one is damaged.
    """
    files = [file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)]
    for file in files:
        check_fetched(file)
        if file.suffix == ".json":
            read_json(file)
    if not files:
        raise ValueError(
            f"{path} has no tokenizer.json, nor another tokenizer's file; copy it from the model "
            "that this one was made of, or set tokenizer_name_or_path"
        )


def check_tensors(file: pathlib.Path, tensors: Any) -> None:
    """Checks the names and dtypes in the header of an open file.

    Raises:
        ValueError: if tensors are quantised, or have a dtype that cannot be trained.
    """
    names = list(tensors.keys())
    if not names:
        raise ValueError(f"{file} has no tensors; download it again")
    quantised = [name for name in names if _QUANTISED_TENSORS.search(name)]
    if quantised:
        raise ValueError(
            f"{file} has quantised tensors ({some(quantised)}); give the model that it was made of"
        )
    for name in names:
        if not name.endswith(BUFFERS):  # buffers may have any dtype
            dtype_of(name, tensors)


def dtype_of(name: str, tensors: Any) -> str:
    """Returns the NumPy name of a tensor's dtype in an open file.

    Raises:
        ValueError: if weights cannot have that dtype.
    """
    dtype = tensors.get_slice(name).get_dtype()
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {dtype}; supported are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        ValueError: if the file is missing or holds anything else.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; a Hugging Face model directory has one")
    check_fetched(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path} is not JSON: {error}; download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; download it again")
    return content


def is_model(directory: pathlib.Path) -> bool:
    """Returns whether a directory is a model in Hugging Face layout, whatever its name."""
    try:
        content = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "model_type" in content


def is_adapter(directory: pathlib.Path) -> bool:
    """Returns whether a directory is an adapter of PEFT, without weights of a whole model."""
    return (directory / ADAPTER_CONFIG).exists() and not has_weights(directory)


def adapter_base(directory: pathlib.Path) -> str:
    """Returns the base model of an adapter, checked from its config.

    Raises:
        ValueError: for an adapter that is not computed here.
    """
    from atlas_jax.checkpoint import diagnosis

    return diagnosis.adapter_base(directory)


def tokenizer_place(path: pathlib.Path) -> pathlib.Path:
    """Returns the place of a model's tokenizer: an adapter without one has its base's."""
    has_own = any(file for pattern in _TOKENIZER_FILES for file in path.glob(pattern))
    return path if has_own or not is_adapter(path) else pathlib.Path(adapter_base(path))


def some(names: Sequence[str]) -> str:
    """Returns the first names of a list, and the number of the others, as a text."""
    from atlas_jax.wording import shorten  # for what is wrong

    return ", ".join(shorten(names, 5)) or "none"


def _hint(path: pathlib.Path) -> str:
    return f"; {path}/final is one" if is_model(path / "final") else ""


def _quantised(path: pathlib.Path, config: dict[str, Any]) -> str:
    """Returns the name of a model's quantisation method; "" if it is not quantised."""
    for key in ("quantization_config", "compression_config", "quantization"):
        options = config.get(key)
        if isinstance(options, dict) and options:
            kind = options.get("quant_method") or options.get("quant_algo") or options.get("format")
            return str(kind or ("MLX" if key == "quantization" else key))
    return next((name for name in _QUANTISED_FILES if (path / name).exists()), "")
