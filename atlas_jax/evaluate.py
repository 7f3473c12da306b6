"""A student alone against the same student taught.

    python -m atlas_jax.evaluate --teacher DIR --student DIR --data FILE [--limit N]

Both answer the same questions greedily. Prints a table with 95 % intervals and three examples, and
writes all of it as JSON. Templates and limits are those of `--config`, a GRPO run file.
"""

from __future__ import annotations

import dataclasses
import json

from absl import app, flags, logging
from ml_collections import config_flags

from atlas_jax import cli
from atlas_jax import config as config_lib
from atlas_jax.config import GRPOConfig
from atlas_jax.files import write_whole

_CONFIG = config_flags.DEFINE_config_file("config", "configs/run/teacher_rcl.py", "GRPO run file.")
_TEACHER = flags.DEFINE_string("teacher", "", "Directory, .gguf file or hub id of the teacher.")
_STUDENT = flags.DEFINE_string("student", "", "The student.")
_DATA = flags.DEFINE_string("data", "", "Questions with ground truth: JSONL, Parquet or hub id.")
_LIMIT = flags.DEFINE_integer("limit", 0, "Questions asked, the first ones; 0 asks all.")
_OUTPUT = flags.DEFINE_string("output", "evaluation.json", "Where the JSON goes.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the bootstrap.")


def main(argv: list[str]) -> None:
    """Evaluates and prints."""
    if argv[1:] or not (_TEACHER.value and _STUDENT.value and _DATA.value):
        raise ValueError(
            f"--teacher, --student and --data are needed, and nothing else: {argv[1:]}"
        )
    config = config_lib.freeze(_CONFIG.value)
    if not isinstance(config, GRPOConfig):
        raise ValueError(f"--config has algorithm={config.algorithm!r}; use a GRPO run file")
    data = dataclasses.replace(config.data, dataset_path=_DATA.value, db_url="", eval_path="")
    config = dataclasses.replace(
        config,
        model_name_or_path=_TEACHER.value,
        student_model=_STUDENT.value,
        output_dir=config.output_dir or "unused",
        data=data,
        rollout=dataclasses.replace(config.rollout, backend="local", max_staleness=0),
    )
    config_lib.validate(config)
    run(config, _LIMIT.value, _OUTPUT.value, _SEED.value)


def run(config: GRPOConfig, limit: int, output: str, seed: int) -> None:
    """Asks the questions of `config.data`, prints the table and writes `output`."""
    from atlas_jax.data import sources
    from atlas_jax.data.questions import parse_questions
    from atlas_jax.recipes import grpo, setup, speakers
    from atlas_jax.rollout import evaluation, record
    from atlas_jax.rollout.sampling import Sampling
    from atlas_jax.types import RewardResult

    protocol = speakers.protocol(config, 1)
    rows = sources.read_rows(config.data, config.data.dataset_path)
    fields = config.rollout.question_fields
    questions = parse_questions(rows, config.data.max_rejected_frac, True, fields)
    questions = questions[: limit or None]
    sharding = setup.make_sharding(config)
    teacher = grpo.open_speaker(
        config, config.model_name_or_path, config.data.system_prompt, sharding
    )
    student = grpo.open_student(config, sharding)
    rollouts = evaluation.ask(questions, teacher, student, protocol, Sampling(0.0))
    result = evaluation.report(rollouts, seed)
    logging.info("\n%s\n\n%s", evaluation.table(result), evaluation.examples(rollouts))
    unscored = RewardResult(None, {})
    result["samples"] = [
        record.as_record(0, 0, record.Sample(r, unscored, 0.0, False)) for r in rollouts
    ]
    write_whole(output, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    logging.info("written: %s", output)


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    app.run(cli.guarded(main), flags_parser=cli.parse)
