"""From sessions to lessons and questions, and which sessions are taken."""

import dataclasses
import json

import pytest

from atlas_jax.config import DataConfig, LessonsConfig
from atlas_jax.data import examples, questions, sources
from atlas_jax.data.sources import Row, Rows
from atlas_jax.traces import parser, sessions
from atlas_jax.types import SessionRows

CONFIG = DataConfig(format="session")
LESSONS = LessonsConfig(teacher_template="{question}|{approach}", lesson_template="<{teaching}>")


def attempt(guidance, text=None, **more):
    return {"evaluation": {"validation": {"guidance": guidance, "text": text, **more}}}


def record(i=0, **changes):
    step = {
        "description": "Add.", "output": str(2 * i), "guidance": ["Carry.", "Look."],
        "attempt_history": [
            attempt("Carry.", "21", rationale="no carry"),
            attempt("Look.", None, validation_request={"student_response": "22"}),
            attempt(None, "23"),
        ],
    }  # fmt: skip
    return {
        "task": f"{i} and {i}?", "final_answer": str(2 * i), "steps": [step],
        "review_status": "approved", "status": "succeeded", **changes,
    }  # fmt: skip


def parse(*args, **changes):
    return parser.parse_session(record(*args, **changes))


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def load(tmp_path, records, **options):
    config = dataclasses.replace(
        CONFIG, dataset_path=write(tmp_path / "a.jsonl", records), **options
    )
    return sources.load_rows(config, 0, str(tmp_path))


def test_each_note_is_a_lesson_on_the_attempt_before_it():
    first, second = sessions.lessons(parse())
    assert first == {
        "problem_text": "0 and 0?\n\nStep 1: Add.", "student_approach": "21",
        "teacher_diagnosis": "no carry", "teacher_teaching": "Carry.",
    }  # fmt: skip
    assert second["problem_text"].endswith("Guidance so far:\n- Carry.")
    assert (second["student_approach"], second["teacher_teaching"]) == ("22", "Look.")


def test_notes_without_a_history_are_lessons_on_an_unknown_attempt():
    (lesson,) = sessions.lessons(parse(steps=[{"guidance": ["Carry."]}]))
    assert lesson["student_approach"] == "not recorded"


def test_what_a_teacher_said_is_a_lesson_where_the_steps_have_none():
    def event(number, actor, kind, output):
        payload = {"event_type": kind, "metadata": {"actor": actor}, "data": {"output": output}}
        return {"id": number, "event": {"payload": payload}}

    events = [
        event(4, "teacher", "LLM_END", {"content": [{"text": "Carry."}]}),
        event(3, "teacher", "LLM_NEW_TOKEN", "Ca"),
        event(2, "reward", "LLM_END", "0.5"),
        event(1, "student", "LLM_END", "21"),
    ]
    (lesson,) = sessions.lessons(parse(steps=[{}], trajectory_events=events))
    assert (lesson["student_approach"], lesson["teacher_teaching"]) == ("21", "Carry.")


def test_the_teacher_is_the_assistant_and_alone_is_trained():
    rows = Rows([Row("s", {}, sessions.to_rows(parse(), True))], [])
    first, _ = examples.parse_rows(sources.unfold(rows, sources.LESSONS), CONFIG, LESSONS).samples
    assert first.name == "s lessons[0]"
    assert first.messages == [
        {"role": "user", "content": "0 and 0?\n\nStep 1: Add.|21"},
        {"role": "assistant", "content": "<Carry.>"},
    ]


def test_a_question_has_all_that_templates_may_use():
    step = {
        "description": "Add.", "tool": "sum", "tool_params": {"a": 1}, "guidance": ["Carry."],
        "context": {"prior_results_text": {"1": "one"}}, "validation": {"valid": True},
        "metadata": {"ground_truth": 42},
    }  # fmt: skip
    (found,) = sessions.questions(parse(steps=[step]), False)
    assert found == {
        "prompt": '0 and 0?\n\nStep 1: Add.\n\nTool: sum\n\nTool parameters: {"a": 1}\n\n'
        "Results so far:\n1: one",
        "ground_truth": "42", "task": "0 and 0?", "step_description": "Add.",
        "step_context": "1: one", "guidance_history": "Carry.", "validation": '{"valid": true}',
        "tool": "sum", "tool_params": '{"a": 1}',
    }  # fmt: skip
    names = ("step_context", "guidance_history", "validation", "tool", "tool_params")
    rows = Rows([Row("s", {}, SessionRows(lessons=[], questions=[found]))], [])
    (question,) = questions.parse_questions(rows, 0.0, True, names)
    assert (question.ground_truth, question.fields["tool"]) == ("42", "sum")


@pytest.mark.parametrize(
    ("changes", "truths"),
    [
        ({"ground_truth": "7"}, ["", "7"]),
        ({}, ["", "0"]),
        ({"status": "failed"}, ["", ""]),
        ({"review_status": "pending"}, ["", ""]),
        ({"steps": []}, ["0"]),
    ],
)
def test_the_ground_truth_is_recorded_or_the_approved_answer_of_the_last_step(changes, truths):
    session = parse(**({"steps": [{}, {}]} | changes))
    assert [q["ground_truth"] for q in sessions.questions(session, True)] == truths
    if "ground_truth" not in changes:
        assert not any(q["ground_truth"] for q in sessions.questions(session, False))


def test_steps_without_ground_truth_are_asked_only_where_no_reward_needs_it(tmp_path):
    rows, _ = load(tmp_path, [record(i, steps=[{}, {}]) for i in range(3)])
    assert len(questions.parse_questions(rows, 0.0, True)) == 3
    assert len(questions.parse_questions(rows, 0.0, False)) == 6


def test_sessions_without_anything_to_train_on_are_an_error(tmp_path):
    rows, _ = load(tmp_path, [record(steps=[], status="failed")])
    with pytest.raises(ValueError, match="1 sessions hold no lessons; take others"):
        sources.unfold(rows, sources.LESSONS)
    with pytest.raises(ValueError, match="hold no questions with a ground_truth"):
        questions.parse_questions(rows, 0.0, True)


def test_a_session_is_held_out_with_all_its_lessons(tmp_path):
    train, held_out = load(tmp_path, [record(i) for i in range(10)], eval_split_ratio=0.3)
    parts = [sources.unfold(rows, sources.LESSONS).rows for rows in (train, held_out)]
    tasks = [{row.fields["problem_text"].split("?")[0] for row in part} for part in parts]
    assert [len(part) for part in parts] == [14, 6]
    assert tasks[0].isdisjoint(tasks[1])


def test_sessions_of_the_same_content_are_one(tmp_path):
    records = [record(1, session_id=1), record(1, session_id=2), record(2)]
    rows, _ = load(tmp_path, records)
    assert [row.name[-2:] for row in rows.rows] == [":1", ":3"]


def test_only_approved_sessions_are_taken_unless_asked_for(tmp_path, caplog):
    records = [record(i, review_status=s) for i, s in enumerate(("approved", "pending", "pending"))]
    assert len(load(tmp_path, records)[0].rows) == 1
    assert "nobody approved" not in caplog.text
    assert len(load(tmp_path, records, review_status_filters=())[0].rows) == 3
    assert "nobody approved are trained on" in caplog.text
    assert "2 pending" in caplog.text


def test_filters_that_no_session_passes_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"none of 2 sessions passes.*review_status pending': 2"):
        load(tmp_path, [record(i, review_status="pending") for i in range(2)])


def test_rejected_records_are_listed_and_too_many_stop_the_run(tmp_path):
    records = [record(i) for i in range(8)] + [{"task": ""}, record(9, steps=[{"reward": []}])]
    with pytest.raises(ValueError, match=r"2 of 10 dataset rows cannot be used"):
        load(tmp_path, records)
    lines = (tmp_path / "rejected.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert first["name"] == f"{tmp_path}/a.jsonl:9"
    assert second["reason"].startswith("has a JSON list of 0 as steps[0].reward")
    assert len(load(tmp_path, records, max_rejected_frac=0.2)[0].rows) == 8
