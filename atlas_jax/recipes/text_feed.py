"""The texts of a distillation step by step: rows of the data, and completions of the policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from atlas_jax import distributed, loop, metrics, step
from atlas_jax.data.packing import bucket_length, capped_buckets
from atlas_jax.options.gkd import GKDConfig
from atlas_jax.rollout import continuations
from atlas_jax.rollout.continuations import Continuation, TextOrder
from atlas_jax.rollout.engine import ChatModel, Request
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.sharding import Sharding, to_global
from atlas_jax.startup.compute import Compute
from atlas_jax.types import Metrics, Params

if TYPE_CHECKING:
    from atlas_jax.recipes.served_teacher import ServedTeacher


class TextLayout(NamedTuple):
    """Division of the texts of a step into rows."""

    rows: int
    """Rows of a step, over all processes."""
    microbatches: int
    buckets: tuple[int, ...]
    """Row lengths, one compilation each."""
    sharding: Sharding
    eval_rows: int
    """Rows of a batch of an evaluation, over all processes."""

    def length(self, longest: int) -> int:
        """Returns the tokens of rows whose longest in this process has so many."""
        return bucket_length(distributed.max_over_processes(longest), self.buckets)

    def share(self, rows: int) -> range:
        """Returns the places of this process's rows among so many."""
        size = rows // jax.process_count()
        return range(jax.process_index() * size, (jax.process_index() + 1) * size)


def make_layout(config: GKDConfig, compute: Compute) -> TextLayout:
    """Returns how the texts of a step are divided; raises as `Compute.plan` does."""
    plan = compute.plan
    return TextLayout(
        rows=plan.global_rows,
        microbatches=plan.microbatches,
        buckets=capped_buckets(config.data.length_buckets, config.max_seq_length),
        sharding=compute.sharding,
        eval_rows=compute.sharding.num_replicas * plan.device_rows,
    )


class TextFeed:
    """Source of each step's rows; its state is the number of the next text."""

    def __init__(
        self,
        config: GKDConfig,
        layout: TextLayout,
        order: TextOrder,
        bind: Callable[[Params, int], ChatModel] | None,
        served: ServedTeacher | None,
    ) -> None:
        """Begins at the first text.

        Args:
            config: of the run.
            layout: of a step.
            order: the texts.
            bind: parameters and their version -> the policy; None where it writes nothing.
            served: the teacher, if it is on servers.
        """
        self.layout = layout
        self._config = config
        self._order = order
        self._bind = bind
        self._served = served
        self._position = 0

    @property
    def samples_policy(self) -> bool:
        """True if completions are sampled from the parameters that the step has changed."""
        return self._bind is not None

    def next(self, state: step.TrainState, pause: Callable[[float], None]) -> loop.StepInput:
        """Returns the next rows, some of them with completions of the policy as it is now."""
        layout = self.layout
        places = self._places(0)
        texts = [self._order.at(place) for place in places]
        if self._served:
            # Servers work while the policy writes, and while it trains on this step.
            self._served.begin(self._given(places) + self._given(self._places(layout.rows)))
        start = time.perf_counter()
        values: Metrics = {}
        if self._bind:
            policy = self._bind(state.whole, int(state.step))
            texts, values = self._written(texts, places, policy)
            values["perf/generate_secs"] = time.perf_counter() - start, 1
        placed = self.placed(texts, layout.microbatches)
        self._position += layout.rows
        values["perf/real_token_frac"] = placed.num_tokens, placed.batch.tokens.size
        return placed._replace(metrics=values | placed.metrics)

    def placed(self, texts: Sequence[Continuation | None], microbatches: int) -> loop.StepInput:
        """Returns rows on the devices, with the scores of a teacher on servers.

        Raises:
            DependencyError: if these servers fail.
            StopRequestedError: if the run is asked to stop while it waits for them.
        """
        served = self._served
        values: Metrics = {}
        if served:
            start = time.perf_counter()
            scores, values = served.take(texts)
            values["perf/score_secs"] = time.perf_counter() - start, 1
            texts = [text if score else None for text, score in zip(texts, scores, strict=True)]
        apart = self._config.teacher_reads == "lesson" and not served
        rows = continuations.collate(texts, apart, self.layout.length)
        if served:
            rows = rows._replace(top=served.laid_out(texts, scores, rows.tokens.shape[1]))
        count = int(distributed.gather(np.asarray((rows.segment_ids > 0).sum())).sum())
        batch = to_global(rows, self.layout.sharding, microbatches)
        return loop.StepInput(batch, count, values)

    def _places(self, ahead: int) -> list[int]:
        """Returns the places of this process's texts, so many texts after the position."""
        return [self._position + ahead + i for i in self.layout.share(self.layout.rows)]

    def _given(self, places: Sequence[int]) -> list[Continuation]:
        """Returns the texts at places where the policy does not write the completion."""
        return [self._order.at(place) for place in places if not self._order.is_own(place)]

    def get_state(self) -> dict[str, Any]:
        """Returns the position in the texts."""
        return {"position": self._position, "fingerprint": self._order.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the texts that were trained on when `state` was taken."""
        self._position = state["position"]

    def get_reference(self) -> None:
        """There is none: the teacher does not change, and is read where it lies."""

    def _written(
        self, texts: list[Continuation], places: list[int], policy: ChatModel
    ) -> tuple[list[Continuation], Metrics]:
        """Returns the texts, some with completions of the policy, and metrics of these."""
        config = self._config
        own = [i for i, place in enumerate(places) if self._order.is_own(place)]
        requests = [
            Request(
                prompt_ids=texts[i].prompt_ids,
                max_tokens=min(
                    config.max_new_tokens, config.max_seq_length - texts[i].longest_prompt
                ),
                seed=int(np.random.SeedSequence((config.seed, places[i])).generate_state(1)[0]),
            )
            for i in own
        ]
        written = policy.generate(requests, Sampling(config.temperature))
        texts = list(texts)
        for i, (completion,) in zip(own, written, strict=True):
            texts[i] = texts[i]._replace(token_ids=completion.token_ids)
        found = [completion for (completion,) in written]
        tokens = sum(c.num_tokens for c in found)
        cut = sum(c.finish_reason == "length" for c in found)
        return texts, metrics.sum_over_processes(
            {
                "distillation/own_frac": (len(found), len(texts)),
                "rollout/completion_tokens": (tokens, len(found)),
                "rollout/truncated_frac": (cut, len(found)),
            }
        )
