"""Every run: `python -m atlas_jax.train --config configs/run/NAME.py [--config.key=value …]`.

Flags to a frozen config, the config checked, JAX started, the recipe run. A config file takes an
argument that swaps parts: `--config configs/run/teacher_sft.py:model=qwen3_8b`.

The exit code is 0 for a finished run, 75 for one that a signal stopped and that the same command
continues, 1 for an error.
"""

from __future__ import annotations

from atlas_jax import stopping, streams

if __name__ == "__main__":  # before the imports that take seconds
    streams.survive()
    stopping.listen()

import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from atlas_jax import cli
from atlas_jax import config as config_lib
from atlas_jax.data import snapshot

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file of the run.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "This process, from 0.")


def main(argv: list[str]) -> None:
    """Runs the recipe of the config."""
    if _CONFIG.value is None or argv[1:]:
        raise ValueError(f"--config FILE is needed, and nothing else: {argv[1:]}")
    code = 0 if run(config_lib.freeze(_CONFIG.value)) else stopping.EXIT_CODE
    stopping.end_soon(code)
    sys.exit(code)


def run(config: config_lib.TrainConfig) -> bool:
    """Checks the config, starts JAX and trains; returns false if a signal stopped the run."""
    config_lib.validate(config)
    config_lib.check_environment(config)
    snapshot.check(config.data, config.output_dir)
    from atlas_jax import distributed
    from atlas_jax.recipes import grpo, sft

    recipes: dict[str, Callable[[Any], bool]] = {"sft": sft.run, "grpo": grpo.run}
    where = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    with distributed.joined(config.hosts, distributed.Address(*where)):
        return recipes[config.algorithm](config)


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    app.run(cli.guarded(main), flags_parser=cli.parse)
