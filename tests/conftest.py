"""Eight CPU devices, so that every sharding is real; a persistent cache would hide recompiles.

Most of the time goes into compiling, and LLVM's optimizations are a third of it; the runs that
tests start as processes of their own have them.
"""

import os

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from tests import vllm_servers, words

VLLM_WORDS = (*(f"q{i}" for i in range(8)), "answer", "hint", "plan")
VLLM_SIZES = {"hidden_size": 64, "max_position_embeddings": 256}
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


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """Keeps the tests of a file, and all that use `vllm_server`, in one of several processes."""
    for item in items:
        shared = "vllm_server" in item.fixturenames
        item.add_marker(pytest.mark.xdist_group("vllm" if shared else item.path.name))
