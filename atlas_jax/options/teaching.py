"""Options of the teaching protocol: all of its templates and limits."""

from __future__ import annotations

import dataclasses
from typing import Literal

from atlas_jax.options.fields import JsonObject, NonNegativeInt, PositiveInt


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
class TeachingConfig(LessonsConfig):
    """Messages and limits of the two passes in which a teacher helps a student."""

    student_system_prompt: str = ""
    """System message of the student; `teaching.system_prompt` is the teacher's."""
    student_chat_template_kwargs: JsonObject = ""
    """Variables of the student's chat template; empty takes those of `chat_template_kwargs`."""
    student_diagnostic_template: str = ""
    """User message that asks the student for its approach, with the field `{question}`."""
    student_baseline_template: str = ""
    """User message that asks the student for an answer without a lesson, with the field
    `{question}`."""
    student_with_teaching_template: str = ""
    """User message that asks the student for an answer with a lesson, with the fields `{question}`
    and `{teaching}`."""
    missing_teaching: Literal["none", "whole", "unscored"] = "none"
    """Meaning of a teacher's text without `<teaching>`: `none` takes it for no lesson, so that the
    student's answer without one counts; `whole` takes all of it for the lesson; `unscored` skips
    the sample."""
    max_probe_tokens: PositiveInt = 500
    """Most tokens of the approach that the student writes."""
    max_answer_tokens: NonNegativeInt = 0
    """Most tokens of a student's answer; 0 takes `max_new_tokens`."""
