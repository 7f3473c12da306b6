"""Baseline against taught answers: how large the difference is, and how sure."""

import itertools
import json
import math

import pytest

from atlas_jax.rollout import evaluation
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.student_cache import StudentCache
from atlas_jax.types import Completion, Question
from tests.rollout.scripts import Script, protocol

GREEDY = Sampling(0.0)


# What the student answers alone and with its lesson, and what is right.
CASES = {
    "helped": ("1", "4", "4"), "harmed": ("5", "6", "5"), "kept": ("7", "7", "7"),
    "lost": ("8", "9", "3"), "long": ("2", "2", "2"),
}  # fmt: skip


def ask(names, room=1000, missing="none", lesson="think", cache=None, seen=None):
    """Returns the rollouts of questions that are named as the cases are; `seen` gets prompts."""

    def pupil(prompt, member):
        alone, taught, _ = next(CASES[name] for name in CASES if name in prompt)
        return "how" if prompt.startswith("probe") else taught if "with" in prompt else alone

    def tutor(prompt, member):
        return "nothing" if "kept" in prompt else f"<teaching>{lesson}</teaching>"

    asked = [Question(f"{i}", name, CASES[name][2], {}) for i, name in enumerate(names)]
    student = Script(pupil, context=room)
    how = protocol(missing, size=1)
    found = evaluation.ask(asked, Script(tutor).model, student.model, how, GREEDY, cache)
    if seen is not None:
        seen.extend(student.prompts)
    return found


def test_the_report_of_four_questions_by_hand():
    result = evaluation.report(ask(["helped", "harmed", "kept", "lost"]))
    values = {name: interval["value"] for name, interval in result["metrics"].items()}
    assert values == {
        "student_accuracy": 0.5, "baseline_accuracy": 0.5, "accuracy_delta": 0.0,
        "improvement_rate": 0.25, "degradation_rate": 0.25, "non_degradation_rate": 0.75,
        "completion_rate": 1.0, "response_token_reduction": 0.0, "missing_frac": 0.25,
        "malformed_frac": 0.0,
        "answer_leak_frac": 0.0, "probe_tokens": 4.0,
    }  # fmt: skip
    counts = {
        name: result[name]
        for name in ("questions", "compared", "improved", "degraded", "mcnemar_p")
    }
    assert counts == {"questions": 4, "compared": 4, "improved": 1, "degraded": 1, "mcnemar_p": 1.0}
    assert json.loads(json.dumps(result)) == result


def test_the_summary_is_the_values_of_the_report():
    rollouts = ask(["helped", "harmed", "kept", "lost"])
    values = {k: v["value"] for k, v in evaluation.report(rollouts)["metrics"].items()}
    assert evaluation.summary(rollouts, taught=True) == values


def test_what_did_not_come_about_is_no_change():
    """Where the student's prompt with the lesson does not fit, nothing was degraded."""
    rollouts = ask(["harmed", "helped", "harmed"], room=len("with think: helped") + 30)
    harmed = rollouts[0]._replace(guided=Completion((), (), (), (), "error: x", "", -1))
    result = evaluation.report([harmed, *rollouts[1:]])
    assert (result["improved"], result["degraded"]) == (1, 1)
    assert result["metrics"]["degradation_rate"]["value"] == 0.5


def test_a_question_without_a_lesson_does_not_hide_the_others():
    result = evaluation.report(ask(["kept", "helped", "helped"], missing="unscored"))
    assert (result["improved"], result["degraded"]) == (2, 0)
    assert result["metrics"]["student_accuracy"]["value"] == 1.0
    assert result["metrics"]["missing_frac"]["value"] == pytest.approx(1 / 3)


def test_intervals_hold_the_value_and_narrow_with_more_questions():
    widths = []
    for copies in (4, 16, 64):
        rollouts = ask(["helped", "harmed", "kept", "lost"] * copies)
        found = evaluation.intervals(rollouts)
        for interval in found.values():
            assert interval.low <= interval.value <= interval.high
        widths.append(found["student_accuracy"].high - found["student_accuracy"].low)
    for wide, narrow in itertools.pairwise(widths):
        assert narrow == pytest.approx(wide / 2, rel=0.3)
    # The normal approximation of a share of one half among 256.
    assert widths[-1] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(256), rel=0.15)


def test_intervals_follow_from_their_seed():
    rollouts = ask(["helped", "harmed", "kept", "lost"] * 8)
    assert evaluation.intervals(rollouts, 1) == evaluation.intervals(rollouts, 1)
    assert evaluation.intervals(rollouts, 1) != evaluation.intervals(rollouts, 2)


def test_a_certain_result_has_no_width():
    assert evaluation.intervals(ask(["kept"] * 5))["student_accuracy"] == (1.0, 1.0, 1.0)


def test_direct_answers_have_an_accuracy():
    asked = [Question(str(i), f"q{i}", str(i % 2), {}) for i in range(8)]
    how = protocol(size=1)
    rollouts = evaluation.ask(asked, Script(lambda *_: "1").model, None, how, GREEDY)
    result = evaluation.report(rollouts)
    assert evaluation.summary(rollouts, taught=False) == {"accuracy": 0.5}
    assert result["metrics"]["accuracy"]["value"] == 0.5
    assert "mcnemar_p" not in result
    assert "McNemar" not in evaluation.table([result])
    assert "accuracy" in evaluation.table([result])


def test_the_table_shows_each_metric_and_the_test():
    result = evaluation.report(ask(["helped"] * 5 + ["kept"] * 3))
    lines = evaluation.table([result]).splitlines()
    assert lines[0].split() == ["metric", "value", "95", "%", "interval"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:-1]}
    assert set(rows) == set(result["metrics"])
    low, high = (result["metrics"]["baseline_accuracy"][k] for k in ("low", "high"))
    assert rows["baseline_accuracy"] == ["0.375", f"{low:.3f}", "to", f"{high:.3f}"]
    assert lines[-1] == "wrong to right 5, right to wrong 0 of 8: McNemar p = 0.0625"


def test_examples_show_first_what_helped_then_what_harmed():
    shown = evaluation.examples([ask(["kept", "lost", "harmed", "helped"])]).split("\n\n")
    assert [block.splitlines()[0].split()[-1] for block in shown] == ["helped", "harmed", "kept"]
    assert [line.strip() for line in shown[0].splitlines()] == [
        "question: helped", "truth: 4", "alone: 1", "lesson: think", "answer: 4",
    ]  # fmt: skip
    assert "lesson: (none) nothing" in shown[2]


def test_long_texts_are_cut_in_examples():
    (rollout,) = ask(["helped"])
    shown = evaluation.examples([[rollout._replace(teaching="word " * 100)]])
    (line,) = [line for line in shown.splitlines() if "lesson:" in line]
    assert len(line) == len("   lesson: ") + 200
    assert line.endswith("…")


@pytest.mark.parametrize("keep", ["greedy", "always", "never"])
def test_a_second_teacher_does_not_ask_the_student_alone_again(keep):
    names = ["helped", "harmed", "long"]
    cache, seen = StudentCache(keep), []
    ask(names, cache=cache)
    second = ask(names, lesson="look", cache=cache, seen=seen)
    alone = [f"{kind} {name}" for kind in ("alone", "probe") for name in names]
    assert seen == alone * (keep == "never") + [f"with look: {name}" for name in names]
    assert second == ask(names, lesson="look")
    assert cache.counts() == (6 * (keep != "never"), 12)
    assert cache.counts() == (0, 0)


def test_teachers_stand_beside_each_other():
    """The first one helps once and harms once; the second one harms and does not help."""
    first = ask(["kept", "helped", "harmed"])
    second = ask(["kept", "harmed", "lost"])
    results = [evaluation.report(first), evaluation.report(second)]
    lines = evaluation.table(results).splitlines()
    assert " ".join(lines[0].split()) == "metric teacher 1 95 % interval teacher 2 95 % interval"
    found = {line.split()[0]: line.split() for line in lines[1:-2]}
    for name, words in found.items():
        wanted = [f"{result['metrics'][name]['value']:.3f}" for result in results]
        assert [words[1], words[5]] == wanted
    assert found["improvement_rate"][1::4] == ["0.333", "0.000"]
    assert lines[-2].startswith("teacher 1: wrong to right 1, right to wrong 1 of 3")
    assert lines[-1].startswith("teacher 2: wrong to right 0, right to wrong 1 of 3")


def test_examples_follow_the_last_teacher_and_show_all():
    lazy = [r._replace(teaching="", guided=r.baseline) for r in ask(["harmed", "helped"])]
    shown = evaluation.examples([lazy, ask(["harmed", "helped"])]).split("\n\n")
    assert [line.strip() for line in shown[0].splitlines()] == [
        "question: helped", "truth: 4", "alone: 1",
        "teacher 1:", "lesson: (none) <teaching>think</teaching>", "answer: 1",
        "teacher 2:", "lesson: think", "answer: 4",
    ]  # fmt: skip
    other = evaluation.examples([ask(["harmed", "helped"]), lazy]).split("\n\n")
    assert other[0].splitlines()[0].endswith("question: harmed"), "the last one does no harm"


def test_examples_of_direct_answers_have_no_lesson():
    asked = [Question("0", "q0", "1", {})]
    how = protocol(size=1)
    speakers = Script(lambda *_: "1").model, Script(lambda *_: "2").model
    answers = [evaluation.ask(asked, speaker, None, how, GREEDY) for speaker in speakers]
    failed = Completion((), (), (), (), "error: x", "", -1)
    answers.append([answers[0][0]._replace(completion=failed)])
    assert [line.strip() for line in evaluation.examples(answers).splitlines()] == [
        "question: q0", "truth: 1", "teacher 1:", "answer: 1", "teacher 2:", "answer: 2",
        "teacher 3:", "answer: (error: x)",
    ]  # fmt: skip


def test_a_teacher_that_wrote_no_lesson_leaves_nothing_to_compare():
    result = evaluation.report(ask(["kept", "kept"], missing="unscored"))
    assert result["compared"] == 0
    assert result["metrics"]["student_accuracy"] == {"value": None, "low": None, "high": None}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    lines = evaluation.table([result]).splitlines()
    assert ["student_accuracy", "-", "-", "to", "-"] in [line.split() for line in lines]
    assert lines[-1] == "wrong to right 0, right to wrong 0 of 0: McNemar p = 1"


def test_teachers_are_compared_with_each_other_and_p_is_corrected_for_all_tests():
    """The first one helps with 2 of 10 questions, the second one with 8, and harms none."""
    names = ["helped"] * 8 + ["kept"] * 2
    second = ask(names)
    first = [r._replace(guided=r.baseline, teaching="") for r in second[:6]] + second[6:]
    answers = [first, second]
    results = [evaluation.report(samples) for samples in answers]
    compared = evaluation.comparisons(answers)
    evaluation.add_significance(results, compared, [0.3])
    (pair,) = compared
    assert (pair["first"], pair["second"]) == (1, 2)
    assert (pair["compared"], pair["improved"], pair["degraded"]) == (10, 6, 0)
    assert pair["difference"]["value"] == 0.6
    # p = 2 / 2^8, 2 / 2^6 and 2 / 2^2, times 3, 2 and 1.
    assert results[1]["holm_p"] == pytest.approx(3 * 2 / 256)
    assert pair["holm_p"] == pytest.approx(2 * 2 / 64)
    assert results[0]["holm_p"] == pytest.approx(0.5)
    assert pair["needed"]["seen"]["effect"] == 0.6
    assert [each["effect"] for each in pair["needed"]["effects"]] == [0.05, 0.1, 0.157, 0.3]
    assert json.loads(json.dumps([*results, *compared], allow_nan=False)) == [*results, *compared]
    line, test = evaluation.comparison_lines(compared).splitlines()
    assert line.startswith("teacher 2 against 1: +60.0 points (+")
    assert test == "  wrong to right 6, right to wrong 0 of 10: McNemar p = 0.0312, Holm p = 0.0625"
    assert "McNemar p = 0.5, Holm p = 0.5" in evaluation.table(results)
    title, head, *lines = evaluation.needed_table(results, compared, "title").splitlines()
    assert title == "title" and head.split() == [
        "changed", "as", "seen", "+5.0", "+10.0", "+15.7", "+30.0", "points"
    ]  # fmt: skip
    assert [" ".join(line.split()[:5]) for line in lines] == [
        "teacher 1 against alone 20%", "teacher 2 against alone 80%", "teacher 2 against 1 60%"
    ]  # fmt: skip
    assert all(len(line) <= 100 for line in (head, *lines))


def test_of_answers_that_did_not_change_nothing_is_planned():
    results = [evaluation.report(ask(["kept"] * 3))]
    evaluation.add_significance(results, [])
    assert results[0]["holm_p"] == 1.0 and "needed" not in results[0]
    assert evaluation.needed_table(results, [], "title") == ""


def test_direct_answers_of_two_models_are_compared():
    asked = [Question(str(i), f"q{i}", str(i % 2), {}) for i in range(8)]
    how = protocol(size=1)
    ways = (lambda *_: "1"), (lambda prompt, *_: str(int(prompt[-1]) % 2))
    answers = [evaluation.ask(asked, Script(way).model, None, how, GREEDY) for way in ways]
    (pair,) = evaluation.comparisons(answers)
    assert (pair["compared"], pair["improved"], pair["degraded"]) == (8, 4, 0)
    results = [evaluation.report(samples) for samples in answers]
    evaluation.add_significance(results, [pair])
    assert pair["holm_p"] == pytest.approx(2 / 16)
    assert "holm_p" not in results[0]


def test_a_narrow_terminal_has_the_teachers_below_each_other():
    results = [evaluation.report(ask(["helped", "kept"])) for _ in range(3)]
    for width in (60, 90, 200):
        lines = evaluation.table(results, width).splitlines()
        assert sum(line.startswith("metric") for line in lines) == {60: 3, 90: 2, 200: 1}[width]
        rows = [line for line in lines if "McNemar" not in line]
        assert max(map(len, rows)) <= width
