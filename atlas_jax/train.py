"""Every run: `atlas-train --config NAME [--config.key=value …]`, or `python -m atlas_jax.train`.

Flags to a frozen config, the config checked, JAX started, the recipe run. NAME is a shipped recipe
(`teacher_sft`), a `FILE.py` or a `PACKAGE.MODULE`; an argument after it swaps parts:
`--config teacher_sft:model=qwen3_8b`.

From Python, `run` takes a config and what no config file can hold.

`atlas-train --replay OUTPUT_DIR/rollouts/step_000123` computes a step of a GRPO run once more, from
what is stored there, and says where it differs from the log; it exits with 1 if it does.

In a terminal the log is short and a status line says how far the run is; `--quiet` shows warnings,
errors and the result alone, and `--json` writes metrics and result to standard output, a line of
JSON each.

The exit code is 0 for a finished run, 75 for one that a signal stopped and that the same command
continues, 1 for an error, 2 for words that it does not take.
"""

from __future__ import annotations

from atlas_jax import stopping, streams

if __name__ == "__main__":  # before the imports that take seconds
    streams.survive()
    stopping.listen()

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from atlas_jax import cli, masking, preflight, terminal
from atlas_jax import config as config_lib
from atlas_jax.types import FROM_CALLER, NOTHING_GIVEN, Address, Given


def main() -> None:
    """Runs the recipe that the command line names, and ends the process."""
    # Defined here, so that a program that imports `run` has its own flags and none of these.
    config_flag = cli.define_config()
    coordinator = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.")
    num_processes = flags.DEFINE_integer("num_processes", 0, "Processes of the run.")
    process_id = flags.DEFINE_integer("process_id", -1, "This process, from 0.")
    replay = flags.DEFINE_string("replay", "", "OUTPUT_DIR/rollouts/step_NUMBER to compute again.")
    quiet = flags.DEFINE_bool("quiet", False, "Show warnings, errors and the result alone.")
    as_json = flags.DEFINE_bool("json", False, "Write metrics and result to stdout as JSON lines.")

    def command(argv: list[str]) -> None:
        cli.no_more_words(argv[1:])
        address = Address(coordinator.value, num_processes.value, process_id.value)
        if replay.value:
            sys.exit(_replay(replay.value, config_flag.value, address))
        config = config_lib.freeze(cli.needed(config_flag))
        if quiet.value:
            config = dataclasses.replace(config, terminal="quiet")
        if as_json.value and "stdout" not in config.report_to:
            config = dataclasses.replace(config, report_to=(*config.report_to, "stdout"))
        code = 0 if _run(config, NOTHING_GIVEN, address) else stopping.EXIT_CODE
        # Threads that hang in a request must not keep the process and its devices.
        stopping.end_soon(code)
        sys.exit(code)

    app.run(cli.guarded(command), flags_parser=cli.parse)


def run(
    config: config_lib.TrainConfig | ConfigDict,
    *,
    rewards: Sequence[Any] = (),
    rows: Iterable[Any] | None = None,
    eval_rows: Iterable[Any] | None = None,
    address: Address | None = None,
) -> bool:
    """Checks the config, starts JAX and trains; the same call again continues the run.

    Example:
        from atlas_jax import config, train

        options = config.defaults(config.SFTConfig)
        options.model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
        options.output_dir = "outputs/greeter"
        train.run(options, rows=[{"prompt": "Hello!", "completion": "Good morning."}])

    Args:
        config: the run, as a config file makes it or frozen.
        rewards: functions that score the samples of GRPO, in place of those that `reward` names.
        rows: dicts to train on, in place of the files or the database of `data`.
        eval_rows: dicts to evaluate on, in place of the files of `data.eval_path`.
        address: where the processes of the run meet; None takes it from the environment.

    Returns:
        Whether the run came to its end; false if a signal stopped it before.

    Raises:
        ValueError: for options, models and data that cannot be used.
        OSError: for files that cannot be read or written.
    """
    stopping.reset()  # a request of an earlier run in this process must not stop this one
    if isinstance(config, ConfigDict):
        config = config_lib.freeze(config)
    given = Given(
        rewards=tuple(rewards),
        rows=None if rows is None else tuple(rows),
        eval_rows=None if eval_rows is None else tuple(eval_rows),
    )
    return _run(_without_files(config, given), given, address or Address())


def _run(config: config_lib.TrainConfig, given: Given, address: Address) -> bool:
    """Checks the config, starts JAX and trains; see `run`."""
    # First, because errors of the checks may quote an address with a password.
    masking.mask_logs()
    with terminal.opened(config.terminal):
        return _trained(config, given, address)


def _trained(config: config_lib.TrainConfig, given: Given, address: Address) -> bool:
    """Checks the config, starts JAX and trains; then shows the end of the run."""
    preflight.check(config, given=given)
    # What imports JAX comes after the checks, which need none and take little time.
    from atlas_jax import devices, distributed, hosts
    from atlas_jax.recipes import gkd, grpo, sft

    recipes: dict[str, Callable[[Any, Given], bool]] = {
        "sft": sft.run,
        "grpo": grpo.run,
        "gkd": gkd.run,
    }
    with hosts.joined(config.hosts, address):
        devices.check()
        finished = recipes[config.algorithm](config, given)
        is_main = distributed.is_main()
    # After the other processes may go, since they need not wait for it.
    if finished and is_main:
        from atlas_jax.report import ending, page  # a run that is stopped has no time for them

        page.at_end(config.output_dir)
        ending.show(config.output_dir, "stdout" in config.report_to)
    return finished


def _replay(path: str, draft: ConfigDict | None, address: Address) -> int:
    """Computes a stored step once more, prints how it compares, and returns the exit code."""
    from atlas_jax import devices, hosts
    from atlas_jax.recipes import replay

    config = None if draft is None else config_lib.freeze(draft, config_lib.GRPOConfig)
    found = replay.find(path, config)
    with hosts.joined(found.config.hosts, address):
        devices.check()
        try:
            replayed = replay.run(found)
        except stopping.StopRequestedError:
            return stopping.EXIT_CODE
    sys.stdout.write(replay.report(replayed) + "\n")
    return 1 if replayed.different else 0


def _without_files(config: config_lib.TrainConfig, given: Given) -> config_lib.TrainConfig:
    """Returns the config without the files in whose place rows are given.

    Raises:
        ValueError: for rewards that nothing asks, no rows, or a format that only files have.
    """
    if given.rewards and not config.asks_questions:
        raise ValueError(
            f"rewards are given and algorithm={config.algorithm!r} has none; use a GRPO config, or "
            "leave them out"
        )
    for name in ("rows", "eval_rows"):
        if getattr(given, name) == ():
            raise ValueError(f"{name} are empty; give at least one dict, or leave them out")
    changes: dict[str, Any] = {}
    if given.rows is not None:
        changes |= {"dataset_path": FROM_CALLER, "db_url": "", "source": ""}
    if given.eval_rows is not None:
        changes["eval_path"] = FROM_CALLER
    if changes and config.data.format == "session":
        raise ValueError(
            "rows are given and data.format='session' is read from files; use data.format="
            "'teaching' or 'messages', or leave the rows out"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    main()
