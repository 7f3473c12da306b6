"""Rows of every accepted shape, and what is said about the others."""

import dataclasses
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from atlas_jax.config import DataConfig, LessonsConfig
from atlas_jax.data import examples, shapes
from atlas_jax.data.examples import Conversation, PlainText
from atlas_jax.data.sources import Row, Rows

CONFIG = DataConfig()
LESSONS = LessonsConfig(
    teacher_template="Question: {question}\nApproach: {approach}",
    lesson_template="Diagnosis: {diagnosis}\nLesson: {teaching}",
)
TEACHING = {
    "problem_text": "2+2?",
    "student_approach": "guess {teaching}",
    "teacher_diagnosis": "no {method}",
    "teacher_teaching": 'count: {"a": 1}',
}
USER = {"role": "user", "content": "x"}
ASSISTANT = {"role": "assistant", "content": "y"}


def sample(fields, **changes):
    lessons = {name: changes.pop(name) for name in list(changes) if hasattr(LESSONS, name)}
    config = dataclasses.replace(CONFIG, **changes)
    row = Row("t.jsonl:1", fields)
    return examples.to_sample(row, config, dataclasses.replace(LESSONS, **lessons))


_TEXTS = st.sampled_from(["", "x", "[", '[{"role": "user", "content": "x"}]', " [{}]", 3, None])
_ROWS = st.one_of(
    st.fixed_dictionaries({"prompt": _TEXTS, "completion": _TEXTS}, optional={"label": _TEXTS}),
    st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries(
                    {"role": st.sampled_from(["user", "User", "human", "tool"]), "content": _TEXTS},
                    optional={"weight": st.just(0), "function_call": st.just({})},
                ),
                max_size=3,
            )
        },
        optional={"system": st.just("be kind"), "functions": st.just([])},
    ),
)


@hypothesis.given(_ROWS)
def test_rows_that_are_not_converted_are_those_that_conversion_would_keep(fields):
    ours = examples._is_ours(fields)
    hypothesis.target(float(ours))
    if ours:
        assert shapes.training_row(shapes.renamed(fields, {})) == fields


def test_messages_are_kept_as_they_are():
    assert sample({"messages": [USER, ASSISTANT]}) == Conversation("t.jsonl:1", [USER, ASSISTANT])


def test_texts_of_prompt_and_completion_are_plain():
    expected = PlainText("t.jsonl:1", "2+2=", "4")
    assert sample({"prompt": "2+2=", "completion": "4"}) == expected


def test_messages_of_a_prompt_are_context():
    fields = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    expected = Conversation("t.jsonl:1", [USER, ASSISTANT, USER, ASSISTANT], 3)
    assert sample(fields) == expected


def test_teaching_row_becomes_question_and_lesson_with_braces_intact():
    assert sample(TEACHING).messages == [
        {"role": "user", "content": "Question: 2+2?\nApproach: guess {teaching}"},
        {"role": "assistant", "content": 'Diagnosis: no {method}\nLesson: count: {"a": 1}'},
    ]


def test_system_prompt_is_put_before_rows_that_have_none():
    system = {"role": "system", "content": "be kind"}
    own = {"role": "system", "content": "own"}
    assert sample({"messages": [USER, ASSISTANT]}, system_prompt="be kind").messages[0] == system
    assert sample({"messages": [own, USER, ASSISTANT]}, system_prompt="be kind").messages[0] == own
    fields = {"prompt": [USER], "completion": [ASSISTANT]}
    assert sample(fields, system_prompt="be kind").num_context == 2
    assert sample(TEACHING, system_prompt="be kind").messages[0] == system


def test_null_fields_count_as_absent():
    fields = {"messages": None, "prompt": "a", "completion": "b", "problem_text": None}
    assert sample(fields) == PlainText("t.jsonl:1", "a", "b")
    messages = [USER | {"name": None}, ASSISTANT | {"tool_calls": None}]
    assert sample({"messages": messages}).messages == [USER, ASSISTANT]


def test_tool_call_needs_no_words_and_reaches_the_template():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    expected = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    assert sample({"messages": [USER, call]}).messages[1] == expected


def test_given_format_is_taken_where_several_fit():
    fields = {"messages": [USER, ASSISTANT], "prompt": "a", "completion": "b"}
    assert isinstance(sample(fields), Conversation)
    assert isinstance(sample(fields, format="prompt_completion"), PlainText)


@pytest.mark.parametrize(
    ("fields", "changes", "reason"),
    [
        (
            {"prompt": "a", "answer": "b"},
            {},
            "lacks completion; it has prompt, answer; data.format=auto accepts rows with "
            "(messages) or (prompt, completion) or "
            "(problem_text, student_approach, teacher_diagnosis, teacher_teaching)",
        ),
        ({}, {}, "lacks messages; it has no fields;"),
        (
            {"prompt": "a", "completion": "b"},
            {"format": "teaching"},
            "lacks problem_text, student_approach, teacher_diagnosis, teacher_teaching; it has "
            "prompt, completion; data.format=teaching accepts",
        ),
        ({"messages": [USER]}, {}, "has no assistant message to train on"),
        (
            {"prompt": [USER, ASSISTANT], "completion": [USER]},
            {},
            "has no assistant message to train on",
        ),
        ({"messages": []}, {}, "has messages that are no list of messages"),
        ({"messages": "x"}, {}, "has messages as a text that is not JSON"),
        ({"messages": ["x"]}, {}, "has a str as messages[0]"),
        (
            {"messages": [{"from": "human"}]},
            {},
            "lacks role, content in messages[0], which has from",
        ),
        (
            {"messages": [USER, {"role": "narrator", "content": "y"}]},
            {},
            "has the role 'narrator' in messages[1]; it must be one of system, user, assistant",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            {},
            "has a part of type text in messages[0].content; only texts are trained",
        ),
        (
            {"prompt": "a", "completion": 4},
            {},
            "has a prompt of type str and a completion of type int",
        ),
        (
            TEACHING | {"student_approach": 3},
            {},
            "has a int as student_approach; it must be a text",
        ),
        (
            TEACHING,
            {"lesson_template": ""},
            "is a teaching row but teaching.lesson_template is empty",
        ),
        ({"prompt": "a", "completion": "\ud83d"}, {}, "has half a surrogate pair in completion"),
    ],
)
def test_unusable_row_says_what_is_wrong(fields, changes, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        sample(fields, **changes)


def test_unusable_rows_stop_with_file_and_line():
    rows = Rows([Row("t.jsonl:1", TEACHING), Row("t.jsonl:2", {"question": "q"})], [])
    with pytest.raises(
        ValueError, match=r"1 of 2 dataset rows(.|\n)*t\.jsonl:2: lacks messages; it"
    ):
        examples.parse_rows(rows, CONFIG, LESSONS)


def test_few_unusable_rows_are_named():
    rows = Rows([Row("t.jsonl:1", TEACHING), Row("t.jsonl:2", {"question": "q"})], [])
    parsed = examples.parse_rows(rows, dataclasses.replace(CONFIG, max_rejected_frac=0.5), LESSONS)
    assert [s.name for s in parsed.samples] == ["t.jsonl:1"]
    assert parsed.rejected[0].startswith("t.jsonl:2: lacks messages; it has question")


@pytest.mark.parametrize("option", ["teacher_template", "lesson_template"])
def test_unknown_template_field_is_an_error_at_start(option):
    lessons = dataclasses.replace(LESSONS, **{option: "{approach} {answer}"})
    with pytest.raises(
        ValueError, match=rf"teaching\.{option} has the unknown field {{answer}}; it may"
    ):
        examples.parse_rows(Rows([], []), CONFIG, lessons)


def test_braces_of_a_template_that_hold_no_name_are_text():
    assert examples.fill('{"a": {x}, {}}', {"x": "{x}"}) == '{"a": {x}, {}}'


def test_rows_of_another_format_than_the_config_s_are_one_sentence():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = Rows([Row(f"t:{i}", row) for i in range(9)], [])
    config = dataclasses.replace(CONFIG, format="teaching")
    with pytest.raises(ValueError, match=r"use --config\.data\.format=auto") as error:
        examples.parse_rows(rows, config)
    assert str(error.value) == (
        "data.format=teaching, but all rows have the format messages; use --config.data.format=auto"
    )
    assert len(examples.parse_rows(rows, dataclasses.replace(config, format="auto")).samples) == 9
