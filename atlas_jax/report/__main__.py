"""The page of one or more runs: `atlas-report RUN [RUN …]`, same as `python -m atlas_jax.report`.

RUN is the output_dir of a run, also of one that goes on, was stopped or was killed. The page of one
run is RUN/report.html; that of several, whose curves lie over each other, is report.html here.
"""

from __future__ import annotations

import pathlib
import sys
import time

from absl import logging

from atlas_jax import cli
from atlas_jax.report import page, run_files


def main() -> None:
    """Writes the page that the command line asks for."""
    parser = cli.ToolParser(__doc__, prog="atlas-report")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="output_dir of a run")
    parser.add_argument("--output", default="", metavar="FILE", help="where the page goes")
    parser.add_argument(
        "--watch", action="store_true", help="write the page again while a run goes on"
    )
    parser.add_argument(
        "--every", type=float, default=30.0, metavar="SECS", help="time between two looks"
    )
    options = parser.parse_args()
    if not options.every > 0:
        raise cli.UsageError(f"--every={options.every:g} must be a time above 0 in seconds")
    output = options.output
    if not output:
        folder = options.runs[0] if len(options.runs) == 1 else ""
        output = str(pathlib.Path(folder) / page.NAME)
    _write(options.runs, output)
    while options.watch and any(run_files.is_running(pathlib.Path(run)) for run in options.runs):
        time.sleep(options.every)
        _write(options.runs, output)


def _write(runs: list[str], output: str) -> None:
    size = page.write(runs, output)
    sys.stdout.write(f"{output}: {size / 1e6:.2f} MB\n")
    sys.stdout.flush()


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    cli.tool(main)
