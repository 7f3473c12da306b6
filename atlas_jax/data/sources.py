"""Rows of files, hub datasets and the runtime's sessions, each with the name that errors use.

A row that cannot be read is rejected with its name and the reason; too many of them stop the run. A
session is one row, whose lessons or questions `unfold` makes rows of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from atlas_jax import extras
from atlas_jax.data import row_files
from atlas_jax.files import write_whole
from atlas_jax.options.data import DataConfig
from atlas_jax.types import NOTHING_GIVEN, Given, SessionRows
from atlas_jax.wording import shorten

_HUB_FILE = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+):(?P<file>.+)")
_SAVED = "state.json"  # is in what `datasets` wrote with `save_to_disk`
_NO_ROWS = (_SAVED, "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_NUM_LOOKED_AT = 1000
"""Rows of a file that `check` looks at; a few unusable ones may stand first."""
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
    if output_dir and is_main:
        _list_rejected(f"{output_dir}/rejected.jsonl", rows, held_out)
    for part in filter(None, (rows, held_out)):
        check_rejected(part.rejected, len(part.rows) + len(part.rejected), config.max_rejected_frac)
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


def check(config: DataConfig, path: str, use: Callable[[Row], object]) -> None:
    """Checks that the files of `path` can be read and that one of their first rows can be used.

    What the hub has is not looked up.

    Args:
        config: gives the format.
        path: as `read_rows` takes it.
        use: raises a ValueError for a row that cannot be used; it gets no sessions.

    Raises:
        ValueError: for a file that is missing, unreadable or of an unknown kind, or that begins
            with rows of which none can be used.
    """
    for part in parts_of(path):
        records: Iterable[tuple[str, Any]]
        if config.format == "session":
            records = _exported(part)
        elif _is_local(part):
            records = _records(part, config)
        else:
            continue
        check_records(records, use)


def check_function(source: str, use: Callable[[Row], object]) -> None:
    """Checks that a function gives rows of which one of the first can be used, in each split.

    Raises:
        ValueError: as `row_functions.read`, and as `check`.
    """
    from atlas_jax.data import row_functions  # rows of files need none

    check_records(row_functions.read(source, row_functions.TRAIN), use)
    if row_functions.takes_split(source):
        check_records(row_functions.read(source, row_functions.EVAL), use)


def check_records(records: Iterable[tuple[str, Any]], use: Callable[[Row], object]) -> None:
    """Checks that one of the first records, each with its name, can be used; see `check`."""
    first = ""
    for name, value in itertools.islice(records, _NUM_LOOKED_AT):
        problem = _problem(name, value, use)
        if not problem:
            return
        first = first or f"{name}: {problem}"
    if first:
        raise ValueError(first)


def given_records(name: str, rows: Sequence[Any]) -> list[tuple[str, dict[str, Any] | str]]:
    """Returns the rows of a caller, each with its name; a reason in place of what is no row."""
    return [
        (
            f"{name}[{i}]",
            dict(row) if isinstance(row, Mapping) else f"a {type(row).__name__} and no dict",
        )
        for i, row in enumerate(rows)
    ]


def _problem(name: str, value: Any, use: Callable[[Row], object]) -> str:
    """Returns why a record cannot be used; "" if it can."""
    if isinstance(value, dict):
        try:
            use(Row(name, value))
        except ValueError as error:
            return str(error)
    return value if isinstance(value, str) else ""


def unfold(rows: Rows, part: str, needed: str = "") -> Rows:
    """Returns the lessons or the questions of sessions as rows; rows of other kinds stay.

    Args:
        rows: of a dataset.
        part: `LESSONS` or `QUESTIONS`.
        needed: a field that must not be empty in them.

    Raises:
        ValueError: if the sessions hold none at all.
    """
    unfolded = []
    num_sessions = 0
    num_parts = 0
    for row in rows.rows:
        if row.session is None:
            unfolded.append(row)
            continue
        found = [f for f in getattr(row.session, part) if not needed or f[needed]]
        unfolded += [Row(f"{row.name} {part}[{i}]", fields) for i, fields in enumerate(found)]
        num_sessions = num_sessions + 1
        num_parts = num_parts + len(found)
    if num_sessions:
        logging.info("%d sessions hold %d %s", num_sessions, num_parts, part)
    if num_sessions and not unfolded:
        lack = f" with a {needed}" if needed else ""
        raise ValueError(
            f"{num_sessions} sessions hold no {part}{lack}; take others (data.min_reward, "
            "data.status_filters, data.review_status_filters), or see docs/data.md on sessions"
        )
    return rows._replace(rows=unfolded)


def check_rejected(rejected: list[str], num_rows: int, max_frac: float) -> None:
    """Stops the run when too large a share of the rows is unusable.

    Raises:
        ValueError: if more than `max_frac` of `num_rows` are rejected; shows the first of them.
    """
    if not rejected or len(rejected) <= max_frac * num_rows:
        return
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
        return _session_records(config, parts, output_dir)
    return _chain(_records(part, config) for part in parts)


# The functions that follow are all that imports the wing of the Atlas runtime: a run on files of
# rows needs neither its parser nor the client of its database.


def check_sessions(config: DataConfig, output_dir: str) -> None:
    """Checks the filters of sessions, and that their database or its snapshot has some that pass.

    Raises:
        ValueError: as `traces.snapshot.check`, and if the client is not installed.
        ConnectionError: if the database cannot be reached.
    """
    if config.db_url:
        extras.need("postgres", "data.db_url")
        from atlas_jax.traces import snapshot

        snapshot.check(config, output_dir)
    elif config.format == "session":
        from atlas_jax.traces.query import Query

        Query.from_config(config)


def take_snapshot(config: DataConfig, output_dir: str) -> None:
    """Reads the database of sessions into the run's snapshot, where the config names a database.

    Raises:
        ValueError: as `check_sessions`.
        OSError: if the database is lost on the way.
    """
    if config.db_url:
        extras.need("postgres", "data.db_url")
        from atlas_jax.traces import snapshot

        snapshot.take(config, output_dir)


def _session_records(
    config: DataConfig, parts: list[str], output_dir: str
) -> Iterator[tuple[str, SessionRows | str]]:
    """Yields the sessions of exports, or of the run's snapshot where there are none."""
    from atlas_jax.traces import sessions

    if parts:
        return sessions.to_records(_chain(_exported(part) for part in parts), config)
    from atlas_jax.traces import snapshot

    return sessions.to_records(snapshot.read(output_dir), config)


def _exported(path: str) -> Iterator[tuple[str, Any]]:
    from atlas_jax.traces import files

    return files.read(path)


_chain = itertools.chain.from_iterable


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


def _records(path: str, config: DataConfig) -> row_files.Records:
    """Yields each row's name and its fields, or in their place why it is rejected."""
    file = os.path.expanduser(path)
    whole = os.path.isfile(file) or os.path.exists(f"{file}/{_SAVED}")
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
    return _hub_records(path, config)


def _is_local(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path)) or _looks_like_file(path)


def _looks_like_file(path: str) -> bool:
    if _HUB_FILE.fullmatch(path) or os.path.isdir(os.path.expanduser(path)):
        return False
    return row_files.is_known(path) or path.startswith((".", "/", "~")) or path.count("/") > 1


def _hub_records(path: str, config: DataConfig) -> row_files.Records:
    with extras.importing("datasets", f"the dataset {path}"):
        import datasets

    match = _HUB_FILE.fullmatch(path)
    repo, files = (match["repo"], match["file"]) if match else (path, None)
    # The only split that `datasets` gives a file.
    hub_split = "train" if match else config.dataset_split
    folder = pathlib.Path(path).expanduser()
    kind = "directory" if folder.is_dir() else "hub dataset"
    if folder.is_dir() and not any(row_files.is_known(str(f)) for f in folder.rglob("*")):
        raise ValueError(
            f"the directory {path}, given as a dataset, holds no file that ends in "
            f"{row_files.kinds()}; give the file itself"
        )
    try:
        if (folder / _SAVED).exists():
            table = datasets.load_from_disk(str(folder))
        else:
            table = datasets.load_dataset(
                str(folder) if folder.is_dir() else repo,
                config.dataset_config or None,
                data_files=files,
                split=hub_split,
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"{kind} {path!r}, split {hub_split!r}, cannot be loaded ({why}); check the id, "
            "data.dataset_config, data.dataset_split and the network, or give a .jsonl or .parquet "
            "file, or files by a pattern of their names"
        ) from error
    if folder.is_dir() and not (folder / _SAVED).exists():
        _tell_unread(folder, config)
    for number, fields in enumerate(table, start=1):
        yield f"{path}[{hub_split}]:{number}", dict(fields)


def _tell_unread(folder: pathlib.Path, config: DataConfig) -> None:
    """Warns of files that `datasets` leaves out: it reads the most frequent kind of a directory."""
    import datasets

    builder = datasets.load_dataset_builder(str(folder), config.dataset_config or None)
    read = {os.path.realpath(f) for files in builder.config.data_files.values() for f in files}
    left = [
        str(file)
        for file in sorted(folder.rglob("*"))
        if row_files.is_known(str(file))
        and file.name not in _NO_ROWS
        and os.path.realpath(file) not in read
    ]
    if left:
        logging.warning(
            "%d files of the directory %s are not read, such as %s; a pattern of names, such as "
            "%s/*, reads files of any kind",
            *(len(left), folder, left[0], folder),
        )
