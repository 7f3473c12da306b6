"""What a completion is worth, and patience with judges that cannot be reached."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import logging

from atlas_jax import distributed
from atlas_jax.config import GRPOConfig, RewardConfig
from atlas_jax.rewards import verifiable
from atlas_jax.stopping import StopRequestedError
from atlas_jax.types import Reward, RewardResult, Rollout


def make_reward(config: GRPOConfig) -> Reward:
    """Returns the weighted sum of the rewards that the config names."""
    reward = config.reward
    known: dict[str, Callable[[], Reward]] = {
        "exact_match": verifiable.exact_match,
        "teaching_gain": functools.partial(
            verifiable.teaching_gain,
            reward.efficiency_weight,
            reward.degradation_penalty,
        ),
        "rim": functools.partial(_judges, config),
    }
    weights = reward.weights or (1.0,) * len(reward.parts)
    return verifiable.combine(
        {name: (known[name](), w) for name, w in zip(reward.parts, weights, strict=True)}
    )


def _judges(config: GRPOConfig) -> Reward:
    from atlas_jax.rewards import RIMReward  # needs an HTTP client, and no other reward does

    account = f"{config.output_dir}/judges_spent_process_{jax.process_index()}.json"
    return RIMReward(config.reward.rim, share=jax.process_count(), ledger_path=account)


def ask_again(
    reward: Reward,
    rollouts: Sequence[Rollout],
    results: Sequence[RewardResult],
    options: RewardConfig,
    pause: Callable[[float], None],
) -> list[RewardResult]:
    """Returns the results; where too many have no score, after further attempts at these alone.

    Skipped samples do not count: nothing that could be waited for would give them a score. Every
    process must call this together.

    Args:
        reward: scores the samples.
        rollouts: the samples of this process.
        results: what `reward` said of them.
        options: the share that may be without a score, and how long to wait before each attempt.
        pause: waits for so many seconds, in every process.

    Raises:
        StopRequestedError: if the run is to stop, while this waits or scores.
    """
    results = list(results)
    for secs in options.retry_waits_secs:
        again = [i for i, r in enumerate(results) if r.score is None and r.later]
        failed, total, hopeful = _over_processes(results, again)
        if not hopeful or failed <= options.max_failed_frac * total:
            break
        first = next((why(results[i]) for i in again), "another process knows")
        logging.warning(
            "%d of %d samples have no score; asking again for %d of them in %g s; the first: %s",
            failed, total, hopeful, secs, first,
        )  # fmt: skip
        pause(secs)
        with distributed.together(StopRequestedError):
            scored = reward([rollouts[i] for i in again])
        for i, result in zip(again, scored, strict=True):
            results[i] = result
    return results


def why(result: RewardResult) -> str:
    """Returns the reasons of the parts of a result that have no score."""
    parts = [result.details, *(p for p in result.details.values() if isinstance(p, dict))]
    return "; ".join(part["unscored"] for part in parts if "unscored" in part)


def _over_processes(results: Sequence[RewardResult], again: Sequence[int]) -> tuple[int, int, int]:
    """Returns of all processes the samples in an outage, those not skipped, those to ask again."""
    failed = sum(r.is_outage for r in results)
    total = sum(not r.is_skipped for r in results)
    counts = distributed.gather(np.asarray([failed, total, len(again)])).sum(0)
    return int(counts[0]), int(counts[1]), int(counts[2])
