"""Rows of the database to the records that exports hold."""

import datetime

from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.traces.records import session_record

ROW = dict.fromkeys(
    ("metadata", "plan", "reward", "reward_stats", "reward_audit", "final_answer", "review_notes",
     "student_learning", "teacher_learning", "completed_at")
)  # fmt: skip


@given(st.datetimes(timezones=st.just(datetime.UTC)))
def test_times_are_written_as_isoformat_writes_them(when):
    row = ROW | {"id": 1, "task": "t", "status": "s", "review_status": "r", "created_at": when}
    record = session_record(row, (), [(1, 7, when, "null")])
    assert record["session_metadata"]["created_at"] == when.isoformat()
    assert record["trajectory_events"] == [{"id": 7, "event": None, "created_at": when.isoformat()}]
