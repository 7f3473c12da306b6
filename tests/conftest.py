"""Eight CPU devices, so that every sharding is real; a persistent cache would hide recompiles."""

import os
import pathlib
import signal
import sys
import threading

from tests import processes

os.environ["XLA_FLAGS"] = processes.xla_flags(8)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

# Under nohup SIGHUP is ignored, and SIGINT in the background of a script. Programs that tests start
# would inherit that, but no handler.
if threading.current_thread() is threading.main_thread():
    for number in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)

import pytest
from absl import logging

from tests import vllm_servers, words

VLLM_WORDS = (*(f"q{i}" for i in range(8)), "answer", "hint", "plan")
VLLM_SIZES = {"hidden_size": 64, "max_position_embeddings": 512}
"""vLLM on a CPU has no attention for heads smaller than 32."""


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory):
    """A vLLM server of a tiny random model that speaks in VLLM_WORDS and digits.

    Whoever loads other weights or pauses it sets it right again.
    """
    directory = tmp_path_factory.mktemp("vllm")
    model = words.save(directory / "model", VLLM_WORDS, **VLLM_SIZES)
    with vllm_servers.running([model], directory) as (server,):
        yield server


@pytest.fixture(autouse=True)
def untouched_log():
    """Every test begins with a log that `caplog` sees; runs of earlier tests have set its level."""
    logger = logging.get_absl_logger()
    logger.setLevel(0)  # that of the root
    logger.propagate = True


def pytest_configure(config):
    """Lets the programs that tests start find no torch; xdist's own workers are none of these."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        paths = str(pathlib.Path(__file__).parent / "programs"), os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        os.environ["ATLAS_TESTS_PREFIX"] = sys.prefix


@pytest.fixture
def torch_to_find(monkeypatch):
    """Lets programs find torch, where a test is about what they import."""
    monkeypatch.setenv("ATLAS_TESTS_PREFIX", "")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """Keeps the tests of a file, and all that use `vllm_server`, in one of several processes."""
    for item in items:
        shared = "vllm_server" in item.fixturenames
        item.add_marker(pytest.mark.xdist_group("vllm" if shared else item.path.name))
