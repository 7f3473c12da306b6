"""Rows of a user's function."""

import dataclasses
import itertools
import time

import pytest

from atlas_jax import config as config_lib
from atlas_jax.config import DataConfig
from atlas_jax.data import row_checks, row_functions, sources

MODULE = """
def rows():
    for i in range(3):
        yield {"question": f"q{i}", "answer": str(i), "tests": [{"x": i}]}

def listed():
    return list(rows())

def parted(split):
    return list(rows())[:2] if split == "train" else iter([{"question": "held out", "answer": "1"}])

def alone(split="train"):
    return list(rows()) if split == "train" else None

def broken():
    yield {"question": "q"}
    raise KeyError("gone")

def failing():
    return 1 / 0

def mixed():
    yield from rows()
    yield [1]
    yield {1: "a"}

def empty():
    return []

def single():
    return {"question": "q"}

def needy(path):
    return []

async def later():
    return []
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    name = f"my_rows_{time.monotonic_ns()}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def config(module, name, **options):
    return DataConfig(source=f"{module}:{name}", **options)


@pytest.mark.parametrize("name", ["rows", "listed", "alone"])
def test_rows_are_those_of_the_function_with_names_and_objects(module, name):
    rows, held_out = sources.load_rows(config(module, name), seed=0)
    where = f"{module}:{name}" + ("(train)" if name == "alone" else "")
    assert [row.name for row in rows.rows] == [f"{where}[{i}]" for i in (1, 2, 3)]
    assert rows.rows[2].fields == {"question": "q2", "answer": "2", "tests": [{"x": 2}]}
    assert held_out is None and not rows.rejected


def test_a_function_with_splits_has_rows_to_evaluate_on(module):
    rows, held_out = sources.load_rows(config(module, "parted", eval_split_ratio=0.5), seed=0)
    assert len(rows.rows) == 2
    assert [row.fields["question"] for row in held_out.rows] == ["held out"]
    read = sources.read_rows(config(module, "parted"), f"{module}:parted")
    assert [row.fields["question"] for row in read.rows] == ["held out"]
    assert len(sources.read_rows(config(module, "rows"), f"{module}:rows").rows) == 3


def test_without_a_split_for_evaluation_the_ratio_holds(module):
    rows, held_out = sources.load_rows(config(module, "alone", eval_split_ratio=0.34), seed=0)
    assert (len(rows.rows), len(held_out.rows)) == (2, 1)


def test_what_is_no_dict_is_rejected_and_counted(module):
    with pytest.raises(ValueError, match=r"2 of 5 dataset rows cannot be used") as error:
        sources.load_rows(config(module, "mixed"), seed=0)
    assert f"{module}:mixed[4]: is a list; yield a dict" in str(error.value)
    assert "mixed[5]: has the key 1; use texts as keys" in str(error.value)
    rows, _ = sources.load_rows(config(module, "mixed", max_rejected_frac=0.5), seed=0)
    assert (len(rows.rows), len(rows.rejected)) == (3, 2)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("broken", r"broken: its row 2 fails with KeyError: 'gone' \(my_rows_\d+.py:17\)$"),
        ("failing", r"failing fails with ZeroDivisionError: .* \(my_rows_\d+.py:20\)$"),
        ("single", "single returns a dict; return an iterable of dicts"),
        ("needy", r"needy takes \(path\); write a plain function without parameters"),
        ("later", "later is async; write a plain function"),
        ("gone", "has no gone"),
    ],
)  # fmt: skip
def test_errors_of_the_function_are_told_in_one_line(module, name, told):
    with pytest.raises(ValueError, match=rf"^data.source={module}:.*{told}") as error:
        sources.load_rows(config(module, name), seed=0)
    assert "\n" not in str(error.value)


def test_no_rows_are_refused(module):
    with pytest.raises(ValueError, match=f"dataset '{module}:empty' has no rows"):
        sources.load_rows(config(module, "empty"), seed=0)


def test_the_check_reads_no_more_of_a_generator_than_it_must(module):
    seen = []

    def use(row):
        seen.append(row.fields["question"])

    row_checks.check_function(f"{module}:broken", use)
    assert seen == ["q"]
    assert list(itertools.islice(row_functions.read(f"{module}:broken", "train"), 1))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dataset_path": "d.jsonl"}, r"data.dataset_path and data.source are all set; leave one"),
        ({"source": ""}, r"data.dataset_path, data.db_url and data.source are empty; set one"),
        ({"format": "session"}, r"data.source=m:f gives rows, and data.format=session is read"),
    ],
)
def test_there_is_one_source_of_rows(changes, told):
    data = dataclasses.replace(DataConfig(source="m:f"), **changes)
    options = config_lib.SFTConfig(model_name_or_path="m", output_dir="o", data=data)
    with pytest.raises(ValueError, match=told):
        config_lib.validate(options)
