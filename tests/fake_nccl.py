"""A group of NCCL without GPUs: bytes go through queues of this process, and calls are recorded.

It hangs where NCCL would: a rank that joins waits for all others, one that receives for the sender,
and only `abort` ends that. What a receiver unpacks are packs as vLLM's own receiver expects them
(`packed_nccl_broadcast_consumer` of 0.32); one of another size would hang NCCL, and is an error.
"""

from __future__ import annotations

import base64
import math
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes  # noqa: F401  (by which NumPy knows bfloat16)
import numpy as np

_ID_BYTES = 128


class AbortedError(RuntimeError):
    """The sender has left the group."""


class Receiver:
    """A worker of a server."""

    def __init__(self, info: dict[str, Any]) -> None:
        self._limit = info["packed_buffer_size_bytes"]
        self.packs: queue.Queue[bytes | None] = queue.Queue()

    def receive(self, info: dict[str, Any]) -> dict[str, np.ndarray]:
        """Returns the tensors of an update."""
        tensors, meta = {}, list(zip(*(info[k] for k in ("names", "dtype_names", "shapes")),
                                     strict=True))  # fmt: skip
        for pack in self._split(meta):
            content = self.packs.get()
            if content is None:
                raise AbortedError("NCCL error: remote process exited")
            sizes = [np.dtype(dtype).itemsize * math.prod(shape) for _, dtype, shape in pack]
            assert len(content) == sum(sizes), "a receiver of another size hangs"
            ends = np.cumsum([0, *sizes])
            for (name, dtype, shape), start, end in zip(pack, ends, ends[1:], strict=False):
                value = np.frombuffer(content[start:end], dtype).reshape(shape)
                tensors[name] = value.astype(np.float32)
        return tensors

    def _split(self, meta: list[Any]) -> Iterator[list[Any]]:
        pack, size = [], 0
        for name, dtype, shape in meta:
            pack.append((name, dtype, shape))
            size += np.dtype(dtype).itemsize * math.prod(shape)
            if size > self._limit:
                yield pack
                pack, size = [], 0
        if pack:
            yield pack


class Wire:
    """All groups of a test, one after another, and what their sender did.

    Attributes:
        calls: name and facts of each call of a sender.
        packs: the bytes of each broadcast.
        hangs: name of a call that never returns, unless the group is given up.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.packs: list[bytes] = []
        self.hangs = ""
        self.changed = threading.Condition()
        self.ranks: dict[bytes, dict[int, Receiver]] = {}

    def join(self, info: dict[str, Any], rank: int) -> Callable[[], Receiver]:
        """Returns a function that joins a group as a worker and waits for its other ranks."""
        assert info["packed"] is True
        unique_id = base64.b64decode(info["nccl_unique_id_b64"], validate=True)
        assert len(unique_id) == _ID_BYTES
        assert 0 < rank < info["world_size"]
        receiver = Receiver(info)

        def wait() -> Receiver:
            with self.changed:
                ranks = self.ranks.setdefault(unique_id, {})
                assert rank not in ranks, "two workers have one rank"
                ranks[rank] = receiver
                self.changed.notify_all()
                self.changed.wait_for(lambda: len(ranks) == info["world_size"] - 1, 60)
            return receiver

        return wait

    def communicator(self) -> Communicator:
        """Returns the sender of a group that is not joined yet."""
        return Communicator(self)


class Communicator:
    """The sender."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._id = b""
        self._given_up = False

    def version(self) -> str:
        """Returns a version that no library has."""
        return "2.99.1"

    def unique_id(self) -> bytes:
        """Returns another name for each group."""
        return np.random.default_rng(len(self._wire.calls)).bytes(_ID_BYTES)

    def connect(self, unique_id: bytes, world_size: int) -> None:
        """Joins the group and waits for its other ranks."""
        self._call("connect", world_size)
        self._id = unique_id
        with self._wire.changed:
            ranks = self._wire.ranks.setdefault(unique_id, {})
            self._wire.changed.wait_for(lambda: len(ranks) == world_size - 1 or self._given_up)
        if self._given_up:
            raise RuntimeError("aborted")

    def broadcast(self, buffer: Any) -> None:
        """Hands bytes to all receivers."""
        assert buffer.dtype == np.uint8
        assert len(buffer.devices()) == 1
        self._call("broadcast", buffer.nbytes)
        content = np.asarray(buffer).tobytes()
        self._wire.packs.append(content)
        for receiver in self._wire.ranks[self._id].values():
            receiver.packs.put(content)

    def abort(self) -> None:
        """Ends what this rank or a receiver waits for."""
        if self._given_up:
            return
        self._wire.calls.append(("abort",))
        with self._wire.changed:
            self._given_up = True
            self._wire.changed.notify_all()
        for receiver in self._wire.ranks.get(self._id, {}).values():
            receiver.packs.put(None)

    def _call(self, *facts: Any) -> None:
        self._wire.calls.append(facts)
        if self._wire.hangs == facts[0]:
            with self._wire.changed:
                self._wire.changed.wait_for(lambda: self._given_up)
            raise RuntimeError("aborted")
