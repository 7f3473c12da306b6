"""Generation by vLLM servers: token ids in, token ids and log-probabilities out.

No text is tokenised again. A completion comes back as an `error`, which trains nothing and is
counted with its reason, if a server refused it, failed over it, aborted it, or ended it in an
error; if its log-probabilities are impossible; or if weights wrote it that failed their probe.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from atlas_jax.llm_client import RefusedError, UnavailableError
from atlas_jax.rollout.engine import Request, version_spans
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.servers import Server, ServerPool
from atlas_jax.types import Completion

_ROUNDING = 1e-3  # by which a log-probability may be above 0
_LOWEST = -9000.0  # vLLM says -9999 for minus infinity


@dataclasses.dataclass(frozen=True)
class VllmEngine:
    """Generates with the servers of a pool.

    Attributes:
        pool: of servers.
        tokenizer: turns token ids into text; used by the pool's thread alone.
        stop_ids: tokens that end a text.
        vocab_size: of the model.
        at_least: version of the weights that must begin a completion; until the servers have it,
            or a later one, requests wait.
        seeds: whether each completion is asked for with a seed of its own.
        adapter: name of the adapter of the servers that writes; "" for their model.
    """

    pool: ServerPool
    tokenizer: Any
    stop_ids: tuple[int, ...]
    vocab_size: int
    at_least: int = 0
    seeds: bool = True
    adapter: str = ""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Returns the completions of each request, in order.

        Every sample is a request of its own, which goes to the server with the fewest.

        Raises:
            DependencyError: if no server is left.
            StopRequestedError: as soon as the run is to stop.
        """
        return self.pool.run(self._generate(requests, sampling))

    async def _generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> list[list[Completion]]:
        return await asyncio.gather(
            *(
                asyncio.gather(*(self.one(r, g, sampling) for g in range(r.num_samples)))
                for r in requests
            )
        )

    async def complete(self, request: Request, sample: int, sampling: Sampling) -> Completion:
        """Returns one completion, on any event loop.

        Raises:
            DependencyError: if no server is left, or the pool is closed meanwhile.
        """
        return await self.pool.elsewhere(self.one(request, sample, sampling))

    async def one(
        self, request: Request, sample: int, sampling: Sampling, server: Server | None = None
    ) -> Completion:
        """Returns one completion; `server` is asked first, or the one with the fewest requests."""
        body = self.body(request, sample, sampling)
        await self.pool.reached(self.at_least)
        if not self.seeds:
            del body["sampling_params"]["seed"]
        try:
            answer = await self.pool.ask(body, server)
        except RefusedError as error:
            return _failed(request, f"refused: {error.body}")
        except UnavailableError as error:
            return _failed(request, f"no answer: {error}")
        # A push in progress decides only at its end whether the weights of its label count.
        await self.pool.settled.wait()
        versions = answer.server.versions if self.pool.label else None
        completion = self.read(request, answer.reply, versions)
        # What a completion was computed with may be older than what wrote its first token: it
        # may have waited in the server's queue, and then found its prompt in the cache.
        oldest = min(completion.weights_version, answer.version)
        return completion._replace(weights_version=oldest) if completion.token_ids else completion

    def body(self, request: Request, sample: int, sampling: Sampling) -> dict[str, Any]:
        """Returns the body of the request for one sample."""
        named = {"model": self.adapter} if self.adapter else {}
        return payload(request, sample, sampling, self.stop_ids) | named

    def read(
        self, request: Request, reply: Mapping[str, Any], versions: Mapping[str, int] | None
    ) -> Completion:
        """Returns what a server answered, as an `error` if it must not be trained on.

        Args:
            request: what it was asked.
            reply: what it answered.
            versions: labels of the weights that it may have used, with the step of each; None
                takes any weights, as those of step 0.
        """
        try:
            (choice,) = reply["choices"]
            tokens = tuple(choice["token_ids"])
            content = choice["logprobs"]["content"]
            logprobs = tuple(float(entry["logprob"]) for entry in content)
            sampled = tuple(entry["token_id"] for entry in content)
            spans = choice["weight_versions"]
            labels = [span["version"] for span in spans]
            bounds = [0, *(int(span["end"]) for span in spans)]
            starts = [int(span["start"]) for span in spans]
            reason = choice["finish_reason"]
        except (KeyError, TypeError, ValueError) as error:
            return _failed(request, f"not a completion: {type(error).__name__} {error}")
        stopped = reason == "stop"
        if reason not in ("stop", "length"):
            return _failed(request, f"the server ended it with {reason!r}")
        if not tokens or sampled != tokens or not all(0 <= t < self.vocab_size for t in tokens):
            return _failed(request, "its token ids are impossible")
        # A text that ends otherwise than its reason says would be trained with a wrong end.
        if stopped != (tokens[-1] in self.stop_ids):
            return _failed(request, f"finish_reason {reason!r} with last token {tokens[-1]}")
        if not all(math.isfinite(x) and _LOWEST < x <= _ROUNDING for x in logprobs):
            return _failed(request, "a log-probability is impossible")
        unknown = set(labels) - versions.keys() if versions is not None else set()
        if unknown:
            return _failed(request, f"written by weights {sorted(unknown)} that failed their probe")
        lengths = np.diff(bounds)
        if starts != bounds[:-1] or bounds[-1] != len(tokens) or not (lengths > 0).all():
            return _failed(request, f"its weight_versions {spans} do not cover its tokens")
        text = self.tokenizer.decode(tokens[: len(tokens) - stopped], skip_special_tokens=True)
        written_by = np.repeat([versions[x] if versions else 0 for x in labels], lengths).tolist()
        return Completion(
            prompt_ids=request.prompt_ids,
            token_ids=tokens,
            logprobs=(),
            untruncated_logprobs=logprobs,
            finish_reason=reason,
            text=text,
            weights_version=min(written_by),
            version_spans=version_spans(written_by),
        )


def payload(
    request: Request, sample: int, sampling: Sampling, stop_ids: Sequence[int]
) -> dict[str, Any]:
    """Returns the body of `POST /inference/v1/generate` for one sample of a request.

    `sampling.temperature` 0 asks for the likeliest token at temperature 1, so that the
    log-probabilities are those of `sampling.draw`.
    """
    greedy = sampling.temperature == 0
    # A seed for each sample, since equal seeds would write the group's members alike.
    seed = np.random.SeedSequence((request.seed, sample)).generate_state(1)[0]
    return {
        "token_ids": list(request.prompt_ids),
        "sampling_params": {
            "temperature": 1.0 if greedy else sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 1 if greedy else sampling.top_k,
            "max_tokens": request.max_tokens,
            "seed": int(seed),
            "logprobs": 0,
            "stop_token_ids": list(stop_ids),
            "ignore_eos": True,  # `stop_token_ids` alone end a text
            "detokenize": False,
        },
    }


def _failed(request: Request, why: str) -> Completion:
    return Completion.failed(f"error: {why}", request.prompt_ids)
