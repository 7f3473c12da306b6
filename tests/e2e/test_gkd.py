"""Whole distillations of `python -m atlas_jax.train` in their own processes."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from atlas_jax.rollout import record
from atlas_jax.types import Completion, Question, Sample
from tests import http_faults, processes, stand_in, words

STEPS = 6
NAMES = (*(f"q{i}" for i in range(8)), "answer", "hint", "plan")
TOKENIZER = words.tokenizer(NAMES)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny policy, a wider teacher, one of another vocabulary, and rows of both kinds."""
    directory = tmp_path_factory.mktemp("inputs")
    words.save(directory / "model", NAMES)
    words.save(directory / "teacher", NAMES, seed=1, hidden_size=64)
    # Its weights are large, so that what it says depends on what it has read.
    words.save(directory / "student", NAMES, initializer_range=0.3)
    words.save(directory / "other", (*NAMES[:-1], "plot"), seed=1)
    rows = [{"prompt": f"q{i % 8} answer", "completion": f" {i % 3} {i % 5}"} for i in range(24)]
    for name, part in (("train", rows[4:]), ("eval", rows[:4])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (directory / f"{name}.jsonl").write_text(lines)
    lines = [json.dumps(record.as_record(1, sample(i))) for i in range(16)]
    (directory / "rollouts").mkdir()
    (directory / "rollouts" / "step_000001_process_0.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def completion(prompt, text):
    tokens = (*TOKENIZER(text).input_ids, TOKENIZER.eos_token_id)
    known = (-1.0,) * len(tokens)
    return Completion(
        prompt_ids=tuple(TOKENIZER(prompt).input_ids), token_ids=tokens, logprobs=known,
        untruncated_logprobs=known, finish_reason="stop", text=text, weights_version=0,
    )  # fmt: skip


def sample(i):
    """Of four samples one has a right answer alone, and one a wrong one with the lesson."""
    truth = str(i % 3)
    wrong = str(i % 3 + 3)
    return Sample(
        question=Question(str(i), f"q{i % 8}", truth, {}),
        completion=completion("plan", "hint"),
        teaching=f"hint {truth}",
        baseline=completion(f"q{i % 8} answer", truth if i % 4 == 0 else wrong),
        probe=completion(f"q{i % 8} plan", "plan"),
        guided=completion(f"q{i % 8} hint {truth} answer", wrong if i % 4 == 1 else truth),
        place=i,
    )


def command(inputs, output, *extra, devices=1, name="teacher_gkd"):
    """Returns the command of a run; on one device it may use programs of others."""
    values = {
        "model_name_or_path": inputs / "model", "output_dir": output,
        "max_seq_length": 32, "data.length_buckets": "(32,)", "max_new_tokens": 4,
        "data.eval_path": inputs / "eval.jsonl", "data.format": "auto", "data.system_prompt": "",
        "train_batch_size": 8, "gradient_accumulation_steps": 0, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "lr_scheduler_type": "linear", "warmup_ratio": 0.0,
        "max_steps": STEPS, "save_steps": 2, "save_total_limit": 0,
        "compilation_cache_dir": inputs / "xla",
    }  # fmt: skip
    if name == "teacher_gkd":
        values["teacher_model_name_or_path"] = inputs / "teacher"
        values["data.dataset_path"] = inputs / "train.jsonl"
    else:
        values["model_name_or_path"] = inputs / "student"
        values["data.eval_path"] = values["data.dataset_path"] = inputs / "rollouts" / "*.jsonl"
    environment = os.environ | {
        "XLA_FLAGS": processes.xla_flags(devices), "ATLAS_TRACEBACK": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    flags = [f"--config.{k}={v}" for k, v in values.items()]
    run = [sys.executable, "-m", "atlas_jax.train", f"--config={name}"]
    return {"args": [*run, *flags, *extra], "env": environment}


def train(inputs, output, *extra, **options):
    return processes.succeeded(**command(inputs, output, *extra, **options))


def metrics(output):
    """The lines of `metrics.jsonl` without what a clock says."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def parameters(output):
    path = output.absolute() / "checkpoints" / str(STEPS) / "params"
    return jax.tree.leaves(ocp.StandardCheckpointer().restore(path))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """An uninterrupted run, half of whose completions are the policy's."""
    output = tmp_path_factory.mktemp("whole")
    train(inputs, output)
    return output


def test_a_run_comes_nearer_to_the_teacher_and_leaves_what_it_promises(whole):
    *steps, evaluation = metrics(whole)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss/total"] < 0.8 * steps[0]["loss/total"]
    assert evaluation["eval/loss"] < 0.8 * steps[0]["loss/total"]
    for line in steps:
        assert line["distillation/own_frac"] == 0.5
        assert 0 < line["rollout/completion_tokens"] <= 4
        assert 0 < line["policy/entropy"] <= np.log(len(TOKENIZER))
        assert 0 <= line["distillation/agreement_frac"] <= 1
    assert (whole / "final" / "model.safetensors").exists()
    assert (whole / "report.html").exists()
    started = json.loads((whole / "start.json").read_text())
    assert started["teacher"] not in ("", started["weights"])


def test_a_run_that_was_stopped_continues_as_if_it_had_not(inputs, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for step in (4, STEPS):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    train(inputs, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(whole)
    for ours, theirs in zip(parameters(tmp_path / "run"), parameters(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("lmbda", [0, 1])
def test_all_completions_may_be_given_or_the_policys_own(inputs, tmp_path, lmbda):
    train(inputs, tmp_path, f"--config.lmbda={lmbda}", "--config.max_steps=3")
    steps = metrics(tmp_path)[:3]
    assert steps[2]["loss/total"] < steps[0]["loss/total"]
    assert [line.get("distillation/own_frac", 0) for line in steps] == [lmbda] * 3


def test_two_devices_train_as_one_does(inputs, whole, tmp_path):
    train(inputs, tmp_path, devices=2)
    for ours, theirs in zip(metrics(tmp_path), metrics(whole), strict=True):
        assert ours["step"] == theirs["step"]
        for name in ("loss/total", "optim/grad_norm", "policy/entropy", "eval/loss"):
            if name in theirs:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3)


def test_a_student_learns_what_it_says_with_lessons(inputs, tmp_path):
    """The teacher is the policy as it was, with the lesson in its prompt."""
    result = train(inputs, tmp_path, name="distil_taught_student")
    assert "8 answers that a lesson turned right, of 16 samples" in result.stderr
    *steps, evaluation = metrics(tmp_path)
    assert steps[0]["loss/total"] > 1e-2  # the lesson changes what the same weights say
    assert evaluation["eval/loss"] < 0.8 * steps[0]["loss/total"]
    # Continued, it finds the weights that it began with.
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
    before = metrics(tmp_path)
    train(inputs, tmp_path, name="distil_taught_student")
    assert metrics(tmp_path) == before


def without_load(output):
    """Metrics without those of the servers' load, which is that of a moment."""
    return [{k: v for k, v in line.items() if not k.startswith("rollout/teacher_")}
            for line in metrics(output)]  # fmt: skip


SERVED = ("temperature=1", "max_steps=4", "data.shuffle=false")


def test_a_teacher_on_a_server_teaches_as_one_here(inputs, tmp_path):
    """It names all tokens, so that nothing is joined."""
    train(inputs, tmp_path / "here", *(f"--config.{option}" for option in SERVED))
    size = len(TOKENIZER)
    server = stand_in.started(str(inputs / "teacher"), tmp_path, 1, "--num-scores", str(size))
    with server as [(url, _)]:
        options = (*SERVED, f"scoring.servers={url}", f"scoring.top_tokens={size}")
        flags = [f"--config.{option}" for option in options]
        run = tmp_path / "there"
        train(inputs, run, *flags)
        for ours, theirs in zip(metrics(run), metrics(tmp_path / "here"), strict=True):
            assert theirs.keys() <= ours.keys()
            for name in ("loss/total", "optim/grad_norm", "policy/entropy", "eval/loss"):
                if name in theirs:
                    np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-3)
        before = without_load(run)
        assert all(line.get("distillation/failed_frac", 0) == 0 for line in before)
        assert json.loads((run / "start.json").read_text())["teacher"] == str(inputs / "teacher")
        # Continued, it asks for the same texts and trains the same.
        shutil.rmtree(run / "checkpoints" / "4")
        train(inputs, run, *flags)
        assert without_load(run) == before
        # Without the server it stops, and what was trained is there.
        http_faults.set_faults(url, [{"do": "status", "status": 500}])
        shutil.rmtree(run / "checkpoints" / "4")
        lost = subprocess.run(
            **command(inputs, run, *flags), capture_output=True, text=True, check=False
        )
    assert lost.returncode == 1
    assert "cannot use the teacher server" in lost.stderr
    assert (run / "checkpoints" / "2").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["scoring.servers=http://127.0.0.1:9"],
         "temperature=0.9 with scoring.servers, whose probabilities are at temperature 1"),
        (["scoring.servers=http://127.0.0.1:9", "temperature=1",
          "scoring.top_tokens=4"],
         "cannot use the teacher server http://127.0.0.1:9"),
        (["teacher_model_name_or_path={inputs}/other"],
         "another vocabulary than model_name_or_path: 2 of its tokens or ids differ, such as 'pl"),
        (["teacher_reads=lesson"], "is no sample of a GRPO run with a student: it has no ground"),
        (["teacher_reads=lesson", "data.dataset_path={inputs}/rollouts"],
         "rollouts is a directory; give its files, "),
        (["teacher_model_name_or_path="], "the policy is its own teacher and learns nothing"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_in_a_line(inputs, tmp_path, extra, words):
    flags = [f"--config.{option.format(inputs=inputs)}" for option in extra]
    run = command(inputs, tmp_path / "run", *flags)
    run["env"].pop("ATLAS_TRACEBACK")
    result = subprocess.run(**run, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "checkpoints" / "1").exists()
