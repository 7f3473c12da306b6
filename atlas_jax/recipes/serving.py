"""Models that vLLM servers run, as the teaching protocol uses them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import pathlib
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.config import GRPOConfig, RolloutConfig
from atlas_jax.data.packing import Scored, collate_policy
from atlas_jax.recipes import setup, speakers
from atlas_jax.rollout.engine import Request, Speaker
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.servers import Pool, PoolOptions
from atlas_jax.rollout.vllm import VllmEngine
from atlas_jax.rollout.weights import DiskSync, Probe, SyncOptions, WeightSync
from atlas_jax.sharding import to_global
from atlas_jax.types import Completion, Metrics, Params, PolicyBatch

Score = Callable[[Params, PolicyBatch], jax.Array]
"""`(params, batch) -> log-probabilities`, as in `feed.Parts`."""

_PROBE = "What is 17 + 25?"
_PROBE_PROMPT, _PROBE_TOKENS = 16, 4  # most tokens, and how many are sampled
_UNIT = 32  # of the probe's row, which saves compilations
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Served:
    """The policy as its servers run it; calling it brings them to the weights it is called with."""

    def __init__(self, speaker: Speaker, sync: WeightSync) -> None:
        """Pushes nothing yet: what the servers hold is not known."""
        self._speaker = speaker
        self._sync = sync
        self._version: int | None = None
        self._metrics: Metrics = {}

    def __call__(self, params: Params, version: int) -> Speaker:
        """Returns the model; every process calls it together.

        Raises:
            DependencyError: if the weights reach no server.
        """
        if version != self._version:
            self._metrics = self._sync.push(params, version)
            self._version = version
        return self._speaker

    def take_metrics(self) -> Metrics:
        """Returns the metrics of the last push, once."""
        metrics, self._metrics = self._metrics, {}
        return metrics


def engines(
    config: GRPOConfig, model: setup.Model, student: setup.Model | None, score: Score
) -> speakers.Engines:
    """Returns the trained model and the student on their servers.

    Args:
        config: of the run.
        model: what is trained.
        student: None under `protocol=direct`.
        score: of rows that hold one completion each.

    Raises:
        ValueError: if a server cannot be reached, lacks what GRPO needs, or has another model.
    """
    if config.rollout.max_staleness and config.rollout.refill_rounds and jax.process_count() > 1:
        raise ValueError(
            f"rollout.max_staleness={config.rollout.max_staleness} with rollout.refill_rounds="
            f"{config.rollout.refill_rounds} in several processes, which would have to agree while "
            "they train; set one of the two to 0"
        )
    with contextlib.ExitStack() as stack:
        policy = _policy(config, model, score, stack)
        speaker = None if student is None else _student(config, student, stack)
        return speakers.Engines(policy, speaker, policy.take_metrics, stack.pop_all().close)


def _policy(
    config: GRPOConfig, model: setup.Model, score: Score, stack: contextlib.ExitStack
) -> Served:
    rollout = config.rollout
    pool = _pool("teacher", rollout.teacher_servers, rollout, stack)
    speaker, engine = _speaker(pool, model, config.data.system_prompt)
    room = speaker.context - _PROBE_TOKENS
    prompt = tuple(model.files.tokenizer(_PROBE).input_ids)[: min(room, _PROBE_PROMPT)]
    probe = Probe(
        Request(prompt, _PROBE_TOKENS, seed=config.seed),
        Sampling(config.temperature, config.top_p, config.top_k),
        probe_score(config, model, score),
    )
    options = SyncOptions(
        _sync_dir(config, pool),
        rollout.sync_dtype,
        rollout.pause_mode,
        rollout.probe_tolerance,
        rollout.weight_sync == "restart",
    )
    sync = DiskSync(engine, model.decoder, model.files, options, probe)
    stack.callback(sync.close)
    return Served(speaker, sync)


def _student(config: GRPOConfig, model: setup.Model, stack: contextlib.ExitStack) -> Speaker:
    pool = _pool("student", config.rollout.student_servers, config.rollout, stack)
    speaker, _ = _speaker(pool, model, config.rollout.student_system_prompt)
    return speakers.check_student(config, speaker)


def _pool(role: str, addresses: str, rollout: RolloutConfig, stack: contextlib.ExitStack) -> Pool:
    urls = [url.strip().rstrip("/") for url in addresses.split(",")]
    options = PoolOptions(
        rollout.max_in_flight, rollout.request_timeout_secs, rollout.sync_timeout_secs
    )
    pool = Pool(role, urls, options)
    stack.callback(pool.close)
    pool.open()
    return pool


def _speaker(pool: Pool, model: setup.Model, system_prompt: str) -> tuple[Speaker, VllmEngine]:
    tokenizer = model.files.tokenizer
    engine = VllmEngine(
        pool,
        copy.deepcopy(tokenizer),
        speakers.stop_tokens(model),
        model.decoder.config.vocab_size,
    )
    lengths = [server.max_model_len for server in pool.servers]
    context = min(model.decoder.config.max_positions, *lengths)
    encode = speakers.encoder(tokenizer, system_prompt)
    return Speaker(encode, engine.generate, context), engine


def _sync_dir(config: GRPOConfig, pool: Pool) -> str:
    """Returns the directory of one run's weights."""
    run = os.path.abspath(config.output_dir)
    name = hashlib.sha256(run.encode()).hexdigest()[:12]
    if config.rollout.sync_dir:
        return os.path.abspath(config.rollout.sync_dir)
    memory = pathlib.Path("/dev/shm")
    here = all(urllib.parse.urlsplit(s.url).hostname in _LOOPBACK for s in pool.servers)
    if here and memory.is_dir():
        return str(memory / f"atlas_jax-{os.getuid()}" / name)
    return os.path.join(run, "weights")


def probe_score(
    config: GRPOConfig, model: setup.Model, score: Score
) -> Callable[[Params, Sequence[int], np.ndarray], np.ndarray]:
    """Returns the trainer's log-probabilities of a prompt's continuation.

    They are of the weights as they were pushed: rounded, where the trainer computes in more digits.
    """
    decoder = model.decoder
    sharding, dtype = decoder.sharding, jnp.dtype(config.rollout.sync_dtype)
    rows = sharding.num_replicas // jax.process_count()
    rounds = decoder.compute_dtype.itemsize > dtype.itemsize

    @jax.jit
    def run(params: Params, batch: PolicyBatch) -> jax.Array:
        if rounds:
            params = jax.tree.map(lambda p: p.astype(dtype).astype(p.dtype), params)
        return score(params, batch)

    def score_one(params: Params, prompt: Sequence[int], ids: np.ndarray) -> np.ndarray:
        zeros = (0.0,) * len(ids)
        length = -(-(len(prompt) + len(ids)) // _UNIT) * _UNIT
        completion = Completion(tuple(prompt), tuple(ids.tolist()), (), zeros, "length", "", 0)
        group = [Scored(completion, 0.0, True)]
        batch = collate_policy([group] * rows, 1, length)
        found: Any = run(params, to_global(batch, sharding, 1))
        row = np.asarray(found.addressable_shards[0].data).reshape(-1, length)[0]
        return row[len(prompt) : len(prompt) + len(ids)]

    return score_one
