"""The record of every sample, and lessons to look at."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from atlas_jax.files import write_whole
from atlas_jax.rollout.engine import version_spans
from atlas_jax.types import Completion, Reward, Sample, by_question


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


def lessons_table(samples: Sequence[Sample], count: int = 4) -> str:
    """Returns the first member of a few groups as a Markdown table."""
    lines = ["| question | truth | alone | text | answer | reward |", "|---|---|---|---|---|---|"]
    for sample, *_ in by_question(samples)[:count]:
        cells = (
            sample.question.text,
            sample.question.ground_truth,
            sample.baseline.text if sample.baseline else "",
            sample.teaching or sample.completion.text,
            sample.answer.text,
            _summary(sample.reward),
        )
        lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    return _writable("\n".join(lines))


def _writable(text: str) -> str:
    """Returns a text with "?" for halves of surrogate pairs, which tools and rewards may write."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _summary(reward: Reward) -> str:
    """Returns the value of a reward, and the reasons for which it was lowered."""
    if reward.value is None:
        return "not scored"
    return "; ".join([f"{reward.value:.2f}", *reward.details.get("gaming", [])])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def _completion(completion: Completion | None) -> dict[str, Any] | None:
    if completion is None:
        return None
    return completion._asdict() | {
        "version_spans": version_spans(completion.token_versions),
        "num_tokens": completion.num_tokens,
        "num_sampled": completion.num_sampled,
    }
