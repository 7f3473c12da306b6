"""Tells without accelerators whether a run fits, and how long its steps take at least.

    atlas-plan --config teacher_sft --target h100:8
    atlas-plan --config teacher_rcl --target h100:8,v5e:4x4 --json --config.max_seq_length=16384

Compiles the run's own programs for the target: `h100 h200 a100-80g a100-40g` with a number of GPUs,
`v5e v6e` (AxB) and `v5p` (AxBxC) with a topology. Several targets, separated by commas, give a
table. Exit code: 0 if all fit, 3 if one does not, 1 for an error. Needs the extra `plan`.
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
_SEARCH = flags.DEFINE_bool("search", False, "Look for changes that make it fit.")
_MODEL_CONFIG = flags.DEFINE_string("model_config", "", "A config.json to read for the model.")


def main(argv: list[str]) -> None:
    """Prints the plan of each target and exits with the verdict."""
    cli.no_more_words(argv[1:])
    if not _TARGETS.value:
        raise cli.UsageError("--target KIND:SIZE is needed, such as h100:8")
    config = config_lib.freeze(cli.needed(_CONFIG))
    config_lib.validate(config)
    os.environ["JAX_PLATFORMS"] = "cpu"  # read when JAX is imported, which the next line does
    from atlas_jax.plan import planner, report, search

    plans = []
    for name in _TARGETS.value:
        plan = planner.plan(config, name, _MODEL_CONFIG.value)
        if not _JSON.value and len(_TARGETS.value) == 1:
            print(report.table(plan, config))
        if not plan.fits and _SEARCH.value:
            attempt = lambda c, name=name: planner.plan(c, name, _MODEL_CONFIG.value)  # noqa: E731
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
