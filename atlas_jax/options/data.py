"""Options of the training rows: where they come from, and how they become token sequences."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from atlas_jax.options.fields import (
    Fraction,
    Moved,
    NonNegativeInt,
    Positive,
    PositiveInt,
)


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Names of the columns that training reads, where the usual names are not used."""

    messages: str = ""
    """Name of the column with a conversation, for SFT; empty looks for the usual names."""
    prompt: str = ""
    """Name of the column with the given text, for SFT; empty looks for the usual names."""
    completion: str = ""
    """Name of the column with the text to learn, for SFT; empty looks for the usual names."""
    tools: str = ""
    """Name of the column with the tools that the assistant may call, for SFT; empty looks for the
    usual name."""
    question: str = ""
    """Name of the column with the question, for GRPO; empty looks for the usual names."""
    ground_truth: str = ""
    """Name of the column with the right answer, for GRPO; empty looks for the usual names."""


@dataclasses.dataclass(frozen=True)
class LessonsConfig:
    """Messages of the trained model, as SFT writes them and GRPO asks for them."""

    system_prompt: str = ""
    """System message of the trained model, put before the rows and questions that have none."""
    teacher_template: str = ""
    """User message that asks the teacher for a lesson. SFT fills the fields `{question}` and
    `{approach}` from `teaching` rows; in GRPO `{approach}` is what the student has just written."""
    lesson_template: str = ""
    """Assistant message that SFT makes of a `teaching` row, with the fields `{approach}`,
    `{diagnosis}` and `{teaching}`."""


@dataclasses.dataclass(frozen=True)
class SessionsConfig:
    """Sessions of the Atlas runtime that are read as rows."""

    db_url: str = ""
    """Address of the runtime's database, `postgresql://user:password@host:5432/name`; it replaces
    `data.dataset_path`."""
    refresh: bool = False
    """Reads the database again. Otherwise a run reads it once and keeps a snapshot."""
    statement_timeout_secs: Positive = 30.0
    """Seconds after which the database cancels a query."""
    max_sessions: NonNegativeInt = 0
    """Number of sessions that are read from the database, newest first; 0 reads all."""
    min_reward: float = 0.0
    """Lowest `reward_stats.score` of a session; 0 also takes sessions without a score."""
    status_filters: tuple[str, ...] = ()
    """Statuses of the sessions that are read, such as `succeeded`; an empty list takes all."""
    review_status_filters: tuple[str, ...] = ("approved",)
    """Review statuses of the sessions that are read; an empty list also takes pending and
    quarantined sessions."""
    learning_key: str = ""
    """Learning key of the sessions that are read; empty takes all."""
    created_after: str = ""
    """Earliest creation time of a session, inclusive, such as `2025-12-31` or with a time of day,
    in UTC; empty sets no limit."""
    created_before: str = ""
    """Latest creation time of a session, exclusive, in the form of `data.created_after`; empty sets
    no limit."""
    include_trajectory_events: bool = True
    """Reads the events of a session too. They hold the teacher's text where the session's steps do
    not."""
    answer_as_truth: bool = True
    """Uses the final answer of a session that succeeded and was approved as the ground truth, where
    the session records none."""


@dataclasses.dataclass(frozen=True)
class DataConfig(SessionsConfig):
    """Where training rows come from and how they become token sequences."""

    dataset_path: str = ""
    """Rows to train on: a file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.arrow`; text
    files may end in `.gz` or `.zst`), a pattern such as `data/*.jsonl`, a directory, a hub dataset
    (`owner/name`), or one file of a hub dataset (`owner/name:folder/file.jsonl`). Several are
    separated by commas."""
    dataset_config: str = ""
    """Subset of a hub dataset, such as `main` of `openai/gsm8k`."""
    dataset_split: str = "train"
    """Split of a hub dataset that is trained on. Files have no splits."""
    source: str = ""
    """Function of your own that returns the rows as dicts, `package.module:function`; it replaces
    `data.dataset_path`. With a parameter `split` it is called with `train`, and with `eval` for
    rows to evaluate on."""
    dataset_max_samples: NonNegativeInt = 0
    """Number of rows that are used, drawn at random with `seed`; 0 uses all."""
    format: Literal["auto", "messages", "prompt_completion", "teaching", "session"] = "auto"
    """Format of the rows; `auto` finds it from their columns. `session` (traces of the Atlas
    runtime) is never found by `auto`."""
    columns: ColumnsConfig = ColumnsConfig()
    eval_path: str = ""
    """Rows to evaluate on, in the forms of `data.dataset_path`; it takes precedence over
    `data.eval_split_ratio`."""
    eval_split: str = "test"
    """Split to evaluate on, where `data.eval_path` is a whole hub dataset."""
    eval_split_ratio: Fraction = 0.0
    """Share of the rows that is held out for evaluation, where `data.eval_path` is empty."""
    shuffle: bool = True
    """Draws a new order of the rows in every epoch; false keeps the order of the file."""
    completion_only: bool = True
    """Trains only on what the assistant writes; false trains on prompts too."""
    turns: Literal["each", "history"] = "each"
    """Examples of a conversation whose earlier turns the chat template changes (Qwen3): `each`
    makes one for every assistant turn, as the model sees it in use, at a cost that grows with the
    square of the conversation's length; `history` makes one example, in which earlier turns are
    trained in the form that the template gives them as history."""
    length_buckets: tuple[PositiveInt, ...] = (
        128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768,
    )  # fmt: skip
    """Row lengths in tokens that unpacked batches are padded to. Each length is compiled once."""
    max_rejected_frac: Fraction = 0.01
    """Share of rejected rows above which the run stops. Rejected are rows that cannot be read, that
    are empty, or that `max_seq_length` cuts or leaves without a trained token."""
    num_workers: PositiveInt = 2
    """Number of threads that assemble batches ahead of the training step."""
    system_prompt: Annotated[str | None, Moved("teaching.system_prompt")] = None
    teacher_template: Annotated[str | None, Moved("teaching.teacher_template")] = None
    lesson_template: Annotated[str | None, Moved("teaching.lesson_template")] = None

    def check(self) -> None:
        """Checks the options together.

        Raises:
            ValueError: names the options, their values and what to write instead.
        """
        names = [n for n in ("dataset_path", "db_url", "source") if getattr(self, n)]
        if len(names) != 1:
            what = "data.dataset_path, data.db_url and data.source are empty; set one of them with "
            what += "--config.data.…=…"
            if names:
                what = f"{' and '.join(f'data.{n}' for n in names)} are all set; leave one, and "
                what += f"empty the other with --config.data.{names[0]}=none"
            raise ValueError(what)
        if self.source and self.format == "session":
            raise ValueError(
                f"data.source={self.source} gives rows, and data.format=session is read from "
                "files; use another data.format, or data.dataset_path"
            )
