"""Options of RIM, the reward that language models judge."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated, Literal

from msgspec import Meta

from atlas_jax.options.fields import (
    NonNegative,
    NonNegativeInt,
    OptionalPath,
    Positive,
    PositiveInt,
    Share,
    check_values,
    function_reference,
)

UNKNOWN_PRICE = -1.0

Price = Annotated[float, Meta(ge=-1, extra={"rule": "0 or more, or -1 where it is not known"})]


@dataclasses.dataclass(frozen=True)
class ActiveJudges:
    """Judges that give a score; rules between scores skip the judges that are off."""

    accuracy: bool = True
    """Judges whether the student's answer is right."""
    helpfulness: bool = True
    """Judges whether the lesson made the answer better than the student's own."""
    process: bool = True
    """Judges whether the student followed its plan and the lesson in clear steps."""
    diagnostic: bool = True
    """Judges whether the lesson found the mistake in the student's plan."""


@dataclasses.dataclass(frozen=True)
class JudgeWeights:
    """Weights of the judges' scores in the reward, which is their weighted mean."""

    accuracy: NonNegative = 1.0
    """Weight of the accuracy score."""
    helpfulness: NonNegative = 1.0
    """Weight of the helpfulness score."""
    process: NonNegative = 1.0
    """Weight of the process score."""
    diagnostic: NonNegative = 1.0
    """Weight of the diagnostic score."""


MATERIAL = ("question", "ground_truth", "baseline", "plan", "lesson", "trace", "answer")
"""Texts that judges may see, in the order in which they are shown by default."""

_OF_A_STUDENT = {"baseline", "plan", "lesson", "trace"}
_BUILT_IN = ("accuracy", "helpfulness", "process", "diagnostic")


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge: its task, the texts that it sees, and what its score weighs.

    Example:
        BREVITY = Judge(
            name="brevity",
            prompt="You judge whether an answer is short. Every sentence must be needed.",
            sees=("question", "answer"),
            weight=0.5,
        )
    """

    name: str
    """Name for metrics and records, `rim_rewards/NAME`."""
    prompt: str
    """Role and task in words. The frame around it asks for principles, a rationale, a score from 0
    to 1 and an uncertainty as JSON, and protects the judge from instructions in the texts."""
    sees: tuple[str, ...] = ("question", "ground_truth", "answer")
    """Texts that the judge is shown, some of `MATERIAL`. A judge that sees the lesson gives 0,
    without a call, where there is none."""
    weight: float = 1.0
    """Weight of its score in the mean, 0 or more; 0 only reports it."""

    def check(self, option: str) -> None:
        """Checks the judge.

        Args:
            option: the option and the reference that it stands in, for errors.

        Raises:
            ValueError: says what is wrong, its value and what to write instead.
        """
        if not self.name.isidentifier() or self.name in _BUILT_IN:
            raise ValueError(
                f"{option}: name={self.name!r} must be letters, digits and underscores, and not "
                f"the name of a built-in judge ({', '.join(_BUILT_IN)})"
            )
        if not self.prompt.strip():
            raise ValueError(f"{option}: the prompt is empty; say what the judge is to judge")
        if not self.sees or set(self.sees) - set(MATERIAL):
            raise ValueError(
                f"{option}: sees={self.sees!r} must name some of {', '.join(MATERIAL)}"
            )
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"{option}: weight={self.weight} must be a number of 0 or more")


@functools.cache
def _own_judges(references: tuple[str, ...], option: str) -> tuple[Judge, ...]:
    """Returns the judges that `module:NAME` references name, checked."""
    from atlas_jax import sockets  # a user's own judges

    judges = []
    for reference in references:
        judge = sockets.resolve_object(reference, option)
        if not isinstance(judge, Judge):
            raise ValueError(
                f"{option}={reference} is a {type(judge).__name__}; it must be an "
                "atlas_jax.rewards.Judge"
            )
        judge.check(f"{option}={reference}")
        judges.append(judge)
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise ValueError(f"{option}={references} have the names {names}; give each its own")
    return tuple(judges)


@dataclasses.dataclass(frozen=True)
class JudgeModel:
    """A model at an OpenAI-compatible endpoint."""

    model: str = "gemini/gemini-2.5-flash"
    """Name of the judge's model: with `base_url` the name that the server uses, without it
    `gemini/…`, `openai/…`, `anthropic/…` or `xai/…`."""
    base_url: str = ""
    """Address of an OpenAI-compatible server, up to and including `/v1`, such as
    `http://localhost:8765/v1`; empty asks the provider that the model's name begins with."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key. Empty sends no key, or to a provider the
    key in the provider's own variable, which is refused for any other address."""
    response_format: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    """Way in which the server is asked for JSON; `auto` takes the first of `json_schema`,
    `json_object` and `none` that the server accepts."""
    max_tokens: PositiveInt = 2048
    """Most tokens of a reply, thinking included. A reply that is cut off is asked for again with
    twice as many, and then with four times as many."""
    input_price: Price = UNKNOWN_PRICE
    """Price of a million prompt tokens, in the currency of `reward.rim.limits.max_cost`; -1 is the
    list price for the providers' models that the shipped configs name, and unknown for others."""
    output_price: Price = UNKNOWN_PRICE
    """Price of a million tokens of replies, in the form of `input_price`."""


@dataclasses.dataclass(frozen=True)
class ConsistencyRules:
    """Limits of scores relative to the scores of other judges."""

    process_over_accuracy: Share = 0.1
    """Most that the process score may be above the accuracy score; 1 switches the rule off."""
    process_for_helpfulness: Share = 0.5
    """Process score that a higher helpfulness score needs. If process is below it, helpfulness is
    at most this value. 0 switches the rule off."""
    helpfulness_over_diagnostic: Share = 0.1
    """Most that the helpfulness score may be above the diagnostic score; 1 switches the rule
    off."""


@dataclasses.dataclass(frozen=True)
class AntiGaming:
    """Search for lessons that aim at the judge and not at the student."""

    enabled: bool = True
    """Searches for lessons that speak to the judges or fill space. A lesson that states the
    answer is found in any case."""
    max_repeated_frac: Share = 0.6
    """Share of a lesson's words, copied from the question or said before, above which the lesson
    counts as filler."""
    ask_judges: bool = False
    """Asks each judge, in the same call, whether the lesson gives the answer away or speaks to the
    judge. More than half of the opinions decide."""


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """Texts that judges are told and shown."""

    house_rules: str = ""
    """Rules in words that every judge applies beside its own task."""
    show_ground_truth: bool = True
    """Shows judges the ground truth."""
    show_baseline: bool = True
    """Shows judges the student's answer without a lesson."""
    max_chars: PositiveInt = 12000
    """Most characters of each text. The middle of a longer one is left out, visibly."""


@dataclasses.dataclass(frozen=True)
class JudgeLimits:
    """Limits of what judges may cost. Processes of a run share them equally."""

    max_in_flight: PositiveInt = 64
    """Most calls that an endpoint has at one time; fewer while it refuses some as too many."""
    requests_per_minute: NonNegativeInt = 0
    """Most requests to an endpoint in a minute; 0 sets no limit."""
    tokens_per_minute: NonNegativeInt = 0
    """Most tokens of an endpoint in a minute, prompts and replies together; 0 sets no limit."""
    max_calls: NonNegativeInt = 0
    """Most calls of the whole run, restarts included; 0 sets no limit."""
    max_cost: NonNegative = 0.0
    """Most that judges may cost in the whole run, restarts included, in the currency of the prices;
    0 sets no limit. The prices of both models must be known."""
    timeout_secs: Positive = 120.0
    """Most seconds that a reply may take."""
    max_tries: PositiveInt = 4
    """Most requests of one call, after replies that did not come or could not be read. Requests
    that a server refuses as too many, or for a parameter that it does not know, do not count."""


@dataclasses.dataclass(frozen=True)
class RIMConfig:
    """Judges, an arbiter, and rules between them."""

    temperatures: tuple[NonNegative, ...] = (0.2, 0.5, 0.8)
    """Temperatures at which each judge asks the small model, one call for each."""
    variance_threshold: NonNegative = 0.15
    """Standard deviation of a judge's scores above which the large model decides."""
    uncertainty_threshold: Share = 0.3
    """Uncertainty of any opinion of a judge above which the large model decides."""
    arbiter_temperature: NonNegative = 0.3
    """Temperature of the large model."""
    cache_dir: OptionalPath = "~/.cache/atlas_jax/judges"
    """Directory of the file in which replies are kept for later runs; empty keeps none."""
    cache_max_bytes: NonNegativeInt = 2**30
    """Bytes of that file above which the oldest replies are removed; 0 sets no limit."""
    replay: bool = False
    """Reads every reply from the cache, and fails where the cache has none."""
    judges: tuple[Annotated[str, function_reference()], ...] = ()
    """Judges of your own beside the built-in ones, each an `atlas_jax.rewards.Judge`, written
    `package.module:NAME`."""
    active_judges: ActiveJudges = ActiveJudges()
    judge_weights: JudgeWeights = JudgeWeights()
    small_model: JudgeModel = JudgeModel()
    large_model: JudgeModel = JudgeModel(model="gemini/gemini-2.5-pro")
    consistency_rules: ConsistencyRules = ConsistencyRules()
    anti_gaming: AntiGaming = AntiGaming()
    prompt: JudgePrompt = JudgePrompt()
    limits: JudgeLimits = JudgeLimits()

    @property
    def judge_names(self) -> tuple[str, ...]:
        """The active judges, those of the user's own last."""
        return (*self._active, *(judge.name for judge in self.own_judges))

    @property
    def _active(self) -> tuple[str, ...]:
        """The active ones of the built-in judges."""
        active = self.active_judges
        named = {
            "accuracy": active.accuracy,
            "helpfulness": active.helpfulness,
            "process": active.process,
            "diagnostic": active.diagnostic,
        }
        return tuple(name for name, is_active in named.items() if is_active)

    @property
    def own_judges(self) -> tuple[Judge, ...]:
        """The judges of the user's own, imported.

        Raises:
            ValueError: if one cannot be imported or is no valid judge.
        """
        return _own_judges(self.judges, "reward.rim.judges")

    @property
    def need_student(self) -> tuple[str, ...]:
        """The active judges that see texts of a student or for one."""
        built_in = [name for name in self._active if name != "accuracy"]
        own = [judge.name for judge in self.own_judges if _OF_A_STUDENT & set(judge.sees)]
        return (*built_in, *own)

    @property
    def weights(self) -> dict[str, float]:
        """Active judge -> the weight of its score."""
        given = vars(self.judge_weights) | {j.name: j.weight for j in self.own_judges}
        return {name: given[name] for name in self.judge_names}

    def check(self, prefix: str = "reward.rim.") -> None:
        """Checks each option, and those that must fit each other.

        Raises:
            ValueError: names the options, their values and what to write instead.
        """
        check_values(self, prefix)
        if not self.judge_names:
            raise ValueError(f"{prefix}active_judges are all False; set one at least to True")
        if not any(self.weights.values()):
            raise ValueError(
                f"{prefix}judge_weights leave the active judges {', '.join(self.judge_names)} "
                "without weight; raise one above 0"
            )
        temperatures = self.temperatures
        if not temperatures or len(set(temperatures)) < len(temperatures):
            raise ValueError(
                f"{prefix}temperatures={temperatures} must name each temperature once, and one at "
                "least"
            )
        if self.replay and not self.cache_dir:
            raise ValueError(f"{prefix}replay=True without a cache; set {prefix}cache_dir")
        for name, model in (("small_model", self.small_model), ("large_model", self.large_model)):
            for option in ("input_price", "output_price"):
                price = getattr(model, option)
                if UNKNOWN_PRICE < price < 0:
                    raise ValueError(
                        f"{prefix}{name}.{option}={price} must be 0 or more, or {UNKNOWN_PRICE:g} "
                        "where it is not known"
                    )
