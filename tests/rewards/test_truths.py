"""Ground truths tried against themselves at the start of a run."""

import dataclasses
import json

import pytest

from atlas_jax.config import GRPOConfig
from atlas_jax.recipes import grpo
from atlas_jax.rewards.truths import check_truths
from atlas_jax.types import Question

GOOD = [
    "5", "$1,000", "(B) Paris", "B", "yes", "9 * 2\n#### 18", r"\frac{\sqrt{3}}{2}", "[1, 2)",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "May 1, 2021", "C. elegans", "a == b", "5!",
    "word " * 60 + r"so \boxed{7}",
]  # fmt: skip
BAD = ["$", "...", "She has 3.\nShe buys 4.\nA: 18", "A proof: " + "word " * 60]


def questions(*truths):
    return [Question(f"q{i}", "?", truth, {}) for i, truth in enumerate(truths)]


def test_truths_that_no_answer_can_match_are_counted_and_named(caplog):
    lost = check_truths(questions(*GOOD, " ", *BAD))
    assert [q.ground_truth for q in lost] == BAD
    (line,) = (r.getMessage() for r in caplog.records if "ground truths" in r.getMessage())
    assert line.startswith(f"4 of {len(GOOD) + 4} ground truths can be matched by no answer")
    assert "q15: '$'; q16: '...'; q17: 'She has 3. She buys 4. A: 18'" in line


def test_truths_that_can_be_matched_are_not_mentioned(caplog):
    assert check_truths(questions(*GOOD)) == []
    assert "ground truths" not in caplog.text


def test_a_run_whose_truths_can_all_not_be_matched_stops(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"id": f"row {i}", "question": "2+2?", "answer": "$"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = GRPOConfig()
    data = dataclasses.replace(config.data, dataset_path=str(path), eval_split_ratio=0.0)
    reward = dataclasses.replace(config.reward, kind="rule")
    config = dataclasses.replace(config, data=data, reward=reward, output_dir=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"^3 of 3 ground truths can be matched by no answer.*row 0"
    ):
        grpo._questions(config)
