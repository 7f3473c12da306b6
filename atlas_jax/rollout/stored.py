"""Samples of a step, read back from the files that `record` writes."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from atlas_jax.rollout.record import StepFacts
from atlas_jax.types import Completion, Question, Reward, Sample

_FILE = re.compile(r"step_(?P<step>\d+)_process_(?P<process>\d+)\.jsonl")


class StoredStep(NamedTuple):
    """The samples of a step, those of all processes in order, and what their lines say of it."""

    samples: list[Sample]
    facts: StepFacts


def steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps of which a run's `rollouts/` has files, in order."""
    names = (_FILE.fullmatch(path.name) for path in directory.glob("step_*"))
    return sorted({int(name["step"]) for name in names if name})


def read(directory: pathlib.Path, step: int) -> StoredStep:
    """Returns the samples of a step; `place` counts the questions of the step from 0.

    Files of earlier versions do not say how many samples and steps there are. Their samples count
    as complete, and `num_steps` is 0.

    Raises:
        ValueError: in one line, for a file that is missing or broken.
        OSError: for one that cannot be read.
    """
    paths = {}
    for path in directory.glob(f"step_{step:06d}_process_*.jsonl"):
        if name := _FILE.fullmatch(path.name):
            paths[int(name["process"])] = path
    lines = [line for process in sorted(paths) for line in _lines(paths[process])]
    if not lines:
        raise ValueError(f"{directory} has no samples of step {step}")
    first = lines[0][1]
    samples: list[Sample] = []
    place = -1
    for where, values in lines:
        try:
            # The members of a question stand together, and the first one begins its group.
            place += values["member"] == 0
            samples.append(sample(values, place))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is no sample: {type(error).__name__} {error}") from None
    facts = StepFacts(
        num_samples=first.get("num_samples", len(samples)),
        num_steps=first.get("num_steps", 0),
        given_rewards=tuple(first.get("given_rewards", ())),
    )
    if len(samples) != facts.num_samples:
        found = ", ".join(map(str, sorted(paths)))
        raise ValueError(
            f"{directory}/step_{step:06d} has {len(samples)} of its {facts.num_samples} samples, "
            f"in the files of process {found}; copy those of the other processes there too"
        )
    return StoredStep(samples, facts)


def _lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the place and the values of each line of a file."""
    found = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError("not an object")
            found.append((f"{path}, line {number},", values))
    except ValueError as error:  # of JSON and of UTF-8 too
        raise ValueError(f"{path}, line {len(found) + 1}, is no sample: {error}") from None
    return found


def sample(values: Mapping[str, Any], place: int = 0) -> Sample:
    """Returns the sample of one line; raises several kinds of errors for what is none."""
    completion = _completion(values["completion"])
    assert completion is not None
    return Sample(
        question=Question(
            id=values["question_id"],
            text=values["question"],
            ground_truth=values["ground_truth"],
            fields=values["fields"],
        ),
        completion=completion,
        teaching=values["teaching"],
        baseline=_completion(values["baseline"]),
        probe=_completion(values["probe"]),
        guided=_completion(values["guided"]),
        further_baselines=_completions(values.get("further_baselines", ())),
        further_guided=_completions(values.get("further_guided", ())),
        place=place,
        member=values["member"],
        reward=Reward(values["reward"], values["reward_details"], is_skipped=values["skipped"]),
        advantage=values["advantage"],
        turn_advantages=_pairs(values.get("turn_advantages", ())),
        trains=values["trains"],
        messages=tuple(values["messages"]),
        facts=values["facts"],
    )


def _pairs(values: Sequence[Sequence[Any]]) -> tuple[tuple[Any, Any], ...]:
    return tuple((first, second) for first, second in values)


def _completions(values: Sequence[dict[str, Any]]) -> tuple[Completion, ...]:
    return tuple(found for each in values if (found := _completion(each)))


def _completion(values: dict[str, Any] | None) -> Completion | None:
    """Returns a completion.

    Raises:
        ValueError: if it has not one number for each token.
    """
    if values is None:
        return None
    names = [name for name in Completion._fields if name in values]
    fields: dict[str, Any] = {n: tuple(v) if isinstance(v := values[n], list) else v for n in names}
    for name in ("version_spans", "turn_rewards"):
        fields[name] = _pairs(fields.get(name, ()))
    completion = Completion(**fields)
    for name in ("untruncated_logprobs", "token_versions", "sampled"):
        count = len(getattr(completion, name))
        if count != completion.num_tokens and (count or name != "sampled"):
            raise ValueError(f"{name} are {count} of {completion.num_tokens} tokens")
    return completion
