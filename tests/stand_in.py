"""A stand-in for a vLLM server: its routes, a tiny Llama's true tokens, and faults on demand.

    python -m tests.stand_in --model DIR --port PORT

It computes what vLLM would (`tests.llama`), from the weights that it was told to load, so that a
trainer's probe agrees with it; and it keeps a prefix cache, frozen completions and spans of weight
versions as vLLM does. It takes a second to start, where vLLM takes half a minute.

It can fail as `tests.http_faults` says, and in two more ways:

        skip      says that it did what `/collective_rpc` asks, and did not
        noise     does as usual, and then adds noise of that `size` to the weights
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import prometheus_client
from aiohttp import web

from atlas_jax.rollout import capabilities
from tests import fake_nccl, http_faults, llama
from tests.processes import free_port

_BLOCK = 16  # tokens of a block of the prefix cache


@dataclasses.dataclass(eq=False)
class Sequence:
    """A completion that is being written."""

    tokens: list[int]
    salt: str
    adapter: int
    cache: list[llama.Layer] | None = None
    logits: Any = None
    written: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    labels: list[str] = dataclasses.field(default_factory=list)


class StandIn(http_faults.Faults):
    """One server.

    Attributes:
        secs_per_token: time that each token of a completion takes.
        device: kind of device that it says it has.
        wire: over which it takes weights; None takes them from files alone.
        ranks: number of its workers, which all get the same tensors.
        num_preemptions: number of preemptions that its metrics state.
        adapters: LoRA adapters by their number.
    """

    def __init__(
        self,
        model: str,
        key: str = "",
        refuses_when_paused: bool = False,
        num_scores: int = 0,
        max_lora_rank: int = 0,
    ) -> None:
        """Loads the model.

        Args:
            model: directory of a Llama in HF layout.
            key: bearer token that all routes but /health want; empty wants none.
            refuses_when_paused: whether it answers 503 while paused, but in mode `keep`, as vLLM
                0.33 does.
            num_scores: most tokens that it names at a place of a prompt; 0 starts it as for GRPO,
                in which mode the scores of a prompt are logits.
            max_lora_rank: largest rank of adapters; 0 takes none.
        """
        super().__init__()
        self.root = model
        self.max_lora_rank = max_lora_rank
        self.secs_per_token = 0.0
        self.device = "cuda"
        self.wire: fake_nccl.Wire | None = None
        self.ranks = 1
        self._receivers: list[fake_nccl.Receiver] = []
        self._updating = False
        self.num_preemptions = 0
        self._key = key
        self._refuses = refuses_when_paused
        self._num_scores = num_scores
        self.begin_anew()
        self._mode = ""  # of the pause; "" while it goes on
        self._active: set[Sequence] = set()
        self._blocks: dict[tuple[str, tuple[int, ...]], list[llama.Layer]] = {}
        self._changed = asyncio.Condition()
        self._engine = asyncio.Lock()  # does one thing at a time

    def begin_anew(self) -> None:
        """Takes the weights of the start, as a server does that was started again."""
        self.model = llama.Llama(self.root)
        self.adapters: dict[int, llama.Adapter] = {}
        self._names: dict[str, int] = {}  # of adapters
        self._swapped: int | None = None  # the adapter that the workers were told last
        self._label = "default"

    def app(self) -> web.Application:
        """Returns the web application."""
        app = web.Application(middlewares=[self.watched, self._guarded], client_max_size=1 << 26)
        for method, path, handler in (
            ("GET", "/health", self._nothing),
            ("GET", "/version", self._version),
            ("GET", "/openapi.json", self._openapi),
            ("GET", "/server_info", self._server_info),
            ("GET", "/v1/models", self._models),
            ("GET", "/is_paused", self._is_paused),
            ("GET", "/weight_info", self._weight_info),
            ("GET", "/metrics", self._metrics),
            ("POST", "/pause", self._pause),
            ("POST", "/resume", self._resume),
            ("POST", "/collective_rpc", self._collective_rpc),
            ("POST", "/reset_prefix_cache", self._reset_prefix_cache),
            ("POST", "/update_weight_version", self._update_weight_version),
            ("GET", "/get_world_size", self._get_world_size),
            ("POST", "/init_weight_transfer_engine", self._init_transfer),
            ("POST", "/start_weight_update", self._start_update),
            ("POST", "/update_weights", self._update_weights),
            ("POST", "/finish_weight_update", self._finish_update),
            ("POST", "/detokenize", self._detokenize),
            ("POST", capabilities.LOAD_ADAPTER, self._load_adapter),
            ("POST", "/v1/unload_lora_adapter", self._unload_adapter),
            ("POST", capabilities.GENERATE, self._generate),
        ):
            app.router.add_route(method, path, handler)
        self.add_routes(app)
        return app

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Any) -> web.StreamResponse:
        free = not self._key or request.path == "/health" or request.path.startswith("/stand_in")
        if not free and request.headers.get("Authorization") != f"Bearer {self._key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    async def fail(
        self, fault: dict[str, Any], request: web.Request, handler: Any
    ) -> web.StreamResponse:
        """Answers a request as a fault says."""
        if fault["do"] == "skip":
            return web.json_response({"results": [None]})
        reply = await super().fail(fault, request, handler)
        if fault["do"] == "noise":
            draws = np.random.default_rng(0)
            for name, tensor in self.model.weights.items():
                noise = fault["size"] * draws.normal(size=tensor.shape)
                self.model.weights[name] = (tensor + noise).astype(np.float32)
        return reply

    async def _nothing(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": capabilities.KNOWN_VERSIONS[0]})

    async def _openapi(self, _: web.Request) -> web.Response:
        routes = [*capabilities.ROUTES, *([capabilities.LOAD_ADAPTER] * bool(self.max_lora_rank))]
        return web.json_response({"paths": {route: {} for route in routes}})

    async def _server_info(self, _: web.Request) -> web.Response:
        config = {
            "parallel_config": {"worker_extension_cls": capabilities.WORKERS},
            "model_config": {
                "logprobs_mode": "raw_logprobs" if self._num_scores else capabilities.LOGPROBS[0],
                "max_logprobs": self._num_scores or 20,
                "logits_processors": [capabilities.LOGPROBS[1]],
                "quantization": None,
                "dtype": "torch.float32",
            },
            "cache_config": {"block_size": _BLOCK},
            "weight_transfer_config": {"backend": "nccl"} if self.wire else None,
            "device_config": {"device": self.device},
            "lora_config": {"max_lora_rank": self.max_lora_rank, "target_modules": None}
            if self.max_lora_rank
            else None,
            "scheduler_config": {"max_num_seqs": 256, "policy": capabilities.PRIORITY},
        }
        return web.json_response({"vllm_config": config})

    async def _models(self, _: web.Request) -> web.Response:
        length = self.model.config["max_position_embeddings"]
        base = {"id": self.root, "root": self.root, "max_model_len": length}
        return web.json_response({"data": [base, *({"id": name} for name in self._names)]})

    async def _load_adapter(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        if name in self._names:
            return web.json_response({"error": "has already been loaded"}, status=400)
        try:
            adapter = llama.Adapter(path)
        except OSError:
            return web.json_response({"error": f"No adapter found for {path}"}, status=404)
        number = max(self.adapters, default=0) + 1
        self.adapters[number] = adapter
        self._names[name] = number
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        del self._names[(await request.json())["lora_name"]]  # the workers keep its tensors
        return web.Response(text="Success: removed")

    async def _is_paused(self, _: web.Request) -> web.Response:
        async with self._engine:
            return web.json_response({"is_paused": bool(self._mode)})

    async def _weight_info(self, _: web.Request) -> web.Response:
        async with self._engine:
            return web.json_response({"weight_version": self._label})

    async def _metrics(self, _: web.Request) -> web.Response:
        """Answers as vLLM does, whose page has many more families than these."""
        registry = prometheus_client.CollectorRegistry()
        labels = {"engine": "0", "model_name": self.root}
        values = {
            "num_requests_running": len(self._active),
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": len(self._active) / 256,
        }
        for name, value in values.items():
            gauge = prometheus_client.Gauge(f"vllm:{name}", name, labels, registry=registry)
            gauge.labels(**labels).set(value)
        counter = prometheus_client.Counter("vllm:num_preemptions", "", labels, registry=registry)
        counter.labels(**labels).inc(self.num_preemptions)
        return web.Response(body=prometheus_client.generate_latest(registry))

    async def _pause(self, request: web.Request) -> web.Response:
        self._mode = request.query["mode"]
        async with self._changed:
            if self._mode == "wait":
                await self._changed.wait_for(lambda: not self._active)
        return web.json_response({"status": "paused"})

    async def _resume(self, _: web.Request) -> web.Response:
        self._mode = ""
        async with self._changed:
            self._changed.notify_all()
        return web.json_response({"status": "resumed"})

    async def _collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        async with self._engine:
            if body["method"] == "nccl_version":
                return web.json_response({"results": ["2.98.7"] * self.ranks})
            if body["method"] == "weight_checksums":
                tensors = dict(self.model.weights)
                if self._swapped is not None:
                    tensors |= self.adapters[self._swapped].weights
                own = {name: _checksum(tensor) for name, tensor in tensors.items()}
                return web.json_response({"results": [own]})
            if body["method"] == "adapter_numbers":
                return web.json_response({"results": [sorted(self.adapters)]})
            try:
                if body["method"] == "load_adapter":
                    self._swapped = body["kwargs"]["number"]
                    self.adapters[self._swapped] = llama.Adapter(body["kwargs"]["path"])
                    return web.json_response({"results": [None]})
                self.model = llama.Llama(body["kwargs"]["weights_path"])
            except (OSError, AssertionError) as error:
                return web.Response(status=500, text=str(error))
        return web.json_response({"results": [None]})

    async def _reset_prefix_cache(self, request: web.Request) -> web.Response:
        if request.query.get("reset_running_requests") == "true":
            for sequence in self._active:
                sequence.cache = None
        elif self._active:
            return web.json_response({"success": False})
        self._blocks.clear()
        return web.json_response({"success": True})

    async def _update_weight_version(self, request: web.Request) -> web.Response:
        self._label = (await request.json())["new_version"]
        return web.json_response({"success": True, "new_version": self._label})

    async def _get_world_size(self, _: web.Request) -> web.Response:
        return web.json_response({"world_size": self.ranks})

    async def _init_transfer(self, request: web.Request) -> web.Response:
        info = (await request.json())["init_info"]
        assert self.wire
        joining = [self.wire.join(info, info["rank_offset"] + i) for i in range(self.ranks)]
        self._receivers = await asyncio.gather(*map(asyncio.to_thread, joining))
        return web.json_response({"message": "Weight transfer initialized"})

    async def _start_update(self, _: web.Request) -> web.Response:
        if self._updating:
            return web.Response(status=500, text="a weight update is already active")
        self._updating = True
        return web.json_response({"message": "Weight update started"})

    async def _update_weights(self, request: web.Request) -> web.Response:
        info = (await request.json())["update_info"]
        if not self._updating:
            return web.Response(status=500, text="start_weight_update must be called before")
        try:
            found = await asyncio.gather(
                *(asyncio.to_thread(one.receive, info) for one in self._receivers)
            )
        except fake_nccl.AbortedError as error:
            self._updating = False
            return web.Response(status=500, text=str(error))
        for tensors in found:
            self.model.weights |= tensors
        return web.json_response({"message": "Weights updated"})

    async def _finish_update(self, _: web.Request) -> web.Response:
        if not self._updating:
            return web.Response(status=500, text="finish without a matching start")
        self._updating = False
        return web.json_response({"message": "Weight update finished"})

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self._mode and self._mode != "keep" and self._refuses:
            message = "Generation is paused. Please retry after it resumes."
            error = {"error": {"message": message, "type": "ServiceUnavailableError", "code": 503}}
            return web.json_response(error, status=503)
        asked, prompt = body["sampling_params"], body["token_ids"]
        length = self.model.config["max_position_embeddings"]
        if len(prompt) + asked["max_tokens"] > length:
            return web.json_response({"error": f"maximum is {length}"}, status=400)
        model = body.get("model", self.root)
        if model != self.root and model not in self._names:
            return web.json_response({"error": f"The model {model} does not exist"}, status=404)
        # As in vLLM, what a name means is settled when the request comes.
        adapter = self._names.get(model, 0)
        async with self._changed:
            await self._changed.wait_for(lambda: not self._mode)
        sequence = Sequence(list(prompt), body.get("cache_salt", ""), adapter)
        self._active.add(sequence)
        try:
            reason = await self._write(sequence, asked)
        finally:
            self._active.discard(sequence)
            async with self._changed:
                self._changed.notify_all()
        content = [
            {"token_id": token, "logprob": logprob, "top_logprobs": []}
            for token, logprob in zip(sequence.written, sequence.logprobs, strict=True)
        ]
        choice = {
            "index": 0,
            "finish_reason": reason,
            "token_ids": sequence.written,
            "logprobs": {"content": content},
            "weight_versions": _spans(sequence.labels),
        }
        reply = {"choices": [choice], "prompt_logprobs": None}
        if count := asked.get("prompt_logprobs"):
            if count > (self._num_scores or 20):
                return web.json_response({"error": f"greater than max: {count}"}, status=400)
            reply["prompt_logprobs"] = self._scores(prompt, count)
        return web.json_response(reply)

    async def _detokenize(self, request: web.Request) -> web.Response:
        import transformers  # only the servers of a distillation's teacher are asked for it

        tokenizer = transformers.AutoTokenizer.from_pretrained(self.root)
        return web.json_response({"prompt": tokenizer.decode((await request.json())["tokens"])})

    def _scores(self, prompt: list[int], count: int) -> list[dict[int, Any] | None]:
        """Returns the most probable tokens of each place, after the token that is there."""
        found: list[dict[int, Any] | None] = [None]
        cache = self.model.empty()
        for token, following in itertools.pairwise(prompt):
            scores, cache = self.model.extend(cache, [token])
            if self._num_scores:
                scores = llama.log_softmax(scores.astype(np.float64))
            ranks = np.argsort(np.argsort(-scores)) + 1
            named = [following, *np.argsort(-scores)[:count].tolist()]
            found.append(
                {
                    i: {"logprob": float(scores[i]), "rank": int(ranks[i]), "decoded_token": None}
                    for i in named
                }
            )
        return found

    async def _write(self, sequence: Sequence, asked: dict[str, Any]) -> str:
        """Writes a completion and returns why it ended."""
        draws = np.random.default_rng(asked.get("seed"))
        while len(sequence.written) < asked["max_tokens"]:
            async with self._changed:
                await self._changed.wait_for(lambda: self._mode != "keep")
            self._advance(sequence)
            logits = sequence.logits / (asked["temperature"] or 1.0)
            logprobs = llama.log_softmax(logits.astype(np.float64))
            top_k = asked.get("top_k", 0) if asked["temperature"] else 1
            kept = _kept(np.exp(logprobs), asked.get("top_p", 1.0), top_k)
            token = int(draws.choice(len(kept), p=kept))
            sequence.tokens.append(token)
            sequence.written.append(token)
            sequence.logprobs.append(float(logprobs[token]))
            sequence.labels.append(self._label)
            if token in asked.get("stop_token_ids", ()):
                return "stop"
            await asyncio.sleep(self.secs_per_token)
        return "length"

    def _advance(self, sequence: Sequence) -> None:
        """Computes the logits behind the last token, from cached blocks as far as there are any."""
        adapter = self.adapters[sequence.adapter] if sequence.adapter else None
        if sequence.cache is not None:
            last = sequence.tokens[-1:]
            sequence.logits, sequence.cache = self.model.extend(sequence.cache, last, adapter)
            return
        tokens, salt = sequence.tokens, f"{sequence.adapter} {sequence.salt}"
        cache, start = self.model.empty(), 0
        for end in range((len(tokens) - 1) // _BLOCK * _BLOCK, 0, -_BLOCK):
            if found := self._blocks.get((salt, tuple(tokens[:end]))):
                cache, start = found, end
                break
        sequence.logits, sequence.cache = self.model.extend(cache, tokens[start:], adapter)
        for end in range(_BLOCK, len(tokens) + 1, _BLOCK):
            part = [llama.Layer(k[:end], v[:end]) for k, v in sequence.cache]
            self._blocks.setdefault((salt, tuple(tokens[:end])), part)


def _checksum(tensor: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(tensor).view(np.uint8).data):08x}"


def _spans(labels: list[str]) -> list[dict[str, Any]]:
    """Returns the labels of tokens as vLLM reports them."""
    spans: list[dict[str, Any]] = []
    for i, label in enumerate(labels):
        if not spans or spans[-1]["version"] != label:
            spans.append({"version": label, "start": i})
        spans[-1]["end"] = i + 1
    return spans


def _kept(probabilities: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """Returns the distribution after top_k and top_p."""
    order = np.argsort(-probabilities)
    mass = np.cumsum(probabilities[order])
    count = min(int(np.searchsorted(mass, top_p)) + 1, top_k if top_k > 0 else len(order))
    kept = np.zeros_like(probabilities)
    kept[order[:count]] = probabilities[order[:count]]
    return kept / kept.sum()


@contextlib.contextmanager
def running(model: str, count: int = 1, **options: Any) -> Iterator[list[tuple[str, StandIn]]]:
    """Yields the addresses of servers in a thread of this process, and the servers."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start(server: StandIn) -> tuple[str, web.AppRunner]:
        runner = web.AppRunner(
            server.app(), access_log=None, shutdown_timeout=0.1, handler_cancellation=True
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        return f"http://{host}:{port}", runner

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    servers = [StandIn(model, **options) for _ in range(count)]
    found = [run(start(server)) for server in servers]
    try:
        yield [(url, server) for (url, _), server in zip(found, servers, strict=True)]
    finally:
        for _, runner in found:
            run(runner.cleanup())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@contextlib.contextmanager
def started(
    model: str, logs: pathlib.Path, count: int = 1, *flags: str
) -> Iterator[list[tuple[str, subprocess.Popen[bytes]]]]:
    """Yields the addresses of servers that are processes, and the processes."""
    found = []
    try:
        for i in range(count):
            port = free_port()
            command = [sys.executable, "-m", "tests.stand_in", "--model", model, "--port"]
            with (logs / f"stand_in_{i}.log").open("wb") as log:
                process = subprocess.Popen(
                    [*command, str(port), *flags], stdout=log, stderr=log,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )  # fmt: skip
            found.append((f"http://127.0.0.1:{port}", process))
        for url, process in found:
            _wait_healthy(url, process)
        yield found
    finally:
        for _, process in found:
            process.kill()
            process.wait()


def _wait_healthy(url: str, process: subprocess.Popen[bytes], secs: float = 120) -> None:
    end = time.monotonic() + secs
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        time.sleep(0.1)
    raise RuntimeError(f"{url} did not start")


def main() -> None:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key", default="")
    parser.add_argument("--secs-per-token", type=float, default=0.0)
    parser.add_argument("--num-scores", type=int, default=0)
    parser.add_argument("--max-lora-rank", type=int, default=0)
    options = parser.parse_args()

    async def serve() -> None:
        server = StandIn(
            options.model,
            options.key,
            num_scores=options.num_scores,
            max_lora_rank=options.max_lora_rank,
        )
        server.secs_per_token = options.secs_per_token
        runner = web.AppRunner(server.app(), access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", options.port).start()
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
