"""Parts of a session that train: lessons for SFT, questions for GRPO.

A lesson is something that the teacher wrote: guidance for an attempt of a step, or, where the steps
have none, what it said in the trajectory events. Its prompt is the step as the student saw it, and
the student's attempt. A question is a step to be done; guidance of the recorded teacher is a field
for templates, and no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging

from atlas_jax.options.data import DataConfig
from atlas_jax.traces.query import Query
from atlas_jax.traces.schema import AtlasSessionTrace, AtlasStepTrace
from atlas_jax.traces.values import as_text
from atlas_jax.types import SessionRows

_APPROVED = "approved"
_TEACHERS = ("teacher", "coach", "atlas_teacher", "assistant")
_STUDENTS = ("student", "user", "executor", "runtime_student")
_SPOKEN = ("message", "text", "content", "guidance", "output", "data", "event", "payload")
_UNKNOWN = "not recorded"


def to_records(
    sessions: Iterable[tuple[str, AtlasSessionTrace | str]], config: DataConfig
) -> Iterator[tuple[str, SessionRows | str]]:
    """Yields the rows of each session that the options ask for, or why it is rejected.

    Sessions of the same content are one; what is left out is counted in the log.

    Args:
        sessions: a name for each, and the session or why it cannot be read.
        config: the filters, and whether final answers count as ground truth.

    Raises:
        ValueError: if no session passes the filters.
    """
    query = Query.from_config(config)
    seen: set[bytes] = set()
    counts: Counter[str] = Counter()
    reviews: Counter[str] = Counter()
    for name, session in sessions:
        if isinstance(session, str):
            yield name, session
            continue
        status = session.session_metadata["review_status"]
        key = content_hash(session)
        fate = "other" if not query.matches(session) else "repeated" if key in seen else "kept"
        counts[fate] += 1
        if fate == "other":
            # Told at the end, where filters that match nothing are corrected.
            counts[f"review_status {status}"] += 1
        if fate == "kept":
            seen.add(key)
            reviews[status] += 1
            yield name, to_rows(session, config.answer_as_truth)
    _conclude(counts, reviews, query)


def to_rows(session: AtlasSessionTrace, answer_as_truth: bool) -> SessionRows:
    """Returns the lessons and the questions of a session."""
    return SessionRows(lessons=lessons(session), questions=questions(session, answer_as_truth))


def content_hash(session: AtlasSessionTrace) -> bytes:
    """Returns a hash of what was asked, done, guided and answered."""
    steps = [[s.description, s.trace, s.output, s.guidance] for s in session.steps]
    content = json.dumps([session.task, session.final_answer, steps])
    return hashlib.sha256(content.encode()).digest()


def lessons(session: AtlasSessionTrace) -> list[dict[str, str]]:
    """Returns what the teacher wrote, as rows of the format `teaching`, in order."""
    rows = [
        _lesson(step_question(session, step, step.guidance[:k]), approach, note, diagnosis)
        for step in session.steps
        for k, (approach, note, diagnosis) in enumerate(_guided_attempts(step))
    ]
    return rows or _spoken_lessons(session)


def questions(session: AtlasSessionTrace, answer_as_truth: bool) -> list[dict[str, str]]:
    """Returns a row for each step; `ground_truth` is empty where none is known.

    Args:
        session: without steps, its task is the question.
        answer_as_truth: whether the answer of an approved session that succeeded may stand for the
            ground truth of its last step.
    """
    metadata = session.session_metadata
    truth = as_text(metadata.get("ground_truth"))
    approved = metadata["review_status"] == _APPROVED and metadata["status"] == "succeeded"
    if not truth and answer_as_truth and approved:
        truth = session.final_answer.strip()
    if not session.steps:
        return [{"prompt": session.task, "ground_truth": truth}]
    last = session.steps[-1]
    return [
        {
            "prompt": step_question(session, step),
            "ground_truth": as_text(step.metadata.get("ground_truth"))
            or (truth if step is last else ""),
            "task": session.task,
            "step_description": step.description,
            "step_context": _context(step),
            "guidance_history": "\n".join(step.guidance),
            "validation": as_text(step.validation or None),
            "tool": step.tool or "",
            "tool_params": as_text(step.tool_params or None),
        }
        for step in session.steps
    ]


def step_question(
    session: AtlasSessionTrace, step: AtlasStepTrace, guidance: Iterable[str] = ()
) -> str:
    """Returns what the student has to do, as one text; guidance that it has read comes last."""
    parts = [session.task]
    if step.description and step.description.strip() != session.task.strip():
        parts.append(f"Step {step.step_id}: {step.description}")
    if step.tool:
        parts.append(f"Tool: {step.tool}")
    if step.tool_params:
        parts.append(f"Tool parameters: {as_text(step.tool_params)}")
    if context := _context(step):
        parts.append(f"Results so far:\n{context}")
    if notes := "\n".join(f"- {note}" for note in guidance):
        parts.append(f"Guidance so far:\n{notes}")
    return "\n\n".join(parts)


def _lesson(question: str, approach: str, note: str, diagnosis: str = "") -> dict[str, str]:
    return {
        "problem_text": question,
        "student_approach": approach or _UNKNOWN,
        "teacher_diagnosis": diagnosis,
        "teacher_teaching": note,
    }


def _guided_attempts(step: AtlasStepTrace) -> Iterator[tuple[str, str, str]]:
    """Yields the student's attempt, the teacher's note on it, and its diagnosis."""
    history = step.attempt_history
    attempts = [_validation(a) for a in history] if isinstance(history, list) else []
    guided = [a for a in attempts if isinstance(a.get("guidance"), str) and a["guidance"].strip()]
    if guided:
        for attempt in guided:
            yield _attempted(attempt), attempt["guidance"].strip(), _diagnosis(attempt)
        return
    for k, note in enumerate(step.guidance):
        attempt = attempts[k] if k < len(attempts) else {}
        yield _attempted(attempt), note.strip(), _diagnosis(attempt)


def _validation(attempt: Any) -> dict[str, Any]:
    evaluation = attempt.get("evaluation") if isinstance(attempt, dict) else None
    validation = evaluation.get("validation") if isinstance(evaluation, dict) else None
    return validation if isinstance(validation, dict) else {}


def _attempted(validation: dict[str, Any]) -> str:
    request = validation.get("validation_request")
    asked = request.get("student_response") if isinstance(request, dict) else None
    return as_text(validation.get("text") or asked).strip()


def _diagnosis(validation: dict[str, Any]) -> str:
    texts = (validation.get(name) for name in ("rationale", "reasoning"))
    return next((text.strip() for text in texts if isinstance(text, str)), "")


def _spoken_lessons(session: AtlasSessionTrace) -> list[dict[str, str]]:
    rows = []
    attempt = ""
    for event in session.trajectory_events or ():
        kind = str(event.get("type", ""))
        actor = event.get("actor")
        text = "" if kind.endswith(("_START", "_TOKEN", "_CHUNK")) else _said(event)
        if text and actor in _STUDENTS:
            attempt = text
        if text and actor in _TEACHERS:
            rows.append(_lesson(session.task, attempt, text))
    return rows


def _said(value: Any) -> str:
    """Returns the words of an event: the first text under one of the known keys."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return "\n".join(filter(None, map(_said, value)))
    if isinstance(value, dict):
        return next((text for key in _SPOKEN if (text := _said(value.get(key)))), "")
    return ""


def _context(step: AtlasStepTrace) -> str:
    texts = step.context.get("prior_results_text")
    if not isinstance(texts, dict):
        return as_text(step.context or None)
    return "\n".join(f"{number}: {as_text(text)}" for number, text in texts.items())


def _conclude(counts: Counter[str], reviews: Counter[str], query: Query) -> None:
    """Logs what became of the sessions, and checks that some are left."""
    left_out = {k: v for k, v in counts.items() if k.startswith("review_status")}
    if counts["other"] and not counts["kept"]:
        raise ValueError(
            f"none of {counts.total() - sum(left_out.values())} sessions passes the filters "
            f"({query.described()}); there are {left_out or 'none'}; change data.min_reward, "
            "data.status_filters or data.review_status_filters, or review the sessions"
        )
    logging.info(
        "%d sessions; left out: %d by the filters, %d of the same content as another",
        *(counts["kept"], counts["other"], counts["repeated"]),
    )
    unapproved = {k: v for k, v in reviews.items() if k != _APPROVED}
    if unapproved:
        logging.warning(
            "sessions that nobody approved are trained on, as data.review_status_filters asks: %s",
            ", ".join(f"{count} {status}" for status, count in unapproved.items()),
        )
