"""Communication between the processes of a run; a single process talks to itself."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_TEXT_BYTES = 2048
"""Largest number of bytes of a text that processes exchange."""

arrivals: list[Callable[[str], None]] = []
"""Functions that are told of each point that all processes reach; a single process has none.

It is a module global because JAX's distributed runtime is one per process too."""


def arrive(place: str = "") -> None:
    """Records that this process has reached a point that all processes reach; see `watch`."""
    for tell in arrivals:
        tell(place)


def is_main() -> bool:
    """Returns whether this process writes the files that only one process writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier of that name."""
    arrive(name)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def vote(flag: bool) -> Callable[[], bool]:
    """Starts a vote, and returns a function that waits for whether `flag` is true in any process.

    Devices do not pause for it: the vote is computed after the work that is already queued.
    """
    arrive()
    if jax.process_count() == 1:
        return lambda: flag
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), "all"), PartitionSpec("all"))
    flags = np.full(jax.local_device_count(), flag)
    found = _any(jax.make_array_from_process_local_data(sharding, flags))
    return lambda: bool(found)


_any = jax.jit(jnp.any)


def any_process(flag: bool) -> bool:
    """Returns whether `flag` is true in any process; every process must call it."""
    return vote(flag)()


def gather(numbers: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, `[processes, ...]`; they share one shape and dtype."""
    arrive()
    if jax.process_count() == 1:
        return numbers[None]
    # As bytes, because JAX would cast float64.
    content = np.frombuffer(np.ascontiguousarray(numbers).tobytes(), np.uint8)
    found = multihost_utils.process_allgather(content)
    return found.view(numbers.dtype).reshape(-1, *numbers.shape)


def gather_rows(rows: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Returns the rows of all processes, in order of the processes; every process must call it.

    Args:
        rows: the rows of this process, `[counts[process index], ...]`.
        counts: the number of rows of each process, which may be 0.
    """
    padded = np.zeros((max(counts), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    parts = zip(gather(padded), counts, strict=True)
    return np.concatenate([part[:count] for part, count in parts])


def max_over_processes(number: int) -> int:
    """Returns the highest `number` of all processes; every process must call it."""
    return int(gather(np.asarray(number)).max())


def from_main(values: np.ndarray) -> np.ndarray:
    """Returns process 0's array; every process must call it, with an array of the same shape."""
    return gather(values)[0]


def gather_texts(text: str) -> list[str]:
    """Returns the text of each process, cut to `_TEXT_BYTES`.

    Every process must call it.
    """
    # A collective needs the same shape in every process, so texts are padded.
    content = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
    content[: encoded.size] = encoded
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in gather(content)]


@contextlib.contextmanager
def together(*kinds: type[Exception]) -> Iterator[None]:
    """Raises an error of the block in one process as an error of the same kind in all.

    Every process must enter it, since the others would wait for one that has left. If processes
    have errors of different kinds, all raise the first of `kinds` that occurs.
    """
    problem: Exception | None = None
    try:
        yield
    except kinds as error:
        problem = error
    has = gather(np.asarray([isinstance(problem, kind) for kind in kinds]))  # [processes, kinds]
    for kind, failed in zip(kinds, has.T, strict=True):
        if not failed.any():
            continue
        if isinstance(problem, kind):
            raise problem
        others = ", ".join(map(str, np.flatnonzero(failed)))
        raise kind(f"process {others} cannot go on; its log says why")


def check_all(good: bool, problem: str) -> None:
    """Checks that `good` is true in every process.

    Raises:
        ValueError: in every process, with the numbers of the processes in which it is false.
    """
    bad = np.flatnonzero(~gather(np.asarray(good)))
    if bad.size:
        raise ValueError(f"process {', '.join(map(str, bad))} of {jax.process_count()}: {problem}")


def check_same(text: str, problem: str) -> None:
    """Checks that every process has the same `text` as process 0.

    Raises:
        ValueError: in every process, with the numbers of the processes that differ.
    """
    # The texts may be longer than what processes exchange, so their digests are compared.
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    check_all(bool((gather(digest)[0] == digest).all()), problem)
