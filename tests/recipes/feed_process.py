"""One process of a run that only makes batches, from scripted texts; see `test_feed_processes`."""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from atlas_jax import distributed, metrics
from atlas_jax.config import GRPOConfig, HostsConfig, MeshConfig, RewardConfig, RolloutConfig
from atlas_jax.data.questions import QuestionOrder
from atlas_jax.hosts import joined
from atlas_jax.options.train import batch_plan
from atlas_jax.recipes import grpo
from atlas_jax.recipes.feed import Feed, Parts
from atlas_jax.recipes.local_backend import LocalBackend
from atlas_jax.rollout.student_cache import StudentCache
from atlas_jax.sharding import Sharding, make_mesh
from atlas_jax.step import TrainState
from atlas_jax.stopping import StopRequestedError
from atlas_jax.types import Address, DependencyError, Question
from tests.rollout.scripts import Script, protocol, questions

GROUP = 4
STEPS = 3


def say(prompt: str, member: int) -> str:
    """Returns the right answer of some members, of other lengths for other questions."""
    number = int(prompt.split("q")[1].split()[0])
    return str(number) if (number + member) % 3 == 0 else "wrong " * (1 + (number + member) % 4)


def asked() -> list[Question]:
    """Returns questions: a third have a prompt that does not fit, a third no right answer."""
    found = questions(12)
    for i in range(4, 8):
        found[i] = found[i]._replace(text=f"q{i} " + "which is long " * 5)
        found[i + 4] = found[i + 4]._replace(ground_truth="never")
    return found


def make(output: pathlib.Path, num_questions: int, text: Callable[[str, int], str]) -> Feed:
    """Returns a feed over all devices whose policy says `text`."""
    config = GRPOConfig(
        output_dir=str(output),
        num_generations=GROUP,
        train_batch_size=GROUP * num_questions,
        per_device_train_batch_size=2,
        scale_rewards="batch",
        beta=0.0,
        max_prompt_length=16,
        max_new_tokens=48,
        reward=RewardConfig(names=("exact_match",)),
        rollout=RolloutConfig(protocol="direct", refill_rounds=1),
    )
    output.mkdir(parents=True, exist_ok=True)
    sharding = Sharding(make_mesh(MeshConfig()), "fsdp", "none")
    plan = batch_plan(config, sharding.num_replicas)
    parts = Parts(
        config=config,
        layout=grpo.make_layout(config, plan, sharding.num_replicas),
        order=QuestionOrder(asked(), 0, False),
        backend=LocalBackend(lambda params, version: Script(text, version=version).model, None),
        protocol=protocol(size=GROUP, policy=48, prompt=16),
        reward=grpo.make_reward(config, contextlib.ExitStack()),
        logprobs_fn=lambda params, batch: batch.rollout_logprobs,
        sharding=sharding,
        writer=metrics.MetricWriter(str(output), 0, enabled=False),
        student_cache=StudentCache("greedy"),
    )
    return Feed(parts, None)


def run(output: pathlib.Path, num_questions: int) -> None:
    """Makes a few batches; process 0 writes what all of them have."""
    feed = make(output, num_questions, say)
    for step in range(STEPS):
        given = feed.next(TrainState(np.int32(step), {}, None), time.sleep)
        fields = {k: v for k, v in given.batch._asdict().items() if v is not None}
        whole = multihost_utils.process_allgather(fields, tiled=True)
        if not distributed.is_main():
            continue
        np.savez(output / f"batch_{step}.npz", **whole)
        values = {k: v for k, v in given.metrics.items() if not k.startswith("perf/")}
        known = {"metrics": values, "num_tokens": given.num_tokens, "state": feed.get_state()}
        (output / f"step_{step}.json").write_text(json.dumps(known))


def leave(output: pathlib.Path) -> None:
    """Gives up a batch: process 0 has lost its servers, the others are to stop."""

    def fail(prompt: str, member: int) -> str:
        if distributed.is_main():
            raise DependencyError("no server is left")
        raise StopRequestedError("SIGTERM")

    feed = make(output, 4, fail)
    try:
        feed.next(TrainState(np.int32(0), {}, None), time.sleep)
    except (DependencyError, StopRequestedError) as error:
        found = f"{type(error).__name__} at {feed.get_state()['position']}"
        (output / f"left_{jax.process_index()}").write_text(found)


if __name__ == "__main__":
    with joined(HostsConfig(), Address()):
        leave(pathlib.Path(sys.argv[1]))
        for number in map(int, sys.argv[2:]):
            run(pathlib.Path(sys.argv[1]) / str(number), number)
        assert jax.device_count() == 4
