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
    "atlas_jax.checkpoint.diagnosis", "atlas_jax.config", "atlas_jax.config_files",
    "atlas_jax.data.encoding_pool", "atlas_jax.startup.origins", "atlas_jax.checkpoint.adapters",
    "atlas_jax.models.lora", "atlas_jax.best", "atlas_jax.ema", "atlas_jax.muon",
    "atlas_jax.data.hub_rows", "atlas_jax.data.row_functions", "atlas_jax.data.session_rows",
    "atlas_jax.data.tables", "atlas_jax.extras", "atlas_jax.hosts", "atlas_jax.models.splash",
    "atlas_jax.offload", "atlas_jax.options.descriptions", "atlas_jax.profiling",
    "atlas_jax.recipes.replay", "atlas_jax.report", "atlas_jax.reporting",
    "atlas_jax.rollout.stored", "atlas_jax.watch", "atlas_jax.wording",
}  # fmt: skip
"""Of what a command, an option, a kind of row, an error or the number of processes asks for."""
BOUNDS = {
    "recipes.sft": (39, 6_650),
    "recipes.grpo": (62, 8_950),
}
"""Modules and code lines that importing a recipe reaches, at most; lines rounded up.

Every run of SFT uses what is left: rows and tokens (1,550 lines), checkpoints and export (950), the
model and its sharding (1,100), the start of a run (600), options (400), and the loop with its step,
metrics and stop (850). GRPO adds questions, samples, rewards, rows and the loss, and the options of
judges, which stand in its config."""

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
        "from atlas_jax.data import examples\n"
        "from atlas_jax.options.data import DataConfig\n"
        "from atlas_jax.recipes import sft\n"
        "rows, _ = sft.sources.load_rows(DataConfig(dataset_path=sys.argv[1]), 0)\n"
        "[row] = rows.rows\n"
        "examples.to_sample(row, DataConfig())",
        path,
    )
    assert "atlas_jax.recipes.sft" in modules
    assert not HEAVY & modules
    assert not {name for name in modules if name.startswith(OTHERS)}
    assert not {*CHOSEN, "atlas_jax.data.shapes"} & modules


GRPO_WITH_A_FUNCTION = """
import contextlib

from atlas_jax.options.grpo import GRPOConfig
from atlas_jax.recipes import grpo, scoring
from atlas_jax.rewards.pricing import price_lessons
from atlas_jax.rollout import measures
from atlas_jax.types import Completion, Question, Sample

answer = Completion((1,), (2,), (0.0,), (0.0,), "stop", "four", 0)
samples = [Sample(Question("q", "2+2?", "4", {}), answer, member=i) for i in range(2)]
reward = scoring.make_reward(GRPOConfig(), contextlib.ExitStack(), (lambda sample: 0.5,))
samples = price_lessons(scoring.score(reward, samples), 0.5)
assert [sample.reward.value for sample in samples] == [0.5, 0.5]
assert measures.of_rewards(samples, ("function",))["reward/mean"] == (1.0, 2)
"""


def test_grpo_with_a_reward_of_the_user_imports_no_check_of_answers():
    modules = reached(GRPO_WITH_A_FUNCTION)
    rewards = {name for name in modules if name.startswith("atlas_jax.rewards.")}
    others = {"combined", "custom", "dialect", "forms", "pricing", "worker_program", "workers"}
    assert rewards - {f"atlas_jax.rewards.{name}" for name in others} == set()
    assert not HEAVY & modules
    late = {"atlas_jax.rollout.episodes", "atlas_jax.rollout.evaluation",
            "atlas_jax.rollout.turn_advantages", "atlas_jax.rewards.overlong"}  # fmt: skip
    assert not {*late, "atlas_jax.rollout.teaching_measures"} & modules


@pytest.mark.parametrize("name", ["exact_match", "teaching_gain"])
def test_a_rule_that_compares_answers_imports_their_checks(name):
    modules = reached(
        "import contextlib\n"
        "from atlas_jax.options.grpo import GRPOConfig\n"
        "from atlas_jax.options.reward import RewardConfig\n"
        "from atlas_jax.recipes import scoring\n"
        f"config = GRPOConfig(reward=RewardConfig(names=({name!r},)))\n"
        "scoring.make_reward(config, contextlib.ExitStack())"
    )
    assert {"atlas_jax.rewards.answers", "atlas_jax.rewards.equality"} <= modules


def test_grpo_reaches_judges_and_servers_only_where_they_are_asked():
    modules = reached("import atlas_jax.recipes.grpo")
    assert not HEAVY & modules
    servers = {"atlas_jax.llm_client", "atlas_jax.rewards.rim", "atlas_jax.rollout.vllm"}
    assert not servers & modules
    assert not {*CHOSEN, "atlas_jax.recipes.local_backend", "atlas_jax.rollout.local"} & modules
    assert not {"atlas_jax.addresses", "atlas_jax.data.shapes", "atlas_jax.sockets"} & modules


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
