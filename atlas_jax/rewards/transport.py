"""Calls of judges' models: one flat pool within limits and a budget, over a cache on disk.

A call brings an opinion or says why it has none; nothing else ever stands for a reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import yarl

from atlas_jax import progress
from atlas_jax.endpoints import Endpoint, api_key, prices, resolve_all, warn_if_readable
from atlas_jax.llm_client import (
    Client,
    ClientOptions,
    RefusedError,
    ServerError,
    Tries,
    UnavailableError,
)
from atlas_jax.options.judges import JudgeLimits, JudgeModel, RIMConfig
from atlas_jax.rewards import dialect as dialects
from atlas_jax.rewards.dialect import Dialect, Known, Request
from atlas_jax.rewards.ensemble import Opinion
from atlas_jax.rewards.judges import Unreadable, parse
from atlas_jax.rewards.replies import Cache, Ledger, Reply, key_of
from atlas_jax.throttle import Throttle
from atlas_jax.types import Message

MAX_HOLD_SECS = 120.0
"""Longest that an endpoint is left alone because it says so; limits are by the minute."""

_CHARS_PER_TOKEN = 4  # an estimate, until a reply says
_MOST_TOKENS = 10**9  # of one call; beyond it a count is nonsense
_MOST_ROOM = 4  # times `max_tokens`, for a reply that is cut off


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
        options = model.options
        request = Request(
            model=model.endpoint.model,
            messages=messages,
            temperature=temperature,
            max_tokens=options.max_tokens,
            response_format=options.response_format,
        )
        parts = (_address(model.endpoint.base_url), *map(str, request[:1] + request[2:]))
        key = key_of(parts, messages)
        earlier = self._asked.get(key)
        if earlier is not None and not _may_pass(earlier):
            answer = await earlier
            return answer._replace(cached=True, tokens=0, cost=0.0, calls=0)

        call = self._owner.call(self._clients[which], model, key, request)
        self._asked[key] = asyncio.ensure_future(call)
        return await self._asked[key]


def _may_pass(asked: asyncio.Task[Answer]) -> bool:
    """Returns whether a call has failed in a way that makes another one worth it."""
    return asked.done() and not asked.cancelled() and not asked.exception() and asked.result().later


class _Model(NamedTuple):
    endpoint: Endpoint
    options: JudgeModel
    api_key: str
    prices: tuple[float, float] | None
    """Money for a million prompt tokens and for a million tokens of replies; None: not known."""


class Transport:
    """What stays from one batch to the next: cache, account, and what endpoints have refused."""

    def __init__(self, config: RIMConfig, share: int = 1, ledger_path: str = "") -> None:
        """Finds endpoints and keys; nothing is connected yet.

        Args:
            config: of RIM.
            share: how many processes keep the limits together.
            ledger_path: file with the account of this process, `…_process_N.json` beside those of
                the others; "" keeps it in memory.

        Raises:
            ValueError: for an endpoint or a key that is not known, and for a budget of money where
                earlier calls were made at an unknown price.
        """
        self._replay = config.replay
        self._limits = _shared(config.limits, share)
        self._cache = Cache(config.cache_dir, config.cache_max_bytes, is_read_only=config.replay)
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
        if config.limits.max_cost and self._ledger.total.cost is None:
            raise ValueError(
                f"{ledger_path} has calls of judges whose price was not known, so that "
                f"reward.rim.limits.max_cost={config.limits.max_cost:g} cannot be kept; set it to "
                "0, or remove the file"
            )
        self._budget = _budget(config.limits, share, self._ledger)
        for endpoint in {m.endpoint for m in self.models.values() if m.api_key}:
            warn_if_readable(endpoint)
        self._dialects = {model.endpoint: Known() for model in self.models.values()}
        self._throttles = {
            _address(model.endpoint.base_url): Throttle(
                self._limits.max_in_flight,
                float(self._limits.requests_per_minute),
                float(self._limits.tokens_per_minute),
            )
            for model in self.models.values()
        }

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Pool]:
        """Yields a pool of calls, inside one event loop; what came of them is kept at its end."""
        limits = self._limits
        options = ClientOptions(
            max_in_flight=limits.max_in_flight,
            timeout_secs=limits.timeout_secs,
            max_tries=limits.max_tries,
            max_backoff_secs=MAX_HOLD_SECS,
            max_failures_in_row=2 * limits.max_in_flight,
            trust_env=True,
        )
        servers = {(m.endpoint.base_url, m.api_key) for m in self.models.values()}
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._ledger.save)
            stack.callback(self._cache.flush)
            clients = {
                (url, key): await stack.enter_async_context(
                    Client(
                        url,
                        key,
                        options,
                        admit=self._admit,
                        refund=self._ledger.refund,
                        throttle=self._throttles[_address(url)],
                    )
                )
                for url, key in servers
            }
            yield Pool(
                self,
                {n: clients[m.endpoint.base_url, m.api_key] for n, m in self.models.items()},
            )

    async def call(self, client: Client, model: _Model, key: str, request: Request) -> Answer:
        """Returns one answer, from the cache or from the server."""
        name, temperature = request.model, request.temperature
        kept = self._cache.read(key)
        found = _read(kept, request) if kept else None
        if isinstance(found, Opinion):
            return Answer(found, "", False, True)
        if found and self._replay:
            return Answer(None, found.reason, False, True)
        if self._replay:
            raise ReplayError(
                f"the cache has no reply of {name} at temperature {temperature:g} "
                f"to {request.messages[-1]['content'][:200]!r}; replay only what was scored with "
                "the same options, or set reward.rim.replay=False"
            )
        tokens, cost = 0, 0.0
        failure, later = "", True
        most = _MOST_ROOM * request.max_tokens
        tries = Tries(self._limits.max_tries)
        while tries.left:
            try:
                reply = await self._post(client, model, request, tries)
            except ServerError as error:
                failure = f"{failure}; then {error}" if failure else str(error)
                later = isinstance(error, UnavailableError)
                break
            tokens += reply.input_tokens + reply.output_tokens
            cost += _cost(reply, model.prices)
            self._cache.write(key, reply)
            read = _read(reply, request)
            if not isinstance(read, Unreadable):
                return Answer(read, "", False, False, tokens, cost, tries.made)
            failure = read.reason
            if reply.is_cut:
                request = request._replace(max_tokens=min(2 * request.max_tokens, most))
        return Answer(None, failure, later, False, tokens, cost, tries.made)

    def _admit(self) -> str:
        """Counts a call, or returns which budget has none left."""
        limits, spent = self._budget, self._ledger.spent
        if limits.calls is not None and spent.calls >= limits.calls:
            return f"this process's {limits.calls} of reward.rim.limits.max_calls are used up"
        if limits.cost is not None and spent.cost is not None and spent.cost >= limits.cost:
            return f"this process's {limits.cost:g} of reward.rim.limits.max_cost is used up"
        self._ledger.begin()
        return ""

    async def _post(self, client: Client, model: _Model, request: Request, tries: Tries) -> Reply:
        """Makes one call, with the parameters that the model takes.

        A request that only told that it does not take one is not counted among the tries.
        """
        chars = sum(len(message["content"]) for message in request.messages)
        estimate = chars // _CHARS_PER_TOKEN
        tokens = self._throttles[_address(model.endpoint.base_url)].tokens
        await tokens.wait(float(estimate))
        known, sent = self._dialects[model.endpoint], Dialect()

        def body() -> dict[str, Any]:
            nonlocal sent  # what other calls have learned while this one waited counts
            sent = known.latest
            return dialects.payload(request, sent)

        while True:
            try:
                raw = await client.post("/chat/completions", body, tries=tries)
            except RefusedError as error:
                easier = dialects.after(error, request, sent)
                if easier is None:
                    known.latest = known.taken  # it was about something else
                    raise
                known.latest = known.latest.easier_of(easier)
                tries.left += 1
                continue
            known.taken = known.taken.easier_of(sent)
            progress.mark()
            reply = _reply(raw, estimate)
            total = reply.input_tokens + reply.output_tokens
            tokens.correct(float(total - estimate))
            self._ledger.add(total, _cost(reply, model.prices) if self.is_priced else None)
            return reply


class _Budget(NamedTuple):
    """What a process may have spent in all; None is no limit."""

    calls: int | None
    cost: float | None


def _budget(limits: JudgeLimits, share: int, ledger: Ledger) -> _Budget:
    """Returns what a process may spend: of what the run has left an equal part, and what it has."""
    total, own = ledger.total, ledger.spent
    calls = own.calls + max(limits.max_calls - total.calls, 0) // share
    cost = (own.cost or 0.0) + max(limits.max_cost - (total.cost or 0.0), 0.0) / share
    return _Budget(calls if limits.max_calls else None, cost if limits.max_cost else None)


def _shared(limits: JudgeLimits, share: int) -> JudgeLimits:
    """Returns the rates of one of `share` processes; a limit that there is stays one."""
    names = ("max_in_flight", "requests_per_minute", "tokens_per_minute")
    parts = {n: max(getattr(limits, n) // share, 1) for n in names if getattr(limits, n)}
    return dataclasses.replace(limits, **parts)


def _address(base_url: str) -> str:
    """Returns the address of an endpoint without a user and a password."""
    return str(yarl.URL(base_url.rstrip("/")).with_user(None))


def _read(reply: Reply, request: Request) -> Opinion | Unreadable:
    """Returns what a reply says; one that is cut says nothing, whatever it held so far."""
    if reply.is_cut:
        return Unreadable(f"cut off behind {reply.output_tokens} tokens: {reply.text[-120:]!r}")
    return parse(reply.text, request.model, request.temperature)


def _reply(raw: Any, estimate: int) -> Reply:
    """Returns what a chat completion holds; its text is "" where it is none."""
    try:
        choice = raw["choices"][0]
        text, is_cut = _text(choice["message"]["content"]), choice.get("finish_reason") == "length"
    except (KeyError, IndexError, TypeError, AttributeError):
        return Reply("", estimate, 0)
    usage = raw.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        text,
        _count(usage.get("prompt_tokens"), estimate),
        _count(usage.get("completion_tokens"), len(text) // _CHARS_PER_TOKEN),
        is_cut,
    )


def _text(content: Any) -> str:
    """Returns a message's content, which some endpoints divide into parts, thoughts among them."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(part["text"] for part in parts)
    return content if isinstance(content, str) else ""


def _count(given: Any, estimate: int) -> int:
    """Returns a number of tokens as an endpoint gives it, the estimate where it is none."""
    is_number = isinstance(given, int | float) and 0 < given <= _MOST_TOKENS
    return int(given) if is_number else estimate


def _cost(reply: Reply, prices: tuple[float, float] | None) -> float:
    """Returns the money for a call, 0 where its price is not known; see `Transport.is_priced`."""
    read, written = prices or (0.0, 0.0)
    return (reply.input_tokens * read + reply.output_tokens * written) / 1e6
