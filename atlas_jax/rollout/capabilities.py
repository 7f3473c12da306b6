"""Requirements on a vLLM server, and their checks. Imports no JAX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

KNOWN_VERSIONS = ("0.32.0",)
"""Tested versions of vLLM; another version must pass the check of its routes."""

GENERATE = "/inference/v1/generate"

ROUTES = (
    "/health", GENERATE, "/pause", "/resume", "/is_paused", "/collective_rpc",
    "/reset_prefix_cache", "/update_weight_version", "/weight_info", "/server_info",
)  # fmt: skip
"""Routes of a server that `rollout/` uses."""

LOAD_ADAPTER = "/v1/load_lora_adapter"
"""Route that loads a LoRA adapter, of a server that `serve` has started with --enable-lora."""

ADAPTER_NAME = "atlas_policy"
"""Name of the adapter of a run at its servers."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank that vLLM takes."""

PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
          "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}  # fmt: skip
"""Matrices that vLLM keeps in one with others, by their names in a model's files."""

LOGPROBS = ("processed_logits", "whole_vocabulary:WholeVocabulary")
"""The log-probability mode and the logits processor that `serve` starts a server with."""

TRANSFER = "nccl"
"""The backend of vLLM's weight transfer that `serve` starts a server with on GPUs."""

V2_PROCESSOR = "whole_vocabulary_v2:WholeVocabularyV2"
"""The logits processor of a server with the V2 model runner, in place of that of `LOGPROBS`.

Each runner refuses the other's processors, so a server that has started with one tells its runner.
"""

UNTRUNCATED_LOGPROBS = "processed_logprobs"
"""A mode of vLLM's own that is the same, on either runner, if neither top_p nor top_k cut."""

PROMPT_LOGPROBS = ("raw_logprobs", "processed_logprobs")
"""Modes in which prompts have log-probabilities, at temperature 1, and not logits."""

WORKERS = "load_version.LoadVersion"
"""The extension of a server's workers, which reloads weights in place and computes checksums."""

PRIORITY = "priority"
"""The scheduling policy with which the probe of new weights precedes waiting requests."""


class ServerStart(NamedTuple):
    """Options of a server's start on which GRPO depends."""

    root: str
    """Directory or hub id of its model."""
    max_model_len: int
    """Largest number of tokens of a prompt with its completion."""
    block_size: int
    """Number of tokens in a block of its prefix cache."""
    max_num_seqs: int
    """Number of requests that it runs at one time; further ones wait."""
    dtype: str
    """dtype of its parameters; "" if they are quantised."""
    device: str
    """Kind of its devices, such as "cuda" or "cpu"."""
    policy: str
    """Scheduling policy for waiting requests."""
    transfer: str = ""
    """Backend of its weight transfer; "" for none."""
    whole_vocabulary: bool = True
    """True if its log-probabilities are of the whole vocabulary although top_p or top_k cut."""
    logprobs_mode: str = ""
    """Kind of its log-probabilities, of completions and of prompts."""
    max_logprobs: int = 0
    """Largest number of tokens that it names at a position; -1 is no limit."""
    max_lora_rank: int = 0
    """Largest rank of a LoRA adapter; 0 if it takes none."""
    lora_targets: tuple[str, ...] = ()
    """Names of the matrices that an adapter may have factors for; empty for all of them."""
    loads_adapters: bool = False
    """True if it has the route that loads one."""


def check_routes(url: str, version: str, paths: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a route of `ROUTES` is missing in `paths`, from `/openapi.json`."""
    missing = [route for route in ROUTES if route not in paths]
    if missing:
        raise ValueError(
            f"the server {url} (vLLM {version}) lacks {', '.join(missing)}; start it with "
            f"python -m atlas_jax.serve, or take vLLM {' or '.join(KNOWN_VERSIONS)}"
        )


def check_start(url: str, info: Any, model: Any) -> ServerStart:
    """Returns the options of a server's start, checked for GRPO.

    Args:
        url: the address of the server.
        info: the reply to `/server_info?config_format=json`.
        model: the only entry of the reply to `/v1/models`.

    Raises:
        ValueError: if the reply is incomplete, or an option is not the one that GRPO needs.
    """
    start, workers, processors = _read(url, info, model)
    mode = start.logprobs_mode
    whole = mode == LOGPROBS[0] and any(p in processors for p in (LOGPROBS[1], V2_PROCESSOR))
    if not whole and (mode != UNTRUNCATED_LOGPROBS or processors):
        raise ValueError(
            f"the server {url} runs with --logprobs-mode {mode} and the logits processors "
            f"{processors}: its log-probabilities are not of the whole vocabulary at the "
            "temperature; start it with python -m atlas_jax.serve"
        )
    if workers != WORKERS:
        raise ValueError(
            f"the server {url} runs with the worker extension {workers!r} instead of {WORKERS}, "
            "which reloads weights; start it with python -m atlas_jax.serve"
        )
    return start._replace(whole_vocabulary=whole)


def check_scores(url: str, info: Any, model: Any, num_tokens: int) -> ServerStart:
    """Returns the options of a server's start, checked for scoring the tokens of prompts.

    Args:
        url: as in `check_start`, as the next two are.
        info: the reply to `/server_info?config_format=json`.
        model: the only entry of the reply to `/v1/models`.
        num_tokens: tokens that it is to name at each position.

    Raises:
        ValueError: if the reply is incomplete, or if it names fewer tokens or no log-probabilities.
    """
    start, _, _ = _read(url, info, model)
    mode, most = start.logprobs_mode, start.max_logprobs
    if mode not in PROMPT_LOGPROBS or 0 <= most < num_tokens:
        raise ValueError(
            f"the teacher server {url} runs with --logprobs-mode {mode} and --max-logprobs {most}, "
            f"and scoring.top_tokens={num_tokens} needs log-probabilities of as many tokens of a "
            "prompt; start it with python -m atlas_jax.serve … --logprobs-mode "
            f"{PROMPT_LOGPROBS[0]} --max-logprobs {num_tokens}"
        )
    return start


def _read(url: str, info: Any, model: Any) -> tuple[ServerStart, str, list[str]]:
    """Returns the options of a server's start, its worker extension and its logits processors."""
    try:
        config = info["vllm_config"]
        workers = config["parallel_config"]["worker_extension_cls"]
        processors = config["model_config"]["logits_processors"] or []
        quantized = config["model_config"]["quantization"] is not None
        lora = config.get("lora_config") or {}
        start = ServerStart(
            root=str(model["root"]),
            max_model_len=int(model["max_model_len"]),
            block_size=int(config["cache_config"]["block_size"]),
            max_num_seqs=int(config["scheduler_config"]["max_num_seqs"]),
            dtype="" if quantized else str(config["model_config"]["dtype"]).removeprefix("torch."),
            device=str(config["device_config"]["device"]),
            policy=str(config["scheduler_config"]["policy"]),
            transfer=str((config.get("weight_transfer_config") or {}).get("backend", "")),
            logprobs_mode=str(config["model_config"]["logprobs_mode"]),
            max_logprobs=int(config["model_config"].get("max_logprobs", 0)),
            max_lora_rank=int(lora.get("max_lora_rank", 0)),
            lora_targets=tuple(lora.get("target_modules") or ()),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"the server {url} does not describe itself as vLLM {' or '.join(KNOWN_VERSIONS)} does "
            f"({type(error).__name__}: {error}); start it with python -m atlas_jax.serve"
        ) from None
    return start, workers, processors


def check_transfer(url: str, start: ServerStart) -> None:
    """Raises `ValueError` if a server takes no weights over NCCL."""
    if start.device != "cuda" or start.transfer != TRANSFER:
        raise ValueError(
            f"rollout.weight_sync=nccl with the server {url}, which runs on {start.device} with "
            f"the weight transfer {start.transfer or 'none'!r}; start it with python -m "
            "atlas_jax.serve on a host with GPUs, or use rollout.weight_sync=reload"
        )


def check_adapters(url: str, start: ServerStart, rank: int, targets: Sequence[str]) -> None:
    """Checks that a server takes an adapter.

    Args:
        url: the address of the server.
        start: the options of its start.
        rank: the rank of the adapter.
        targets: the matrices that have factors, by their names in PEFT.

    Raises:
        ValueError: names the flag with which the server must be started.
    """
    what = f"rollout.weight_sync=adapter with the server {url}, which runs "
    enough = next((most for most in LORA_RANKS if most >= rank), 0)
    if not enough:
        raise ValueError(
            f"rollout.weight_sync=adapter with model.lora.rank={rank}: vLLM takes adapters of rank "
            f"{LORA_RANKS[-1]} at most; use rollout.weight_sync=reload"
        )
    flags = f"start it with --enable-lora --max-lora-rank {enough}, or use rollout.weight_sync="
    if start.max_lora_rank < rank:
        how = f"--max-lora-rank {start.max_lora_rank}" if start.max_lora_rank else "no adapters"
        raise ValueError(f"{what}with {how}, and model.lora.rank={rank}; {flags}reload")
    served = start.lora_targets
    missing = [name for name in targets if not {name, PACKED.get(name, name)} & {*served}]
    if served and missing:
        raise ValueError(
            f"{what}with --lora-target-modules {' '.join(served)}, and the adapter has "
            f"{', '.join(missing)}; start it without that flag"
        )
    if not start.loads_adapters:
        raise ValueError(
            f"{what}without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1; start it with python -m "
            "atlas_jax.serve, which sets it"
        )


def check_sampling(url: str, start: ServerStart, top_p: float, top_k: int) -> None:
    """Checks that a server's log-probabilities are those that the trainer computes.

    Raises:
        ValueError: if top_p or top_k cut, and the server reports over what they leave.
    """
    if not start.whole_vocabulary and (top_p < 1.0 or top_k > 0):
        raise ValueError(
            f"the server {url} runs with --logprobs-mode {UNTRUNCATED_LOGPROBS}, which is over the "
            f"tokens that top_p={top_p:g} and top_k={top_k} leave; set top_p=1 and top_k=0, or "
            "start it with python -m atlas_jax.serve"
        )
