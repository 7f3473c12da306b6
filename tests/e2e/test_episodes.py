"""A run of two steps in which the policy may call the calculator of the example."""

import json
import os
import subprocess
import sys

import pytest

from examples import calculator_episode
from tests import processes, words
from tests.rollout.scripts import Script
from tests.rollout.test_episodes import talk

CALL = "calc(2+3)"


def test_the_calculator_answers_until_the_policy_calls_it_no_more():
    said = {1: "I need calc(12 * 7)", 2: "and calc(1/0) too", 3: "84"}
    script = Script(lambda prompt, _: said[prompt.count("calc(") - prompt.count("calc(2") + 1])
    [sample] = talk(calculator_episode.ask, script, policy=300, prompt=200)
    assert [m["content"] for m in sample.messages][1:] == [
        "I need calc(12 * 7)", "12 * 7 = 84", "and calc(1/0) too",
        "1/0 cannot be calculated: division by zero", "84",
    ]  # fmt: skip
    assert sample.completion.text == "84"
    assert sample.facts == {"calls": 2}


@pytest.mark.parametrize("text", ["__import__('os')", "2 ** 9 ** 9", "x + 1", "2 +", "True + 'a'"])
def test_the_calculator_calculates_nothing_else(text):
    assert "cannot be calculated" in calculator_episode.calculate(text)


def test_a_run_trains_on_episodes(tmp_path):
    model = words.save(
        tmp_path / "model", (CALL, "q0", "q1", "2+3", "=", "answer"), max_position_embeddings=128
    )
    lines = [json.dumps({"question": f"q{i}", "answer": str(i)}) for i in range(2)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "model_name_or_path": model, "output_dir": tmp_path / "out",
        "data.dataset_path": tmp_path / "questions.jsonl",
        "data.eval_path": tmp_path / "questions.jsonl", "data.system_prompt": "",
        "rollout.protocol": "examples.calculator_episode:ask", "rollout.max_turns": 3,
        "max_prompt_length": 24, "max_new_tokens": 24, "max_seq_length": 96,
        "data.length_buckets": "(96,)", "num_generations": 4, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "train_batch_size": 0, "max_steps": 2, "beta": 0.0,
        "learning_rate": 1e-3, "warmup_ratio": 0.0, "save_steps": 0, "eval_steps": 2,
        "top_p": 1.0, "temperature": 1.0,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    result = subprocess.run(
        [sys.executable, "-m", "atlas_jax.train", "--config=rlvr_gsm8k", *flags],
        env=os.environ | {"XLA_FLAGS": processes.xla_flags(1), "ATLAS_TRACEBACK": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    steps = [m for m in map(json.loads, lines) if "loss/total" in m]
    assert len(steps) == 2
    for metrics in steps:
        assert metrics["rollout/turns"] > 1
        assert metrics["rollout/observed_tokens"] > 0
        assert abs(metrics["rollout/mismatch_kl"]) < 1e-6
    written = [
        json.loads(line)
        for path in (tmp_path / "out" / "rollouts").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert len(written) == 16
    for sample in written:
        completion = sample["completion"]
        turns = [m for m in sample["messages"] if m["role"] == "assistant"]
        assert 1 <= len(turns) <= 3
        assert completion["num_tokens"] <= 24
        assert sum(completion["sampled"]) == completion["num_sampled"] > 0
    assert any(sample["facts"].get("calls") for sample in written)
