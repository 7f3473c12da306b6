"""Directories as runs leave them, written by the code that runs write them with."""

from __future__ import annotations

import json
import math
import pathlib

from atlas_jax import config, config_files
from atlas_jax.metrics import MetricWriter
from atlas_jax.options.train import masked
from atlas_jax.rollout import record
from atlas_jax.types import Completion, Question, Reward, Sample

LEAK = "the lesson states the answer"


def said(text: str, reason: str = "stop", version: int = 0) -> Completion:
    """Returns a completion of one token a word."""
    ids = tuple(range(len(text.split())))
    zeros = (0.0,) * len(ids)
    return Completion(
        prompt_ids=(1, 2), token_ids=ids, logprobs=zeros, untruncated_logprobs=zeros,
        finish_reason=reason, text=text, weights_version=version,
    )  # fmt: skip


def sample(question: str, member: int, before: bool, after: bool, **changes) -> Sample:
    """Returns a sample whose question is answered by 4; answers tell the verdicts."""
    lesson = changes.pop("teaching", f"lesson {member} of {question}: count the apples")
    reward = float(after) - float(before)
    parts = {"baseline_correct": before, "correct": after, "efficiency": 0.0, "value": reward}
    details = {"teaching_gain": parts} | changes.pop("details", {})
    values = {
        "question": Question(question, f"How many is {question}?", "4", {}),
        "completion": said(f"<thinking>x</thinking><teaching>{lesson}</teaching>", version=1),
        "teaching": lesson,
        "baseline": said(f"I count {'4' if before else '5'} apples"),
        "probe": said("I would count"),
        "guided": said(f"With the lesson I count {'4' if after else '5'} pears"),
        "member": member,
        "reward": Reward(reward, details),
        "advantage": reward / 2,
        "trains": True,
    }
    return Sample(**(values | changes))


def group(question: str, size: int = 4) -> list[Sample]:
    """Returns members of every kind: unchanged, helped, harmed, and a leak."""
    kinds = [(False, False), (False, True), (True, False), (True, True)]
    made = [sample(question, i, *kinds[i % 4]) for i in range(size)]
    made[0] = sample(question, 0, False, True, details={"gaming": [LEAK]})
    return made


def line(step: int, steps: int) -> dict[str, float]:
    """Returns metrics of a step; the reward rises."""
    share = step / steps
    return {
        "loss/total": 0.01 * share, "reward/mean": share - 0.2 * (step % 2), "reward/std": 0.4,
        "teaching/student_accuracy": 0.3 + 0.4 * share, "teaching/baseline_accuracy": 0.3,
        "teaching/accuracy_delta": 0.4 * share, "teaching/non_degradation_rate": 0.97,
        "teaching/completion_rate": 0.99, "teaching/response_token_reduction": 0.6,
        "policy/kl": 1.0, "policy/entropy": 0.5, "rollout/completion_tokens": 60.0,
        "perf/step_secs": 10.0 + step, "perf/generate_secs": 6.0, "perf/wait_secs": 6.5,
        "sync/servers": 2.0, "sync/total_secs": 1.5, "my/own_metric": 7.0,
    }  # fmt: skip


def grpo(path: pathlib.Path, steps: int = 10, groups=None, **options) -> pathlib.Path:
    """Writes a GRPO run that has come to a step, and returns its directory."""
    draft = config_files.load("teacher_rcl")
    draft.update_from_flattened_dict(
        {"output_dir": str(path), "model_name_or_path": "outputs/sft/final",
         "student_model": "outputs/student", "max_steps": 10, "learning_rate": 2e-6, **options}
    )  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    values = masked(config.freeze(draft)) | {"environment": {"jax": "0.10.2"}}
    (path / "config.json").write_text(json.dumps(values))
    (path / "start.json").write_text(json.dumps({"weights": "abc123", "student": "def456"}))
    writer = MetricWriter(str(path), 0)
    for step in range(1, steps + 1):
        writer.write(step, line(step, 10))
        made = groups(step) if groups else [*group("q1"), *group("q2")]
        record.write(str(path), step, 0, made, record.StepFacts(len(made), steps))
    writer.close()
    log = "2026-11-28 07:02:07,942 INFO jax 0.10.2, 1 x cpu:0\n"
    for step in range(1, steps + 1):
        minutes = f"{7 + (step + 2) // 60:02d}:{(step + 2) % 60:02d}"
        log += f"2026-11-28 {minutes}:00,000 INFO step {step}/10 loss/total=0.01\n"
        if step in (2, 3):
            log += f"2026-11-28 {minutes}:01,000 WARNING policy/kl={step + 4} is outside\n"
    (path / "training.log").write_text(log)
    return path


def finished(path: pathlib.Path) -> pathlib.Path:
    """Adds what a run leaves with its end."""
    (path / "final").mkdir()
    (path / "final/trainer_state.json").write_text('{"global_step": 10, "max_steps": 10}')
    return path


def evaluated(path: pathlib.Path, p: float = 0.004) -> pathlib.Path:
    """Adds an evaluation of the run's model, beside its directory, as the quickstart has it."""
    values = {"value": 0.25, "low": 0.1, "high": 0.4}
    shares = {"value": 0.5, "low": 0.3, "high": 0.7}
    teacher = {
        "teacher": f"outputs/{path.name}/final", "questions": 40, "compared": 40, "improved": 12,
        "degraded": 2, "mcnemar_p": p,
        "metrics": {"accuracy_delta": values, "student_accuracy": shares,
                    "baseline_accuracy": shares | {"value": 0.25}},
        "samples": [record.as_record(0, sample("held out", 0, False, True))],
    }  # fmt: skip
    other = teacher | {"teacher": "outputs/sft/final"}
    report = {"student": "outputs/student", "teachers": [other, teacher]}
    (path.parent / "evaluation.json").write_text(json.dumps(report))
    return path


def sft(path: pathlib.Path, steps: int = 20) -> pathlib.Path:
    """Writes an SFT run."""
    path.mkdir(parents=True)
    draft = config_files.load("teacher_sft")
    draft.output_dir = str(path)
    (path / "config.json").write_text(json.dumps(masked(config.freeze(draft))))
    writer = MetricWriter(str(path), 0)
    for step in range(1, steps + 1):
        loss = 3.0 * math.exp(-step / 8)
        writer.write(step, {"loss/total": loss, "optim/grad_norm": 2.0, "perf/step_secs": 1.0})
    writer.close()
    return path
