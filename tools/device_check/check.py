"""Checks atlas_jax on one device: values, speed, memory, rates of kernels.

    python tools/device_check/check.py CASE [--tiny]

One case a process; run.sh runs all of them. Lines of JSON, also in $OUT/results.jsonl. `--tiny`
shrinks every shape, for a test on a CPU. `predict` writes plan.json, what the plan says of the
programs, where the compilers for absent devices are.
"""

from __future__ import annotations

import os
import sys
import traceback

import _checkout  # noqa: F401  (comes first: see there)

if "predict" in sys.argv[1:]:
    os.environ["JAX_PLATFORMS"] = "cpu"  # read when JAX is imported

import jax
import kernel_rates
import programs_at_hand
import speed
import values
from results import FAILURES, OUT, say

from atlas_jax import cli

_CASES = {
    "values": values.values,
    "rates": kernel_rates.rates,
    "generate": speed.generate,
    "predict": speed.predict,
}


def main() -> None:
    """Runs one case; what it raises is a result too."""
    parser = cli.ToolParser(__doc__)
    programs = list(programs_at_hand.configs(tiny=True))
    parser.add_argument("case", choices=[*_CASES, *programs])
    parser.add_argument("--tiny", action="store_true", help="shrink every shape")
    options = parser.parse_args()
    if options.case != "predict":
        device = jax.devices()[0]
        say(
            "device",
            name=options.case,
            kind=device.device_kind,
            platform=device.platform,
            jax=jax.__version__,
            python=sys.version.split()[0],
        )
    try:
        if options.case in _CASES:
            _CASES[options.case](options.tiny)
        else:
            speed.train(options.case, options.tiny)
    except FAILURES as error:
        say(options.case, failed=repr(error)[:1500])
        with (OUT / "errors.txt").open("a") as file:
            file.write(f"{options.case}\n{traceback.format_exc()}\n")
        sys.exit(1)


if __name__ == "__main__":
    cli.tool(main)
