"""One record of a session, as exports hold it, to a trace; also in its older forms.

A record is an object with at least a `task`. Objects and lists may also arrive as texts of JSON.

| part | where it is looked for |
|---|---|
| reward of a step | `evaluation.reward`, else `evaluation` itself, else `reward`: an object, a |
|  | number, or a text of either; without a score, or as a placeholder, it is the session's |
| reward of the session | `session_reward`, else `reward` |
| metadata | `session_metadata`, else `metadata`; further keys of the record are added to it |
| actor and type of an event | `event.payload`, else `event` |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from atlas_jax.traces.schema import (
    AtlasJudgeBreakdown,
    AtlasJudgeSample,
    AtlasRewardBreakdown,
    AtlasSessionTrace,
    AtlasStepTrace,
)
from atlas_jax.traces.values import (
    as_list,
    as_number,
    as_object,
    as_text,
    as_time,
    decoded,
    shown,
)

_SESSION_KEYS = frozenset(
    ("task", "final_answer", "plan", "steps", "session_metadata", "metadata", "session_reward",
     "reward", "trajectory_events", "student_learning", "teacher_learning", "learning_history",
     "adaptive_summary")
)  # fmt: skip
_STEP_KEYS = frozenset(
    ("step_id", "id", "description", "trace", "output", "reward", "evaluation", "tool",
     "tool_params", "context", "prior_results", "context_outputs", "validation", "attempts",
     "guidance", "metadata")
)  # fmt: skip
_LEARNING = ("student_learning", "teacher_learning", "learning_history", "adaptive_summary")
UNREVIEWED = "pending"
"""Review status of a session that has none, as in the runtime's own schema."""


def parse_line(line: bytes | str, with_learning: bool = True) -> AtlasSessionTrace:
    """Returns the session of one line of an export; arguments as of `parse_session`.

    Raises:
        ValueError: says what is wrong, and in which field.
    """
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("is nested too deeply to be read; remove it") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({error}); each line must be one JSON object") from None
    return parse_session(record, with_learning)


def parse_session(record: Any, with_learning: bool = True) -> AtlasSessionTrace:
    """Returns the session that a record holds.

    Args:
        record: as `json.loads` returns it; it is not changed, and the session shares parts of it.
        with_learning: whether to keep the session's reward and what was learned.

    Raises:
        ValueError: says what is wrong, and in which field.
    """
    if not isinstance(record, dict):
        raise ValueError(f"is {shown(record)}; each record must be one object")
    try:
        return _session(record, with_learning)
    except RecursionError:
        raise ValueError("is nested too deeply to be read; remove it") from None


def _session(record: Mapping[str, Any], with_learning: bool) -> AtlasSessionTrace:
    task = record.get("task")
    if not isinstance(task, str) or not task.strip():
        raise ValueError(f"has {shown(task)} as task; it must be a text that is not empty")
    metadata = _metadata(record)
    events = record.get("trajectory_events") or metadata.get("trajectory_events")
    metadata.pop("trajectory_events", None)
    first = record.get("session_reward")
    second = record.get("reward")
    reward = _reward_fields(second if first is None else first, "session_reward")
    steps = as_list(record.get("steps"), "steps")
    plan = decoded(record.get("plan"))
    return AtlasSessionTrace(
        task=task,
        final_answer=as_text(record.get("final_answer")),
        plan=plan if isinstance(plan, dict) else {},
        steps=[_step(step, f"steps[{i}]", i + 1, reward) for i, step in enumerate(steps)],
        session_metadata=metadata,
        session_reward=reward if with_learning else None,
        trajectory_events=_events(events),
        **(_learning(record, metadata) if with_learning else {}),
    )


def _metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    own = record.get("session_metadata")
    metadata = as_object(record.get("metadata") if own is None else own)
    further = {k: v for k, v in record.items() if k not in _SESSION_KEYS and v is not None}
    metadata = further | metadata
    for name in ("session_id", "status", "created_at"):
        metadata.setdefault(name)
    status = record.get("review_status") or metadata.get("review_status")
    metadata["review_status"] = as_text(status) or UNREVIEWED
    for name in ("created_at", "completed_at"):
        if when := as_time(metadata.get(name), name):
            metadata[name] = when.isoformat()
    if "reward_stats" in metadata:
        metadata["reward_stats"] = decoded(metadata["reward_stats"])
    return metadata


def _learning(record: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: record.get(name) or metadata.get(name) for name in _LEARNING}
    texts = {name: as_text(found[name]).strip() or None for name in _LEARNING[:2]}
    objects = {name: decoded(found[name]) for name in _LEARNING[2:]}
    return texts | {k: v if isinstance(v, dict) else None for k, v in objects.items()}


def _step(
    value: Any, field: str, number: int, session_reward: Mapping[str, Any] | None
) -> AtlasStepTrace:
    step = decoded(value)
    if not isinstance(step, dict):
        raise ValueError(f"has {shown(step)} as {field}; it must be an object")
    further = {k: v for k, v in step.items() if k not in _STEP_KEYS and v is not None}
    metadata = further | as_object(step.get("metadata"))
    step_id = next((step[k] for k in ("step_id", "id") if step.get(k) is not None), number)
    reward, validation = _evaluation(step, field)
    if session_reward and "score" in session_reward and _is_placeholder(reward):
        reward = _reward(session_reward, "session_reward")
    artifacts = metadata.get("artifacts")
    runtime = metadata.get("runtime")
    depends_on = metadata.get("depends_on")
    attempts = step.get("attempts")
    return AtlasStepTrace(
        step_id=as_number(step_id, f"{field}.step_id", int),
        description=as_text(step.get("description")),
        trace=as_text(step.get("trace")),
        output=as_text(step.get("output")),
        reward=reward,
        tool=as_text(step.get("tool")) or None,
        tool_params=as_object(step.get("tool_params")),
        context=_context(step),
        validation=validation,
        attempts=1 if attempts is None else as_number(attempts, f"{field}.attempts", int),
        guidance=_guidance(step.get("guidance")),
        metadata=metadata,
        artifacts=artifacts if isinstance(artifacts, dict) else {},
        deliverable=metadata.get("deliverable"),
        runtime=runtime if isinstance(runtime, dict) else None,
        depends_on=depends_on if isinstance(depends_on, list) else None,
    )


def _context(step: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("context", "prior_results", "context_outputs"):
        if step.get(name) is not None:
            return as_object(step[name])
    return {}


def _guidance(value: Any) -> list[str]:
    notes = value if isinstance(value, list) else decoded(value)
    notes = notes if isinstance(notes, list) else [notes]
    return [text for note in notes if (text := as_text(note))]


def _evaluation(step: Mapping[str, Any], field: str) -> tuple[AtlasRewardBreakdown, dict[str, Any]]:
    """Returns a step's reward and validation, which are recorded together or apart."""
    evaluation = decoded(step.get("evaluation"))
    validation = step.get("validation")
    reward = step.get("reward")
    source = "reward"
    if isinstance(evaluation, dict) and ("reward" in evaluation or "validation" in evaluation):
        validation = evaluation.get("validation") if validation is None else validation
        if evaluation.get("reward") is not None:
            reward = evaluation["reward"]
            source = "evaluation.reward"
    elif evaluation is not None:
        reward = evaluation
        source = "evaluation"
    return _reward(reward, f"{field}.{source}"), as_object(validation)


def _reward(value: Any, field: str) -> AtlasRewardBreakdown:
    """Returns a reward; where no score was recorded it is 0, and `raw` has none."""
    fields = _reward_fields(value, field)
    if fields is None:
        return AtlasRewardBreakdown(0.0)
    judges = as_list(fields.get("judges"), f"{field}.judges")
    return AtlasRewardBreakdown(
        score=fields.get("score", 0.0),
        judges=[_judge(judge, f"{field}.judges[{i}]") for i, judge in enumerate(judges)],
        rationale=as_text(fields.get("rationale")) or None,
        raw=fields,
    )


def _reward_fields(value: Any, field: str) -> dict[str, Any] | None:
    """Returns a reward as an object whose score, if it has one, is a float."""
    value = decoded(value)
    if value is None or value == "":
        return None
    if isinstance(value, int | float):
        value = {"score": value}
    if not isinstance(value, dict):
        raise ValueError(f"has {shown(value)} as {field}; it must be an object or a number")
    if value.get("score") is None:
        return {k: v for k, v in value.items() if k != "score"}
    return value | {"score": as_number(value["score"], f"{field}.score", float)}


def _is_placeholder(reward: AtlasRewardBreakdown) -> bool:
    """True if no score was recorded; exports wrap the recorded reward once more, as `raw`."""
    inner: Any = reward.raw
    if not inner or "score" not in inner or (inner.get("raw") == {} and not reward.score):
        return True
    while isinstance(inner, dict):
        if inner.get("skipped"):
            return True
        inner = inner.get("raw")
    return False


def _judge(value: Any, field: str) -> AtlasJudgeBreakdown:
    judge = _object(value, field)
    samples = as_list(judge.get("samples"), f"{field}.samples")
    reason = judge.get("escalation_reason")
    return AtlasJudgeBreakdown(
        identifier=as_text(judge.get("identifier")),
        score=as_number(judge.get("score") or 0.0, f"{field}.score", float),
        rationale=as_text(judge.get("rationale")),
        principles=as_list(judge.get("principles"), f"{field}.principles"),
        samples=[_sample(sample, f"{field}.samples[{i}]") for i, sample in enumerate(samples)],
        escalated=bool(judge.get("escalated")),
        escalation_reason=None if reason is None else as_text(reason),
    )


def _sample(value: Any, field: str) -> AtlasJudgeSample:
    sample = _object(value, field)
    numbers = {
        name: None
        if sample.get(name) is None
        else as_number(sample[name], f"{field}.{name}", float)
        for name in ("uncertainty", "temperature")
    }
    return AtlasJudgeSample(
        score=as_number(sample.get("score") or 0.0, f"{field}.score", float),
        rationale=as_text(sample.get("rationale")),
        principles=as_list(sample.get("principles"), f"{field}.principles"),
        **numbers,
    )


def _object(value: Any, field: str) -> dict[str, Any]:
    value = decoded(value)
    if not isinstance(value, dict):
        raise ValueError(f"has {shown(value)} as {field}; it must be an object")
    return value


def _events(value: Any) -> list[dict[str, Any]] | None:
    """Returns the events, oldest first; without ids they are taken to be in order."""
    events = [_event(event) for event in as_list(value, "trajectory_events")]
    if all(type(event.get("id")) is int for event in events):
        events.sort(key=lambda event: event["id"])
    return events or None


def _event(value: Any) -> dict[str, Any]:
    event = value if isinstance(value, dict) else decoded(value)
    if not isinstance(event, dict):
        return {"event": event}
    inner = event.get("event")
    inner = inner if isinstance(inner, dict) else decoded(inner)
    source = inner if isinstance(inner, dict) else {}
    payload = source.get("payload")
    source = payload if isinstance(payload, dict) else source
    merged: dict[str, Any] = {}
    if kind := source.get("event_type") or source.get("type"):
        merged["type"] = merged["event_type"] = kind
    if name := source.get("name"):
        merged["name"] = name
    metadata = source.get("metadata")
    if actor := metadata.get("actor") if isinstance(metadata, dict) else None:
        merged["actor"] = actor
    merged.update(event)
    merged["event"] = {} if inner is None else inner
    return merged
