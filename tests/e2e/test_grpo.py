"""Whole GRPO runs of `python -m atlas_jax.train` in their own processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from atlas_jax.config import GRPOConfig
from atlas_jax.recipes import grpo, local_backend
from atlas_jax.startup.compute import Compute
from tests import processes, words

STEPS = 8
GENERATIONS = 4
PER_STEP = 16  # completions
QUESTIONS = tuple(f"q{i}" for i in range(8))
FILES = {"teaching": "quickstart_grpo", "direct": "rlvr_gsm8k"}
OPTIONS = {
    "teaching": {
        "data.teacher_template": "{question} plan {approach}",
        "rollout.student_baseline_template": "{question} answer",
        "rollout.student_diagnostic_template": "{question} plan",
        "rollout.student_with_teaching_template": "{question} hint {teaching} answer",
        "rollout.missing_teaching": "whole", "rollout.max_answer_tokens": 4,
        "max_probe_tokens": 3, "beta": 0.04, "sync_ref_model": True,
        "ref_model_sync_steps": 1, "num_iterations": 2, "data.eval_path": "",
        "loss_type": "grpo", "rollout.student_temperature": -1.0,
        "reward.efficiency_weight": 1.0, "reward.answer_leak_penalty": 0.5,
        "reward.missing_lesson_penalty": 0.0,
    },
    "direct": {"rollout.direct_template": "{question} answer", "beta": 0.0},
}  # fmt: skip
COMMON_METRICS = (
    "loss/total", "loss/policy", "policy/entropy", "policy/clip_frac", "policy/ratio_mean",
    "rollout/mismatch_kl", "rollout/importance_weight", "rollout/completion_tokens",
    "rollout/prompt_tokens", "rollout/truncated_frac", "rollout/failed_frac",
    "rollout/text_repeat_frac", "reward/mean", "reward/std", "reward/failed_frac",
    "reward/zero_std_group_frac", "optim/grad_norm", "optim/learning_rate", "perf/step_secs",
    "perf/generate_secs", "perf/score_secs", "perf/logprobs_secs", "perf/wait_secs",
    "rollout/version_lag_max",
    "perf/tokens_per_sec_per_device",
)  # fmt: skip
METRICS = {
    "teaching": (
        "loss/kl", "policy/kl", "teaching/student_accuracy", "teaching/baseline_accuracy",
        "teaching/accuracy_delta", "teaching/improvement_rate", "teaching/degradation_rate",
        "teaching/non_degradation_rate", "teaching/completion_rate", "teaching/missing_frac",
        "teaching/response_token_reduction", "teaching/token_efficiency", "teaching/probe_tokens",
        "teaching/answer_leak_frac", "teaching/malformed_frac",
    ),
    "direct": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model, teacher and student at once, and questions with a digit as their answer."""
    directory = tmp_path_factory.mktemp("inputs")
    words.save(directory / "model", (*QUESTIONS, "answer", "hint", "plan"))
    lines = [json.dumps({"question": q, "answer": str(i % 3)}) for i, q in enumerate(QUESTIONS)]
    (directory / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def command(inputs, output, protocol, devices=2):
    """Returns the command of a run; on one device it may use programs of others."""
    values = {
        "model_name_or_path": inputs / "model", "student_model": inputs / "model",
        "output_dir": output, "data.dataset_path": inputs / "questions.jsonl",
        "data.eval_path": inputs / "questions.jsonl", "data.system_prompt": "",
        "max_prompt_length": 12, "max_new_tokens": 4, "max_seq_length": 32,
        "data.length_buckets": "(32,)", "num_generations": GENERATIONS, "temperature": 1.0,
        "top_p": 1.0, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4 // devices,
        "train_batch_size": 0,
        "learning_rate": 1e-2, "lr_scheduler_type": "linear", "warmup_ratio": 0.0,
        "max_steps": STEPS, "save_steps": 2, "save_total_limit": 2, "eval_steps": 0,
        "compilation_cache_dir": inputs / "xla", **OPTIONS[protocol],
    }  # fmt: skip
    flags = [f"--config.{k}={v}" for k, v in values.items()]
    environment = os.environ | {
        "XLA_FLAGS": processes.xla_flags(devices), "ATLAS_TRACEBACK": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    run = [sys.executable, "-m", "atlas_jax.train", f"--config=configs/run/{FILES[protocol]}.py"]
    return {"args": [*run, *flags], "env": environment}


def train(inputs, output, protocol):
    result = subprocess.run(
        **command(inputs, output, protocol), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def metrics(output):
    """The lines of `metrics.jsonl` without what a clock says."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [
        {
            name: value
            for name, value in json.loads(line).items()
            if not name.startswith("perf/") and not name.endswith("_secs")
        }
        for line in lines
    ]


def rollouts(output):
    return {path.name: path.read_bytes() for path in (output / "rollouts").iterdir()}


def samples(output, step):
    lines = (output / "rollouts" / f"step_{step:06d}_process_0.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def parameters(output, item="params"):
    path = output.absolute() / "checkpoints" / str(STEPS) / item
    return jax.tree.leaves(ocp.StandardCheckpointer().restore(path))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """Returns protocol -> the directory of an uninterrupted run, made once."""
    made = {}

    def make(protocol):
        if protocol not in made:
            made[protocol] = tmp_path_factory.mktemp(protocol)
            train(inputs, made[protocol], protocol)
        return made[protocol]

    return make


@pytest.mark.parametrize("protocol", FILES)
def test_a_run_leaves_what_it_promises(whole, protocol):
    output = whole(protocol)
    for name in ("config.json", "training.log", "metrics.jsonl", "final/model.safetensors"):
        assert (output / name).stat().st_size
    assert f"finished, step {STEPS} of {STEPS}" in (output / "report.html").read_text()
    assert list(output.glob("events.out.tfevents*"))
    assert sorted(int(p.name) for p in (output / "checkpoints").iterdir()) == [STEPS - 2, STEPS]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/total" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        assert {*COMMON_METRICS, *METRICS[protocol]} <= set(line)
    state = json.loads((output / "final" / "trainer_state.json").read_text())
    assert state["global_step"] == STEPS
    assert len(state["log_history"]) == len(lines)
    for found, line in zip(state["log_history"], lines, strict=True):
        assert found.items() >= line.items()
    rewards = [found["reward"] for found in state["log_history"] if "reward" in found]
    assert rewards == [line["reward/mean"] for line in steps]


@pytest.mark.parametrize("protocol", FILES)
def test_every_sample_is_on_record(whole, protocol):
    output = whole(protocol)
    assert len(rollouts(output)) == STEPS
    rewards = []
    for step in range(1, STEPS + 1):
        found = samples(output, step)
        assert len(found) == PER_STEP
        for i, sample in enumerate(found):
            policy = sample["completion"]
            assert (sample["step"], sample["member"]) == (step, i % GENERATIONS)
            assert policy["weights_version"] == step - 1
            assert 1 <= len(policy["token_ids"]) == len(policy["logprobs"]) <= 4
            assert max(policy["logprobs"]) <= 0
            assert policy["num_tokens"] == len(policy["token_ids"])
            assert policy["prompt_ids"] == found[i - i % GENERATIONS]["completion"]["prompt_ids"]
            assert sample["question"] in QUESTIONS
            assert sample["ground_truth"] == str(int(sample["question"][1]) % 3)
            named = {"teaching_gain"} if protocol == "teaching" else {"exact_match"}
            # What a lesson that gives the answer away costs, its details say too.
            priced = {"own_value", "gaming"} & set(sample["reward_details"])
            assert set(sample["reward_details"]) == named | priced
            if protocol == "teaching":
                assert priced in (set(), {"own_value", "gaming"})
                assert sample["teaching"] == policy["text"].strip()
                assert sample["probe"]["token_ids"]
                assert sample["baseline"]["token_ids"]
                assert sample["guided"]["weights_version"] == 0
        for first in range(0, PER_STEP, GENERATIONS):
            group = np.asarray([s["reward"] for s in found[first : first + GENERATIONS]])
            advantages = [s["advantage"] for s in found[first : first + GENERATIONS]]
            expected = (group - group.mean()) / (group.std(ddof=1) + 1e-4)
            np.testing.assert_allclose(advantages, expected, atol=1e-5)
        rewards.append([s["reward"] for s in found])
    lines = [line for line in metrics(output) if "loss/total" in line]
    np.testing.assert_allclose([x["reward/mean"] for x in lines], np.mean(rewards, 1), atol=1e-6)
    assert np.std(rewards) > 0, "a run without any difference in reward shows nothing"


@pytest.mark.parametrize("protocol", FILES)
def test_the_trainer_agrees_with_what_sampled(whole, protocol):
    lines = [line for line in metrics(whole(protocol)) if "loss/total" in line]
    assert max(line["rollout/mismatch_kl"] for line in lines) < 1e-6


def _kill_at(inputs, output, protocol, step):
    """Starts a run and kills it once the log shows `step` and a checkpoint before it is whole."""
    process = subprocess.Popen(
        **command(inputs, output, protocol), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log, saved = output / "training.log", output / "checkpoints" / str(step - 1)
    for _ in range(12000):
        if saved.exists() and f"step {step}/" in log.read_text():
            break
        time.sleep(0.01)
    process.kill()
    return process.wait()


@pytest.mark.parametrize("protocol", FILES)
def test_a_killed_run_continues_bitwise(inputs, whole, tmp_path, protocol):
    assert _kill_at(inputs, tmp_path, protocol, 3) == -signal.SIGKILL
    assert not (tmp_path / "final").exists()
    begun = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert 2 in begun
    assert STEPS not in begun
    result = train(inputs, tmp_path, protocol)
    assert f"at step {max(begun)}" in result.stderr
    assert metrics(tmp_path) == metrics(whole(protocol))
    assert rollouts(tmp_path) == rollouts(whole(protocol))
    for item in ("params", "reference") if protocol == "teaching" else ("params",):
        pairs = zip(parameters(tmp_path, item), parameters(whole(protocol), item), strict=True)
        assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def test_a_finished_run_changes_nothing_when_started_again(inputs, whole):
    output = whole("direct")
    state = (output / "final" / "trainer_state.json").read_text()
    before = metrics(output), rollouts(output)
    train(inputs, output, "direct")
    assert (metrics(output), rollouts(output)) == before
    assert (output / "final" / "trainer_state.json").read_text() == state


def test_the_export_is_a_transformers_model(inputs, whole):
    import torch
    import transformers

    directory = whole("teaching") / "final"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("q3 answer", return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**ids).logits).all()
    before = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model")
    moved = model.lm_head.weight - before.lm_head.weight
    assert moved.abs().max() > 1e-3


SEVERAL = {
    "rollout.num_guided": 4, "rollout.num_baseline": 2, "rollout.student_temperature": 2.0,
    "rollout.refill_rounds": 1, "rollout.difficulty": "0.0,0.75", "max_steps": 2,
}  # fmt: skip


def test_a_run_trains_on_means_over_answers_to_questions_of_its_difficulty(inputs, tmp_path):
    asked = command(inputs, tmp_path / "run", "teaching", devices=1)
    asked["args"] += [f"--config.{k}={v}" for k, v in SEVERAL.items()]
    first = subprocess.run(**asked, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "difficulty: 8 of 8 questions measured" in first.stderr
    kept = (tmp_path / "run" / "difficulty.jsonl").read_text().splitlines()
    assert len(kept) == len(QUESTIONS)
    easy = {line["question_id"] for line in map(json.loads, kept) if line["right"] > 6}
    for sample in samples(tmp_path / "run", 2):
        assert sample["question_id"] not in easy
        assert len(sample["further_baselines"]) == 1
        if sample["teaching"]:
            assert len(sample["further_guided"]) == 3
            each = [a["value"] for a in sample["reward_details"]["teaching_gain"]["answers"]]
            own = sample["reward_details"].get("own_value", sample["reward"])
            assert own is None or own == pytest.approx(sum(each) / 4)
    again = command(inputs, tmp_path / "again", "teaching", devices=1)
    again["args"] += [f"--config.{k}={v}" for k, v in SEVERAL.items()]
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "run" / "difficulty.jsonl", tmp_path / "again")
    second = subprocess.run(**again, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "questions measured" not in second.stderr
    assert metrics(tmp_path / "again") == metrics(tmp_path / "run")


ORDINARY = {
    "a prompt too long": {"max_prompt_length": 5},
    "no lesson": {"rollout.missing_teaching": "unscored"},
    "all cut": {"mask_truncated_completions": True, "max_new_tokens": 1, "top_k": 1},
}


@pytest.mark.parametrize("case", ORDINARY)
def test_a_run_does_not_end_for_samples_that_cannot_train(inputs, tmp_path, case):
    """A quarter of a step does not fit; no lesson has its tags; every completion is cut."""
    names = [f"q{i} answer hint answer hint" if i % 4 == 0 else f"q{i}" for i in range(8)]
    lines = [json.dumps({"question": q, "answer": str(i % 3)}) for i, q in enumerate(names)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "data.dataset_path": tmp_path / "questions.jsonl", "data.shuffle": False, "max_steps": 3,
        "reward.max_failed_frac": 0.2, "reward.retry_waits_secs": "(600.0,)", **ORDINARY[case],
    }  # fmt: skip
    asked = command(inputs, tmp_path / "run", "teaching", devices=1)
    asked["args"] += [f"--config.{k}={v}" for k, v in values.items()]
    result = subprocess.run(**asked, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in metrics(tmp_path / "run") if "loss/total" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    skipped = [line["reward/skipped_frac"] for line in lines]
    trained = [line["rollout/trained_frac"] for line in lines]
    if case == "a prompt too long":
        assert skipped == [0.25] * 3
        assert trained == [0.75] * 3
        assert all(line["loss/total"] is not None for line in lines)
    else:
        assert skipped == [float(case == "no lesson")] * 3
        assert 0.0 in trained
        for line in lines:
            assert (line["loss/total"] is None) == (line["rollout/trained_frac"] == 0)
            idle = f"step {line['step']} trains nothing: of 16 samples"
            assert result.stderr.count(idle) == (line["rollout/trained_frac"] == 0)
    state = json.loads((tmp_path / "run" / "final" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_a_student_without_enough_positions_is_refused(inputs):
    draft = GRPOConfig(student_model=str(inputs / "model"), max_new_tokens=40)
    with pytest.raises(ValueError, match=r"has 64 positions.*\(80 together\); lower"):
        local_backend.load_student(draft, grpo.open_student(draft, Compute.of(draft)))


def test_an_evaluation_of_two_teachers_says_of_each_what_its_own_would(inputs, whole, tmp_path):
    trained, untrained = whole("teaching") / "final", inputs / "model"

    def evaluate(output, *teachers):
        base = command(inputs, tmp_path / "unused", "teaching")
        wanted = ("data.", "rollout.", "max_")
        flags = [f for f in base["args"][4:] if f.removeprefix("--config.").startswith(wanted)]
        run = [sys.executable, "-m", "atlas_jax.evaluate", base["args"][3], *flags]
        run += [f"--teacher={path}" for path in teachers]
        run += [f"--student={untrained}", f"--data={inputs / 'questions.jsonl'}"]
        run += [f"--output={output}", "--limit=6"]
        result = subprocess.run(run, env=base["env"], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(output.read_text()), result.stderr

    found, log = evaluate(tmp_path / "both.json", untrained, trained)
    assert found["student"] == str(untrained)
    assert [one["teacher"] for one in found["teachers"]] == [str(untrained), str(trained)]
    alone, _ = evaluate(tmp_path / "one.json", trained)
    assert found["teachers"][1] == alone["teachers"][0]
    first, second = (one["samples"] for one in found["teachers"])
    assert [s["question"] for s in first] == list(QUESTIONS[:6])
    for key in ("baseline", "probe"):
        assert [s[key] for s in first] == [s[key] for s in second]
    assert [s["completion"]["text"] for s in first] != [s["completion"]["text"] for s in second]
    assert "teacher 2: wrong to right" in log
    assert log.count("question: ") == 3
