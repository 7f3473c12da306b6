"""Modules that a recipe reaches: what is not asked for is not imported."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("torch_to_find")

HEAVY = {"aiohttp", "datasets", "gguf", "num2words", "psycopg", "pyarrow", "torch", "yarl"}
OTHERS = ("atlas_jax.traces", "atlas_jax.checkpoint.gguf", "atlas_jax.rewards", "atlas_jax.rollout")

REACHED = """
import sys
{code}
print("\\n".join(name for name, module in sys.modules.items() if module))
"""


def reached(code, *words):
    """The modules of a process after some code."""
    result = subprocess.run(
        [sys.executable, "-c", REACHED.format(code=code), *map(str, words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_sft_of_a_jsonl_file_reaches_neither_sessions_nor_gguf_nor_judges(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    modules = reached(
        "from atlas_jax.config import DataConfig\n"
        "from atlas_jax.recipes import sft\n"
        "rows, _ = sft.sources.load_rows(DataConfig(dataset_path=sys.argv[1]), 0)\n"
        "assert len(rows.rows) == 1",
        path,
    )
    assert "atlas_jax.recipes.sft" in modules
    assert not HEAVY & modules
    assert not {name for name in modules if name.startswith(OTHERS)}


def test_grpo_reaches_judges_and_servers_only_where_they_are_asked():
    modules = reached("import atlas_jax.recipes.grpo")
    assert "atlas_jax.rewards.verifiable" in modules
    assert not (HEAVY - {"num2words"}) & modules
    servers = {"atlas_jax.llm_client", "atlas_jax.rewards.rim", "atlas_jax.rollout.vllm"}
    assert not servers & modules


@pytest.mark.parametrize("name", ["RIMReward", "find_gaming", "is_correct"])
def test_rewards_are_imported_by_name_without_jax(name):
    modules = reached(f"from atlas_jax.rewards import {name}")
    assert not {"jax", "flax", "torch"} & modules
