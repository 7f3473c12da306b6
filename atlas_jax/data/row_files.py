"""Files of rows: JSON lines and JSON, compressed or not, and those of `tables`.

A file is told by its name. Each reader yields a name for every row, which errors use, and its
fields, or in their place why it is rejected.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

Records = Iterator[tuple[str, dict[str, Any] | str]]

_TEXTS = (".jsonl", ".json", ".csv", ".tsv")
"""Kinds that may be compressed as a whole."""
_KINDS = (*_TEXTS, ".parquet", ".arrow")
_COMPRESSED = (".gz", ".zst")
_BEGINNING = 64  # bytes that tell an array from lines
_JSON_ERRORS = (ValueError, RecursionError)


def is_known(path: str) -> bool:
    """Returns whether the name is that of a file of a known kind."""
    return _kind(path) in _KINDS


def kinds() -> str:
    """Returns the endings that file names may have, for an error."""
    return f"{', '.join(_KINDS)}, some of them with {' or '.join(_COMPRESSED)} behind"


def expanded(path: str) -> list[str]:
    """Returns the files that a path with `*`, `?` or `[…]` means, in order of their names.

    Raises:
        ValueError: if it means none.
    """
    # The name of a file may itself hold brackets.
    if os.path.exists(os.path.expanduser(path)) or not glob.has_magic(path):
        return [path]
    found = sorted(glob.glob(os.path.expanduser(path), recursive=True))
    files = [file for file in found if is_known(file)]
    if not files:
        raise ValueError(
            f"no dataset file is like {path}; relative paths start at {os.getcwd()}, and names end "
            f"in {kinds()}"
        )
    return files


def read(path: str) -> Records:
    """Yields the rows of a file.

    Args:
        path: as the user gave it; rows are named after it.

    Raises:
        ValueError: for a file of an unknown kind, or one that cannot be read at all.
    """
    kind = _kind(path)
    if kind not in _KINDS:
        raise ValueError(
            f"dataset file {path} is of an unknown kind; its name must end in one of {kinds()}"
        )
    file = os.path.expanduser(path)
    if not os.access(file, os.R_OK):
        raise ValueError(f"dataset file {path} may not be read; look at its permissions")
    try:
        yield from _reader(kind)(path, file)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"dataset file {path} is damaged ({error}); write it again") from error


def _reader(kind: str) -> Callable[[str, str], Records]:
    if kind in (".jsonl", ".json"):
        return _json
    from atlas_jax.data import tables

    return tables.READERS[kind]


def _kind(path: str) -> str:
    name = pathlib.PurePath(path.lower())
    if name.suffix in _COMPRESSED and name.with_suffix("").suffix in _TEXTS:
        name = name.with_suffix("")
    return name.suffix


def opened(file: str) -> Any:
    """Opens a file for bytes, decompressed; text mode would break lines within JSON texts."""
    if file.lower().endswith(".gz"):
        return gzip.open(file)
    if file.lower().endswith(".zst"):
        from atlas_jax import extras

        with extras.importing("datasets", f"the compressed file {file}"):
            import pyarrow

        return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))
    return open(file, "rb")


def _json(path: str, file: str) -> Records:
    """Reads one object a line, or an array of objects, alone or as `data` of an object."""
    with opened(file) as content:
        # Only the first character tells an array, which has no row in a line, from rows.
        beginning = content.read(_BEGINNING).lstrip(b"\xef\xbb\xbf \t\r\n")
    lines = _lines(path, file)
    if path.lower().removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
        return lines
    if not beginning.startswith(b"["):
        first = next(lines, None)
        if first is None or (isinstance(first[1], dict) and "data" not in first[1]):
            return _lines(path, file)
    return _array(path, file)


def _lines(path: str, file: str) -> Records:
    with opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _object(line)


def _object(line: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(line)
    except _JSON_ERRORS as error:
        return f"is not JSON ({_why(error)}); each line must be one JSON object"
    if not isinstance(value, dict):
        return f"is a JSON {type(value).__name__}, not an object; each line must be one object"
    return value


def _why(error: Exception) -> str:
    return "too many brackets in each other" if isinstance(error, RecursionError) else str(error)


def _array(path: str, file: str) -> Records:
    with opened(file) as content:
        try:
            value = json.load(content)
        except _JSON_ERRORS as error:
            raise ValueError(
                f"dataset file {path} is neither an array of objects nor one object a line "
                f"({_why(error)}); write it as .jsonl"
            ) from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise ValueError(
            f"dataset file {path} is one object without a list data; write one object a line"
        )
    for number, row in enumerate(rows, start=1):
        is_row = isinstance(row, dict)
        yield f"{path}[{number}]", row if is_row else f"is a JSON {type(row).__name__}, no object"
