"""Steps computed once more from what a run has stored: they equal the log, on any device count."""

import json
import math
import os
import shutil
import subprocess
import sys

import jax
import pytest

from atlas_jax import config, train
from atlas_jax.recipes import replay
from tests import processes, stand_in, words

QUESTIONS = tuple(f"q{i}" for i in range(8))
STEPS = 3
TEACHING = {
    "data.teacher_template": "{question} plan {approach}",
    "rollout.student_baseline_template": "{question} answer",
    "rollout.student_diagnostic_template": "{question} plan",
    "rollout.student_with_teaching_template": "{question} hint {teaching} answer",
    "rollout.missing_teaching": "whole", "rollout.max_answer_tokens": 4, "max_probe_tokens": 3,
    "data.system_prompt": "",
}  # fmt: skip
DIRECT = {"rollout.protocol": "direct", "rollout.direct_template": "{question} answer"}
CASES = {
    "grpo": {**TEACHING, "loss_type": "grpo", "num_iterations": 2, "beta": 0.04,
             "sync_ref_model": True, "ref_model_sync_steps": 1},
    "bnpo": {**DIRECT, "loss_type": "bnpo", "beta": 0.04, "logging_steps": 2},
    "dr_grpo": {"rollout.protocol": "tests.recipes.test_replay:two_turns",
                "loss_type": "dr_grpo", "scale_rewards": "none", "max_new_tokens": 12},
    "dapo": {**DIRECT, "loss_type": "dapo", "importance_sampling": "none", "epsilon_high": 0.28},
    "gspo": {**DIRECT, "loss_type": "gspo", "num_iterations": 2,
             "importance_sampling": "sequence"},
    "cispo": {**DIRECT, "loss_type": "cispo", "top_p": 0.9, "mask_truncated_completions": True},
}  # fmt: skip


async def two_turns(policy, question):
    """An episode in which the policy is told its own first turn."""
    await policy.say(question.text)
    await policy.say("answer")


def digits(sample):
    """A reward that differs between members."""
    return sum(map(int, filter(str.isdigit, sample.answer.text))) / 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    words.save(directory / "model", (*QUESTIONS, "answer", "hint", "plan"))
    return directory


def options(inputs, output, **changes):
    plain = {
        "model_name_or_path": str(inputs / "model"), "student_model": str(inputs / "model"),
        "output_dir": str(output), "max_prompt_length": 12, "max_new_tokens": 4,
        "max_seq_length": 32, "data.length_buckets": (32,), "num_generations": 4, "beta": 0.0,
        "temperature": 1.0, "top_p": 1.0, "per_device_train_batch_size": 2,
        "train_batch_size": 16, "gradient_accumulation_steps": 0, "learning_rate": 1e-3,
        "lr_scheduler_type": "linear", "warmup_ratio": 0.0, "max_steps": STEPS, "save_steps": 1,
        "eval_steps": 0, "report_to": (), "compilation_cache_dir": "",
    }  # fmt: skip
    draft = config.defaults(config.GRPOConfig)
    draft.update_from_flattened_dict(plain | changes)
    return config.freeze(draft)


def rows():
    return [{"question": q, "answer": str(i % 3)} for i, q in enumerate(QUESTIONS)]


@pytest.mark.parametrize("case", CASES)
def test_a_replay_equals_the_log_on_one_device_and_on_eight(inputs, tmp_path, case):
    made = options(inputs, tmp_path, **CASES[case])
    assert train.run(made, rows=rows(), rewards=(digits,))
    for step in (STEPS, 2):
        found = replay.find(f"{tmp_path}/rollouts/step_{step:06d}")
        for count in (1, 8):
            replayed = replay.run(found, jax.devices()[:count])
            print(replay.report(replayed))
            assert replayed.different == []
            assert {"loss/total", "optim/grad_norm", "reward/mean"} <= replayed.again.keys()
