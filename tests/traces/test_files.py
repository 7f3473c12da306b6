"""Exports of sessions: plain, compressed, damaged."""

import gzip
import json
import pathlib

import pyarrow
import pytest

from atlas_jax.traces import files

LINES = b'{"task": "a"}\n\n{"task": 1}\r\n{"task": "b"}'


def write(path, content):
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pyarrow.output_stream(str(path), compression=compression) as stream:
        stream.write(content)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_lines_are_named_and_rejected_by_their_number(tmp_path, name):
    path = write(tmp_path / name, LINES)
    (first, a), (second, reason), (third, b) = files.read(path)
    assert (first, second, third) == (f"{path}:1", f"{path}:3", f"{path}:4")
    assert (a.task, b.task) == ("a", "b")
    assert reason == "has the int '1' as task; it must be a text that is not empty"


def test_a_gzip_file_of_several_parts_is_read_whole(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"task": "a"}\n') + gzip.compress(b'{"task": "b"}\n'))
    assert [session.task for _, session in files.read(str(path))] == ["a", "b"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_file_is_an_error_that_says_where(tmp_path, suffix):
    line = json.dumps({"task": "x" * 50}).encode() + b"\n"
    whole = write(tmp_path / f"a.jsonl{suffix}", line * 20_000)
    part = tmp_path / f"b.jsonl{suffix}"
    part.write_bytes(pathlib.Path(whole).read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cannot be read behind line \d+.*write it again"):
        list(files.read(str(part)))


@pytest.mark.parametrize(
    ("path", "reason"), [("none.jsonl", "does not exist"), ("README.md", "unknown kind")]
)
def test_a_file_that_is_no_export_is_an_error(path, reason):
    with pytest.raises(ValueError, match=reason):
        list(files.read(path))
