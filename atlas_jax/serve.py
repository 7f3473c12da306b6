"""Start and supervision of a vLLM server for GRPO.

    atlas-serve --model DIR --port 8765 [any flag of vLLM]

vLLM runs in an interpreter of its own (`launch/install_vllm.sh` makes one), and the program waits
until it is healthy. If vLLM ends by itself later, it is started again after a growing pause, at
most `--restarts` times in a row. A signal ends vLLM, and no process of vLLM outlives this program,
however it ends. The exit code is vLLM's, or 1 if vLLM ends with 0 without being asked to. Imports
no JAX and no vLLM.

With `--token-file FILE`, with VLLM_API_KEY set, and on any address but loopback, vLLM asks for a
token on all its routes but /health (`vllm_plugin/guard.py`). VLLM_API_KEY is the token where it is
set; FILE is then neither read nor made.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import logging

from atlas_jax import keeper, server_token
from atlas_jax.checkpoint import diagnosis, layout
from atlas_jax.rollout import capabilities
from atlas_jax.server_output import ServerOutput
from atlas_jax.vllm_python import VllmPython, find_python, has_gpu

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PLUGIN = pathlib.Path(__file__).parent / "vllm_plugin"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_TOKENIZERS = ("tokenizer*", "vocab.*", "tekken.json", "*.tiktoken")


def check_model(model: str, more: Sequence[str] = ()) -> None:
    """Checks that a model directory has all files that vLLM reads; vLLM checks a hub id itself.

    Args:
        model: a directory, a file or a hub id.
        more: flags of vLLM, some of which replace files.

    Raises:
        ValueError: if files are missing; the message names them.
    """
    path = pathlib.Path(model)
    if not path.exists():
        if _HUB_ID.fullmatch(model):
            return
        raise ValueError(f"the model directory {model} does not exist")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"the model {model} is a file; give a directory in HF layout")
        return
    diagnosis.check_adapter(path)
    flags = {word.partition("=")[0].replace("_", "-") for word in more}
    missing = []
    if not any((path / name).exists() for name in ("config.json", "params.json")):
        missing.append("config.json")
    if "--load-format" not in flags:
        missing += _missing_weights(path)
    if not flags & {"--tokenizer", "--skip-tokenizer-init"} and not _any(path, _TOKENIZERS):
        missing.append("tokenizer files")
    if missing:
        final = path / "final"
        hint = f"; did you mean {final}?" if (final / "config.json").exists() else ""
        raise ValueError(f"the model directory {model} has no {', no '.join(missing)}{hint}")


def _missing_weights(path: pathlib.Path) -> list[str]:
    """Returns the missing weight files; vLLM reads some kinds that training does not."""
    if layout.has_weights(path):
        if (path / layout.WHOLE).exists() and (path / layout.INDEX).exists():
            raise ValueError(
                f"{path} has {layout.WHOLE} and {layout.INDEX}; training reads the one and vLLM "
                "what the other lists; remove the one that is left over"
            )
        files = layout.weight_files(path)
    else:
        files = [file for index in path.glob("*.index.json") for file in layout.indexed(index)]
        if not files and not _any(path, _OTHER_WEIGHTS):
            return ["weight files (*.safetensors)"]
    for file in files:
        if file.exists():
            layout.check_fetched(file)
    return [file.name for file in files if not file.exists()]


def _any(path: pathlib.Path, patterns: Sequence[str]) -> bool:
    return any(next(path.glob(pattern), None) for pattern in patterns)


def check_port(host: str, port: int) -> None:
    """Checks that the port is free.

    Raises:
        ValueError: if the port is taken, or the address is not one of this host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        if isinstance(error, socket.gaierror):
            advice = "give the address of an interface of this host as --host"
        else:
            advice = "end what listens there, or give another --port or --host"
        raise ValueError(f"cannot listen on {host}:{port} ({reason}); {advice}") from None


def find_token(options: argparse.Namespace) -> str:
    """Returns the token that vLLM requires; "" for none, which is allowed on loopback only.

    Raises:
        ValueError: if the token file cannot be used.
    """
    token = os.environ.get("VLLM_API_KEY", "")
    if token:
        logging.info("the token of the server is VLLM_API_KEY")
        return token
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    # Whoever reaches the server could replace its weights, so other hosts need a token.
    default = "" if options.host in _LOOPBACK else pathlib.Path(cache, "atlas_jax/server_token")
    path = options.token_file or default
    if not path:
        return ""
    token = server_token.read_or_make(path)
    logging.info("the token of the server is in %s; clients send it as VLLM_API_KEY", path)
    return token


def command(
    python: VllmPython,
    model: str,
    host: str,
    port: int,
    more: Sequence[str],
    guarded: bool = False,
) -> list[str]:
    """Returns the command line of the server.

    Args:
        python: the interpreter that has vLLM.
        model: a directory or hub id.
        host: the address to listen on.
        port: the port to listen on.
        more: the user's flags, which come last and therefore win.
        guarded: whether all routes but /health require the token.
    """
    if python.has_command:
        start = ["vllm.entrypoints.cli.main", "serve", model]
    else:
        start = ["vllm.entrypoints.openai.api_server", "--model", model]
    defaults = [
        python.path, "-m", *start, "--host", host, "--port", str(port),
        "--enable-scale-out",  # token ids in, token ids out
        "--generation-config", "vllm",  # sampling defaults of vLLM, not of the model
        "--logprobs-mode", capabilities.LOGPROBS[0],
        "--logits-processors",
        capabilities.V2_PROCESSOR if python.is_v2 else capabilities.LOGPROBS[1],
        "--worker-extension-cls", capabilities.WORKERS,
        "--api-server-count", "1",  # a pause acts on one front end only
        "--scheduling-policy", capabilities.PRIORITY,  # probes go ahead of completions
    ]  # fmt: skip
    if not has_gpu():
        # On a CPU (0.32) a seeded request ends the engine if its prompt is computed in chunks: "CPU
        # Generator does not use offset". Whole prompts wait for a pass with enough room.
        defaults += ["--enforce-eager", "--no-enable-chunked-prefill"]
    else:
        # A server that gets its weights from files takes no notice of it.
        defaults += ["--weight-transfer-config", json.dumps({"backend": capabilities.TRANSFER})]
    # vLLM makes the last middleware the outermost one, so the guard sees every request first.
    guard = ["--middleware", "guard.Guard"] if guarded else []
    return defaults + _with_float32_head(more) + guard


def _with_float32_head(more: Sequence[str]) -> list[str]:
    """Returns the flags with a `head_dtype` of float32, the dtype of the trainer's logits.

    vLLM uses only the last --hf-overrides; a flag --hf-overrides.KEY adds to it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hf-overrides", "--hf_overrides", default="{}")
    flags, others = parser.parse_known_args(more)
    try:
        asked = dict(json.loads(flags.hf_overrides))
    except (ValueError, TypeError):
        raise ValueError(
            f"--hf-overrides {flags.hf_overrides} is no JSON object; write it as "
            """'{"key": value}'"""
        ) from None
    words = [w.replace("_", "-") for w in others if re.match("--hf[-_]overrides.head_dtype", w)]
    if words or asked.get("head_dtype", "float32") != "float32":
        logging.warning(
            "--hf-overrides asks for another head_dtype than float32: log-probabilities of servers "
            "in bfloat16 are then further from the trainer's"
        )
    values = {"head_dtype": "float32"} | asked
    return [f"--hf-overrides.{key}={json.dumps(value)}" for key, value in values.items()] + others


def environment(
    inherited: Mapping[str, str], token: str = "", is_v2: bool = False, more: Sequence[str] = ()
) -> dict[str, str]:
    """Returns the environment of the server.

    Args:
        inherited: the environment of this program.
        token: the token that the server requires; "" for none.
        is_v2: whether it runs with the V2 model runner.
        more: the user's flags.
    """
    caches = pathlib.Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
    cpu = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # servers and trainer share the cores
        "TORCHDYNAMO_DISABLE": "1",  # otherwise the first request waits for a compiler
    }
    fixed = {
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that pause and reload
        "VLLM_ENFORCE_STRICT_TOOL_CALLING": "0",  # no hidden grammar
        "VLLM_USE_V2_MODEL_RUNNER": str(int(is_v2)),  # each has logits processors of its own
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_PLUGIN), inherited.get("PYTHONPATH")))),
    }
    guard = {"VLLM_API_KEY": token} if token else {}
    if any(word.replace("_", "-") == "--enable-lora" for word in more):
        fixed["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # the routes that load adapters
    # With unequal GPUs, CUDA's default order differs from the driver's, which vLLM also reads.
    default = {
        "VLLM_NO_USAGE_STATS": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "TORCHINDUCTOR_CACHE_DIR": str(caches),  # persistent, unlike other temporary files
    }
    # The user's variables replace the defaults, but not what the trainer relies on.
    return ({} if has_gpu() else cpu) | default | dict(inherited) | fixed | guard


def wait_healthy(
    url: str,
    process: subprocess.Popen[bytes],
    timeout_secs: float,
    is_ours: Callable[[], bool] = lambda: True,
) -> bool:
    """Waits until `url`/health answers; returns false if the process ends first.

    Args:
        url: the address of the server.
        process: the process of the server.
        timeout_secs: the longest wait.
        is_ours: a function that tells whether that process is the one answering at `url`.

    Raises:
        TimeoutError: if the server is not healthy after `timeout_secs`.
    """
    end = time.monotonic() + timeout_secs
    while process.poll() is None:
        with contextlib.suppress(OSError), _open(urllib.request.Request(f"{url}/health"), 5.0):
            # Another program may have taken the port since it was checked.
            if is_ours():
                return True
        if time.monotonic() > end:
            raise TimeoutError(f"{url} is not healthy after {timeout_secs:g} s")
        time.sleep(0.5)
    return False


def check(url: str, api_key: str = "") -> None:
    """Checks that the server has every route that GRPO uses.

    Raises:
        ValueError: if routes are missing; the message names them.
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
    with _open(request, 30.0) as reply:
        return json.load(reply)


def _open(request: urllib.request.Request, timeout_secs: float) -> Any:
    # The environment's proxy would be asked for addresses of this host.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(request, timeout=timeout_secs)


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_usage_error(message))


def _usage_error(message: str) -> int:
    print(f"error: {message} (--help shows the flags)", file=sys.stderr)  # noqa: T201
    return 2


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _ArgumentParser(
        prog="atlas-serve",
        description="Starts a vLLM server for GRPO; other flags go to vLLM, such as "
        "--tensor-parallel-size, --gpu-memory-utilization, --max-model-len.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--python", default="", help="interpreter that has vLLM")
    parser.add_argument(
        "--token-file",
        default="",
        metavar="FILE",
        help="holds the token that all routes but /health ask for; made if it does not exist",
    )
    parser.add_argument(
        "--follow",
        default="",
        metavar="FILE",
        help="file that names a directory; vLLM is started again with it whenever it changes",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        metavar="N",
        help="most starts in a row after vLLM has ended by itself",
    )
    parser.add_argument("--start-timeout", type=float, default=1800.0, help="seconds")
    options, more = parser.parse_known_args(argv)
    if any(re.match("--api[-_]key(=|$)", word) for word in more):
        parser.error("--api-key shows the key to all users of this host; give --token-file FILE")
    if not 0 < options.port < 65536:
        parser.error(f"--port {options.port} is not from 1 to 65535")
    if options.restarts < 0:
        parser.error(f"--restarts {options.restarts} is below 0")
    return options, more


class VllmProcess:
    """A vLLM process under a keeper, which ends it when this program ends."""

    def __init__(self, options: argparse.Namespace, more: Sequence[str]) -> None:
        """Makes all checks that need no running vLLM, and starts nothing.

        Raises:
            ValueError: if vLLM, the model or the token is missing, or the port is taken.
        """
        self._options = options
        self._more = more
        self._stopped = False
        self._was_healthy = False
        self._process: subprocess.Popen[bytes] | None = None
        # vLLM itself would say the same, but only after minutes.
        check_model(followed(options), more)
        check_port(options.host, options.port)
        self._python = find_python(options.python)
        self._token = find_token(options)
        # If the keeper is killed, vLLM's processes become children of this one, which ends them.
        keeper.adopt_orphans()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            # Under nohup the end of the terminal must not end the server.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._stop)

    def _stop(self, number: int, _: types.FrameType | None) -> None:
        if not self._stopped:
            logging.info("%s: ending vLLM", signal.Signals(number).name)
        self._stopped = True
        if self._process:
            _end(self._process)

    def serve(self) -> int:
        """Serves until a signal, or until vLLM has ended too often; returns the exit code.

        Raises:
            ValueError: if vLLM does not start the first time, or has not all routes of GRPO.
            TimeoutError: if it does not become healthy in time the first time.
        """
        failures = 0
        while True:
            start = time.monotonic()
            try:
                code = self._run(followed(self._options))
                reason = "" if code is None else f"vLLM ended by itself: {_describe(code)}"
            except (ValueError, TimeoutError) as error:
                # What has never served will not serve the next time either.
                if not self._was_healthy:
                    raise
                code = 1
                reason = str(error)
            if code is None:
                continue  # with another model
            if self._stopped:
                return code
            failures = 1 if time.monotonic() - start > _STABLE_SECS else failures + 1
            if failures > self._options.restarts:
                logging.error("%s; it is not started again (--restarts)", reason)
                # A code of 0 that nobody asked for is a failure too: GRPO has lost its server.
                return code or 1
            secs = min(_BACKOFF_SECS * 2 ** (failures - 1), _MAX_BACKOFF_SECS)
            counted = f"{failures} of {self._options.restarts}"
            logging.error("%s; it is started again in %g s (%s)", reason, secs, counted)
            if not self._wait_unless_stopped(secs):
                return 0

    def _wait_unless_stopped(self, secs: float) -> bool:
        """Waits, and returns false as soon as a signal has come."""
        end = time.monotonic() + secs
        while not self._stopped and time.monotonic() < end:
            time.sleep(0.1)
        return not self._stopped

    def _run(self, model: str) -> int | None:
        """Serves a model; returns the exit code, or None if `--follow` names another model.

        Raises:
            ValueError: if vLLM does not start, or has not all routes that GRPO needs.
            TimeoutError: if it does not become healthy in time.
        """
        host = self._options.host
        port = self._options.port
        line = command(self._python, model, host, port, self._more, bool(self._token))
        temporary = tempfile.mkdtemp(
            prefix="atlas_"
        )  # a short name, because socket paths have a length limit
        process = subprocess.Popen(
            # -P: modules beside the keeper's file must not shadow the standard library.
            [sys.executable, "-P", keeper.__file__, temporary, *line],
            env=environment(os.environ, self._token, self._python.is_v2, self._more),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this program only, which ends vLLM in order
        )
        # A signal may have come between the checks and this line, when `_stop` had no process.
        self._process = process
        if self._stopped:
            _end(process)
        output = ServerOutput(process.stdout)  # type: ignore[arg-type]
        healthy = False
        try:
            healthy = self._announce(process, model)
            if healthy:
                self._was_healthy = True
                output.release()
            code = self._wait(process, model)
        finally:
            _end(process)
            process.wait()
            # The keeper has done both already, unless it was killed itself.
            keeper.end_descendants()
            keeper.clear(temporary)
            output.join(timeout=5)
        if code is not None and not healthy and not self._stopped:
            raise ValueError(f"vLLM did not start: {output.error or _describe(code)}{_HINT}")
        return code

    def _announce(self, process: subprocess.Popen[bytes], model: str) -> bool:
        """Waits until vLLM is healthy and logs it; returns false if vLLM ends first."""
        # An address of all interfaces is not one to connect to.
        host = self._options.host
        port = self._options.port
        name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
            host, f"[{host}]" if ":" in host else host
        )
        url = f"http://{name}:{port}"
        # The check of the listener keeps another server's answer on this port from counting.
        if not wait_healthy(
            url, process, self._options.start_timeout, lambda: keeper.listens(os.getpid(), port)
        ):
            return False
        check(url, self._token)
        logging.info("%s serves %s", url, model)
        return True

    def _wait(self, process: subprocess.Popen[bytes], model: str) -> int | None:
        while self._stopped or followed(self._options) == model:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # Only a followed file needs polling; a signal closes the keeper's input instead.
                return process.wait(timeout=0.5 if self._options.follow else None)
        return None


_BACKOFF_SECS = 1.0
"""Seconds before the first start again; doubled before each further one."""

_MAX_BACKOFF_SECS = 60.0

_STABLE_SECS = 600.0
"""Seconds for which vLLM must have run for its end to count as the first one in a row."""

_HINT = " (ATLAS_TRACEBACK=1 shows all that it printed)"


def _describe(code: int) -> str:
    number = code - 128 if code > 128 else -code
    names = {s.value: s.name for s in signal.Signals}
    return f"exit code {code}" + (f", {names[number]}" if number in names else "")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tells the keeper to end vLLM, by closing its standard input."""
    if process.stdin:
        with contextlib.suppress(OSError):
            process.stdin.close()


def followed(options: argparse.Namespace) -> str:
    """Returns the model to serve: the one named in the file of `--follow`, else `--model`."""
    path = pathlib.Path(options.follow)
    return path.read_text().strip() if options.follow and path.exists() else options.model


def main(argv: Sequence[str]) -> int:
    """Runs the server until it ends, and returns its exit code."""
    options, more = _parse(argv)
    code = VllmProcess(options, more).serve()
    return code if code >= 0 else 128 - code  # as a shell reports a signal


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
