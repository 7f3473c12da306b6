"""Runs that a Python program starts, without a command line."""

import json
import os
import subprocess
import sys

import pytest

from atlas_jax import config, saved_config, train
from tests import words

PROGRAM = """
import json, sys
from absl import flags
from atlas_jax import config, train

flags.DEFINE_string("config", "", "A flag of the program's own.")
model, output = sys.stdin.read().split()
options = config.defaults(config.SFTConfig)
options.update_from_flattened_dict({
    "model_name_or_path": model, "output_dir": output, "max_seq_length": 16, "save_steps": 1,
    "data.length_buckets": (16,), "max_steps": 1, "compilation_cache_dir": "",
})
rows = [{"prompt": f"q{i % 4} answer", "completion": f" {i % 3}"} for i in range(8)]
ends = [train.run(options, rows=iter(rows), eval_rows=rows[:2])]
options.max_steps = 2
ends.append(train.run(config.freeze(options), rows=rows, eval_rows=rows[:2]))
try:
    train.run(options, rows=rows[:4])
except ValueError as error:
    print(json.dumps([*ends, str(error)]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return words.save(tmp_path_factory.mktemp("model"), (*(f"q{i}" for i in range(4)), "answer"))


def test_a_program_trains_on_rows_of_its_own_and_the_same_call_continues(model, tmp_path):
    output = tmp_path / "run"
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=f"{model} {output}", text=True,
        capture_output=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    *ends, error = json.loads(result.stdout)
    assert ends == [True, True]
    assert "holds a run on other data" in error  # four of the rows are not the eight
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/total" in line] == [1, 2]
    assert [line["step"] for line in lines if "eval/loss" in line] == [1, 2]
    # A question, "answer", the completion and the end of the text in each row of 16.
    assert [line["perf/real_token_frac"] for line in lines if "loss/total" in line] == [4 / 16] * 2
    assert (output / "final" / "model.safetensors").exists()
    log = (output / "training.log").read_text()
    assert f"continuing {output}/checkpoints at step 1" in log
    assert "XLA_FLAGS" not in log  # no option of the run, so that no change of it is reported
    written = json.loads((output / "config.json").read_text())["environment"]
    assert written["XLA_FLAGS"] == environment["XLA_FLAGS"]
    assert written["devices"] == "1 x cpu"
    again = saved_config.load(str(output / "config.json"))
    assert again.config.max_steps == 2
    assert again.hidden == ("data.dataset_path", "data.eval_path")


def options(model, output, schema, **changes):
    draft = config.defaults(schema)
    plain = {
        "model_name_or_path": str(model), "output_dir": str(output), "max_seq_length": 64,
        "compilation_cache_dir": "", "max_steps": 1,
    }  # fmt: skip
    draft.update_from_flattened_dict(plain | changes)
    return draft


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ({"rows": ["no dict"]}, {}, r"rows\[0\]: a str and no dict"),
        ({"rows": [{"prompt": "q1"}]}, {}, r"rows\[0\]: .*completion"),
        ({"rows": []}, {}, "rows are empty"),
        ({"eval_rows": [{}]}, {"data.dataset_path": "absent.jsonl"}, r"eval_rows\[0\]: "),
        ({"rows": [{}]}, {"data.format": "session"}, "format='session' is read from files"),
        ({"rewards": [len]}, {}, "rewards are given and algorithm='sft' has none"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    model, tmp_path, given, changes, message
):
    output = tmp_path / "run"
    draft = options(model, output, config.SFTConfig, **changes)
    with pytest.raises(ValueError, match=message):
        train.run(draft, **given)
    assert not output.exists()
