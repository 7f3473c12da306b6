"""The teaching protocol: from questions to samples.

For each question the student answers alone and says how it would approach it, both once and shared
by the group; the teacher reads the approach and writes G lessons; the student answers again with
each of them. A prompt that does not fit its model makes a `skipped` completion, which no reward
scores and which trains nothing.

Each question is a coroutine and waits for no other one: a lesson is answered as soon as it is
written, and the answer alone is written beside the lessons.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from atlas_jax import stopping
from atlas_jax.data.examples import fill
from atlas_jax.event_loop import EventLoopThread
from atlas_jax.rollout import lines
from atlas_jax.rollout.engine import ChatModel, Request
from atlas_jax.rollout.lines import Line, PhaseRequest
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.student_cache import StudentCache
from atlas_jax.rollout.timing import ALL, Phase, Trace
from atlas_jax.types import Completion, Question, Sample

if TYPE_CHECKING:
    from atlas_jax.rollout.episodes import EpisodeOptions

_LESSON = re.compile(r"<teaching>(.*?)</teaching>", re.DOTALL)
_TAG = re.compile("</?teaching>")
_BASELINE, _PROBE, _LESSONS, _GUIDED, _EPISODES = range(5)  # streams of random numbers


class Templates(NamedTuple):
    """User messages; `{field}` is replaced."""

    baseline: str
    diagnostic: str
    teacher: str
    with_teaching: str
    direct: str


class Limits(NamedTuple):
    """New tokens of each kind of text, and how many prompt tokens the policy may read."""

    policy: int
    probe: int
    answer: int
    prompt: int


class TeachingProtocol(NamedTuple):
    """The texts and limits with which a group of samples is made."""

    templates: Templates
    limits: Limits
    num_generations: int
    missing_teaching: str  # none, whole or unscored
    num_guided: int = 1
    """Answers of the student with each lesson."""
    num_baseline: int = 1
    """Answers of the student alone to each question."""
    episode: EpisodeOptions | None = None
    """The user's own way to ask; None for the built-in ones."""


class Draws(NamedTuple):
    """The sampling, and the seed from which random numbers follow with a question's place."""

    sampling: Sampling
    seed: int
    student_sampling: Sampling | None = None
    """The sampling of the student; None takes that of the policy."""

    def seed_of(self, place: int, stream: int, *more: int) -> int:
        """Returns the seed of one request; `more` are numbers of requests in the stream."""
        sequence = np.random.SeedSequence((self.seed, place, stream, *more))
        return int(sequence.generate_state(1)[0])


class Asking(NamedTuple):
    """The models that a question's coroutine asks, and how."""

    policy: Line
    student: Line | None
    """None under `protocol=direct`."""
    protocol: TeachingProtocol
    draws: Draws
    cache: StudentCache | None = None
    """Keeps what the student says alone; None asks it anew for each question."""
    finish: Callable[[Sample], Awaitable[Sample]] | None = None
    """Called with each sample as soon as its texts exist; the result is the sample."""


def run(
    questions: Sequence[Question],
    places: Sequence[int],
    policy: ChatModel,
    student: ChatModel | None,
    protocol: TeachingProtocol,
    draws: Draws,
    cache: StudentCache | None = None,
    trace: Trace | None = None,
) -> list[Sample]:
    """Returns the samples of the questions, the group of each together and in order.

    Every process of a run calls it together, where processes generate together.

    Args:
        questions: those of this process, which may have none while others have some.
        places: number of each question in the run, which its random numbers follow from.
        policy: the model that is trained.
        student: None under `protocol=direct`, and where no student takes part in an episode.
        protocol: templates and limits.
        draws: sampling and seed.
        cache: what the student has said alone before; None asks it anew.
        trace: gets the times of the requests; None keeps none.
    """
    if protocol.episode is not None:
        return _converse(policy, questions, places, protocol, protocol.episode, draws)
    asking = open_lines(policy, student, protocol, draws, trace or Trace())._replace(cache=cache)
    work = _groups(questions, places, asking)
    with contextlib.closing(EventLoopThread("questions")) as loop:
        if policy.complete:
            groups = stopping.result(loop.submit(work))
        else:
            # The student first: what it says alone comes before the lessons.
            groups = lines.run(work, [x for x in (asking.student, asking.policy) if x], loop)
    return [sample for group in groups for sample in group]


def open_lines(
    policy: ChatModel,
    student: ChatModel | None,
    protocol: TeachingProtocol,
    draws: Draws,
    trace: Trace,
) -> Asking:
    """Returns the lines to the models, by which the questions of one step ask; see `run`."""
    return Asking(
        policy=Line(policy, draws.sampling, trace),
        student=Line(student, draws.student_sampling or draws.sampling, trace) if student else None,
        protocol=protocol,
        draws=draws,
    )


async def _groups(
    questions: Sequence[Question], places: Sequence[int], asking: Asking
) -> list[list[Sample]]:
    asked = zip(questions, places, strict=True)
    return await asyncio.gather(*(ask(question, place, asking) for question, place in asked))


async def ask(question: Question, place: int, asking: Asking) -> list[Sample]:
    """Returns the group of one question."""
    templates = asking.protocol.templates
    if asking.student is None:
        prompt = _fill(templates.direct, question, {})
        written = _write(prompt, place, asking)
        work = [_direct(question, place, g, w, asking) for g, w in enumerate(written)]
        return await asyncio.gather(*work)
    student = asking.student
    # Asked for before the lessons, which they are written beside.
    baselines = asyncio.gather(
        *(
            _alone(Phase.BASELINE, question, place, student, asking, number)
            for number in range(asking.protocol.num_baseline)
        )
    )
    # They are among what is awaited, so that their errors count even without a lesson.
    _, group = await asyncio.gather(baselines, _teach(question, place, baselines, student, asking))
    return group


async def _direct(
    question: Question, place: int, member: int, written: Awaitable[Completion], asking: Asking
) -> Sample:
    completion = await written
    return await _finished(Sample(question, completion, place=place, member=member), asking)


async def _teach(
    question: Question,
    place: int,
    baselines: Awaitable[list[Completion]],
    student: Line,
    asking: Asking,
) -> list[Sample]:
    """Returns the group of a question: a lesson each, and the student's answers to it."""
    probe = await _alone(Phase.PROBE, question, place, student, asking)
    prompt = _fill(asking.protocol.templates.teacher, question, {"approach": probe.text})

    async def one(member: int, written: Awaitable[Completion]) -> Sample:
        completion = await written
        sample = Sample(
            question=question,
            completion=completion,
            teaching=extract_lesson(completion.text, asking.protocol),
            probe=probe,
            place=place,
            member=member,
        )
        guided = await _guided(sample, student, asking) if sample.teaching else []
        alone = await baselines
        # Last, since without a lesson the answers alone may stand in for those with it.
        guided = guided or _untaught(sample, alone, asking.protocol)
        return await _finished(
            sample._replace(
                baseline=alone[0],
                further_baselines=tuple(alone[1:]),
                guided=guided[0],
                further_guided=tuple(guided[1:]),
            ),
            asking,
        )

    written = _write(prompt, place, asking)
    return await asyncio.gather(*(one(g, future) for g, future in enumerate(written)))


async def _finished(sample: Sample, asking: Asking) -> Sample:
    return await asking.finish(sample) if asking.finish else sample


async def _alone(
    phase: Phase, question: Question, place: int, student: Line, asking: Asking, number: int = 0
) -> Completion:
    """Returns the student's answer without a lesson, or its approach, kept or new.

    `number` is that of the answer among several to the same question.
    """
    templates = asking.protocol.templates
    limits = asking.protocol.limits
    template, limit, stream = {
        Phase.BASELINE: (templates.baseline, limits.answer, _BASELINE),
        Phase.PROBE: (templates.diagnostic, limits.probe, _PROBE),
    }[phase]
    prompt = student.model.encode(_fill(template, question, {}))
    request = Request(prompt, limit, asking.draws.seed_of(place, stream, *_further(number)))
    kept = asking.cache.get(request, student.sampling, number) if asking.cache else None
    if kept is not None:
        return kept
    asked = PhaseRequest(phase=phase, place=place, member=ALL, request=request)
    (written,) = student.ask(asked, student.model.context)
    completion = await written
    if asking.cache:
        asking.cache.put(request, student.sampling, completion, number)
    return completion


def _write(prompt: str, place: int, asking: Asking) -> list[asyncio.Future[Completion]]:
    """Returns the completions of the policy, `num_generations` of one prompt."""
    limits = asking.protocol.limits
    request = Request(
        prompt_ids=asking.policy.model.encode(prompt),
        max_tokens=limits.policy,
        seed=asking.draws.seed_of(place, _LESSONS),
        num_samples=asking.protocol.num_generations,
    )
    asked = PhaseRequest(phase=Phase.POLICY, place=place, member=0, request=request)
    return asking.policy.ask(asked, limits.prompt + limits.policy)


def _further(number: int) -> tuple[int, ...]:
    """Returns what the seed of an answer is made of besides: nothing for the first one."""
    return (number,) if number else ()


async def _guided(sample: Sample, student: Line, asking: Asking) -> list[Completion]:
    """Returns the student's answers to a lesson."""
    protocol = asking.protocol
    template = protocol.templates.with_teaching
    prompt = _fill(template, sample.question, {"teaching": sample.teaching})
    # Each lesson is answered with random numbers of its own, or its luck would be its group's.
    lesson = sample.place * protocol.num_generations + sample.member
    prompt_ids = student.model.encode(prompt)
    written: list[asyncio.Future[Completion]] = []
    # A request each: a batch of a model of this process has as many samples of every request.
    for number in range(protocol.num_guided):
        seed = asking.draws.seed_of(lesson, _GUIDED, *_further(number))
        request = Request(prompt_ids, protocol.limits.answer, seed)
        asked = PhaseRequest(
            phase=Phase.GUIDED, place=sample.place, member=sample.member, request=request
        )
        written += student.ask(asked, student.model.context)
    return await asyncio.gather(*written)


def extract_lesson(text: str, protocol: TeachingProtocol) -> str:
    """Returns what the student gets to read of the teacher's text; "" if there is no lesson."""
    lesson = _LESSON.search(text)
    if lesson:
        return _worded(lesson[1])
    return _worded(text) if protocol.missing_teaching == "whole" else ""


def has_lesson(text: str) -> bool:
    """Returns True if the teacher's text has a lesson between its tags."""
    lesson = _LESSON.search(text)
    return bool(lesson and _worded(lesson[1]))


def is_malformed(text: str) -> bool:
    """Returns True if the teacher's text has a tag of a lesson, and no lesson."""
    return bool(_TAG.search(text)) and not has_lesson(text)


def _worded(lesson: str) -> str:
    """Returns a lesson without the space around it; "" if it has no letter and no digit."""
    return lesson.strip() if any(map(str.isalnum, lesson)) else ""


def _converse(
    policy: ChatModel,
    questions: Sequence[Question],
    places: Sequence[int],
    protocol: TeachingProtocol,
    options: EpisodeOptions,
    draws: Draws,
) -> list[Sample]:
    """Returns a sample for each episode, `num_generations` of each question."""
    from atlas_jax.rollout import episodes  # only a protocol of the user's own has them

    limits = episodes.EpisodeLimits(
        prompt=protocol.limits.prompt, new=protocol.limits.policy, turns=options.max_turns
    )
    members = [
        (question, place, member)
        for question, place in zip(questions, places, strict=True)
        for member in range(protocol.num_generations)
    ]
    starts = [
        episodes.EpisodeStart(question, functools.partial(draws.seed_of, place, _EPISODES, member))
        for question, place, member in members
    ]
    finished = episodes.run(options, starts, policy, limits, draws.sampling)
    return [
        Sample(
            question=question,
            completion=episode.completion,
            place=place,
            member=member,
            messages=episode.messages,
            facts=episode.facts,
        )
        for (question, place, member), episode in zip(members, finished, strict=True)
    ]


def _untaught(
    sample: Sample, alone: list[Completion], protocol: TeachingProtocol
) -> list[Completion]:
    """Returns the answers where there is no lesson: those alone, or one that no reward scores."""
    # A lesson that failed must not count as one without effect, as the baseline would.
    if sample.completion.is_failed:
        return [Completion.failed(sample.completion.finish_reason)]
    if protocol.missing_teaching == "unscored":
        return [Completion.failed("skipped: no lesson")]
    return alone


def _fill(template: str, question: Question, more: Mapping[str, str]) -> str:
    return fill(template, {**question.fields, "question": question.text, **more})
