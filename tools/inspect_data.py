"""Shows what a run would train on: `python tools/inspect_data.py CONFIG [--config.key=value …]`.

CONFIG is that of the run, such as configs/run/teacher_sft.py:data=runtime_pg. Prints how many
sessions there are by status, review and reward, what is rejected and why, and five examples as the
model sees them, with what is trained in ⟦⟧. Reads a database afresh and keeps nothing.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import _checkout  # noqa: F401  (comes first: see there)
from absl import app

from atlas_jax import cli
from atlas_jax import config as config_lib
from atlas_jax.config import DataConfig, GKDConfig, GRPOConfig, TrainConfig
from atlas_jax.data import chat, loader, questions, session_rows, sources
from atlas_jax.data.chat_template import ChatTemplate, read_options
from atlas_jax.data.sources import Rows
from atlas_jax.traces import files
from atlas_jax.traces.query import score_of
from atlas_jax.traces.schema import AtlasSessionTrace

_CONFIG = cli.define_config()
_NUM_SHOWN = 5


def main(argv: list[str]) -> None:
    """Prints the report."""
    cli.no_more_words(argv[1:])
    config = config_lib.freeze(cli.needed(_CONFIG))
    data = config.data
    if data.db_url or data.format == "session":
        print_counts(data)
    with tempfile.TemporaryDirectory() as folder:
        if data.db_url:
            session_rows.check_sessions(data, folder)
            session_rows.take_snapshot(data, folder)
        loose = dataclasses.replace(data, max_rejected_frac=1.0)
        rows, held_out = sources.load_rows(loose, config.seed, folder)
    print(f"{len(rows.rows)} rows to train on, {len(held_out.rows) if held_out else 0} held out")
    print(f"{len(rows.rejected)} rejected")
    for reason in rows.rejected[:20]:
        print(f"  {reason}")
    config = dataclasses.replace(config, data=loose)
    show: dict[str, Callable[[Any, Rows], None]] = {
        "sft": print_examples,
        "grpo": print_questions,
        "gkd": print_continuations,
    }
    show[config.algorithm](config, rows)


def print_counts(config: DataConfig) -> None:
    """Prints the sessions of the source by status, review and reward, whatever the filters."""
    tables: dict[str, Counter[str]] = {
        "status": Counter(),
        "review": Counter(),
        "reward": Counter(),
    }
    for session in all_sessions(config):
        metadata = session.session_metadata
        score = score_of(metadata.get("reward_stats"))
        tables["status"][str(metadata["status"])] += 1
        tables["review"][metadata["review_status"]] += 1
        tables["reward"]["none" if score is None else f"{int(score * 5) / 5:.1f} and up"] += 1
    for name, counts in tables.items():
        print(name)
        for value, count in sorted(counts.items()):
            print(f"  {value:<16}{count:>8}")


def all_sessions(config: DataConfig) -> Iterator[AtlasSessionTrace]:
    """Yields every session of the source that can be read."""
    if config.db_url:
        from atlas_jax import training_data  # needs the client of a database

        yield from training_data.iter_training_sessions(
            config.db_url, include_trajectory_events=False
        )
        return
    for part in sources.parts_of(config.dataset_path):
        for _, session in files.read(part):
            if isinstance(session, AtlasSessionTrace):
                yield session


def print_examples(config: TrainConfig, rows: Rows) -> None:
    """Prints conversations as the tokenizer renders them."""
    # What imports JAX comes late: questions and counts need none.
    from atlas_jax.checkpoint import hf
    from atlas_jax.startup import model as models

    path = hf.resolve(config.model_name_or_path)
    tokenizer = models.load_tokenizer(config.tokenizer_name_or_path or path)
    template = ChatTemplate(tokenizer, read_options(config.chat_template_kwargs))
    stop_ids = models.stop_ids(hf.open_source(path), tokenizer)
    dataset = loader.build(rows, config, template, loader.HostRows(1), stop_ids)
    report = dataset.report
    print(f"{report.examples} examples, {report.tokens} tokens, {report.trained_tokens} trained")
    for i in range(min(_NUM_SHOWN, report.examples)):
        print(f"--- example {i}\n{chat.render_sample(tokenizer, dataset.example(i))}")


def print_continuations(config: GKDConfig, rows: Rows) -> None:
    """Prints examples, or what a lesson turned right with what both sides read before it."""
    if config.teacher_reads == "prompt":
        print_examples(config, rows)
        return
    from atlas_jax.checkpoint import hf
    from atlas_jax.rollout import continuations
    from atlas_jax.startup import model as models

    path = hf.resolve(config.model_name_or_path)
    tokenizer = models.load_tokenizer(config.tokenizer_name_or_path or path)
    texts = continuations.of_samples(rows, 1.0, config.max_seq_length)
    print(f"{len(texts)} answers that a lesson turned right")
    for i, text in enumerate(texts[:_NUM_SHOWN]):
        parts = map(tokenizer.decode, (text.prompt_ids, text.teacher_prompt_ids, text.token_ids))
        print(f"--- policy {i}\n{next(parts)}\n--- teacher\n{next(parts)}\n--- both\n{next(parts)}")


def print_questions(config: GRPOConfig, rows: Rows) -> None:
    """Prints questions with their ground truth and fields."""
    found = questions.parse_questions(
        rows,
        1.0,
        config.reward.needs_truth(),
        config.rollout.question_fields,
        vars(config.data.columns),
    )
    print(f"{len(found)} questions")
    for question in found[:_NUM_SHOWN]:
        print(f"--- {question.id}\n{question.text}\n--- ground truth\n{question.ground_truth}")
        for name in config.rollout.question_fields:
            print(f"--- {name}\n{question.fields[name]}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--config={sys.argv[1]}"
    app.run(cli.guarded(main), flags_parser=cli.parse)
