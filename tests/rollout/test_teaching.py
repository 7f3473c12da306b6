"""The teaching protocol, and what is measured of it."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from atlas_jax.checkpoint import hf
from atlas_jax.config import GRPOConfig, RolloutConfig, TeachingConfig
from atlas_jax.recipes import chat_models
from atlas_jax.rewards import combined, verifiable
from atlas_jax.rollout import measures, teaching, teaching_measures
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.student_cache import StudentCache
from atlas_jax.rollout.teaching import Draws
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import open_frozen
from atlas_jax.types import Question, Reward, Sample, by_question
from tests import words
from tests.rollout.scripts import Script, completion, protocol, questions

DRAWS = Draws(Sampling(), 7)
LESSON = "<teaching> say {} </teaching>"
QUESTION = Question("id", "2+2?", "4", {})


def pupil(prompt, member):
    """Answers 9, or what the lesson says."""
    if prompt.startswith("probe"):
        return f"approach of {prompt[-2:]}"
    return prompt.split()[2].strip(":") if prompt.startswith("with say") else "9"


def tutor(prompt, member):
    return LESSON.format(member)


def taught(asked, places=None, student=None, policy=None, how=None):
    student, policy = student or Script(pupil), policy or Script(tutor)
    places = range(len(asked)) if places is None else places
    how = how or protocol()
    samples = teaching.run(asked, places, policy.model, student.model, how, DRAWS)
    return by_question(samples), student, policy


def test_the_student_answers_alone_once_a_question_and_the_teacher_once_a_group():
    groups, student, policy = taught(questions(2))
    assert student.prompts[:4] == ["alone q0", "alone q1", "probe q0", "probe q1"]
    assert policy.prompts == ["teach q0 approach of q0", "teach q1 approach of q1"]
    assert [r.num_samples for r in policy.requests] == [3, 3]
    assert student.prompts[4:] == [f"with say {g}: q{i}" for i in (0, 1) for g in (0, 1, 2)]
    assert len(student.calls) == 2
    assert len(policy.calls) == 1
    for i, group in enumerate(groups):
        assert len({r.completion.prompt_ids for r in group}) == 1
        assert [r.teaching for r in group] == ["say 0", "say 1", "say 2"]
        assert [r.guided.text for r in group] == ["0", "1", "2"]
        assert {r.baseline.text for r in group} == {"9"}
        assert {r.probe.text for r in group} == {f"approach of q{i}"}
        assert [r.answer for r in group] == [r.guided for r in group]


def test_texts_have_the_limits_of_their_kind():
    _, student, policy = taught(questions(1))
    assert [r.max_tokens for r in student.requests] == [30, 20, 30, 30, 30]
    assert [r.max_tokens for r in policy.requests] == [60]


def test_without_a_student_the_policy_answers():
    policy = Script(lambda prompt, member: f"{member}")
    how = protocol()
    groups = by_question(teaching.run(questions(2), range(2), policy.model, None, how, DRAWS))
    assert policy.prompts == ["direct q0", "direct q1"]
    assert [[r.answer.text for r in group] for group in groups] == [["0", "1", "2"]] * 2
    assert {(r.baseline, r.probe, r.guided, r.teaching) for g in groups for r in g} == {
        (None, None, None, "")
    }


def test_further_fields_and_braces_reach_the_prompt_as_they_are():
    how = protocol()
    how = how._replace(templates=how.templates._replace(baseline="{topic}: {question}"))
    asked = [Question("id", "is {topic} {approach}?", "4", {"topic": "{x}"})]
    assert taught(asked, how=how)[1].prompts[0] == "{x}: is {topic} {approach}?"


@pytest.mark.parametrize("missing", ["none", "whole", "unscored"])
@pytest.mark.parametrize(
    ("text", "lesson"),
    [
        ("<thinking>x</thinking><teaching>\n add \n</teaching> end", "add"),
        ("<teaching>first</teaching><teaching>second</teaching>", "first"),
        ("<teaching>two\nlines</teaching>", "two\nlines"),
        ("<teaching>never closed", None),
        ("no tags ", None),
        ("</teaching>wrong order<teaching>", None),
        ("<teaching> </teaching>", ""),
        ("<teaching>\n... - ?</teaching>", ""),
        ("", ""),
    ],
)
def test_a_lesson_is_what_stands_between_its_tags(text, lesson, missing):
    groups, student, _ = taught(
        questions(1), policy=Script(lambda *_: text), how=protocol(missing, size=2)
    )
    expected = text.strip() if lesson is None and missing == "whole" else lesson or ""
    assert teaching.has_lesson(text) == bool(lesson)
    for rollout in groups[0]:
        assert rollout.teaching == expected
        if expected:
            assert rollout.guided.token_ids
        elif missing == "unscored":
            assert rollout.guided.finish_reason == "skipped: no lesson"
        else:
            assert rollout.guided is rollout.baseline
    assert len(student.requests) == (4 if expected else 2)


@pytest.mark.parametrize(
    ("text", "malformed"),
    [
        ("<teaching>add</teaching>", False),
        ("<teaching>add", True),
        ("add</teaching>", True),
        ("<teaching>.</teaching>", True),
        ("<thinking>add</thinking>", False),  # missing, and not begun
    ],
)
def test_a_lesson_that_was_begun_and_is_none_is_malformed(text, malformed):
    assert teaching.is_malformed(text) == malformed
    sample = FOUR[0]._replace(completion=completion(text))
    found = teaching_measures.of_teaching([sample])
    assert found["teaching/malformed_frac"] == (malformed, 1)


@pytest.mark.parametrize("reward", [verifiable.exact_match(), verifiable.teaching_gain()])
def test_what_a_teacher_answers_itself_earns_nothing(reward):
    """Without a lesson, neither the teacher's own text nor the answer alone is a taught answer."""
    policy = Script(lambda prompt, member: "The answer is 0")
    (group,), _, _ = taught(questions(1), policy=policy, how=protocol("unscored"))
    assert [r.value for r in reward(group)] == [None] * 3
    (group,), _, _ = taught(questions(1), policy=policy, how=protocol("none"))
    assert [r.value for r in reward(group)] == [0.0] * 3


@pytest.mark.parametrize(
    ("limits", "contexts", "failed"),
    [
        ({"prompt": 22}, (1000, 1000), "completion"),
        ({}, (38, 1000), "guided"),
        ({}, (37, 1000), "baseline"),
    ],
)
def test_prompts_that_do_not_fit_are_not_sent_and_score_nothing(limits, contexts, failed):
    student = Script(pupil, context=contexts[0])
    groups, _, policy = taught(questions(2), student=student, how=protocol(**limits))
    reward = combined.combine({"gain": (verifiable.teaching_gain(), 1.0)})
    for rollout in groups[0]:
        found = getattr(rollout, failed)
        assert found.finish_reason.startswith("skipped: ")
        assert (found.token_ids, found.text, found.weights_version) == ((), "", -1)
    results = reward(groups[0])
    assert [(r.value, r.is_skipped, r.is_outage) for r in results] == [(None, True, False)] * 3
    if failed == "completion":
        assert not policy.requests
        assert (
            "prompt of 23 tokens and 60 new ones exceed 82" in groups[0][0].completion.finish_reason
        )
        assert verifiable.exact_match()(groups[0])[0].value is None
        assert groups[0][0].guided.finish_reason == groups[0][0].completion.finish_reason


def test_a_prompt_of_just_the_limit_is_sent():
    _, _, policy = taught(questions(1), how=protocol(prompt=23))
    assert len(policy.requests[0].prompt_ids) == 23


def numbered():
    """Returns a student whose answers all differ, in the order in which they were asked for."""
    count = itertools.count()
    return Script(lambda prompt, member: f"{prompt[:5]} {next(count)}")


def test_the_student_gives_several_answers_with_each_lesson_and_alone():
    how = protocol()._replace(num_guided=4, num_baseline=2)
    (group, other), student, _ = taught(questions(2), student=numbered(), how=how)
    for sample in group:
        assert len(sample.guided_answers) == 4
        assert sample.baselines == group[0].baselines
        assert len(sample.baselines) == 2
        assert sample.answer is sample.guided
    written = [c.text for s in (*group, *other) for c in s.guided_answers]
    assert len(set(written)) == 2 * 3 * 4
    assert not set(group[0].baselines) & set(other[0].baselines)
    assert len(student.requests) == 2 * (2 + 1 + 3 * 4)
    assert len(set(seeds(student))) == len(student.requests)
    assert {r.num_samples for r in student.requests} == {1}


def test_the_first_of_several_answers_has_the_random_numbers_of_the_only_one():
    _, single, _ = taught(questions(2))
    several = protocol()._replace(num_guided=3, num_baseline=3)
    _, student, _ = taught(questions(2), how=several)
    assert set(seeds(single)) < set(seeds(student))


def test_without_a_lesson_the_answers_alone_stand_in_for_those_with_it():
    how = protocol("none")._replace(num_guided=3, num_baseline=2)
    (group,), student, _ = taught(
        questions(1), student=numbered(), policy=Script(lambda *_: "no tags"), how=how
    )
    assert len(student.requests) == 3
    assert all(s.guided is s.baseline and s.guided_answers == s.baselines for s in group)


def test_several_answers_are_kept_apart_for_a_later_step():
    how = protocol()._replace(num_baseline=2)
    student, cache = numbered(), StudentCache("always")
    groups = [
        teaching.run(
            questions(1), [place], Script(tutor).model, student.model, how, DRAWS, cache
        )
        for place in (0, 5)
    ]  # fmt: skip
    first, second = (group[0].baselines for group in groups)
    assert first == second
    assert first[0].text != first[1].text
    assert cache.counts() == (3, 6)


def seeds(*scripts):
    return [r.seed for script in scripts for r in script.requests]


def test_seeds_follow_from_the_place_alone():
    _, student, policy = taught(questions(3), places=[4, 5, 6])
    _, alone, single = taught(questions(3)[1:2], places=[5])
    together = dict(zip(student.prompts + policy.prompts, seeds(student, policy), strict=True))
    assert dict(zip(alone.prompts + single.prompts, seeds(alone, single), strict=True)).items() <= (
        together.items()
    )
    assert len(set(together.values())) == len(together)
    _, moved, _ = taught(questions(3)[1:2], places=[6])
    assert not set(seeds(moved)) & set(seeds(alone))
    assert Draws(Sampling(), 8).seed_of(5, 0) != DRAWS.seed_of(5, 0)
    assert all(0 <= seed < 2**32 for seed in together.values())


@pytest.mark.parametrize(
    ("temperature", "student"),
    [
        (-1.0, Sampling(0.7, 0.9, 5)),
        (0.4, Sampling(0.4, 0.9, 5)),
        (0.0, Sampling(0.0)),  # as in evaluations
    ],
)
def test_the_student_has_a_temperature_of_its_own(temperature, student):
    config = GRPOConfig(
        temperature=0.7, top_p=0.9, top_k=5, seed=3,
        rollout=RolloutConfig(student_temperature=temperature),
    )  # fmt: skip
    asked = {}

    def model(name, say):
        script = Script(say).model

        def generate(requests, sampling):
            asked[name] = asked.get(name, set()) | {sampling}
            return script.generate(requests, sampling)

        return script._replace(generate=generate)

    draws = chat_models.make_draws(config)
    assert draws.seed == 3
    teaching.run(
        questions(1), [0], model("teacher", tutor), model("student", pupil), protocol(), draws
    )
    assert asked == {"teacher": {Sampling(0.7, 0.9, 5)}, "student": {student}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small model that speaks with its own engine, at version 3."""
    names = ("alone", "probe", "teach", "with", "direct", *(f"q{i}" for i in range(8)))
    path = words.save(tmp_path_factory.mktemp("tiny"), names)
    config = GRPOConfig(model_name_or_path=path, output_dir="unused")
    model = open_frozen(Compute.of(config, jax.devices()[:1]), path)
    return chat_models.local(model, "", 64)(hf.load(model.source, model.decoder), 3)


def test_real_models_teach_and_answer(tiny):
    how = protocol("whole", policy=6, probe=4, answer=5, prompt=20)

    def ask(asked, places):
        return by_question(teaching.run(asked, places, tiny, tiny, how, DRAWS))

    groups = ask(questions(3), [0, 1, 2])
    for group in groups:
        assert len({r.completion.prompt_ids for r in group}) == 1
        assert len({id(r.baseline) for r in group}) == len({id(r.probe) for r in group}) == 1
        for rollout in group:
            assert 1 <= rollout.completion.num_tokens <= 6
            assert rollout.completion.weights_version == 3
            assert rollout.teaching == rollout.completion.text.strip()
            assert rollout.guided.num_tokens <= 5
    assert len({r.completion.token_ids for group in groups for r in group}) > 6
    backwards = ask(questions(3)[::-1], [2, 1, 0])
    for ours, theirs in zip(
        itertools.chain(*backwards[::-1]), itertools.chain(*groups), strict=True
    ):
        assert ours.completion.token_ids == theirs.completion.token_ids
        assert ours.guided.token_ids == theirs.guided.token_ids
        np.testing.assert_allclose(ours.completion.logprobs, theirs.completion.logprobs, atol=1e-5)


def rollout(before, after, lesson, tokens, finish="stop"):
    """A rollout of a question whose answer is 4; `tokens` of lesson, baseline and guided answer."""
    text = f"<teaching>{lesson}</teaching>" if lesson else "none"
    policy, baseline, guided = (
        completion(t, n) for t, n in zip((text, before, after), tokens, strict=True)
    )
    guided = guided._replace(finish_reason=finish)
    return Sample(
        question=QUESTION,
        completion=policy,
        teaching=lesson,
        baseline=baseline,
        probe=completion("?", 3),
        guided=guided,
    )


FOUR = [
    rollout("it is 5", "it is 4", "add", (6, 10, 4)),  # wrong to right
    rollout("it is 4", "it is 4", "", (5, 8, 6)),  # right to right, no lesson
    rollout("it is 4", "it is 7", "guess", (5, 6, 8), "length"),  # right to wrong
    rollout("it is 1", "it is 2", "say 4", (4, 4, 4)),  # wrong to wrong, leaks
]
FOUR = [s._replace(reward=Reward(v, {})) for s, v in zip(FOUR, (1.0, 0.25, -1.0, 0.0), strict=True)]
EXPECTED = {
    "student_accuracy": (2, 4), "baseline_accuracy": (2, 4), "accuracy_delta": (0, 4),
    "improvement_rate": (1, 4), "degradation_rate": (1, 4), "non_degradation_rate": (3, 4),
    "completion_rate": (3, 4), "response_token_reduction": (28 - 22, 28),
    "token_efficiency": (25.0, 20), "missing_frac": (1, 4), "malformed_frac": (0, 4),
    "answer_leak_frac": (1, 4), "probe_tokens": (12, 4),
}  # fmt: skip


def test_the_teaching_metrics_of_four_rollouts_by_hand():
    found = teaching_measures.of_teaching(FOUR) | teaching_measures.of_efficiency(FOUR)
    assert found == {f"teaching/{name}": value for name, value in EXPECTED.items()}


def test_texts_that_did_not_come_about_count_in_no_rate():
    failed = FOUR[0].completion._replace(token_ids=(), text="", finish_reason="error: x")
    lost = FOUR[0]._replace(completion=failed, teaching="", guided=failed)
    unknown = FOUR[0]._replace(question=Question("id", "?", "", {}))
    more = [s._replace(reward=Reward(None, {})) for s in (lost, unknown)]
    found = teaching_measures.of_teaching(FOUR + more) | teaching_measures.of_efficiency(
        FOUR + more
    )
    changed = {
        "token_efficiency": (25.0, 26), "missing_frac": (1, 5), "malformed_frac": (0, 5),
        "probe_tokens": (18, 6),
    }  # fmt: skip
    assert found == {f"teaching/{name}": value for name, value in (EXPECTED | changed).items()}


def test_the_teaching_metrics_of_several_answers_by_hand():
    sample = FOUR[0]._replace(
        further_baselines=(completion("it is 4", 20),),
        further_guided=(completion("it is 4", 8), completion("5", 4), completion("4", 4, "length")),
    )
    # Alone wrong, right: 1/2. With the lesson right, right, wrong, wrong (cut without a mark): 1/2.
    found = teaching_measures.of_teaching([sample, FOUR[1]._replace(
        further_baselines=(completion("no", 8),), further_guided=(completion("no", 6),),
        guided=FOUR[1].baseline,
    )])  # fmt: skip
    assert {name.removeprefix("teaching/"): value for name, value in found.items()} == {
        "student_accuracy": (1 / 2 + 1 / 2, 2), "baseline_accuracy": (1 / 2 + 1 / 2, 2),
        "accuracy_delta": (0, 2),
        "improvement_rate": (1 / 4, 2), "degradation_rate": (1 / 4, 2),
        "non_degradation_rate": (7 / 4, 2),
        "completion_rate": (3 / 4 + 1, 2),  # "no" is an answer too
        "response_token_reduction": (15 + 8 - (5 + 7), 15 + 8),
        "missing_frac": (1, 2), "malformed_frac": (0, 2), "answer_leak_frac": (0, 2),
        "probe_tokens": (6, 2),
    }  # fmt: skip


def scored(groups):
    """Returns samples with these rewards, a question for each group."""
    answer = completion("?", 1)
    return [
        Sample(QUESTION, answer, place=place, member=member, reward=reward)
        for place, group in enumerate(groups)
        for member, reward in enumerate(group)
    ]


def test_the_reward_metrics_by_hand():
    def result(score, a=None, b=None):
        return Reward(score, {"a": {"value": a}, "b": {"value": b}})

    results = [
        [result(1.0, 1.0, 0.0), result(0.0, 0.5, 0.0)],
        [result(None, None, 2.0), result(0.5, 0.5, 0.0)],
        [result(0.5, 0.5, 0.0), result(0.5, 0.5, 0.0)],
    ]
    samples = scored(results)
    found = measures.of_rewards(samples, ("a", "b"))
    spread = found.pop("reward/std")
    assert spread == (pytest.approx(np.sqrt(0.5)), 2)  # groups with two scores or more
    assert found == {
        "reward/mean": (2.5, 5), "reward/zero_std_group_frac": (1, 2),
        "reward/failed_frac": (1, 6), "reward/skipped_frac": (0, 6),
        "reward/no_honest_group_frac": (0, 3),
        "reward/a": (3.0, 5), "reward/b": (2.0, 6),
    }  # fmt: skip
    assert "reward/a" not in measures.of_rewards(samples, ("a",))


@pytest.mark.parametrize("size", range(2, 25))
def test_groups_of_equal_rewards_are_counted_whatever_their_size(size):
    """A standard deviation would miss 44 of these rewards at a size of 7, and 66 at 12."""
    groups = [[Reward(i / 100, {})] * size for i in range(1, 100)]
    groups.append([Reward(0.3, {})] * size + [Reward(0.3 + 1e-12, {})])
    groups.append([Reward(0.3, {}), Reward(None, {})])
    found = measures.of_rewards(scored(groups), ("a",))
    assert found["reward/zero_std_group_frac"] == (99, 100)


def test_the_generation_metrics_by_hand():
    def written(place, *completions):
        return [Sample(QUESTION, c, place=place) for c in completions]

    failed = completion("", 0, "error: x", prompt="")
    samples = [
        *written(0, completion("a", 2), completion("b", 2), completion("c", 4, "length", "long")),
        *written(1, failed, failed),
    ]
    assert measures.of_generation(samples, version=3) == {
        "rollout/completion_tokens": (8, 3), "rollout/prompt_tokens": (6, 3),
        "rollout/truncated_frac": (1, 5), "rollout/failed_frac": (2, 5),
        "rollout/text_repeat_frac": (1, 5), "rollout/version_lag_max": (3, 1),
        "rollout/version_lag": (24, 8),
        "rollout/version_lag_none_frac": (0, 3), "rollout/version_lag_one_frac": (0, 3),
        "rollout/version_lag_two_frac": (0, 3), "rollout/version_lag_more_frac": (3, 3),
    }  # fmt: skip
    assert measures.of_generation(written(0, failed), 3)["rollout/version_lag_max"] == (0, 0)


@pytest.mark.parametrize(
    ("option", "template", "message"),
    [
        ("student_with_teaching_template", "{question}", r"lacks \{teaching\}"),
        ("student_baseline_template", "{question} {teaching}", r"unknown field \{teaching\}"),
        ("student_diagnostic_template", "how?", r"lacks \{question\}"),
    ],
)
def test_templates_are_checked(option, template, message):
    fine = TeachingConfig(
        student_baseline_template="{question}",
        student_diagnostic_template="{question} {topic}",
        student_with_teaching_template="{question} {teaching}",
        teacher_template="{question} {approach} {topic}",
    )
    config = GRPOConfig(teaching=fine, rollout=RolloutConfig(question_fields=("topic",)))
    assert chat_models.make_protocol(config, 5).num_generations == 5
    wrong = dataclasses.replace(config, teaching=dataclasses.replace(fine, **{option: template}))
    with pytest.raises(ValueError, match=f"teaching.{option}.*{message}"):
        chat_models.make_protocol(wrong, 5)
