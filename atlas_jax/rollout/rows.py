"""Rows of a batch from completions: one copy of a prompt, and what was sampled after it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from atlas_jax.types import Completion, PolicyBatch, Sample


def collate_policy(
    samples: Sequence[Sample], per_row: int, length: int, version: int | None = None
) -> PolicyBatch:
    """Returns completions as rows, `per_row` of them after one copy of their prompt.

    Where prompts of one row differ, their common beginning stands once, and the rest of each prompt
    before its completion. Only sampled tokens are trained.

    Args:
        samples: the members of each question together; all questions have equally many.
        per_row: completions of a row; it divides the members of a question.
        length: tokens of a row.
        version: the step of the weights that are trained, which gives each token its lag; None
            where none can lag.

    Raises:
        ValueError: if a row does not fit.
    """
    rows = split_rows(samples, per_row)
    shape = (len(rows), length)
    batch = PolicyBatch(
        tokens=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        sequence_ids=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, bool),
        advantages=np.zeros(shape, np.float32),
        rollout_logprobs=np.zeros(shape, np.float32),
        version_lags=None if version is None else np.zeros(shape, np.int32),
    )
    for row, members in enumerate(rows):
        needed = row_tokens(members)
        if needed > length:
            raise ValueError(f"row {row} holds {needed} tokens, but has room for {length}")
        _fill_policy_row(batch, row, members, version)
    return batch


def split_rows(samples: Sequence[Sample], per_row: int) -> list[Sequence[Sample]]:
    """Returns the samples of each row, `per_row` of one question."""
    return [samples[first : first + per_row] for first in range(0, len(samples), per_row)]


def row_tokens(members: Sequence[Sample]) -> int:
    """Returns the tokens of a row of one prompt and these completions."""
    shared = len(_shared_prompt(members))
    return shared + sum(len(_own_tokens(s.completion, shared)) for s in members)


def token_advantages(sample: Sample) -> np.ndarray:
    """Returns each token's advantage: of its completion, of its turn and of the turns after it."""
    advantages = np.full(sample.completion.num_tokens, sample.advantage)
    for end, value in sample.turn_advantages:
        advantages[:end] += value
    return advantages


def _shared_prompt(members: Sequence[Sample]) -> tuple[int, ...]:
    """Returns the beginning that the prompts of a row's completions have in common."""
    prompts = [s.completion.prompt_ids for s in members if s.completion.token_ids]
    if not prompts:
        return members[0].completion.prompt_ids
    same = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return tuple(tokens[0] for tokens in same)


def _own_tokens(completion: Completion, shared: int) -> tuple[int, ...]:
    """Returns the tokens of a completion that follow the first `shared` ones of its prompt."""
    if not completion.token_ids:
        return ()
    return completion.prompt_ids[shared:] + completion.token_ids


def _fill_policy_row(
    batch: PolicyBatch, row: int, members: Sequence[Sample], version: int | None
) -> None:
    """Writes the prompt and the completions of `members` into one row of the batch."""
    prompt = _shared_prompt(members)
    end = len(prompt)
    batch.tokens[row, :end] = prompt
    batch.positions[row, :end] = np.arange(end)
    batch.segment_ids[row, : row_tokens(members)] = 1
    for number, sample in enumerate(members, start=1):
        completion = sample.completion
        tokens = _own_tokens(completion, len(prompt))
        start = end
        end += len(tokens)
        batch.tokens[row, start:end] = tokens
        # Every completion continues the prompt, as if the others were not there.
        batch.positions[row, start:end] = len(prompt) + np.arange(end - start)
        batch.sequence_ids[row, start:end] = number
        if sample.trains:
            # Own tokens may begin with the rest of the prompt, which is not trained.
            first = end - completion.num_tokens
            sampled = np.asarray(completion.sampled or (True,) * completion.num_tokens, bool)
            logprobs = np.where(sampled, completion.untruncated_logprobs, 0.0)
            batch.loss_mask[row, first:end] = sampled
            batch.advantages[row, first:end] = np.where(sampled, token_advantages(sample), 0.0)
            batch.rollout_logprobs[row, first:end] = logprobs
            if version is not None and batch.version_lags is not None:
                lags = version - np.asarray(completion.token_versions, np.int32)
                batch.version_lags[row, first:end] = np.where(sampled, lags, 0)
