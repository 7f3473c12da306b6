"""Extras: what runs without them, and the line that says which one is missing."""

import json
import pathlib
import subprocess
import sys
import tomllib

import pytest

from atlas_jax import extras
from tests import tiny
from tests.tokenizers import chatml_tokenizer

HIDDEN = {name for names in extras.MODULES.values() for name in names} | {"math_verify", "pebble"}
"""Modules of all extras, as the test environment installs them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, rows of conversations, and rows of questions."""
    folder = tmp_path_factory.mktemp("extras")
    tiny.save("smollm2", folder / "model")
    chatml_tokenizer().save_pretrained(folder / "model")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (folder / "questions.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    for name in ("rows.parquet", "rows.jsonl.zst", "model.gguf"):
        (folder / name).write_bytes(b"GGUF")
    return folder


def python(code, folder, hidden):
    """Runs code in a process in which modules are not installed."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({sorted(hidden)}))\n"
    return subprocess.run(
        [sys.executable, "-c", f"{hide}{code}", str(folder)], capture_output=True, text=True
    )


SETUP = """
import sys
from atlas_jax import config as c
from atlas_jax import preflight
folder = sys.argv[1]
def config(algorithm, **changes):
    draft = c.defaults(algorithm)
    draft.model_name_or_path, draft.output_dir = folder + "/model", folder + "/run"
    draft.data.dataset_path = folder + "/rows.jsonl"
    if algorithm is c.GRPOConfig:
        draft.data.dataset_path = folder + "/questions.jsonl"
        draft.rollout.protocol, draft.reward.names = "direct", ("exact_match",)
    draft.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return c.freeze(draft)
sft, grpo = c.SFTConfig, c.GRPOConfig
"""


def test_sft_and_grpo_of_jsonl_files_need_no_extra(folder):
    code = f"""{SETUP}
preflight.check(config(sft))
preflight.check(config(grpo))
import contextlib
from atlas_jax.checkpoint import hf
from atlas_jax.data import sources
from atlas_jax.recipes import grpo as _, scoring, sft as _
from atlas_jax.startup import model as models
for algorithm in (sft, grpo):
    rows, _ = sources.load_rows(config(algorithm).data, 0)
    assert len(rows.rows) == 1
hf.open_source(folder + "/model"), models.load_tokenizer(folder + "/model")
scoring.make_reward(config(grpo), contextlib.ExitStack())
from atlas_jax.rewards import find_gaming, is_correct
assert is_correct("The answer is \\\\boxed{{2}}.", "2")
"""
    result = python(code, folder, HIDDEN)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("hidden", "code", "line"),
    [
        (
            "psycopg",
            "preflight.check(config(sft, data__dataset_path='', data__db_url='postgresql://h/d'))",
            "data.db_url needs the package psycopg, which is not installed; "
            "pip install 'atlas_jax[postgres]'",
        ),
        (
            "psycopg",
            "from atlas_jax.training_data import get_training_sessions",
            "a database of sessions needs the package psycopg, which is not installed; "
            "pip install 'atlas_jax[postgres]'",
        ),
        (
            "gguf",
            "preflight.check(config(sft, model_name_or_path=folder + '/model.gguf'))",
            "model.gguf needs the package gguf, which is not installed; "
            "pip install 'atlas_jax[gguf]'",
        ),
        (
            "gguf",
            "from atlas_jax.checkpoint import hf; hf.open_source(folder + '/model.gguf')",
            "a .gguf file needs the package gguf, which is not installed; "
            "pip install 'atlas_jax[gguf]'",
        ),
        (
            "pyarrow",
            "preflight.check(config(sft, data__dataset_path=folder + '/rows.parquet'))",
            "rows.parquet needs the package pyarrow, which is not installed; "
            "pip install 'atlas_jax[datasets]'",
        ),
        (
            "pyarrow",
            "preflight.check(config(sft, data__dataset_path=folder + '/rows.jsonl.zst'))",
            "rows.jsonl.zst needs the package pyarrow, which is not installed; "
            "pip install 'atlas_jax[datasets]'",
        ),
        (
            "datasets",
            "from atlas_jax.data import sources; sources.read_rows(c.DataConfig(), 'owner/name')",
            "owner/name needs the package datasets, which is not installed; "
            "pip install 'atlas_jax[datasets]'",
        ),
        (
            "aiohttp",
            "preflight.check(config(grpo, reward__kind='rim', rollout__protocol='teaching', "
            "student_model=folder + '/model'))",
            "needs the package aiohttp, which is not installed; pip install 'atlas_jax[judges]'",
        ),
        (
            "aiohttp",
            "from atlas_jax.rewards import RIMReward",
            "needs the package aiohttp, which is not installed; pip install 'atlas_jax[judges]'",
        ),
        (
            "aiohttp",
            "preflight.check(config(grpo, rollout__backend='vllm', "
            "rollout__teacher_servers='http://h:1'))",
            "rollout.backend=vllm needs the package aiohttp, which is not installed; "
            "pip install 'atlas_jax[vllm]'",
        ),
    ],
)
def test_what_needs_a_missing_extra_names_it(folder, hidden, code, line):
    result = python(f"{SETUP}{code}", folder, {hidden})
    assert result.returncode == 1, result.stdout
    assert result.stderr.rstrip().endswith(line), result.stderr


def test_a_command_shows_a_missing_extra_as_one_line(folder):
    code = f"""
import runpy, sys
sys.path.insert(0, "tools")
sys.argv = ["tool", "--database-url=postgresql://h/d", "--output={folder}/a.jsonl"]
runpy.run_path("tools/export_traces.py", run_name="__main__")
"""
    result = python(code, folder, {"psycopg"})
    assert result.returncode == 1
    first = result.stderr.splitlines()[0]
    assert first.startswith("error: ") and first.endswith("pip install 'atlas_jax[postgres]'")
    assert "Traceback" not in result.stderr


def test_the_extras_of_errors_are_those_of_pyproject():
    project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    for extra, modules in extras.MODULES.items():
        for module in modules:
            name = module.replace("_", "-")
            assert any(need.startswith(name) for need in declared[extra]), (extra, module)
            assert not any(need.startswith(name) for need in project["dependencies"])
    own = {"test", "cuda", "tpu", "plan", "report"}
    (everything,) = (need for need in declared["test"] if need.startswith("atlas_jax["))
    assert set(everything[len("atlas_jax[") : -1].split(",")) == set(declared) - own
