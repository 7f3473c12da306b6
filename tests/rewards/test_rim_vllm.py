"""SmolLM2 behind a real vLLM as judge: its opinions are worthless, the plumbing is what counts."""

import os
import subprocess
import sys

import pytest

from atlas_jax.options.judges import ActiveJudges, JudgeLimits, JudgeModel, RIMConfig
from atlas_jax.rewards import RIMReward
from atlas_jax.rewards.judges import Case
from tests import vllm_servers
from tests.assets import smollm2_gguf

pytestmark = pytest.mark.long

CASE = Case(
    "What is 3 + 4?", "7", "8", "I would add them.", "Count on from 3, four times.", "Answer: 7"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("judge")
    model = directory / "model"
    convert = [sys.executable, "tools/convert_checkpoint.py", str(smollm2_gguf()), str(model)]
    subprocess.run(convert, check=True, env=os.environ | {"PYTHONPATH": "."})
    flags = ("--max-model-len", "4096", "--served-model-name", "judge")
    with vllm_servers.running([model], directory, *flags) as (server,):
        yield server


def test_every_reply_under_a_schema_is_an_opinion(server, tmp_path):
    model = JudgeModel(
        model="judge", base_url=f"{server.url}/v1", response_format="json_schema", max_tokens=2000
    )
    config = RIMConfig(
        small_model=model,
        large_model=model,
        temperatures=(0.5,),
        active_judges=ActiveJudges(accuracy=False, diagnostic=False),
        limits=JudgeLimits(timeout_secs=800.0, max_tries=1),
        cache_dir=str(tmp_path),
    )
    (result,) = RIMReward(config).judge([CASE])
    assert result.value is not None
    judges = result.details["judges"].values()
    assert result.details["calls"] == 2 + sum(bool(judge["escalation"]) for judge in judges)
    assert result.details["tokens"] > 2 * 500
    for judge in judges:
        assert judge["failures"] == []
        assert len(judge["samples"]) == 1
        assert 1 <= len(judge["principles"]) <= 3
        assert len(judge["rationale"]) <= 800
