"""GRPO with judges whose server is killed: the run waits, or stops with a checkpoint."""

import json
import os
import re
import signal
import subprocess
import time

import numpy as np
import pytest

from tests import judge_server, words
from tests.e2e import test_grpo

STEPS = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model, and more questions than a step asks."""
    directory = tmp_path_factory.mktemp("inputs")
    words.save(directory / "model", (*test_grpo.QUESTIONS, "answer", "hint", "plan"))
    lines = [json.dumps({"question": q, "answer": "1"}) for q in test_grpo.QUESTIONS]
    (directory / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def start(inputs, output, port, waits):
    """Starts a run of three steps with `mixed` reward and the offline judges."""
    command = test_grpo.command(inputs, output, "teaching", devices=1)
    url = f"http://127.0.0.1:{port}/v1"
    values = {
        "max_steps": STEPS, "save_steps": 0, "sync_ref_model": False, "num_iterations": 1,
        "reward.kind": "mixed", "reward.weights": "(1.0, 0.5)", "reward.retry_waits_secs": waits,
        "reward.rim.small_model.base_url": url, "reward.rim.small_model.model": "agreeing",
        "reward.rim.large_model.base_url": url, "reward.rim.large_model.model": "large",
        "reward.rim.small_model.api_key_env": "", "reward.rim.large_model.api_key_env": "",
        "reward.rim.limits.max_tries": 1, "reward.rim.cache_dir": output / "judges",
        "rollout.missing_teaching": "whole",  # otherwise what is no lesson is scored without judges
    }  # fmt: skip
    command["args"][3] += ":rim=rim_offline_config"
    command["args"] += [f"--config.{k}={v}" for k, v in values.items()]
    return subprocess.Popen(**command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(output, text, process, count=1):
    """Waits until the log has a regular expression so often."""
    log = output / "training.log"
    for _ in range(6000):
        if log.exists() and len(re.findall(text, log.read_text())) >= count:
            return
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.05)
    raise AssertionError(f"{text!r} did not come: {log.read_text()[-3000:]}")


def checkpoints(output):
    return sorted(int(path.name) for path in (output / "checkpoints").iterdir())


def test_a_run_outlives_its_judges(inputs, tmp_path):
    with judge_server.running() as server:
        # The judges die for good: the run stops with what it has learned.
        process = start(inputs, tmp_path, server.port, "(0.2, 0.2)")
        wait_for(tmp_path, "step 1/3", process)
        server.kill()
        error = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    # All that have a lesson: an empty one is worth 0 without a judge.
    assert re.search(r"1[3-6] of 16 samples could not be scored", error)
    (saved,) = checkpoints(tmp_path)
    assert saved in (1, 2)

    # Still dead: the run waits, and a signal ends it at once.
    process = start(inputs, tmp_path, server.port, "(600.0,)")
    wait_for(tmp_path, r"asking again for 1[3-6] of them in 600 s", process)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) is not None
    assert process.returncode == 75
    assert checkpoints(tmp_path) == [saved]
    assert not (tmp_path / "final").exists()

    # The judges come back while it waits: nothing is lost.
    waits = "(" + "0.5, " * 600 + ")"
    process = start(inputs, tmp_path, server.port, waits)
    wait_for(tmp_path, r"asking again for 1[3-6] of them in 0\.5 s", process)
    with judge_server.running(server.port):
        error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error[-3000:]
    check(tmp_path)


def test_nothing_that_a_run_writes_shows_the_password_of_a_judge(inputs, tmp_path):
    with judge_server.running() as server:
        command = test_grpo.command(inputs, tmp_path / "run", "teaching", devices=1)
        url = f"http://judge:hush%2Fhush@127.0.0.1:{server.port}/v1"
        values = {
            "max_steps": 1, "sync_ref_model": False, "num_iterations": 1, "reward.kind": "rim",
            "reward.names": "('teaching_gain',)", "reward.weights": "()",
            "reward.rim.small_model.base_url": url, "reward.rim.small_model.model": "any",
            "reward.rim.large_model.base_url": url, "reward.rim.large_model.model": "never 500",
            "reward.rim.variance_threshold": 0.0, "reward.rim.limits.max_tries": 1,
            "reward.rim.cache_dir": "",
        }  # fmt: skip
        command["args"][3] += ":rim=rim_offline_config"
        command["args"] += [f"--config.{k}={v}" for k, v in values.items()]
        result = subprocess.run(**command, capture_output=True, text=True, check=False)
        assert server.stats()["keys"] == ["Basic anVkZ2U6aHVzaC9odXNo"]  # judge:hush/hush
    assert result.returncode == 0, result.stderr[-3000:]
    written = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    texts = b"".join(written.values()) + (result.stdout + result.stderr).encode()
    assert f"http://***@127.0.0.1:{server.port}/v1/chat/completions: 500".encode() in texts
    assert b"hush" not in texts


def check(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/total" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        samples = test_grpo.samples(output, line["step"])
        assert len(samples) == test_grpo.PER_STEP
        scores = {"helpfulness": [], "process": []}
        for sample in samples:
            gain, rim = (sample["reward_details"][name] for name in ("teaching_gain", "rim"))
            # Before a lesson that gives the answer away is priced.
            own = sample["reward_details"].get("own_value", sample["reward"])
            assert own == pytest.approx(gain["value"] + 0.5 * rim["value"])
            assert sample["completion"]["weights_version"] == line["step"] - 1
            for name, judge in rim["judges"].items():
                is_heard = judge["rationale"].startswith("because of")
                assert is_heard == bool(sample["teaching"])
                assert (judge["score"] > 0) == is_heard
                scores[name].append(judge["score"])
        assert line["reward/failed_frac"] == 0
        assert line["reward/mean"] == pytest.approx(np.mean([s["reward"] for s in samples]))
        assert line["reward/rim"] == pytest.approx(
            np.mean([s["reward_details"]["rim"]["value"] for s in samples])
        )
        for name, given in scores.items():
            assert line[f"rim_rewards/{name}"] == pytest.approx(np.mean(given))
        assert line["reward/calls"] * len(samples) == pytest.approx(
            sum(s["reward_details"]["rim"]["calls"] for s in samples)
        )
        for name in ("escalated_frac", "disagreement", "cache_hit_frac", "tokens"):
            assert line[f"reward/{name}"] >= 0
        assert line["reward/cost"] is None  # a server of one's own does not have Gemini's prices
    account = json.loads((output / "judges_spent_process_0.json").read_text())
    assert account["cost"] is None
    assert account["calls"] >= sum(line["reward/calls"] * test_grpo.PER_STEP for line in steps)
    assert (output / "final" / "model.safetensors").stat().st_size
    assert os.listdir(output / "judges")
