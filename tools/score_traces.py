"""Scores recorded sessions with judges, without training, and compares with what they carry.

    python tools/score_traces.py --traces traces.jsonl --rim rim_config

What a session carries is its reward, the scores of its judges, whether it succeeded, and whether a
person approved it. Prints, for the mean and for each judge, correlation, AUC and calibration, so
that judge models and thresholds can be chosen on sessions of one's own; replies are cached, so
that other thresholds cost nothing. `--output` gets all of it, with the judges' rationales.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import _checkout  # noqa: F401  (comes first: see there)

from atlas_jax import cli
from atlas_jax.files import write_whole
from atlas_jax.rewards import RIMReward, agreement
from atlas_jax.rewards.judges import Case
from atlas_jax.traces import files, sessions
from atlas_jax.traces.query import score_of
from atlas_jax.traces.schema import AtlasSessionTrace

_STATUS = {"succeeded": 1.0, "failed": 0.0}
_REVIEW = {"approved": 1.0, "quarantined": 0.0}


def main() -> None:
    """Reads, scores, prints."""
    parser = cli.ToolParser(__doc__)
    parser.add_argument("--traces", required=True, help="export of sessions (.jsonl, .gz, .zst)")
    parser.add_argument("--rim", default="rim_config", help="options of the judges")
    parser.add_argument(
        "--limit", type=int, default=0, help="sessions, the first ones; 0 takes all"
    )
    parser.add_argument("--good", type=float, default=0.8, help="reward that counts as good (AUC)")
    parser.add_argument("--output", default="agreement.json", help="where the JSON goes")
    options = parser.parse_args()
    reward = RIMReward(config_path=options.rim)
    found, rejected = read(options.traces, options.limit)
    print(f"{len(found)} sessions, {len(rejected)} rejected", *rejected[:5], sep="\n  ")
    results = reward.judge([case_of(session) for session in found])
    rows = [
        {"session_id": s.session_metadata["session_id"], "score": r.value, **r.details}
        for s, r in zip(found, results, strict=True)
    ]
    unscored = [row for row in rows if row["score"] is None]
    print(
        f"{len(unscored)} without a score", *(row["unscored"] for row in unscored[:5]), sep="\n  "
    )
    scores = {"score": [r.value for r in results]} | {
        name: [row["judges"][name]["score"] if "judges" in row else None for row in rows]
        for name in reward.names
    }
    compared = agreement.report(scores, carried(found), options.good)
    print(table(compared))
    judged = [row for row in rows if "judges" in row]
    usage = {name: sum(row[name] for row in judged) for name in ("calls", "cached", "tokens")}
    costs = [row["cost"] for row in judged]
    usage["cost"] = None if None in costs else sum(costs)  # None: its price is not known
    escalated = sum(bool(j["escalation"]) for row in judged for j in row["judges"].values())
    print(usage, f"escalated {escalated}, gamed {sum(bool(row['gaming']) for row in judged)}")
    result = {"agreement": compared, "usage": usage, "rejected": rejected, "sessions": rows}
    write_whole(options.output, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    print(f"written: {options.output}")


def read(path: str, limit: int) -> tuple[list[AtlasSessionTrace], list[str]]:
    """Returns the sessions of an export, and why others are none."""
    found, rejected = [], []
    for name, session in itertools.islice(files.read(path), limit or None):
        if isinstance(session, str):
            rejected.append(f"{name} {session}")
        else:
            found.append(session)
    return found, rejected


def case_of(session: AtlasSessionTrace) -> Case:
    """Returns a session as judges see it: the first attempt as plan, all guidance as lesson."""
    lessons = sessions.lessons(session)
    work = "\n\n".join(step.output for step in session.steps)
    return Case(
        question=session.task,
        ground_truth=sessions.questions(session, answer_as_truth=False)[-1]["ground_truth"],
        baseline="",
        plan=lessons[0]["student_approach"] if lessons else _plan(session.plan),
        lesson="\n\n".join(lesson["teacher_teaching"] for lesson in lessons),
        answer=session.final_answer or work,
        trace=work if session.final_answer else "",
    )


def _plan(plan: dict[str, Any]) -> str:
    steps = plan.get("steps")
    listed = [s for s in steps if isinstance(s, dict)] if isinstance(steps, list) else []
    return "\n".join(str(step.get("description", "")) for step in listed)


def carried(found: list[AtlasSessionTrace]) -> dict[str, list[float | None]]:
    """Returns what sessions carry: rewards, judges' scores, success and review, as columns."""
    rewards = [s.session_reward if isinstance(s.session_reward, dict) else {} for s in found]
    columns: dict[str, list[float | None]] = {
        "reward": [
            score_of(r)
            if score_of(r) is not None
            else score_of(s.session_metadata.get("reward_stats"))
            for s, r in zip(found, rewards, strict=True)
        ],
        "succeeded": [_STATUS.get(str(s.session_metadata["status"])) for s in found],
        "approved": [_REVIEW.get(str(s.session_metadata["review_status"])) for s in found],
    }
    judged = [
        {
            str(j.get("identifier")): score_of(j)
            for j in r.get("judges") or []
            if isinstance(j, dict)
        }
        for r in rewards
    ]
    for name in sorted({name for row in judged for name in row}):
        columns[f"judge {name}"] = [row.get(name) for row in judged]
    return {name: column for name, column in columns.items() if any(v is not None for v in column)}


def table(compared: dict[str, dict[str, Any]]) -> str:
    """Returns the agreement as text."""
    lines = [
        f"{'agreement of':<40}{'pairs':>7}{'pearson':>9}{'spearman':>9}{'AUC':>7}  calibration"
    ]
    for name, values in compared.items():
        numbers = (values["pearson"], values["spearman"], values["auc"])
        shown = ["-" if n is None else f"{n:.2f}" for n in numbers]
        bins = " ".join(
            f"{b['score']:.2f}→{b['target']:.2f}({b['num_samples']})" for b in values["calibration"]
        )
        lines.append(
            f"{name:<40}{values['pairs']:>7}{shown[0]:>9}{shown[1]:>9}{shown[2]:>7}  {bins}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.tool(main)
