"""What a run begins with: another run's weights, or its own directory; and what is refused."""

import dataclasses
import datetime
import json
import shutil
import subprocess
import sys

import pytest
import safetensors.numpy

from atlas_jax import config as config_lib
from atlas_jax.config import GRPOConfig, SFTConfig
from atlas_jax.recipes import grpo, sft
from atlas_jax.startup import directory
from tests import words
from tests.e2e import test_grpo

WORDS = (*test_grpo.QUESTIONS, "answer", "hint", "plan")
STILL = 1e-30
"""A learning rate that changes no float32 weight, so that a model shows what it began with."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two models, and two files of rows for SFT and GRPO alike."""
    directory = tmp_path_factory.mktemp("inputs")
    words.save(directory / "model", WORDS)
    words.save(directory / "twin", WORDS, seed=1)
    words.save(directory / "wide", WORDS, hidden_size=64)
    for name, add in (("rows", 0), ("others", 1)):
        lines = [
            json.dumps({"prompt": f"{q} answer", "completion": f" {(i + add) % 3}", "question": q,
                        "answer": str((i + add) % 3)})
            for i, q in enumerate(test_grpo.QUESTIONS)
        ]  # fmt: skip
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def options(inputs, output, schema, **changes):
    values = {
        "model_name_or_path": f"{inputs}/model", "output_dir": str(output),
        "data.dataset_path": f"{inputs}/rows.jsonl", "max_seq_length": 32,
        "data.length_buckets": (32,), "max_steps": 2, "save_steps": 1, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "compilation_cache_dir": "",
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "mesh.fsdp": 8,
        "gradient_checkpointing": "full",
    }  # fmt: skip
    if schema is GRPOConfig:
        values |= {
            "rollout.protocol": "direct", "rollout.direct_template": "{question} answer",
            "reward.names": ("exact_match",), "beta": 0.04, "num_generations": 4,
            "max_prompt_length": 12, "max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0,
        }  # fmt: skip
    draft = config_lib.defaults(schema)
    for name, value in (values | changes).items():
        group, _, key = name.rpartition(".")
        part = draft
        for step in filter(None, group.split(".")):
            part = part[step]
        part[key] = value
    return config_lib.freeze(draft)


def run(inputs, output, schema=SFTConfig, **changes):
    """Runs to the end and returns the exported weights."""
    config = options(inputs, output, schema, **changes)
    config_lib.validate(config)
    recipe = grpo.run if isinstance(config, GRPOConfig) else sft.run
    assert recipe(config)
    return weights(output / "final")


def weights(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def equal(these, those):
    return these.keys() == those.keys() and all((these[n] == those[n]).all() for n in these)


def steps(output):
    return [line for line in test_grpo.metrics(output) if "loss/total" in line]


@pytest.fixture(scope="module")
def first(inputs, tmp_path_factory):
    """A finished SFT run."""
    output = tmp_path_factory.mktemp("first")
    assert not equal(run(inputs, output), weights(inputs / "model"))
    return output


@pytest.mark.parametrize("schema", [SFTConfig, GRPOConfig])
@pytest.mark.parametrize("source", ["run", "checkpoint", "final", "converted"])
def test_a_new_run_takes_the_weights_of_another_and_nothing_else(
    inputs, first, tmp_path, schema, source
):
    places = {
        "run": first, "checkpoint": first / "checkpoints" / "2", "final": first / "final",
        "converted": tmp_path / "converted",
    }  # fmt: skip
    if source == "converted":
        tool = [sys.executable, "tools/convert_checkpoint.py", first / "final", places[source]]
        subprocess.run(tool, check=True, capture_output=True)
    found = run(
        inputs, tmp_path / "next", schema, resume_from=str(places[source]), learning_rate=STILL,
        **{"data.dataset_path": f"{inputs}/others.jsonl"},
    )  # fmt: skip
    assert equal(found, weights(first / "final"))
    made = steps(tmp_path / "next")
    assert [line["step"] for line in made] == [1, 2]
    if schema is GRPOConfig:
        assert made[0]["policy/kl"] == pytest.approx(0, abs=1e-6)


def test_the_same_rows_train_again_with_another_learning_rate(inputs, first, tmp_path):
    found = run(inputs, tmp_path, resume_from=str(first), learning_rate=2e-2, weight_decay=0.0)
    assert not equal(found, weights(first / "final"))
    assert [line["optim/learning_rate"] for line in steps(tmp_path)] == pytest.approx([2e-2] * 2)
    # The second moment begins anew: the first step of Adam moves each weight by the rate.
    loss = [line["loss/total"] for line in steps(first) + steps(tmp_path)]
    assert loss[2] < loss[0]


def test_grpo_continues_another_grpo_run_and_its_own(inputs, tmp_path):
    one = run(inputs, tmp_path / "one", GRPOConfig, max_steps=1)
    still = {"learning_rate": STILL, "resume_from": str(tmp_path / "one")}
    assert equal(run(inputs, tmp_path / "two", GRPOConfig, **still), one)
    # Its own directory continues everything, whatever resume_from says.
    again = run(
        inputs, tmp_path / "one", GRPOConfig, max_steps=2, resume_from=str(tmp_path / "two")
    )
    assert not equal(again, one)
    assert [line["step"] for line in steps(tmp_path / "one")] == [1, 2]


def test_a_reference_that_is_wanted_later_is_what_the_run_began_with(inputs, first, tmp_path):
    begin = {"resume_from": str(tmp_path / "origin"), "learning_rate": 1e-1}
    shutil.copytree(first, tmp_path / "origin")
    run(inputs, tmp_path / "run", GRPOConfig, beta=0.0, **begin)
    # Another run goes on in the directory that this one began from.
    run(inputs, tmp_path / "origin", max_steps=3, learning_rate=1e-1)
    run(inputs, tmp_path / "run", GRPOConfig, max_steps=3, **begin)
    (kl,) = [line["policy/kl"] for line in steps(tmp_path / "run") if "policy/kl" in line]
    assert kl > 1e-4, "against the policy of step 2 it would be 0"
    again = options(inputs, tmp_path / "run", GRPOConfig, max_steps=4, **begin)
    shutil.rmtree(tmp_path / "origin" / "checkpoints" / "2")
    with pytest.raises(ValueError, match=r"beta=0.04 needs the reference .*/2, are gone; restore"):
        grpo.run(again)


def test_nothing_is_sampled_after_a_step_that_went_wrong(inputs, tmp_path):
    """A step of 1e30 leaves finite weights, whose gradient overflows in the next step."""
    config = options(
        inputs, tmp_path, GRPOConfig, learning_rate=1e30, max_steps=4, save_steps=0, beta=0.0
    )
    with pytest.raises((ValueError, RuntimeError), match=r"at step 2; there is no checkpoint"):
        grpo.run(config)
    assert len(list((tmp_path / "rollouts").iterdir())) == 2
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["typo", "typo/checkpoints/7"])
def test_a_mistyped_path_is_an_error_and_creates_nothing(inputs, tmp_path, name):
    config = options(inputs, tmp_path / "run", SFTConfig, resume_from=str(tmp_path / name))
    with pytest.raises(ValueError, match=f"{name} does not exist; give the output_dir of another"):
        sft.run(config)
    assert not (tmp_path / "typo").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    config = dataclasses.replace(config, resume_from=str(empty))
    with pytest.raises(ValueError, match="has no complete checkpoint and is no model directory"):
        sft.run(config)
    assert not list(empty.iterdir())


def test_the_weights_of_another_model_are_refused_by_name(inputs, first, tmp_path):
    wide = f"{inputs}/wide"
    for place in (first, first / "final"):
        config = options(
            inputs, tmp_path, SFTConfig, resume_from=str(place), model_name_or_path=wide
        )
        with pytest.raises(ValueError, match=r"of another model .*hidden_size 32 \(here 64\)"):
            sft.run(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": "wide"}, r"model_name_or_path is not what .*/wide \(was .*/model"),
        ({"model_name_or_path": "twin"}, r"model_name_or_path is not what .*/twin \(was .*/model"),
        ({"data.dataset_path": "others.jsonl"}, r"on other data .*others.jsonl \(was .*rows.jsonl"),
        ({"seed": 7}, r"on other data .*: these options differ: .*seed=7 \(was 42\)"),
        ({"model.param_dtype": "bfloat16"}, "its parameters are float32; this run's are bfloat16"),
        ({"adam_mu_dtype": "bfloat16"}, "its optimizer state is .*; this run's is"),
    ],
)
def test_what_differs_from_the_run_in_the_directory_is_named_before_it_is_changed(
    inputs, first, changes, message
):
    names = ("wide", "twin", "others.jsonl")
    changes = {k: f"{inputs}/{v}" if v in names else v for k, v in changes.items()}

    def content():
        kept = ("config.json", "start.json", "metrics.jsonl", "model", "checkpoints", "final")
        files = (p for name in kept for p in [first / name, *(first / name).rglob("*")])
        return {str(p): p.read_bytes() for p in files if p.is_file()}

    before = content()
    with pytest.raises(ValueError, match=message):
        sft.run(options(inputs, first, SFTConfig, max_steps=3, **changes))
    assert content() == before


def test_another_student_in_the_directory_is_refused(inputs, tmp_path):
    teaching = {
        "rollout.protocol": "teaching", "student_model": f"{inputs}/model",
        "reward.names": ("teaching_gain",), "rollout.missing_teaching": "whole",
        "data.teacher_template": "{question} plan {approach}", "max_probe_tokens": 3,
        "rollout.student_baseline_template": "{question} answer",
        "rollout.student_diagnostic_template": "{question} plan",
        "rollout.student_with_teaching_template": "{question} hint {teaching} answer",
    }  # fmt: skip
    run(inputs, tmp_path, GRPOConfig, max_steps=1, **teaching)
    changed = teaching | {"student_model": f"{inputs}/twin"}
    with pytest.raises(ValueError, match=r"student_model is not what .*twin \(was .*model\)"):
        grpo.run(options(inputs, tmp_path, GRPOConfig, max_steps=2, **changed))


OFFLOADS = {
    SFTConfig: ("optimizer", "params", "activations", "optimizer,params,activations"),
    GRPOConfig: ("reference", "optimizer,reference"),
}


@pytest.mark.parametrize(
    ("schema", "offload"), [(schema, o) for schema, offloads in OFFLOADS.items() for o in offloads]
)
def test_every_offload_starts_and_continues_with_the_same_numbers(
    inputs, first, tmp_path, schema, offload
):
    if schema is SFTConfig:
        expected = steps(first)
    else:
        run(inputs, tmp_path / "plain", schema)
        expected = steps(tmp_path / "plain")
    run(inputs, tmp_path / "run", schema, offload=offload, max_steps=1)
    run(inputs, tmp_path / "run", schema, offload=offload)
    found = steps(tmp_path / "run")
    assert [line["step"] for line in found] == [1, 2]
    for line, plain in zip(found, expected, strict=True):
        assert line["loss/total"] == pytest.approx(plain["loss/total"], rel=1e-5, abs=1e-7)
        assert line["optim/grad_norm"] == pytest.approx(plain["optim/grad_norm"], rel=1e-4)


def test_a_run_that_goes_on_another_day_keeps_its_date(inputs, tmp_path, monkeypatch):
    """Its template writes one word more in 2020, which would be other training data."""
    shutil.copytree(inputs / "model", tmp_path / "model")
    tokenizer = words.tokenizer(WORDS)
    tokenizer.chat_template = (
        "{% if strftime_now('%Y') == '2020' %}plan {% endif %}"
        "{% for m in messages %}{{ m.content }} {% endfor %}<eos>"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    row = {"messages": [{"role": "user", "content": "q1 answer"},
                        {"role": "assistant", "content": "1"}]}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 16)
    output, today = tmp_path / "run", datetime.date.today()
    changes = {"model_name_or_path": f"{tmp_path}/model", "data.completion_only": False,
               "data.dataset_path": f"{tmp_path}/rows.jsonl"}  # fmt: skip
    run(inputs, output, max_steps=1, **changes)
    assert json.loads((output / "start.json").read_text())["date"] == today.isoformat()
    monkeypatch.setattr(directory, "today", lambda: datetime.date(2020, 1, 2))
    run(inputs, output, max_steps=2, **changes)
    assert [line["step"] for line in steps(output)] == [1, 2]
    run(inputs, tmp_path / "other", max_steps=1, **changes)  # which begins on that day
    assert steps(tmp_path / "other")[0]["loss/total"] != steps(output)[0]["loss/total"]
