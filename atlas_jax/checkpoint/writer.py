"""Safetensors files, written tensor by tensor.

Tensors are cast and laid out on the device. A few are copied to the host while one is written, so
no file is held in memory.

Every tensor is a collective operation of all processes. A process that cannot write therefore
continues without writing, and all of them raise the error at the end.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import pathlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from atlas_jax import distributed
from atlas_jax.checkpoint import layout, names
from atlas_jax.models.transformer import Decoder
from atlas_jax.types import Params

if TYPE_CHECKING:
    from atlas_jax.models.lora import Lora

Dtype = str | Mapping[str, str]
"""dtype of all tensors, or of each tensor by name."""

_AHEAD = 8  # number of tensors that are being copied to the host


class WriteError(OSError):
    """Failure to write files, in one process or several; the message names each host."""


class Tensor(NamedTuple):
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]


def tensors(decoder: Decoder) -> list[Tensor]:
    """Returns every Hugging Face tensor of a model, with its shape."""
    return [Tensor(*item) for item in names.hf_shapes(decoder.config, decoder.shapes).items()]


def dtype_of(name: str, dtype: Dtype) -> str:
    """Returns the dtype of one tensor."""
    return dtype if isinstance(dtype, str) else dtype[name]


def num_bytes(tensor: Tensor, dtype: Dtype) -> int:
    """Returns the number of bytes that the tensor takes in a file."""
    return int(np.prod(tensor.shape)) * jnp.dtype(dtype_of(tensor.name, dtype)).itemsize


def write(
    params: Params,
    decoder: Decoder,
    directory: pathlib.Path,
    dtype: Dtype,
    files: Sequence[Sequence[Tensor]],
    mine: Callable[[int], bool],
) -> np.ndarray:
    """Writes the files, and an index if there are several.

    Every process must call it, since a parameter may be spread over all of them.

    Args:
        params: the parameters.
        decoder: the parameters' architecture and placement.
        directory: existing directory of the files.
        dtype: dtype of the tensors written.
        files: the tensors of each file.
        mine: whether this process writes the file of that number, and the index with file 0.

    Returns:
        A checksum of each written tensor, in a fixed order.

    Raises:
        WriteError: in every process, if one of them could not write.
    """
    # Each file's first tensor, then each one's second: the processes write at the same time.
    longest = max(map(len, files))
    order = [
        (file[i].name, number)
        for i in range(longest)
        for number, file in enumerate(files)
        if i < len(file)
    ]
    checksums = []
    with _WeightFiles(directory, files, dtype, mine) as output:
        values = _values(params, decoder, dtype, [name for name, _ in order])
        for (_, number), (value, checksum) in zip(order, values, strict=True):
            output.write(number, value)
            checksums.append(checksum)
    output.check()
    return np.asarray(jax.device_get(checksums))


def failure(directory: pathlib.Path, error: OSError) -> str:
    """Returns the text of an error of this process, which it also logs if others wait."""
    problem = (
        f"process {jax.process_index()} on {socket.gethostname()} cannot write "
        f"{directory}: {type(error).__name__}: {error}"
    )
    if jax.process_count() > 1:  # the others learn of it only at the end
        logging.error("%s", problem)
    return problem


def raise_together(problem: str) -> None:
    """Raises the same error in every process if one of them failed."""
    problems = distributed.gather_texts(problem)
    if any(problems):
        raise WriteError("; ".join(filter(None, problems)))


class _WeightFiles:
    """Files that this process writes, until the first error."""

    def __init__(
        self,
        directory: pathlib.Path,
        files: Sequence[Sequence[Tensor]],
        dtype: Dtype,
        mine: Callable[[int], bool],
    ) -> None:
        self._directory = directory
        self._files = files
        self._dtype = dtype
        self._mine = mine
        self._stack = contextlib.ExitStack()
        self._streams: dict[int, IO[bytes]] = {}
        self._problem = ""

    def __enter__(self) -> _WeightFiles:
        self._try(self._open)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After another error the files are given up, so their end is not written.
        if kind is None:
            self._try(self._finish)
            self._try(self._stack.close)
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._stack.close()

    def write(self, number: int, value: jax.Array) -> None:
        """Appends a tensor to a file, if this process writes that one."""
        # Every process goes through all tensors even after an error: each one is gathered by all.
        if number in self._streams:
            content = np.asarray(value).view(np.uint8).data
            self._try(lambda: self._streams[number].write(content))

    def check(self) -> None:
        """Raises the same error in every process if one of them failed."""
        raise_together(self._problem)

    def _try(self, do: Callable[[], object]) -> None:
        if self._problem:
            return
        try:
            do()
        except OSError as error:
            self._problem = failure(self._directory, error)
            self._streams = {}

    def _open(self) -> None:
        for number, content in enumerate(self._files):
            if self._mine(number):
                path = self._directory / file_name(number, len(self._files))
                self._streams[number] = _begin(self._stack, path, content, self._dtype)

    def _finish(self) -> None:
        for stream in self._streams.values():
            stream.flush()
            # Errors of the disk would otherwise come after the directory has its name, or never.
            os.fsync(stream.fileno())
        # The index is last: with it the files count as a whole model.
        if len(self._files) > 1 and self._mine(0):
            write_index(self._directory, self._files, self._dtype)


def file_name(number: int, total: int) -> str:
    """Returns the name of a file of so many."""
    if total == 1:
        return layout.WHOLE
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def _begin(
    stack: contextlib.ExitStack, path: pathlib.Path, content: Sequence[Tensor], dtype: Dtype
) -> IO[bytes]:
    """Opens a file and writes its header."""
    stream = stack.enter_context(path.open("wb"))
    stream.write(header(content, dtype)[0])
    return stream


def header(content: Sequence[Tensor], dtype: Dtype) -> tuple[bytes, dict[str, int]]:
    """Returns the beginning of a file, and the place in the file of each tensor by name."""
    stored = {name: ours for ours, name in layout.DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places = {}
    end = 0
    for tensor in content:
        start, end = end, end + num_bytes(tensor, dtype)
        header[tensor.name] = {
            "dtype": stored[dtype_of(tensor.name, dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        places[tensor.name] = start
    text = json.dumps(header, separators=(",", ":")).encode()
    # Readers map the file into memory, so the numbers begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    beginning = len(text).to_bytes(8, "little") + text
    return beginning, {name: len(beginning) + place for name, place in places.items()}


def write_index(directory: pathlib.Path, files: Sequence[Sequence[Tensor]], dtype: Dtype) -> None:
    """Writes the index of several files."""
    pairs = [(t, file_name(i, len(files))) for i, file in enumerate(files) for t in file]
    total = sum(num_bytes(tensor, dtype) for tensor, _ in pairs)
    weight_map = {tensor.name: name for tensor, name in pairs}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2) + "\n"
    (directory / layout.INDEX).write_text(text)


def _values(
    params: Params, decoder: Decoder, dtype: Dtype, order: Sequence[str]
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields each tensor with a checksum: cast, in Hugging Face layout, whole on every device.

    Two versions of a tensor with the same checksum are almost certainly equal.
    """
    kinds = {
        name: (entry, i)
        for entry in names.entries(decoder.config)
        for i, name in enumerate(names.hf_names(entry, decoder.config))
    }
    waiting: collections.deque[tuple[jax.Array, jax.Array]] = collections.deque()
    for name in order:
        entry, i = kinds[name]
        parts = [names.stored(params, path) for path in entry.paths]
        one = _one(entry, dtype_of(name, dtype), decoder.sharding.replicated, decoder.lora)
        value, checksum = one(parts, np.int32(i))
        # The copy of one tensor runs while the devices gather the next ones.
        value.copy_to_host_async()
        waiting.append((value, checksum))
        # Each waiting tensor is whole on every device, so few may wait.
        if len(waiting) > _AHEAD:
            yield waiting.popleft()
    yield from waiting


@functools.lru_cache
def _one(
    entry: names.TensorKind, dtype: str, place: jax.sharding.NamedSharding, lora: Lora | None
) -> Callable[[list[Any], np.int32], tuple[jax.Array, jax.Array]]:
    """Returns the compiled `(parameters, layer) -> (tensor, checksum)` of one kind."""
    bits = jnp.uint32 if jnp.dtype(dtype).itemsize == 4 else jnp.uint16

    def run(parts: list[Any], layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = jax.tree.map(lambda x: x[layer] if entry.per_layer else x, parts)
        value = names.to_hf(entry, [names.value(part, lora, dtype) for part in values])
        numbers = jax.lax.bitcast_convert_type(value, bits).astype(jnp.uint32)
        return value, jnp.sum(numbers * (numbers | 1), dtype=jnp.uint32)

    return jax.jit(run, out_shardings=(place, place))
