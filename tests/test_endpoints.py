"""A key goes to the one it belongs to, as a server that records headers sees it."""

import json
import os
import subprocess
import sys

import pytest

from atlas_jax.endpoints import resolve
from atlas_jax.options.judges import JudgeModel
from tests import judge_server
from tests.rewards.test_agreement import session

KEY = "AIzaSyTheKeyOfGemini0123456789"


def score(tmp_path, rim):
    """Runs the tool that asks judges, with Gemini's key in the environment."""
    (tmp_path / "traces.jsonl").write_text(json.dumps(session(1, 0.5)) + "\n")
    (tmp_path / "mine.py").write_text(
        "from atlas_jax.configs import rim_config\n\n\n"
        "def apply(config):\n    rim_config.apply(config)\n"
        "    c = config.reward.rim\n    c.cache_dir = ''\n    c.limits.max_tries = 1\n"
        + "".join(f"    {line}\n" for line in rim)
    )
    command = [
        sys.executable, "tools/score_traces.py", "--traces", str(tmp_path / "traces.jsonl"),
        "--rim", str(tmp_path / "mine.py"), "--output", str(tmp_path / "out.json"),
    ]  # fmt: skip
    environment = os.environ | {"GEMINI_API_KEY": KEY, "JUDGE_KEY": "mine"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_key_of_a_provider_is_sent_to_nobody_else(tmp_path):
    with judge_server.running() as server:
        own = f"c.small_model.base_url = c.large_model.base_url = {server.url!r}"
        result = score(tmp_path, [own])
        assert result.returncode == 0, result.stderr
        assert server.stats()["keys"] == [""]

        result = score(tmp_path, [own, "c.small_model.api_key_env = 'GEMINI_API_KEY'"])
        assert result.returncode == 1
        error, _ = result.stderr.strip().splitlines()  # and where a traceback is to be had
        assert error.startswith(
            f"error: reward.rim.small_model would send GEMINI_API_KEY to {server.url}, but"
        )
        assert server.stats()["keys"] == [""]

        both = "c.small_model.api_key_env = c.large_model.api_key_env = 'JUDGE_KEY'"
        result = score(tmp_path, [own, both])
        assert result.returncode == 0, result.stderr
        assert "unencrypted" not in result.stderr, "nobody else reads loopback"
        assert server.stats()["keys"] == ["", "Bearer mine"]


def test_a_redirect_takes_no_key_along(tmp_path):
    with judge_server.running() as server:
        away = server.url.replace("/v1", "/moved/v1")
        result = score(
            tmp_path,
            [
                f"c.small_model.base_url = c.large_model.base_url = {away!r}",
                "c.small_model.api_key_env = c.large_model.api_key_env = 'JUDGE_KEY'",
            ],
        )
        assert server.stats()["keys"] == []
    assert "307: moved to /v1/chat/completions; give that address" in result.stdout


def test_a_key_that_is_sent_over_a_network_unencrypted_is_warned_of(tmp_path):
    result = score(
        tmp_path,
        [
            "c.small_model.base_url = c.large_model.base_url = 'http://judge.invalid:8765/v1'",
            "c.small_model.api_key_env = c.large_model.api_key_env = 'JUDGE_KEY'",
        ],
    )
    warning = "the key in JUDGE_KEY goes to http://judge.invalid:8765/v1 unencrypted"
    assert result.stderr.count(warning) == 2, result.stderr


@pytest.mark.parametrize(
    ("model", "variable", "url"),
    [
        ("gemini/gemini-2.5-pro", "", "https://generativelanguage.googleapis.com/v1beta/openai"),
        ("xai/grok-4", "XAI_API_KEY", "https://api.x.ai/v1"),
        ("openai/gpt-4.1", "MY_OPENAI_KEY", "https://api.openai.com/v1"),
    ],
)
def test_a_provider_implies_its_variable_unless_another_one_is_named(model, variable, url):
    company, name = model.split("/")
    endpoint = resolve("judge", JudgeModel(model=model, api_key_env=variable))
    assert endpoint == (url, name, variable or f"{company.upper()}_API_KEY")


@pytest.mark.parametrize(
    "url",
    ["https://api.openai.com/v1", "https://eu.api.openai.com./v1", "https://API.openai.com:443/v1"],
)
def test_a_provider_s_own_hosts_get_its_key(url):
    endpoint = resolve("judge", JudgeModel("gpt", base_url=url, api_key_env="OPENAI_API_KEY"))
    assert endpoint.api_key_env == "OPENAI_API_KEY"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (JudgeModel("m", "http://api.openai.com/v1", "OPENAI_API_KEY"), "would send OPENAI_API"),
        (JudgeModel("m", "https://api.openai.com.evil.org/v1", "OPENAI_API_KEY"), "would send"),
        (JudgeModel("m", "https://evilapi.openai.com.org/v1", "OPENAI_API_KEY"), "would send"),
        (JudgeModel("m", "https://notapi.x.ai.evil/v1", "XAI_API_KEY"), "would send XAI_API_KEY"),
        (JudgeModel("m", "https://openrouter.ai/v1", "ANTHROPIC_API_KEY"), "would send ANTHROPIC"),
        (JudgeModel("gemini/m", api_key_env="OPENAI_API_KEY"), "would send OPENAI_API_KEY to htt"),
        (JudgeModel("m", "https://api.openai.com@evil.org/v1", "OPENAI_API_KEY"), "has a user in"),
        (JudgeModel("m", "https://evil.org\\@api.openai.com/v1", "OPENAI_API_KEY"), "write base_"),
        (JudgeModel("m", "https://u:hush@h/v1", "JUDGE_KEY"), r"base_url=https://\*\*\*@h/v1 and"),
        (JudgeModel("m", "http://h/v1", "sk-not-a-variable"), "and not the key itself"),
    ],
)
def test_a_key_that_would_go_astray_is_refused_in_a_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve("reward.rim.small_model", options)
    assert "\n" not in str(error.value)
    for secret in ("hush", "sk-not"):
        assert secret not in str(error.value)
