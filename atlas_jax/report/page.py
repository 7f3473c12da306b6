"""The page put together: a template filled with what a run has written, and its data compressed."""

from __future__ import annotations

import base64
import datetime
import gzip
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jinja2
import msgspec
from absl import logging

from atlas_jax import masking, sockets
from atlas_jax.files import write_whole
from atlas_jax.report import curves, guide, health, reproduce, run_files, stored_samples
from atlas_jax.report.run_files import RunFiles
from atlas_jax.report.shown_samples import Shown

NAME = "report.html"
MAX_BYTES = 9_500_000
"""Size of a page at most; samples are left out until it is met."""
_PLAIN_BYTES = 20_000
"""Size of data that is not compressed."""
_HERE = pathlib.Path(__file__).parent


class _Part(NamedTuple):
    """Content of the page about one run."""

    run: RunFiles
    facts: list[tuple[str, str]]
    verdict: guide.RunVerdict
    health: health.Health
    recipe: reproduce.Recipe


def write(directories: Sequence[str], output: str) -> int:
    """Writes the page of one or more runs, whole or not at all; returns its size in bytes.

    Raises:
        ValueError: for a directory without a run.
        OSError: if the page cannot be written.
    """
    text = make(directories)
    write_whole(output, text)
    return len(text.encode())


def at_end(output_dir: str) -> None:
    """Writes the page of a run that has ended; where it cannot be made, a line says so."""
    path = str(pathlib.Path(output_dir) / NAME)
    # A run that has its model does not fail for its page, whatever its files hold.
    _, error = sockets.attempt(write, [output_dir], path)
    if error:
        logging.warning("no page of this run: %s; later: atlas-report %s", error, output_dir)
    else:
        logging.info("the page of this run: %s", path)


def make(directories: Sequence[str], max_bytes: int = MAX_BYTES) -> str:
    """Returns the page as HTML.

    Raises:
        ValueError: for a directory without a run.
    """
    runs = [run_files.read(directory) for directory in directories]
    samples = [list(stored_samples.read(run.directory)) for run in runs]
    pictures, others = curves.draw(runs, samples)
    parts = [
        _Part(
            run=run,
            facts=_facts(run),
            verdict=guide.judge(run),
            health=health.examine(run, steps),
            recipe=reproduce.describe(run),
        )
        for run, steps in zip(runs, samples, strict=True)
    ]

    def render(limit: int) -> str:
        shown = Shown.of(runs, samples, limit)
        data = shown.as_json() | {"curves": [curves.as_json(p) for p in (*pictures, *others)]}
        return (
            _TEMPLATE.get_template("page.html.jinja")
            .render(
                parts=parts,
                pictures=pictures,
                others=others,
                shown=shown,
                embedded=embedded(data),
                made=datetime.datetime.now().isoformat(" ", "minutes"),
                geometry=curves,
                read=_read,
            )
            .encode("utf-8", "replace")
            .decode()
        )  # halves of surrogate pairs are "?"

    return _fitting(render, max_bytes)


def _fitting(render: Callable[[int], str], max_bytes: int) -> str:
    """Returns the page with as many samples of a step as its size allows."""
    limit = stored_samples.KEPT
    while True:
        text = render(limit)
        size = len(text.encode())
        if size <= max_bytes or limit == 0:
            return text
        # Texts are most of a page, so it shrinks about as its samples do.
        limit = min(limit - 1, int(limit * max_bytes / size))


def embedded(data: Any) -> dict[str, str]:
    """Returns data for a script element: its encoding and its text, which ends no element."""
    text = msgspec.json.encode(data).decode()  # NaN is null
    if len(text) <= _PLAIN_BYTES:
        safe = (
            text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
        )
        return {"encoding": "plain", "text": safe}
    packed = gzip.compress(text.encode(), mtime=0)
    return {"encoding": "gzip", "text": base64.b64encode(packed).decode()}


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    """Returns what was trained on what, how long it took and what it cost."""
    config = run.config
    data = config.get("data", {})
    data_name = next((data[k] for k in ("dataset_path", "source", "db_url") if data.get(k)), "-")
    done = f"step {run.last_step}" + (f" of {run.num_steps}" if run.num_steps else "")
    facts = [
        ("trained", config.get("model_name_or_path", "-")),
        *([("against", config["student_model"])] if config.get("student_model") else []),
        *([("teacher", name)] if (name := config.get("teacher_model_name_or_path")) else []),
        ("on", data_name),
        ("state", f"{run.state}, {done}"),
        ("time", _time(run)),
    ]
    if run.spent:
        cost = run.spent["cost"]
        money = "price not known" if cost is None else f"{cost:.2f} in the currency of the prices"
        calls = f"{run.spent['calls'] or 0:,.0f} calls, {run.spent['tokens'] or 0:,.0f} tokens"
        facts.append(("judges", f"{calls}, {money}"))
    return [(name, masking.hide(str(value))) for name, value in facts]


def _time(run: RunFiles) -> str:
    """Returns the time of all steps, and that from the first to the last line of the log."""
    total = 0.0
    before = 0
    for line in run.metrics:
        secs = line.get("perf/step_secs", math.nan)
        if not math.isnan(secs):  # the mean over the steps since the last line
            total += secs * max(int(line["step"]) - before, 1)
            before = int(line["step"])
    words = f"{_duration(total)} in steps"
    if run.log:
        ends = [datetime.datetime.fromisoformat(run.log[i].time) for i in (0, -1)]
        words += f", {_duration((ends[1] - ends[0]).total_seconds())} by the log"
    return words


def _duration(secs: float) -> str:
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _read(name: str) -> str:
    """Returns a file of this directory for the template."""
    return (_HERE / name).read_text(encoding="utf-8")


_TEMPLATE = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
