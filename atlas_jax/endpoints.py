"""Where judges' models are reached: an endpoint of our own, or the provider that a name means.

Imports no JAX.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from absl import logging

from atlas_jax import extras, masking
from atlas_jax.options.judges import UNKNOWN_PRICE, JudgeModel, RIMConfig

if TYPE_CHECKING:
    import yarl


class Endpoint(NamedTuple):
    """An OpenAI-compatible endpoint and a model on it."""

    base_url: str
    model: str
    api_key_env: str  # "" sends no key


class _Provider(NamedTuple):
    """A company's endpoint and the environment variable that its key is read from."""

    base_url: str
    variable: str


_PROVIDERS = {
    "gemini": _Provider(
        "https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"
    ),
    "openai": _Provider("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "anthropic": _Provider("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY"),
    "xai": _Provider("https://api.x.ai/v1", "XAI_API_KEY"),
}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


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
        name: option group, for the error.
        options: with `base_url`, or a model name that starts with a provider, as LiteLLM has them.

    Raises:
        ValueError: for a name whose endpoint is not known, and for a key that would be sent where
            it does not belong; says what to write instead. Also if the HTTP client is not
            installed.
    """
    extras.need("judges", name)
    if options.api_key_env and not _VARIABLE.fullmatch(options.api_key_env):
        raise ValueError(
            f"{name}.api_key_env must be the name of an environment variable, such as JUDGE_KEY, "
            "and not the key itself"
        )
    endpoint = _found(name, options)
    _check_key(name, endpoint)
    return endpoint


def _found(name: str, options: JudgeModel) -> Endpoint:
    if options.base_url:
        if not _is_address(options.base_url) or not options.model:
            raise ValueError(
                f"{name} has base_url={masking.hide(options.base_url)!r} and model="
                f"{options.model!r}; write base_url=http://HOST:PORT/v1 and the model as that "
                "server calls it"
            )
        return Endpoint(options.base_url, options.model, options.api_key_env)
    company, separator, model = options.model.partition("/")
    if not (separator and model and company in _PROVIDERS):
        known = ", ".join(f"{p}/…" for p in _PROVIDERS)
        raise ValueError(
            f"{name}.model={options.model!r} does not say where the model is; use {known}, or set "
            f"{name}.base_url=http://HOST:PORT/v1, {name}.model as that server calls it, and "
            f"{name}.api_key_env if it wants a key"
        )
    provider = _PROVIDERS[company]
    return Endpoint(provider.base_url, model, options.api_key_env or provider.variable)


def _url(text: str) -> yarl.URL:
    """Returns a URL as the HTTP client reads it; raises a ValueError for a text that is none."""
    import yarl  # runs without judges check no URL and may have no HTTP client

    return yarl.URL(text)


def _is_address(base_url: str) -> bool:
    try:
        url = _url(base_url)
    except ValueError:
        return False
    return url.scheme in ("http", "https") and bool(url.host)


def _check_key(name: str, endpoint: Endpoint) -> None:
    """Checks that a key goes to nobody but the one it belongs to."""
    url = _url(endpoint.base_url)  # as the client reads it
    variable = endpoint.api_key_env
    if variable and url.user is not None:
        raise ValueError(
            f"{name} has a user in base_url={masking.hide(endpoint.base_url)} and api_key_env="
            f"{variable}, which both say who asks; leave one of them out"
        )
    owner = next((p for p in _PROVIDERS.values() if p.variable == variable), None)
    if owner is None:
        return
    host = (url.host or "").rstrip(".")
    provider_host = _url(owner.base_url).host or ""
    if url.scheme != "https" or (host != provider_host and not host.endswith(f".{provider_host}")):
        raise ValueError(
            f"{name} would send {variable} to {masking.hide(endpoint.base_url)}, but that key "
            f"belongs to https://{provider_host} alone; leave {name}.api_key_env empty, or name "
            "the variable of this server's own key"
        )


def resolve_all(config: RIMConfig) -> dict[str, Endpoint]:
    """Returns the endpoints of `small_model` and `large_model`; raises as `resolve` does."""
    models = {"small_model": config.small_model, "large_model": config.large_model}
    return {name: resolve(f"reward.rim.{name}", model) for name, model in models.items()}


def check(config: RIMConfig) -> None:
    """Checks that both models have an endpoint, and prices where a budget needs them.

    Raises:
        ValueError: names the option, its value and what to write instead.
    """
    resolve_all(config)
    models = {"small_model": config.small_model, "large_model": config.large_model}
    for name, model in models.items() if config.limits.max_cost else ():
        if prices(model) is None:
            where = f" at {model.base_url}" if model.base_url else ""
            name = f"reward.rim.{name}"
            raise ValueError(
                f"reward.rim.limits.max_cost={config.limits.max_cost:g}, and the price of {name} "
                f"({model.model}{where}) is not known; set {name}.input_price and "
                f"{name}.output_price, or max_cost=0"
            )


def api_key(endpoint: Endpoint) -> str:
    """Returns the key of an endpoint from the environment; "" where it needs none.

    Raises:
        ValueError: if its environment variable is not set.
    """
    if not endpoint.api_key_env:
        return ""
    key = os.environ.get(endpoint.api_key_env, "")
    where = masking.hide(endpoint.base_url)
    if not key:
        raise ValueError(
            f"the judge {endpoint.model} at {where} needs a key in the environment "
            f"variable {endpoint.api_key_env}, which is not set; set it, or name an endpoint of "
            "your own with reward.rim.small_model.base_url and reward.rim.large_model.base_url"
        )
    return key


def warn_if_readable(endpoint: Endpoint) -> None:
    """Warns of a key that others on the network can read."""
    url = _url(endpoint.base_url)
    if not endpoint.api_key_env or url.scheme == "https" or url.host in _LOOPBACK:
        return
    logging.warning(
        "the key in %s goes to %s unencrypted, and everybody on the way can read it; use https "
        "unless that network is yours alone",
        *(endpoint.api_key_env, masking.hide(endpoint.base_url)),
    )
