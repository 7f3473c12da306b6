"""Samples of `rollouts/` for a page: each step's most telling ones, and the rewards of all.

The lines are read by the names of their fields. A field that is missing has a default, others are
skipped without being decoded: token ids and log-probabilities are most of a line.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

KEPT = 24
"""Samples of a step that a page shows at most."""
_NAME = re.compile(r"step_(\d+)_process_(\d+)\.jsonl")


class StoredText(msgspec.Struct):
    """A completion of a stored sample."""

    text: str = ""
    finish_reason: str = ""
    weights_version: int = -1
    num_tokens: int = 0

    @property
    def is_failed(self) -> bool:
        """True if no text was written."""
        return self.finish_reason.startswith(("skipped", "error"))


class StoredSample(msgspec.Struct):
    """One line of `rollouts/`."""

    step: int = 0
    question_id: str = ""
    member: int = 0
    question: str = ""
    ground_truth: str = ""
    completion: StoredText | None = None
    teaching: str = ""
    baseline: StoredText | None = None
    probe: StoredText | None = None
    guided: StoredText | None = None
    further_baselines: list[StoredText] = []
    further_guided: list[StoredText] = []
    messages: list[dict[str, Any]] = []
    reward: float | None = None
    skipped: bool = False
    reward_details: dict[str, Any] = {}
    advantage: float | None = 0.0
    trains: bool = False

    @property
    def answer(self) -> StoredText | None:
        """The student's answer with the lesson, else the policy's own."""
        return self.guided or self.completion

    @property
    def before(self) -> bool | None:
        """True if the student alone was right; None if nobody can say."""
        return self._right("baseline_correct", self.baseline)

    @property
    def after(self) -> bool | None:
        """True if the answer that counts was right; None if nobody can say."""
        return self._right("correct", self.answer)

    @property
    def faults(self) -> list[str]:
        """Faults of the lesson: that it states the answer, or aims at the judge."""
        judged = self.reward_details.get("rim")
        lists = [self.reward_details.get("gaming")]
        lists += [judged.get("gaming")] if isinstance(judged, dict) else []
        return list(dict.fromkeys(str(fault) for faults in lists for fault in faults or ()))

    @property
    def leaks(self) -> bool:
        """True if the lesson states the answer."""
        return any("states the answer" in fault for fault in self.faults)

    @property
    def unscored(self) -> str:
        """The reason for which there is no reward; empty with one."""
        if self.reward is not None:
            return ""
        parts = [self.reward_details, *self.reward_details.values()]
        said = (p["unscored"] for p in parts if isinstance(p, dict) and p.get("unscored"))
        return str(next(said, "no reason is given"))

    @property
    def change(self) -> int:
        """1 if the lesson turned wrong into right, -1 for right into wrong, else 0."""
        before = self.before
        after = self.after
        return 0 if before is None or after is None else int(after) - int(before)

    @property
    def failure(self) -> str:
        """The reason for which a text is missing; empty if all that were asked for exist."""
        texts = (self.completion, self.baseline, self.guided)
        return next((text.finish_reason for text in texts if text and text.is_failed), "")

    def _right(self, name: str, text: StoredText | None) -> bool | None:
        for part in self.reward_details.values():
            if isinstance(part, dict) and isinstance(part.get(name), bool | int | float):
                return part[name] >= 0.5
        if text is None or not self.ground_truth or text.is_failed:
            return None
        return _is_correct(text.text, self.ground_truth, text.finish_reason == "length")


class Member(NamedTuple):
    """A sample without its texts."""

    number: int
    """Number in its group."""
    reward: float | None
    advantage: float | None
    before: bool | None
    after: bool | None
    faults: tuple[str, ...]
    unscored: str
    failure: str
    place: int
    """Place among the chosen samples of the step; -1 if it is none of them."""


class Group(NamedTuple):
    """The members of one question at one step."""

    question_id: str
    members: list[Member]


class StepSamples(NamedTuple):
    """The samples of a step."""

    step: int
    groups: list[Group]
    chosen: list[StoredSample]
    """The most telling ones first, `KEPT` at most."""
    unread: int = 0
    """Lines that are no samples."""

    @property
    def num_samples(self) -> int:
        """Number of all samples."""
        return sum(len(group.members) for group in self.groups)


@functools.lru_cache(maxsize=65536)  # the members of a group share the answer alone
def _is_correct(text: str, truth: str, is_cut: bool) -> bool:
    from atlas_jax.rewards.answers import is_correct  # only rewards that compare no answers need it

    return is_correct(text, truth, is_cut)


def read(directory: pathlib.Path) -> Iterator[StepSamples]:
    """Yields the samples of each step, in order."""
    files: dict[int, list[pathlib.Path]] = {}
    for path in sorted((directory / "rollouts").glob("step_*_process_*.jsonl")):
        if match := _NAME.fullmatch(path.name):
            files.setdefault(int(match[1]), []).append(path)
    for step, paths in sorted(files.items()):
        stats = [path.stat() for path in paths]
        key = tuple((str(p), s.st_mtime_ns, s.st_size) for p, s in zip(paths, stats, strict=True))
        yield _step(step, key)


@functools.lru_cache(maxsize=4096)  # a page that is made again reads what is new
def _step(step: int, files: tuple[tuple[str, int, int], ...]) -> StepSamples:
    samples: list[StoredSample] = []
    unread = 0
    for name, _, _ in files:
        for line in pathlib.Path(name).read_bytes().splitlines():
            sample = _decoded(line)
            if sample is None:
                unread += 1
            else:
                samples.append(sample)
    return summary(step, samples, unread)


def summary(step: int, samples: Sequence[StoredSample], unread: int = 0) -> StepSamples:
    """Returns the texts of the most telling samples and the numbers of all."""
    chosen = choose(samples)
    places = {id(sample): place for place, sample in enumerate(chosen)}
    groups: list[Group] = []
    for sample in samples:
        last = groups[-1] if groups else None
        # A question that is asked twice in a step has two groups, each numbered from 0.
        if (
            last is None
            or last.question_id != sample.question_id
            or last.members[-1].number >= sample.member
        ):
            groups.append(last := Group(sample.question_id, []))
        last.members.append(_member(sample, places.get(id(sample), -1)))
    return StepSamples(step=step, groups=groups, chosen=chosen, unread=unread)


def _member(sample: StoredSample, place: int) -> Member:
    return Member(
        number=sample.member,
        reward=sample.reward,
        advantage=sample.advantage,
        before=sample.before,
        after=sample.after,
        faults=tuple(sample.faults),
        unscored=sample.unscored,
        failure=sample.failure,
        place=place,
    )


def decode(values: Any) -> StoredSample | None:
    """Returns a sample of JSON values; None if they are none."""
    try:
        return msgspec.convert(values, StoredSample, strict=False)
    except msgspec.ValidationError:
        return None


def _decoded(line: bytes) -> StoredSample | None:
    try:
        return _DECODER.decode(line)
    except msgspec.DecodeError:
        pass
    try:  # Python takes NaN and halves of surrogate pairs, which become "?"
        text = json.dumps(json.loads(line), ensure_ascii=False)
        return decode(json.loads(text.encode("utf-8", "replace")))
    except ValueError:
        return None


_DECODER = msgspec.json.Decoder(StoredSample)


def choose(samples: Sequence[StoredSample], limit: int = KEPT) -> list[StoredSample]:
    """Returns the samples that tell most: a leak, a changed verdict, the best, the worst and so on.

    The kinds take turns, so that none takes all places, and the first of them come first.
    """
    scored = [s for s in samples if s.reward is not None]
    kinds = [
        [s for s in samples if s.change > 0],
        [s for s in samples if s.change < 0],
        [s for s in samples if s.leaks],
        sorted(scored, key=lambda s: -(s.reward or 0.0)),
        sorted(scored, key=lambda s: s.reward or 0.0),
        sorted(scored, key=lambda s: -abs(s.advantage or 0.0)),
        [s for s in samples if s.faults and not s.leaks],
        [s for s in samples if s.unscored],
        list(samples),
    ]
    result: dict[int, StoredSample] = {}
    turns = [iter(kind) for kind in kinds]
    while turns and len(result) < limit:
        for turn in list(turns):
            following = next((s for s in turn if id(s) not in result), None)
            if following is None:
                turns.remove(turn)
            elif len(result) < limit:
                result[id(following)] = following
    return list(result.values())
