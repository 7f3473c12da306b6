"""Options of the reward: what a completion is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from atlas_jax.options import fields
from atlas_jax.options.fields import (
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    choices_or_function,
)
from atlas_jax.options.judges import RIMConfig


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Rewards of a completion."""

    kind: Literal["rule", "rim", "mixed"] = "rule"
    """Source of the reward: `rule` adds up the rewards of `reward.names`, `rim` asks judges,
    `mixed` adds up both."""
    names: tuple[Annotated[str, choices_or_function("teaching_gain", "exact_match")], ...] = (
        "teaching_gain",
    )
    """Names of the rewards that are added up, also functions of your own as
    `package.module:function`; `reward.kind=rim` uses none of them."""
    weights: tuple[float, ...] = ()
    """Weights of the sum, one for each of `reward.names` and then one for the judges; an empty list
    weighs each 1."""
    efficiency_weight: NonNegative = 1.0
    """Reward that `teaching_gain` adds to a right answer if the lesson saved all of its tokens."""
    degradation_penalty: NonNegative = 1.0
    """Reward that `teaching_gain` takes off where a right answer became wrong."""
    answer_leak_penalty: NonNegative = 0.5
    """Distance that a lesson which states the answer, or aims at the judges, stays below the lowest
    honest one of its group. A group without an honest lesson trains nothing."""
    missing_lesson_penalty: NonNegative = 0.0
    """Distance that a text without a lesson, or one cut by `max_new_tokens`, stays below the lowest
    honest lesson of its group, so that not to teach, or not to end, is never the best choice; 0
    leaves such a text its own reward."""
    overlong_tokens: NonNegativeInt = 0
    """Number of tokens before `max_new_tokens` over which a completion loses reward, each of them
    the same (DAPO's soft overlong punishment, arXiv:2503.14476); 0 takes nothing off."""
    overlong_penalty: NonNegative = 1.0
    """Reward that a completion of `max_new_tokens` loses by `reward.overlong_tokens`."""
    max_failed_frac: Fraction = 0.2
    """Share of a step's samples left without a score by servers or judges above which the run waits
    and asks again for them, and stops with a checkpoint if that does not help. Samples that are
    skipped (too long a prompt, no lesson) do not count."""
    retry_waits_secs: tuple[NonNegative, ...] = (30.0, 60.0, 120.0, 300.0, 600.0)
    """Seconds to wait before each further attempt to score them; an empty list stops at once."""
    timeout_secs: Positive = 10.0
    """Longest time that one call of a reward function of your own may take, in seconds. Its samples
    then have no score."""
    num_workers: PositiveInt = 8
    """Number of processes that run each sync reward function of your own."""
    rim: RIMConfig = RIMConfig()

    @property
    def parts(self) -> tuple[str, ...]:
        """The rewards that are added up, in the order of `weights`."""
        rules: tuple[str, ...] = () if self.kind == "rim" else self.names
        return rules if self.kind == "rule" else (*rules, "rim")

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of `parts`, for metrics and records."""
        return fields.labels(self.parts)

    @property
    def functions(self) -> tuple[str, ...]:
        """The rewards that are functions of the user's own."""
        return tuple(filter(fields.is_reference, self.parts))

    def rules(self, given: Sequence[Any] = ()) -> tuple[Any, ...]:
        """Returns the rewards that are added up: names, and functions of a caller from Python.

        Args:
            given: rewards of that caller, in place of `names`.
        """
        if not given:
            return self.parts
        return (*given, "rim") if "rim" in self.parts else tuple(given)

    def needs_truth(self, given: Sequence[Any] = ()) -> bool:
        """Returns true if a question without a ground truth cannot be scored.

        Args:
            given: rewards of a caller from Python, in place of `names`.
        """
        names = [rule for rule in given or self.parts if isinstance(rule, str)]
        return any(name != "rim" and not fields.is_reference(name) for name in names)

    def check(self, given: Sequence[Any] = ()) -> None:
        """Checks the options together.

        Args:
            given: rewards of a caller from Python, in place of `names`.

        Raises:
            ValueError: names the options, their values and what to write instead.
        """
        if self.weights and len(self.weights) != len(self.rules(given)):
            rules = tuple(getattr(rule, "__name__", rule) for rule in self.rules(given))
            raise ValueError(
                f"reward.weights={self.weights} for {rules}; give one weight for each name, or none"
            )
        for name in (rule for rule in given if isinstance(rule, str)):
            fields.check("rewards", (name,), fields.hints(RewardConfig)["names"])
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"reward.names={self.names} must name each reward once, and one at least"
            )
        if "rim" in self.parts:
            self.rim.check()
