"""Rewards of samples, and patience with judges that cannot be reached."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from atlas_jax import distributed
from atlas_jax.options import fields
from atlas_jax.options.grpo import GRPOConfig
from atlas_jax.options.reward import RewardConfig
from atlas_jax.rewards import combined
from atlas_jax.stopping import StopRequestedError
from atlas_jax.types import Reward, RewardFn, Sample

UserFunction = Callable[..., Any]
Rule = str | UserFunction
"""The name of a built-in reward, `package.module:function`, or a function itself."""


def make_reward(
    config: GRPOConfig, stack: contextlib.ExitStack, given_functions: Sequence[Rule] = ()
) -> RewardFn:
    """Returns the weighted sum of the rewards that the config names.

    Args:
        config: of the run, checked with the same functions.
        stack: ends processes, event loops and calls of the rewards when it is closed.
        given_functions: rules of a caller from Python, in place of `reward.names`.

    Raises:
        ValueError: for a function that cannot be a reward.
    """
    stack.callback(_end_checks)
    rules = config.reward.rules(given_functions)
    weights = config.reward.weights or (1.0,) * len(rules)
    names = labels(config, given_functions)
    rewards = [_make(rule, name, config, stack) for rule, name in zip(rules, names, strict=True)]
    if config.rollout.num_guided > 1 or config.rollout.num_baseline > 1:
        from atlas_jax.rewards import repeated  # only several answers have a mean

        rewards = [repeated.mean_over_answers(reward) for reward in rewards]
    pairs = zip(rewards, weights, strict=True)
    return combined.combine(dict(zip(names, pairs, strict=True)))


def labels(config: GRPOConfig, given_functions: Sequence[Rule] = ()) -> tuple[str, ...]:
    """Returns the short name of each reward, for metrics and records; see `make_reward`."""
    names = []
    for rule in config.reward.rules(given_functions):
        name = rule if isinstance(rule, str) else _name(rule)
        others = (f"{name}_{i}" for i in itertools.count(2))
        names.append(next(n for n in itertools.chain([name], others) if n not in names))
    return fields.labels(names)


def _name(function: UserFunction) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return name if name.isidentifier() else "function"  # that of a lambda is no word


def _make(rule: Rule, label: str, config: GRPOConfig, stack: contextlib.ExitStack) -> RewardFn:
    """Returns one of the rewards that are added up; each imports what it alone needs."""
    reward = config.reward
    built_in: dict[Rule, Callable[[], RewardFn]] = {
        "exact_match": _exact_match,
        "teaching_gain": functools.partial(_teaching_gain, reward),
        "rim": functools.partial(_judges, config, stack),
    }
    if isinstance(rule, str) and rule in built_in:
        return built_in[rule]()
    from atlas_jax.rewards import custom

    if isinstance(rule, str):
        return custom.by_reference(rule, label, reward.timeout_secs, reward.num_workers, stack)
    return custom.by_object(rule, label, reward.timeout_secs, stack)


def _end_checks() -> None:
    """Ends the process that compares expressions; measures and evaluations start it as well."""
    if symbolic := sys.modules.get("atlas_jax.rewards.symbolic"):  # not imported: never started
        symbolic.close()


def _exact_match() -> RewardFn:
    from atlas_jax.rewards import verifiable

    return verifiable.exact_match()


def _teaching_gain(reward: RewardConfig) -> RewardFn:
    from atlas_jax.rewards import verifiable

    return verifiable.teaching_gain(reward.efficiency_weight, reward.degradation_penalty)


def _judges(config: GRPOConfig, stack: contextlib.ExitStack) -> RewardFn:
    from atlas_jax.rewards.rim import RIMReward

    # A file for each process, since processes may not write one file at the same time.
    account = f"{config.output_dir}/judges_spent_process_{jax.process_index()}.json"
    judges = RIMReward(config.reward.rim, share=jax.process_count(), ledger_path=account)
    return stack.enter_context(contextlib.closing(judges))


def score(reward: RewardFn, samples: Sequence[Sample]) -> list[Sample]:
    """Returns the samples with their rewards."""
    return [
        sample._replace(reward=given)
        for sample, given in zip(samples, reward(samples), strict=True)
    ]


def retry_outages(
    reward: RewardFn,
    samples: Sequence[Sample],
    options: RewardConfig,
    pause: Callable[[float], None],
) -> list[Sample]:
    """Returns the samples, those in an outage scored again if they are too many.

    Skipped samples do not count: nothing that could be waited for would give them a reward. Every
    process must call this together.

    Args:
        reward: the reward function.
        samples: the scored samples of this process.
        options: the share that may stay without a reward, and the wait before each attempt.
        pause: waits for so many seconds, in every process.

    Raises:
        StopRequestedError: if the run is to stop, while this waits or scores.
    """
    samples = list(samples)
    for secs in options.retry_waits_secs:
        # Counted over all processes before each wait, so that all wait or none.
        places = [i for i, s in enumerate(samples) if _is_retryable(s.reward)]
        failed, total, retryable = _count_over_processes(samples, len(places))
        if not retryable or failed <= options.max_failed_frac * total:
            break
        first = next((reason(samples[i].reward) for i in places), "another process knows")
        logging.warning(
            "%d of %d samples have no score; asking again for %d of them in %g s; the first: %s",
            failed,
            total,
            retryable,
            secs,
            first,
        )
        pause(secs)
        with distributed.together(StopRequestedError):
            again = score(reward, [samples[i] for i in places])
        for i, sample in zip(places, again, strict=True):
            samples[i] = sample
    return samples


def reason(reward: Reward) -> str:
    """Returns the reasons for which a reward and its parts have no value."""
    parts = [reward.details, *(p for p in reward.details.values() if isinstance(p, dict))]
    return "; ".join(part["unscored"] for part in parts if "unscored" in part)


def _is_retryable(reward: Reward) -> bool:
    return reward.value is None and reward.is_retryable


def _count_over_processes(samples: Sequence[Sample], retryable: int) -> tuple[int, int, int]:
    """Returns the numbers of samples in an outage, not skipped, and retryable, of all processes."""
    failed = sum(s.reward.is_outage for s in samples)
    total = sum(not s.reward.is_skipped for s in samples)
    counts = distributed.gather(np.asarray([failed, total, retryable])).sum(0)
    return int(counts[0]), int(counts[1]), int(counts[2])
