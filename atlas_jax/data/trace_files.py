"""Exports of sessions: one record a line, plain or compressed."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import IO

import pyarrow

from atlas_jax.data import trace_parser
from atlas_jax.data.traces import AtlasSessionTrace

_COMPRESSION = {".jsonl": None, ".json": None, ".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}


def read(path: str) -> Iterator[tuple[str, AtlasSessionTrace | str]]:
    """Yields the name of each line, `path:number`, and its session or why it is rejected.

    Raises:
        ValueError: for a file that is missing, of an unknown kind, or damaged.
    """
    number = 0
    try:
        with open_lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _session(line)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"export {path} cannot be read behind line {number} ({error}); write it again"
        ) from error


@contextlib.contextmanager
def open_lines(path: str) -> Iterator[IO[bytes]]:
    """Opens an export to read its lines, which are those of the file before compression.

    Raises:
        ValueError: for a file that is missing or of an unknown kind.
    """
    file = os.path.expanduser(path)
    if not os.path.isfile(file):
        raise ValueError(f"export {path} does not exist; relative paths start at {os.getcwd()}")
    kind = next((suffix for suffix in _COMPRESSION if file.endswith(suffix)), None)
    if kind is None:
        raise ValueError(
            f"export {path} is of an unknown kind; its name must end in one of "
            f"{', '.join(_COMPRESSION)}"
        )
    with pyarrow.input_stream(file, compression=_COMPRESSION[kind]) as stream:
        yield io.BufferedReader(stream)


def _session(line: bytes) -> AtlasSessionTrace | str:
    try:
        return trace_parser.parse_line(line)
    except ValueError as error:
        return str(error)
