"""The teaching protocol: from questions to groups of rollouts.

For each question the student answers alone and says how it would approach it, both once and shared
by the group; the teacher reads the approach and writes G lessons; the student answers again with
each of them. A prompt that does not fit its model makes a `skipped` completion, which no reward
scores and which trains nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from atlas_jax.data.examples import fill
from atlas_jax.rollout.engine import Request, Speaker
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.types import Completion, Question, Rollout

_LESSON = re.compile(r"<teaching>(.*?)</teaching>", re.DOTALL)
_BASELINE, _PROBE, _LESSONS, _GUIDED = range(4)  # streams of random numbers


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


class Protocol(NamedTuple):
    """How a group comes about."""

    kind: str  # teaching or direct
    templates: Templates
    limits: Limits
    num_generations: int
    missing_teaching: str  # none, whole or unscored


class Draws(NamedTuple):
    """What the random numbers follow from, beside the question's place in the run."""

    sampling: Sampling
    seed: int

    def seed_of(self, place: int, stream: int) -> int:
        """Returns the seed of one request."""
        sequence = np.random.SeedSequence((self.seed, place, stream))
        return int(sequence.generate_state(1)[0])


def run(
    questions: Sequence[Question],
    places: Sequence[int],
    policy: Speaker,
    student: Speaker | None,
    protocol: Protocol,
    draws: Draws,
    alone: Sequence[tuple[Completion, Completion]] | None = None,
) -> list[list[Rollout]]:
    """Returns the group of each question.

    Args:
        questions: those of this process, which may have none while others have some.
        places: the number of each in the run, which its random numbers follow from.
        policy: the model that is trained.
        student: None under `protocol=direct`.
        protocol: how a group comes about.
        draws: how tokens are drawn.
        alone: baseline and probe of each question from an earlier run with the same student, which
            is then not asked again; every process gives them, or none does.
    """
    if student is None:
        prompts = [_fill(protocol.templates.direct, q, {}) for q in questions]
        written = _policy(policy, prompts, places, protocol, draws)
        return [
            [Rollout(q, completion, "", None, None, None) for completion in group]
            for q, group in zip(questions, written, strict=True)
        ]
    if alone is None:
        alone = _alone(student, questions, places, protocol, draws)
    prompts = [
        _fill(protocol.templates.teacher, q, {"approach": probe.text})
        for q, (_, probe) in zip(questions, alone, strict=True)
    ]
    lessons = _policy(policy, prompts, places, protocol, draws)
    groups = [
        [
            Rollout(q, lesson, extract_lesson(lesson.text, protocol), baseline, probe, None)
            for lesson in group
        ]
        for q, group, (baseline, probe) in zip(questions, lessons, alone, strict=True)
    ]
    return _guide(student, groups, places, protocol, draws)


def extract_lesson(text: str, protocol: Protocol) -> str:
    """Returns what the student gets to read of the teacher's text; "" if there is no lesson."""
    found = _LESSON.search(text)
    if found:
        return found[1].strip()
    return text.strip() if protocol.missing_teaching == "whole" else ""


def has_lesson(text: str) -> bool:
    """Returns whether the teacher's text has a lesson between its tags."""
    found = _LESSON.search(text)
    return bool(found and found[1].strip())


def _alone(
    student: Speaker,
    questions: Sequence[Question],
    places: Sequence[int],
    protocol: Protocol,
    draws: Draws,
) -> list[tuple[Completion, Completion]]:
    """Returns the student's answer and its approach to each question, from one call."""
    templates, limits = protocol.templates, protocol.limits
    requests = [
        Request(student.encode(_fill(template, q, {})), limit, draws.seed_of(place, stream))
        for template, limit, stream in (
            (templates.baseline, limits.answer, _BASELINE),
            (templates.diagnostic, limits.probe, _PROBE),
        )
        for q, place in zip(questions, places, strict=True)
    ]
    written = [group[0] for group in _ask(student, requests, draws.sampling, student.context)]
    return list(zip(written[: len(questions)], written[len(questions) :], strict=True))


def _policy(
    policy: Speaker,
    prompts: Sequence[str],
    places: Sequence[int],
    protocol: Protocol,
    draws: Draws,
) -> list[list[Completion]]:
    limits = protocol.limits
    requests = [
        Request(
            policy.encode(prompt),
            limits.policy,
            draws.seed_of(place, _LESSONS),
            protocol.num_generations,
        )
        for prompt, place in zip(prompts, places, strict=True)
    ]
    return _ask(policy, requests, draws.sampling, limits.prompt + limits.policy)


def _guide(
    student: Speaker,
    groups: list[list[Rollout]],
    places: Sequence[int],
    protocol: Protocol,
    draws: Draws,
) -> list[list[Rollout]]:
    """Adds the student's answers with the lessons, or what stands in their place."""
    requests, targets = [], []
    for i, (group, place) in enumerate(zip(groups, places, strict=True)):
        for j, rollout in enumerate(group):
            if not rollout.teaching:
                group[j] = rollout._replace(guided=_untaught(rollout, protocol))
                continue
            prompt = _fill(
                protocol.templates.with_teaching, rollout.question, {"teaching": rollout.teaching}
            )
            seed = draws.seed_of(place * len(group) + j, _GUIDED)
            requests.append(Request(student.encode(prompt), protocol.limits.answer, seed))
            targets.append((i, j))
    answers = _ask(student, requests, draws.sampling, student.context)
    for (i, j), (answer,) in zip(targets, answers, strict=True):
        groups[i][j] = groups[i][j]._replace(guided=answer)
    return groups


def _untaught(rollout: Rollout, protocol: Protocol) -> Completion | None:
    """Returns the answer where there is no lesson: the one alone, or one that no reward scores."""
    if rollout.policy.is_failed:
        return Completion.missing(rollout.policy.finish_reason)
    if protocol.missing_teaching == "unscored":
        return Completion.missing("skipped: no lesson")
    return rollout.baseline


def _ask(
    speaker: Speaker, requests: Sequence[Request], sampling: Sampling, room: int
) -> list[list[Completion]]:
    """Returns the completions; requests that the model or `room` does not hold are not sent."""
    problems = [_problem(request, room, speaker.vocab_size) for request in requests]
    written = iter(
        speaker.generate([r for r, p in zip(requests, problems, strict=True) if not p], sampling)
    )
    return [
        [Completion.missing(f"skipped: {problem}")] * r.num_samples if problem else next(written)
        for r, problem in zip(requests, problems, strict=True)
    ]


def _problem(request: Request, room: int, vocab_size: int) -> str:
    """Returns why a request is not sent; empty if it is."""
    if len(request.prompt_ids) + request.max_tokens > room:
        sizes = f"prompt of {len(request.prompt_ids)} tokens and {request.max_tokens} new ones"
        return f"{sizes} exceed {room}"
    if max(request.prompt_ids, default=0) >= vocab_size:
        return f"prompt with token {max(request.prompt_ids)}, of which the model has {vocab_size}"
    return ""


def _fill(template: str, question: Question, more: Mapping[str, str]) -> str:
    return fill(template, {**question.fields, "question": question.question, **more})
