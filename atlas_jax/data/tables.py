"""Files of rows that are tables: CSV, TSV, Parquet and Arrow; see `row_files`."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from typing import Any

from atlas_jax import extras
from atlas_jax.data.row_files import Records, opened

_LONGEST_CELL = 2**31 - 1  # in characters; the most that every platform takes


def _cells(row: dict[Any, Any]) -> dict[str, Any] | str:
    """Returns the cells of a line that are not empty, or why the line is rejected."""
    if None in row or None in row.values():
        return "has another number of cells than the first line"
    return {name: cell for name, cell in row.items() if cell != ""}


def _separated(path: str, file: str, delimiter: str) -> Records:
    """Reads a table of texts; cells that are empty count as absent."""
    csv.field_size_limit(_LONGEST_CELL)  # of 128 KiB otherwise; conversations are longer
    with opened(file) as content:
        # Spreadsheets put a byte order mark before the name of the first column.
        text = (line.decode("utf-8-sig" if i == 0 else "utf-8") for i, line in enumerate(content))
        try:
            table = csv.DictReader(text, delimiter=delimiter)
            twice = [name for name, n in Counter(table.fieldnames or ()).items() if n > 1]
            if twice:
                raise ValueError(
                    f"dataset file {path} has the column {twice[0]!r} more than once; rename one"
                )
            for number, row in enumerate(table, start=1):
                yield f"{path}:{number}", _cells(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"dataset file {path} is no table of texts ({error})") from error


def _csv(path: str, file: str) -> Records:
    return _separated(path, file, ",")


def _tsv(path: str, file: str) -> Records:
    return _separated(path, file, "\t")


def _parquet(path: str, file: str) -> Records:
    with extras.importing("datasets", f"the Parquet file {path}"):
        import pyarrow
        import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"dataset file {path} is not a Parquet file ({error}); write it again"
        ) from error
    with table:
        yield from _batches(path, table.iter_batches())


def _arrow(path: str, file: str) -> Records:
    """Reads a file of Arrow's stream or file format, as `datasets` writes them."""
    with extras.importing("datasets", f"the Arrow file {path}"):
        import pyarrow

    with pyarrow.memory_map(file) as source:
        try:
            table = pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            try:
                table = pyarrow.ipc.open_file(source).read_all()
            except pyarrow.ArrowInvalid as error:
                raise ValueError(f"dataset file {path} is not an Arrow file ({error})") from error
        yield from _batches(path, table.to_batches())


def _batches(path: str, batches: Any) -> Records:
    number = 0
    for batch in batches:
        for fields in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", fields


READERS: dict[str, Callable[[str, str], Records]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
"""Kind of file -> its reader, of the name that rows are called after, and the path."""
