"""A teacher of a distillation on vLLM servers: opened, checked and asked for scores of texts."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from atlas_jax import addresses, distributed, metrics
from atlas_jax.llm_client import ServerError
from atlas_jax.options.gkd import GKDConfig
from atlas_jax.recipes import vllm_backend
from atlas_jax.rollout import capabilities, scores
from atlas_jax.rollout.capabilities import ServerStart
from atlas_jax.rollout.continuations import Continuation
from atlas_jax.rollout.scores import Scored, ScoringEngine
from atlas_jax.rollout.server_metrics import ServerMetrics
from atlas_jax.rollout.servers import UNEXPECTED, PoolOptions, ServerPool
from atlas_jax.startup.model import Model
from atlas_jax.stopping import StopRequestedError
from atlas_jax.types import DependencyError, Metrics, TopTokens


class ServedTeacher:
    """The teacher on its servers.

    Attributes:
        name: of the model that the servers run.
    """

    def __init__(self, config: GKDConfig, engine: ScoringEngine, name: str) -> None:
        """Asks for nothing yet.

        Args:
            config: of the run.
            engine: the servers.
            name: of the model that they run.
        """
        self.name = name
        self._config = config
        self._engine = engine
        self._servers = ServerMetrics(engine.pool, reads=distributed.is_main())
        self._begun: dict[Continuation, concurrent.futures.Future[Scored]] = {}

    def begin(self, texts: Sequence[Continuation]) -> None:
        """Asks for the scores of texts that `take` will be called for."""
        for text in texts:
            if text not in self._begun:
                self._begun[text] = self._engine.begin(text)

    def take(self, texts: Sequence[Continuation | None]) -> tuple[list[TopTokens | None], Metrics]:
        """Returns the scores of texts, None for those that have none, and metrics of all processes.

        Every process calls it together.

        Raises:
            DependencyError: if no server is left, or too many texts have no scores.
            StopRequestedError: as soon as the run is to stop.
        """
        asked = [text for text in texts if text is not None]
        with distributed.together(StopRequestedError, DependencyError):
            self.begin(asked)
            futures = {text: self._begun.pop(text) for text in dict.fromkeys(asked)}
            done = {text: self._engine.pool.result(future) for text, future in futures.items()}
        reasons = [done[text] for text in asked if isinstance(done[text], str)]
        found = [_scores(done.get(text)) if text is not None else None for text in texts]
        tails = [np.exp(score.logprobs[:, -1]) for score in found if score is not None]
        values = metrics.sum_over_processes(
            {
                "distillation/failed_frac": (len(reasons), len(asked)),
                "distillation/tail_frac": (
                    float(sum(tail.sum() for tail in tails)),
                    sum(map(len, tails)),
                ),
                **self._servers.take(),
            }
        )
        self._check_failed(reasons, values["distillation/failed_frac"])
        return found, values

    def _check_failed(self, reasons: Sequence[Scored], counts: tuple[float, float]) -> None:
        """Checks that not too many texts failed, and logs why some did."""
        failed, asked = counts
        first = f"; the first: {reasons[0]}" if reasons else ""
        if failed > self._config.scoring.max_failed_frac * asked:
            raise DependencyError(
                f"{failed:.0f} of {asked:.0f} texts have no scores of the teacher, more than "
                f"scoring.max_failed_frac={self._config.scoring.max_failed_frac:g}{first}"
            )
        if reasons:
            logging.warning("%d texts have no scores of the teacher%s", len(reasons), first)

    def laid_out(
        self,
        texts: Sequence[Continuation | None],
        found: Sequence[TopTokens | None],
        length: int,
    ) -> TopTokens:
        """Returns the scores of texts in rows of so many tokens, see `scores.laid_out`."""
        return scores.laid_out(texts, found, length, self._engine.num_tokens)

    def check(self, text: Continuation) -> None:
        """Checks with a text that each server scores.

        Raises:
            ValueError: says why one does not.
        """
        for server in self._engine.pool.up():
            found = self._engine.pool.run(self._engine.one(text, server))
            if isinstance(found, str):
                raise ValueError(
                    f"the teacher server {server.url} does not score a text of "
                    f"{text.num_tokens} tokens ({found}); start it with python -m atlas_jax.serve"
                )


def _scores(scored: Scored | None) -> TopTokens | None:
    return scored if isinstance(scored, TopTokens) else None


def open_teacher(config: GKDConfig, policy: Model, stack: contextlib.ExitStack) -> ServedTeacher:
    """Returns the teacher on its servers, until `stack` is closed.

    Raises:
        ValueError: if none can be reached, or one cannot score or has another model or vocabulary.
    """
    options = config.scoring
    tokenizer = policy.files.tokenizer
    if options.top_tokens > len(tokenizer):
        raise ValueError(
            f"scoring.top_tokens={options.top_tokens} of a vocabulary of {len(tokenizer)} tokens; "
            "lower it"
        )
    vllm_backend.check_same_servers("scoring.servers", options.servers)
    urls = addresses.split(options.servers)
    names: list[str] = []

    def check(url: str, start: ServerStart) -> None:
        _check_model(config, url, start, names)
        names.append(start.root)

    pool = ServerPool(
        "teacher",
        urls,
        PoolOptions(
            max_in_flight=options.max_in_flight,
            request_timeout_secs=options.request_timeout_secs,
            control_timeout_secs=options.request_timeout_secs,
            first=jax.process_index() * len(urls) // jax.process_count(),
        ),
        vllm_backend.server_key(config.output_dir),
    )
    pool.read_start = functools.partial(capabilities.check_scores, num_tokens=options.top_tokens)
    stack.callback(pool.close)
    pool.open(check)
    _check_vocabulary(pool, policy)
    size = policy.decoder.config.vocab_size
    return ServedTeacher(config, ScoringEngine(pool, options.top_tokens, size), names[0])


def _check_model(config: GKDConfig, url: str, start: ServerStart, others: Sequence[str]) -> None:
    """Checks that a server runs the model of the config and of the other servers, and takes texts.

    Raises:
        ValueError: names the server and what it runs.
    """
    wanted = config.teacher_model_name_or_path
    last = [os.path.basename(name.rstrip("/")) for name in (start.root, wanted)]
    if wanted and last[0] != last[1]:
        raise ValueError(
            f"the teacher server {url} was started with {start.root}, which is not "
            f"teacher_model_name_or_path={wanted}; start it with that, or leave the option empty"
        )
    if others and start.root != others[0]:
        raise ValueError(
            f"the teacher server {url} was started with {start.root}, and another one with "
            f"{others[0]}; start all of scoring.servers with one model"
        )
    if start.max_model_len <= config.max_seq_length:
        raise ValueError(
            f"the teacher server {url} takes texts of {start.max_model_len - 1} tokens, and "
            f"max_seq_length={config.max_seq_length}; start it with --max-model-len "
            f"{config.max_seq_length + 1}, or lower max_seq_length"
        )


def _check_vocabulary(pool: ServerPool, policy: Model) -> None:
    """Checks that each token means the same to the policy and to each server.

    Raises:
        ValueError: names tokens that do not.
    """
    tokenizer = policy.files.tokenizer
    ids = sorted(set(tokenizer.get_vocab().values()))
    for server in pool.up():
        try:
            other = pool.run(scores.other_tokens(server, ids, tokenizer.decode))
        except (ServerError, *UNEXPECTED) as error:
            raise ValueError(
                f"the teacher server {server.url} does not say what its tokens mean ({error}); "
                "start it with python -m atlas_jax.serve and its tokenizer"
            ) from None
        if other:
            raise ValueError(
                f"the teacher server {server.url} has another vocabulary than model_name_or_path: "
                f"{tokenizer.convert_ids_to_tokens(other[0])!r} is not its token {other[0]}, so "
                "the two distributions are not over the same tokens; take models of one family"
            )
