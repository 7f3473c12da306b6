"""Tensors of a policy on their way out of the devices, one layer after another.

A receiver that loads a layer once it has all its tensors then holds one layer twice, not the model.
Each process gets the tensors that it sends: of consecutive layers each process gets one. A device
holds a share of a tensor of its process, so that all links to the host are used and no device
gathers what another process sends. Of the few tensors outside the layers every process gets a copy,
in such shares too.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from atlas_jax import distributed, stopping
from atlas_jax.checkpoint import names, writer
from atlas_jax.checkpoint.writer import Tensor
from atlas_jax.models.transformer import Decoder
from atlas_jax.types import Params

if TYPE_CHECKING:
    from atlas_jax.models.lora import Lora

_THREADS = 4  # number that write one file; one alone is slower than memory and than most disks

_WAITING_BYTES = 2 << 30
"""Bytes of a process that may wait on its devices for their copy to the host."""


class _LayerBlock(NamedTuple):
    """The tensors of one layer of each process, or those before or after the layers."""

    kinds: tuple[names.TensorKind, ...]
    layers: tuple[int, ...]
    """The layer of each process, -1 for none; all 0 outside the layers."""
    owner: int
    """The process that sends tensors outside the layers."""


class _SentBlock(NamedTuple):
    """A block that the devices compute."""

    names: tuple[str, ...]
    """Tensors that this process sends; empty if it sends none of the block."""
    values: list[jax.Array]
    checksums: jax.Array

    @property
    def num_bytes(self) -> int:
        """Bytes on the devices of this process."""
        return sum(value.nbytes for value in self.values) // jax.process_count()


class Outgoing:
    """The tensors that this process sends, from the embedding to the head.

    All processes must create it and go through it together. It can be gone through again if it
    keeps what it has fetched.
    """

    def __init__(self, params: Params, decoder: Decoder, dtype: str, *, keep: bool = False) -> None:
        """Begins nothing.

        Args:
            params: the parameters.
            decoder: their architecture and placement.
            dtype: dtype of the tensors.
            keep: whether tensors stay in the host's memory.
        """
        self.order = order(decoder, jax.process_count())[jax.process_index()]
        self._begun = _begin(params, decoder, dtype)
        self._keep = keep
        self._waiting: collections.deque[_SentBlock] = collections.deque()
        self._fetched: list[tuple[str, np.ndarray]] = []
        self._checksums: list[np.ndarray] = []

    def dispatch(self) -> None:
        """Begins the copy of all tensors; the parameters may be donated then.

        It waits only for what the devices cannot hold beside their work.
        """
        assert self._keep, "what is fetched here would be lost"
        for block in self._begun:
            self._copy(block)
            while sum(waiting.num_bytes for waiting in self._waiting) > _WAITING_BYTES:
                self._fetch()

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields each tensor with its name."""
        yield from list(self._fetched)
        for block in self._begun:
            self._copy(block)
            # One block is copied to the host while the devices compute the next one.
            if len(self._waiting) > 1:
                yield from self._fetch()
        while self._waiting:
            yield from self._fetch()

    def on_device(self, device: jax.Device) -> Iterator[tuple[str, jax.Array]]:
        """Yields each tensor with its name, whole on one device, in a run of one process."""
        for block in self._begun:
            self._checksums.append(np.asarray(block.checksums).ravel())
            for name, value in zip(block.names, block.values, strict=True):
                yield name, jax.device_put(value[0], device)

    @property
    def checksums(self) -> np.ndarray:
        """A checksum of each tensor of all processes, in a fixed order, once all are fetched.

        Two versions of a tensor with the same checksum are almost certainly equal.
        """
        return np.concatenate(self._checksums)

    def _copy(self, block: _SentBlock) -> None:
        for value in block.values if block.names else ():
            for shard in value.addressable_shards:
                shard.data.copy_to_host_async()
        self._waiting.append(block)

    def _fetch(self) -> list[tuple[str, np.ndarray]]:
        block = self._waiting.popleft()
        values = [_on_host(value) for value in block.values] if block.names else []
        found = list(zip(block.names, values, strict=True))
        self._checksums.append(np.asarray(block.checksums).ravel())
        if self._keep:
            self._fetched += found
        return found


def order(decoder: Decoder, processes: int) -> list[list[Tensor]]:
    """Returns the tensors that each process sends, in order: embedding, layers, norm and head."""
    shapes = names.hf_shapes(decoder.config, decoder.shapes)
    sent: list[list[Tensor]] = [[] for _ in range(processes)]
    for block in _blocks(decoder, processes):
        for process, tensors in enumerate(sent):
            tensors += [Tensor(name, shapes[name]) for name in _names(block, process, decoder)]
    return sent


def write_own(
    values: Iterable[tuple[str, np.ndarray]],
    directory: pathlib.Path,
    dtype: str,
    files: Sequence[Sequence[Tensor]],
    stop: Callable[[], bool],
) -> None:
    """Writes the file of this process, in several threads; file i is that of process i.

    Every process must call it, and goes through all its values: to fetch them takes all processes.

    Args:
        values: the tensors of this process's file, by name.
        directory: existing directory of the files.
        dtype: dtype of the tensors.
        files: the tensors of each process's file.
        stop: a function that tells whether the writing is given up.

    Raises:
        WriteError: in every process, if one of them could not write.
        StopRequestedError: in every process, if one of them gave up.
    """
    number = jax.process_index()
    problem = ""
    stopped = False
    header, places = writer.header(files[number], dtype)
    with concurrent.futures.ThreadPoolExecutor(_THREADS, "export") as threads:
        try:
            with _opened(directory / writer.file_name(number, len(files))) as file:
                _write_at(file, memoryview(header), 0)
                given = ((places[name], value) for name, value in values if not stop())
                _write_pieces(file, given, threads)
                os.fsync(file)  # else errors of the disk come after the directory has its name
            stopped = stop()
            if number == 0 and len(files) > 1:
                writer.write_index(directory, files, dtype)
        except OSError as error:
            problem = writer.failure(directory, error)
            collections.deque(values, maxlen=0)
    writer.raise_together(problem)
    if distributed.any_process(stopped):
        stopping.check()
        raise stopping.StopRequestedError("the weights are given up, here or in another process")


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[int]:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _write_at(file: int, content: memoryview, place: int) -> None:
    while content:
        size = os.pwrite(file, content, place)
        content = content[size:]
        place += size


def _write_pieces(
    file: int,
    values: Iterable[tuple[int, np.ndarray]],
    threads: concurrent.futures.ThreadPoolExecutor,
) -> None:
    """Writes tensors to their places in a file, and raises the first error."""
    pieces: collections.deque[concurrent.futures.Future[None]] = collections.deque()
    try:
        for place, value in values:
            content = value.view(np.uint8).data.cast("B")
            pieces.append(threads.submit(_write_at, file, content, place))
            # Tensors that wait for a slow disk would otherwise fill the memory.
            if len(pieces) > 2 * _THREADS:
                pieces.popleft().result()
    finally:
        # The file closes only after the last thread has written to it.
        concurrent.futures.wait(pieces)
    for piece in pieces:
        piece.result()


def _blocks(decoder: Decoder, processes: int) -> list[_LayerBlock]:
    kinds = names.entries(decoder.config)
    inside = tuple(kind for kind in kinds if kind.per_layer)
    before = tuple(kind for kind in kinds if kind.paths == (("embed",),))
    after = tuple(kind for kind in kinds if not kind.per_layer and kind not in before)
    count = decoder.config.num_layers
    layers = [
        _LayerBlock(
            inside, tuple(i if i < count else -1 for i in range(first, first + processes)), 0
        )
        for first in range(0, count, processes)
    ]
    none = (0,) * processes
    return [_LayerBlock(before, none, 0), *layers, _LayerBlock(after, none, processes - 1)]


def _names(block: _LayerBlock, process: int, decoder: Decoder) -> tuple[str, ...]:
    layer = block.layers[process]
    if not block.kinds[0].per_layer:
        return tuple(kind.name for kind in block.kinds) if process == block.owner else ()
    if layer < 0:
        return ()
    return tuple(names.hf_names(kind, decoder.config)[layer] for kind in block.kinds)


def _begin(params: Params, decoder: Decoder, dtype: str) -> Iterator[_SentBlock]:
    processes = jax.process_count()
    mesh = _mesh(decoder.sharding.mesh, processes)
    for block in _blocks(decoder, processes):
        parts = [[names.stored(params, path) for path in kind.paths] for kind in block.kinds]
        shapes = _shapes(block.kinds, decoder)
        run = _extraction(block.kinds, dtype, mesh, shapes, decoder.lora)
        # A process without a layer computes another one's again, and sends nothing.
        layers = np.asarray([max(layer, 0) for layer in block.layers], np.int32)
        values, checksums = run(parts, layers)
        own = _names(block, jax.process_index(), decoder)
        yield _SentBlock(own, values, checksums)


def _shapes(kinds: Sequence[names.TensorKind], decoder: Decoder) -> tuple[tuple[int, ...], ...]:
    shapes = names.hf_shapes(decoder.config, decoder.shapes)
    return tuple(shapes[names.hf_names(kind, decoder.config)[0]] for kind in kinds)


def _mesh(mesh: Mesh | AbstractMesh, processes: int) -> Mesh:
    """Returns the devices as `process x device`; compiled programs need their order as it is."""
    assert isinstance(mesh, Mesh), "a plan has no tensors"
    devices = mesh.devices.reshape(processes, -1)
    if any(len({device.process_index for device in row}) > 1 for row in devices):
        # The mesh mixes the processes, so every device gets every tensor.
        return Mesh(mesh.devices.reshape(1, 1, -1), ("process", "device", "all"))
    return Mesh(devices, ("process", "device"))


@functools.lru_cache
def _extraction(
    kinds: tuple[names.TensorKind, ...],
    dtype: str,
    mesh: Mesh,
    shapes: tuple[tuple[int, ...], ...],
    lora: Lora | None,
) -> Callable[[list[list[Any]], np.ndarray], tuple[list[jax.Array], jax.Array]]:
    """Returns the compiled `(parameters, layers) -> (tensors, checksums)` of a block.

    Tensors are `[processes, ...]` and checksums `[kinds, processes]`.
    """
    bits = jnp.uint32 if jnp.dtype(dtype).itemsize == 4 else jnp.uint16

    def run(parts: list[list[Any]], layers: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        values = []
        checksums = []
        for kind, own in zip(kinds, parts, strict=True):
            # Outside the layers there is one tensor for all processes.
            taken = jax.tree.map(lambda x, k=kind: x[layers] if k.per_layer else x[None], own)
            one = functools.partial(names.to_hf, kind)
            value = jax.vmap(
                lambda each, one=one: one([names.value(part, lora, dtype) for part in each])
            )(taken)
            value = jnp.broadcast_to(value, (len(layers), *value.shape[1:]))
            numbers = jax.lax.bitcast_convert_type(value, bits).astype(jnp.uint32)
            axes = tuple(range(1, numbers.ndim))
            checksums.append(jnp.sum(numbers * (numbers | 1), axis=axes, dtype=jnp.uint32))
            values.append(value)
        return values, jnp.stack(checksums)

    places = [NamedSharding(mesh, _spec(shape, mesh.shape["device"])) for shape in shapes]
    return jax.jit(run, out_shardings=(places, NamedSharding(mesh, PartitionSpec())))


def _spec(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """Returns the split of a tensor of each process over the devices of the process."""
    for dim, size in enumerate(shape):
        if size % devices == 0:
            return PartitionSpec("process", *(None,) * dim, "device")
    return PartitionSpec("process")


def _on_host(value: jax.Array) -> np.ndarray:
    """Returns this process's tensor of `[processes, ...]`."""
    shards = {str(shard.index): shard for shard in value.addressable_shards}
    if len(shards) == 1:
        (shard,) = shards.values()
        return _row(np.asarray(shard.data))
    whole = np.empty(value.shape[1:], value.dtype)
    for shard in shards.values():
        whole[shard.index[1:]] = _row(np.asarray(shard.data))
    return whole


def _row(values: np.ndarray) -> np.ndarray:
    # Where the mesh mixes the processes, each has the rows of all.
    return values[jax.process_index() if len(values) > 1 else 0]
