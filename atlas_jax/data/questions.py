"""Questions for GRPO and for evaluation: their fields in rows, and their order.

| part of a question | fields, the first that a row has |
|---|---|
| question | `prompt`, `problem_text`, `question`, `problem`, `instruction`, `query`, `input` |
| ground truth | `ground_truth`, `answer`, `solution` |

The `input` or `context` of an `instruction` is appended to it. Templates may use all other fields
that are texts or numbers. A prompt may be a list of messages, see `shapes`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from atlas_jax.data.examples import check_encodable, check_template
from atlas_jax.data.sources import QUESTIONS, Row, Rows, check_rejected, epoch_order, unfold
from atlas_jax.options.fields import flat
from atlas_jax.options.grpo import GRPOConfig
from atlas_jax.types import Question

_QUESTION = ("prompt", "problem_text", "question", "problem", "instruction", "query", "input")
_GROUND_TRUTH = ("ground_truth", "answer", "solution")
_HIDDEN = re.compile(r"ground_truth|answer|solution")  # never shown to a model


def parse_questions(
    rows: Rows,
    max_rejected_frac: float,
    needs_truth: bool,
    needed_fields: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
) -> list[Question]:
    """Returns a question for each row; for a session, one for each step with a ground truth.

    Args:
        rows: the rows of the dataset.
        max_rejected_frac: the fraction of unusable rows above which the run stops.
        needs_truth: whether a row without ground truth is unusable.
        needed_fields: further fields for templates, without which a row is unusable.
        columns: the rows' names of fields, by our names (`shapes.renamed`).

    Raises:
        ValueError: if templates must not use a needed field, too many rows are unusable, or none is
            left.
    """
    for name in needed_fields:
        if _HIDDEN.search(name) or name in _QUESTION:
            raise ValueError(
                f"rollout.question_fields has {name!r}; the question is {{question}} in templates, "
                "and answers are never shown to a model; leave it out, or rename the field"
            )
    rows = unfold(rows, QUESTIONS, "ground_truth" if needs_truth else "")
    questions = []
    rejected = []
    for row in rows.rows:
        try:
            questions.append(to_question(row, needs_truth, needed_fields, columns))
        except ValueError as error:
            rejected.append(f"{row.name}: {error}")
    check_rejected(rejected, len(rows.rows), max_rejected_frac)
    if not questions:
        first = f"; the first: {rejected[0]}" if rejected else ""
        raise ValueError(f"the dataset has no usable question; look at data.dataset_path{first}")
    if rejected:
        from atlas_jax.wording import shorten  # for what is wrong

        shown = "; ".join(shorten(rejected, 5))
        logging.warning("%d of %d questions are left out: %s", len(rejected), len(rows.rows), shown)
    return questions


def to_question(
    row: Row,
    needs_truth: bool,
    needed_fields: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
) -> Question:
    """Returns one row as a question; the arguments are those of `parse_questions`.

    Raises:
        ValueError: if a part is missing; the message does not name the row.
    """
    fields = _fields(row.fields, columns or {})
    named = bool(columns and columns.get("question"))
    question = _first(fields, ("question",) if named else _QUESTION)
    truth = _first(fields, _GROUND_TRUTH)
    if not question:
        raise ValueError(
            f"has no question; it has {', '.join(fields) or 'no fields'}; name the text one of "
            f"{', '.join(_QUESTION)}"
        )
    if needs_truth and not truth:
        raise ValueError(
            "has no ground truth, which the reward needs; add one of "
            f"{', '.join(_GROUND_TRUTH)}, a text or a number, or choose another reward; it has "
            f"{', '.join(fields)}"
        )
    check_encodable(question, "its question")
    check_encodable(truth, "its ground truth")
    shown = {
        k: str(v)
        for k, v in fields.items()
        if isinstance(v, str | int | float) and not _HIDDEN.search(k) and k not in _QUESTION
    }
    for name in needed_fields:
        if name not in shown:
            raise ValueError(f"lacks the field {name!r} of rollout.question_fields; add it")
    return Question(
        id=_text(fields.get("id", "")) or row.name,
        text=question,
        ground_truth=truth,
        fields=shown,
        row=row.fields,
    )


def check_templates(config: GRPOConfig) -> None:
    """Checks the templates of the protocol.

    Raises:
        ValueError: if a template has an unknown field, or a needed one is missing.
    """
    rollout = config.rollout
    fields = ("question", *rollout.question_fields)
    checks: dict[str, tuple[str, ...]]
    if not rollout.has_student:
        checks = {"rollout.direct_template": ()} if rollout.protocol == "direct" else {}
    else:
        checks = {
            "teaching.student_baseline_template": (),
            "teaching.student_diagnostic_template": (),
            "teaching.student_with_teaching_template": ("teaching",),
        }
        template = config.teaching.teacher_template
        check_template("teaching.teacher_template", template, (*fields, "approach"), ("question",))
    for option, more in checks.items():
        template = flat(config)[option]
        check_template(option, template, (*fields, *more), ("question", *more))


class QuestionOrder:
    """Order of the questions: a new permutation in every epoch."""

    def __init__(
        self, questions: Sequence[Question], seed: int, shuffle: bool, hashes_rows: bool = False
    ) -> None:
        """Keeps the questions.

        Args:
            questions: those of the dataset.
            seed: root of the permutations.
            shuffle: False asks in the order of the dataset.
            hashes_rows: True if the whole rows matter, as they do to functions of the user's.
        """
        self._hashes_rows = hashes_rows
        self._questions = questions
        self._seed = seed
        self._shuffle = shuffle
        self._known = -1, np.arange(0)  # an epoch and its permutation

    def at(self, position: int) -> Question:
        """Returns the question at a position of the endless sequence, counted from 0."""
        epoch, place = divmod(position, len(self._questions))
        return self._questions[int(self._permutation(epoch)[place])]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._known[0] != epoch:
            count = len(self._questions)
            self._known = epoch, epoch_order(count, epoch, self._seed, self._shuffle)
        return self._known[1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Short hash of the questions and of the settings of their order."""
        digest = hashlib.sha256(f"{self._seed} {self._shuffle}".encode())
        for question in self._questions:
            # Identifier, text and truth; the other fields may change without another question.
            digest.update(repr(question[:3]).encode())
            if self._hashes_rows:
                row = json.dumps(question.row, sort_keys=True, default=str)
                digest.update(row.encode())
        return digest.hexdigest()[:16]


def _first(fields: dict[str, Any], names: Sequence[str]) -> str:
    return next((text for name in names if (text := _text(fields.get(name, "")))), "")


def _text(value: Any) -> str:
    return str(value).strip() if isinstance(value, str | int | float) else ""


def _fields(given: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields of a row with our names, and with the question as text."""
    if not any(columns.values()) and all(map(_is_plain, given, given.values())):
        return dict(given)
    from atlas_jax.data import shapes  # of other tools, and of rows with more than texts

    return shapes.question_row(shapes.renamed(given, columns))


def _is_plain(name: str, value: Any) -> bool:
    """Tells a text or a whole number that is no conversation and no instruction with its input."""
    if isinstance(value, str):
        return name != "instruction" and not value.lstrip().startswith("[")
    return isinstance(value, int)
