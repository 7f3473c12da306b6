"""What a completion is worth, and patience with judges that cannot be reached."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
from absl import logging

from atlas_jax import distributed
from atlas_jax.config import GRPOConfig, RewardConfig
from atlas_jax.rewards import RIMReward, verifiable
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
            reward.answer_leak_penalty,
        ),
        "rim": functools.partial(_judges, config),
    }
    weights = reward.weights or (1.0,) * len(reward.parts)
    return verifiable.combine(
        {name: (known[name](), w) for name, w in zip(reward.parts, weights, strict=True)}
    )


def _judges(config: GRPOConfig) -> Reward:
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

    Every process must call it. `pause` waits for so many seconds.
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
        for i, result in zip(again, reward([rollouts[i] for i in again]), strict=True):
            results[i] = result
    return results


def why(result: RewardResult) -> str:
    """Returns the reasons of the parts of a result that have no score."""
    parts = [result.details, *(p for p in result.details.values() if isinstance(p, dict))]
    return "; ".join(part["unscored"] for part in parts if "unscored" in part)


def _over_processes(results: Sequence[RewardResult], again: Sequence[int]) -> tuple[int, int, int]:
    """Returns how many samples have no score, how many there are, how many may get one."""
    failed = sum(r.score is None for r in results)
    sums = distributed.sum_over_processes(
        {"failed": (failed, len(results)), "hopeful": (len(again), 0)}
    )
    return int(sums["failed"][0]), int(sums["failed"][1]), int(sums["hopeful"][0])
