"""Episodes: conversations of the policy with a function of the user's own.

`rollout.protocol=package.module:ask` names an async function. It gets a policy to talk to and one
question, and may use tools and environments between the policy's turns:

    async def ask(policy, question):
        reply = await policy.say(question.text)
        while "look up" in reply:
            reply = await policy.say(await look_up(reply))

An episode becomes one completion: the first prompt, and after it all turns and what was said
between them, in order. The policy's tokens stay as they were sampled. All episodes of a step run at
the same time on an event loop in a thread of its own. As soon as each of them waits for the policy
or has ended, their requests go to the engine in one call.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import json
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from atlas_jax import progress, sockets, stopping
from atlas_jax.event_loop import EventLoopThread
from atlas_jax.rollout.engine import ChatModel, Request, version_spans
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.types import Completion, Message, Question

_LOOK_SECS = 0.5  # between two looks for a request to stop
_GRACE_SECS = 5.0  # that the event loop has to notice a timeout


class ConversationFullError(Exception):
    """Raised to the function of an episode if no further turn fits; it need not be caught."""


class EpisodeFailedError(Exception):
    """Raised to the function of an episode if the policy cannot answer."""


class EpisodeLimits(NamedTuple):
    """Sizes that an episode keeps to."""

    prompt: int
    """Most tokens of the first prompt."""
    new: int
    """Most tokens after it, what tools say included."""
    turns: int


class EpisodeStart(NamedTuple):
    """The beginning of one episode."""

    question: Question
    seed_of: Callable[[int], int]
    """Number of a turn, counted from 0 -> the seed of its request."""


class Episode(NamedTuple):
    """One episode that has ended."""

    completion: Completion
    messages: tuple[Message, ...]
    facts: dict[str, Any]


class EpisodePolicy:
    """The trained model, as the function of an episode talks to it.

    Attributes:
        facts: values for rewards, as `sample.facts`, and for the record. They must be JSON values.
        finish_reason: the end of the last turn, "stop" or "length"; "" before the first.
    """

    def __init__(
        self,
        start: EpisodeStart,
        model: ChatModel,
        limits: EpisodeLimits,
        generate: Callable[[Request], Awaitable[Completion]],
    ) -> None:
        """Begins an empty conversation.

        Args:
            start: the question and the seeds.
            model: the tokenizer and the chat template.
            limits: sizes of the episode.
            generate: the policy's completion of one request.
        """
        self.facts: dict[str, Any] = {}
        self.finish_reason = ""
        self._start = start
        self._model = model
        self._limits = limits
        self._generate = generate
        self._messages: list[Message] = []
        self._prompt: tuple[int, ...] = ()
        self._turns: list[tuple[tuple[int, ...], Completion]] = []
        """The tokens that precede each turn and follow the one before it, and the turn."""
        self._rewards: dict[int, float] = {}
        """Rewards by turn."""
        self._is_speaking = False
        self._is_full = False
        self._failure = ""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far."""
        return tuple(self._messages)

    def observe(self, said: str | Sequence[Message], role: str = "user") -> None:
        """Adds what others say; the policy reads it before its next turn.

        Args:
            said: a text, or messages with roles of their own.
            role: the role of a text. Chat templates of models with tools have `tool`.
        """
        texts = [Message(role=role, content=said)] if isinstance(said, str) else said
        self._messages += [Message(role=m["role"], content=str(m["content"])) for m in texts]

    async def say(
        self, said: str | Sequence[Message] = (), role: str = "user", max_tokens: int = 0
    ) -> str:
        """Returns the policy's next turn.

        Args:
            said: a text or messages to add before, as with `observe`.
            role: the role of a text.
            max_tokens: most tokens of the turn; 0 sets no limit of its own.

        Raises:
            ConversationFullError: if no further turn fits. The episode ends with the turns that it
                has, and counts as truncated.
            EpisodeFailedError: if the prompt is too long or the engine failed. The episode has then
                failed.
            RuntimeError: if another turn of this policy is not finished.
            ValueError: for an empty conversation, and messages that the chat template leaves out.
        """
        if self._is_speaking:
            raise RuntimeError("the policy has another turn in progress; await it first")
        self.observe(said, role)
        if not self._messages:
            raise ValueError("the conversation is empty; say something to the policy")
        request, between = self._request(max_tokens)
        self._is_speaking = True
        try:
            turn = await self._generate(request)
        finally:
            self._is_speaking = False
        if turn.is_failed:
            self._fail(turn.finish_reason)
        self.finish_reason = turn.finish_reason
        self._turns.append((between, turn))
        self._messages.append(Message(role="assistant", content=turn.text))
        return turn.text

    def reward(self, value: float | int) -> None:
        """Rewards the last turn, compared with all rewarded turns of the question's episodes.

        This comes on top of the advantage of the whole episode. Several rewards of one turn are
        added up.

        Raises:
            ValueError: before the first turn, and for a number that is not finite.
        """
        if not self._turns:
            raise ValueError("no turn to reward; await policy.say first")
        if not math.isfinite(value):
            raise ValueError(f"the reward of a turn is {value}; use a finite number")
        last = len(self._turns) - 1
        self._rewards[last] = self._rewards.get(last, 0.0) + float(value)

    def end(self, text: Any) -> Episode:
        """Returns the episode as it is.

        Args:
            text: the answer that rewards see; None takes the last turn.

        Raises:
            TypeError: if `text` is no text, or the facts are no JSON values.
            ValueError: as well, for facts that contain themselves.
        """
        if text is not None and not isinstance(text, str):
            raise TypeError(f"it returned a {type(text).__name__}; return a text or None")
        json.dumps(self.facts)
        if not self._turns and not self._failure:
            self._failure = "error: it ended before the policy said anything"
        if self._failure:
            return self.failed(self._failure)
        last = self._turns[-1][1]
        truncated = self._is_full or last.finish_reason == "length"
        ids: list[int] = []
        sampled: list[bool] = []
        logprobs: list[float] = []
        untruncated: list[float] = []
        versions: list[int] = []
        rewards: list[tuple[int, float]] = []
        for number, (between, turn) in enumerate(self._turns):
            nothing = (0.0,) * len(between)
            ids += [*between, *turn.token_ids]
            sampled += [False] * len(between) + [True] * turn.num_tokens
            logprobs += [*nothing, *turn.logprobs]
            untruncated += [*nothing, *turn.untruncated_logprobs]
            # What was read before the turn has nobody's version, and is not trained.
            versions += [*turn.token_versions[:1] * len(between), *turn.token_versions]
            if number in self._rewards:
                rewards.append((len(ids), self._rewards[number]))
        completion = Completion(
            prompt_ids=self._prompt,
            token_ids=tuple(ids),
            logprobs=tuple(logprobs) if last.logprobs else (),
            untruncated_logprobs=tuple(untruncated),
            finish_reason="length" if truncated else "stop",
            text=last.text if text is None else text,
            weights_version=min(turn.weights_version for _, turn in self._turns),
            sampled=tuple(sampled),
            version_spans=version_spans(versions),
            turn_rewards=tuple(rewards),
        )
        return Episode(completion, self.messages, self.facts)

    def failed(self, reason: str) -> Episode:
        """Returns the episode that stands for one that failed, with what was said."""
        return Episode(Completion.failed(reason, self._prompt), self.messages, {})

    def _request(self, max_tokens: int) -> tuple[Request, tuple[int, ...]]:
        """Returns the request of the next turn, and the tokens since the last turn.

        Raises:
            ConversationFullError: if it does not fit.
            EpisodeFailedError: if it cannot be asked.
        """
        limits = self._limits
        number = len(self._turns)
        last = self._turns[-1][1] if self._turns else None
        stopped = last is not None and last.finish_reason == "stop"
        between = self._model.encode_turn(
            self._messages, last.token_ids[-1] if last and stopped else None
        )
        if max(between, default=0) >= self._model.vocab_size:
            self._fail(f"skipped: a message with token {max(between)}, which the model has not")
        if last is None:
            if len(between) > limits.prompt:
                self._fail(f"skipped: prompt of {len(between)} tokens exceeds {limits.prompt}")
            self._prompt = between
            between = ()
        before = [token for ids, turn in self._turns for token in (*ids, *turn.token_ids)]
        room = limits.new - len(before) - len(between)
        if room < 1 or number >= limits.turns:
            self._is_full = True
            raise ConversationFullError(
                f"{number} turns of {len(before)} tokens, and {len(between)} tokens to read, leave "
                f"no room for another one in {limits.turns} turns and {limits.new} tokens"
            )
        request = Request(
            prompt_ids=(*self._prompt, *before, *between),
            max_tokens=min(room, max_tokens or room),
            seed=self._start.seed_of(number),
        )
        return request, between

    def _fail(self, reason: str) -> None:
        self._failure = reason
        raise EpisodeFailedError(reason)


Ask = Callable[[EpisodePolicy, Question], Awaitable[str | None]]
"""The function of the user: talks to the policy, and returns the answer that rewards see, or None
for the policy's last turn."""


class EpisodeOptions(NamedTuple):
    """The function that leads the episodes, and its limits."""

    ask: Ask
    timeout_secs: float
    """Most seconds that it may take between two turns."""
    max_turns: int


def run(
    options: EpisodeOptions,
    starts: Sequence[EpisodeStart],
    model: ChatModel,
    limits: EpisodeLimits,
    sampling: Sampling,
) -> list[Episode]:
    """Returns the episode of each start, in order.

    An exception or a timeout of the user's function is the failure of its episode.

    Args:
        options: the function and its limits.
        starts: beginnings of this process; it may have none while others have some.
        model: the policy.
        limits: sizes of each episode.
        sampling: how tokens are drawn.

    Raises:
        DependencyError: if no engine is left.
        StopRequestedError: if the run is to stop.
    """
    talks = _Talks(options, starts, model, limits)
    with contextlib.closing(EventLoopThread("episodes")) as loop:
        next_turns: Coroutine[Any, Any, list[_Turn]] = talks.begin()
        is_blocked = False
        while True:
            waiting = None if is_blocked else _result(next_turns, loop, options.timeout_secs)
            is_blocked = waiting is None
            if is_blocked:
                talks.give_up("it blocks its event loop; await what takes time")
            turns = waiting or []
            if not model.goes_on(bool(turns)):
                break
            written = model.generate([turn.request for turn in turns], sampling)
            if not is_blocked:  # else nobody would await the next turns
                next_turns = talks.resume(turns, [group[0] for group in written])
    return talks.ended()


class _Turn(NamedTuple):
    """A turn that an episode waits for."""

    episode: int
    request: Request
    answer: asyncio.Future[Completion]


class _Talks:
    """The episodes of a step, and the turns that they wait for; used on the event loop alone."""

    def __init__(
        self,
        options: EpisodeOptions,
        starts: Sequence[EpisodeStart],
        model: ChatModel,
        limits: EpisodeLimits,
    ) -> None:
        self._options = options
        self._starts = starts
        self._policies = [
            EpisodePolicy(start, model, limits, functools.partial(self._turn, number))
            for number, start in enumerate(starts)
        ]
        self._ended: list[Episode | None] = [None] * len(starts)
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: list[_Turn] = []
        self._changed: asyncio.Event | None = None

    async def begin(self) -> list[_Turn]:
        """Starts all episodes, and returns the turns that they wait for."""
        self._changed = asyncio.Event()
        numbers = range(len(self._starts))
        self._tasks = [asyncio.create_task(self._talk(number)) for number in numbers]
        return await self._settled()

    async def resume(self, turns: Sequence[_Turn], written: Sequence[Completion]) -> list[_Turn]:
        """Gives episodes the turns that they waited for, and returns the next ones."""
        for turn, completion in zip(turns, written, strict=True):
            if not turn.answer.done():
                turn.answer.set_result(completion)
        return await self._settled()

    def give_up(self, why: str) -> None:
        """Counts every episode that has not ended as failed."""
        for number, policy in enumerate(self._policies):
            if self._ended[number] is None:
                self._ended[number] = policy.failed(f"error: {why}")

    def ended(self) -> list[Episode]:
        """Returns the episodes, all of which have ended."""
        return [episode for episode in self._ended if episode is not None]

    async def _talk(self, number: int) -> None:
        policy = self._policies[number]
        work = self._led(policy, self._starts[number].question)
        try:
            episode, error = await sockets.attempt_async(work)
        except asyncio.CancelledError:
            error = "it was cancelled"
        if error:
            episode = policy.failed(f"error: {error}")
        self._ended[number] = self._ended[number] or episode
        self._notify()

    async def _led(self, policy: EpisodePolicy, question: Question) -> Episode:
        """Returns the episode that the user's function leads, also where it ran out of room."""
        try:
            text = await self._options.ask(policy, question)
        except (ConversationFullError, EpisodeFailedError):
            text = None
        return policy.end(text)

    async def _turn(self, number: int, request: Request) -> Completion:
        """Returns a turn, once the engine has written it."""
        if self._ended[number] is not None:
            raise EpisodeFailedError("the episode has ended")
        turn = _Turn(number, request, asyncio.get_running_loop().create_future())
        self._waiting.append(turn)
        self._notify()
        return await turn.answer

    def _notify(self) -> None:
        if self._changed:
            self._changed.set()

    async def _settled(self) -> list[_Turn]:
        """Returns the turns that episodes wait for, when all of them wait or have ended."""
        assert self._changed is not None
        end = time.monotonic() + self._options.timeout_secs
        while self._busy():
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), end - time.monotonic())
            except TimeoutError:
                self._end_overdue()
                break
        waiting = [turn for turn in self._waiting if not turn.answer.done()]
        self._waiting = []
        return waiting

    def _busy(self) -> list[int]:
        """Returns the episodes that neither wait for a turn nor have ended."""
        # The function of an episode may have given up waiting, by a timeout of its own.
        waiting = {turn.episode for turn in self._waiting if not turn.answer.done()}
        return [
            number
            for number, episode in enumerate(self._ended)
            if episode is None and number not in waiting
        ]

    def _end_overdue(self) -> None:
        for number in self._busy():
            why = f"it took more than {self._options.timeout_secs:g} s between two turns"
            self._ended[number] = self._policies[number].failed(f"error: {why}")
            self._tasks[number].cancel()


def _result(
    next_turns: Coroutine[Any, Any, list[_Turn]],
    loop: EventLoopThread,
    timeout_secs: float,
) -> list[_Turn] | None:
    """Returns the turns to write; [] if the run is to stop, None if the event loop is blocked."""
    future = loop.submit(next_turns)
    end = time.monotonic() + timeout_secs + _GRACE_SECS
    with progress.waiting(timeout_secs + _GRACE_SECS):
        while time.monotonic() < end:
            done, _ = concurrent.futures.wait([future], timeout=_LOOK_SECS)
            if done:
                return future.result()
            if stopping.requested():
                return []
    return None
