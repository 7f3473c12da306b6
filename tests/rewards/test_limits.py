"""Batches at endpoints with the limits of providers: every one of them ends whole."""

import os
import subprocess
import sys

import pytest

from atlas_jax.rewards import RIMReward
from tests import limited_judge
from tests.limited_judge import Limits
from tests.rewards.test_rim import cases, options

PLENTY = 1e9


@pytest.mark.parametrize(
    "limits",
    [
        Limits("openai", requests=80, tokens=PLENTY, minute_secs=1.0),
        Limits("openai", requests=2000, tokens=80_000, minute_secs=1.0),
        Limits("anthropic", requests=160, tokens=PLENTY, minute_secs=2.0, overloaded_every=20),
        Limits("gemini", requests=50, tokens=PLENTY, minute_secs=0.5),
        Limits("date", requests=50, tokens=PLENTY, minute_secs=0.5),
        Limits("silent", requests=80, tokens=PLENTY, minute_secs=1.0),
    ],
    ids=["openai", "openai-tokens", "anthropic", "gemini", "date", "silent"],
)
def test_a_batch_above_a_provider_s_limit_ends_whole(limits, tmp_path):
    """All opinions come, with a single try each: to be refused as one too many is none."""
    with limited_judge.running(limits) as server:
        config = options(server, tmp_path, "small", "small", {"max_tries": 1, "timeout_secs": 30.0})
        results = RIMReward(config).judge(cases(12, limits.provider))
        found = server.stats()
    assert found["refused"] + found["overloaded"] > 0
    judges = [j for r in results for j in r.details["judges"].values()]
    assert all(r.value is not None for r in results)
    assert all(len(j["samples"]) == 3 and not j["failures"] for j in judges)
    assert sum(r.details["calls"] for r in results) == found["taken"] + found["misread"]


_BEHIND_A_PROXY = """
import pathlib, sys
from tests.rewards.test_rim import RIMReward, cases, options
server = type("Server", (), {"url": sys.argv[1]})
(result,) = RIMReward(options(server, pathlib.Path(sys.argv[2]))).judge(cases(1))
print(result.value is not None)
"""


def test_a_proxy_of_the_environment_is_used_but_for_this_host(tmp_path):
    """The endpoint's own server is the proxy, which answers what it would pass on."""
    limits = Limits("anthropic", requests=PLENTY, tokens=PLENTY, minute_secs=1.0)

    def score(url, **environment):
        command = [sys.executable, "-c", _BEHIND_A_PROXY, url, str(tmp_path / "none")]
        run = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    with limited_judge.running(limits) as server:
        proxy = {"http_proxy": f"http://us%40er:pass@127.0.0.1:{server.port}"}
        assert score("http://judge.invalid/v1", **proxy) == "True"
        basic = "Basic dXNAZXI6cGFzcw=="  # us@er:pass
        assert server.stats()["proxies"] == [f"judge.invalid {basic}"]
        assert score("http://judge.invalid/v1", no_proxy="judge.invalid", **proxy) == "True", "kept"
    with limited_judge.running(limits) as server:
        assert score(server.url.replace("127.0.0.1", "localhost"), http_proxy="http://x.invalid")
        assert server.stats()["proxies"] == [f"localhost:{server.port} "]
