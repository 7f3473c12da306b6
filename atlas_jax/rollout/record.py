"""The record of every sample, and lessons to look at."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from atlas_jax.files import write_whole
from atlas_jax.types import Completion, RewardResult, Rollout


class Sample(NamedTuple):
    """A rollout with what became of it."""

    rollout: Rollout
    result: RewardResult
    advantage: float
    trains: bool


def write(directory: str, step: int, process: int, groups: Sequence[Sequence[Sample]]) -> None:
    """Writes one JSON line a sample to `rollouts/`; a process without groups writes nothing.

    The file is written whole or not at all; a step that is repeated after a kill replaces it.
    """
    if not groups:
        return
    path = pathlib.Path(directory) / "rollouts" / f"step_{step:06d}_process_{process}.jsonl"
    records = (as_record(step, i, sample) for group in groups for i, sample in enumerate(group))
    write_whole(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def drop_after(directory: str, step: int) -> None:
    """Removes the files of later steps, which a run of other processes may have left."""
    for path in (pathlib.Path(directory) / "rollouts").glob("step_*_process_*.jsonl"):
        if int(path.name.split("_")[1]) > step:
            path.unlink()


def as_record(step: int, member: int, sample: Sample) -> dict[str, Any]:
    """Returns a sample as JSON values, with all that it takes to reread or replay it."""
    rollout, result = sample.rollout, sample.result
    question = rollout.question
    return {
        "step": step,
        "question_id": question.id,
        "member": member,
        "question": question.question,
        "ground_truth": question.ground_truth,
        "fields": question.fields,
        "policy": _completion(rollout.policy),
        "teaching": rollout.teaching,
        "baseline": _completion(rollout.baseline),
        "probe": _completion(rollout.probe),
        "guided": _completion(rollout.guided),
        "reward": result.score,
        "skipped": result.is_skipped,
        "reward_details": result.details,
        "advantage": sample.advantage,
        "trains": sample.trains,
    }


def lessons_table(groups: Sequence[Sequence[Sample]], count: int = 4) -> str:
    """Returns the first member of a few groups as a Markdown table."""
    lines = ["| question | truth | alone | text | answer | reward |", "|---|---|---|---|---|---|"]
    for group in groups[:count]:
        rollout, result = group[0].rollout, group[0].result
        cells = (
            rollout.question.question,
            rollout.question.ground_truth,
            rollout.baseline.text if rollout.baseline else "",
            rollout.teaching or rollout.policy.text,
            rollout.answer.text,
            _verdict(result),
        )
        lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    return "\n".join(lines)


def _verdict(result: RewardResult) -> str:
    """Returns a score, and what it was lowered for."""
    if result.score is None:
        return "not scored"
    return "; ".join([f"{result.score:.2f}", *result.details.get("gaming", [])])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def _completion(completion: Completion | None) -> dict[str, Any] | None:
    if completion is None:
        return None
    return completion._asdict() | {"num_tokens": completion.num_tokens}
