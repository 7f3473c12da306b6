"""The launcher of vLLM servers: what it starts, refuses and says."""

import os
import signal
import sys
import urllib.request

import pytest

from atlas_jax import serve
from atlas_jax.rollout import capabilities
from tests import vllm_servers


def test_the_server_answers_on_its_port(vllm_server):
    serve.check(vllm_server.url)
    with urllib.request.urlopen(f"{vllm_server.url}/v1/models", timeout=10) as reply:
        assert reply.status == 200


def test_log_probabilities_are_of_the_whole_vocabulary_at_the_temperature(vllm_server):
    """Two of the three are what vLLM cannot do by itself; the sums over all tokens show it."""
    total = {}
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (0.5, 1e-6)):
        sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": 1, "logprobs": 20}
        payload = {"token_ids": [5, 6], "sampling_params": sampling}
        reply = vllm_server.post("/inference/v1/generate", payload)
        (content,) = reply["choices"][0]["logprobs"]["content"]
        total[temperature, top_p] = {t["token_id"]: t["logprob"] for t in content["top_logprobs"]}
    wide, narrow = total[0.5, 1.0], total[0.5, 1e-6]
    best = max(narrow, key=narrow.get)
    assert narrow[best] == pytest.approx(wide[best], abs=1e-5)
    assert narrow[best] < -0.1, "alone in its nucleus, and still not certain"
    flat = total[1.0, 1.0]
    a, b = sorted(wide, key=wide.get)[-2:]
    assert wide[b] - wide[a] == pytest.approx(2 * (flat[b] - flat[a]), abs=1e-4)


def test_a_server_without_the_routes_is_refused_by_name():
    lost = ("/pause", "/collective_rpc")
    paths = dict.fromkeys(r for r in capabilities.ROUTES if r not in lost)
    with pytest.raises(ValueError, match=r"vLLM 0\.9.*lacks /pause, /collective_rpc; start it"):
        capabilities.check_routes("http://host:1", "0.9", paths)


@pytest.mark.parametrize(
    ("python", "message"),
    [(sys.executable, "has no vLLM; run launch/install_vllm.sh"), ("nowhere", "does not run")],
)
def test_an_interpreter_without_vllm_is_refused(python, message):
    with pytest.raises(ValueError, match=message):
        serve.find_python(python)


def test_flags_of_vllm_are_handed_through_and_win():
    more = ["--tensor-parallel-size", "2", "--logprobs-mode", "raw_logprobs"]
    line = serve.command("python", "dir", "127.0.0.1", 8765, more)
    assert line[-4:] == more
    assert line.index("--model") < len(line) - 4


def test_only_an_open_bind_is_warned_of(caplog):
    serve._warn_open("127.0.0.1")
    assert not caplog.text
    serve._warn_open("0.0.0.0")
    assert "can pause the server" in caplog.text


def test_the_exit_code_and_signals_are_those_of_vllm(tmp_path):
    """A model that does not exist ends vLLM with an error; a signal while it starts ends it."""
    lost = vllm_servers.launch(tmp_path / "nothing", tmp_path / "lost.log")
    stopped = vllm_servers.launch(tmp_path / "nothing", tmp_path / "stopped.log")
    os.kill(stopped.process.pid, signal.SIGTERM)
    assert stopped.process.wait(60) != 0
    assert lost.process.wait(120) == 1
    assert "nothing" in lost.log.read_text()
