"""Which sessions are wanted: one set of filters for databases and for exports."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from atlas_jax.options.data import DataConfig
from atlas_jax.traces.schema import AtlasSessionTrace
from atlas_jax.traces.values import as_time

NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]{1,3})?", re.ASCII)
LARGEST_SCORE = 1e300


@dataclasses.dataclass(frozen=True)
class Query:
    """Filters of sessions, and how much of each is read; the defaults take everything."""

    min_reward: float = 0.0
    """Lowest `reward_stats.score`; 0 takes sessions without a score too."""
    created_after: datetime.datetime | None = None
    """Inclusive; without a zone it is UTC."""
    created_before: datetime.datetime | None = None
    """Exclusive; without a zone it is UTC."""
    learning_key: str | None = None
    status_filters: Sequence[str] = ()
    """Such as `succeeded`; empty takes all."""
    review_status_filters: Sequence[str] = ()
    """Such as `approved`; empty takes all."""
    session_id: int | None = None
    include_trajectory_events: bool = True
    include_learning_data: bool = True

    def __post_init__(self) -> None:
        """Checks the values, so that none of a wrong type gets as far as a database.

        Raises:
            ValueError: names the filter, its value and what it must be.
        """
        if isinstance(self.min_reward, bool) or not isinstance(self.min_reward, int | float):
            raise ValueError(f"min_reward={self.min_reward!r} must be a number")
        if self.session_id is not None and type(self.session_id) is not int:
            raise ValueError(f"session_id={self.session_id!r} must be an integer")
        for name in ("created_after", "created_before"):
            object.__setattr__(self, name, _utc(name, getattr(self, name)))
        if self.learning_key is not None:
            object.__setattr__(self, "learning_key", _text("learning_key", self.learning_key))
        for name in ("status_filters", "review_status_filters"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise ValueError(f"{name}={given!r} must be a list of texts, such as [{given!r}]")
            object.__setattr__(self, name, tuple(_text(name, item) for item in given))

    @classmethod
    def from_config(cls, config: DataConfig) -> Query:
        """Returns the filters of a run.

        Raises:
            ValueError: for a time that cannot be read.
        """
        return cls(
            min_reward=config.min_reward,
            created_after=as_time(config.created_after, "data.created_after"),
            created_before=as_time(config.created_before, "data.created_before"),
            learning_key=config.learning_key or None,
            status_filters=config.status_filters,
            review_status_filters=config.review_status_filters,
            include_trajectory_events=config.include_trajectory_events,
        )

    def matches(self, session: AtlasSessionTrace) -> bool:
        """True if the session passes the filters; `postgres_sql.where` says the same in SQL."""
        metadata = session.session_metadata
        score = score_of(metadata.get("reward_stats"))
        created = as_time(metadata["created_at"], "created_at")
        return (
            (self.session_id is None or metadata["session_id"] == self.session_id)
            and (not self.min_reward or (score is not None and score >= self.min_reward))
            and (not self.created_after or (created is not None and created >= self.created_after))
            and (not self.created_before or (created is not None and created < self.created_before))
            and (self.learning_key is None or metadata.get("learning_key") == self.learning_key)
            and (not self.status_filters or metadata["status"] in self.status_filters)
            and (
                not self.review_status_filters
                or metadata["review_status"] in self.review_status_filters
            )
        )

    def described(self) -> dict[str, Any]:
        """Returns the filters as JSON values."""
        values = dataclasses.asdict(self)
        for name, value in values.items():
            if isinstance(value, datetime.datetime):
                values[name] = value.isoformat()
            elif isinstance(value, tuple):
                values[name] = list(value)
        return values


def score_of(stats: Any) -> float | None:
    """Returns the score in `reward_stats`, by which sessions are selected; None if there is none.

    It may be a text of a number; what is too large for a float, and NaN, count as none.
    """
    score = stats.get("score") if isinstance(stats, Mapping) else None
    if isinstance(score, str) and NUMBER.fullmatch(score):
        score = float(score)
    if isinstance(score, bool) or not isinstance(score, int | float):
        return None
    return float(score) if abs(score) < LARGEST_SCORE else None


def _utc(name: str, when: Any) -> datetime.datetime | None:
    if when is None:
        return None
    if not isinstance(when, datetime.datetime):
        raise ValueError(f"{name}={when!r} must be a datetime")
    return when.replace(tzinfo=datetime.UTC) if when.tzinfo is None else when


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{name} has {value!r}; it must be a text without NUL characters")
    return value
