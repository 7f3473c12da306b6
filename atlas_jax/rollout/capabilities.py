"""What a vLLM server must be able to do, and the errors that name what it lacks. Imports no JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KNOWN_VERSIONS = ("0.32.0",)
"""Of vLLM, tested with; another one has to pass the probe of its routes."""

GENERATE = "/inference/v1/generate"

ROUTES = (
    "/health", GENERATE, "/pause", "/resume", "/is_paused", "/collective_rpc",
    "/reset_prefix_cache", "/update_weight_version", "/weight_info", "/server_info",
)  # fmt: skip
"""What `rollout/` asks of a server."""

LOGPROBS = ("processed_logits", "whole_vocabulary:WholeVocabulary")
"""The log-probability mode and the logits processor that `serve` starts a server with."""

WORKERS = "load_version.LoadVersion"
"""The extension of its workers, whose `load_version` reloads in place."""


def check_routes(url: str, version: str, paths: Mapping[str, Any]) -> None:
    """Raises `ValueError` if `paths`, of the server's `/openapi.json`, lack a route of `ROUTES`."""
    missing = [route for route in ROUTES if route not in paths]
    if missing:
        raise ValueError(
            f"the server {url} (vLLM {version}) lacks {', '.join(missing)}; start it with "
            f"python -m atlas_jax.serve, or take vLLM {' or '.join(KNOWN_VERSIONS)}"
        )


def check_start(url: str, info: Mapping[str, Any]) -> None:
    """Raises `ValueError` if the server was not started as GRPO needs it.

    Args:
        url: of the server.
        info: its `/server_info?config_format=json`.
    """
    workers = info["vllm_config"]["parallel_config"]["worker_extension_cls"]
    model = info["vllm_config"]["model_config"]
    mode, processors = model["logprobs_mode"], model["logits_processors"] or []
    if mode != LOGPROBS[0] or LOGPROBS[1] not in processors:
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
