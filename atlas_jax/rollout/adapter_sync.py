"""Synchronization of a LoRA adapter alone, through files that the servers read.

A server knows the adapter by a name, which requests give as their model. vLLM's own route
(`/v1/load_lora_adapter`, 0.32) gives it that name once. Later versions replace the tensors in the
workers, where requests in flight find them too. With `load_inplace` the route would keep that flag
for all requests, whose workers then read the adapter from the disk again at every step, each
request that of its own version.
"""

from __future__ import annotations

import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from atlas_jax import distributed
from atlas_jax.checkpoint import adapters, writer
from atlas_jax.llm_client import RefusedError, UnavailableError
from atlas_jax.rollout.capabilities import ADAPTER_NAME, LOAD_ADAPTER
from atlas_jax.rollout.push import PushError
from atlas_jax.rollout.servers import Server
from atlas_jax.rollout.weights import DiskSync, Source, SyncParts
from atlas_jax.types import Params


class AdapterSync(DiskSync):
    """Synchronization of an adapter; all processes must call it together."""

    def __init__(self, parts: SyncParts, config: Mapping[str, Any]) -> None:
        """Creates the synchronization; `config` is the content of `adapter_config.json`."""
        super().__init__(parts)
        self._shapes = adapters.shapes(parts.decoder)
        self._config = config
        self._numbers: dict[Server, int] = {}
        """Number of the adapter at each server that this process has told its name."""

    def _source(self, params: Params) -> Source:
        """Returns the tensors, which are few enough to be fetched at once."""
        values = _FetchedAdapter(adapters.tensors(params, self._decoder, self._options.dtype))
        return lambda: values

    def _beside(self, copy: Params) -> Source:
        return self._source(copy)

    def _begin(self, label: str) -> None:
        self._versions.remove_all()
        self._versions.begin(label, None)

    def _write(self, values: Iterable[tuple[str, np.ndarray]], directory: pathlib.Path) -> None:
        problem = ""
        if distributed.is_main():
            try:
                adapters.write(directory, dict(values), self._config)
            except OSError as error:
                problem = writer.failure(directory, error)
        writer.raise_together(problem)

    def _finish(self, label: str) -> None:
        self._versions.finish(label)

    def _loader_of(self, label: str) -> AdapterLoader:
        return AdapterLoader(self._versions.path(label), self._numbers)


class _FetchedAdapter:
    """Tensors in the host's memory."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        return iter(self._tensors.items())

    @property
    def checksums(self) -> np.ndarray:
        """The CRC-32 of each tensor."""
        return np.asarray([zlib.crc32(x.view(np.uint8).data) for x in self._tensors.values()])


class AdapterLoader:
    """A version of an adapter in files."""

    def __init__(self, directory: pathlib.Path, numbers: dict[Server, int]) -> None:
        """Loads nothing yet.

        Args:
            directory: the directory of the adapter.
            numbers: the number of the adapter at each server that knows its name, which is kept
                from version to version.
        """
        self._directory = directory
        self._numbers = numbers

    def begin(self, servers: Sequence[Server]) -> None:
        """Does nothing: each server is told by itself."""

    async def obstacle(self, server: Server) -> str:
        """Returns "": any server can have the adapter at any time."""
        return ""

    async def load(self, server: Server) -> None:
        """Has a server put the tensors into the place of the last ones."""
        cards = (await server.control.get("/v1/models"))["data"]
        named = any(card["id"] == ADAPTER_NAME for card in cards)
        if not named or server not in self._numbers:
            await self._introduce(server, named)
        where = {"number": self._numbers[server], "path": str(self._directory)}
        await _call(server, "load_adapter", where)

    async def _introduce(self, server: Server, named: bool) -> None:
        """Gives the adapter its name at a server that has begun anew, or knows it of another run.

        Raises:
            PushError: if the server cannot read the directory.
        """
        if named:
            # Requests of the run before may still be in flight; they keep that run's tensors.
            await _tell(server, "/v1/unload_lora_adapter", {"lora_name": ADAPTER_NAME})
        told = {"lora_name": ADAPTER_NAME, "lora_path": str(self._directory)}
        try:
            await _tell(server, LOAD_ADAPTER, told)
        except RefusedError as error:
            if error.status != 404:
                raise
            raise PushError(
                f"it finds no {self._directory}; let rollout.sync_dir be a directory that training "
                "and servers have under the same path"
            ) from None
        # The newest adapter has the largest number.
        self._numbers[server] = max(await _call(server, "adapter_numbers", {}))


async def _call(server: Server, method: str, arguments: Mapping[str, Any]) -> Any:
    """Calls a method of a server's workers, and returns what the first one returns."""
    how = {"method": method, "kwargs": arguments}
    return (await server.control.post("/collective_rpc", how))["results"][0]


async def _tell(server: Server, path: str, body: Mapping[str, Any]) -> None:
    """Posts to a route that answers with a sentence, which is no JSON."""
    try:
        await server.control.post(path, body)
    except UnavailableError as error:
        if error.status != 200:
            raise
