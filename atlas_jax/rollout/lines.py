"""Lines to models: each request by itself where a model takes them so, else what waits together.

A server takes every sample by itself, so that a question goes on as soon as one is written. A model
of this process generates fastest in large batches: when nothing is left to do but wait for it, all
requests that wait go to it in one call.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

from atlas_jax.event_loop import EventLoopThread
from atlas_jax.rollout.engine import ChatModel, Request
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.timing import ALL, Phase, Trace
from atlas_jax.types import Completion

T = TypeVar("T")


class PhaseRequest(NamedTuple):
    """A request of a question, with its place in the step."""

    phase: Phase
    place: int
    """Number of the question in the run."""
    member: int
    """Number in the group of its question of the first sample, or `ALL` of the group's own."""
    request: Request


class _Waiting(NamedTuple):
    """A request that waits for a batch, and the futures of its samples."""

    asked: PhaseRequest
    written: list[asyncio.Future[Completion]]


class Line:
    """Requests to one model, which only the thread of its event loop makes."""

    def __init__(self, model: ChatModel, sampling: Sampling, trace: Trace) -> None:
        """Sends nothing yet.

        Args:
            model: the model.
            sampling: how tokens are drawn.
            trace: gets the times of the requests.
        """
        self.model = model
        self.sampling = sampling
        self._trace = trace
        self._waiting: list[_Waiting] = []

    def ask(self, asked: PhaseRequest, room: int) -> list[asyncio.Future[Completion]]:
        """Returns the samples of a request, each of which is done by itself.

        A request that the model or `room` does not hold is not sent; its samples are skipped.

        Args:
            asked: the request.
            room: most tokens of prompt and completion.
        """
        loop = asyncio.get_running_loop()
        refusal = problem(asked.request, room, self.model.vocab_size)
        members = range(asked.request.num_samples)
        if not refusal and self.model.complete:
            return [loop.create_task(self._one(asked, g)) for g in members]
        written = [loop.create_future() for _ in members]
        if not refusal:
            self._waiting.append(_Waiting(asked, written))
            return written
        for future in written:
            future.set_result(Completion.failed(f"skipped: {refusal}"))
        return written

    async def _one(self, asked: PhaseRequest, sample: int) -> Completion:
        assert self.model.complete
        member = ALL if asked.member == ALL else asked.member + sample
        with self._trace.span(asked.phase, asked.place, member) as written:
            completion = await self.model.complete(asked.request, sample, self.sampling)
            written.append(completion)
        return completion

    def generate(self, settle: Callable[[Callable[[], None]], None]) -> bool:
        """Generates what waits; every process that generates together with this one calls it.

        Args:
            settle: calls a function on the event loop, and waits until nothing is left to run.

        Returns:
            Whether anything waited, in any of the processes.

        Raises:
            StopRequestedError: if the run is to stop.
        """
        # The order does not depend on which question was ready first.
        waiting = sorted(self._waiting, key=lambda w: (_ORDER[w.asked.phase], *w.asked[1:3]))
        self._waiting = []
        if not self.model.goes_on(bool(waiting)):
            return False
        with contextlib.ExitStack() as stack:
            spans = []
            for asked, _ in waiting:
                size = asked.request.num_samples
                member = asked.member if size == 1 else ALL
                span = self._trace.span(asked.phase, asked.place, member, size)
                spans.append(stack.enter_context(span))
            requests = [w.asked.request for w in waiting]
            written = self.model.generate(requests, self.sampling)
            for texts, group in zip(spans, written, strict=True):
                texts += group

        def resume() -> None:
            for (_, futures), group in zip(waiting, written, strict=True):
                for future, completion in zip(futures, group, strict=True):
                    future.set_result(completion)

        settle(resume)
        return True


_ORDER = {phase: number for number, phase in enumerate(Phase)}


def run(work: Coroutine[Any, Any, T], lines: Sequence[Line], loop: EventLoopThread) -> T:
    """Returns the result of a coroutine whose requests wait for batches of this thread.

    Args:
        work: what asks, on the loop.
        lines: the models that it asks, in the order in which they generate.
        loop: the event loop, on which nothing else runs.

    Raises:
        StopRequestedError: if the run is to stop.
    """
    tasks: list[asyncio.Task[T]] = []
    loop.settle(lambda: tasks.append(asyncio.get_running_loop().create_task(work)))
    goes_on = True
    while goes_on:
        goes_on = False
        for line in lines:
            goes_on |= line.generate(loop.settle)
    return tasks[0].result()


def problem(request: Request, room: int, vocab_size: int) -> str:
    """Returns the reason for which a request is not sent; empty if it is."""
    if len(request.prompt_ids) + request.max_tokens > room:
        sizes = f"prompt of {len(request.prompt_ids)} tokens and {request.max_tokens} new ones"
        return f"{sizes} exceed {room}"
    if max(request.prompt_ids, default=0) >= vocab_size:
        return f"prompt with token {max(request.prompt_ids)}, of which the model has {vocab_size}"
    return ""
