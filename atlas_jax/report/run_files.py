"""Files of a run's directory, read for its page; what is missing or cut off is left out."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import socket
from typing import Any, NamedTuple

from atlas_jax.report.guide import Values

_STEP = re.compile(r"\bstep (\d+)/(\d+) ")
_LINE = re.compile(r"(\d{4}-[01]\d-[0-3]\d [0-2]\d:[0-5]\d:[0-5]\d),\d+ ([A-Z]+) (.*)")
_ACCOUNTS = "judges_spent_process_*.json"


class LogLine(NamedTuple):
    """One message of `training.log`."""

    time: str
    """Local date and time, to the second."""
    level: str
    text: str


class RunFiles(NamedTuple):
    """Content of a run's directory but for its samples, see `stored_samples`."""

    directory: pathlib.Path
    config: dict[str, Any]
    """The resolved options, without secrets, and the environment."""
    start: dict[str, Any]
    """Digests of the models that the run was started with."""
    metrics: list[Values]
    """The lines of `metrics.jsonl`, in order; null and NaN are NaN."""
    log: list[LogLine]
    evaluations: list[dict[str, Any]]
    """Results of this run's model in the files of `atlas-evaluate`."""
    spent: dict[str, float | None]
    """`calls`, `tokens` and `cost` of judges over all processes; empty without judges."""
    num_steps: int
    """Steps of the whole run; 0 if they are not known."""
    state: str
    """`finished`, `running` or `stopped`."""
    unread: list[str]
    """Sentences about lines that are no records."""

    @property
    def name(self) -> str:
        """Path of the directory as it was given."""
        return str(self.directory)

    @property
    def algorithm(self) -> str:
        """`sft`, `grpo` or `gkd`; empty if the run has no `config.json`."""
        return self.config.get("algorithm", "")

    @property
    def last_step(self) -> int:
        """Number of the newest step with metrics; 0 without any."""
        return int(max((line["step"] for line in self.metrics), default=0))

    def series(self, name: str) -> list[tuple[int, float]]:
        """Returns the steps and values of a metric, NaN where there was nothing to count."""
        return [(int(line["step"]), line[name]) for line in self.metrics if name in line]


def read(directory: str) -> RunFiles:
    """Returns what a run has left so far.

    Raises:
        ValueError: for a directory without a run.
    """
    path = pathlib.Path(directory)
    if not any((path / name).exists() for name in ("config.json", "metrics.jsonl", "rollouts")):
        raise ValueError(
            f"{directory} is no run: it has no config.json, metrics.jsonl or rollouts; give the "
            "output_dir of a run"
        )
    config = _json(path / "config.json")
    lines, unread = _metrics(path / "metrics.jsonl")
    log, total = _log(path / "training.log")
    state = _json(path / "final" / "trainer_state.json")
    return RunFiles(
        directory=path,
        config=config,
        start=_json(path / "start.json"),
        metrics=lines,
        log=log,
        evaluations=_evaluations(path),
        spent=_spent(path),
        num_steps=int(state.get("max_steps", 0) or total or max(config.get("max_steps", 0), 0)),
        state=_state(path, bool(state)),
        unread=[f"metrics.jsonl: {unread} lines are no records"] if unread else [],
    )


def is_running(path: pathlib.Path) -> bool:
    """Returns whether a process works in the directory, as far as this host can tell."""
    holder = _json(path / ".run.json")
    if not holder:
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except (KeyError, ValueError, ProcessLookupError):
        return False
    except PermissionError:  # it lives, and belongs to another user
        return True
    return True


def _state(path: pathlib.Path, has_final: bool) -> str:
    if is_running(path):
        return "running"
    return "finished" if has_final else "stopped"


def _json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a file; empty if there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _metrics(path: pathlib.Path) -> tuple[list[Values], int]:
    """Returns the lines of metrics, and the number of lines that are none."""
    lines = []
    unread = 0
    for text in _text(path).splitlines():
        try:
            values = json.loads(text)
            values["step"] = int(values["step"])
            lines.append({name: _number(value) for name, value in values.items()})
        except (ValueError, KeyError, TypeError, AttributeError):
            unread += 1
    return lines, unread


def _number(value: Any) -> float:
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else math.nan


def _log(path: pathlib.Path) -> tuple[list[LogLine], int]:
    """Returns the messages of the log, and the number of steps of which it speaks."""
    lines = []
    total = 0
    for text in _text(path).splitlines():
        match = _LINE.match(text)
        if not match:  # a further line of a message
            continue
        lines.append(LogLine(match[1], match[2], match[3]))
        if step := _STEP.search(match[3]):
            total = int(step[2])
    return lines, total


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _spent(path: pathlib.Path) -> dict[str, float | None]:
    accounts = [_json(file) for file in sorted(path.glob(_ACCOUNTS))]
    total: dict[str, float | None] = {}
    for name in ("calls", "tokens", "cost") if accounts else ():
        values = [account.get(name) for account in accounts]
        numbers = [value for value in values if isinstance(value, int | float)]
        total[name] = float(sum(numbers)) if len(numbers) == len(values) else None
    return total


def _evaluations(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the results of this run's model, from evaluations in its directory or beside it."""
    folders = (path, path.absolute().parent)
    return [
        teacher | {"file": file.name}
        for folder in folders
        for file in sorted(folder.glob("evaluation*.json"))
        for teacher in _json(file).get("teachers", [])
        if _is_of(teacher.get("teacher", ""), path)
    ]


def _is_of(teacher: str, path: pathlib.Path) -> bool:
    """Returns whether a teacher is the model of a run; its path may be that of another folder."""
    return pathlib.Path(teacher).parts[-2:] == (path.absolute().name, "final")
