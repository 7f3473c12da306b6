"""Real vLLM servers for tests, each a process of `python -m atlas_jax.serve`.

A missing vLLM is an error: `launch/install_vllm.sh` makes `.venv-vllm`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from atlas_jax import serve

START_SECS = 600.0


class Server(NamedTuple):
    """A server that runs, what it printed, and the model that it was started with."""

    url: str
    process: subprocess.Popen[bytes]
    log: pathlib.Path
    root: str

    def freeze(self) -> None:
        """Stops vLLM with SIGSTOP: it takes requests and answers none."""
        self._signal(signal.SIGSTOP)

    def kill(self) -> None:
        """Ends vLLM with SIGKILL, as a crash would: no request gets an answer any more."""
        self.crash()
        self.process.wait(30)

    def crash(self) -> None:
        """Ends vLLM with SIGKILL, which `serve` may start again."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, check=True
        )
        for pid in map(int, children.stdout.split()):
            os.killpg(pid, number)

    def post(self, path: str, payload: dict[str, Any] | None = None) -> Any:
        """Returns the JSON reply to a POST."""
        body = json.dumps(payload or {}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, body, headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)


def free_port() -> int:
    """Returns a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(model: str | os.PathLike[str], log: pathlib.Path, *flags: str, port: int = 0) -> Server:
    """Starts a float32 server and returns at once; `wait` for it before use."""
    port = port or free_port()
    command = [sys.executable, "-m", "atlas_jax.serve", "--model", str(model), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            # Tests that kill vLLM mean it.
            [*command, "--dtype", "float32", "--restarts", "0", *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # tiny models, on cores that others use
        )
    return Server(f"http://127.0.0.1:{port}", process, log, str(model))


def wait(server: Server) -> None:
    """Waits until the server is healthy."""
    if not serve.wait_healthy(server.url, server.process, START_SECS):
        raise RuntimeError(f"vLLM did not start:\n{server.log.read_text()[-4000:]}")


def stop(server: Server) -> None:
    """Ends the server, if it still runs, in the regular way if that works."""
    server.process.terminate()
    try:
        server.process.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()


@contextlib.contextmanager
def running(
    models: Sequence[str | os.PathLike[str]], directory: pathlib.Path, *flags: str
) -> Iterator[list[Server]]:
    """Yields a server for each model, all started together."""
    servers = []
    try:
        for i, model in enumerate(models):
            servers.append(launch(model, directory / f"server_{i}.log", *flags))
        for server in servers:
            wait(server)
        yield servers
    finally:
        for server in servers:
            stop(server)
