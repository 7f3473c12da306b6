"""Steps computed once more from what a run has stored: they equal the log, on any device count."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from atlas_jax import config, train
from atlas_jax.recipes import replay
from atlas_jax.rollout import stored
from tests import processes, stand_in, words

QUESTIONS = tuple(f"q{i}" for i in range(8))
STEPS = 2
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
             "sync_ref_model": True, "ref_model_sync_steps": 1, "rollout.num_guided": 2,
             "rollout.num_baseline": 4},
    "bnpo": {**DIRECT, "loss_type": "bnpo", "beta": 0.04, "logging_steps": 2,
             "save_steps": 0},
    "dr_grpo": {"rollout.protocol": "tests.recipes.test_replay:two_turns",
                "loss_type": "dr_grpo", "scale_rewards": "none", "max_new_tokens": 12,
                "reward.overlong_tokens": 6},
    "dapo": {**DIRECT, "loss_type": "dapo", "importance_sampling": "none", "epsilon_high": 0.28},
    "gspo": {**DIRECT, "loss_type": "gspo", "num_iterations": 2,
             "importance_sampling": "sequence", "importance_sampling_mode": "mask"},
    "gspo_token": {**DIRECT, "loss_type": "gspo_token", "steps_per_generation": 2,
                   "per_device_train_batch_size": 1, "beta": 0.04, "kl_estimator": "in_reward",
                   "loss_divisor": "all", "delta": 1.5},
    "cispo": {**DIRECT, "loss_type": "cispo", "beta": 0.04, "top_p": 0.9, "max_new_tokens": 8,
              "max_seq_length": 48, "mask_truncated_completions": True, "entropy_coef": 0.01,
              "kl_estimator": "unbiased"},
}  # fmt: skip


async def two_turns(policy, question):
    """An episode in which the policy is told its own first turn."""
    reply = await policy.say(question.text)
    policy.reward(len(set(reply)))
    await policy.say("answer")


def digits(sample):
    """A reward that differs between members."""
    return sum(map(int, filter(str.isdigit, sample.answer.text))) / 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    words.save(directory / "model", (*QUESTIONS, "answer", "hint", "plan"), num_hidden_layers=1)
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


@pytest.fixture(scope="module")
def ran(inputs, tmp_path_factory):
    """Returns case -> the directory of its run, made once."""
    made = {}

    def make(case):
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case)
            assert train.run(
                options(inputs, made[case], **CASES[case]), rows=rows(), rewards=(digits,)
            )
        return made[case]

    return make


@pytest.fixture
def copied(ran, tmp_path):
    """A copy of a run to spoil, in another place than where it was made."""
    return pathlib.Path(shutil.copytree(ran("grpo"), tmp_path / "copy"))


def step_of(output, step):
    return f"{output}/rollouts/step_{step:06d}"


@pytest.mark.parametrize("case", CASES)
def test_a_replay_equals_the_log_on_one_device_and_on_eight(ran, case):
    found = replay.find(step_of(ran(case), STEPS))
    assert found.begins == (0 if CASES[case].get("save_steps") == 0 else STEPS - 1)
    for count in (1, 8):
        replayed = replay.run(found, jax.devices()[:count])
        assert replayed.different == [], replay.report(replayed)
        assert {"loss/total", "optim/grad_norm", "reward/mean"} <= replayed.again.keys()
        assert math.isfinite(replayed.values["loss/total"])
        assert replayed.again["optim/grad_norm"] > 0
        assert f"metrics are as logged, to {1e-5:g}" in replay.report(replayed)


def test_a_replay_equals_the_log_of_servers_that_got_new_weights_meanwhile(inputs, tmp_path):
    with stand_in.running(str(inputs / "model"), 1) as [(url, _)]:
        servers = {
            "rollout.backend": "vllm", "rollout.teacher_servers": url, "rollout.max_staleness": 1,
            "rollout.sync_dtype": "float32", "rollout.probe_tolerance": 1e-4, "max_steps": 3,
        }  # fmt: skip
        made = options(inputs, tmp_path, **DIRECT, **servers)
        assert train.run(made, rows=rows(), rewards=(digits,))
    for count in (1, 8):
        replayed = replay.run(replay.find(step_of(tmp_path, 3)), jax.devices()[:count])
        assert replayed.different == [], replay.report(replayed)
        assert 0 < replayed.again["rollout/version_lag"] <= 1
        assert {"rollout/fresh_mismatch_kl", "rollout/importance_weight"} <= replayed.again.keys()
        assert "sync" in replay.report(replayed).splitlines()[-2]


def test_a_difference_is_named(copied):
    """The advantage of one sample is not the one that was trained."""
    path = copied / "rollouts" / "step_000001_process_0.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    samples[0]["advantage"] += 0.1
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    replayed = replay.run(replay.find(step_of(copied, 1)), jax.devices()[:1])
    assert {"loss/policy", "loss/total", "optim/grad_norm"} <= set(replayed.different)
    assert not [n for n in replayed.different if n.startswith(("reward/", "rollout/", "teaching/"))]
    table = replay.report(replayed)
    assert f" metrics differ: {', '.join(replayed.different)}" in table.splitlines()[-1]
    assert table.count("  differs\n") == len(replayed.different)


def test_the_command_replays_a_step_on_other_devices_and_says_whether_it_equals_the_log(copied):
    """On one device, in a process that knows the directory alone."""
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}

    def command(step):
        asked = [sys.executable, "-m", "atlas_jax.train", "--replay", step_of(copied, step)]
        environment = os.environ | {"XLA_FLAGS": processes.xla_flags(1)}
        return subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)

    done = command(STEPS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2: all 44 metrics are as logged, to 1e-05\n" in done.stdout
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before
    log = copied / "metrics.jsonl"
    log.write_text(log.read_text().replace('"reward/mean": 0', '"reward/mean": 1'))
    done = command(STEPS)
    assert done.returncode == 1, done.stderr[-3000:]
    assert done.stdout.endswith("step 2: 1 of 44 metrics differ: reward/mean\n")
    done = command(9)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2].startswith("error: ")
    assert "has no file of step 9; it has those of 1 to 2" in done.stderr


def test_files_of_several_processes_are_one_step(copied):
    """The lines of process 1 come after those of process 0."""
    whole = copied / "rollouts" / "step_000002_process_0.jsonl"
    lines = whole.read_text().splitlines(keepends=True)
    whole.write_text("".join(lines[:8]))
    more = whole.with_name("step_000002_process_1.jsonl")
    more.write_text("".join(lines[8:]))
    assert [s.place for s in stored.read(copied / "rollouts", 2).samples] == [
        i // 4 for i in range(16)
    ]
    more.unlink()
    with pytest.raises(ValueError, match=r"step_000002 has 8 of its 16 samples, .*process 0; copy"):
        replay.find(step_of(copied, 2))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda line: line[:-40], r"process_0.jsonl, line 1, is no sample: "),
        (lambda line: "[]\n", r"line 1, is no sample: not an object"),
        (lambda line: line.replace('"advantage"', '"x"'), r"line 1, is no sample: KeyError 'adv"),
        (lambda line: line.replace('"token_ids": [', '"token_ids": [3, ', 1),
         r"line 1, is no sample: ValueError untruncated_logprobs are \d of \d tokens"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_line(copied, change, problem):
    path = copied / "rollouts" / "step_000002_process_0.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([change(first), *rest]))
    with pytest.raises(ValueError, match=problem) as error:
        replay.find(step_of(copied, 2))
    assert "\n" not in str(error.value)


def test_steps_that_can_be_computed_are_named_where_one_cannot(copied, inputs):
    with pytest.raises(ValueError, match="no file of step 7; it has those of 1 to 2"):
        replay.find(step_of(copied, 7))
    with pytest.raises(ValueError, match="is no step; give OUTPUT_DIR/rollouts/step_000123"):
        replay.find(f"{copied}/rollouts")
    start = copied / "start.json"
    start.write_text(start.read_text().replace(str(inputs), "/nowhere"))
    problem = r"step 1 .*: no checkpoint before it is left, and /nowhere/model does not exist.*"
    with pytest.raises(ValueError, match=problem + "; steps that can be: 2$"):
        replay.run(replay.find(step_of(copied, 1)), jax.devices()[:1])
    shutil.rmtree(copied / "checkpoints" / "1")
    (copied / "rollouts" / "step_000001_process_0.jsonl").unlink()
    with pytest.raises(ValueError, match=r"of the steps after 0, .* has no file of 1; no other"):
        replay.find(step_of(copied, 2))


def test_a_record_without_versions_by_token_can_still_be_read(copied):
    """As earlier versions wrote it, with one number for a completion."""
    path = copied / "rollouts" / "step_000002_process_0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for name in ("num_samples", "num_steps", "given_rewards"):
            del line[name]
        for part in ("completion", "baseline", "probe", "guided"):
            del line[part]["version_spans"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = stored.read(copied / "rollouts", 2)
    versions = {v for s in found.samples for v in s.completion.token_versions}
    assert (versions, found.facts.num_samples, found.facts.num_steps) == ({1}, 16, 0)
