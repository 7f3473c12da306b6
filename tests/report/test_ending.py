"""The end of a run in the terminal."""

import json
import math

import pytest

from atlas_jax import ranges
from atlas_jax.report import ending, guide, page, run_files
from tests.report import runs


def lines_of(caplog, level):
    return [r.getMessage() for r in caplog.records if r.levelname == level]


def test_the_end_judges_the_last_steps_and_not_the_last_one(tmp_path, caplog):
    """Of ten steps the last five count: non-degradation 0.6 on average, 1.0 in the last one."""
    run = runs.finished(runs.grpo(tmp_path / "run"))
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, value in zip(lines[-5:], (0.5, 0.5, 0.5, 0.5, 1.0), strict=True):
        line["teaching/non_degradation_rate"] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with caplog.at_level("INFO", logger="absl"):
        ending.show(str(run), False)
    (text,) = lines_of(caplog, "INFO")
    rows = {line[8:].partition(":")[0]: line[:8].split()[0] for line in text.splitlines()
            if line.startswith(("ok", "near", "missed", "-"))}  # fmt: skip
    assert rows == {
        "mean reward": "ok", "non-degradation": "missed", "KL from the reference": "ok",
        "right answers, taught less alone": "ok", "share of answer tokens saved": "ok",
        "answers that end": "ok",
    }  # fmt: skip
    assert "non-degradation: 0.6\n" in text
    assert "goal: above 0.95 (warning below 0.90); mean of the last 5 steps" in text
    assert text.endswith(f"model: {run}/final")
    assert max(map(len, text.splitlines()[:-1])) <= 80
    assert lines_of(caplog, "WARNING") == []


def test_held_out_questions_count_before_those_of_training(tmp_path):
    run = runs.finished(runs.grpo(tmp_path / "run"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10, "eval/accuracy_delta": -0.1,
                               "eval/non_degradation_rate": 0.92}) + "\n")  # fmt: skip
    verdict = guide.judge(run_files.read(str(run)))
    rows = {row.name: (row.reached, row.status, row.basis) for row in verdict.criteria}
    basis = "held-out questions at step 10"
    assert rows["non-degradation"] == ("0.92", "near", basis)
    assert rows["right answers, taught less alone"] == ("-10.0 points", "missed", basis)
    assert verdict.sentence.startswith("The lessons do not help so far")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reward/zero_std_group_frac", "the rewards of every group are equal"),
        ("teaching/missing_frac", "no text has a lesson"),
        ("rollout/truncated_frac", "every completion is cut by its limit"),
        ("reward/failed_frac", "no sample has a score"),
    ],
)
def test_where_nothing_was_learned_the_end_and_the_page_say_so(tmp_path, caplog, name, words):
    run = runs.finished(runs.grpo(tmp_path / "run"))
    path = run / "metrics.jsonl"
    lines = [json.loads(line) | {name: 1.0} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ending.show(str(run), False)
    (warning,) = lines_of(caplog, "WARNING")
    assert warning.startswith(f"nothing is learned: {words} ({name} is 1 in the last steps, above")
    assert warning.count("; ") == 1, "what to do follows"
    log = (run / "training.log").read_text()
    assert f"WARNING {warning}\n" in log and "INFO finished\n" in log
    shown = page.make([str(run)])
    assert shown.count(f"nothing is learned: {words}") == 1, "though the log has it too"
    some = [line | {name: 0.1} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in some))
    caplog.clear()
    ending.show(str(run), False)
    assert lines_of(caplog, "WARNING") == []


def test_the_end_is_a_line_of_json_too(tmp_path, capsys):
    run = runs.finished(runs.sft(tmp_path / "run"))
    ending.show(str(run), True)
    values = json.loads(capsys.readouterr().out)
    assert values["step"] == 20 and values["model"] == f"{run}/final"
    assert [(row["name"], row["status"]) for row in values["criteria"]] == [
        ("loss", "reached"), ("gradient norm", "reached")
    ]  # fmt: skip
    assert values["warnings"] == []


def test_an_evaluation_of_the_model_before_does_not_count(tmp_path, caplog):
    run = runs.evaluated(runs.finished(runs.grpo(tmp_path / "run")))
    with caplog.at_level("INFO", logger="absl"):
        ending.show(str(run), False)
    assert "evaluation of" not in lines_of(caplog, "INFO")[0]


def test_a_run_does_not_fail_for_its_verdict(tmp_path, caplog):
    ending.show(str(tmp_path / "nowhere"), False)
    assert not (tmp_path / "nowhere").exists()
    (warning,) = lines_of(caplog, "WARNING")
    assert warning.startswith("no verdict on this run: ValueError")


def test_a_run_without_a_reward_is_judged_by_its_loss_whatever_evaluation_is_beside_it(tmp_path):
    """Of a model that answers alone an evaluation has its right answers and no gain."""
    run = runs.evaluated(runs.sft(tmp_path / "run"))
    path = tmp_path / "evaluation.json"
    report = json.loads(path.read_text())
    for teacher in report["teachers"]:
        teacher["metrics"] = {"accuracy": {"value": 0.5, "low": 0.3, "high": 0.7}}
    path.write_text(json.dumps(report))
    verdict = guide.judge(run_files.read(str(run)))
    assert verdict.sentence.endswith("below the 1.5 of the guide.")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"algorithm": "gkd"}))
    verdict = guide.judge(run_files.read(str(run)))
    assert verdict.sentence.endswith("from the teacher's distribution.")


def test_distillation_learns_from_completions_that_are_cut():
    values = {"rollout/truncated_frac": 1.0}
    (fault,) = ranges.faults(lambda name: values.get(name, math.nan))
    assert fault.learns_nothing
    values["distillation/own_frac"] = 0.5
    (fault,) = ranges.faults(lambda name: values.get(name, math.nan))
    assert not fault.learns_nothing
