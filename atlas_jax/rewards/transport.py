"""Calls of judges' models: one flat pool within limits and a budget, over a cache on disk.

A call brings an opinion or says why it has none; nothing else ever stands for a reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from atlas_jax import progress
from atlas_jax.endpoints import Endpoint, api_key, prices, resolve_all, warn_if_readable
from atlas_jax.llm_client import (
    Client,
    ClientOptions,
    Pace,
    RefusedError,
    ServerError,
    Tries,
    UnavailableError,
)
from atlas_jax.options_rim import JudgeLimits, JudgeModel, RIMConfig
from atlas_jax.rewards.ensemble import Opinion
from atlas_jax.rewards.judges import SCHEMA, Unreadable, parse
from atlas_jax.rewards.replies import Cache, Ledger, Reply, key_of
from atlas_jax.types import Message

_FORMATS: dict[str, dict[str, Any] | None] = {
    "json_schema": {
        "type": "json_schema",
        "json_schema": {"name": "judgement", "schema": SCHEMA},
    },
    "json_object": {"type": "json_object"},
    "none": None,
}
_CHARS_PER_TOKEN = 4  # an estimate, until a reply says


class ReplayError(RuntimeError):
    """A reply that replay needs and the cache lacks."""


class Answer(NamedTuple):
    """What came of one call."""

    opinion: Opinion | None
    failure: str  # "" where there is an opinion
    later: bool  # whether the failure may pass
    cached: bool  # no call was made
    tokens: int = 0
    cost: float = 0.0
    calls: int = 0


class Pool:
    """Open connections for one batch of calls; equal calls are made once."""

    def __init__(self, owner: Transport, clients: dict[str, Client]) -> None:
        self._owner = owner
        self._clients = clients
        self._asked: dict[str, asyncio.Task[Answer]] = {}

    async def ask(
        self,
        which: str,
        messages: Sequence[Message],
        temperature: float,
    ) -> Answer:
        """Returns what a model says.

        Args:
            which: `small_model` or `large_model`.
            messages: the conversation.
            temperature: of sampling.

        Raises:
            ReplayError: on replay, if the cache has no reply.
        """
        model = self._owner.models[which]
        key = key_of(model.endpoint.model, messages, temperature, model.options.max_tokens)
        if key in self._asked:
            answer = await self._asked[key]
            return answer._replace(cached=True, tokens=0, cost=0.0, calls=0)

        call = self._owner.call(self._clients[which], model, key, messages, temperature)
        self._asked[key] = asyncio.ensure_future(call)
        return await self._asked[key]


class _Model(NamedTuple):
    endpoint: Endpoint
    options: JudgeModel
    api_key: str
    prices: tuple[float, float] | None
    """Money for a million prompt tokens and for a million tokens of replies; None: not known."""


class Transport:
    """What stays from one batch to the next: cache, account, and what a server has refused."""

    def __init__(self, config: RIMConfig, share: int = 1, ledger_path: str = "") -> None:
        """Finds endpoints and keys; nothing is connected yet.

        Args:
            config: of RIM.
            share: how many processes keep the limits together.
            ledger_path: file with the account of this process; "" keeps it in memory.

        Raises:
            ValueError: for an endpoint or a key that is not known, and for a budget of money where
                earlier calls were made at an unknown price.
        """
        self._replay = config.replay
        self._limits = _shared(config.limits, share)
        self._cache = Cache(config.cache_dir)
        self._ledger = Ledger(ledger_path)
        options = {"small_model": config.small_model, "large_model": config.large_model}
        self.models = {
            name: _Model(
                endpoint=endpoint,
                options=options[name],
                api_key="" if config.replay else api_key(endpoint),
                prices=prices(options[name]),
            )
            for name, endpoint in resolve_all(config).items()
        }
        self.is_priced = all(model.prices for model in self.models.values())
        """Whether it is known what every call costs."""
        if config.limits.max_cost and self._ledger.spent.cost is None:
            raise ValueError(
                f"{ledger_path} has calls of judges whose price was not known, so that "
                f"reward.rim.limits.max_cost={config.limits.max_cost:g} cannot be kept; set it to "
                "0, or remove the file"
            )
        for endpoint in {m.endpoint for m in self.models.values() if m.api_key}:
            warn_if_readable(endpoint)
        self._refused: dict[Endpoint, int] = {}  # how many formats the endpoint does not take
        self._pace = Pace(float(self._limits.tokens_per_minute))

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Pool]:
        """Yields a pool of calls, inside one event loop; the account is saved at its end."""
        limits = self._limits
        options = ClientOptions(
            max_in_flight=limits.max_in_flight,
            timeout_secs=limits.timeout_secs,
            max_tries=limits.max_tries,
            requests_per_minute=float(limits.requests_per_minute),
            max_failures_in_row=2 * limits.max_in_flight,
        )
        servers = {(m.endpoint.base_url, m.api_key) for m in self.models.values()}
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._ledger.save)
            clients = {
                server: await stack.enter_async_context(Client(*server, options, self._admit))
                for server in servers
            }
            yield Pool(
                self,
                {n: clients[m.endpoint.base_url, m.api_key] for n, m in self.models.items()},
            )

    async def call(
        self,
        client: Client,
        model: _Model,
        key: str,
        messages: Sequence[Message],
        temperature: float,
    ) -> Answer:
        """Returns one answer, from the cache or from the server."""
        name = model.endpoint.model
        kept = self._cache.read(key)
        found = parse(kept.text, name, temperature) if kept else None
        if isinstance(found, Opinion):
            return Answer(found, "", False, True)
        if found and self._replay:
            return Answer(None, found.reason, False, True)
        if self._replay:
            raise ReplayError(
                f"the cache has no reply of {name} at temperature {temperature:g} "
                f"to {messages[-1]['content'][:200]!r}; replay only what was scored with the same "
                "options, or set reward.rim.replay=False"
            )
        payload = {
            "model": name,
            "messages": list(messages),
            "temperature": temperature,
            "max_tokens": model.options.max_tokens,
        }
        tokens, cost = 0, 0.0
        failure, later = "", True
        tries = Tries(self._limits.max_tries)
        while tries.left:
            try:
                reply = await self._post(client, model, payload, tries)
            except ServerError as error:
                failure, later = str(error), isinstance(error, UnavailableError)
                break
            tokens += reply.input_tokens + reply.output_tokens
            cost += _cost(reply, model.prices)
            self._cache.write(key, reply)
            read = parse(reply.text, name, temperature)
            if not isinstance(read, Unreadable):
                return Answer(read, "", False, False, tokens, cost, tries.made)
            failure = read.reason
        return Answer(None, failure, later, False, tokens, cost, tries.made)

    def _admit(self) -> str:
        """Counts a call, or returns which budget has none left."""
        limits, spent = self._limits, self._ledger.spent
        if limits.max_calls and spent.calls >= limits.max_calls:
            return f"this process's {limits.max_calls} of reward.rim.limits.max_calls are used up"
        if limits.max_cost and spent.cost is not None and spent.cost >= limits.max_cost:
            return f"this process's {limits.max_cost:g} of reward.rim.limits.max_cost is used up"
        self._ledger.begin()
        return ""

    async def _post(
        self, client: Client, model: _Model, payload: dict[str, Any], tries: Tries
    ) -> Reply:
        """Makes one call, in the strictest format that the server takes.

        A request that only told that it does not take one is not counted among the tries.
        """
        chars = sum(len(message["content"]) for message in payload["messages"])
        estimate = chars // _CHARS_PER_TOKEN
        if self._limits.tokens_per_minute:
            await self._pace.wait(float(estimate))
        while True:
            used = self._refused.setdefault(model.endpoint, 0)
            wanted = model.options.response_format
            name = list(_FORMATS)[used] if wanted == "auto" else wanted
            body = payload | ({"response_format": _FORMATS[name]} if _FORMATS[name] else {})
            try:
                raw = await client.post("/chat/completions", body, tries=tries)
            except RefusedError as error:
                if wanted != "auto" or name == "none" or not _refuses_format(error):
                    raise
                self._refused[model.endpoint] = max(self._refused[model.endpoint], used + 1)
                tries.left += 1
                continue
            progress.mark()
            reply = _reply(raw, estimate)
            total = reply.input_tokens + reply.output_tokens
            self._pace.correct(float(total - estimate))
            self._ledger.add(total, _cost(reply, model.prices) if self.is_priced else None)
            return reply


def _shared(limits: JudgeLimits, share: int) -> JudgeLimits:
    """Returns the limits of one of `share` processes; a limit that there is stays one."""
    if share == 1:
        return limits
    names = ("max_in_flight", "requests_per_minute", "tokens_per_minute", "max_calls")
    parts = {n: max(getattr(limits, n) // share, 1) for n in names if getattr(limits, n)}
    return dataclasses.replace(limits, max_cost=limits.max_cost / share, **parts)


def _refuses_format(error: RefusedError) -> bool:
    body = error.body.lower()
    words = ("response_format", "json_schema", "json_object", "schema", "structured", "guided")
    return error.status in (400, 404, 415, 422, 501) and any(word in body for word in words)


def _reply(raw: Any, estimate: int) -> Reply:
    """Returns what a chat completion holds; "" where it is none."""
    try:
        text = raw["choices"][0]["message"]["content"]
        usage = raw.get("usage") or {}
        input_tokens = int(usage.get("prompt_tokens") or estimate)
        output_tokens = int(usage.get("completion_tokens") or len(text or "") // _CHARS_PER_TOKEN)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return Reply("", estimate, 0)
    return Reply(text if isinstance(text, str) else "", input_tokens, output_tokens)


def _cost(reply: Reply, prices: tuple[float, float] | None) -> float:
    """Returns the money for a call, 0 where its price is not known; see `Transport.is_priced`."""
    read, written = prices or (0.0, 0.0)
    return (reply.input_tokens * read + reply.output_tokens * written) / 1e6
