"""Reading, rejecting, drawing and splitting rows."""

import dataclasses
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from atlas_jax import config as config_lib
from atlas_jax.config import DataConfig
from atlas_jax.configs.run import rlvr_gsm8k
from atlas_jax.data import examples, questions, sources

CONFIG = DataConfig()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count):
    return [{"prompt": f"{i}", "completion": "x"} for i in range(count)]


def prompts(rows):
    return [row.fields["prompt"] for row in rows.rows]


def test_jsonl_rows_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "train.jsonl"
    # U+2028 ends a line for str.splitlines, but not in a JSON string.
    path.write_bytes('{"a": "é\u2028"}\r\n\n{"a": 2}'.encode())
    rows = sources.read_rows(CONFIG, str(path))
    assert rows.rows == [
        sources.Row(f"{path}:1", {"a": "é\u2028"}),
        sources.Row(f"{path}:3", {"a": 2}),
    ]
    assert rows.rejected == []


def test_parquet_holds_the_same_rows_as_jsonl(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "é 😀"}, {"role": "assistant", "content": "x"}]}
    ] * 3
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    parquet = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet, row_group_size=2)
    from_jsonl = sources.read_rows(CONFIG, jsonl).rows
    from_parquet = sources.read_rows(CONFIG, parquet).rows
    assert [r.fields for r in from_jsonl] == [r.fields for r in from_parquet] == rows
    assert [r.name for r in from_parquet] == [f"{parquet}:{i}" for i in (1, 2, 3)]


def test_several_paths_are_read_one_after_the_other(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", numbered(2))
    b = write_jsonl(tmp_path / "b.json", numbered(1))
    assert prompts(sources.read_rows(CONFIG, f"{a}, {b}")) == ["0", "1", "0"]


@pytest.mark.parametrize("path", ["none.jsonl", "none.parquet", "./none", "/none/such", "a/b/c"])
def test_missing_file_is_an_error_and_no_hub_look_up(path):
    with pytest.raises(ValueError, match=rf"dataset file {path} does not exist; relative paths"):
        sources.read_rows(CONFIG, path)


def test_file_of_an_unknown_kind_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"a\.txt is of an unknown kind.*\.jsonl, \.json, \.csv"):
        sources.read_rows(CONFIG, str(tmp_path / "a.txt"))


def test_broken_parquet_file_is_an_error(tmp_path):
    (tmp_path / "a.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file"):
        sources.read_rows(CONFIG, str(tmp_path / "a.parquet"))


def test_dataset_without_rows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no rows"):
        sources.read_rows(CONFIG, write_jsonl(tmp_path / "a.jsonl", []))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": ', "is not JSON .*each line must be one JSON object"),
        ("[1]", "is a JSON list, not an object"),
        ("null", "is a JSON NoneType, not an object"),
    ],
)
def test_malformed_line_stops_with_file_and_line(tmp_path, line, reason):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"1 of 2 dataset rows .*\n.*train\.jsonl:2: {reason}"):
        sources.read_rows(CONFIG, str(path))


def test_line_that_is_not_utf8_is_rejected_with_its_name(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:1: is not JSON \('utf-8' codec"):
        sources.read_rows(CONFIG, str(path))


def test_few_malformed_lines_are_counted_and_named(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", numbered(3))
    with open(path, "a") as file:
        file.write("oops\n")
    rows = sources.read_rows(dataclasses.replace(CONFIG, max_rejected_frac=0.25), path)
    assert len(rows.rows) == 3
    assert len(rows.rejected) == 1
    assert rows.rejected[0].startswith(f"{path}:4: is not JSON")


def test_only_the_first_rejected_rows_are_shown():
    rejected = [f"f:{i}: bad" for i in range(7)]
    with pytest.raises(ValueError, match=r"7 of 9 (.|\n)*f:4: bad\n  and 2 more\nrepair") as error:
        sources.check_rejected(rejected, 9, 0.5)
    assert "f:5" not in str(error.value)


def test_drawn_rows_keep_their_order_and_follow_the_seed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", numbered(50))
    config = dataclasses.replace(CONFIG, dataset_path=path, dataset_max_samples=10)
    first, again, other = (sources.load_rows(config, seed)[0] for seed in (1, 1, 2))
    assert len(first.rows) == 10
    assert first == again
    assert prompts(first) == sorted(prompts(first), key=int)
    assert prompts(first) != prompts(other)


@pytest.mark.parametrize(("ratio", "num_eval"), [(0.2, 4), (0.001, 1), (0.99, 19)])
def test_split_is_disjoint_complete_and_follows_the_seed(tmp_path, ratio, num_eval):
    path = write_jsonl(tmp_path / "a.jsonl", numbered(20))
    config = dataclasses.replace(CONFIG, dataset_path=path, eval_split_ratio=ratio)
    train, evaluation = sources.load_rows(config, 1)
    assert len(evaluation.rows) == num_eval
    assert sorted(prompts(train) + prompts(evaluation), key=int) == [str(i) for i in range(20)]
    assert sources.load_rows(config, 1) == (train, evaluation)
    assert any(sources.load_rows(config, seed)[1] != evaluation for seed in (2, 3))


def test_split_of_one_row_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", numbered(1))
    config = dataclasses.replace(CONFIG, dataset_path=path, eval_split_ratio=0.5)
    with pytest.raises(ValueError, match="cannot divide 1 row"):
        sources.load_rows(config, 1)


def test_eval_path_takes_precedence_over_the_ratio(tmp_path):
    config = dataclasses.replace(
        CONFIG,
        dataset_path=write_jsonl(tmp_path / "a.jsonl", numbered(4)),
        eval_path=write_jsonl(tmp_path / "b.jsonl", numbered(2)),
        eval_split_ratio=0.5,
    )
    train, evaluation = sources.load_rows(config, 1)
    assert (len(train.rows), len(evaluation.rows)) == (4, 2)


def test_no_evaluation_rows_unless_asked_for(tmp_path):
    config = dataclasses.replace(
        CONFIG, dataset_path=write_jsonl(tmp_path / "a.jsonl", numbered(2))
    )
    assert sources.load_rows(config, 1)[1] is None


def test_folder_of_files_is_read_through_datasets(tmp_path):
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", numbered(3))
    folder = str(tmp_path / "folder")
    rows = sources.read_rows(CONFIG, folder).rows
    assert [row.name for row in rows] == [f"{folder}[train]:{i}" for i in (1, 2, 3)]
    assert [row.fields for row in rows] == numbered(3)


def test_the_gsm8k_recipe_finds_its_two_files(tmp_path, monkeypatch):
    """A single file has the split `train` alone, whatever `data.eval_split` says."""
    recipe = config_lib.freeze(rlvr_gsm8k.get_config())
    folder = tmp_path / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    for name, count in (("train", 3), ("test", 2)):
        rows = [{"question": f"{name} {i}?", "answer": f"so\n#### {i}"} for i in range(count)]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / f"{name}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    assert recipe.data.eval_split == "test"
    train, held_out = sources.load_rows(recipe.data, recipe.seed)
    assert [row.fields["question"] for row in train.rows] == ["train 0?", "train 1?", "train 2?"]
    assert [row.fields["question"] for row in held_out.rows] == ["test 0?", "test 1?"]
    assert held_out.rows[0].name == f"{recipe.data.eval_path}[train]:1"
    config = dataclasses.replace(recipe.data, dataset_split="validation")
    assert sources.load_rows(config, recipe.seed) == (train, held_out)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "some of them with .gz or .zst behind; give the file itself"),
        ({"README.txt": "hi"}, "holds no file that ends in .jsonl, .json, .csv, .tsv, .parquet, "),
        ({"a.jsonl": '{"prompt": '}, "split 'train', cannot be loaded (JSON parse error: "),
    ],
)
def test_folder_that_cannot_be_read_is_one_line(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        sources.read_rows(CONFIG, str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["questions", "lessons", "session"])
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_column_that_is_named_as_a_part_of_sessions_is_a_column(tmp_path, name, kind):
    rows = [row | {name: "a text"} for row in numbered(2)]
    path = write_jsonl(tmp_path / "a.jsonl", [row | {"answer": "1"} for row in rows])
    found = sources.read_rows(CONFIG, path)
    if kind == "sft":
        unfolded = sources.unfold(found, "lessons")
        assert [s.completion for s in examples.parse_rows(unfolded, CONFIG).samples] == ["x", "x"]
    else:
        asked = questions.parse_questions(found, 0.0, True, (name,))
        assert [(q.text, q.fields[name]) for q in asked] == [("0", "a text"), ("1", "a text")]


def test_split_that_a_hub_dataset_lacks_is_an_error(tmp_path):
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", numbered(3))
    config = dataclasses.replace(CONFIG, dataset_split="nosuch")
    with pytest.raises(ValueError, match=r"split 'nosuch', cannot be loaded .*data\.dataset_split"):
        sources.read_rows(config, str(tmp_path / "folder"))
