"""Answers of the kinds that models write, marked and unmarked, with the verdict of a reader.

`model_answers.jsonl` measures the rules; no rule may be made for the text of a line. What is still
refused stays in the file.
"""

import json
import pathlib
import time

import pytest

from atlas_jax.rewards.answers import extract_answer, is_correct

ROWS = [
    json.loads(line)
    for line in pathlib.Path(__file__).with_name("model_answers.jsonl").read_text().splitlines()
]
MIN_RIGHT_FRAC = 0.97


def test_most_verdicts_are_right_and_no_wrong_answer_is_taken():
    rows = [row for row in ROWS if not row["contested"]]
    assert len(rows) > 600
    wrong = [row for row in rows if is_correct(row["text"], row["truth"]) is not row["right"]]
    assert not [row for row in wrong if not row["right"]]
    assert len(wrong) <= (1 - MIN_RIGHT_FRAC) * len(rows), wrong


@pytest.mark.parametrize("part", [
    "a ", "1 ", "1, ", "of 1 ", "1 of the ", "to be 1 ", "1 to be 1 ", "x = 1 or ", "1! ", "| 1 ",
    "1 hour 1 minute ", "not 1 ", "(1, ", "f(x) (1) ", "1 because 1, ", "need 1 to be 1 ",
    "May 1, 2020 ",
    "x = ", "≈ 1 ", "is 1 ", "1 is not ", "$1$ or ", "$x$ ", "**1** ", "and ", "is a is ",
])  # fmt: skip
def test_prose_of_any_length_is_read_in_linear_time(part):
    start = time.process_time()
    extract_answer(part * (80_000 // len(part)) + "1")
    assert time.process_time() - start < 10  # minutes, if it were quadratic
