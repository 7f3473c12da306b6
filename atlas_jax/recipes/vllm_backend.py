"""The backend of vLLM servers: the models that they run, and the weights that reach them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
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
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.grpo import GRPOConfig
from atlas_jax.recipes import chat_models
from atlas_jax.rollout import capabilities, identity
from atlas_jax.rollout.capabilities import ServerStart, check_sampling
from atlas_jax.rollout.engine import ChatModel, Request
from atlas_jax.rollout.push import Probe, PushOptions
from atlas_jax.rollout.rows import collate_policy
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.server_metrics import ServerMetrics
from atlas_jax.rollout.servers import PoolOptions, ServerPool
from atlas_jax.rollout.versions import Versions, in_memory
from atlas_jax.rollout.vllm import VllmEngine
from atlas_jax.rollout.weights import DiskSync, SyncParts, WeightSync
from atlas_jax.sharding import from_global, to_global
from atlas_jax.startup.model import Model
from atlas_jax.step import joined
from atlas_jax.types import Completion, Metrics, Params, PolicyBatch, Question, Sample

LogprobsFn = Callable[[Params, PolicyBatch], jax.Array]
"""`(params, batch) -> log-probabilities`, as in `feed.Parts`."""

_PROBE_TOKENS = 8  # sampled tokens of each probe
_PROBE_BLOCKS = 2  # whole blocks of the prefix cache that its prompt fills
_UNIT = 32  # tokens; the probe's row is a multiple of it, which saves compilations


class VllmBackend:
    """Generation by vLLM servers, which are brought to the weights that are published."""

    def __init__(
        self,
        policy: Callable[[int], ChatModel],
        student: ChatModel | None,
        sync: WeightSync,
        servers: Sequence[ServerMetrics],
        close: Callable[[], None],
        ahead: bool,
    ) -> None:
        """Publishes nothing yet: the weights that the servers hold are not known.

        Args:
            policy: returns the trained model on its servers, for requests that must begin with
                weights of that version or a later one.
            student: the frozen student on its servers.
            sync: the way of the weights to the servers.
            servers: the metrics of the servers of each role.
            close: gives up requests and weights in flight.
            ahead: whether weights go to the servers beside the training.
        """
        self._policy = policy
        self._student = student
        self._sync = sync
        self._servers = servers
        self._close = close
        self._ahead = ahead
        self._version: int | None = None
        self._metrics: Metrics = {}

    @property
    def student(self) -> ChatModel | None:
        """The frozen student; None under `protocol=direct`."""
        return self._student

    def publish(self, params: Params, version: int) -> ChatModel:
        """Returns the policy; every process calls it together.

        Raises:
            DependencyError: if the weights reach no server.
        """
        if version != self._version:
            # The first weights are checked before anything is asked: only they can find a server
            # that computes something else than the trainer.
            beside = self._ahead and self._version is not None
            # Noted after the push: after an error the next call sends the weights again.
            self._version = None
            self._metrics = self._sync.finish()
            if beside:
                self._sync.begin(params, version)
            else:
                self._metrics = self._sync.push(params, version)
            self._version = version
        return self._policy(version)

    def metrics(self) -> Metrics:
        """Returns the metrics of the last complete transfer, and of the servers since the last."""
        metrics = self._metrics
        self._metrics = {}
        for servers in self._servers:
            metrics = metrics | servers.take()
        return metrics

    def close(self) -> None:
        """Gives up requests and weights in flight."""
        self._close()


def make_vllm_backend(
    config: GRPOConfig, model: Model, student: Model | None, logprobs_fn: LogprobsFn
) -> VllmBackend:
    """Returns the trained model and the student on their servers.

    Args:
        config: options of the run.
        model: the model that is trained.
        student: the student; None under `protocol=direct`.
        logprobs_fn: log-probabilities of rows that hold one completion each.

    Raises:
        ValueError: if no server of a role can be reached, or one cannot do what GRPO needs, or has
            another model.
    """
    # Before a server is asked: one that is not of this run might answer at that address.
    check_loopback(config)
    with contextlib.ExitStack() as stack:
        policy, pool, sync = _open_policy(config, model, logprobs_fn, stack)
        pools = [pool]
        frozen = None
        if student is not None:
            frozen, pool = open_student(config, student, stack)
            pools.append(pool)
        # One process reads for all: the servers are the same.
        servers = [ServerMetrics(pool, reads=distributed.is_main()) for pool in pools]
        # From here on the backend closes what is open; after an error above the stack has.
        ahead = sends_beside_training(config)
        return VllmBackend(policy, frozen, sync, servers, stack.pop_all().close, ahead)


def sends_beside_training(config: GRPOConfig) -> bool:
    """Returns whether new weights reach the servers while the next step trains.

    With `max_staleness=0` the next step is made with them, so it waits. Several processes agree on
    what servers answer, which they cannot do beside a step.
    """
    rollout = config.rollout
    reloads = rollout.weight_sync in ("reload", "adapter")
    return rollout.max_staleness > 0 and reloads and jax.process_count() == 1


def check_loopback(config: GRPOConfig) -> None:
    """Checks that an address means the same server in every process.

    Raises:
        ValueError: in every process, if processes on several hosts have a loopback address.
    """
    for role in ("teacher", "student"):
        check_same_servers(f"rollout.{role}_servers", getattr(config.rollout, f"{role}_servers"))


def check_same_servers(option: str, urls: str) -> None:
    """Checks that the addresses of an option mean the same servers; raises as `check_loopback`."""
    hosts = sorted(set(distributed.gather_texts(socket.gethostname())))
    for url in addresses.split(urls):
        if len(hosts) > 1 and addresses.is_loopback(url):
            raise ValueError(
                f"{option} has {url}, which is another server on each of the hosts "
                f"{', '.join(hosts)}; name the host that it runs on"
            )


def _open_policy(
    config: GRPOConfig,
    model: Model,
    logprobs_fn: LogprobsFn,
    stack: contextlib.ExitStack,
) -> tuple[Callable[[int], ChatModel], ServerPool, WeightSync]:
    rollout = config.rollout

    def check(url: str, start: ServerStart) -> None:
        if rollout.weight_sync == "adapter":
            _check_adapts(url, start, config, model)
        else:
            identity.check_trained(url, start, model.decoder)
        check_sampling(url, start, config.top_p, config.top_k)

    pool = _pool("teacher", rollout.teacher_servers, config, check, stack)
    seeds = _has_seeds(config, pool)
    adapter = capabilities.ADAPTER_NAME if rollout.weight_sync == "adapter" else ""
    bind, engine = _chat_model(pool, model, config.teaching.system_prompt, seeds, adapter)
    # The prompt must span whole blocks of the cache of every server.
    block_size = max(start.block_size for start in pool.starts)
    prompt = probe_prompt(model.files.tokenizer, block_size, bind(0).context - _PROBE_TOKENS)
    probe = Probe(
        Request(prompt, _PROBE_TOKENS, seed=config.seed),
        Sampling(config.temperature, config.top_p, config.top_k),
        probe_logprobs(config, model, logprobs_fn),
    )
    options = PushOptions(
        dtype=rollout.sync_dtype,
        pause_mode=rollout.pause_mode,
        tolerance=rollout.probe_tolerance,
        restart=rollout.weight_sync == "restart",
    )
    parts = SyncParts(
        engine=engine,
        decoder=model.decoder,
        files=model.files,
        versions=choose_versions(config, model),
        options=options,
        probe=probe,
    )
    sync = _make_sync(config, model, parts)
    stack.callback(sync.close)
    return bind, pool, sync


def _check_adapts(url: str, start: ServerStart, config: GRPOConfig, model: Model) -> None:
    """Checks that a server has the base of the adapter and takes one like it."""
    from atlas_jax.checkpoint import adapters  # most runs train whole models

    targets = adapters.targets(model.decoder)
    capabilities.check_adapters(url, start, config.model.lora.rank, targets)
    identity.check_base(url, start, config.model_name_or_path, model.source)


def _make_sync(config: GRPOConfig, model: Model, parts: SyncParts) -> DiskSync:
    """Returns the way of the weights that the options name, of which each run needs one."""
    if config.rollout.weight_sync == "nccl":
        from atlas_jax.rollout import nccl

        return nccl.NcclSync(parts, _nccl_maker(parts.engine.pool))
    if config.rollout.weight_sync == "adapter":
        from atlas_jax.checkpoint import adapters
        from atlas_jax.rollout import adapter_sync

        name = config.model_name_or_path
        described = adapters.peft_config(config.model.lora, model.decoder, name)
        return adapter_sync.AdapterSync(parts, described)
    return DiskSync(parts)


def _nccl_maker(pool: ServerPool) -> Callable[[], Any]:
    """Returns the function that makes a communicator between this process and servers.

    Raises:
        ValueError: if a server or this run cannot use NCCL.
    """
    from atlas_jax.rollout import libnccl  # other ways of weights need none of it

    if jax.process_count() > 1:
        raise ValueError(
            f"rollout.weight_sync=nccl with {jax.process_count()} processes of training, of which "
            "one would have to hold all weights; use rollout.weight_sync=reload"
        )
    for server in pool.servers:
        if server.start:
            capabilities.check_transfer(server.url, server.start)
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        raise ValueError(
            f"rollout.weight_sync=nccl with training on {device.platform}; train on GPUs, or use "
            "rollout.weight_sync=reload"
        )
    return lambda: libnccl.LibNccl(device.local_hardware_id)


def open_student(
    config: GRPOConfig, model: Model, stack: contextlib.ExitStack
) -> tuple[ChatModel, ServerPool]:
    """Returns the student on its servers, and these, until `stack` is closed.

    Raises:
        ValueError: if none can be reached, or one has another model.
    """
    check = functools.partial(identity.check_frozen, name=config.student_model, source=model.source)
    pool = _pool("student", config.rollout.student_servers, config, check, stack)
    seeds = _has_seeds(config, pool)
    bind, _ = _chat_model(pool, model, config.teaching.student_system_prompt, seeds)
    return chat_models.check_student(config, bind(0)), pool


def _pool(
    role: str,
    urls: str,
    config: GRPOConfig,
    check: Callable[[str, ServerStart], None],
    stack: contextlib.ExitStack,
) -> ServerPool:
    servers = addresses.split(urls)
    options = PoolOptions(
        max_in_flight=config.rollout.max_in_flight,
        request_timeout_secs=config.rollout.request_timeout_secs,
        control_timeout_secs=config.rollout.sync_timeout_secs,
        # A process knows its own requests alone, so that each begins with another server.
        first=jax.process_index() * len(servers) // jax.process_count(),
    )
    pool = ServerPool(role, servers, options, server_key(config.output_dir))
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


def _has_seeds(config: GRPOConfig, pool: ServerPool) -> bool:
    """Returns whether completions of these servers are asked for with seeds."""
    asked = config.rollout.request_seeds
    return asked == "always" or (
        asked == "cpu" and all(start.device == "cpu" for start in pool.starts)
    )


def _chat_model(
    pool: ServerPool, model: Model, system_prompt: str, seeds: bool, adapter: str = ""
) -> tuple[Callable[[int], ChatModel], VllmEngine]:
    """Returns the model on its servers, by the least version of its weights, and its engine."""
    tokenizer = model.files.tokenizer
    engine = VllmEngine(
        pool=pool,
        tokenizer=copy.deepcopy(tokenizer),
        stop_ids=chat_models.stop_tokens(model),
        vocab_size=model.decoder.config.vocab_size,
        seeds=seeds,
        adapter=adapter,
    )
    lengths = [start.max_model_len for start in pool.starts]
    # A request may go to any of the servers.
    context = min(model.decoder.config.max_positions, *lengths)
    encode_turn = chat_models.turn_encoder(model.template, system_prompt)

    def bind(version: int) -> ChatModel:
        bound = dataclasses.replace(engine, at_least=version)
        return ChatModel(
            encode=chat_models.asking(encode_turn),
            generate=bound.generate,
            context=context,
            vocab_size=model.decoder.config.vocab_size,
            encode_turn=encode_turn,
            complete=bound.complete,
        )

    return bind, engine


def choose_versions(config: GRPOConfig, model: Model) -> Versions:
    """Returns the directory of this run's weights, the same one in every process."""
    run = os.path.abspath(config.output_dir)
    if config.rollout.sync_dir:
        return Versions(pathlib.Path(os.path.abspath(config.rollout.sync_dir)), run)
    chosen: Versions | None = None
    if distributed.is_main():
        urls = addresses.split(config.rollout.teacher_servers)
        # Whoever follows the versions of `weight_sync=restart` must know where they are.
        in_place = config.rollout.weight_sync in ("reload", "adapter")
        if all(map(addresses.is_loopback, urls)) and in_place:
            chosen = in_memory(run, _version_bytes(config, model))
        chosen = chosen or Versions(pathlib.Path(run, "weights"), run)
        logging.info("weights go through %s", chosen.root)
    root = distributed.gather_texts(str(chosen.root) if chosen else "")[0]
    return chosen or Versions(pathlib.Path(root), run)


def _version_bytes(config: GRPOConfig, model: Model) -> int:
    """Returns the bytes of the tensors of one version."""
    tensors = writer.tensors(model.decoder)
    if config.rollout.weight_sync == "adapter":
        from atlas_jax.checkpoint import adapters  # most runs train whole models

        tensors = [writer.Tensor(*item) for item in adapters.shapes(model.decoder).items()]
    return sum(writer.num_bytes(tensor, config.rollout.sync_dtype) for tensor in tensors)


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


def probe_logprobs(
    config: GRPOConfig, model: Model, logprobs_fn: LogprobsFn
) -> Callable[[Params, Sequence[int], np.ndarray], np.ndarray]:
    """Returns the trainer's log-probabilities of several continuations of one prompt.

    They are those of the weights as they were pushed: rounded, where the trainer computes in more
    digits.
    """
    decoder = model.decoder
    sharding = decoder.sharding
    rounds = decoder.compute_dtype.itemsize > jnp.dtype(config.rollout.sync_dtype).itemsize

    @jax.jit
    def run(params: Params, batch: PolicyBatch) -> jax.Array:
        if rounds:
            params = _rounded(config, decoder, params)
        return logprobs_fn(params, batch)[0]

    def compute(params: Params, prompt: Sequence[int], ids: np.ndarray) -> np.ndarray:
        length = -(-(len(prompt) + ids.shape[1]) // _UNIT) * _UNIT
        # Each process gives its share of the rows; they divide over the devices.
        missing = -len(ids) % sharding.num_replicas
        rows = np.concatenate([ids, np.repeat(ids[:1], missing, axis=0)])
        own = np.split(rows, jax.process_count())[jax.process_index()]
        samples = [_continuation(prompt, row) for row in own.tolist()]
        batch = to_global(collate_policy(samples, 1, length), sharding, 1)
        values = distributed.gather(from_global(run(params, batch))).reshape(-1, length)
        return values[: len(ids), len(prompt) : len(prompt) + ids.shape[1]]

    return compute


def _rounded(config: GRPOConfig, decoder: Decoder, params: Params) -> Params:
    """Returns the parameters as a server has them that got them in fewer digits."""

    def rounded(p: jax.Array) -> jax.Array:
        return p.astype(config.rollout.sync_dtype).astype(p.dtype)

    if decoder.lora is None:
        return jax.tree.map(rounded, params)
    from atlas_jax.models import lora  # most runs train whole models

    if config.rollout.weight_sync == "adapter":
        base, factors = lora.split(params)
        return joined(base, jax.tree.map(rounded, factors))
    merge = functools.partial(lora.merged, lora=decoder.lora)
    return jax.tree.map(rounded, params | {"layers": jax.vmap(merge)(params["layers"])})


def _continuation(prompt: Sequence[int], token_ids: Sequence[int]) -> Sample:
    """Returns a continuation of the probe as a sample, in which rows are collated."""
    completion = Completion(
        prompt_ids=tuple(prompt),
        token_ids=tuple(token_ids),
        logprobs=(),
        untruncated_logprobs=(0.0,) * len(token_ids),
        finish_reason="length",
        text="",
        weights_version=0,
    )
    question = Question(id="probe", text="", ground_truth="", fields={})
    return Sample(question=question, completion=completion, trains=True)
