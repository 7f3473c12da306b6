"""Seconds from an update to servers that answer with its weights, one JSON line.

python tools/bench_sync.py --model DIR --server http://127.0.0.1:8765 --times 5

`delay_secs` is the time by which a push delays the next update. With --ahead the weights go to the
server beside the training, as with rollout.max_staleness=1; here the trainer only waits.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable

import _checkout  # noqa: F401  (comes first: see there)
import jax
import numpy as np

from atlas_jax import cli
from atlas_jax.checkpoint import hf
from atlas_jax.config import GRPOConfig
from atlas_jax.metrics import means
from atlas_jax.recipes import grpo, vllm_backend
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import open_frozen
from atlas_jax.types import Params


def main() -> None:
    """Pushes the same model a few times; the first push also compiles."""
    parser = cli.ToolParser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--server", required=True)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--ahead", action="store_true")
    parser.add_argument("--step-secs", type=float, default=0.0, help="time between two updates")
    options = parser.parse_args()
    base = GRPOConfig()
    rollout = dataclasses.replace(
        base.rollout,
        protocol="direct",
        backend="vllm",
        teacher_servers=options.server,
        max_staleness=int(options.ahead),
    )
    with tempfile.TemporaryDirectory() as directory:
        config = dataclasses.replace(base, output_dir=directory, rollout=rollout)
        model = open_frozen(Compute.of(config), options.model)
        params = hf.load(model.source, model.decoder)
        logprobs_fn = grpo.make_logprobs_fn(model.decoder, config, 1)
        backend = vllm_backend.make_vllm_backend(config, model, None, logprobs_fn)
        params = _update(params)
        found = []
        for version in range(options.times):
            params, alone = _timed(_update, params)
            begin = time.perf_counter()
            backend.publish(params, version)
            params, update = _timed(_update, params)
            delay = time.perf_counter() - begin - alone
            metrics = means(backend.metrics()) | {"delay_secs": delay, "update_secs": update}
            if len(metrics) > 2:  # the first one that runs beside training is not complete
                found.append(metrics)
            time.sleep(options.step_secs)
        backend.close()
    later = found[1:] or found
    result = {name: float(np.median([f[name] for f in later])) for name in found[0]}
    print(json.dumps({"devices": jax.device_count(), "first": found[0], "median": result}))


@functools.partial(jax.jit, donate_argnums=0)
def _update(params: Params) -> Params:
    """Stands for an update: it changes the parameters in their own buffers."""
    return jax.tree.map(lambda p: p * 1.001, params)


def _timed(do: Callable[[Params], Params], params: Params) -> tuple[Params, float]:
    begin = time.perf_counter()
    result = jax.block_until_ready(do(params))
    return result, time.perf_counter() - begin


if __name__ == "__main__":
    cli.tool(main)
