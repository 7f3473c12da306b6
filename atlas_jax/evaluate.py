"""A student alone against the same student taught.

    atlas-evaluate --teacher DIR [--teacher DIR] --student DIR --data FILE [--limit N]

Both answer the same questions greedily; the student answers alone once, and then with the lessons
of each teacher. Prints a table with 95 % intervals and three examples, and writes all of it as
JSON: `student`, and under `teachers`, in order, `teacher`, `questions` asked and `compared`,
`metrics` with their intervals, `improved`, `degraded`, `mcnemar_p` and `samples` as in `rollouts/`.
Templates and limits are those of `--config`, a GRPO run file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from absl import app, flags, logging

from atlas_jax import cli, masking, preflight, sockets
from atlas_jax import config as config_lib
from atlas_jax.config import GRPOConfig
from atlas_jax.files import write_whole

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


def main(argv: list[str]) -> None:
    """Evaluates and prints."""
    cli.no_more_words(argv[1:])
    for flag in (_TEACHERS, _STUDENT, _DATA):
        if not flag.value:
            raise cli.UsageError(f"--{flag.name} is needed; --help tells the flags")
    config = config_lib.freeze(cli.needed(_CONFIG), GRPOConfig)
    is_function = sockets.is_reference(_DATA.value) and "/" not in _DATA.value
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
        data=data,
        rollout=dataclasses.replace(config.rollout, backend="local", max_staleness=0),
    )
    configs = [dataclasses.replace(config, model_name_or_path=path) for path in _TEACHERS.value]
    run(configs, _LIMIT.value, _OUTPUT.value, _SEED.value)


def run(configs: Sequence[GRPOConfig], limit: int, output: str, seed: int) -> None:
    """Asks the questions of the data, prints the table and writes `output`.

    Args:
        configs: one for each teacher, in which nothing else differs.
        limit: questions asked; 0 asks all.
        output: path of the JSON.
        seed: of the bootstrap.

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
    from atlas_jax.data import sources
    from atlas_jax.data.questions import parse_questions
    from atlas_jax.recipes import chat_models, grpo, local_backend
    from atlas_jax.rewards.truths import check_truths
    from atlas_jax.rollout import evaluation, record
    from atlas_jax.rollout.sampling import Sampling
    from atlas_jax.rollout.student_cache import StudentCache
    from atlas_jax.startup.compute import Compute
    from atlas_jax.startup.model import open_frozen
    from atlas_jax.types import Sample

    devices.check()
    config = configs[0]
    protocol = chat_models.make_protocol(config, 1)
    rows = sources.read_rows(config.data, config.data.source or config.data.dataset_path)
    fields = config.rollout.question_fields
    questions = parse_questions(
        rows, config.data.max_rejected_frac, True, fields, vars(config.data.columns)
    )
    questions = questions[: limit or None]
    check_truths(questions)
    computes = [Compute.of(teacher_config) for teacher_config in configs]
    models = [open_frozen(each, each.config.model_name_or_path) for each in computes]
    student = None
    if config.student:
        student = local_backend.load_student(config, grpo.open_student(config, computes[0]))
    answers: list[list[Sample]] = []
    cache = StudentCache(config.rollout.cache_student)
    for teacher_config, model in zip(configs, models, strict=True):
        logging.info("teacher %d: %s", len(answers) + 1, teacher_config.model_name_or_path)
        answers.append(
            evaluation.ask(
                questions,
                local_backend.load_chat_model(
                    teacher_config, model, teacher_config.teaching.system_prompt
                ),
                student,
                protocol,
                Sampling(0.0),
                cache,
            )
        )
    results = [evaluation.report(samples, seed) for samples in answers]
    teachers = [
        {
            "teacher": teacher_config.model_name_or_path,
            **result,
            "samples": [record.as_record(0, sample) for sample in samples],
        }
        for teacher_config, result, samples in zip(configs, results, answers, strict=True)
    ]
    report = {"student": config.student_model if student else None, "teachers": teachers}
    write_whole(output, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    logging.info("\n%s\n\n%s", evaluation.table(results), evaluation.examples(answers))
    logging.info("written: %s", output)


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    app.run(cli.guarded(main), flags_parser=cli.parse)
