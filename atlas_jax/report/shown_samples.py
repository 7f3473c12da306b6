"""Samples as the page's script reads them: short rows, and each text once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from atlas_jax.report.run_files import RunFiles
from atlas_jax.report.stored_samples import (
    Member,
    StepSamples,
    StoredSample,
    StoredText,
    decode,
    summary,
)

_MAX_CHARS = 8000
"""Characters of a text that a page shows; the rest is in `rollouts/`."""


class SampleSource(NamedTuple):
    """Samples of one step of a run, or of a teacher's evaluation."""

    run: int
    label: str
    trains: bool
    """False for an evaluation, whose samples have no reward."""
    samples: StepSamples


class Shown(NamedTuple):
    """The samples of a page."""

    sources: list[SampleSource]
    limit: int
    """Samples of a step that are shown at most."""

    @classmethod
    def of(
        cls, runs: Sequence[RunFiles], samples: Sequence[Sequence[StepSamples]], limit: int
    ) -> Shown:
        """Returns the samples of runs and of their evaluations."""
        sources = []
        for place, (run, steps) in enumerate(zip(runs, samples, strict=True)):
            sources += [
                SampleSource(run=place, label=f"step {s.step}", trains=True, samples=s)
                for s in steps
            ]
            for evaluation in run.evaluations:
                found = [decode(values) for values in evaluation.get("samples", [])]
                of = summary(run.last_step, [sample for sample in found if sample])
                label = f"evaluation ({evaluation['file']})"
                sources.append(SampleSource(run=place, label=label, trains=False, samples=of))
        return cls(sources, limit)

    @property
    def num_shown(self) -> int:
        """Number of samples whose texts are in the page."""
        return sum(min(len(source.samples.chosen), self.limit) for source in self.sources)

    @property
    def num_samples(self) -> int:
        """Number of all samples."""
        return sum(source.samples.num_samples for source in self.sources)

    def as_json(self) -> dict[str, Any]:
        """Returns the data of the page's script, which `page.js` describes."""
        texts: dict[str, int] = {"": 0}
        sources = []
        for source in self.sources:
            chosen = source.samples.chosen[: self.limit]
            sources.append(
                {
                    "run": source.run,
                    "label": source.label,
                    "trains": source.trains,
                    "count": source.samples.num_samples,
                    "samples": [_row(sample, texts) for sample in chosen],
                    "groups": [
                        [
                            _pooled(group.question_id, texts),
                            [_brief(m, self.limit) for m in members],
                        ]
                        for group in source.samples.groups
                        if (members := group.members)
                    ],
                }
            )
        return {"texts": list(texts), "sources": sources}


def _row(sample: StoredSample, texts: dict[str, int]) -> dict[str, Any]:
    """Returns a sample; its texts are numbers in `texts`."""
    said = {
        "question": sample.question,
        "id": sample.question_id,
        "truth": sample.ground_truth,
        "approach": _said(sample.probe),
        "wrote": _said(sample.completion) if not sample.messages else _conversation(sample),
        "lesson": sample.teaching,
        "alone": _said(sample.baseline),
        "taught": _said(sample.guided),
    }
    completions = (sample.baseline, sample.completion, sample.guided)
    return {name: _pooled(text, texts) for name, text in said.items()} | {
        "member": sample.member,
        "reward": sample.reward,
        "advantage": sample.advantage,
        "before": sample.before,
        "after": sample.after,
        "trains": sample.trains,
        "faults": sample.faults,
        "leaks": sample.leaks,
        "unscored": sample.unscored,
        "further": [
            [label, _pooled(_said(answer), texts)]
            for label, answers in (
                ("alone", sample.further_baselines),
                ("taught", sample.further_guided),
            )
            for answer in answers
        ],
        "parts": _parts(sample),
        "judges": _judges(sample),
        "tokens": [c.num_tokens if c else None for c in completions],
        "version": sample.completion.weights_version if sample.completion else None,
    }


def _brief(member: Member, limit: int) -> list[Any]:
    """Returns a member of a group: number, reward, before, after, faults, place of its texts."""
    place = member.place if member.place < limit else -1
    reward = None if member.reward is None else round(member.reward, 4)
    return [member.number, reward, member.before, member.after, len(member.faults), place]


def _pooled(text: str, texts: dict[str, int]) -> int:
    if len(text) > _MAX_CHARS:
        text = f"{text[:_MAX_CHARS]} … ({len(text) - _MAX_CHARS} more characters in rollouts/)"
    return texts.setdefault(text, len(texts))


def _said(completion: StoredText | None) -> str:
    """Returns what was written, or why nothing was."""
    if completion is None:
        return ""
    if completion.is_failed:
        return f"({completion.finish_reason})"
    cut = " … (cut by its limit)" if completion.finish_reason == "length" else ""
    return completion.text + cut


def _conversation(sample: StoredSample) -> str:
    return "\n\n".join(f"{m.get('role', '?')}: {m.get('content', '')}" for m in sample.messages)


def _parts(sample: StoredSample) -> list[tuple[str, Any]]:
    """Returns the parts that the reward is the sum of, and what it was before it was lowered."""
    parts = [
        (name, part["value"])
        for name, part in sample.reward_details.items()
        if isinstance(part, dict) and "value" in part
    ]
    if "own_value" in sample.reward_details:
        parts.append(("before it was lowered", sample.reward_details["own_value"]))
    return parts


def _judges(sample: StoredSample) -> list[dict[str, Any]]:
    """Returns the verdict of each judge."""
    judged = sample.reward_details.get("rim")
    verdicts = judged.get("judges", {}) if isinstance(judged, dict) else {}
    names = ("score", "uncertainty", "rationale", "escalation", "spread", "model", "failures")
    return [
        {"name": name} | {key: verdict.get(key) for key in names}
        for name, verdict in verdicts.items()
    ]
