"""Models that vLLM servers run, as the teaching protocol uses them."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import pathlib
import socket
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from atlas_jax import addresses, distributed, server_token
from atlas_jax.checkpoint import writer
from atlas_jax.config import GRPOConfig
from atlas_jax.data.packing import Scored, collate_policy
from atlas_jax.recipes import setup, speakers
from atlas_jax.rollout import identity
from atlas_jax.rollout.capabilities import ServerStart
from atlas_jax.rollout.engine import Request, Speaker
from atlas_jax.rollout.push import Probe, PushOptions
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.servers import PoolOptions, ServerPool
from atlas_jax.rollout.versions import Versions, in_memory
from atlas_jax.rollout.vllm import VllmEngine
from atlas_jax.rollout.weights import DiskSync, WeightSync
from atlas_jax.sharding import from_global, to_global
from atlas_jax.types import Completion, Metrics, Params, PolicyBatch

Score = Callable[[Params, PolicyBatch], jax.Array]
"""`(params, batch) -> log-probabilities`, as in `feed.Parts`."""

_PROBE_TOKENS = 8  # sampled tokens of each probe
_PROBE_BLOCKS = 2  # whole blocks of the prefix cache that its prompt fills
_UNIT = 32  # tokens; the probe's row is a multiple of it, which saves compilations


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
        config: options of the run.
        model: the model that is trained.
        student: the student; None under `protocol=direct`.
        score: log-probabilities of rows that hold one completion each.

    Raises:
        ValueError: if no server of a role can be reached, or one lacks what GRPO needs or has
            another model.
    """
    check_loopback(config)
    with contextlib.ExitStack() as stack:
        policy = _policy(config, model, score, stack)
        speaker = None if student is None else _student(config, student, stack)
        return speakers.Engines(policy, speaker, policy.take_metrics, stack.pop_all().close)


def check_loopback(config: GRPOConfig) -> None:
    """Checks that an address means the same server in every process.

    Raises:
        ValueError: in every process, if processes on several hosts have a loopback address.
    """
    hosts = sorted(set(distributed.gather_texts(socket.gethostname())))
    for role in ("teacher", "student"):
        for url in addresses.split(getattr(config.rollout, f"{role}_servers")):
            if len(hosts) > 1 and addresses.is_loopback(url):
                raise ValueError(
                    f"rollout.{role}_servers has {url}, which is another server on each of the "
                    f"hosts {', '.join(hosts)}; name the host that it runs on"
                )


def _policy(
    config: GRPOConfig, model: setup.Model, score: Score, stack: contextlib.ExitStack
) -> Served:
    rollout = config.rollout
    check = functools.partial(identity.check_trained, decoder=model.decoder)
    pool = _pool("teacher", rollout.teacher_servers, config, check, stack)
    speaker, engine = _speaker(pool, model, config.data.system_prompt)
    block_size = max(start.block_size for start in pool.starts)
    prompt = probe_prompt(model.files.tokenizer, block_size, speaker.context - _PROBE_TOKENS)
    probe = Probe(
        Request(prompt, _PROBE_TOKENS, seed=config.seed),
        Sampling(config.temperature, config.top_p, config.top_k),
        probe_score(config, model, score),
    )
    options = PushOptions(
        dtype=rollout.sync_dtype,
        pause_mode=rollout.pause_mode,
        tolerance=rollout.probe_tolerance,
        restart=rollout.weight_sync == "restart",
    )
    versions = choose_versions(config, model)
    sync = DiskSync(engine, model.decoder, model.files, versions, options, probe)
    stack.callback(sync.close)
    return Served(speaker, sync)


def _student(config: GRPOConfig, model: setup.Model, stack: contextlib.ExitStack) -> Speaker:
    check = functools.partial(identity.check_frozen, name=config.student_model, source=model.source)
    pool = _pool("student", config.rollout.student_servers, config, check, stack)
    speaker, _ = _speaker(pool, model, config.rollout.student_system_prompt)
    return speakers.check_student(config, speaker)


def _pool(
    role: str,
    urls: str,
    config: GRPOConfig,
    check: Callable[[str, ServerStart], None],
    stack: contextlib.ExitStack,
) -> ServerPool:
    options = PoolOptions(
        max_in_flight=config.rollout.max_in_flight,
        request_timeout_secs=config.rollout.request_timeout_secs,
        control_timeout_secs=config.rollout.sync_timeout_secs,
    )
    pool = ServerPool(role, addresses.split(urls), options, server_key(config.output_dir))
    stack.callback(pool.close)
    pool.open(check)
    return pool


def server_key(output_dir: str) -> str:
    """Returns the key of the servers' routes, "" if there is none.

    It is VLLM_API_KEY, else the token that `serve` left in the run's directory.

    Raises:
        ValueError: if others can read that file, or if it holds no token.
    """
    if found := os.environ.get("VLLM_API_KEY", ""):
        return found
    path = pathlib.Path(output_dir, server_token.NAME)
    return server_token.read(path) if path.exists() else ""


def _speaker(
    pool: ServerPool, model: setup.Model, system_prompt: str
) -> tuple[Speaker, VllmEngine]:
    tokenizer = model.files.tokenizer
    engine = VllmEngine(
        pool,
        copy.deepcopy(tokenizer),
        speakers.stop_tokens(model),
        model.decoder.config.vocab_size,
    )
    lengths = [start.max_model_len for start in pool.starts]
    context = min(model.decoder.config.max_positions, *lengths)
    encode = speakers.encoder(model.template, system_prompt)
    vocab_size = model.decoder.config.vocab_size
    return Speaker(encode, engine.generate, context, vocab_size), engine


def choose_versions(config: GRPOConfig, model: setup.Model) -> Versions:
    """Returns the directory of this run's weights, the same one in every process."""
    run = os.path.abspath(config.output_dir)
    if config.rollout.sync_dir:
        return Versions(pathlib.Path(os.path.abspath(config.rollout.sync_dir)), run)
    chosen: Versions | None = None
    if distributed.is_main():
        urls = addresses.split(config.rollout.teacher_servers)
        # Whoever follows the versions of `weight_sync=restart` must know where they are.
        if all(map(addresses.is_loopback, urls)) and config.rollout.weight_sync == "reload":
            tensors = writer.tensors(model.decoder)
            size = sum(writer.num_bytes(t, config.rollout.sync_dtype) for t in tensors)
            chosen = in_memory(run, size)
        chosen = chosen or Versions(pathlib.Path(run, "weights"), run)
        logging.info("weights go through %s", chosen.root)
    root = distributed.gather_texts(str(chosen.root) if chosen else "")[0]
    return chosen or Versions(pathlib.Path(root), run)


def probe_prompt(tokenizer: Any, block_size: int, room: int) -> tuple[int, ...]:
    """Returns the tokens of the probe: several blocks of the servers' prefix cache, if they fit.

    Args:
        tokenizer: tokenizer of the model.
        block_size: tokens of a block.
        room: most tokens that fit.
    """
    size = min(room, _PROBE_BLOCKS * block_size + block_size // 4)
    text = " ".join(f"What is {number} + {3 * number}?" for number in range(1, size + 1))
    return tuple(tokenizer(text).input_ids[:size])


def probe_score(
    config: GRPOConfig, model: setup.Model, score: Score
) -> Callable[[Params, Sequence[int], np.ndarray], np.ndarray]:
    """Returns the trainer's log-probabilities of several continuations of one prompt.

    They are those of the weights as they were pushed: rounded, where the trainer computes in more
    digits.
    """
    decoder = model.decoder
    sharding, dtype = decoder.sharding, jnp.dtype(config.rollout.sync_dtype)
    rounds = decoder.compute_dtype.itemsize > dtype.itemsize

    @jax.jit
    def run(params: Params, batch: PolicyBatch) -> jax.Array:
        if rounds:
            params = jax.tree.map(lambda p: p.astype(dtype).astype(p.dtype), params)
        return score(params, batch)[0]

    def score_all(params: Params, prompt: Sequence[int], ids: np.ndarray) -> np.ndarray:
        length = -(-(len(prompt) + ids.shape[1]) // _UNIT) * _UNIT
        zeros = (0.0,) * ids.shape[1]
        # Each process gives its share of the rows; they divide over the devices.
        missing = -len(ids) % sharding.num_replicas
        rows = np.concatenate([ids, np.repeat(ids[:1], missing, axis=0)])
        groups = [
            [Scored(Completion(tuple(prompt), tuple(row), (), zeros, "length", "", 0), 0.0, True)]
            for row in np.split(rows, jax.process_count())[jax.process_index()].tolist()
        ]
        batch = to_global(collate_policy(groups, 1, length), sharding, 1)
        found = distributed.gather(from_global(run(params, batch))).reshape(-1, length)
        return found[: len(ids), len(prompt) : len(prompt) + ids.shape[1]]

    return score_all
