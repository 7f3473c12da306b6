"""Rows to train on and to evaluate on, each with the name that errors use.

A row that cannot be read is rejected with its name and the reason; too many of them stop the run.
Files of rows are read here (`row_files`); hub datasets, functions and sessions of the Atlas runtime
have modules of their own, which are imported where the config asks for them. A session is one row,
whose lessons or questions `unfold` makes rows of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from atlas_jax.data import row_files
from atlas_jax.files import write_whole
from atlas_jax.options.data import DataConfig
from atlas_jax.types import NOTHING_GIVEN, Given, SessionRows

HUB_FILE = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+):(?P<file>.+)")
"""The name of one file of a hub dataset."""
SAVED = "state.json"
"""A file of the directories that `datasets` writes with `save_to_disk`."""
LESSONS = "lessons"
QUESTIONS = "questions"
"""The fields of `SessionRows`."""
# Tags that keep the random streams of one seed apart.
_DRAW_STREAM = 1
_SPLIT_STREAM = 2
_ORDER_STREAM = 3


class Row(NamedTuple):
    """One record of a dataset and where it stands."""

    name: str
    """Such as `data/train.jsonl:17`; lines and rows count from 1."""
    fields: dict[str, Any]
    session: SessionRows | None = None
    """Content of a session of the Atlas runtime, which has no fields of its own."""


class Rows(NamedTuple):
    """Rows that were read of a dataset, and those that were rejected."""

    rows: list[Row]
    rejected: list[str]
    """`name: reason` of each row that could not be read."""


def load_rows(
    config: DataConfig,
    seed: int,
    output_dir: str = "",
    is_main: bool = True,
    given: Given = NOTHING_GIVEN,
) -> tuple[Rows, Rows | None]:
    """Returns the rows to train on and those to evaluate on.

    Both are the same in every run with the same files, options and seed, share no row, and keep
    the order of the files. The second is None when neither `eval_path` nor `eval_split_ratio`
    is set. `dataset_max_samples` limits the rows of `dataset_path` before any are held out.

    Args:
        config: where rows come from.
        seed: of draws and of the split.
        output_dir: of the run; holds the snapshot of `db_url`, and gets `rejected.jsonl`.
        is_main: whether this process writes that.
        given: rows of the caller, in place of those of `dataset_path` and `eval_path`.

    Raises:
        ValueError: for a file that is missing or unreadable, and for too many rejected rows.
    """
    other = dataclasses.replace(config, dataset_split=config.eval_split)
    if given.rows is None:
        rows = _read(config, config.source or config.dataset_path, output_dir)
    else:
        rows = _gathered("rows", given_records("rows", given.rows))
    if given.eval_rows is not None:
        held_out: Rows | None = _gathered("eval_rows", given_records("eval_rows", given.eval_rows))
    elif config.eval_path:
        held_out = _read(other, config.eval_path, "")
    else:
        held_out = _held_out_by_function(config)
    # Listed before the check below, which may end the run because of them.
    if output_dir and is_main:
        _list_rejected(f"{output_dir}/rejected.jsonl", rows, held_out)
    for part in filter(None, (rows, held_out)):
        check_rejected(part.rejected, len(part.rows) + len(part.rejected), config.max_rejected_frac)
    # Drawn before the split, so that rows held out count too.
    rows = draw(rows, config.dataset_max_samples, seed)
    if config.eval_split_ratio and held_out is None:
        return split(rows, config.eval_split_ratio, seed)
    return rows, held_out


def read_rows(config: DataConfig, path: str) -> Rows:
    """Returns the rows of `path`, in order.

    Args:
        config: gives the split of hub datasets and the limit of rejected rows.
        path: files of the kinds of `row_files`, patterns of their names, directories, hub dataset
            ids (`owner/name`) or single files of a hub dataset (`owner/name:folder/file.jsonl`);
            several are separated by commas. Blank lines of a JSONL file are no rows. If it is
            `config.source`, its rows to evaluate on are taken, or all where it has no splits.

    Raises:
        ValueError: for a file that is missing or unreadable, for a dataset without rows, and for
            a share of rejected rows above `config.max_rejected_frac`.
    """
    if path == config.source:
        rows = _held_out_by_function(config) or _read(config, path, "")
    else:
        rows = _read(config, path, "")
    check_rejected(rows.rejected, len(rows.rows) + len(rows.rejected), config.max_rejected_frac)
    return rows


def given_records(name: str, rows: Sequence[Any]) -> list[tuple[str, dict[str, Any] | str]]:
    """Returns the rows of a caller, each with its name; a reason in place of what is no row."""
    return [
        (
            f"{name}[{i}]",
            dict(row) if isinstance(row, Mapping) else f"a {type(row).__name__} and no dict",
        )
        for i, row in enumerate(rows)
    ]


def unfold(rows: Rows, part: str, needed: str = "") -> Rows:
    """Returns the lessons or the questions of sessions as rows, see `session_rows.unfold`."""
    if all(row.session is None for row in rows.rows):
        return rows
    from atlas_jax.data import session_rows

    return session_rows.unfold(rows, part, needed)


def check_rejected(rejected: list[str], num_rows: int, max_frac: float) -> None:
    """Stops the run when too large a share of the rows is unusable.

    Raises:
        ValueError: if more than `max_frac` of `num_rows` are rejected; shows the first of them.
    """
    if not rejected or len(rejected) <= max_frac * num_rows:
        return
    from atlas_jax.wording import shorten  # for what is wrong

    shown = "\n".join(f"  {reason}" for reason in shorten(rejected, 5))
    raise ValueError(
        f"{len(rejected)} of {num_rows} dataset rows cannot be used, more than "
        f"data.max_rejected_frac={max_frac} allows:\n{shown}\n"
        "repair or remove them, or raise --config.data.max_rejected_frac to leave them out"
    )


def draw(rows: Rows, count: int, seed: int) -> Rows:
    """Returns `count` of the rows, drawn at random and in their old order; 0 returns all."""
    if not 0 < count < len(rows.rows):
        return rows
    rng = np.random.default_rng((seed, _DRAW_STREAM))
    # In the order of the files: without shuffling the order is the user's.
    chosen = np.sort(rng.permutation(len(rows.rows))[:count])
    return rows._replace(rows=[rows.rows[i] for i in chosen])


def epoch_order(count: int, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
    """Returns `[count]` indices in the order of an epoch: a new permutation each if shuffled."""
    indices = np.arange(count)
    if not shuffle:
        return indices
    return np.random.default_rng((seed, _ORDER_STREAM, epoch)).permutation(indices)


def split(rows: Rows, ratio: float, seed: int) -> tuple[Rows, Rows]:
    """Returns the rows without a random `ratio` of them, and those that were taken out.

    Each side has at least one row.

    Raises:
        ValueError: if there are fewer than two rows.
    """
    num_rows = len(rows.rows)
    if num_rows < 2:
        raise ValueError(
            f"data.eval_split_ratio={ratio} cannot divide {num_rows} row; set data.eval_path to a "
            "file of its own, or the ratio to 0"
        )
    num_eval = min(max(round(ratio * num_rows), 1), num_rows - 1)
    held_out = np.zeros(num_rows, bool)
    held_out[np.random.default_rng((seed, _SPLIT_STREAM)).permutation(num_rows)[:num_eval]] = True
    train = [row for row, out in zip(rows.rows, held_out, strict=True) if not out]
    evaluation = [row for row, out in zip(rows.rows, held_out, strict=True) if out]
    return rows._replace(rows=train), Rows(evaluation, [])


def _read(config: DataConfig, path: str, output_dir: str) -> Rows:
    """Returns the rows of `path`, or of the snapshot in `output_dir` where there is no path."""
    return _gathered(repr(path), _all_records(config, path, output_dir))


def _held_out_by_function(config: DataConfig) -> Rows | None:
    """Returns the rows to evaluate on of the function that gives rows; None if it has none."""
    if not config.source:
        return None
    from atlas_jax.data import row_functions

    if not row_functions.takes_split(config.source):
        return None
    records = list(row_functions.read(config.source, row_functions.EVAL))
    return _gathered(repr(config.source), records) if records else None


def _gathered(
    name_of_all: str, records: Iterable[tuple[str, dict[str, Any] | SessionRows | str]]
) -> Rows:
    rows = []
    rejected = []
    for name, value in records:
        if isinstance(value, str):
            rejected.append(f"{name}: {value}")
        elif isinstance(value, SessionRows):
            rows.append(Row(name, {}, value))
        else:
            rows.append(Row(name, value))
    if not rows and not rejected:
        raise ValueError(
            f"dataset {name_of_all} has no rows; give a file with one JSON object a line, or a "
            "function that returns dicts"
        )
    return Rows(rows, rejected)


def _all_records(
    config: DataConfig, path: str, output_dir: str
) -> Iterable[tuple[str, dict[str, Any] | SessionRows | str]]:
    if config.source and path == config.source:
        from atlas_jax.data import row_functions

        return row_functions.read(path, row_functions.TRAIN)
    parts = parts_of(path)
    if not path or config.format == "session":
        from atlas_jax.data import session_rows

        return session_rows.records(config, parts, output_dir)
    return itertools.chain.from_iterable(records(part, config) for part in parts)


def parts_of(path: str) -> list[str]:
    """Returns the files, directories and datasets that `data.dataset_path` names."""
    if os.path.isfile(os.path.expanduser(path)):  # its name may have a comma
        return [path]
    parts = (part for part in (p.strip() for p in path.split(",")) if part)
    return [file for part in parts for file in row_files.expanded(part)]


def _list_rejected(path: str, *parts: Rows | None) -> None:
    reasons = [reason for part in parts if part for reason in part.rejected]
    if reasons:
        lines = (dict(zip(("name", "reason"), r.split(": ", 1), strict=True)) for r in reasons)
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def records(path: str, config: DataConfig) -> row_files.Records:
    """Yields each row's name and its fields, or in their place why it is rejected."""
    file = os.path.expanduser(path)
    whole = os.path.isfile(file) or os.path.exists(f"{file}/{SAVED}")
    if whole and "[" in config.dataset_split:
        raise ValueError(
            f"the split {config.dataset_split!r} takes some of the rows, but {path} has no splits; "
            "data.dataset_max_samples draws some of any dataset"
        )
    if os.path.isfile(file):
        return row_files.read(path)
    if _looks_like_file(path):
        raise ValueError(
            f"dataset file {path} does not exist; relative paths start at {os.getcwd()}"
        )
    from atlas_jax.data import hub_rows

    return hub_rows.records(path, config)


def is_local(path: str) -> bool:
    """Returns whether a path means files here, which need not exist, and no hub dataset."""
    return os.path.exists(os.path.expanduser(path)) or _looks_like_file(path)


def _looks_like_file(path: str) -> bool:
    if HUB_FILE.fullmatch(path) or os.path.isdir(os.path.expanduser(path)):
        return False
    return row_files.is_known(path) or path.startswith((".", "/", "~")) or path.count("/") > 1
