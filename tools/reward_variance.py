"""Shows how much of a reward's variance is the lesson's, for each lever that may raise the share.

    python tools/reward_variance.py --config configs/run/quickstart_grpo.py --teacher DIR \
      --student DIR --data FILE --questions 40 --lessons 8 --answers 8

The teacher writes lessons to each question, and the student answers with each lesson and alone so
many times: once as the config says, and once greedily, with lessons that are drawn anew. Every
line of the table is a lever. `share` is the share of the variance of a reward that lies between the
lessons of one question; the rest is the luck of the student's answers. `compared` is the same after
the mean of each group has been taken off, as GRPO does: the luck of the answers alone, which the
lessons of a question have in common, is no noise there. `sd lesson`, `sd taught` and `sd alone` are
the standard deviations of the three parts, `equal` is the share of groups whose rewards are all
equal, and `reward` is the mean. A lever is worth a run if it raises `compared`, and `equal` little.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import _checkout  # noqa: F401  (comes first: see there)
import numpy as np
import reward_shares
from absl import app, flags, logging
from reward_shares import Lever, Shares

from atlas_jax import cli, preflight
from atlas_jax import config as config_lib
from atlas_jax.config import GRPOConfig
from atlas_jax.data import sources
from atlas_jax.data.questions import parse_questions
from atlas_jax.recipes import chat_models, grpo, local_backend, scoring
from atlas_jax.rewards.pricing import price_lessons
from atlas_jax.rollout import teaching
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import open_frozen
from atlas_jax.types import Sample, by_question

_CONFIG = cli.define_config("quickstart_grpo")
_TEACHER = flags.DEFINE_string("teacher", "", "Directory, .gguf file or hub id of the teacher.")
_STUDENT = flags.DEFINE_string("student", "", "The same of the student.")
_DATA = flags.DEFINE_string("data", "", "Questions with ground truth.")
_QUESTIONS = flags.DEFINE_integer("questions", 40, "Questions asked, the first ones.", 1)
_LESSONS = flags.DEFINE_integer("lessons", 8, "Lessons of each question.", 2)
_ANSWERS = flags.DEFINE_integer("answers", 8, "Answers with each lesson, and alone.", 2)


def main(argv: list[str]) -> None:
    """Asks, scores and prints the table."""
    cli.no_more_words(argv[1:])
    for flag in (_TEACHER, _STUDENT, _DATA):
        if not flag.value:
            raise cli.UsageError(f"--{flag.name} is needed; --help tells the flags")
    config = config_lib.freeze(cli.needed(_CONFIG), GRPOConfig)
    config = dataclasses.replace(
        config,
        model_name_or_path=_TEACHER.value,
        student_model=_STUDENT.value,
        output_dir=config.output_dir or "unused",
        num_generations=_LESSONS.value,
        data=dataclasses.replace(config.data, dataset_path=_DATA.value, eval_path=""),
        rollout=dataclasses.replace(config.rollout, backend="local", max_staleness=0),
    )
    config_lib.validate(config)
    preflight.check_models(config)
    preflight.check_data(config)
    drawn, greedy = _ask(config)
    levers = reward_shares.levers(_ANSWERS.value)
    rows = [
        (lever, *_measure(config, lever, greedy if lever.greedy else drawn)) for lever in levers
    ]
    print(reward_shares.table(rows))


def _ask(config: GRPOConfig) -> tuple[list[Sample], list[Sample]]:
    """Returns the samples of the questions, with drawn answers of the student and greedy ones."""
    rows = sources.read_rows(config.data, config.data.dataset_path)
    fields = config.rollout.question_fields
    questions = parse_questions(rows, config.data.max_rejected_frac, True, fields)
    questions = questions[: _QUESTIONS.value]
    compute = Compute.of(config)
    model = open_frozen(compute, config.model_name_or_path)
    teacher = local_backend.load_chat_model(config, model, config.teaching.system_prompt)
    student = local_backend.load_student(config, grpo.open_student(config, compute))
    found = []
    for temperature, answers in (
        (config.rollout.student_temperature or -1.0, _ANSWERS.value),
        (0.0, 1),
    ):
        rollout = dataclasses.replace(
            config.rollout, student_temperature=temperature, num_guided=answers,
            num_baseline=answers,
        )  # fmt: skip
        asked = dataclasses.replace(config, rollout=rollout)
        logging.info("%d questions, student_temperature=%g", len(questions), temperature)
        found.append(
            teaching.run(
                questions, range(len(questions)), teacher, student,
                chat_models.make_protocol(asked, _LESSONS.value), chat_models.make_draws(asked),
            )
        )  # fmt: skip
    return found[0], found[1]


def _measure(config: GRPOConfig, lever: Lever, samples: Sequence[Sample]) -> tuple[Shares, int]:
    """Returns the parts of the variance, and the number of questions whose samples have rewards."""
    options = dataclasses.replace(config.reward, **dict(lever.reward))
    rollout = dataclasses.replace(
        config.rollout,
        num_guided=lever.guided,
        num_baseline=lever.baseline,
        student_temperature=-1.0,
    )
    config = dataclasses.replace(config, reward=options, rollout=rollout)
    repeats = 1 if lever.greedy else len(samples[0].baselines) // max(lever.guided, lever.baseline)
    scored = []
    with contextlib.ExitStack() as stack:
        reward = scoring.make_reward(config, stack)
        for repeat in range(repeats):
            taken = [_taken(sample, lever, repeat) for sample in samples]
            priced = price_lessons(
                scoring.score(reward, taken), options.answer_leak_penalty,
                options.missing_lesson_penalty,
            )  # fmt: skip
            groups = by_question(priced)
            scored.append([[s.reward.value for s in group] for group in groups])
    values = np.asarray(scored, float).transpose(1, 2, 0)  # [questions, lessons, repeats]
    complete = values[np.isfinite(values).all((1, 2))]
    return reward_shares.of(complete), len(complete)


def _taken(sample: Sample, lever: Lever, repeat: int) -> Sample:
    """Returns a sample with the answers of one repetition."""
    size = max(lever.guided, lever.baseline)
    alone = sample.baselines[repeat * size :][: lever.baseline]
    guided = sample.guided_answers[repeat * size :][: lever.guided]
    if sample.guided is sample.baseline:  # no lesson
        guided = alone
    if not alone or not guided:  # a text failed, so that the others say nothing
        alone, guided = sample.baselines[:1], sample.guided_answers[:1]
    return sample._replace(
        baseline=alone[0], further_baselines=alone[1:], guided=guided[0], further_guided=guided[1:]
    )


if __name__ == "__main__":
    app.run(cli.guarded(main), flags_parser=cli.parse)
