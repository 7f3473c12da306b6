"""The end of a run in the terminal: the verdict of its page in lines, and warnings."""

from __future__ import annotations

import contextlib
import json
import logging as python_logging
import os
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from absl import logging

from atlas_jax import masking, ranges, sockets, terminal
from atlas_jax.report import guide, health, run_files
from atlas_jax.report.run_files import RunFiles

_WORDS = {ranges.REACHED: "ok", ranges.NEAR: "near", ranges.MISSED: "missed"}
"""Status -> the word of the terminal; others have none."""
_WIDTH = 76


def show(output_dir: str, as_json: bool) -> None:
    """Logs the verdict on a run that has come to its end.

    Args:
        output_dir: directory of the run.
        as_json: whether standard output gets the verdict too, as one line of JSON.
    """
    # A run that has its model does not fail for its verdict, whatever its files hold.
    _, error = sockets.attempt(_show, output_dir, as_json)
    if error:
        logging.warning("no verdict on this run: %s", error)


def _show(output_dir: str, as_json: bool) -> None:
    # Evaluations that lie there are of the model that this run has just replaced.
    run = run_files.read(output_dir)._replace(evaluations=[])
    verdict = guide.judge(run)
    model = os.path.join(output_dir, "final")
    warned = health.measured(run)
    with _log(os.path.join(output_dir, "training.log")):
        for warning in warned:
            logging.warning("%s; %s", warning.text, warning.advice)
        terminal.result("\n".join([*in_lines(verdict), f"model: {masking.hide(model)}"]))
    if as_json:
        texts = [warning.text for warning in warned]
        values = _as_json(run, verdict) | {"warnings": texts, "model": model}
        sys.stdout.write(json.dumps(values, ensure_ascii=False) + "\n")
        sys.stdout.flush()


@contextlib.contextmanager
def _log(path: str) -> Iterator[None]:
    """Adds what is logged to the log of the run, which has let go of it."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(max(verbosity, logging.INFO))
    handler = python_logging.FileHandler(path)
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.get_absl_logger().addHandler(handler)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.get_absl_logger().removeHandler(handler)
        handler.close()


def in_lines(verdict: guide.RunVerdict) -> list[str]:
    """Returns a verdict as lines that fit 80 columns."""
    lines = ["finished", *textwrap.wrap(verdict.sentence, _WIDTH)]
    for row in verdict.criteria:
        lines.append(f"{_WORDS.get(row.status, '-'):<7} {row.name}: {row.reached}")
        words = f"goal: {row.goal}; {row.basis}"
        lines += textwrap.wrap(words, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return lines


def _as_json(run: RunFiles, verdict: guide.RunVerdict) -> dict[str, Any]:
    return {
        "step": run.last_step,
        "verdict": verdict.sentence,
        "criteria": [row._asdict() for row in verdict.criteria],
    }
