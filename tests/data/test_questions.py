"""Rows as questions, what templates may say, and the order in which questions are asked."""

import pytest

from atlas_jax.data.examples import check_template
from atlas_jax.data.questions import QuestionOrder, parse_questions, to_question
from atlas_jax.data.sources import Row, Rows
from atlas_jax.types import Question


def question_of(needs_truth=True, **fields):
    return to_question(Row("d.jsonl:7", fields), needs_truth)


@pytest.mark.parametrize("name", ["prompt", "problem_text", "question", "input"])
@pytest.mark.parametrize("truth", ["ground_truth", "answer", "solution"])
def test_a_question_and_its_truth_are_found_by_their_names(name, truth):
    row = {name: " 2+2? ", truth: 4}
    expected = Question(id="d.jsonl:7", text="2+2?", ground_truth="4", fields={}, row=row)
    assert question_of(**row) == expected


def test_the_first_name_that_holds_a_text_wins():
    found = question_of(
        input="last", question="third", prompt="", problem_text=None, solution="S", answer="A"
    )
    assert (found.text, found.ground_truth) == ("third", "A")
    assert question_of(question="q", prompt=[{"role": "user"}], answer="1").text == "q"


def test_a_row_may_name_itself():
    assert question_of(id=17, question="q", answer="1").id == "17"
    assert question_of(id="", question="q", answer="1").id == "d.jsonl:7"


def test_templates_see_what_is_no_answer():
    found = question_of(
        question="q", answer="1", solution="long", student_answer="2", level=3, topic="sums",
        prompt="p", tags=["x"], none=None,
    )  # fmt: skip
    assert found.fields == {"level": "3", "topic": "sums"}


def test_a_row_without_a_question_says_what_it_has():
    with pytest.raises(
        ValueError, match=r"has no question; it has text, answer; name the text one"
    ):
        question_of(text="q", answer="1")


@pytest.mark.parametrize("truth", ["", "  ", None, ["4"]])
def test_a_rule_needs_a_ground_truth(truth):
    with pytest.raises(ValueError, match=r"no ground truth, which the reward needs; add one of"):
        question_of(question="q", answer=truth)
    assert question_of(False, question="q", answer=truth).ground_truth == ""


def rows(*fields):
    return Rows([Row(f"d:{i}", f) for i, f in enumerate(fields, 1)], [])


def test_a_few_unusable_rows_are_left_out_and_many_stop_the_run():
    good = {"question": "q", "answer": "1"}
    found = parse_questions(rows(good, {"question": "q"}, good, good), 0.25, True)
    assert [q.id for q in found] == ["d:1", "d:3", "d:4"]
    with pytest.raises(
        ValueError, match=r"1 of 4 dataset rows cannot be used(?s:.*)d:2: has no gro"
    ):
        parse_questions(rows(good, {"question": "q"}, good, good), 0.2, True)


def test_questions_that_are_left_out_are_counted_and_named(caplog):
    good = {"question": "q", "answer": "1"}
    with caplog.at_level("WARNING"):
        parse_questions(rows(good, {"question": "q"}, good, good), 0.25, True)
    assert "1 of 4 questions are left out: d:2: has no ground truth" in caplog.text


def test_no_question_at_all_is_refused():
    with pytest.raises(
        ValueError, match=r"no usable question; look at data.dataset_path; the first: d:1: has no"
    ):
        parse_questions(rows({"question": "q"}), 1.0, True)
    with pytest.raises(ValueError, match=r"no usable question"):
        parse_questions(rows(), 0.0, True)


def test_a_field_that_templates_need_must_be_in_the_row():
    good = {"question": "q", "answer": "1", "topic": "sums"}
    assert parse_questions(rows(good), 0.0, True, ("topic",))[0].fields == {"topic": "sums"}
    with pytest.raises(ValueError, match=r"lacks the field 'level' of rollout.question_fields"):
        parse_questions(rows(good), 0.0, True, ("topic", "level"))
    with pytest.raises(ValueError, match=r"'answer'.*never shown to a model"):
        parse_questions(rows(good), 0.0, True, ("answer",))


def test_a_template_must_show_the_question():
    check_template("t", "{question} and {topic}", ("question", "topic"), ("question",))
    with pytest.raises(ValueError, match=r"t='Solve it' lacks \{question\}; the model would never"):
        check_template("t", "Solve it", ("question",), ("question",))


def test_an_unknown_field_of_a_template_is_refused():
    with pytest.raises(
        ValueError,
        match=r"t has the unknown field \{questoin\}; it may use \{question\}, \{topic\}",
    ):
        check_template("t", "{questoin}", ("question", "topic"), ("question",))


QUESTIONS = [Question(str(i), f"q{i}", "1", {}) for i in range(7)]


def asked(order, count, first=0):
    return [order.at(i).id for i in range(first, first + count)]


def test_every_epoch_asks_each_question_once_in_another_order():
    order = QuestionOrder(QUESTIONS, 3, True)
    epochs = [asked(order, 7, 7 * epoch) for epoch in range(4)]
    everything = [name for epoch in epochs for name in epoch]
    assert all(sorted(epoch) == [str(i) for i in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert asked(QuestionOrder(QUESTIONS, 3, True), 28) == everything
    assert asked(QuestionOrder(QUESTIONS, 4, True), 28) != everything


def test_the_order_follows_from_the_position_alone():
    order = QuestionOrder(QUESTIONS, 3, True)
    forward = asked(order, 20)
    assert [order.at(i).id for i in reversed(range(20))] == forward[::-1]


def test_without_shuffling_the_order_is_that_of_the_file():
    assert asked(QuestionOrder(QUESTIONS, 3, False), 9) == [*"0123456", "0", "1"]


def test_the_fingerprint_tells_questions_and_orders_apart():
    changed = [QUESTIONS[0]._replace(ground_truth="2"), *QUESTIONS[1:]]
    prints = [
        QuestionOrder(QUESTIONS, 3, True).fingerprint,
        QuestionOrder(QUESTIONS, 4, True).fingerprint,
        QuestionOrder(QUESTIONS, 3, False).fingerprint,
        QuestionOrder(QUESTIONS[:-1], 3, True).fingerprint,
        QuestionOrder(QUESTIONS[::-1], 3, True).fingerprint,
        QuestionOrder(changed, 3, True).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert QuestionOrder(list(QUESTIONS), 3, True).fingerprint == prints[0]


def test_rows_count_in_the_fingerprint_where_functions_see_them():
    def order(tests, hashes_rows):
        question = Question("0", "Add.", "", {}, row={"tests": tests})
        return QuestionOrder([question], 3, True, hashes_rows).fingerprint

    assert order(["a"], True) != order(["b"], True)
    assert order(["a"], True) == order(["a"], True)
    assert order(["a"], False) == order(["b"], False)
