"""Agreement worked by hand, and the tool that reports it for an export."""

import json
import subprocess
import sys

import pytest

from atlas_jax.rewards.agreement import auc, calibration, pearson, report, spearman
from tests import judge_server


def test_correlations_are_those_worked_by_hand():
    # deviations -1, 0, 1 and -2, 1, 1: covariance 3, squares 2 and 6
    assert pearson([1.0, 2.0, 3.0], [0.0, 3.0, 3.0]) == pytest.approx(3 / 12**0.5)
    # ranks 1, 2, 3 and 1, 2.5, 2.5: covariance 1.5, squares 2 and 1.5
    assert spearman([1.0, 2.0, 30.0], [0.0, 3.0, 3.0]) == pytest.approx(1.5 / 3**0.5)
    assert spearman([0.1, 0.2, 0.9], [5.0, 3.0, 1.0]) == pytest.approx(-1.0)


def test_pairs_of_which_one_side_is_unknown_are_left_out():
    assert pearson([1.0, None, 2.0, 3.0, 9.0], [0.0, 7.0, 3.0, 3.0, None]) == pearson(
        [1.0, 2.0, 3.0], [0.0, 3.0, 3.0]
    )


def test_what_cannot_be_told_is_none():
    assert pearson([0.1, 0.2], [0.1, 0.2]) is None
    assert pearson([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]) is None
    assert spearman([], []) is None
    assert auc([0.1, 0.2], [1.0, 1.0]) is None
    assert calibration([None], [1.0]) == []


def test_auc_counts_pairs_in_the_right_order():
    # of 2 x 2 pairs: 0.9 > 0.4, 0.9 > 0.6, 0.6 > 0.4, and 0.6 = 0.6 counts half
    assert auc([0.4, 0.6, 0.6, 0.9], [0.0, 0.0, 1.0, 1.0]) == pytest.approx(3.5 / 4)
    assert auc([0.9, 0.1], [0.0, 1.0]) == 0.0


def test_calibration_is_the_mean_of_each_fifth():
    bins = calibration([0.0, 0.1, 0.5, 1.0, 0.9], [0.0, 1.0, 0.25, 1.0, 0.5])
    assert [(b.low, b.high, b.num_samples) for b in bins] == [
        (0.0, 0.2, 2),
        (0.4, 0.6, 1),
        (0.8, 1.0, 2),
    ]
    assert [b.score for b in bins] == pytest.approx([0.05, 0.5, 0.95])
    assert [b.target for b in bins] == pytest.approx([0.5, 0.25, 0.75])


def test_a_reward_is_a_label_where_it_is_good():
    found = report({"score": [0.1, 0.9, 0.8]}, {"reward": [0.7, 0.8, 0.9]}, good=0.8)
    assert found["score ~ reward"]["auc"] == 1.0
    assert found["score ~ reward"]["pairs"] == 3


def session(number, reward):
    """A session as the runtime exports it; its reward has a judge of its own."""
    judge = {"identifier": "session_reward", "score": reward / 2, "rationale": "so"}
    attempt = {
        "evaluation": {"validation": {"text": f"try {number}", "guidance": f"look at {number}"}}
    }
    return {
        "task": f"task {number}",
        "final_answer": f"answer {number}",
        "plan": {"steps": [{"id": 1, "description": "do it"}]},
        "steps": [
            {"step_id": 1, "description": "do it", "trace": "", "output": "out", "reward": {},
             "guidance": [f"look at {number}"], "attempt_history": [attempt]}
        ],
        "session_metadata": {
            "session_id": number, "status": "succeeded" if reward > 0.5 else "failed",
            "ground_truth": f"truth {number}",
        },
        "session_reward": {"score": reward, "judges": [judge]},
        "review_status": "approved" if number % 2 else "quarantined",
    }  # fmt: skip


def test_the_tool_compares_scores_with_what_sessions_carry(tmp_path):
    lines = [json.dumps(session(i, i / 10)) for i in range(10)]
    (tmp_path / "traces.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    with judge_server.running() as server:
        (tmp_path / "mine.py").write_text(
            "def apply(config):\n"
            "    c = config.reward.rim\n"
            f"    c.small_model.base_url = c.large_model.base_url = {server.url!r}\n"
            f"    c.cache_dir = {str(tmp_path / 'cache')!r}\n"
        )
        command = [
            sys.executable, "tools/score_traces.py", "--traces", str(tmp_path / "traces.jsonl"),
            "--rim", str(tmp_path / "mine.py"), "--output", str(tmp_path / "out.json"),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "10 sessions, 1 rejected" in result.stdout
    assert "traces.jsonl:11" in result.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    judges = ["accuracy", "helpfulness", "process", "diagnostic"]
    targets = ["reward", "succeeded", "approved", "judge session_reward"]
    assert set(found["agreement"]) == {f"{a} ~ {b}" for a in ["score", *judges] for b in targets}
    rewards = [i / 10 for i in range(10)]
    for name in judges:
        scores = [row["judges"][name]["score"] for row in found["sessions"]]
        compared = found["agreement"][f"{name} ~ reward"]
        assert compared["pearson"] == pytest.approx(pearson(scores, rewards))
        assert compared["auc"] == pytest.approx(auc(scores, [float(r >= 0.8) for r in rewards]))
        assert found["agreement"][f"{name} ~ approved"]["auc"] == pytest.approx(
            auc(scores, [float(i % 2) for i in range(10)])
        )
    assert found["usage"]["calls"] > 100
    line = next(x for x in result.stdout.splitlines() if x.startswith("score ~ reward"))
    assert f"{found['agreement']['score ~ reward']['pearson']:.2f}" in line


def test_the_tool_says_what_is_wrong_in_a_line(tmp_path):
    command = [sys.executable, "tools/score_traces.py", "--traces", str(tmp_path / "absent.jsonl")]
    result = subprocess.run(
        [*command, "--rim", "configs/absent.py"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: configs/absent.py does not exist")
