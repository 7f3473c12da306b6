"""Records of sessions in the forms that exports and databases have had."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_jax.traces import parser
from atlas_jax.traces.schema import AtlasRewardBreakdown, AtlasSessionTrace

REWARD = {"score": 0.5, "judges": [], "rationale": None, "raw": {"score": 0.5}}
PLACEHOLDER = {"score": 0.0, "judges": [], "rationale": "deferred", "raw": {"skipped": True}}


def parse(**fields):
    return parser.parse_session({"task": "t", **fields})


def step(**fields):
    return parse(steps=[fields]).steps[0]


def test_a_record_with_a_task_alone_is_a_session_that_waits_for_review():
    session = parse()
    assert session == AtlasSessionTrace(
        "t", "", {}, [],
        {"session_id": None, "status": None, "created_at": None, "review_status": "pending"},
    )  # fmt: skip


def test_the_bundled_sample_of_the_sdk_is_read():
    line = b'{"session_id": 1, "task": "a", "steps": [{"description": "b", "reward": {"p": 1.0}}]}'
    session = parser.parse_line(line)
    assert session.session_metadata["session_id"] == 1
    assert session.steps[0].step_id == 1
    assert session.steps[0].reward == AtlasRewardBreakdown(0.0, raw={"p": 1.0})


@pytest.mark.parametrize(
    "fields",
    [
        {"reward": REWARD},
        {"reward": json.dumps(REWARD)},
        {"reward": 0.5},
        {"reward": "0.5"},
        {"reward": {"score": "0.5"}},
        {"evaluation": REWARD, "reward": 0.1},
        {"evaluation": {"reward": REWARD, "validation": {"valid": True}}, "reward": 0.1},
        {"evaluation": json.dumps({"reward": REWARD})},
        {"evaluation": {"validation": {}}, "reward": 0.5},
    ],
)
def test_a_step_reward_is_found_in_each_of_its_forms(fields):
    assert step(**fields).reward.score == 0.5


def test_judges_and_their_samples_become_dataclasses():
    judge = {"identifier": "process", "samples": [{"score": 1, "rationale": "r"}]}
    found = step(reward={"score": 1, "judges": [judge]}).reward.judges[0]
    assert (found.identifier, found.samples[0].score, found.samples[0].temperature) == (
        "process", 1.0, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        (PLACEHOLDER, 0.8),
        ({"score": 0.0, "judges": [], "rationale": None, "raw": PLACEHOLDER}, 0.8),
        ({"score": 0.0, "judges": [], "rationale": None, "raw": {}}, 0.8),
        (None, 0.8),
        ({"process": 1.0}, 0.8),
        (0.0, 0.0),
        ({"score": 0.3, "raw": {}}, 0.3),
    ],
)
def test_a_placeholder_falls_back_to_the_reward_of_the_session(recorded, expected):
    session = parse(session_reward={"score": 0.8}, steps=[{"reward": recorded}])
    assert session.steps[0].reward.score == expected


@pytest.mark.parametrize("field", ["session_reward", "reward"])
@pytest.mark.parametrize("value", [{"score": 0.8}, '{"score": 0.8}', 0.8, "0.8"])
def test_the_session_reward_is_an_object_with_a_score(field, value):
    assert parse(**{field: value}).session_reward == {"score": 0.8}


def test_events_are_oldest_first_with_actor_and_type_of_their_payload():
    payload = {"event_type": "LLM_END", "name": "chat", "metadata": {"actor": "teacher"}}
    events = [
        {"id": 2, "event": {"payload": payload}},
        {"id": 1, "event": json.dumps({"type": "A"})},
    ]
    first, second = parse(trajectory_events=events).trajectory_events
    assert first == {"id": 1, "type": "A", "event_type": "A", "event": {"type": "A"}}
    assert second == {
        "id": 2, "event": {"payload": payload}, "type": "LLM_END", "event_type": "LLM_END",
        "name": "chat", "actor": "teacher",
    }  # fmt: skip


def test_a_copy_of_the_events_in_the_metadata_is_dropped():
    session = parse(session_metadata={"trajectory_events": [{"id": 1, "event": {}}]})
    assert session.trajectory_events == [{"id": 1, "event": {}}]
    assert "trajectory_events" not in session.session_metadata


def test_unknown_keys_are_kept_and_explicit_metadata_wins():
    found = step(attempt_history=[{"attempt": 1}], mood="a", metadata={"mood": "b"})
    assert found.metadata == {"attempt_history": [{"attempt": 1}], "mood": "b"}
    assert found.attempt_history == [{"attempt": 1}]
    session = parse(tags=["x"], session_metadata={"session_id": 3, "drift_alert": 1})
    assert session.session_metadata["tags"] == ["x"]
    assert session.drift_alert == 1


def test_objects_may_be_texts_and_other_values_are_kept_as_raw():
    found = step(tool_params='{"a": 1}', context="plain", validation=None, guidance="note")
    assert (found.tool_params, found.context, found.validation) == ({"a": 1}, {"raw": "plain"}, {})
    assert found.guidance == ["note"]
    assert step(prior_results={"1": "x"}).context == {"1": "x"}


def test_times_are_written_in_utc():
    metadata = parse(session_metadata={"created_at": "2025-01-01 02:00:00+02:00"}).session_metadata
    assert metadata["created_at"] == "2025-01-01T00:00:00+00:00"


def test_without_learning_data_rewards_of_steps_still_fall_back():
    record = {"task": "t", "session_reward": 0.8, "student_learning": "s", "steps": [{}]}
    session = parser.parse_session(record, with_learning=False)
    assert (session.session_reward, session.student_learning) == (None, None)
    assert session.steps[0].reward.score == 0.8


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "a JSON list of 0; each record must be one object"),
        ({}, "has nothing as task"),
        ({"task": 3}, "has the int '3' as task"),
        ({"task": " "}, "as task; it must be a text that is not empty"),
        ({"task": "t", "steps": 1}, "has the int '1' as steps; it must be a list"),
        ({"task": "t", "steps": [{}, 1]}, r"as steps\[1\]; it must be an object"),
        ({"task": "t", "steps": [{"step_id": "a"}]}, r"as steps\[0\].step_id"),
        ({"task": "t", "steps": [{"reward": []}]}, r"as steps\[0\].reward; it must be an object"),
        ({"task": "t", "steps": [{"reward": {"score": "x"}}]}, r"steps\[0\].reward.score"),
        ({"task": "t", "steps": [{"evaluation": "great"}]}, r"steps\[0\].evaluation"),
        ({"task": "t", "session_reward": float("nan")}, r"session_reward.score; it must be a fin"),
        ({"task": "t", "session_reward": 10**400}, "session_reward.score"),
        ({"task": "t", "created_at": "yesterday"}, "'yesterday' as created_at; it must be a time"),
    ],
)
def test_what_cannot_be_read_is_rejected_with_its_field(record, reason):
    with pytest.raises(ValueError, match=reason):
        parser.parse_session(record)


@pytest.mark.parametrize("line", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": ' * 5_000])
def test_a_line_that_is_no_json_is_rejected(line):
    with pytest.raises(ValueError, match=r"is not JSON|nested too deeply"):
        parser.parse_line(line)


KEYS = [
    *sorted(parser._SESSION_KEYS | parser._STEP_KEYS),
    "score", "judges", "samples", "raw", "skipped", "event", "payload", "review_status",
    "created_at", "session_id", "reward_stats", "artifacts", "depends_on", "attempt_history",
]  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["{}", "[]", '{"score": 1}', "2025-01-01", "1e999", '"\\"1\\""']),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    ),
    max_leaves=25,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8) | VALUES, st.booleans())
def test_any_record_is_accepted_or_rejected_with_a_reason(record, has_task):
    if has_task and isinstance(record, dict):
        record = {"task": "t", **record}
    try:
        session = parser.parse_session(record)
    except ValueError as error:
        assert str(error)
    else:
        json.dumps(session.to_dict())
        assert {"session_id", "status", "created_at", "review_status"} <= set(
            session.session_metadata
        )


def test_a_note_that_is_nested_too_deeply_is_rejected():
    note = []
    for _ in range(5000):
        note = [note]
    with pytest.raises(ValueError, match="nested too deeply"):
        parse(steps=[{"guidance": [note]}])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=40))
def test_any_line_is_accepted_or_rejected_with_a_reason(line):
    with pytest.raises(ValueError, match="must be"):
        parser.parse_line(line)
