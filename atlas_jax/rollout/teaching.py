"""The teaching protocol: from questions to samples.

For each question the student answers alone and says how it would approach it, both once and shared
by the group; the teacher reads the approach and writes G lessons; the student answers again with
each of them. A prompt that does not fit its model makes a `skipped` completion, which no reward
scores and which trains nothing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from atlas_jax.data.examples import fill
from atlas_jax.rollout.engine import ChatModel, Request
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.types import Completion, Question, Sample

if TYPE_CHECKING:
    from atlas_jax.rollout.episodes import EpisodeOptions

_LESSON = re.compile(r"<teaching>(.*?)</teaching>", re.DOTALL)
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
    episode: EpisodeOptions | None = None
    """The user's own way to ask; None for the built-in ones."""


class Draws(NamedTuple):
    """The sampling, and the seed from which random numbers follow with a question's place."""

    sampling: Sampling
    seed: int

    def seed_of(self, place: int, stream: int, *more: int) -> int:
        """Returns the seed of one request; `more` are numbers of requests in the stream."""
        sequence = np.random.SeedSequence((self.seed, place, stream, *more))
        return int(sequence.generate_state(1)[0])


def run(
    questions: Sequence[Question],
    places: Sequence[int],
    policy: ChatModel,
    student: ChatModel | None,
    protocol: TeachingProtocol,
    draws: Draws,
    alone: Sequence[tuple[Completion, Completion]] | None = None,
) -> list[Sample]:
    """Returns the samples of the questions, the group of each together and in order.

    Args:
        questions: those of this process, which may have none while others have some.
        places: number of each question in the run, which its random numbers follow from.
        policy: the model that is trained.
        student: None under `protocol=direct`, and where no student takes part in an episode.
        protocol: templates and limits.
        draws: sampling and seed.
        alone: baseline and probe of each question from an earlier run with the same student, which
            is then not asked again; every process gives them, or none does.
    """
    if protocol.episode is not None:
        return _converse(policy, questions, places, protocol, protocol.episode, draws)
    if student is None:
        prompts = [_fill(protocol.templates.direct, q, {}) for q in questions]
        return _write(policy, questions, prompts, places, protocol, draws)
    if alone is None:
        alone = _alone(student, questions, places, protocol, draws)
    prompts = [
        _fill(protocol.templates.teacher, q, {"approach": probe.text})
        for q, (_, probe) in zip(questions, alone, strict=True)
    ]
    said = dict(zip(places, alone, strict=True))
    lessons = [
        sample._replace(
            teaching=extract_lesson(sample.completion.text, protocol),
            baseline=said[sample.place][0],
            probe=said[sample.place][1],
        )
        for sample in _write(policy, questions, prompts, places, protocol, draws)
    ]
    return _guide(student, lessons, protocol, draws)


def extract_lesson(text: str, protocol: TeachingProtocol) -> str:
    """Returns what the student gets to read of the teacher's text; "" if there is no lesson."""
    lesson = _LESSON.search(text)
    if lesson:
        return lesson[1].strip()
    return text.strip() if protocol.missing_teaching == "whole" else ""


def has_lesson(text: str) -> bool:
    """Returns True if the teacher's text has a lesson between its tags."""
    lesson = _LESSON.search(text)
    return bool(lesson and lesson[1].strip())


def _alone(
    student: ChatModel,
    questions: Sequence[Question],
    places: Sequence[int],
    protocol: TeachingProtocol,
    draws: Draws,
) -> list[tuple[Completion, Completion]]:
    """Returns the student's answer and its approach to each question, from one call."""
    templates = protocol.templates
    limits = protocol.limits
    requests = [
        Request(student.encode(_fill(template, q, {})), limit, draws.seed_of(place, stream))
        for template, limit, stream in (
            (templates.baseline, limits.answer, _BASELINE),
            (templates.diagnostic, limits.probe, _PROBE),
        )
        for q, place in zip(questions, places, strict=True)
    ]
    # One call, so that both kinds of text fill the same rows of the engine.
    written = [group[0] for group in _ask(student, requests, draws.sampling, student.context)]
    return list(zip(written[: len(questions)], written[len(questions) :], strict=True))


def _write(
    policy: ChatModel,
    questions: Sequence[Question],
    prompts: Sequence[str],
    places: Sequence[int],
    protocol: TeachingProtocol,
    draws: Draws,
) -> list[Sample]:
    """Returns a sample for each completion that the policy writes of the prompts."""
    limits = protocol.limits
    requests = [
        Request(
            prompt_ids=policy.encode(prompt),
            max_tokens=limits.policy,
            seed=draws.seed_of(place, _LESSONS),
            num_samples=protocol.num_generations,
        )
        for prompt, place in zip(prompts, places, strict=True)
    ]
    written = _ask(policy, requests, draws.sampling, limits.prompt + limits.policy)
    return [
        Sample(question=question, completion=completion, place=place, member=member)
        for question, place, group in zip(questions, places, written, strict=True)
        for member, completion in enumerate(group)
    ]


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


def _guide(
    student: ChatModel,
    samples: Sequence[Sample],
    protocol: TeachingProtocol,
    draws: Draws,
) -> list[Sample]:
    """Returns the samples with the student's answer to each lesson, or a stand-in without one."""
    taught = [sample for sample in samples if sample.teaching]
    requests = []
    for sample in taught:
        template = protocol.templates.with_teaching
        prompt = _fill(template, sample.question, {"teaching": sample.teaching})
        # Each lesson is answered with random numbers of its own, or its luck would be its group's.
        number = sample.place * protocol.num_generations + sample.member
        seed = draws.seed_of(number, _GUIDED)
        requests.append(Request(student.encode(prompt), protocol.limits.answer, seed))
    answers = iter(_ask(student, requests, draws.sampling, student.context))
    return [
        sample._replace(guided=next(answers)[0] if sample.teaching else _untaught(sample, protocol))
        for sample in samples
    ]


def _untaught(sample: Sample, protocol: TeachingProtocol) -> Completion | None:
    """Returns the answer where there is no lesson: the one alone, or one that no reward scores."""
    # A lesson that failed must not count as one without effect, as the baseline would.
    if sample.completion.is_failed:
        return Completion.failed(sample.completion.finish_reason)
    if protocol.missing_teaching == "unscored":
        return Completion.failed("skipped: no lesson")
    return sample.baseline


def _ask(
    model: ChatModel, requests: Sequence[Request], sampling: Sampling, room: int
) -> list[list[Completion]]:
    """Returns the completions; requests that the model or `room` does not hold are not sent."""
    problems = [_problem(request, room, model.vocab_size) for request in requests]
    written = iter(
        model.generate([r for r, p in zip(requests, problems, strict=True) if not p], sampling)
    )
    return [
        [Completion.failed(f"skipped: {problem}")] * r.num_samples if problem else next(written)
        for r, problem in zip(requests, problems, strict=True)
    ]


def _problem(request: Request, room: int, vocab_size: int) -> str:
    """Returns the reason for which a request is not sent; empty if it is."""
    if len(request.prompt_ids) + request.max_tokens > room:
        sizes = f"prompt of {len(request.prompt_ids)} tokens and {request.max_tokens} new ones"
        return f"{sizes} exceed {room}"
    if max(request.prompt_ids, default=0) >= vocab_size:
        return f"prompt with token {max(request.prompt_ids)}, of which the model has {vocab_size}"
    return ""


def _fill(template: str, question: Question, more: Mapping[str, str]) -> str:
    return fill(template, {**question.fields, "question": question.text, **more})
