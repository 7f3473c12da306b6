"""Difficulty of questions for the student alone: those that a lesson can change are kept.

A question that the student always solves, or never does, gives most groups equal rewards. How often
it solves each one is measured once, with drawn answers, and kept in `difficulty.jsonl` of the run's
directory: one line a question, whose `key` stands for the prompt, the truth, the student's weights
and the way in which it was asked. Nothing in a line depends on the run, so the file may be copied
to another run of the same student and questions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from atlas_jax import distributed
from atlas_jax.checkpoint import hf
from atlas_jax.data.examples import fill
from atlas_jax.files import write_whole
from atlas_jax.options.grpo import GRPOConfig
from atlas_jax.recipes import chat_models
from atlas_jax.rewards.verifiable import is_right
from atlas_jax.rollout import lines
from atlas_jax.rollout.engine import ChatModel, Request
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.startup.model import Model
from atlas_jax.types import Completion, DependencyError, Question

_FILE = "difficulty.jsonl"
_AT_ONCE = 64  # questions between two writes of the file
_UNKNOWN = -1


class Measurement(NamedTuple):
    """The way in which the student is asked."""

    student: str
    """Digest of its weights."""
    template: str
    """Its user message."""
    sampling: Sampling
    max_tokens: int
    answers: int
    """Answers drawn of each question."""


def of_run(config: GRPOConfig, questions: Sequence[Question], student: Model) -> list[Question]:
    """Returns the questions of `rollout.difficulty`; see `select`."""
    low, high = config.rollout.difficulty
    how = Measurement(
        student=hf.digest(student.source),
        template=config.teaching.student_baseline_template,
        sampling=chat_models.make_draws(config).sampling,
        max_tokens=config.answer_tokens,
        answers=config.rollout.difficulty_answers,
    )

    @contextlib.contextmanager
    def opened() -> Iterator[ChatModel]:
        with contextlib.ExitStack() as stack:
            if config.rollout.backend == "vllm":
                from atlas_jax.recipes import vllm_backend

                vllm_backend.check_loopback(config)
                yield vllm_backend.open_student(config, student, stack)
                return
            from atlas_jax.recipes import local_backend

            yield local_backend.load_student(config, student)

    return select(questions, (low, high), how, opened, config.output_dir)


def select(
    questions: Sequence[Question],
    bounds: tuple[float, float],
    how: Measurement,
    open_student: Callable[[], AbstractContextManager[ChatModel]],
    output_dir: str,
) -> list[Question]:
    """Returns the questions whose share of right answers is within the bounds.

    Every process of a run calls it together.

    Args:
        questions: those of the run.
        bounds: the lowest and the highest share.
        how: the way in which the student is asked.
        open_student: opens the student; not called if all is known.
        output_dir: the directory of the run.

    Raises:
        ValueError: if no question is left.
        DependencyError: if the student does not answer; what is known is kept.
        StopRequestedError: if the run is to stop; what is known is kept.
    """
    keys = [_key(question, how) for question in questions]
    path = pathlib.Path(output_dir) / _FILE
    kept = _read(path) if distributed.is_main() else {}
    known = [kept[key]["right"] if key in kept else _UNKNOWN for key in keys]
    right = distributed.from_main(np.asarray(known, np.int64)).copy()
    unknown = np.flatnonzero(right == _UNKNOWN)
    with open_student() if len(unknown) else contextlib.nullcontext() as student:
        for first in range(0, len(unknown), _AT_ONCE):
            assert student is not None
            part = unknown[first : first + _AT_ONCE]
            right[part] = _ask([questions[i] for i in part], [keys[i] for i in part], how, student)
            kept |= {keys[i]: _line(keys[i], questions[i], int(right[i]), how) for i in part}
            if distributed.is_main():
                write_whole(path, "".join(json.dumps(line) + "\n" for line in kept.values()))
            known_now = len(questions) - len(unknown) + first + len(part)
            logging.info("difficulty: %d of %d questions measured", known_now, len(questions))
    return _within(questions, right / how.answers, bounds)


def _within(
    questions: Sequence[Question], shares: np.ndarray, bounds: tuple[float, float]
) -> list[Question]:
    low, high = bounds
    found = [q for q, share in zip(questions, shares, strict=True) if low <= share <= high]
    told = (
        f"{len(found)} of {len(questions)} questions, which the student solves in {low:g} to "
        f"{high:g} of its answers; it never solves {int((shares == 0).sum())} and always "
        f"{int((shares == 1).sum())}"
    )
    if not found:
        raise ValueError(f"rollout.difficulty leaves {told}; widen it, or add other questions")
    logging.info("difficulty: %s", told)
    return found


def _key(question: Question, how: Measurement) -> str:
    content = [_prompt(question, how), question.ground_truth, *how]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _prompt(question: Question, how: Measurement) -> str:
    return fill(how.template, {**question.fields, "question": question.text})


def _ask(
    questions: Sequence[Question], keys: Sequence[str], how: Measurement, student: ChatModel
) -> np.ndarray:
    """Returns the number of right answers to each question, which all processes share out.

    A prompt that the student cannot take has none.
    """
    requests = {}
    for i in range(jax.process_index(), len(questions), jax.process_count()):
        # The random numbers follow from the question, so that no run finds another difficulty.
        seed = int(keys[i][:8], 16)
        prompt = student.encode(_prompt(questions[i], how))
        request = Request(
            prompt_ids=prompt, max_tokens=how.max_tokens, seed=seed, num_samples=how.answers
        )
        if not lines.problem(request, student.context, student.vocab_size):
            requests[i] = request
    right = np.zeros(len(questions), np.int64)
    with distributed.together(DependencyError):
        if student.goes_on(bool(requests)):
            written = student.generate(list(requests.values()), how.sampling)
            for i, group in zip(requests, written, strict=True):
                right[i] = _count(questions[i], group)
    return distributed.gather(right).sum(0)


def _count(question: Question, answers: Sequence[Completion]) -> int:
    """Returns the number of right answers.

    Raises:
        DependencyError: if an answer failed.
    """
    failed = [answer.finish_reason for answer in answers if answer.is_failed]
    if failed:
        raise DependencyError(f"the student gave no answer to {question.id}: {failed[0]}")
    return sum(is_right(answer, question.ground_truth) for answer in answers)


def _read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns the lines of the file by key."""
    if not path.exists():
        return {}
    lines_ = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["key"]: line for line in lines_}


def _line(key: str, question: Question, right: int, how: Measurement) -> dict[str, Any]:
    return {"key": key, "question_id": question.id, "right": right, "answers": how.answers}
