"""The options of RIM, the judges' reward, as frozen dataclasses. Imports no JAX."""

from __future__ import annotations

import dataclasses

UNKNOWN_PRICE = -1.0


@dataclasses.dataclass(frozen=True)
class ActiveJudges:
    """Which judges speak; the others' rules are left out."""

    accuracy: bool = True
    """Is the student's answer right?"""
    helpfulness: bool = True
    """Did the lesson make the answer better than the student's own?"""
    process: bool = True
    """Did the student follow its plan and the lesson in clear steps?"""
    diagnostic: bool = True
    """Did the lesson find what was wrong with the student's plan?"""


@dataclasses.dataclass(frozen=True)
class JudgeModel:
    """A model behind an OpenAI-compatible endpoint."""

    model: str = "gemini/gemini-2.5-flash"
    """As the server calls it; without `base_url`, `gemini/…`, `openai/…`, `anthropic/…` or
    `xai/…`."""
    base_url: str = ""
    """Up to and including `/v1`, such as `http://localhost:8765/v1`."""
    api_key_env: str = ""
    """Environment variable that holds the key; empty sends none, or to a provider the provider's.
    A provider's variable is refused for any other address."""
    response_format: str = "auto"
    """`json_schema`, `json_object`, `none`, or `auto`: the first of these that the server takes."""
    max_tokens: int = 2048
    """Tokens of a reply, thinking included; one that is cut off is asked for again with twice the
    room, and then with four times."""
    input_price: float = UNKNOWN_PRICE
    """Money for a million prompt tokens; -1 is a provider's list price, if `endpoints` has it, and
    not known for an endpoint of one's own."""
    output_price: float = UNKNOWN_PRICE
    """The same for a million tokens of replies."""


@dataclasses.dataclass(frozen=True)
class ConsistencyRules:
    """What scores of different judges may not say at once; 1 switches a rule off."""

    process_over_accuracy: float = 0.1
    """How far process may be above accuracy."""
    process_for_helpfulness: float = 0.5
    """Where process is below this, helpfulness is at most this; 0 switches it off."""
    helpfulness_over_diagnostic: float = 0.1
    """How far helpfulness may be above diagnostic."""


@dataclasses.dataclass(frozen=True)
class AntiGaming:
    """How lessons are found that aim at the judge and not at the student."""

    enabled: bool = True
    """Search for them; a lesson that states the answer is found in any case."""
    max_repeated_frac: float = 0.6
    """Share of a lesson's words, copied from the question or said before, that is filler."""
    ask_judges: bool = False
    """Ask each judge in the same call, too, whether the lesson gives the answer away or speaks to
    the judge; more than half of the opinions decide."""


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """What judges are told and shown."""

    house_rules: str = ""
    """Text that every judge has to apply, besides its own task."""
    show_ground_truth: bool = True
    show_baseline: bool = True
    """Show the student's answer without a lesson."""
    max_chars: int = 12000
    """Characters of each text; the middle of a longer one is left out, visibly."""


@dataclasses.dataclass(frozen=True)
class JudgeLimits:
    """What judges may cost; 0 is no limit. Processes of a run share them equally."""

    max_in_flight: int = 64
    """Calls that an endpoint has at one time, unless it refuses some of them as too many."""
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    """Prompts and replies together."""
    max_calls: int = 0
    """Calls of the whole run, restarts included."""
    max_cost: float = 0.0
    """Money for the whole run, restarts included; the prices of both models must be known."""
    timeout_secs: float = 120.0
    """Longest wait for one reply."""
    max_tries: int = 4
    """Requests of one call at most, whether nothing came back or what came could not be read. Those
    that a server refuses as too many, or for a parameter that it does not know, are not counted."""


@dataclasses.dataclass(frozen=True)
class RIMConfig:
    """Judges, an arbiter, and rules between them."""

    temperatures: tuple[float, ...] = (0.2, 0.5, 0.8)
    """One call of the small model for each."""
    variance_threshold: float = 0.15
    """Standard deviation of a judge's scores above which the large model decides."""
    uncertainty_threshold: float = 0.3
    """Uncertainty of any of them above which it does."""
    arbiter_temperature: float = 0.3
    cache_dir: str = "~/.cache/atlas_jax/judges"
    """Replies are kept here, in one file, by all that decides them; empty keeps none."""
    cache_max_bytes: int = 2**30
    """Size of that file, above which the oldest replies go; 0 is no limit."""
    replay: bool = False
    """Read every reply from the cache, and fail where it has none."""
    active_judges: ActiveJudges = ActiveJudges()
    small_model: JudgeModel = JudgeModel()
    large_model: JudgeModel = JudgeModel(model="gemini/gemini-2.5-pro")
    consistency_rules: ConsistencyRules = ConsistencyRules()
    anti_gaming: AntiGaming = AntiGaming()
    prompt: JudgePrompt = JudgePrompt()
    limits: JudgeLimits = JudgeLimits()

    @property
    def judge_names(self) -> tuple[str, ...]:
        """The active judges."""
        active = self.active_judges
        named = {
            "accuracy": active.accuracy,
            "helpfulness": active.helpfulness,
            "process": active.process,
            "diagnostic": active.diagnostic,
        }
        return tuple(name for name, is_active in named.items() if is_active)
