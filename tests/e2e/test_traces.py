"""Runs on sessions of a real database and of an export, and the tools beside them."""

import json
import os
import subprocess
import sys

import pytest

from tests import processes, tiny
from tests.runtime_database import execute, new_database, session
from tests.tokenizers import chatml_tokenizer

COUNT = 24
COMMON = {
    "max_steps": 2, "save_steps": 1, "data.length_buckets": "(512,)", "max_seq_length": 512,
    "gradient_accumulation_steps": 1, "data.system_prompt": "",
}  # fmt: skip
SFT = {"per_device_train_batch_size": 2}
GRPO = {
    "per_device_train_batch_size": 2, "num_generations": 2, "max_prompt_length": 440,
    "max_new_tokens": 4, "max_probe_tokens": 4, "rollout.max_answer_tokens": 4,
    "rollout.missing_teaching": "whole", "eval_steps": 0, "rollout.eval_limit": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def url():
    return new_database(
        session(i, review_status="approved", status="succeeded") for i in range(COUNT)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny.save("smollm2", directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    chatml_tokenizer().save_pretrained(directory)
    return directory


def run(*command, **environment):
    environment = os.environ | environment
    environment["XLA_FLAGS"] = processes.xla_flags(1)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def train(kind, data, model, output, **values):
    values = COMMON | {"sft": SFT, "grpo": GRPO}[kind] | values
    values |= {"model_name_or_path": model, "output_dir": output}
    values["compilation_cache_dir"] = model.with_name("traces_xla")
    if kind == "grpo":
        values["student_model"] = model
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    config = f"--config=configs/run/quickstart_{kind}.py:data={data}"
    return run("-m", "atlas_jax.train", config, *flags)


def steps(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if "loss/total" in record]


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_run_from_the_database_resumes_without_it(kind, url, model, tmp_path):
    secret = url.replace("postgres:@", "postgres:s3cret@")
    train(kind, "runtime_pg", model, tmp_path, **{"data.db_url": secret, "max_steps": 1})
    train(
        kind, "runtime_pg", model, tmp_path,
        **{"data.db_url": "postgresql://nobody:s3cret@localhost:1/none"},
    )  # fmt: skip
    assert steps(tmp_path) == [1, 2]
    assert (tmp_path / "final/model.safetensors").is_file()
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size < 2**20]
    assert not [p for p in files if b"s3cret" in p.read_bytes()]


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_run_from_an_export(kind, url, model, tmp_path):
    export = tmp_path / "traces.jsonl.gz"
    run("tools/export_traces.py", "--database-url", url, "--output", str(export))
    options = {"data.dataset_path": export, "max_steps": 1}
    train(kind, "runtime_traces", model, tmp_path / "run", **options)
    assert steps(tmp_path / "run") == [1]


def test_a_refreshed_run_goes_on_with_more_sessions(url, model, tmp_path):
    url = new_database(session(i, review_status="approved") for i in range(4))
    train("sft", "runtime_pg", model, tmp_path, **{"data.db_url": url, "max_steps": 1})
    execute(url, "UPDATE sessions SET task = task || ' Again.' WHERE id = 1")
    train(
        "sft", "runtime_pg", model, tmp_path, **{"data.db_url": url, "data.refresh": True}
    )  # fmt: skip
    assert steps(tmp_path) == [1, 2]
    assert len(list((tmp_path / "data").glob("*.parquet"))) == 2


def test_a_database_that_does_not_answer_ends_the_run_before_jax_starts(model, tmp_path):
    command = [
        sys.executable, "-m", "atlas_jax.train",
        "--config=configs/run/quickstart_sft.py:data=runtime_pg",
        "--config.data.db_url=postgresql://u:s3cret@localhost:1/none",
        f"--config.output_dir={tmp_path}/run", f"--config.model_name_or_path={model}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "error: u@localhost:1/none cannot be read" in result.stderr
    assert "s3cret" not in result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_the_inspection_shows_counts_and_examples(kind, url, model):
    result = run(
        "tools/inspect_data.py", f"configs/run/quickstart_{kind}.py:data=runtime_pg",
        f"--config.model_name_or_path={model}", ATLAS_DATABASE_URL=url,
    )  # fmt: skip
    shown = result.stdout.split("\n")
    assert "  approved              24" in shown
    assert "22 rows to train on, 2 held out" in shown
    if kind == "sft":
        assert "22 examples" in result.stdout
        assert result.stdout.count("<teaching>") == 10  # asked for and given, in five examples
        assert "⟦<teaching>" in result.stdout
    else:
        assert "22 questions" in shown
        assert "--- ground truth" in shown
