"""Samples of each step: questions asked and scored, those of later steps beside it.

Where the policy takes requests one by one, as servers do, every question moves alone. Judges hear
each sample as soon as it is whole, other rewards see whole groups. Otherwise the questions of a
step go through their phases together, and are scored in one call.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

from atlas_jax import stopping
from atlas_jax.event_loop import EventLoopThread
from atlas_jax.recipes.scoring import score
from atlas_jax.rollout import teaching
from atlas_jax.rollout.engine import ChatModel
from atlas_jax.rollout.student_cache import StudentCache
from atlas_jax.rollout.timing import ALL, Meter, Phase, Trace
from atlas_jax.stopping import StopRequestedError
from atlas_jax.types import Question, RewardFn, Sample

F = TypeVar("F")

_MOST_SCORED = 32  # samples or groups that are scored at the same time


class Collected(NamedTuple):
    """The scored samples of a step in this process."""

    samples: list[Sample]
    trace: Trace
    """The times of the requests and rewards."""


class Window(Generic[F]):
    """Steps in flight, first in, first out: the one that is needed next, and up to `depth` later.

    A step is begun with the policy of at most `depth` steps before its own.
    """

    def __init__(self, begin: Callable[[ChatModel, int], F], depth: int, size: int) -> None:
        """Begins nothing yet.

        Args:
            begin: a policy and the number of the first question -> the step that has begun.
            depth: number of later steps that are in flight.
            size: number of questions of a step, over all processes.
        """
        self._begin = begin
        self._depth = depth
        self._size = size
        self._end = 0
        self._begun: collections.deque[F] = collections.deque()

    def next(self, policy: ChatModel, position: int) -> F:
        """Returns the step that begins at `position`, and has all that may begin with `policy`."""
        # The first call gives the position of the checkpoint, if there is one.
        if not self._begun:
            self._end = position
        # Before the step is waited for: its slowest questions leave room for others.
        while len(self._begun) <= self._depth:
            self._begun.append(self._begin(policy, self._end))
            self._end += self._size
        return self._begun.popleft()


class Asker(NamedTuple):
    """The parts of asking and scoring that stay the same from step to step."""

    question: Callable[[int], Question]
    """Number of a question in the run -> the question."""
    student: ChatModel | None
    protocol: teaching.TeachingProtocol
    draws: teaching.Draws
    cache: StudentCache
    reward: RewardFn
    scores_beside: bool = False
    """True if the reward may be called for several groups at the same time."""
    scores_alone: bool = False
    """True if it may be called so for single samples."""


class Rollouts:
    """Asks and scores the questions of steps, on an event loop where questions move alone."""

    def __init__(self, asker: Asker) -> None:
        """Starts nothing yet."""
        self._asker = asker
        self.meter = Meter()
        self.is_closed = False
        """True once no further samples are wanted; questions that have begun may leave."""
        self._loop: EventLoopThread | None = None
        self._workers: list[ThreadPoolExecutor] = []
        # Rewards of a user's own see one group after another.
        self._scorer = self._pool(_MOST_SCORED if asker.scores_beside else 1, "rewards")
        # The episodes of a user's own, and models that are asked in batches, one step after
        # another.
        self._batches = self._pool(1, "rollouts")
        self._begun: set[Future[Any]] = set()

    def _pool(self, count: int, name: str) -> ThreadPoolExecutor:
        self._workers.append(ThreadPoolExecutor(count, name))
        return self._workers[-1]

    def ask(self, policy: ChatModel, places: Sequence[int]) -> Collected:
        """Returns the samples of the questions; every process of a run calls it together.

        Raises:
            DependencyError: if no engine is left.
            StopRequestedError: if the run is to stop.
        """
        if self._moves_alone(policy):
            return stopping.result(self.begin(policy, places))
        return self._in_turn(policy, places)

    def begin(self, policy: ChatModel, places: Sequence[int]) -> Future[Collected]:
        """Begins to ask the questions, beside others; their errors are those of the result."""
        if self._moves_alone(policy):
            # The loop starts here: a run whose models generate in batches needs none.
            self._loop = self._loop or EventLoopThread("rollouts")
            future = self._loop.submit(self._beside(policy, places))
        else:
            future = self._batches.submit(self._in_turn, policy, places)
        self._begun.add(future)
        future.add_done_callback(self._begun.discard)
        return future

    def close(self) -> None:
        """Gives up questions in flight, and begins no other work."""
        self.is_closed = True
        for workers in self._workers:
            workers.shutdown(wait=False, cancel_futures=True)
        if self._loop:
            self._loop.close(0.0)

    def join(self, secs: float) -> None:
        """Waits at most `secs` seconds for what was in progress when this was closed."""
        if self._loop:
            self._loop.close(secs)
        concurrent.futures.wait([f for f in set(self._begun) if f.running()], secs)

    def _moves_alone(self, policy: ChatModel) -> bool:
        return policy.complete is not None and self._asker.protocol.episode is None

    def _in_turn(self, policy: ChatModel, places: Sequence[int]) -> Collected:
        """Returns the samples of questions that go through their phases together."""
        asker = self._asker
        trace = Trace(self.meter)
        questions = [asker.question(place) for place in places]
        samples = teaching.run(
            questions, places, policy, asker.student, asker.protocol, asker.draws, asker.cache,
            trace,
        )  # fmt: skip
        if self.is_closed:  # judges would be asked, and paid, for nobody
            raise StopRequestedError("the run has ended while its next batch was made")
        with trace.span(Phase.REWARD, places[0] if places else ALL):
            samples = score(asker.reward, samples)
        return Collected(samples, trace)

    async def _beside(self, policy: ChatModel, places: Sequence[int]) -> Collected:
        """Returns the samples of questions each of which moves alone."""
        asker = self._asker
        trace = Trace(self.meter)
        asking = teaching.open_lines(policy, asker.student, asker.protocol, asker.draws, trace)
        asking = asking._replace(cache=asker.cache)
        group = self._by_sample if asker.scores_alone else self._by_group
        groups = await asyncio.gather(*(group(place, asking, trace) for place in places))
        return Collected([sample for group in groups for sample in group], trace)

    async def _by_group(self, place: int, asking: teaching.Asking, trace: Trace) -> list[Sample]:
        samples = await teaching.ask(self._asker.question(place), place, asking)
        return await self._scored(samples, ALL, trace)

    async def _by_sample(self, place: int, asking: teaching.Asking, trace: Trace) -> list[Sample]:
        first: dict[tuple[str, str], asyncio.Lock] = collections.defaultdict(asyncio.Lock)

        async def finish(sample: Sample) -> Sample:
            # Of equal texts the later ones find the replies to the first one in the judges' cache.
            async with first[sample.completion.text, sample.answer.text]:
                (scored,) = await self._scored([sample], sample.member, trace)
            return scored

        asking = asking._replace(finish=finish)
        return await teaching.ask(self._asker.question(place), place, asking)

    async def _scored(self, samples: Sequence[Sample], member: int, trace: Trace) -> list[Sample]:
        with trace.span(Phase.REWARD, samples[0].place, member):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._scorer, score, self._asker.reward, samples)
