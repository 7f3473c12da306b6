"""Exports of sessions: one record a line, plain or compressed."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Iterator

from atlas_jax import extras
from atlas_jax.traces import parser
from atlas_jax.traces.schema import AtlasSessionTrace

_KINDS = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst")


def read(path: str) -> Iterator[tuple[str, AtlasSessionTrace | str]]:
    """Yields the name of each line, `path:number`, and its session or why it is rejected.

    Raises:
        ValueError: for a file that is missing, of an unknown kind, or damaged.
    """
    number = 0
    try:
        with open_lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                yield from _session(f"{path}:{number}", line)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"export {path} cannot be read behind line {number} ({error}); write it again"
        ) from error


@contextlib.contextmanager
def open_lines(path: str) -> Iterator[io.BufferedReader]:
    """Opens an export to read its lines, which are those of the file before compression.

    Raises:
        ValueError: for a file that is missing or of an unknown kind.
    """
    file = os.path.expanduser(path)
    if not os.path.isfile(file):
        raise ValueError(f"export {path} does not exist; relative paths start at {os.getcwd()}")
    if not file.endswith(_KINDS):
        raise ValueError(
            f"export {path} is of an unknown kind; its name must end in one of {', '.join(_KINDS)}"
        )
    with _decompressed(file) as stream:
        yield stream


def _decompressed(file: str) -> io.BufferedReader:
    if file.endswith(".gz"):
        return io.BufferedReader(gzip.open(file))
    if not file.endswith(".zst"):
        return open(file, "rb")
    with extras.importing("datasets", f"the compressed export {file}"):
        import pyarrow

    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))


def _session(name: str, line: bytes) -> Iterator[tuple[str, AtlasSessionTrace | str]]:
    """Yields the session of a line; nothing for an empty one."""
    if not line.strip():
        return
    try:
        session: AtlasSessionTrace | str = parser.parse_line(line)
    except ValueError as error:
        session = str(error)
    yield name, session
