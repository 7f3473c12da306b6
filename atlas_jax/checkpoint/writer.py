"""Safetensors files written as a stream.

A tensor is cast and laid out on the device, a few are on their way to the host while one is
written, and no file is held in memory.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.checkpoint import names
from atlas_jax.models.transformer import Decoder
from atlas_jax.types import Params

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Those of safetensors, and as NumPy calls them."""

Dtype = str | Mapping[str, str]
"""dtype of all tensors, or of each by name."""

_AHEAD = 8  # tensors on their way to the host


class Tensor(NamedTuple):
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]


def tensors(decoder: Decoder) -> list[Tensor]:
    """Returns name and shape of every Hugging Face tensor of a model."""
    return [Tensor(*item) for item in names.hf_shapes(decoder.config, decoder.shapes).items()]


def dtype_of(name: str, dtype: Dtype) -> str:
    """Returns the dtype of one tensor."""
    return dtype if isinstance(dtype, str) else dtype[name]


def num_bytes(tensor: Tensor, dtype: Dtype) -> int:
    """Returns what the tensor takes in a file."""
    return int(np.prod(tensor.shape)) * jnp.dtype(dtype_of(tensor.name, dtype)).itemsize


def write(
    params: Params,
    decoder: Decoder,
    directory: pathlib.Path,
    dtype: Dtype,
    files: Sequence[Sequence[Tensor]],
    mine: Callable[[int], bool],
) -> None:
    """Writes the files, and their index where there are several.

    Every process calls it, since a parameter may be spread over all of them.

    Args:
        params: the parameters.
        decoder: their architecture and places.
        directory: exists.
        dtype: of the tensors written.
        files: the tensors of each file.
        mine: whether this process writes the file of that number, and the index with file 0.
    """
    paths = [directory / _file_name(i, len(files)) for i in range(len(files))]
    with contextlib.ExitStack() as stack:
        streams = [
            _begin(stack, path, content, dtype) if mine(i) else None
            for i, (path, content) in enumerate(zip(paths, files, strict=True))
        ]
        # Tensors in turn of the files, so that the processes write at the same time.
        longest = max(map(len, files))
        order = [
            (file[i], stream)
            for i in range(longest)
            for file, stream in zip(files, streams, strict=True)
            if i < len(file)
        ]
        values = _values(params, decoder, dtype, [tensor.name for tensor, _ in order])
        for (_, stream), value in zip(order, values, strict=True):
            if stream is not None:
                stream.write(np.asarray(value).view(np.uint8).data)
        for stream in filter(None, streams):
            stream.flush()
            os.fsync(stream.fileno())
    if len(files) > 1 and mine(0):
        _write_index(directory, paths, files, dtype)


def _file_name(number: int, total: int) -> str:
    if total == 1:
        return "model.safetensors"
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def _begin(
    stack: contextlib.ExitStack, path: pathlib.Path, content: Sequence[Tensor], dtype: Dtype
) -> IO[bytes]:
    """Opens a file and writes the header, which says where each tensor will stand."""
    stored = {name: ours for ours, name in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in content:
        start, end = end, end + num_bytes(tensor, dtype)
        header[tensor.name] = {
            "dtype": stored[dtype_of(tensor.name, dtype)], "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream = stack.enter_context(path.open("wb"))
    stream.write(len(text).to_bytes(8, "little") + text)
    return stream


def _write_index(
    directory: pathlib.Path,
    paths: Sequence[pathlib.Path],
    files: Sequence[Sequence[Tensor]],
    dtype: Dtype,
) -> None:
    pairs = [(t, path.name) for path, file in zip(paths, files, strict=True) for t in file]
    total = sum(num_bytes(tensor, dtype) for tensor, _ in pairs)
    weight_map = {tensor.name: name for tensor, name in pairs}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2) + "\n"
    (directory / "model.safetensors.index.json").write_text(text)


def _values(
    params: Params, decoder: Decoder, dtype: Dtype, order: Sequence[str]
) -> Iterator[jax.Array]:
    """Yields each tensor, cast and in Hugging Face layout, whole on every device."""
    kinds = {
        name: (entry, i)
        for entry in names.entries(decoder.config)
        for i, name in enumerate(names.hf_names(entry, decoder.config))
    }
    waiting: collections.deque[jax.Array] = collections.deque()
    for name in order:
        entry, i = kinds[name]
        param = names.leaf(params, entry.path)
        one = _one(entry, dtype_of(name, dtype), decoder.sharding.replicated)
        value = one(param, np.int32(i))
        value.copy_to_host_async()
        waiting.append(value)
        if len(waiting) > _AHEAD:
            yield waiting.popleft()
    yield from waiting


@functools.lru_cache
def _one(
    entry: names.Entry, dtype: str, place: jax.sharding.NamedSharding
) -> Callable[[jax.Array, np.int32], jax.Array]:
    """Returns the compiled `(parameter, layer) -> tensor` of one kind."""

    def run(param: jax.Array, layer: jax.Array) -> jax.Array:
        value = param[layer] if entry.per_layer else param
        return names.to_hf(entry, value.astype(dtype))

    return jax.jit(run, out_shardings=place)
