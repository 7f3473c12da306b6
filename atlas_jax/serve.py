"""A vLLM server as GRPO needs it.

    python -m atlas_jax.serve --model DIR --port 8765 [any flag of vLLM]

It runs vLLM in an interpreter of its own (`launch/install_vllm.sh` makes one), waits until it is
healthy, passes signals on, and ends with vLLM's exit code. Imports no JAX and no vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from atlas_jax.rollout import capabilities

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PLUGIN = pathlib.Path(__file__).parent / "vllm_plugin"


def find_python(asked: str = "") -> str:
    """Returns the interpreter that has vLLM.

    The first of: `asked`, ATLAS_VLLM_PYTHON, `.venv-vllm` here or beside the package, this one.

    Raises:
        ValueError: if that one has no vLLM.
    """
    root = pathlib.Path(__file__).parents[1]
    places = [pathlib.Path(p, ".venv-vllm/bin/python") for p in (".", root)]
    found = [str(p.absolute()) for p in places if p.exists()]
    python = asked or os.environ.get("ATLAS_VLLM_PYTHON") or (found or [sys.executable])[0]
    look = [python, "-c", "import importlib.util as u, sys; sys.exit(not u.find_spec('vllm'))"]
    try:
        missing = subprocess.run(look, check=False, capture_output=True).returncode
    except OSError as error:
        raise ValueError(f"{python} does not run ({error.strerror}); give --python") from None
    if missing:
        raise ValueError(
            f"{python} has no vLLM; run launch/install_vllm.sh, or give --python or "
            "ATLAS_VLLM_PYTHON"
        )
    return python


def has_gpu() -> bool:
    """Returns whether an NVIDIA driver lists a GPU."""
    try:
        found = subprocess.run(["nvidia-smi", "--list-gpus"], check=False, capture_output=True)
    except OSError:
        return False
    return found.returncode == 0


def command(python: str, model: str, host: str, port: int, more: Sequence[str]) -> list[str]:
    """Returns the command line of the server; flags in `more` come last and so win."""
    own = [
        python, "-m", "vllm.entrypoints.openai.api_server",
        "--model", model, "--host", host, "--port", str(port),
        "--enable-scale-out",  # token ids in, token ids out
        "--generation-config", "vllm",  # no defaults of the model's own sampling
        "--logprobs-mode", capabilities.LOGPROBS[0],
        "--logits-processors", capabilities.LOGPROBS[1],
        "--api-server-count", "1",  # pausing acts on one front end
    ]  # fmt: skip
    return own + ([] if has_gpu() else ["--enforce-eager"]) + list(more)


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of the server."""
    cpu = {} if has_gpu() else {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # servers and trainer share the cores
        "TORCHDYNAMO_DISABLE": "1",  # else the first request waits for a compiler
    }  # fmt: skip
    fixed = {
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that pause and reload
        "VLLM_ENFORCE_STRICT_TOOL_CALLING": "0",  # no hidden grammar
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # where logits processors run behind the temperature
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_PLUGIN), inherited.get("PYTHONPATH")))),
    }
    return cpu | {"VLLM_NO_USAGE_STATS": "1"} | dict(inherited) | fixed


def wait_healthy(url: str, process: subprocess.Popen[bytes], timeout_secs: float) -> bool:
    """Waits until `url`/health answers; false if the process ends before.

    Raises:
        TimeoutError: after `timeout_secs`.
    """
    end = time.monotonic() + timeout_secs
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return True
        except OSError:
            if time.monotonic() > end:
                raise TimeoutError(f"{url} is not healthy after {timeout_secs:g} s") from None
            time.sleep(0.5)
    return False


def check(url: str, api_key: str = "") -> None:
    """Checks that the server has every route that GRPO uses.

    Raises:
        ValueError: names what is missing.
    """
    version = _get(f"{url}/version", api_key)["version"]
    capabilities.check_routes(url, version, _get(f"{url}/openapi.json", api_key)["paths"])
    known = capabilities.KNOWN_VERSIONS
    if version not in known:
        logging.warning("vLLM %s is not one of the tested %s", version, ", ".join(known))


def _get(url: str, api_key: str) -> Any:
    request = urllib.request.Request(url)
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


def _warn_open(host: str) -> None:
    if host not in _LOOPBACK:
        logging.warning(
            "--host %s: whoever reaches this port can pause the server, run methods of its workers "
            "and load any weights that it can read. --api-key, or VLLM_API_KEY, guards /v1 and "
            "/inference, but not these; keep the port inside a private network",
            host,
        )  # fmt: skip


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m atlas_jax.serve",
        description="Starts a vLLM server for GRPO; other flags go to vLLM, such as "
        "--tensor-parallel-size, --gpu-memory-utilization, --max-model-len.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--python", default="", help="interpreter that has vLLM")
    parser.add_argument("--start-timeout", type=float, default=1800.0, help="seconds")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str]) -> int:
    """Runs the server until it ends, and returns its exit code."""
    options, more = _parse(argv)
    python = find_python(options.python)
    _warn_open(options.host)
    line = command(python, options.model, options.host, options.port, more)
    # A session of its own, so that Ctrl-C reaches vLLM once, from here.
    process = subprocess.Popen(line, env=environment(os.environ), start_new_session=True)

    def pass_on(number: int, _: types.FrameType | None) -> None:
        process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    url = f"http://{host}:{options.port}"
    try:
        if wait_healthy(url, process, options.start_timeout):
            check(url, os.environ.get("VLLM_API_KEY", ""))
            logging.info("%s serves %s", url, options.model)
    except (ValueError, OSError):
        process.terminate()
        process.wait()
        raise
    return process.wait()


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
