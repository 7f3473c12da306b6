"""What stands between a trainer and its vLLM servers, put together for tests."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from atlas_jax.checkpoint import adapters, hf
from atlas_jax.config import GRPOConfig
from atlas_jax.options.train import LoraOptions
from atlas_jax.recipes import chat_models, grpo, vllm_backend
from atlas_jax.rollout import capabilities, identity
from atlas_jax.rollout.adapter_sync import AdapterSync
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.local import LocalEngine
from atlas_jax.rollout.push import Probe, PushOptions
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.servers import Look, PoolOptions, ServerPool
from atlas_jax.rollout.versions import Versions
from atlas_jax.rollout.vllm import VllmEngine
from atlas_jax.rollout.weights import DiskSync, SyncParts
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import Model, open_frozen
from atlas_jax.step import joined

WORDS = tuple(f"w{i}" for i in range(8))
SIZES = {"hidden_size": 16, "max_position_embeddings": 512}

CONFIG = dataclasses.replace(GRPOConfig(), temperature=0.7, top_p=0.95)
SAMPLING = Sampling(CONFIG.temperature, CONFIG.top_p)
OPTIONS = PoolOptions(64, 300.0, 300.0, Look(every_secs=60.0))
"""Looks are rare, since tests pause servers behind the pool's back."""
PROMPT = tuple(3 + (i * i) % 17 for i in range(300))
"""Two blocks of the prefix cache of vLLM on a CPU and part of a third one."""


class Trainer(NamedTuple):
    """A model as the trainer has it."""

    model: Model
    params: Any

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return chat_models.stop_tokens(self.model)

    def logprobs(self, prompt, ids):
        """Returns the trainer's log-probabilities of a continuation."""
        logprobs_fn = grpo.make_logprobs_fn(self.model.decoder, CONFIG, 1)
        exact = dataclasses.replace(
            CONFIG, rollout=dataclasses.replace(CONFIG.rollout, sync_dtype="float32")
        )
        (found,) = vllm_backend.probe_logprobs(exact, self.model, logprobs_fn)(
            self.params, prompt, np.asarray(ids)[None]
        )
        return found

    def generate(self, requests, sampling):
        """Returns what the trainer's own engine writes."""
        engine = LocalEngine(self.model.decoder, self.model.files.tokenizer, self.stop_ids)
        return engine.generate(self.params, 0, requests, sampling)


class Served(NamedTuple):
    """Servers, generation with them, and the way of weights to them."""

    pool: ServerPool
    engine: VllmEngine
    sync: DiskSync


def _sync(parts: SyncParts, lora: LoraOptions | None, ours: Trainer) -> DiskSync:
    if lora is None:
        return DiskSync(parts)
    base = str(ours.model.source.path)
    return AdapterSync(parts, adapters.peft_config(lora, ours.model.decoder, base))


def adapted(ours: Trainer, lora: LoraOptions, seed: int) -> Trainer:
    """Returns a model with factors of its own, which change what it writes."""
    plain = ours.model.decoder
    factors = adapters.factors(lora, plain.config, jax.numpy.dtype("float32"))
    decoder = dataclasses.replace(plain, lora=factors)
    shapes, _, placements = decoder.trained
    draws = np.random.default_rng(seed)
    new = jax.tree.map(lambda s: 0.2 * draws.standard_normal(s.shape, np.float32), shapes)
    params = joined(ours.params, jax.device_put(new, placements))
    return Trainer(ours.model._replace(decoder=decoder), params)


def trainer(path: str, devices=None) -> Trainer:
    """Returns a model in float32, on one device unless `devices` names others."""
    model = open_frozen(Compute.of(CONFIG, devices or jax.devices()[:1]), path)
    return Trainer(model, hf.load(model.source, model.decoder))


@contextlib.contextmanager
def connected(
    ours: Trainer,
    urls,
    directory,
    mode: str = "keep",
    restart: bool = False,
    options: PoolOptions = OPTIONS,
    prompt=PROMPT,
    dtype: str = "bfloat16",
    make_sync=None,
    lora: LoraOptions | None = None,
) -> Iterator[Served]:
    """Yields the servers of `urls` with no weights pushed to them yet.

    With `lora` they take the adapter alone.
    """
    model = ours.model
    pool = ServerPool("teacher", urls, options)
    try:
        pool.open(functools.partial(identity.check_trained, decoder=model.decoder))
        vocab_size = model.decoder.config.vocab_size
        adapter = capabilities.ADAPTER_NAME if lora else ""
        engine = VllmEngine(pool, model.files.tokenizer, ours.stop_ids, vocab_size, adapter=adapter)
        way = "adapter" if lora else "reload"
        config = dataclasses.replace(
            CONFIG, rollout=dataclasses.replace(CONFIG.rollout, sync_dtype=dtype, weight_sync=way)
        )
        logprobs_fn = grpo.make_logprobs_fn(model.decoder, config, 1)
        compute = vllm_backend.probe_logprobs(config, model, logprobs_fn)
        parts = SyncParts(
            engine=engine,
            decoder=model.decoder,
            files=model.files,
            versions=Versions(directory / "weights", str(directory)),
            options=PushOptions(dtype, mode, 1e-3, restart),
            probe=Probe(Request(prompt, 8, seed=0), SAMPLING, compute),
        )
        sync = make_sync(parts) if make_sync else _sync(parts, lora, ours)
        yield Served(pool, engine, sync)
    finally:
        pool.close()
