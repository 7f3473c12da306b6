"""Completions with the prompts that a policy and its teacher read before them, and their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from atlas_jax.data import packing
from atlas_jax.data.loader import TokenDataset
from atlas_jax.data.sources import Rows, check_rejected, epoch_order
from atlas_jax.rewards.verifiable import is_right
from atlas_jax.rollout import stored
from atlas_jax.types import Completion, Example, TeacherBatch


class Continuation(NamedTuple):
    """A completion, and what each side reads before it."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Up to and including the stop token."""
    teacher_prompt_ids: tuple[int, ...] = ()
    """The teacher's own prompt; () for that of the policy."""

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longer one of both prompts."""
        return max(len(self.prompt_ids), len(self.teacher_prompt_ids))

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer one of both rows."""
        return self.longest_prompt + len(self.token_ids)


_EMPTY = Continuation((), ())
"""A row of padding."""


def of_example(example: Example) -> Continuation:
    """Returns the last part of an example that is trained on, after all that stands before it."""
    trained = np.flatnonzero(example.loss_mask)
    last = int(trained[-1])
    gaps = np.flatnonzero(np.diff(trained) > 1)
    first = int(trained[gaps[-1] + 1] if gaps.size else trained[0])
    tokens = example.tokens.tolist()
    return Continuation(tuple(tokens[:first]), tuple(tokens[first : last + 1]))


def of_sample(values: Mapping[str, Any]) -> list[Continuation]:
    """Returns the right answers with the lesson of a stored sample; none if one alone is right.

    The policy reads the prompt of the answer alone, and the teacher that with the lesson.

    Args:
        values: a line of `rollouts/`.

    Raises:
        ValueError: if it is no sample of a student with a ground truth.
    """
    try:
        sample = stored.sample(values)
    except (AttributeError, KeyError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"is no sample of a GRPO run ({type(error).__name__} {error}); give the rollouts/ of a "
            "run with rollout.protocol=teaching"
        ) from None
    truth = sample.question.ground_truth
    if sample.baseline is None or not truth:
        raise ValueError(
            "is a sample without a student's answers or without a ground truth; give the rollouts/ "
            "of a run with rollout.protocol=teaching, whose questions have answers"
        )
    alone = sample.baselines
    if not sample.teaching or any(not c.token_ids or is_right(c, truth) for c in alone):
        return []
    return [
        _taught(alone[0], guided)
        for guided in sample.guided_answers
        if guided.token_ids and is_right(guided, truth)
    ]


def _taught(alone: Completion, guided: Completion) -> Continuation:
    return Continuation(alone.prompt_ids, guided.token_ids, guided.prompt_ids)


def of_examples(examples: TokenDataset, max_rejected_frac: float) -> Texts:
    """Returns what `of_example` makes of each example.

    Raises:
        ValueError: if too many have nothing before their completion, which a policy could continue.
    """
    count = examples.report.examples
    known = [i for i in range(count) if not examples.example(i).loss_mask[0]]
    rejected = [
        f"example {i} has nothing before its completion" for i in set(range(count)) - set(known)
    ]
    check_rejected(rejected, count, max_rejected_frac)
    return Texts(len(known), lambda i: of_example(examples.example(known[i])), examples.fingerprint)


def of_samples(rows: Rows, max_rejected_frac: float, longest: int) -> list[Continuation]:
    """Returns what `of_sample` finds in each row.

    Args:
        rows: lines of `rollouts/`.
        max_rejected_frac: share of unusable rows above which the run stops.
        longest: tokens that a row may have; a longer one is unusable.

    Raises:
        ValueError: if too many rows are unusable, or no lesson turned an answer right.
    """
    rejected: list[str] = []
    found: list[Continuation] = []
    for row in rows.rows:
        try:
            texts = of_sample(row.fields)
        except ValueError as error:
            rejected.append(f"{row.name}: {error}")
            continue
        long = [text for text in texts if text.num_tokens > longest]
        if long:
            rejected.append(
                f"{row.name}: has {long[0].num_tokens} tokens, max_seq_length={longest}"
            )
        found += [text for text in texts if text.num_tokens <= longest]
    check_rejected(rejected, len(rows.rows), max_rejected_frac)
    if not found:
        raise ValueError(
            f"none of the {len(rows.rows)} samples has a wrong answer alone and a right one with "
            "the lesson, so there is nothing to learn; give the rollouts of more questions, or of "
            "a better teacher"
        )
    return found


def check_written_by(
    texts: Iterable[Continuation], decode: Callable[[Sequence[int]], str], rows: Rows
) -> None:
    """Checks on the first texts that their tokens mean what the tokenizer of the run makes of them.

    Raises:
        ValueError: shows a text that another tokenizer has written.
    """
    stored_texts = {
        tuple(c["token_ids"]): c["text"]
        for row in rows.rows
        for c in (row.fields.get("guided"), *row.fields.get("further_guided", ()))
        if c
    }
    for text in texts:
        said = stored_texts[text.token_ids]
        found = decode(text.token_ids)
        # Engines differ in the spaces at the edges.
        if said.strip() not in found:
            raise ValueError(
                f"the samples are of a model with another tokenizer: the tokens of {said[:40]!r} "
                f"mean {found[:40]!r} here; give the rollouts of a student like model_name_or_path"
            )


class Texts(NamedTuple):
    """The texts of a dataset."""

    number: int
    at: Callable[[int], Continuation]
    digest: str
    """Hash of all of them."""

    @classmethod
    def of(cls, texts: Sequence[Continuation]) -> Texts:
        """Returns texts that are in memory."""
        digest = hashlib.sha256()
        for text in texts:
            for ids in text:
                digest.update(np.asarray((len(ids), *ids), np.int32).tobytes())
        return cls(len(texts), lambda i: texts[i], digest.hexdigest()[:16])


class TextOrder:
    """Order of the texts: a new permutation in every epoch."""

    def __init__(self, texts: Texts, seed: int, shuffle: bool, own_share: float) -> None:
        """Keeps the texts.

        Args:
            texts: those of the dataset.
            seed: root of the permutations.
            shuffle: False keeps the order of the dataset.
            own_share: share of the positions at which the policy writes the completion itself.
        """
        self._texts = texts
        self._seed = seed
        self._shuffle = shuffle
        self._own_share = own_share
        self._known = -1, np.arange(0)  # an epoch and its permutation
        settings = f"{texts.digest} {seed} {shuffle} {own_share}"
        self.fingerprint = hashlib.sha256(settings.encode()).hexdigest()[:16]
        """Short hash of the texts and of the settings of their order."""

    def at(self, position: int) -> Continuation:
        """Returns the text at a position of the endless sequence, counted from 0."""
        epoch, place = divmod(position, self._texts.number)
        if self._known[0] != epoch:
            count = self._texts.number
            self._known = epoch, epoch_order(count, epoch, self._seed, self._shuffle)
        return self._texts.at(int(self._known[1][place]))

    def is_own(self, position: int) -> bool:
        """Returns True if the policy writes the completion at a position.

        Such positions are spread evenly: of N in a row they are the share, rounded up or down.
        """
        return int((position + 1) * self._own_share) > int(position * self._own_share)


def collate(
    texts: Sequence[Continuation | None], apart: bool, length: Callable[[int], int]
) -> TeacherBatch:
    """Returns a row for each text, and one for its teacher if that reads prompts of its own.

    Args:
        texts: those of this process; None is a row of padding.
        apart: whether the teacher reads prompts of its own.
        length: tokens of the longest row of this process -> tokens of all rows.
    """
    known = [text or _EMPTY for text in texts]
    rows = [_row(text.prompt_ids, text.token_ids) for text in known]
    batch = packing.collate(rows, length(_longest(rows)))
    if not apart:
        return TeacherBatch(*batch)
    theirs = [_row(text.teacher_prompt_ids, text.token_ids) for text in known]
    sources = np.zeros_like(batch.tokens)
    for row, text in enumerate(known):
        places = np.arange(len(text.token_ids)) - 1  # each token is predicted from the one before
        sources[row, places + len(text.prompt_ids)] = places + len(text.teacher_prompt_ids)
    return TeacherBatch(
        *batch, teacher=packing.collate(theirs, length(_longest(theirs))), sources=sources
    )


def _row(prompt: tuple[int, ...], completion: tuple[int, ...]) -> list[Example]:
    if not completion:
        return []
    mask = np.repeat([False, True], [len(prompt), len(completion)])
    return [Example(np.asarray(prompt + completion, np.int32), mask)]


def _longest(rows: Sequence[Sequence[Example]]) -> int:
    return max((len(example.tokens) for row in rows for example in row), default=0)
