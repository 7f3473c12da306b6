"""Where judges' models are reached: an endpoint of our own, or the provider that a name means.

Imports no JAX.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from atlas_jax.options_rim import UNKNOWN_PRICE, JudgeModel, RIMConfig


class Endpoint(NamedTuple):
    """An OpenAI-compatible endpoint and a model on it."""

    base_url: str
    model: str
    api_key_env: str  # "" sends no key


_PROVIDERS = {
    "gemini": ("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "anthropic": ("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY"),
    "xai": ("https://api.x.ai/v1", "XAI_API_KEY"),
}


_LIST_PRICES = {
    "gemini/gemini-2.5-flash": (0.30, 2.50),
    "gemini/gemini-2.5-pro": (1.25, 10.0),
}
"""Dollars for a million prompt tokens and for a million tokens of replies, of the providers' models
that the shipped configs name."""


def prices(options: JudgeModel) -> tuple[float, float] | None:
    """Returns the money for a million prompt tokens and for a million tokens of replies.

    What `options` say counts. Where they say nothing, a provider's model has its list price, and an
    endpoint of one's own has none, whatever its model is called.

    Returns:
        None if one of the two is not known.
    """
    unknown = UNKNOWN_PRICE, UNKNOWN_PRICE
    listed = unknown if options.base_url else _LIST_PRICES.get(options.model, unknown)
    own = options.input_price, options.output_price
    first, second = (o if o >= 0 else price for o, price in zip(own, listed, strict=True))
    return None if UNKNOWN_PRICE in (first, second) else (first, second)


def resolve(name: str, options: JudgeModel) -> Endpoint:
    """Returns the endpoint that `options` describe.

    Args:
        name: of the option group, for the error.
        options: with `base_url`, or a model name that starts with a provider, as LiteLLM has them.

    Raises:
        ValueError: for a name whose endpoint is not known; says what to write instead.
    """
    if options.base_url:
        if not options.base_url.startswith(("http://", "https://")) or not options.model:
            raise ValueError(
                f"{name} has base_url={options.base_url!r} and model={options.model!r}; write "
                "base_url=http://HOST:PORT/v1 and the model as that server calls it"
            )
        return Endpoint(options.base_url, options.model, options.api_key_env)
    provider, separator, model = options.model.partition("/")
    if not (separator and model and provider in _PROVIDERS):
        known = ", ".join(f"{p}/…" for p in _PROVIDERS)
        raise ValueError(
            f"{name}.model={options.model!r} does not say where the model is; use {known}, or set "
            f"{name}.base_url=http://HOST:PORT/v1, {name}.model as that server calls it, and "
            f"{name}.api_key_env if it wants a key"
        )
    base_url, variable = _PROVIDERS[provider]
    return Endpoint(base_url, model, options.api_key_env or variable)


def resolve_all(config: RIMConfig) -> dict[str, Endpoint]:
    """Returns the endpoints of `small_model` and `large_model`; raises as `resolve` does."""
    models = {"small_model": config.small_model, "large_model": config.large_model}
    return {name: resolve(f"reward.rim.{name}", model) for name, model in models.items()}


def api_key(endpoint: Endpoint) -> str:
    """Returns the key of an endpoint from the environment; "" where it needs none.

    Raises:
        ValueError: if its environment variable is not set.
    """
    if not endpoint.api_key_env:
        return ""
    key = os.environ.get(endpoint.api_key_env, "")
    if not key:
        raise ValueError(
            f"the judge {endpoint.model} at {endpoint.base_url} needs a key in the environment "
            f"variable {endpoint.api_key_env}, which is not set; set it, or name an endpoint of "
            "your own with reward.rim.small_model.base_url and reward.rim.large_model.base_url"
        )
    return key
