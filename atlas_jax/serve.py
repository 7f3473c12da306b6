"""A vLLM server as GRPO needs it.

    python -m atlas_jax.serve --model DIR --port 8765 [any flag of vLLM]

It runs vLLM in an interpreter of its own (`launch/install_vllm.sh` makes one), waits until it is
healthy, passes signals on, and ends with vLLM's exit code. Imports no JAX and no vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from atlas_jax.rollout import capabilities

_GRACE_SECS = 30.0  # between a signal and the end
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
        "--worker-extension-cls", capabilities.WORKERS,
        "--api-server-count", "1",  # pausing acts on one front end
        "--scheduling-policy", capabilities.PRIORITY,  # probes go ahead of completions
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
    parser.add_argument(
        "--follow", default="", metavar="FILE",
        help="file that names a directory; vLLM is started again with it whenever it changes",
    )  # fmt: skip
    parser.add_argument("--start-timeout", type=float, default=1800.0, help="seconds")
    return parser.parse_known_args(argv)


class Server:
    """vLLM as a child process, which gets the signals that come here."""

    def __init__(self, options: argparse.Namespace, more: Sequence[str]) -> None:
        """Starts nothing yet.

        Raises:
            ValueError: if there is no vLLM.
        """
        self._options = options
        self._more = more
        self._python = find_python(options.python)
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _: types.FrameType | None) -> None:
        self._stopped = True
        if self._process:
            _end(self._process, number)

    def run(self, model: str) -> int | None:
        """Serves a model; returns vLLM's exit code, or None when another model is named.

        Raises:
            ValueError: if vLLM lacks what GRPO needs.
            TimeoutError: if it does not become healthy.
        """
        host, port = self._options.host, self._options.port
        line = command(self._python, model, host, port, self._more)
        # A session of its own, so that Ctrl-C reaches vLLM once, from here.
        process = subprocess.Popen(line, env=environment(os.environ), start_new_session=True)
        self._process = process
        if self._stopped:  # before there was a process to pass it on to
            _end(process, signal.SIGTERM)
        url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
        try:
            if wait_healthy(url, process, self._options.start_timeout):
                check(url, os.environ.get("VLLM_API_KEY", ""))
                logging.info("%s serves %s", url, model)
            return self._wait(process, model)
        finally:
            if process.poll() is None:
                _end(process, signal.SIGTERM)
                process.wait()

    def _wait(self, process: subprocess.Popen[bytes], model: str) -> int | None:
        while self._stopped or followed(self._options) == model:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=0.5 if self._options.follow else None)
        return None


def _end(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends vLLM a signal, and kills it where that does not end it, as happens while it starts."""

    def kill() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    process.send_signal(number)
    timer = threading.Timer(_GRACE_SECS, kill)
    timer.daemon = True
    timer.start()


def followed(options: argparse.Namespace) -> str:
    """Returns the model to serve: what the file of `--follow` names if it exists, or `--model`."""
    path = pathlib.Path(options.follow)
    return path.read_text().strip() if options.follow and path.exists() else options.model


def main(argv: Sequence[str]) -> int:
    """Runs the server until it ends, and returns its exit code."""
    options, more = _parse(argv)
    _warn_open(options.host)
    server, code = Server(options, more), None
    while code is None:
        code = server.run(followed(options))
    return code if code >= 0 else 128 - code  # as a shell reports a signal


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
