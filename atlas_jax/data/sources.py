"""Rows of JSONL files, Parquet files and hub datasets, each with the name that errors call it by.

A row that cannot be read is rejected with its name and the reason; too many of them stop the run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from atlas_jax.config import DataConfig

_FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
_HUB_FILE = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+):(?P<file>.+)")
_NUM_SHOWN = 5
# Tags that keep the random streams of one seed apart.
_DRAW_STREAM, _SPLIT_STREAM, _ORDER_STREAM = 1, 2, 3


class Row(NamedTuple):
    """One record of a dataset and where it stands."""

    name: str
    """Such as `data/train.jsonl:17`; lines and rows count from 1."""
    fields: dict[str, Any]


class Rows(NamedTuple):
    """What was read of a dataset."""

    rows: list[Row]
    rejected: list[str]
    """`name: reason` of each row that could not be read."""


def load_rows(config: DataConfig, seed: int) -> tuple[Rows, Rows | None]:
    """Returns the rows to train on and those to evaluate on.

    Both are the same in every run with the same files, options and seed, share no row, and keep
    the order of the files. The second is None when neither `eval_path` nor `eval_split_ratio`
    is set. `dataset_max_samples` limits the rows of `dataset_path` before any are held out.

    Raises:
        ValueError: for a file that is missing or unreadable, and for too many rejected rows.
    """
    rows = draw(read_rows(config, config.dataset_path), config.dataset_max_samples, seed)
    if config.eval_path:
        held_out = dataclasses.replace(config, dataset_split=config.eval_split)
        return rows, read_rows(held_out, config.eval_path)
    if config.eval_split_ratio:
        return split(rows, config.eval_split_ratio, seed)
    return rows, None


def read_rows(config: DataConfig, path: str) -> Rows:
    """Returns the rows of `path`, in order.

    Args:
        config: gives the split of hub datasets and the limit of rejected rows.
        path: `.jsonl` (or `.json` with one object a line) and `.parquet` files, hub dataset ids
            (`owner/name`) or single files of a hub dataset (`owner/name:folder/file.jsonl`);
            several are separated by commas. Blank lines of a JSONL file are no rows.

    Raises:
        ValueError: for a file that is missing or unreadable, for a dataset without rows, and for
            a share of rejected rows above `config.max_rejected_frac`.
    """
    parts = [part for part in (p.strip() for p in path.split(",")) if part]
    rows, rejected = [], []
    for part in parts:
        for name, value in _records(part, config.dataset_split):
            if isinstance(value, dict):
                rows.append(Row(name, value))
            else:
                rejected.append(f"{name}: {value}")
    check_rejected(rejected, len(rows) + len(rejected), config.max_rejected_frac)
    if not rows:
        raise ValueError(f"dataset {path!r} has no rows; give a file with one JSON object a line")
    return Rows(rows, rejected)


def check_rejected(rejected: list[str], num_rows: int, max_frac: float) -> None:
    """Stops the run when too large a share of the rows is unusable.

    Raises:
        ValueError: if more than `max_frac` of `num_rows` are rejected; shows the first of them.
    """
    if not rejected or len(rejected) <= max_frac * num_rows:
        return
    shown = "\n".join(f"  {reason}" for reason in rejected[:_NUM_SHOWN])
    rest = f"\n  and {len(rejected) - _NUM_SHOWN} more" if len(rejected) > _NUM_SHOWN else ""
    raise ValueError(
        f"{len(rejected)} of {num_rows} dataset rows cannot be used, more than "
        f"data.max_rejected_frac={max_frac} allows:\n{shown}{rest}\n"
        "repair or remove them, or raise --config.data.max_rejected_frac to leave them out"
    )


def draw(rows: Rows, count: int, seed: int) -> Rows:
    """Returns `count` of the rows, drawn at random and in their old order; 0 returns all."""
    if not 0 < count < len(rows.rows):
        return rows
    rng = np.random.default_rng((seed, _DRAW_STREAM))
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


def _records(path: str, hub_split: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yields each row's name and its fields, or in their place why it is rejected."""
    file = os.path.expanduser(path)
    if not os.path.isfile(file):
        if _looks_like_file(path):
            raise ValueError(
                f"dataset file {path} does not exist; relative paths start at {os.getcwd()}"
            )
        return _hub_records(path, hub_split)
    if file.endswith((".jsonl", ".json")):
        return _json_records(path, file)
    if file.endswith(".parquet"):
        return _parquet_records(path, file)
    raise ValueError(
        f"dataset file {path} is of an unknown kind; its name must end in one of "
        f"{', '.join(_FILE_SUFFIXES)}"
    )


def _looks_like_file(path: str) -> bool:
    if _HUB_FILE.fullmatch(path) or os.path.isdir(os.path.expanduser(path)):
        return False
    return path.endswith(_FILE_SUFFIXES) or path.startswith((".", "/", "~")) or path.count("/") > 1


def _json_records(path: str, file: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    # Bytes, because text mode also breaks lines at characters that JSON strings may hold.
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _json_object(line)


def _json_object(line: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(line)
    except ValueError as error:
        return f"is not JSON ({error}); each line must be one JSON object"
    if not isinstance(value, dict):
        return f"is a JSON {type(value).__name__}, not an object; each line must be one object"
    return value


def _parquet_records(path: str, file: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"dataset file {path} is not a Parquet file ({error}); write it again"
        ) from error
    with table:
        number = 0
        for batch in table.iter_batches():
            for fields in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", fields


def _hub_records(path: str, hub_split: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    import datasets

    match = _HUB_FILE.fullmatch(path)
    repo, files = (match["repo"], match["file"]) if match else (path, None)
    try:
        table = datasets.load_dataset(repo, data_files=files, split=hub_split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"hub dataset {path!r}, split {hub_split!r}, cannot be loaded ({error}); check the id, "
            "data.dataset_split and the network, or give a .jsonl or .parquet file"
        ) from error
    for number, fields in enumerate(table, start=1):
        yield f"{path}[{hub_split}]:{number}", dict(fields)
