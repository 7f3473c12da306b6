"""Every run: `atlas-train --config NAME [--config.key=value …]`, or `python -m atlas_jax.train`.

Flags to a frozen config, the config checked, JAX started, the recipe run. NAME is a shipped recipe
(`teacher_sft`), a `FILE.py` or a `PACKAGE.MODULE`; an argument after it swaps parts:
`--config teacher_sft:model=qwen3_8b`.

The exit code is 0 for a finished run, 75 for one that a signal stopped and that the same command
continues, 1 for an error, 2 for words that it does not take.
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

from atlas_jax import cli, masking, preflight
from atlas_jax import config as config_lib
from atlas_jax.types import Address

_CONFIG = cli.define_config()
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "This process, from 0.")


def main(argv: list[str]) -> None:
    """Runs the recipe of the config."""
    cli.no_more_words(argv[1:])
    config = config_lib.freeze(cli.needed(_CONFIG))
    address = Address(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    code = 0 if run(config, address) else stopping.EXIT_CODE
    stopping.end_soon(code)
    sys.exit(code)


def run(config: config_lib.TrainConfig, address: Address | None = None) -> bool:
    """Checks the config, starts JAX and trains.

    Args:
        config: the run.
        address: where the processes of the run meet; None takes it from the environment.

    Returns:
        Whether the run came to its end; false if a signal stopped it before.

    Raises:
        ValueError: for options, models and data that cannot be used.
        OSError: for files that cannot be read or written.
    """
    masking.mask_logs()
    preflight.check(config)
    # What imports JAX comes after the checks, which need none and take little time.
    from atlas_jax import devices, distributed
    from atlas_jax.recipes import grpo, sft

    recipes: dict[str, Callable[[Any], bool]] = {"sft": sft.run, "grpo": grpo.run}
    with distributed.joined(config.hosts, address or Address()):
        devices.check()
        return recipes[config.algorithm](config)


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    app.run(cli.guarded(main), flags_parser=cli.parse)
