"""Runs with rewards and rows of a user's module, which lies outside of the package."""

import json
import os
import pathlib
import subprocess
import sys

import psutil
import pytest

from tests import processes, words

ROOT = pathlib.Path(__file__).parents[2]
MODULE = """
import asyncio, os, pathlib, time

HERE = pathlib.Path(__file__).parent

def rows(split):
    for i in range(8 if split == "train" else 2):
        yield {"question": f"q{i}", "answer": str(i % 3), "tests": [{"must": [str(i)]}]}

def tested(sample):
    return float(any(word in sample.completion.text for word in sample.question.row["tests"][0]["must"]))

def raises(sample):
    if sample.member == 0:
        raise RuntimeError("no luck")
    return 1.0

def hangs(sample):
    if sample.member == 1:
        with open(HERE / "hung", "a") as file:
            file.write(f"{os.getpid()} ")
        while True:
            pass
    return 1.0

def seldom(sample):
    return 1.0 if sample.member == 2 else None

async def waits(sample):
    await asyncio.sleep(0.01)
    return float(len(sample.completion.token_ids))

def batched(samples):
    return [float(len(samples)) for _ in samples]

def trl(prompts, completions, completion_ids, tests, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(kwargs["answer"])
    return [float(bool(test[0]["must"])) for test in tests]
"""  # noqa: E501
NAMES = ("tested", "raises", "hangs", "seldom", "waits", "batched", "trl")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a user's module and a tiny model."""
    directory = tmp_path_factory.mktemp("place")
    (directory / "mine.py").write_text(MODULE)
    adding = (*(f"q{i}" for i in range(8)), "answer", "+", "=")
    words.save(directory / "model", adding)
    return directory


def grpo(place, output, **changes):
    values = {
        "model_name_or_path": place / "model", "output_dir": output,
        "data.dataset_path": "none", "data.source": "mine:rows", "data.eval_path": "none",
        "rollout.direct_template": "{question} answer", "beta": 0.0, "num_generations": 4,
        "max_prompt_length": 12, "max_new_tokens": 4, "max_seq_length": 32,
        "data.length_buckets": "(32,)", "train_batch_size": 16, "per_device_train_batch_size": 16,
        "learning_rate": 1e-3, "max_steps": 2, "save_steps": 0, "eval_steps": 2,
        "teaching.system_prompt": "", "reward.retry_waits_secs": "()", **changes,
    }  # fmt: skip
    flags = [f"--config.{k}={v}" for k, v in values.items()]
    return run(place, [sys.executable, "-m", "atlas_jax.train", "--config=rlvr_gsm8k", *flags])


def run(place, command):
    paths = os.pathsep.join((str(place), str(ROOT)))
    environment = os.environ | {"XLA_FLAGS": processes.xla_flags(1), "PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)


def read(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    files = sorted((output / "rollouts").iterdir())
    samples = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [line for line in lines if "loss/total" in line], samples


def test_a_run_goes_on_with_rewards_that_raise_hang_and_do_not_apply(place, tmp_path):
    names = ",".join(f"'mine:{name}'" for name in NAMES)
    result = grpo(
        place, tmp_path / "run",
        **{"reward.names": f"({names})", "reward.max_failed_frac": 0.6, "reward.timeout_secs": 1.0},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    metrics, steps = read(tmp_path / "run")
    assert len(metrics) == 2
    for line, samples in zip(metrics, steps, strict=True):
        assert len(samples) == 16
        assert line["reward/error_frac"] == line["reward/failed_frac"] == 0.5
        assert line["reward/skipped_frac"] == 0
        assert (line["reward/seldom"], line["reward/batched"], line["reward/trl"]) == (1, 16, 1)
        for sample in samples:
            check(sample)
    pids = {int(pid) for pid in (place / "hung").read_text().split()}
    assert len(pids) == 8 and not any(map(psutil.pid_exists, pids))
    assert (
        "the reward raises has failed in 1 calls; the last, of 1 samples: Runtime" in result.stderr
    )


def check(sample):
    """Each member of a group has the reward that the functions of the module give it."""
    details, text = sample["reward_details"], sample["completion"]["text"]
    number = int(sample["question_id"].split("[")[1][:-1])  # rows count from 1
    tested = float(str(number - 1) in text)
    reasons = {
        0: ("raises", "raises: RuntimeError: no luck (mine.py:15)"),
        1: ("hangs", "hangs: took longer than reward.timeout_secs=1"),
    }
    member = sample["member"]
    if member in reasons:
        name, reason = reasons[member]
        assert sample["reward"] is None and details[name]["unscored"] == reason
        return
    length = len(sample["completion"]["token_ids"])
    seldom = 1.0 if member == 2 else 0.0
    assert sample["reward"] == tested + 1 + 1 + seldom + length + 16 + 1
    assert details["seldom"]["value"] == (1.0 if member == 2 else None)


def test_too_many_failures_end_the_run_with_their_reason(place, tmp_path):
    result = grpo(place, tmp_path / "run", **{"reward.names": "('mine:raises',)"})
    assert result.returncode == 1
    assert "4 of 16 samples could not be scored" in result.stderr
    assert "raises: RuntimeError: no luck (mine.py:15)" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("reward.names", "('mine:absent',)", "reward.names=mine:absent: mine has no absent"),
        ("reward.names", "('mine:rows',)", "is no function that returns rewards"),
        ("data.source", "mine:tested", "data.source=mine:tested takes (sample); write a plain"),
        ("data.source", "yours:rows", "data.source=yours:rows: no module yours; install"),
    ],
)
def test_a_reference_that_cannot_be_used_is_told_before_jax_starts(
    place, tmp_path, option, value, told
):
    result = grpo(place, tmp_path / "run", **{option: value})
    assert result.returncode == 1 and told in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_examples_of_rewards_and_rows_train(place, tmp_path):
    names = ",".join(
        f"'examples.custom_reward:{n}'" for n in ("passes_tests", "compiles", "brevity")
    )
    result = grpo(
        place, tmp_path / "run",
        **{
            "reward.names": f"({names})", "data.source": "examples.custom_rows:rows",
            "max_steps": 1, "reward.weights": "(1.0,0.2,0.1)",
        },
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    ((line,), (samples,)) = read(tmp_path / "run")
    assert line["reward/error_frac"] == 0
    for sample in samples:
        details, text = sample["reward_details"], sample["completion"]["text"]
        assert details["passes_tests"]["value"] is None  # these rows have no tests
        assert details["brevity"]["value"] == 1 / (1 + len(text))
        try:
            compile(text, "text", "exec")
        except SyntaxError:
            expected = 0.0
        else:
            expected = 1.0
        assert details["compiles"]["value"] == expected


def test_the_example_of_unit_tests_counts_those_that_pass():
    from atlas_jax.types import Completion, Question, Sample
    from examples.custom_reward import passes_tests

    row = {"tests": ["assert twice(1) == 2", "assert twice(2) == 5", "import os; os._exit(0)"]}
    text = "def twice(x):\n    return 2 * x"
    completion = Completion((1,), (2,), (), (), "stop", text, 0)
    assert passes_tests(Sample(Question("q", "", "", {}, row), completion)) == 2 / 3


def test_sft_takes_rows_of_a_function(place, tmp_path):
    values = {
        "model_name_or_path": place / "model", "output_dir": tmp_path / "run",
        "data.source": "examples.custom_rows:rows", "data.dataset_path": "none",
        "data.eval_path": "none", "data.format": "prompt_completion", "max_seq_length": 32,
        "data.length_buckets": "(32,)", "max_steps": 2, "save_steps": 0, "eval_steps": 2,
        "packing": False, "teaching.system_prompt": "", "train_batch_size": 0,
        "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4,
    }  # fmt: skip
    flags = [f"--config.{k}={v}" for k, v in values.items()]
    command = [sys.executable, "-m", "atlas_jax.train", "--config=teacher_sft", *flags]
    result = run(place, command)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "eval/loss" in lines and (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_the_example_of_sft_from_python_trains(place, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "examples.sft_from_python", str(place / "model"), str(output)]
    result = run(place, command)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/total"] for line in lines if "loss/total" in line]
    assert losses[-1] < losses[0]


ENDINGS = """
import asyncio, dataclasses, os, signal, sys, threading

import psutil

from atlas_jax import config as config_lib, train
from atlas_jax.types import DependencyError

ENDING = sys.argv[-1]

async def tool(policy, question):
    await policy.say(question.text)
    await asyncio.to_thread(str)
    await policy.say("answer")

async def rewarded(sample):
    await asyncio.to_thread(str)
    if ENDING == "signal" and sample.question.id.endswith("[1]") and sample.member == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(600)
    if ENDING == "error":
        raise RuntimeError("no luck")
    return 1.0

def raised(sample):
    return float(len(sample.completion.text))

def main():
    draft = config_lib.defaults(config_lib.GRPOConfig)
    draft.update_from_flattened_dict({
        "model_name_or_path": "model", "data.eval_path": "none", "max_prompt_length": 12,
        "rollout.protocol": "direct", "rollout.direct_template": "{question} answer", "beta": 0.0,
        "num_generations": 4, "max_new_tokens": 8, "max_seq_length": 32, "max_steps": 1,
        "data.length_buckets": (32,), "train_batch_size": 16, "per_device_train_batch_size": 16,
        "save_steps": 0, "eval_steps": 0, "teaching.system_prompt": "",
        "reward.retry_waits_secs": (), "report_to": ("tensorboard",), "sync_ref_model": False,
        "reward.names": ("exact_match", "endings:raised", "endings:rewarded"),
        "rollout.protocol": "endings:tool" if ENDING == "end" else "direct",
    })
    rows = [{"question": f"q{i}", "answer": "x^2+1"} for i in range(8)]
    kept = []
    for turn in range(2):
        draft.output_dir = f"out_{ENDING}_{turn}"
        try:
            finished = train.run(draft, rows=rows)
        except DependencyError:
            finished = "error"
        assert finished == {"end": True, "signal": False, "error": "error"}[ENDING]
        left = {thread.name for thread in threading.enumerate()}
        print(left, [child.cmdline() for child in psutil.Process().children(recursive=True)])

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("ending", ["end", "error", "signal"])
def test_a_run_that_ends_leaves_no_process_and_no_thread(place, ending):
    (place / "endings.py").write_text(ENDINGS)
    result = run(place, [sys.executable, "endings.py", ending])
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = result.stdout.splitlines()[-2:]
    assert first == second == "{'MainThread'} []"
