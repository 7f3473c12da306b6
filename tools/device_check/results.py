"""Results of the device check: lines of JSON, memory, times and kernels of a profile."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

GIB = 2**30
OUT = pathlib.Path(os.environ.get("OUT", "outputs/device_check"))
FAILURES = (jax.errors.JaxRuntimeError, RuntimeError, ValueError, TypeError, AttributeError)
"""What a kernel or an interface that this device or this JAX does not have raises."""
_START = time.perf_counter()


def say(case: str, **values: Any) -> None:
    """Prints a result, and appends it to `results.jsonl`."""
    line = json.dumps({"case": case, "t": round(time.perf_counter() - _START, 1)} | values)
    print(line, flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "results.jsonl").open("a") as file:
        file.write(line + "\n")


def memory() -> dict[str, float]:
    """Returns GiB of the first device: the highest so far, now, and the limit of JAX's pool."""
    stats = jax.devices()[0].memory_stats() or {}
    names = {"peak_gib": "peak_bytes_in_use", "in_use_gib": "bytes_in_use",
             "limit_gib": "bytes_limit"}  # fmt: skip
    return {name: round(stats.get(key, 0) / GIB, 3) for name, key in names.items()}


def timed(run_once: Callable[[], Any], steps: int) -> list[float]:
    """Returns the seconds of each of some runs."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        run_once()
        times.append(time.perf_counter() - start)
    return times


def seconds(function: Callable[..., Any], *arguments: Any, times: int = 20) -> float:
    """Returns the mean time of a compiled function, started again before it has ended."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    out = None
    for _ in range(times):
        out = function(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / times


def relative_error(found: Any, exact: Any) -> float:
    """Returns the norm of the difference over the norm of what is exact."""
    a = np.asarray(found, np.float32)
    b = np.asarray(exact, np.float32)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def profile(name: str, run_once: Callable[[], Any]) -> None:
    """Writes the device time of each kernel over one run to `kernels_NAME.txt`; GPUs only."""
    if jax.devices()[0].platform != "gpu":
        return
    spent: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run_once()
        found = list(pathlib.Path(directory).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(found[0]))
        lines = [line for plane in data.planes if "GPU" in plane.name for line in plane.lines]
        for event in (e for line in lines if line.name.startswith("Stream") for e in line.events):
            spent[event.name] += event.duration_ns / 1e6
            count[event.name] += 1
    rows = sorted(spent.items(), key=lambda x: -x[1])
    table = [f"{ms:10.3f} ms {count[k]:6d} x {k[:120]}" for k, ms in rows[:60]]
    total = f"{sum(spent.values()):.1f} ms in {sum(count.values())} kernels"
    (OUT / f"kernels_{name}.txt").write_text("\n".join([total, *table, ""]))
    print("\n".join([f"kernels of {name}: {total}", *table[:14]]), flush=True)
