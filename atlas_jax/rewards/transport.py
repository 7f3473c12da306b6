"""Calls of judges' models, within limits and a budget, with a cache on disk.

A call returns an opinion or the reason for its absence. No default ever replaces a reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from atlas_jax import extras, progress
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
from atlas_jax.rewards.dialect import ChatRequest, Dialect, KnownDialect
from atlas_jax.rewards.ensemble import Opinion
from atlas_jax.rewards.judges import Unreadable, parse
from atlas_jax.rewards.replies import Ledger, Reply, ReplyCache, key_of
from atlas_jax.throttle import Throttle
from atlas_jax.types import Message

with extras.importing("judges", "a reward of judges"):
    import yarl

MAX_HOLD_SECS = 120.0
"""Longest pause in seconds that an endpoint may ask for; rate limits are by the minute."""

_CHARS_PER_TOKEN = 4  # an estimate, until a reply states its tokens
_MOST_TOKENS = 10**9  # of one call; a larger count is a fault of the endpoint
_MOST_ROOM = 4  # largest factor by which `max_tokens` grows after a reply that was cut


class ReplayError(RuntimeError):
    """A reply that replay needs and that is not in the cache."""


class CallResult(NamedTuple):
    """Result of one call."""

    opinion: Opinion | None
    failure: str  # "" for a call with an opinion
    later: bool  # whether another call may succeed
    cached: bool  # whether no call was made
    tokens: int = 0
    cost: float = 0.0
    calls: int = 0


class CallBatch:
    """Calls of one batch, over open connections; equal calls are made once."""

    def __init__(self, owner: Transport, clients: dict[str, Client]) -> None:
        self._owner = owner
        self._clients = clients
        self._asked: dict[str, asyncio.Task[CallResult]] = {}

    async def ask(
        self,
        which: str,
        messages: Sequence[Message],
        temperature: float,
    ) -> CallResult:
        """Returns the answer of a model.

        Args:
            which: the model, `small_model` or `large_model`.
            messages: the conversation.
            temperature: the sampling temperature.

        Raises:
            ReplayError: on replay, if the cache has no reply.
        """
        model = self._owner.models[which]
        options = model.options
        request = ChatRequest(
            model=model.endpoint.model,
            messages=messages,
            temperature=temperature,
            max_tokens=options.max_tokens,
            response_format=options.response_format,
        )
        parts = (_address(model.endpoint.base_url), *map(str, request[:1] + request[2:]))
        key = key_of(parts, messages)
        earlier = self._asked.get(key)
        # Equal cases, such as a lesson that a group wrote twice, share one call.
        if earlier is not None and not _may_pass(earlier):
            answer = await earlier
            return answer._replace(cached=True, tokens=0, cost=0.0, calls=0)

        call = self._owner.call(self._clients[which], model, key, request)
        self._asked[key] = asyncio.ensure_future(call)
        return await self._asked[key]


def _may_pass(asked: asyncio.Task[CallResult]) -> bool:
    """Returns whether a call has failed in a way after which another one may succeed."""
    return asked.done() and not asked.cancelled() and not asked.exception() and asked.result().later


class _PricedModel(NamedTuple):
    endpoint: Endpoint
    options: JudgeModel
    api_key: str
    prices: tuple[float, float] | None
    """Money for a million tokens of prompts, and of replies; None if unknown."""


class Transport:
    """State that outlives a batch of calls: cache, account, dialects and throttles."""

    def __init__(self, config: RIMConfig, share: int = 1, ledger_path: str = "") -> None:
        """Finds endpoints and keys, and connects to nothing.

        Args:
            config: the options of RIM.
            share: the number of processes that share the limits.
            ledger_path: the file of this process's account, `…_process_N.json` beside those of the
                others; "" keeps it in memory.

        Raises:
            ValueError: if an endpoint or a key is unknown, or a budget of money is set and earlier
                calls had an unknown price.
        """
        self._replay = config.replay
        self._limits = _shared(config.limits, share)
        self._cache = ReplyCache(
            config.cache_dir, config.cache_max_bytes, is_read_only=config.replay
        )
        self._ledger = Ledger(ledger_path)
        options = {"small_model": config.small_model, "large_model": config.large_model}
        self.models = {
            name: _PricedModel(
                endpoint=endpoint,
                options=options[name],
                api_key="" if config.replay else api_key(endpoint),
                prices=prices(options[name]),
            )
            for name, endpoint in resolve_all(config).items()
        }
        self.is_priced = all(model.prices for model in self.models.values())
        """True if the price of every call is known."""
        if config.limits.max_cost and self._ledger.total.cost is None:
            raise ValueError(
                f"{ledger_path} has calls of judges whose price was not known, so that "
                f"reward.rim.limits.max_cost={config.limits.max_cost:g} cannot be kept; set it to "
                "0, or remove the file"
            )
        self._budget = _budget(config.limits, share, self._ledger)
        for endpoint in {m.endpoint for m in self.models.values() if m.api_key}:
            warn_if_readable(endpoint)
        self._dialects = {model.endpoint: KnownDialect() for model in self.models.values()}
        self._throttles = {
            _address(model.endpoint.base_url): Throttle(
                self._limits.max_in_flight,
                float(self._limits.requests_per_minute),
                float(self._limits.tokens_per_minute),
            )
            for model in self.models.values()
        }

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[CallBatch]:
        """Yields a batch of calls, inside one event loop, and stores their replies at its end."""
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
            # Saved even if the batch fails: what was spent counts against the budget.
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
            yield CallBatch(
                self,
                {n: clients[m.endpoint.base_url, m.api_key] for n, m in self.models.items()},
            )

    async def call(
        self, client: Client, model: _PricedModel, key: str, request: ChatRequest
    ) -> CallResult:
        """Returns the answer to a call, from the cache or from the server."""
        name = request.model
        temperature = request.temperature
        cached = self._cache.read(key)
        opinion = _read(cached, request) if cached else None
        if isinstance(opinion, Opinion):
            return CallResult(opinion=opinion, failure="", later=False, cached=True)
        if opinion and self._replay:
            return CallResult(opinion=None, failure=opinion.reason, later=False, cached=True)
        if self._replay:
            raise ReplayError(
                f"the cache has no reply of {name} at temperature {temperature:g} "
                f"to {request.messages[-1]['content'][:200]!r}; replay only what was scored with "
                "the same options, or set reward.rim.replay=False"
            )
        tokens = 0
        cost = 0.0
        failure = ""
        later = True
        max_room = _MOST_ROOM * request.max_tokens
        tries = Tries(self._limits.max_tries)
        while tries.left:
            try:
                reply = await self._post(client, model, request, tries)
            except ServerError as error:
                failure = f"{failure}; then {error}" if failure else str(error)
                # A refusal would come again; an outage passes.
                later = isinstance(error, UnavailableError)
                break
            tokens += reply.input_tokens + reply.output_tokens
            cost += _cost(reply, model.prices)
            # An unreadable reply is kept too: on replay it must lead to the same failure.
            self._cache.write(key, reply)
            read = _read(reply, request)
            if not isinstance(read, Unreadable):
                return CallResult(
                    opinion=read,
                    failure="",
                    later=False,
                    cached=False,
                    tokens=tokens,
                    cost=cost,
                    calls=tries.made,
                )
            failure = read.reason
            if reply.is_cut:
                request = request._replace(max_tokens=min(2 * request.max_tokens, max_room))
        return CallResult(
            opinion=None,
            failure=failure,
            later=later,
            cached=False,
            tokens=tokens,
            cost=cost,
            calls=tries.made,
        )

    def _admit(self) -> str:
        """Counts a call, or returns the exhausted budget."""
        limits = self._budget
        spent = self._ledger.spent
        if limits.calls is not None and spent.calls >= limits.calls:
            return f"this process's {limits.calls} of reward.rim.limits.max_calls are used up"
        if limits.cost is not None and spent.cost is not None and spent.cost >= limits.cost:
            return f"this process's {limits.cost:g} of reward.rim.limits.max_cost is used up"
        # Counted when it begins, so that calls in flight at the same time cannot pass the limit
        # together.
        self._ledger.begin()
        return ""

    async def _post(
        self, client: Client, model: _PricedModel, request: ChatRequest, tries: Tries
    ) -> Reply:
        """Makes one call, with the parameters that the model accepts.

        A request that is refused because of a parameter does not count as a try.
        """
        chars = sum(len(message["content"]) for message in request.messages)
        estimate = chars // _CHARS_PER_TOKEN
        tokens = self._throttles[_address(model.endpoint.base_url)].tokens
        # Before the place in flight: a call that waits for its tokens must keep none of the places.
        await tokens.wait(float(estimate))
        dialect = self._dialects[model.endpoint]
        sent = Dialect()

        def body() -> dict[str, Any]:
            nonlocal sent  # made for each try, to use what other calls have learned meanwhile
            sent = dialect.latest
            return dialects.payload(request, sent)

        while True:
            try:
                raw = await client.post("/chat/completions", body, tries=tries)
            except RefusedError as error:
                easier = dialects.after(error, request, sent)
                if easier is None:
                    dialect.latest = dialect.taken  # the refusal had another reason
                    raise
                dialect.latest = dialect.latest.easier_of(easier)
                tries.left += 1
                continue
            dialect.taken = dialect.taken.easier_of(sent)
            progress.mark()
            reply = _reply(raw, estimate)
            total = reply.input_tokens + reply.output_tokens
            # The estimate is replaced by the count, so that the limit holds for what was really
            # used.
            tokens.correct(float(total - estimate))
            self._ledger.add(total, _cost(reply, model.prices) if self.is_priced else None)
            return reply


class _Budget(NamedTuple):
    """Largest total costs of a process; None is no limit."""

    calls: int | None
    cost: float | None


def _budget(limits: JudgeLimits, share: int, ledger: Ledger) -> _Budget:
    """Returns a process's budget: its costs so far, plus an equal part of the run's remainder."""
    total = ledger.total
    spent = ledger.spent
    calls = spent.calls + max(limits.max_calls - total.calls, 0) // share
    cost = (spent.cost or 0.0) + max(limits.max_cost - (total.cost or 0.0), 0.0) / share
    return _Budget(calls if limits.max_calls else None, cost if limits.max_cost else None)


def _shared(limits: JudgeLimits, share: int) -> JudgeLimits:
    """Returns the rate limits of one of `share` processes.

    A limit that is set never becomes 0 by the division, because 0 means unlimited.
    """
    names = ("max_in_flight", "requests_per_minute", "tokens_per_minute")
    parts = {n: max(getattr(limits, n) // share, 1) for n in names if getattr(limits, n)}
    return dataclasses.replace(limits, **parts)


def _address(base_url: str) -> str:
    """Returns the address of an endpoint without a user and a password."""
    return str(yarl.URL(base_url.rstrip("/")).with_user(None))


def _read(reply: Reply, request: ChatRequest) -> Opinion | Unreadable:
    """Returns the opinion of a reply; a reply that was cut is unreadable."""
    if reply.is_cut:
        return Unreadable(f"cut off behind {reply.output_tokens} tokens: {reply.text[-120:]!r}")
    return parse(reply.text, request.model, request.temperature)


def _reply(raw: Any, estimate: int) -> Reply:
    """Returns the reply in a chat completion, with the text "" if it has none."""
    try:
        choice = raw["choices"][0]
        text = _text(choice["message"]["content"])
        is_cut = choice.get("finish_reason") == "length"
    except (KeyError, IndexError, TypeError, AttributeError):
        return Reply("", estimate, 0)
    usage = raw.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        text=text,
        input_tokens=_count(usage.get("prompt_tokens"), estimate),
        output_tokens=_count(usage.get("completion_tokens"), len(text) // _CHARS_PER_TOKEN),
        is_cut=is_cut,
    )


def _text(content: Any) -> str:
    """Returns a message's text; some endpoints split the content into parts, with thoughts."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(part["text"] for part in parts)
    return content if isinstance(content, str) else ""


def _count(given: Any, estimate: int) -> int:
    """Returns the number of tokens that an endpoint states, or the estimate if it states none."""
    is_number = isinstance(given, int | float) and 0 < given <= _MOST_TOKENS
    return int(given) if is_number else estimate


def _cost(reply: Reply, prices: tuple[float, float] | None) -> float:
    """Returns the cost of a call; 0 if its price is unknown (see `Transport.is_priced`)."""
    read, written = prices or (0.0, 0.0)
    return (reply.input_tokens * read + reply.output_tokens * written) / 1e6
