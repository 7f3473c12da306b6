"""The record of every sample, and lessons to look at."""

from __future__ import annotations

import html
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from atlas_jax.files import write_whole
from atlas_jax.rollout.engine import version_spans
from atlas_jax.types import Completion, Sample, by_question

_MARKS = re.compile(r"([\\`*_#\[\]|~])")
"""Characters with a meaning in Markdown."""


class StepFacts(NamedTuple):
    """Facts of a whole step, which each of its lines has, and which its replay needs."""

    num_samples: int
    """Samples of the step, over all processes."""
    num_steps: int
    """Steps of the run, on which the learning rate depends."""
    given_rewards: tuple[str, ...] = ()
    """Short names of the rewards that a caller from Python has given; () if the config has them."""


def write(
    directory: str, step: int, process: int, samples: Sequence[Sample], facts: StepFacts
) -> None:
    """Writes one JSON line a sample to `rollouts/`; a process without samples writes nothing.

    The file is written whole or not at all; a step that is repeated after a kill replaces it.
    """
    if not samples:
        return
    path = pathlib.Path(directory) / "rollouts" / f"step_{step:06d}_process_{process}.jsonl"
    records = (as_record(step, sample) | facts._asdict() for sample in samples)
    lines = (json.dumps(values, ensure_ascii=False) + "\n" for values in records)
    write_whole(path, _writable("".join(lines)))


def drop_after(directory: str, step: int) -> None:
    """Removes the files of later steps, which a run of other processes may have left."""
    for path in (pathlib.Path(directory) / "rollouts").glob("step_*_process_*.jsonl"):
        if int(path.name.split("_")[1]) > step:
            path.unlink()


def as_record(step: int, sample: Sample) -> dict[str, Any]:
    """Returns a sample as JSON values, with all that it takes to reread or replay it."""
    question = sample.question
    reward = sample.reward
    return {
        "step": step,
        "question_id": question.id,
        "member": sample.member,
        "question": question.text,
        "ground_truth": question.ground_truth,
        "fields": question.fields,
        "completion": _completion(sample.completion),
        "teaching": sample.teaching,
        "baseline": _completion(sample.baseline),
        "probe": _completion(sample.probe),
        "guided": _completion(sample.guided),
        "further_baselines": [_completion(c) for c in sample.further_baselines],
        "further_guided": [_completion(c) for c in sample.further_guided],
        "messages": list(sample.messages),
        "facts": dict(sample.facts),
        "reward": reward.value,
        "skipped": reward.is_skipped,
        "reward_details": reward.details,
        "advantage": sample.advantage,
        "turn_advantages": list(sample.turn_advantages),
        "trains": sample.trains,
    }


def lessons_text(samples: Sequence[Sample], count: int = 4) -> str:
    """Returns the first member of a few groups in Markdown: its texts and what became of them."""
    groups = by_question(samples)
    parts = []
    for place, (sample, *_) in enumerate(groups[:count], 1):
        parts.append(f"### Question {place} of {len(groups)}")
        parts += [f"**{name}**\n\n{_quoted(text)}" for name, text in _paragraphs(sample) if text]
        parts.append(f"**verdict:** {_verdict(sample)}")
    return _writable("\n\n".join(parts))


def _paragraphs(sample: Sample) -> list[tuple[str, str]]:
    """Returns the texts of a sample with their names, in the order in which they came about."""
    question = sample.question
    first = [("question", question.text), ("right answer", question.ground_truth)]
    if not sample.baseline:
        return [*first, ("answer", sample.completion.text)]
    written = ("lesson", sample.teaching)
    if not sample.teaching:
        written = ("text without a lesson", sample.completion.text)
    return [
        *first,
        ("alone", sample.baseline.text),
        ("plan", sample.probe.text if sample.probe else ""),
        written,
        ("taught", sample.answer.text),
    ]


def _verdict(sample: Sample) -> str:
    """Returns how the answers compare with the truth, the reward, and why it was lowered."""
    reward = sample.reward
    value = "not scored" if reward.value is None else f"reward {reward.value:.2f}"
    reasons = [_escaped(reason) for reason in reward.details.get("gaming", [])]
    truth = sample.question.ground_truth
    if not truth or not sample.baseline:
        return "; ".join([value, *reasons])
    from atlas_jax.rewards.verifiable import is_right  # a run without a student compares none

    before, after = (
        "right" if is_right(answer, truth) else "wrong"
        for answer in (sample.baseline, sample.answer)
    )
    return "; ".join([f"{before} → {after}", value, *reasons])


def _quoted(text: str) -> str:
    """Returns a text as a quotation in Markdown, in which its characters mean themselves."""
    return "\n".join(f"> {_escaped(line)}  " for line in text.splitlines())


def _escaped(text: str) -> str:
    return html.escape(_MARKS.sub(r"\\\1", text), quote=False)


def _writable(text: str) -> str:
    """Returns a text with "?" for halves of surrogate pairs, which tools and rewards may write."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _completion(completion: Completion | None) -> dict[str, Any] | None:
    if completion is None:
        return None
    return completion._asdict() | {
        "version_spans": version_spans(completion.token_versions),
        "num_tokens": completion.num_tokens,
        "num_sampled": completion.num_sampled,
    }
