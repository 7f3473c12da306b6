"""Sessions of the Atlas runtime: what a trace holds, under the names of the Atlas SDK.

The dataclasses are those of the SDK, so that code written for it runs with the import changed.
`parser` makes them of records, whether these come from a database or from an export.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class AtlasJudgeSample:
    """One draw of a judge."""

    score: float
    rationale: str
    principles: list[dict[str, Any]] = field(default_factory=list)
    uncertainty: float | None = None
    temperature: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the sample as JSON values."""
        return asdict(self)


@dataclass
class AtlasJudgeBreakdown:
    """Verdict of one judge, and the draws that it is made of."""

    identifier: str
    score: float
    rationale: str
    principles: list[dict[str, Any]] = field(default_factory=list)
    samples: list[AtlasJudgeSample] = field(default_factory=list)
    escalated: bool = False
    escalation_reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the breakdown as JSON values."""
        return asdict(self)


@dataclass
class AtlasRewardBreakdown:
    """Reward of a step or of a session."""

    score: float
    judges: list[AtlasJudgeBreakdown] = field(default_factory=list)
    rationale: str | None = None
    raw: dict[str, Any] | None = None
    """The reward as it was recorded."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the reward as JSON values."""
        judges = [judge.to_dict() for judge in self.judges]
        return {
            "score": self.score,
            "rationale": self.rationale,
            "judges": judges,
            "raw": self.raw,
        }


@dataclass
class AtlasStepTrace:
    """One step of a plan: what the student did and what the teacher said about it."""

    step_id: int
    description: str
    trace: str
    output: str
    reward: AtlasRewardBreakdown
    """The session's reward where the runtime recorded a placeholder only."""
    tool: str | None = None
    tool_params: dict[str, Any] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    attempts: int = 1
    guidance: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    deliverable: Any | None = None
    runtime: dict[str, Any] | None = None
    depends_on: list[int | str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the step as JSON values."""
        return vars(self) | {"reward": self.reward.to_dict()}

    @property
    def attempt_history(self) -> list[dict[str, Any]] | None:
        """The evaluation of each attempt, first to last."""
        return self.metadata.get("attempt_history")


@dataclass
class AtlasSessionTrace:
    """One session: a task, its steps, and what came of it."""

    task: str
    final_answer: str
    plan: dict[str, Any]
    steps: list[AtlasStepTrace]
    session_metadata: dict[str, Any] = field(default_factory=dict)
    """Always has `session_id`, `status`, `created_at` and `review_status`."""
    session_reward: dict[str, Any] | None = None
    trajectory_events: list[dict[str, Any]] | None = None
    """Oldest first."""
    student_learning: str | None = None
    teacher_learning: str | None = None
    learning_history: dict[str, Any] | None = None
    adaptive_summary: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the session as JSON values."""
        return vars(self) | {"steps": [step.to_dict() for step in self.steps]}

    @property
    def learning_key(self) -> str | None:
        """Names the tasks that share what was learned."""
        return self.session_metadata.get("learning_key")

    @property
    def teacher_notes(self) -> list[Any] | None:
        """Notes of the teacher about the whole session."""
        return self.session_metadata.get("teacher_notes")

    @property
    def reward_summary(self) -> dict[str, Any] | None:
        """Score and uncertainty of the session."""
        return self.session_metadata.get("reward_summary")

    @property
    def reward_audit(self) -> list[dict[str, Any]] | None:
        """The calls of the judges."""
        return self.session_metadata.get("reward_audit")

    @property
    def triage_dossier(self) -> dict[str, Any] | None:
        """Knowledge of the task before it began."""
        return self.session_metadata.get("triage_dossier")

    @property
    def drift(self) -> dict[str, Any] | None:
        """Departure of the reward from earlier ones."""
        return self.session_metadata.get("drift")

    @property
    def drift_alert(self) -> Any:
        """True if that departure was too large; recorded in `drift` or beside it."""
        nested = self.drift.get("drift_alert") if isinstance(self.drift, dict) else None
        return nested or self.session_metadata.get("drift_alert")
