"""Runs with LoRA: what they train, save, continue from, refuse and leave."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import peft
import pytest
import safetensors.numpy
import torch
import transformers

from atlas_jax.checkpoint import hf
from tests import stand_in, words

PROGRAM = """
import json, sys
from absl import logging
from atlas_jax import config, train

logging.set_verbosity(logging.INFO)
model, other, output, url = sys.stdin.read().split()
SFT = {"max_seq_length": 16, "data.length_buckets": (16,)}
GRPO = {
    "max_prompt_length": 8, "max_new_tokens": 4, "max_seq_length": 32, "num_generations": 4,
    "data.length_buckets": (32,), "rollout.protocol": "direct", "beta": 0.04, "temperature": 1.0,
    "num_iterations": 2, "top_p": 1.0,
    "rollout.direct_template": "{question} answer",
}
ROWS = {
    config.SFTConfig: [{"prompt": f"q{i % 4} answer", "completion": f" {i % 3}"} for i in range(8)],
    config.GRPOConfig: [{"question": f"q{i}", "answer": str(i % 3)} for i in range(4)],
}


def run(schema, name, **changes):
    options = config.defaults(schema)
    options.update_from_flattened_dict({
        "model_name_or_path": model, "output_dir": f"{output}/{name}", "max_steps": 2,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
        "per_device_train_batch_size": 4, "save_steps": 1, "compilation_cache_dir": "",
        "model.lora.rank": 2, "model.lora.alpha": 4.0,
        **(SFT if schema is config.SFTConfig else GRPO), **changes,
    })
    given = {"rows": ROWS[schema]}
    if schema is config.GRPOConfig:
        given["rewards"] = (lambda sample: float(len(sample.answer.text)),)
    try:
        train.run(options, **given)
        return ""
    except ValueError as error:
        return str(error)


SERVED = {
    "rollout.backend": "vllm", "rollout.weight_sync": "adapter", "rollout.teacher_servers": url,
    "rollout.sync_dtype": "float32", "num_iterations": 1,
}
final = f"{output}/whole/final"
SFTConfig, GRPOConfig = config.SFTConfig, config.GRPOConfig
errors = {
    "whole": run(SFTConfig, "whole"),
    "half": run(SFTConfig, "parts", max_steps=1),
    "other base": run(SFTConfig, "parts", model_name_or_path=other),
    "rest": run(SFTConfig, "parts"),
    "merged": run(SFTConfig, "merged", **{"model.lora.export": "merged"}),
    "grpo": run(GRPOConfig, "grpo", **{"model.lora.dropout": 0.1}),
    "fresh": run(GRPOConfig, "fresh", max_steps=1, num_iterations=1),
    "goes on": run(GRPOConfig, "goes_on", max_steps=1, num_iterations=1, resume_from=final),
    "other rank": run(SFTConfig, "refused", resume_from=final, **{"model.lora.rank": 3}),
    "other targets": run(
        SFTConfig, "refused", resume_from=final, **{"model.lora.targets": ("q_proj",)}
    ),
    "on top": run(SFTConfig, "refused", model_name_or_path=final),
    "of another": run(SFTConfig, "refused", resume_from=final, model_name_or_path=other),
    "checkpoint of another": run(
        SFTConfig, "refused", resume_from=f"{output}/whole", model_name_or_path=other
    ),
    "other scale": run(SFTConfig, "parts", **{"model.lora.alpha": 8.0}),
    "scale of another": run(
        SFTConfig, "refused", resume_from=f"{output}/whole", **{"model.lora.rslora": True}
    ),
    "served": run(GRPOConfig, "served", **SERVED),
    "rank of the server": run(GRPOConfig, "refused", **SERVED, **{"model.lora.rank": 9}),
    "model": run(SFTConfig, "refused", resume_from=other),
    "synced": run(GRPOConfig, "refused", sync_ref_model=True),
    "all": run(SFTConfig, "all", model_name_or_path=final, max_steps=1, **{"model.lora.rank": 0}),
}
from atlas_jax import convert
from atlas_jax.recipes import replay


def converted(source, target, merged, dtype="auto"):
    try:
        convert.convert(f"{output}/{source}", f"{output}/{target}", dtype, 10**9, merged)
        return ""
    except ValueError as error:
        return str(error)


errors |= {
    "to an adapter": converted("whole", "adapter", False),
    "to a model": converted("whole/checkpoints/2", "added", True),
    "dtype of an adapter": converted("whole", "not written", False, "bfloat16"),
    "nothing to merge": converted("all", "not written", True),
}

found = replay.run(replay.find(f"{output}/grpo/rollouts/step_000002"))
errors["replay"] = ", ".join(found.different)
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of several runs, and the error of each."""
    place = tmp_path_factory.mktemp("runs")
    names = (*(f"q{i}" for i in range(4)), "answer")
    model = words.save(place / "model", names)
    other = words.save(place / "other", names, seed=1)
    with stand_in.started(model, place, 1, "--max-lora-rank", "8") as ((url, _),):
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM], input=f"{model} {other} {place} {url}", text=True,
            capture_output=True,
            env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return place, json.loads(result.stdout.splitlines()[-1])


def checkpoint(run, step, item):
    return ocp.StandardCheckpointer().restore(run.absolute() / "checkpoints" / str(step) / item)


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/total" in line]


def logits(model):
    tokens = torch.tensor([[3, 14, 17, 5]])
    with torch.no_grad():
        return model(tokens).logits.numpy()


def test_runs_come_to_their_end(runs):
    _, errors = runs
    done = (
        "whole", "half", "rest", "merged", "grpo", "fresh", "goes on", "served", "all", "replay",
        "to an adapter", "to a model",
    )  # fmt: skip
    assert {name: errors[name] for name in done} == dict.fromkeys(done, "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other base", "holds a run of another model"),
        ("other rank", "has r=2, lora_alpha=4 and use_rslora=False; set model.lora.rank"),
        ("other targets", "has factors for other matrices than model.lora.targets"),
        ("on top", "to go on with it, set model_name_or_path="),
        ("of another", "is another model than model_name_or_path"),
        ("checkpoint of another", "has factors of another model than model_name_or_path"),
        ("other scale", "has factors of model.lora.alpha=4.0 and rslora=false; set these again"),
        ("scale of another", "has factors of model.lora.alpha=4.0 and rslora=false"),
        ("model", "is a whole model, and model.lora.rank trains factors"),
        ("synced", "the reference is the model without the factors"),
        ("rank of the server", "with --max-lora-rank 8, and model.lora.rank=9; start it with"),
        ("dtype of an adapter", "holds factors; leave it out, or add --merged"),
        ("nothing to merge", "all is none; leave it out"),
    ],
)
def test_what_does_not_fit_is_refused(runs, name, message):
    assert message in runs[1][name]
    assert "\n" not in runs[1][name]


def test_checkpoints_hold_the_factors_alone_and_a_continued_run_has_the_same(runs):
    place, _ = runs
    for item in ("params", "train"):
        once, again = (checkpoint(place / name, 2, item) for name in ("whole", "parts"))
        jax.tree.map(np.testing.assert_array_equal, once, again)
    leaves = {path[-1].key for path, _ in jax.tree.leaves_with_path(once["opt_state"])}
    assert {"lora_a", "lora_b"} < leaves
    assert not {"kernel", "embed", "scale"} & leaves


def test_the_adapter_is_that_of_peft_and_the_merged_export_computes_the_same(runs):
    place, _ = runs
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    before = logits(base)
    adapted = peft.PeftModel.from_pretrained(base, str(place / "whole" / "final"))
    found = logits(adapted)
    assert np.abs(found - before).max() > 1e-3
    merged = transformers.AutoModelForCausalLM.from_pretrained(place / "merged" / "final")
    np.testing.assert_allclose(logits(merged), found, atol=1e-5)
    # transformers loads an adapter and its base from the adapter's directory.
    whole = transformers.AutoModelForCausalLM.from_pretrained(place / "whole" / "final")
    np.testing.assert_allclose(logits(whole), found, atol=1e-5)


def test_a_checkpoint_becomes_the_adapter_or_the_model_that_a_run_exports(runs):
    place, _ = runs
    for made, exported in (("adapter", "whole"), ("added", "merged")):
        final = place / exported / "final"
        names = {path.name for path in final.glob("*.safetensors")}
        assert {path.name for path in (place / made).glob("*.safetensors")} == names
        for name in names:
            found, wanted = (safetensors.numpy.load_file(p / name) for p in (place / made, final))
            assert found.keys() == wanted.keys()
            for tensor, value in wanted.items():
                np.testing.assert_allclose(found[tensor], value, atol=1e-6)
    said, wanted = (
        json.loads((path / "adapter_config.json").read_text())
        for path in (place / "adapter", place / "whole" / "final")
    )
    assert said == wanted
    transformers.AutoTokenizer.from_pretrained(place / "adapter")


def test_servers_take_the_adapter_alone(runs):
    place, _ = runs
    found = metrics(place / "served")
    assert len(found) == 2
    for line in found:
        assert line["sync/servers"] == 1
        assert line["sync/probe_diff"] < 1e-4
        assert line["rollout/version_lag_max"] == 0
    stored = (place / "served" / "final" / "adapter_model.safetensors").stat().st_size
    assert 0 < found[0]["sync/bytes"] < stored


def test_an_adapter_of_peft_is_a_model_here(runs, tmp_path):
    place, _ = runs
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, init_lora_weights=False,
                             target_modules=["q_proj", "up_proj"])  # fmt: skip
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    source = hf.open_source(str(tmp_path))
    for name, value in model.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(source.read(name), value.numpy(), atol=1e-6)


def test_the_reference_is_the_model_without_factors(runs):
    place, _ = runs
    # In the first update both are one model, unless factors were loaded.
    assert abs(metrics(place / "fresh")[0]["policy/kl"]) < 1e-6
    assert metrics(place / "goes_on")[0]["policy/kl"] > 1e-4
    for name in ("grpo", "fresh", "goes_on", "served"):
        assert all(line["rollout/mismatch_kl"] < 1e-3 for line in metrics(place / name))
