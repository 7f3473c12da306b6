"""Scoring by vLLM servers: the tokens of a text in, the most probable tokens of each place out.

A text comes back as the reason why it has no scores if a server refused it or failed over it, or if
its scores are impossible.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from atlas_jax.llm_client import RefusedError, UnavailableError
from atlas_jax.models.attention import MASKED
from atlas_jax.rollout.continuations import Continuation
from atlas_jax.rollout.servers import UNEXPECTED, Server, ServerPool
from atlas_jax.types import TopTokens

Scored = TopTokens | str
"""The most probable tokens of each place of a completion, or the reason why they are not known."""

SMALLEST_TAIL = 1e-7
"""Least probability of all tokens that a server does not name: what float32 rounds off their sum,
1, which the others are subtracted from."""

_ROUNDING = 1e-3
"""Amount by which a log-probability may be above 0, and a sum of probabilities above 1."""


@dataclasses.dataclass(frozen=True)
class ScoringEngine:
    """Scores texts with the servers of a pool.

    Attributes:
        pool: of servers.
        num_tokens: tokens that are named at each place.
        vocab_size: of the policy; tokens beyond it count among those that are not named.
    """

    pool: ServerPool
    num_tokens: int
    vocab_size: int

    def begin(self, text: Continuation) -> concurrent.futures.Future[Scored]:
        """Asks for the scores of a text's completion; `pool.result` waits for them."""
        return self.pool.begin(self.one(text))

    async def one(self, text: Continuation, server: Server | None = None) -> Scored:
        """Returns the scores of a text's completion, after the prompt that the teacher reads.

        Args:
            text: the text.
            server: the server that is asked first; None takes the one with the fewest requests.

        Raises:
            DependencyError: if no server is left.
        """
        prompt = text.teacher_prompt_ids or text.prompt_ids
        try:
            reply = await self.pool.ask(payload(prompt + text.token_ids, self.num_tokens), server)
        except RefusedError as error:
            return f"refused: {error.body}"
        except UnavailableError as error:
            return f"no answer: {error}"
        try:
            entries = reply.reply["prompt_logprobs"]
            return read(
                entries[len(prompt) :], len(text.token_ids), self.num_tokens, self.vocab_size
            )
        except UNEXPECTED as error:
            return f"no scores: {type(error).__name__} {error}"


def payload(token_ids: Sequence[int], num_tokens: int) -> dict[str, Any]:
    """Returns the body of `POST /inference/v1/generate` that asks for scores.

    A server writes at least one token, so the text must be shorter by one than its longest.
    """
    return {
        "token_ids": list(token_ids),
        "sampling_params": {
            "temperature": 0.0,
            "max_tokens": 1,
            "prompt_logprobs": num_tokens,
            "detokenize": False,
        },
    }


def read(
    entries: Sequence[Mapping[str, Mapping[str, Any]]],
    length: int,
    num_tokens: int,
    vocab_size: int,
) -> TopTokens:
    """Returns what a server says of the tokens of a completion.

    Each entry is about the token at its place, which is predicted from the place before: it names
    the `num_tokens` most probable tokens, and that token if it is none of them.

    Args:
        entries: of the tokens of the completion.
        length: number of these tokens.
        num_tokens: tokens that were asked for.
        vocab_size: tokens that count; others are left out and belong to the tail.

    Raises:
        ValueError: if something is missing, or impossible.
    """
    if len(entries) != length or any(len(entry) < num_tokens for entry in entries):
        raise ValueError("a token or a part of its distribution is missing")
    places = [_most_probable(entry, num_tokens) for entry in entries]
    ids = np.stack([ids for ids, _ in places]).astype(np.int32)
    logprobs = np.stack([logprobs for _, logprobs in places])
    sums = np.exp(logprobs).sum(axis=-1)
    # A server that reports logits has sums of any size.
    if not (logprobs <= _ROUNDING).all() or not (sums <= 1 + _ROUNDING).all() or (ids < 0).any():
        raise ValueError(
            f"probabilities up to {np.exp(logprobs.max()):.3g} that add up to more than 1"
        )
    known = ids < vocab_size
    tail = 1 - np.where(known, np.exp(logprobs), 0).sum(axis=-1, keepdims=True)
    named = np.where(known, logprobs, MASKED)
    groups = np.concatenate([named, np.log(np.maximum(tail, SMALLEST_TAIL))], axis=-1)
    return TopTokens(np.where(known, ids, -1), groups.astype(np.float32))


def _most_probable(
    entry: Mapping[str, Mapping[str, Any]], num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids and log-probabilities of so many tokens, the most probable one first."""
    ids = np.fromiter(map(int, entry), np.int64, len(entry))
    logprobs = np.fromiter((said["logprob"] for said in entry.values()), np.float64, len(entry))
    order = np.lexsort((ids, -logprobs))[:num_tokens]
    return ids[order], logprobs[order]


def laid_out(
    texts: Sequence[Continuation | None],
    scores: Sequence[TopTokens | None],
    length: int,
    num_tokens: int,
) -> TopTokens:
    """Returns the scores in rows [B, T], where the policy predicts the tokens that they are of.

    Args:
        texts: of the rows; None is a row of padding.
        scores: of the texts; None for a row of padding.
        length: tokens of a row.
        num_tokens: tokens that are named at each place.
    """
    shape = len(texts), length
    ids = np.full((*shape, num_tokens), -1, np.int32)
    logprobs = np.full((*shape, num_tokens + 1), MASKED, np.float32)
    for row, (text, score) in enumerate(zip(texts, scores, strict=True)):
        if text is not None and score is not None:
            first = len(text.prompt_ids) - 1
            ids[row, first : first + len(text.token_ids)] = score.ids
            logprobs[row, first : first + len(text.token_ids)] = score.logprobs
    return TopTokens(ids, logprobs)


async def other_tokens(
    server: Server, ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> Sequence[int]:
    """Returns the smallest found run of tokens that a server reads otherwise; () if there is none.

    It asks for the text of all tokens at once, and where that differs for the text of halves.

    Args:
        server: the server.
        ids: all tokens of the vocabulary.
        decode: tokens -> their text, as the policy reads them.

    Raises:
        ServerError: if the server does not say.
    """

    async def differ(part: Sequence[int]) -> bool:
        reply = await server.control.post("/detokenize", {"tokens": list(part)})
        return _letters(reply["prompt"]) != _letters(decode(part))

    if not await differ(ids):
        return ()
    while len(ids) > 1:
        halves = ids[: len(ids) // 2], ids[len(ids) // 2 :]
        differing = [half for half in halves if await differ(half)]
        if not differing:
            break
        ids = differing[0]
    return ids


def _letters(text: str) -> str:
    """Returns a text without its spaces, in which releases of one tokenizer's library differ."""
    return "".join(text.split())
