"""A student alone against the same student taught.

    atlas-evaluate --teacher DIR [--teacher DIR …] --student DIR --data FILE [--limit N]

Both answer the same questions greedily; the student answers alone once, and then with the lessons
of each teacher. Prints a table with 95 % intervals, McNemar's test of each teacher against the
student alone and of each two teachers, with p-values corrected by Holm's method for all of these
tests, and the number of questions that effects need. Three examples follow.

`--output` gets all of it as JSON: `student`; under `teachers`, in order, `teacher`, `questions`
asked and `compared`, `metrics` with their intervals, `improved`, `degraded`, `mcnemar_p`, `holm_p`,
`needed` and `samples` as in `rollouts/`; and under `comparisons` the same of each two teachers.
Templates and limits are those of `--config`, a GRPO run file.

    atlas-evaluate --effect 0.1

Without a teacher it says how many questions an effect of 10 points needs, by the share of questions
whose answers change, and asks no model.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

from atlas_jax import cli, masking, preflight, terminal
from atlas_jax import config as config_lib
from atlas_jax.config import GRPOConfig
from atlas_jax.files import write_whole
from atlas_jax.options.fields import is_reference
from atlas_jax.options.train import LoraOptions

if TYPE_CHECKING:
    from atlas_jax.types import Question, Sample

_CONFIG = cli.define_config("teacher_rcl")
_TEACHERS = flags.DEFINE_multi_string(
    "teacher", [], "Directory, .gguf file or hub id of a teacher; give it again for each teacher."
)
_STUDENT = flags.DEFINE_string("student", "", "The student.")
_DATA = flags.DEFINE_string(
    "data", "", "Questions with ground truth: JSONL, Parquet, hub id or package.module:function."
)
_LIMIT = flags.DEFINE_integer("limit", 0, "Questions asked, the first ones; 0 asks all.")
_OUTPUT = flags.DEFINE_string("output", "evaluation.json", "Where the JSON goes.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the bootstrap.")
_EFFECTS = flags.DEFINE_multi_float(
    "effect", [], "Gain in right answers, 0 to 1, of which to say how many questions it needs."
)
_QUIET = flags.DEFINE_bool("quiet", False, "Show warnings, errors and the tables alone.")
_JSON = flags.DEFINE_bool("json", False, "Write the result without samples to stdout as JSON.")

_CHANGED = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Shares of questions whose answers change, for which an effect's questions are counted."""


def main(argv: list[str]) -> None:
    """Evaluates and prints."""
    cli.no_more_words(argv[1:])
    wrong = next((effect for effect in _EFFECTS.value if not 0 < effect <= 1), None)
    if wrong is not None:
        raise cli.UsageError(f"--effect={wrong:g} must be above 0 and at most 1, such as 0.1")
    if _EFFECTS.value and not _TEACHERS.value:
        _plan(_EFFECTS.value)
        return
    for flag in (_TEACHERS, _STUDENT, _DATA):
        if not flag.value:
            raise cli.UsageError(f"--{flag.name} is needed; --help tells the flags")
    config = config_lib.freeze(cli.needed(_CONFIG), GRPOConfig)
    is_function = is_reference(_DATA.value) and "/" not in _DATA.value
    data = dataclasses.replace(
        config.data,
        dataset_path="" if is_function else _DATA.value,
        source=_DATA.value if is_function else "",
        db_url="",
        eval_path="",
    )
    config = dataclasses.replace(
        config,
        student_model=_STUDENT.value,
        output_dir=config.output_dir or "unused",
        offload="none",
        model=dataclasses.replace(config.model, lora=LoraOptions()),
        data=data,
        rollout=dataclasses.replace(config.rollout, backend="local", max_staleness=0),
    )
    configs = [dataclasses.replace(config, model_name_or_path=path) for path in _TEACHERS.value]
    mode = "quiet" if _QUIET.value else "auto"
    with terminal.opened(mode):
        report = run(
            configs, _LIMIT.value, _OUTPUT.value, _SEED.value, effects=_EFFECTS.value, mode=mode
        )
    if _JSON.value:
        short = [{k: v for k, v in t.items() if k != "samples"} for t in report["teachers"]]
        sys.stdout.write(json.dumps(report | {"teachers": short}, ensure_ascii=False) + "\n")


def _plan(effects: Sequence[float]) -> None:
    """Prints how many questions effects need, by the share of questions that change."""
    from atlas_jax.rollout import significance

    counts = {
        (effect, changed): significance.questions_needed(effect, changed)
        for effect in effects
        for changed in sorted({*_CHANGED, effect})
        if changed >= effect
    }
    if _JSON.value:
        rows = [{"effect": e, "changed": c, "questions": n} for (e, c), n in counts.items()]
        sys.stdout.write(json.dumps({"power": significance.POWER, "needed": rows}) + "\n")
        return
    lines = [f"{'effect':>12}  {'answers that change':>20}  {'questions':>10}"]
    lines += [
        f"{100 * effect:>+5.1f} points  {changed:>20.0%}  {'> 1e6' if n is None else f'{n:,}':>10}"
        for (effect, changed), n in counts.items()
    ]
    sys.stdout.write(f"{_meaning()}\n" + "\n".join(lines) + "\n")


def _meaning() -> str:
    from atlas_jax.rollout import significance

    return (
        f"questions for p < {significance.ALPHA:g} in {significance.POWER:.0%} of evaluations "
        "(exact McNemar test)"
    )


def run(
    configs: Sequence[GRPOConfig],
    limit: int,
    output: str,
    seed: int,
    *,
    effects: Sequence[float] = (),
    mode: str = "auto",
) -> dict[str, Any]:
    """Asks the questions of the data, prints the tables, writes `output` and returns its content.

    Args:
        configs: one for each teacher, in which nothing else differs.
        limit: questions asked; 0 asks all.
        output: path of the JSON.
        seed: of the bootstrap.
        effects: gains of which to say how many questions they need, besides the usual ones.
        mode: the option `terminal`.

    Raises:
        ValueError: for a model or data that cannot be used, before anything is asked.
        OSError: if `output` cannot be written.
    """
    masking.mask_logs()
    for each in configs:
        config_lib.validate(each)
        preflight.check_models(each)
    preflight.check_data(configs[0])
    preflight.check_output_file(output)
    from atlas_jax import devices
    from atlas_jax.rollout import evaluation, record

    devices.check()
    answers = _ask(configs, _questions(configs[0], limit), mode)
    results = [evaluation.report(samples, seed) for samples in answers]
    compared = evaluation.comparisons(answers, seed)
    evaluation.add_significance(results, compared, effects)
    teachers = [
        {
            "teacher": teacher_config.model_name_or_path,
            **result,
            "samples": [record.as_record(0, sample) for sample in samples],
        }
        for teacher_config, result, samples in zip(configs, results, answers, strict=True)
    ]
    report = {
        "student": configs[0].student_model if configs[0].student else None,
        "teachers": teachers,
        "comparisons": compared,
    }
    write_whole(output, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    parts = [
        evaluation.table(results, terminal.width()),
        evaluation.comparison_lines(compared),
        evaluation.needed_table(results, compared, _meaning()),
        evaluation.examples(answers),
    ]
    names = (f"teacher {i + 1}: {c.model_name_or_path}" for i, c in enumerate(configs))
    heads = ["evaluation", *(names if len(configs) > 1 else ())]
    terminal.result("\n".join(heads) + "\n\n" + "\n\n".join(filter(None, parts)))
    logging.info("written: %s", output)
    return report


def _questions(config: GRPOConfig, limit: int) -> list[Question]:
    from atlas_jax.data import sources
    from atlas_jax.data.questions import parse_questions
    from atlas_jax.rewards.truths import check_truths

    rows = sources.read_rows(config.data, config.data.source or config.data.dataset_path)
    fields = config.rollout.question_fields
    questions = parse_questions(
        rows, config.data.max_rejected_frac, True, fields, vars(config.data.columns)
    )
    questions = questions[: limit or None]
    check_truths(questions)
    return questions


def _ask(
    configs: Sequence[GRPOConfig], questions: Sequence[Question], mode: str
) -> list[list[Sample]]:
    """Returns the samples of each teacher; the student answers alone once."""
    from atlas_jax import display
    from atlas_jax.recipes import chat_models, grpo, local_backend
    from atlas_jax.rollout import evaluation
    from atlas_jax.rollout.sampling import Sampling
    from atlas_jax.rollout.student_cache import StudentCache
    from atlas_jax.startup.compute import Compute
    from atlas_jax.startup.model import open_frozen

    config = configs[0]
    protocol = chat_models.make_protocol(config, 1)
    computes = [Compute.of(teacher_config) for teacher_config in configs]
    models = [open_frozen(each, each.config.model_name_or_path) for each in computes]
    student = None
    if config.student:
        student = local_backend.load_student(config, grpo.open_student(config, computes[0]))
    answers: list[list[Sample]] = []
    cache = StudentCache(config.rollout.cache_student)
    for number, (each, model) in enumerate(zip(configs, models, strict=True), 1):
        logging.info(
            "teacher %d of %d, %d questions: %s",
            *(number, len(configs), len(questions), each.model_name_or_path),
        )
        policy = local_backend.load_chat_model(each, model, each.teaching.system_prompt)
        # A lesson and the answer with it; of the first teacher the answer alone and the approach.
        kept = number > 1 and config.rollout.cache_student != "never"
        kinds = 1 if student is None else 2 if kept else 4
        with display.texts(f"teacher {number}/{len(configs)}", kinds * len(questions), mode):
            samples = evaluation.ask(questions, policy, student, protocol, Sampling(0.0), cache)
        answers.append(samples)
    return answers


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    app.run(cli.guarded(main), flags_parser=cli.parse)
