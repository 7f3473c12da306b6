"""Questions that the student neither always nor never solves: measured once, then kept."""

import contextlib
import json

import jax
import pytest

from atlas_jax.config import GRPOConfig, RolloutConfig, TeachingConfig
from atlas_jax.recipes import difficulty, grpo
from atlas_jax.recipes.difficulty import Measurement
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.startup.compute import Compute
from atlas_jax.types import DependencyError, Question
from tests import stand_in, words
from tests.rollout.scripts import Script, completion, questions

HOW = Measurement("digest", "alone {question}", Sampling(0.7), 30, 4)


def sometimes(prompt, member):
    """Is right in as many answers as the question's number says, of four."""
    number = int(prompt.split("q")[1])
    return str(number) if member < number else "99"


class Student:
    """A scripted student, and how often it was opened."""

    def __init__(self, say=sometimes, **options):
        self.script = Script(say, **options)
        self.opened = 0

    @contextlib.contextmanager
    def open(self):
        """Opens it."""
        self.opened += 1
        yield self.script.model


def select(path, student, bounds=(0.25, 0.75), asked=None, how=HOW):
    asked = questions(5) if asked is None else asked
    found = difficulty.select(asked, bounds, how, getattr(student, "open", student), str(path))
    return [question.id for question in found]


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((0.25, 0.75), ["id1", "id2", "id3"]),
        ((0.3, 0.5), ["id2"]),
        ((0.0, 0.0), ["id0"]),
        ((0.75, 1.0), ["id3", "id4"]),
    ],
)
def test_questions_within_the_bounds_are_kept_in_their_order(tmp_path, bounds, expected):
    assert select(tmp_path, Student(), bounds) == expected


def test_it_is_measured_once_whatever_the_bounds(tmp_path):
    student = Student()
    select(tmp_path, student)
    assert [r.num_samples for r in student.script.requests] == [4] * 5
    assert len({r.seed for r in student.script.requests}) == 5
    again = Student()
    assert select(tmp_path, again, (0.3, 0.5)) == ["id2"]
    assert again.opened == 0


def test_the_file_says_what_was_measured(tmp_path):
    select(tmp_path, Student())
    lines = [json.loads(x) for x in (tmp_path / "difficulty.jsonl").read_text().splitlines()]
    found = [(line["question_id"], line["right"], line["answers"]) for line in lines]
    assert found == [(f"id{i}", i, 4) for i in range(5)]


def test_only_new_questions_are_measured_and_seeds_follow_from_them(tmp_path):
    first, second = Student(), Student()
    select(tmp_path, first, asked=questions(3))
    select(tmp_path, second)
    assert second.script.prompts == ["alone q3", "alone q4"]
    whole = Student()
    select(tmp_path / "other", whole)
    assert {r.seed for r in (*first.script.requests, *second.script.requests)} == {
        r.seed for r in whole.script.requests
    }


@pytest.mark.parametrize(
    "change",
    [
        {"student": "another"},
        {"template": "say {question}"},
        {"sampling": Sampling(1.0)},
        {"max_tokens": 20},
        {"answers": 8},
    ],
)
def test_another_way_of_asking_is_measured_anew(tmp_path, change):
    select(tmp_path, Student())
    student = Student()
    select(tmp_path, student, how=HOW._replace(**change))
    assert len(student.script.requests) == 5


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(difficulty, "_AT_ONCE", 2)
    student = Student()

    def broken(requests, sampling):
        if len(student.script.calls) == 1:
            return [[completion("", 0, "error: the server is gone")] * 4 for _ in requests]
        return student.script._generate(requests, sampling)

    @contextlib.contextmanager
    def opened():
        yield student.script.model._replace(generate=broken)

    with pytest.raises(DependencyError, match="no answer to id2: error: the server is gone"):
        select(tmp_path, opened)
    again = Student()
    assert select(tmp_path, again) == ["id1", "id2", "id3"]
    assert again.script.prompts == ["alone q2", "alone q3", "alone q4"]


def test_a_prompt_that_the_student_cannot_take_is_never_solved(tmp_path):
    student = Student(context=38)
    long = Question("long", "a long question q4", "4", {})
    assert select(tmp_path, student, (0.75, 1.0), [*questions(5), long]) == ["id3", "id4"]
    assert len(student.script.requests) == 5


def test_no_question_left_is_an_error_that_says_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"leaves 0 of 5.*never solves 1 and always 1; widen it"):
        select(tmp_path, Student(), (0.9, 0.95))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny student of a few words."""
    return words.save(tmp_path_factory.mktemp("student"), [f"q{i}" for i in range(5)])


@pytest.mark.parametrize("backend", ["local", "vllm"])
def test_the_student_of_a_run_is_measured_where_it_generates(model, tmp_path, backend):
    with stand_in.running(model) as [(url, server)]:
        config = GRPOConfig(
            student_model=model, output_dir=str(tmp_path), max_new_tokens=4,
            teaching=TeachingConfig(student_baseline_template="{question}"),
            rollout=RolloutConfig(
                backend=backend, student_servers=url, difficulty=(0.0, 1.0), difficulty_answers=2
            ),
        )  # fmt: skip
        student = grpo.open_student(config, Compute.of(config, jax.devices()[:1]))
        found = difficulty.of_run(config, questions(5), student)
        calls = [call for call in server.calls if "generate" in call[1]]
    assert [question.id for question in found] == [f"id{i}" for i in range(5)]
    assert len(calls) == (2 * 5 if backend == "vllm" else 0)
    assert len((tmp_path / "difficulty.jsonl").read_text().splitlines()) == 5
