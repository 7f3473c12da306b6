"""Rows as other tools write them."""

import json
import pathlib
import re

import pytest

from atlas_jax.config import ColumnsConfig, DataConfig, LessonsConfig
from atlas_jax.data import row_files
from atlas_jax.data.examples import PlainText, to_sample
from atlas_jax.data.questions import to_question
from atlas_jax.data.sources import Row

ASKED = ("user", "What is 2+2?")
ANSWERED = ("assistant", "It is four.")
TALK = [{"role": "user", "content": ASKED[1]}, {"role": "assistant", "content": ANSWERED[1]}]


def sample(fields, **options):
    return to_sample(Row("d:1", fields), DataConfig(**options))


def turns(fields, **options):
    return [(m["role"], m["content"]) for m in sample(fields, **options).messages]


def nested(depth):
    return {"inner": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    "fields",
    [
        {"id": 7, "conversations": [{"from": "human", "value": ASKED[1]},
                                    {"from": "gpt", "value": ANSWERED[1]}]},
        {"conversations": TALK},
        {"conversations": [{"from": "user", "value": ASKED[1]},
                           {"from": "chatgpt", "value": ANSWERED[1], "weight": None}]},
        {"instruction": ASKED[1], "input": "", "output": ANSWERED[1]},
        {"instruction": ASKED[1], "context": "", "response": ANSWERED[1], "category": "open_qa"},
        {"prompt": ASKED[1], "response": ANSWERED[1]},
        {"question": ASKED[1], "answer": ANSWERED[1]},
        {"problem": ASKED[1], "solution": ANSWERED[1], "level": 3},
        {"query": ASKED[1], "response": ANSWERED[1]},
        {"prompt": [TALK[0]], "completion": ANSWERED[1]},
        {"prompt": ASKED[1], "completion": [TALK[1]]},
        {"messages": '[{"role": "user", "content": "What is 2+2?"}, '
                     '{"role": "assistant", "content": "It is four."}]'},
        {"messages": [{"role": "User", "content": ASKED[1]},
                      {"role": "model", "content": ANSWERED[1]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is "},
                                                   {"type": "text", "text": "2+2?"}]}, TALK[1]]},
        {"prompt": ASKED[1], "prompt_id": "x", "messages": TALK},
        {"messages": TALK, "chosen": "a", "rejected": "b"},
    ],
    ids=lambda fields: "+".join(fields),
)  # fmt: skip
def test_a_row_is_told_from_its_fields(fields):
    assert turns(fields) == [ASKED, ANSWERED]


def test_what_stands_before_the_question_is_kept():
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be brief.",
           "history": [["hi", "hello"]]}  # fmt: skip
    assert turns(row) == [
        ("system", "Be brief."), ("user", "hi"), ("assistant", "hello"),
        ("user", "Add.\n\n2 and 2"), ("assistant", "4"),
    ]  # fmt: skip
    assert turns({"conversations": TALK, "system": "s"})[0] == ("system", "s")
    assert turns({"messages": [{"role": "developer", "content": "s"}, *TALK]})[0] == ("system", "s")


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "fields",
    [
        {"messages": TALK},
        {"conversations": TALK},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"question": ASKED[1], "response": ANSWERED[1]},
        {"messages": [{"role": "system", "content": "s"}, *TALK]},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_a_system_text_in_a_field_of_its_own_comes_first_and_once(name, fields):
    assert turns({**fields, name: "s"}) == [("system", "s"), ASKED, ANSWERED]
    parts = [{"type": "text", "text": "s"}]
    assert turns({**fields, name: parts}) == [("system", "s"), ASKED, ANSWERED]


def test_messages_may_be_json_text_wherever_they_stand():
    asked, answered = json.dumps(TALK[:1]), json.dumps(TALK[1:])
    assert turns({"prompt": asked, "completion": answered}) == [ASKED, ANSWERED]
    assert turns({"prompt": asked, "completion": ANSWERED[1]}) == [ASKED, ANSWERED]
    row = Row("d:1", {"prompt": asked, "solution": "4"})
    assert to_question(row, True).text == ASKED[1]
    plain = {"prompt": '[{"a": 1}]', "completion": "[{"}
    assert sample(plain) == PlainText("d:1", *plain.values())


def test_columns_of_a_question_and_its_answer_are_a_conversation():
    columns = ColumnsConfig(question="q", completion="a")
    assert turns({"q": ASKED[1], "a": ANSWERED[1]}, columns=columns) == [ASKED, ANSWERED]


def test_a_call_in_the_roles_of_sharegpt():
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
    result = {"from": "observation", "value": "1"}
    row = {"conversations": [{"from": "human", "value": "go"}, call, result, TALK[1]],
           "tools": '[{"name": "add"}]'}  # fmt: skip
    found = sample(row)
    assert found.messages[1]["tool_calls"] == [{"name": "add", "arguments": {"a": 1}}]
    assert [m["role"] for m in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.tools == ({"name": "add"},)
    assert sample({"conversations": TALK, "tools": ""}).tools == ()


def test_functions_of_openai_s_former_calls_are_tools():
    tool = ({"type": "function", "function": {"name": "add"}},)
    assert sample({"messages": TALK, "functions": [{"name": "add"}]}).tools == tool
    assert sample({"messages": TALK, "functions": '[{"name": "add"}]'}).tools == tool
    assert sample({"messages": TALK, "functions": ["sums"]}).tools == ()


def test_a_call_as_openai_wrote_it_before_tools():
    call = {"role": "assistant", "content": None,
            "function_call": {"name": "add", "arguments": '{"a": 1}'}}  # fmt: skip
    result = {"role": "function", "name": "add", "content": "1"}
    found = sample({"messages": [TALK[0], call, result, TALK[1]]}).messages
    assert found[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ]
    assert found[2]["role"] == "tool"


def test_text_alone_is_trained_whole():
    assert sample({"text": "All of it.", "id": 3}) == PlainText("d:1", "", "All of it.")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "is a preference row"),
        ({"chosen": TALK, "rejected": TALK}, "is a preference row"),
        ({"messages": "[{"}, "messages as a text that is not JSON"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TALK[1]]},
         r"a part of type image_url in messages\[0\]"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "the role 'narrator'"),
        ({"instruction": ["x"], "output": "y"}, "instruction or output that is no text"),
        ({"body": "x"}, "lacks messages; it has body"),
        ({"question": "q", "answer": float("nan")}, "lacks messages; it has question"),
        ({"prompt": "q", "completion": "a", "label": False}, "is a preference row"),
        ({"prompt": "q", "completion": "a", "system": "s"}, "has system beside a plain prompt"),
        ({"prompt": "q", "completion": "a", "tools": "[1]"}, "has tools beside a plain prompt"),
        ({"messages": [{"role": "system", "content": "t"}, *TALK], "system": "s"},
         "another one as first message"),
        ({"instruction": "q", "output": "a", "history": ["a", "b"]}, "no list of pairs"),
        ({"instruction": "q", "output": "a", "history": TALK}, "no list of pairs"),
        ({"instruction": "q", "output": "a", "history": [["a", "b", "c"]]}, "no list of pairs"),
        ({"instruction": "q", "output": "a", "history": "["}, "history as a text that is not JSON"),
        ({"messages": [TALK[0], {**TALK[1], "train": "false"}]}, "must be true or false"),
        ({"messages": "[" * 100_000}, "too many brackets"),
        ({"messages": TALK, "tools": "[" * 100_000}, "too many brackets"),
        ({"messages": TALK, "tools": "[" * 200 + "]" * 200}, "in each other"),
        ({"messages": TALK, "tools": [nested(200)]}, "in each other"),
    ],
)  # fmt: skip
def test_a_row_that_is_none_says_why(fields, message):
    with pytest.raises(ValueError, match=message):
        sample(fields)


def test_columns_are_renamed_by_the_config():
    columns = ColumnsConfig(prompt="body", completion="reply")
    assert sample({"body": "x", "reply": "y"}, columns=columns) == PlainText("d:1", "x", "y")
    with pytest.raises(ValueError, match=r"lacks reply, which data\.columns\.completion names"):
        sample({"body": "x", "prompt": "y"}, columns=columns)
    columns = vars(ColumnsConfig(question="body", ground_truth="key"))
    row = Row("d:1", {"prompt": "not this", "body": "q", "key": 4, "answer": "not this"})
    assert to_question(row, True, (), columns)[1:3] == ("q", "4")


@pytest.mark.parametrize(
    ("fields", "question", "truth"),
    [
        ({"prompt": [{"role": "user", "content": "q"}], "solution": "4"}, "q", "4"),
        ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
          "reward_model": {"style": "rule", "ground_truth": "4"}, "data_source": "x"},
         "s\n\nq", "4"),
        ({"problem": "q", "level": 2, "solution": "4"}, "q", "4"),
        ({"problem": "q", "answer": "4", "solution": "2+2=4"}, "q", "4"),
        ({"question": "q", "answer": float("nan"), "solution": 0}, "q", "0"),
        ({"question": "q", "answer": True}, "q", "True"),
        ({"instruction": "Add.", "input": "2 and 2", "answer": "4"}, "Add.\n\n2 and 2", "4"),
        ({"instruction": "Add.", "input": "", "answer": "4"}, "Add.", "4"),
    ],
)  # fmt: skip
def test_questions_of_other_tools(fields, question, truth):
    assert to_question(Row("d:1", fields), True)[1:3] == (question, truth)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": TALK, "answer": "4"}, "a prompt with the roles user, assistant"),
        ({"question": "q", "answer": float("nan")}, "has no ground truth"),
        ({"question": "q", "answer": ["4", "5"]}, "has no ground truth"),
        ({"question": "\ud800", "answer": "4"}, "half a surrogate pair"),
    ],
)
def test_questions_that_are_none_say_why(fields, message):
    with pytest.raises(ValueError, match=message):
        to_question(Row("d:1", fields), True)


PAGE = pathlib.Path(__file__).parents[2] / "docs/data.md"


def test_every_row_that_the_page_on_data_shows_is_taken():
    text = PAGE.read_text()
    table = text[text.index("## Shapes of rows") :].split("## Conversations")[0]
    rows = re.findall(r"^\| ([^|]+) \| `(\{.*?\})`", table, re.MULTILINE)
    assert len(rows) == table.count("\n| ") - 1 > 14
    lessons = LessonsConfig(teacher_template="{question}", lesson_template="{teaching}")
    for shape, row in rows:
        fields = json.loads(row)
        if shape.startswith("GRPO"):
            question = to_question(Row("d:1", fields), True)
            assert (question.text, question.ground_truth) == ("2+2?", "4")
        else:
            to_sample(Row("d:1", fields), DataConfig(), lessons)


def test_every_kind_of_file_that_is_read_stands_on_the_page_on_data():
    text = PAGE.read_text()
    for kind in (*row_files._KINDS, *row_files._COMPRESSED):
        assert re.search(rf"`[\w.]*{re.escape(kind)}`", text), kind
