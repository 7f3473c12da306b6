"""Modules that a recipe reaches: what is not asked for is not imported."""

import json
import pathlib
import subprocess
import sys

import pytest

from tools import style_figures

pytestmark = pytest.mark.usefixtures("torch_to_find")

HEAVY = {"aiohttp", "datasets", "gguf", "num2words", "psycopg", "pyarrow", "torch", "yarl"}
OTHERS = (
    "atlas_jax.traces", "atlas_jax.checkpoint.gguf", "atlas_jax.rewards", "atlas_jax.rollout",
    "atlas_jax.losses", "atlas_jax.policy_logprobs", "atlas_jax.options.grpo",
)  # fmt: skip
"""Of other recipes and other rows."""
CHOSEN = {
    "atlas_jax.data.encoding_pool", "atlas_jax.data.row_functions", "atlas_jax.hosts",
    "atlas_jax.models.splash", "atlas_jax.offload", "atlas_jax.reporting", "atlas_jax.watch",
}  # fmt: skip
"""Of what an option, the size of a dataset or the number of processes asks for."""
BOUNDS = {
    "recipes.sft": (45, 6_550),
    "recipes.grpo": (87, 11_000),
}
"""Modules and code lines that importing a recipe reaches, at most; lines rounded up.

Every run of SFT uses what is left: rows and tokens (1,900 lines), checkpoints and export (1,050),
the model (750), options (650) and the start of a run (600). GRPO has the checks of answers and of
gaming beside it (2,600), since its feed and its measures import them under every reward."""

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
    assert not CHOSEN & modules


def test_grpo_reaches_judges_and_servers_only_where_they_are_asked():
    modules = reached("import atlas_jax.recipes.grpo")
    assert "atlas_jax.rewards.verifiable" in modules
    assert not (HEAVY - {"num2words"}) & modules
    servers = {"atlas_jax.llm_client", "atlas_jax.rewards.rim", "atlas_jax.rollout.vllm"}
    assert not servers & modules
    assert not {*CHOSEN, "atlas_jax.recipes.local_backend", "atlas_jax.rollout.local"} & modules


@pytest.mark.parametrize("recipe", BOUNDS)
def test_a_recipe_reaches_no_more_than_its_bound(recipe):
    figures = style_figures.measure(pathlib.Path())
    modules, lines = BOUNDS[recipe]
    assert len(figures[f"modules reached by {recipe}"]) <= modules
    assert int(figures[f"code lines reached by {recipe}"]) <= lines


@pytest.mark.parametrize("name", ["RIMReward", "find_gaming", "is_correct"])
def test_rewards_are_imported_by_name_without_jax(name):
    modules = reached(f"from atlas_jax.rewards import {name}")
    assert not {"jax", "flax", "torch"} & modules
