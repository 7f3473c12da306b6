"""Tells without accelerators whether a run fits, and how long its steps take.

    atlas-plan --config teacher_sft --target h100:8
    atlas-plan --config teacher_rcl --target h100:8,v5e:4x4 --json --config.max_seq_length=16384
    atlas-plan --table

Compiles the run's own programs for the target: `h100 h200 a100-80g a100-40g` with a number of GPUs,
`v5e v6e` (AxB) and `v5p` (AxBxC) with a topology. Several targets, separated by commas, give a
table; `--table` takes no config and compiles a fixed list of programs instead. Exit code: 0 if all
fit, 3 if one does not, 1 for an error. Needs the extra `plan`.
"""

from __future__ import annotations

import json
import os
import sys

from absl import app, flags

from atlas_jax import cli
from atlas_jax import config as config_lib

_CONFIG = cli.define_config()
_TARGETS = flags.DEFINE_list("target", [], "Devices to compile for, e.g. h100:8.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")
_TABLE = flags.DEFINE_bool("table", False, "Compile a fixed list of programs.")
_SEARCH = flags.DEFINE_bool("search", False, "Look for changes that make it fit.")
_SEGMENTS = flags.DEFINE_integer("segments", 1, "Texts in each packed row.", lower_bound=1)
_RATES = flags.DEFINE_string("rates", "", "File of measured rates, from tools/device_check.")
_MODEL_CONFIG = flags.DEFINE_string("model_config", "", "A config.json to read for the model.")


def main(argv: list[str]) -> None:
    """Prints the plan of each target and exits with the verdict."""
    cli.no_more_words(argv[1:])
    if _TABLE.value and (_TARGETS.value or _CONFIG.value is not None):
        raise cli.UsageError("--table has its own configs and targets; leave --config and --target")
    if not _TABLE.value and not _TARGETS.value:
        raise cli.UsageError("--target KIND:SIZE is needed, such as h100:8")
    config = None
    if not _TABLE.value:
        config = config_lib.freeze(cli.needed(_CONFIG))
        config_lib.validate(config)
    os.environ["JAX_PLATFORMS"] = "cpu"  # read when JAX is imported, which the next lines do
    if config is None:
        _table()
    else:
        _targets(config)


def _table() -> None:
    """Prints the table of `plan.cases`, each row when it is compiled."""
    from atlas_jax.plan import cases

    rows = []
    if not _JSON.value:
        print(cases.HEADER)
    for case, plan in cases.plans(_RATES.value):
        rows.append(cases.as_json(case, plan))
        if not _JSON.value:
            print(cases.line(case, plan), flush=True)
    if _JSON.value:
        print(json.dumps(rows, indent=2))
    else:
        print(f"\nrates: {rows[0]['rates']}")


def _targets(config: config_lib.TrainConfig) -> None:
    """Prints the plan of a config for each target, and exits with the verdict."""
    from atlas_jax.plan import planner, report, search

    assumptions = planner.Assumptions(
        model_config=_MODEL_CONFIG.value, segments=_SEGMENTS.value, rates_file=_RATES.value
    )
    plans = []
    for name in _TARGETS.value:
        plan = planner.plan(config, name, assumptions)
        if not _JSON.value and len(_TARGETS.value) == 1:
            print(report.table(plan, config))
        if not plan.fits and _SEARCH.value:
            attempt = lambda c, name=name: planner.plan(c, name, assumptions)  # noqa: E731
            for found in search.nearest(config, plan.run.decoder.sharding.num_replicas, attempt):
                print(f"{found.changes}: {report.row(found.plan)}", file=sys.stderr)
                plan = found.plan
        plans.append(plan)
    if _JSON.value:
        print(json.dumps([report.as_json(plan, config) for plan in plans], indent=2))
    elif len(plans) > 1:
        print("\n".join([report.HEADER, *map(report.row, plans), "", report.ASSUMPTIONS]))
    sys.exit(0 if all(plan.fits for plan in plans) else 3)


if __name__ == "__main__":
    app.run(cli.guarded(main), flags_parser=cli.parse)
