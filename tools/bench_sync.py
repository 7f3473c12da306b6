"""Seconds from an update to servers that answer with its weights, one JSON line.

python tools/bench_sync.py --model DIR --server http://127.0.0.1:8765 --times 5
"""

from __future__ import annotations

import dataclasses
import json
import tempfile

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


def main() -> None:
    """Pushes the same model a few times; the first push also compiles."""
    parser = cli.ToolParser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--server", required=True)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    base = GRPOConfig()
    rollout = dataclasses.replace(
        base.rollout, protocol="direct", backend="vllm", teacher_servers=options.server
    )
    with tempfile.TemporaryDirectory() as directory:
        config = dataclasses.replace(base, output_dir=directory, rollout=rollout)
        model = open_frozen(Compute.of(config), options.model)
        params = hf.load(model.source, model.decoder)
        logprobs_fn = grpo.make_logprobs_fn(model.decoder, config, 1)
        backend = vllm_backend.make_vllm_backend(config, model, None, logprobs_fn)
        found = []
        for version in range(options.times):
            backend.publish(params, version)
            found.append(means(backend.metrics()))
        backend.close()
    later = found[1:] or found
    result = {name: float(np.median([f[name] for f in later])) for name in found[0]}
    print(json.dumps({"devices": jax.device_count(), "first": found[0], "median": result}))


if __name__ == "__main__":
    cli.tool(main)
