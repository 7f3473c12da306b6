"""Rows of the runtime's database to the record that the Atlas SDK exports of a session."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from atlas_jax.traces.parser import UNREVIEWED
from atlas_jax.traces.values import as_object, as_text, decoded, decoded_once

Row = Mapping[str, Any]
"""Columns of a table by name; JSON columns as texts, as the bytes of `jsonb`, or as values."""

Event: TypeAlias = tuple[int, int, datetime.datetime, Any]
"""`session_id`, `id`, `created_at` and `event` of a row of `trajectory_events`."""

_LIFTED = ("triage_dossier", "learning_key", "learning_history", "teacher_notes", "reward_summary",
           "drift", "drift_alert", "adaptive_summary")  # fmt: skip


def session_record(
    session: Row, steps: Sequence[Row], events: Sequence[Event] | None
) -> dict[str, Any]:
    """Returns a session as one line of an export holds it.

    Args:
        session: a row of `sessions`, with its `plan`.
        steps: rows of `step_results` by `step_id`, each with `attempt_details` and
            `guidance_notes`.
        events: its trajectory, oldest first.
    """
    metadata = as_object(session["metadata"])
    plan = decoded(session["plan"])
    plan = plan if isinstance(plan, dict) else {}
    metadata |= {
        "session_id": session["id"],
        "status": session["status"],
        "created_at": _iso(session["created_at"]),
        "review_status": session["review_status"] or UNREVIEWED,
    }
    if completed_at := _iso(session["completed_at"]):
        metadata["completed_at"] = completed_at
    record = {
        "task": session["task"],
        "final_answer": session["final_answer"] or "",
        "plan": plan,
        "steps": _steps(steps, plan),
        "session_metadata": metadata,
        "review_status": metadata["review_status"],
    }
    for name in ("reward_stats", "reward_audit"):
        if value := decoded(session[name]) or metadata.get(name):
            record[name] = metadata[name] = value
    record |= _optional(session, metadata)
    if events:
        record["trajectory_events"] = [
            {"id": number, "event": decoded_once(event), "created_at": _iso(when)}
            for _, number, when, event in events
        ]
    return record


def _optional(session: Row, metadata: Row) -> dict[str, Any]:
    """Returns the parts that a record has only where there is something to say."""
    parts: dict[str, Any] = {k: metadata[k] for k in _LIFTED if metadata.get(k) is not None}
    drift = parts.get("drift")
    summary = parts.get("adaptive_summary")
    if "drift_alert" not in parts and isinstance(drift, dict) and "drift_alert" in drift:
        parts["drift_alert"] = drift["drift_alert"]
    mode = metadata.get("execution_mode")
    parts["execution_mode"] = mode or (
        summary.get("adaptive_mode") if isinstance(summary, dict) else None
    )
    parts["session_reward"] = decoded(session["reward"])
    parts["review_notes"] = as_text(session["review_notes"]).strip()
    for name in ("student_learning", "teacher_learning"):
        parts[name] = as_text(session[name] or metadata.get(name)).strip()
    return {k: v for k, v in parts.items() if v is not None and v != ""}


def _steps(rows: Sequence[Row], plan: Row) -> list[dict[str, Any]]:
    listed = plan.get("steps")
    planned = {
        str(step.get("id")): step
        for step in (listed if isinstance(listed, list) else [])
        if isinstance(step, dict)
    }
    steps: list[dict[str, Any]] = []
    for row in rows:
        step = _step(row, planned.get(str(row["step_id"]), {}))
        step["context"] = {
            "prior_results": {str(s["step_id"]): _result(s) for s in steps},
            "prior_results_text": {str(s["step_id"]): s["output"] for s in steps},
        }
        steps.append(step)
    return steps


def _step(row: Row, planned: Row) -> dict[str, Any]:
    evaluation = decoded(row["evaluation"])
    parts = evaluation if isinstance(evaluation, dict) else {}
    nested = "reward" in parts or "validation" in parts
    attempts = [a | {"evaluation": decoded(a["evaluation"])} for a in row["attempt_details"]]
    metadata = as_object(row["metadata"])
    if attempts:
        metadata = {"attempt_history": attempts, "attempt_details": attempts} | metadata
    metadata.setdefault("raw_evaluation", parts or {"raw": evaluation})
    if planned.get("depends_on") is not None:
        metadata.setdefault("depends_on", planned["depends_on"])
    count = row["attempts"]
    columns = {
        "step_id": row["step_id"],
        "description": as_text(planned.get("description")),
        "trace": row["trace"] or "",
        "output": row["output"] or "",
        "reward": _reward(parts.get("reward") if nested else evaluation),
        "tool": planned.get("tool"),
        "tool_params": as_object(planned.get("tool_params")),
        "validation": as_object(parts.get("validation")),
        "attempts": len(attempts) or len(row["guidance_notes"]) if count is None else count,
        "guidance": row["guidance_notes"],
    }
    return metadata | columns | {"metadata": metadata}


def _reward(value: Any) -> Any:
    """Returns the reward with what was recorded as its `raw`; what is no object stays as it is."""
    reward = decoded(value)
    if reward is not None and not isinstance(reward, dict):
        return reward
    reward = reward or {}
    return {
        "score": reward.get("score", 0.0 if not reward else None),
        "judges": reward.get("judges") or [],
        "rationale": reward.get("rationale"),
        "raw": reward,
    }


def _result(step: Row) -> dict[str, Any]:
    """Returns what later steps see of an earlier one."""
    metadata = step["metadata"]
    shown = {name: metadata[name] for name in ("artifacts", "status") if metadata.get(name)}
    notes = {"notes": metadata["notes"]} if metadata.get("notes") else {}
    return {"output_text": step["output"], **shown, **notes}


def _iso(when: datetime.datetime | None) -> str | None:
    """Returns what `isoformat` returns, which takes ten times as long; the zone is UTC."""
    return msgspec.to_builtins(when).replace("Z", "+00:00") if when else None
