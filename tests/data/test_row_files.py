"""Files of rows, by kind and as patterns."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from atlas_jax.config import DataConfig
from atlas_jax.data import row_files, sources

ROWS = [{"prompt": "a, b", "completion": "1"}, {"prompt": 'say "é\u2028"', "completion": "2"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = 'prompt,completion\r\n"a, b",1\r\n"say ""é\u2028""",2\r\n'.encode()


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def arrow(stream):
    table, sink = pyarrow.Table.from_pylist(ROWS), pyarrow.BufferOutputStream()
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


def shown(value):
    """Returns what stands in the name of a test: no content, which may hold the time."""
    return value if isinstance(value, str) else ""


def fields(path, **options):
    return [row.fields for row in sources.read_rows(DataConfig(**options), str(path)).rows]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES), ("A.JSONL", LINES), ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.zst", zstd(LINES)), ("a,b.jsonl", LINES), ("a.json", LINES),
        ("array.json", json.dumps(ROWS).encode()),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode()),
        ("data.json", json.dumps({"version": 1, "data": ROWS}).encode()),
        ("pretty.json.gz", gzip.compress(json.dumps({"data": ROWS}, indent=1).encode())),
        ("a.csv", TABLE), ("a.csv.gz", gzip.compress(TABLE)),
        ("a.tsv", TABLE.replace(b'"a, b",1', b"a, b\t1").replace(b"prompt,", b"prompt\t")
         .replace(b'""",2', b'"""\t2')),
        ("a.parquet", parquet()), ("a.arrow", arrow(True)), ("b.arrow", arrow(False)),
    ],
    ids=shown,
)  # fmt: skip
def test_a_file_of_each_kind_has_the_same_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert fields(tmp_path / name) == ROWS


def test_patterns_directories_and_saved_datasets(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "note.md"):
        (folder / name).write_bytes(gzip.compress(LINES) if name.endswith(".gz") else LINES)
    found = sources.read_rows(DataConfig(), f"{folder}/*")
    assert [row.fields for row in found.rows] == ROWS * 2
    assert found.rows[0].name == f"{folder}/a.jsonl.gz:1"
    with pytest.raises(ValueError, match=r"no dataset file is like .*x-"):
        fields(f"{folder}/x-*.jsonl")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert fields(tmp_path / "saved") == ROWS
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:1]),
                                   "test": datasets.Dataset.from_list(ROWS[1:])})  # fmt: skip
    splits.save_to_disk(str(tmp_path / "splits"))
    assert fields(tmp_path / "splits", dataset_split="test") == ROWS[1:]


def test_files_of_a_directory_that_are_not_read_are_named(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    assert fields(tmp_path) == ROWS * 2
    assert "not read" not in caplog.text
    (tmp_path / "c.csv").write_bytes(TABLE)
    assert fields(tmp_path) == ROWS * 2
    assert f"1 files of the directory {tmp_path} are not read, such as {tmp_path}/c.csv" in (
        caplog.text
    )


def test_a_part_of_what_has_no_splits_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    splits.save_to_disk(str(tmp_path / "splits"))
    for name in ("a.jsonl", "saved"):
        with pytest.raises(ValueError, match=r"the split 'train\[:1\]' takes some of the rows"):
            fields(tmp_path / name, dataset_split="train[:1]")
    assert fields(tmp_path / "splits", dataset_split="train[:1]") == ROWS[:1]


def test_cells_of_a_table_may_be_long(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\na," + "x" * 300_000 + "\n")
    assert fields(tmp_path / "a.csv") == [{"prompt": "a", "completion": "x" * 300_000}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b,a\n1,2,3\n", "has the column 'a' more than once"),
        ("a.txt", LINES, "is of an unknown kind; its name must end in one of .jsonl, .json, .csv"),
        ("a.jsonl.gz", LINES, "is damaged"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], "is damaged"),
        ("a.jsonl.zst", LINES, "is damaged"),
        ("a.json", b'[{"a": 1},', "is neither an array of objects nor one object a line"),
        ("a.json", b"[" * 100_000, "too many brackets in each other"),
        ("a.json", b'{"data": 3}', "is one object without a list data"),
        ("a.arrow", b"none", "is not an Arrow file"),
        ("a.csv", b"a,b\n\xff,2\n", "is no table of texts"),
    ],
    ids=shown,
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        fields(tmp_path / name)


def test_rows_that_cannot_be_read_are_rejected_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"a":' * 100_000 + b"\n")
    (tmp_path / "b.csv").write_bytes(TABLE + b"only one\n")
    (tmp_path / "c.json").write_text(json.dumps([*ROWS, 3]))
    found = sources.read_rows(
        DataConfig(max_rejected_frac=0.9), f"{tmp_path}/a.jsonl,{tmp_path}/b.csv,{tmp_path}/c.json"
    )
    assert [row.fields for row in found.rows] == ROWS * 3
    first, second, third = found.rejected
    assert "a.jsonl:3: is not JSON (too many brackets in each other)" in first
    assert "b.csv:3: has another number of cells" in second
    assert "c.json[3]: is a JSON int" in third


def test_names_tell_kinds():
    assert row_files.is_known("x/A.CSV.gz")
    assert not row_files.is_known("x/a.parquet.gz")
    assert not row_files.is_known("owner/name")
