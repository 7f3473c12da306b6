"""Synchronization of the servers' weights over NCCL, without files.

This process is rank 0 of a group with all workers of all servers. The group is made from a unique
id that this process hands to vLLM's own weight transfer (0.32): `/init_weight_transfer_engine` with
`nccl_unique_id_b64`. A version goes out layer by layer, packed into few messages of bytes, as
vLLM's receiver (`packed_nccl_broadcast_consumer`) unpacks them: tensors follow one another in the
order of the names, and a message ends with the tensor that takes it above the size of a pack.

Everything around the transfer is as with files: pause, cache, label, checksums, probe. If the
transfer fails or misses the deadline, the group is given up, and the weights go through files from
there on.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from absl import logging

from atlas_jax.checkpoint import outgoing
from atlas_jax.llm_client import ServerError
from atlas_jax.rollout.push import PushError
from atlas_jax.rollout.servers import UNEXPECTED, Server
from atlas_jax.rollout.weights import DiskSync, Prepared, Source, SyncParts

PACK_BYTES = 256 << 20
"""Size of a pack in bytes, which the tensor that ends it may exceed."""

_NUM_BUFFERS = 2  # packs that a server's worker holds at one time


@runtime_checkable
class Communicator(Protocol):
    """A group of processes of which this one is rank 0; `libnccl.LibNccl` is the real one."""

    def version(self) -> str:
        """Returns the version of the library."""

    def unique_id(self) -> bytes:
        """Returns the name of a new group, 128 bytes."""

    def connect(self, unique_id: bytes, world_size: int) -> None:
        """Joins the group, and adds one number together with its other ranks."""

    def broadcast(self, buffer: jax.Array) -> None:
        """Sends bytes on one device to the other ranks; returns when they have left."""

    def abort(self) -> None:
        """Leaves the group, whatever another thread waits for in it."""


class NcclSync(DiskSync):
    """Weight synchronization over NCCL, in a run of one process."""

    def __init__(self, parts: SyncParts, make: Callable[[], Communicator]) -> None:
        """Creates the synchronization; `make` makes a communicator for each group."""
        super().__init__(parts)
        self._make: Callable[[], Communicator] | None = make
        """None once weights go through files."""
        self._group: _TransferGroup | None = None
        self._loader: _NcclLoader | None = None

    def _prepare(self, source: Source, label: str, attempt: int) -> Prepared:
        """Makes ready to send, or writes a version where NCCL has failed.

        A server that is down may have been replaced, so it gets its weights from a file.
        """
        servers = self._pool.servers
        if attempt and self._loader is not None and self._loader.problem:
            self._give_up(self._loader.problem)
        if attempt or self._make is None or not all(server.up for server in servers):
            return super()._prepare(source, label, attempt)
        if self._group is None or self._group.servers != servers:
            try:
                self._connect(self._make)
            except (RuntimeError, OSError, ServerError, *UNEXPECTED) as error:
                self._give_up(f"{type(error).__name__}: {error}")
                return super()._prepare(source, label, attempt)
        assert self._group is not None
        self._pool.call(self._pool.settled.clear)
        values = source()
        assert isinstance(values, outgoing.Outgoing), "the tensors of a model"
        self._loader = _NcclLoader(self._group, values, self._options.dtype)
        return Prepared(self._loader, "", lambda: values.checksums)

    def _connect(self, make: Callable[[], Communicator]) -> None:
        if self._group is not None:
            self._group.communicator.abort()
            self._group = None
        secs = self._pool.options.control_timeout_secs
        self._group = self._pool.run(_TransferGroup.made(make(), self._pool.servers, secs))

    def _give_up(self, why: str) -> None:
        logging.warning("weights go through files from here on, not over NCCL: %s", why)
        if self._group is not None:
            self._group.communicator.abort()
        self._group = None
        self._make = None

    def close(self) -> None:
        """Leaves the group, and removes files as `DiskSync` does."""
        if self._group is not None:
            self._group.communicator.abort()
        super().close()


class _TransferGroup:
    """This process and the workers of servers, joined."""

    def __init__(self, communicator: Communicator, servers: Sequence[Server]) -> None:
        self.communicator = communicator
        self.servers = list(servers)

    @classmethod
    async def made(
        cls, communicator: Communicator, servers: Sequence[Server], secs: float
    ) -> _TransferGroup:
        """Joins the workers of all servers, in the pool's thread.

        Raises:
            NcclError: if NCCL fails.
            TimeoutError: if not all have joined after `secs`.
            ServerError: if a server refuses.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(communicator.abort)
            async with asyncio.timeout(secs):
                await cls._join(communicator, servers)
            stack.pop_all()
        return cls(communicator, servers)

    @staticmethod
    async def _join(communicator: Communicator, servers: Sequence[Server]) -> None:
        sizes = [
            int((await server.control.get("/get_world_size"))["world_size"]) for server in servers
        ]
        how = {"method": "nccl_version"}
        for server in servers:
            (found, *_) = (await server.control.post("/collective_rpc", how))["results"]
            logging.info("NCCL %s here, %s at %s", communicator.version(), found, server.url)
        unique_id = communicator.unique_id()
        world_size = 1 + sum(sizes)
        # No rank returns before all have joined, so all are asked at the same time.
        joining = in_thread(lambda: communicator.connect(unique_id, world_size))
        offsets = [1 + sum(sizes[:i]) for i in range(len(servers))]
        asked = [
            server.control.post(
                "/init_weight_transfer_engine",
                {"init_info": _init_info(unique_id, offset, world_size)},
            )
            for server, offset in zip(servers, offsets, strict=True)
        ]
        await _all(joining, *asked)


def _init_info(unique_id: bytes, rank_offset: int, world_size: int) -> dict[str, Any]:
    return {
        "nccl_unique_id_b64": base64.b64encode(unique_id).decode(),
        "rank_offset": rank_offset,
        "world_size": world_size,
        "packed": True,
        "packed_buffer_size_bytes": PACK_BYTES,
        "packed_num_buffers": _NUM_BUFFERS,
    }


class _NcclLoader:
    """One version on its way to all servers of a group."""

    def __init__(self, group: _TransferGroup, values: outgoing.Outgoing, dtype: str) -> None:
        self.values = values
        self.problem = ""
        """Reason for which the transfer has failed; "" if it has not."""
        self._group = group
        tensors = values.order
        self._update = {
            "names": [tensor.name for tensor in tensors],
            "dtype_names": [dtype] * len(tensors),
            "shapes": [list(tensor.shape) for tensor in tensors],
        }
        self._waiting = 0
        self._sent: asyncio.Future[None] | None = None

    def begin(self, servers: Sequence[Server]) -> None:
        """Refuses a group of which not all are paused."""
        if set(servers) != set(self._group.servers):
            raise OSError("not every server of the group is paused")
        self._waiting = len(servers)
        self._sent = asyncio.get_running_loop().create_future()

    async def load(self, server: Server) -> None:
        """Has a server receive the tensors; the last one that is ready starts the transfer."""
        control = server.control
        sent = self._sent
        assert sent is not None
        with contextlib.ExitStack() as stack:
            stack.push(functools.partial(self._note, server, sent))
            await control.post("/start_weight_update", {})
            self._waiting -= 1
            if not self._waiting:
                sending = in_thread(self._send)
                sending.add_done_callback(functools.partial(_pass_on, sent))
            # vLLM answers when all has arrived, which is never if another server is not ready.
            received = control.post("/update_weights", {"update_info": self._update})
            await _all(received, asyncio.shield(sent))
        await control.post("/finish_weight_update", {})

    async def obstacle(self, server: Server) -> str:
        """Returns that a server alone cannot have what went to the group."""
        return "its weights do not come in files"

    def _note(self, server: Server, sent: asyncio.Future[None], *raised: Any) -> None:
        """Ends the transfer if a server has failed; an exit of a context, which goes on raising."""
        (_, error, _) = raised
        if error is None:
            return
        self.problem = self.problem or f"{server.url}: {str(error) or 'no answer in time'}"
        # All others wait for this server in the same transfer.
        self._group.communicator.abort()
        if not sent.done():
            sent.set_exception(PushError(f"the transfer has failed: {self.problem}"))
            sent.exception()  # it counts as seen, also where nobody else waits

    def _send(self) -> None:
        for pack in packs(self.values.on_device(jax.local_devices()[0]), PACK_BYTES):
            self._group.communicator.broadcast(pack)


def _pass_on(sent: asyncio.Future[None], sending: asyncio.Future[None]) -> None:
    error = sending.exception()
    if sent.done():
        return
    if error:
        sent.set_exception(PushError(f"the weights cannot be sent: {error}"))
        sent.exception()
    else:
        sent.set_result(None)


def packs(tensors: Iterable[tuple[str, jax.Array]], limit: int) -> Iterator[jax.Array]:
    """Yields the bytes of the tensors, one after another, in packs that end above `limit` bytes."""
    waiting: list[jax.Array] = []
    for _, tensor in tensors:
        waiting.append(tensor)
        if sum(one.nbytes for one in waiting) > limit:
            yield _packed(waiting)
            waiting = []
    if waiting:
        yield _packed(waiting)


@jax.jit
def _packed(tensors: Sequence[jax.Array]) -> jax.Array:
    parts = [jax.lax.bitcast_convert_type(tensor, jnp.uint8).ravel() for tensor in tensors]
    return jnp.concatenate(parts)


def in_thread(do: Callable[[], None]) -> asyncio.Future[None]:
    """Calls a function in a thread that ends with the process, even where the function hangs."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def settle(error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def run() -> None:
        problem: Exception | None = None
        try:
            do()
        except (RuntimeError, ValueError, OSError) as error:
            problem = error
        try:
            loop.call_soon_threadsafe(settle, problem)
        except RuntimeError:  # the run has ended meanwhile
            logging.warning("a transfer of weights ended after its run")

    threading.Thread(target=run, daemon=True, name="nccl").start()
    return future


async def _all(*work: Any) -> None:
    """Waits for all, and gives up the others with the first that fails."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
