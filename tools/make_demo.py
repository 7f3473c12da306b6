r"""Makes the questions of the demo, and the demonstrations of its warm-up.

    python tools/make_demo.py --output outputs/demo/data --model DIR

Writes `train.jsonl` and `eval.jsonl` of the same kinds, `unseen.jsonl` of kinds that are never
trained on, and `sft.jsonl`: the first questions of `train.jsonl` with the approach that the
student, the model in DIR, writes greedily, and a diagnosis of it. All else follows from the seed.
`--sft_eval` writes the same of the first questions of `eval.jsonl` to `sft_eval.jsonl`.

`--measure` answers all of these demonstrations alone and with their lessons, and prints a table.
With --trial so many problems of each kind, drawn apart, are answered so first; kinds whose lessons
turn too many right answers wrong are left out of all files.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
from collections import Counter
from collections.abc import Mapping

import _checkout  # noqa: F401  (comes first: see there)
import demonstrations
from demo_kinds import TRAINED, UNSEEN, Kind
from demonstrations import Record, Student

from atlas_jax import cli
from atlas_jax.files import write_whole


def main() -> None:
    """Writes the files, and prints the table of `--trial`."""
    parser = cli.ToolParser(__doc__)
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--model", default="", help="Hugging Face directory of the student")
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--eval", type=int, default=500)
    parser.add_argument("--unseen", type=int, default=120)
    parser.add_argument("--sft", type=int, default=240, help="demonstrations; 0 makes none")
    parser.add_argument("--sft_eval", type=int, default=0, help="held-out demonstrations")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--trial", type=int, default=0, help="problems of each kind; 0 keeps all")
    parser.add_argument("--min_non_degradation", type=float, default=0.98)
    parser.add_argument("--seed", type=int, default=18)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves it to torch")
    args = parser.parse_args()
    asks = args.sft or args.sft_eval or args.trial
    if asks and not args.model:
        raise ValueError("--sft and --trial ask the student; give --model, or --sft 0")
    student = Student(args.model, args.threads) if asks else None
    trained, unseen = dict(TRAINED), dict(UNSEEN)
    if student and args.trial:
        dropped = try_kinds(student, trained | unseen, args)
        trained = {name: kind for name, kind in trained.items() if name not in dropped}
        unseen = {name: kind for name, kind in unseen.items() if name not in dropped}
    records = demonstrations.make_problems(args.train + args.eval, args.seed, trained)
    others = demonstrations.make_problems(args.unseen, args.seed, unseen)
    write(args.output / "train.jsonl", records[: args.train])
    write(args.output / "eval.jsonl", records[args.train :])
    write(args.output / "unseen.jsonl", others)
    parts = {"sft": records[: min(args.sft, args.train)]}
    parts["sft_eval"] = records[args.train :][: args.sft_eval]
    shown: list[Record] = []
    for name, part in parts.items():
        if student and part:
            shown += (rows := demonstrate(student, part, trained, args.seed))
            write(args.output / f"{name}.jsonl", rows)
    if student and args.measure:
        measure(student, shown)
    print(
        f"{args.train} + {args.eval} of {len(trained)} kinds, {args.unseen} of {len(unseen)} others"
    )


def try_kinds(student: Student, kinds: Mapping[str, Kind], args: argparse.Namespace) -> set[str]:
    """Prints how the oracle lessons change answers, and returns the kinds that they harm."""
    # Another seed: what chooses the kinds is never asked again.
    records = demonstrations.make_problems(args.trial * len(kinds), args.seed + 1, kinds)
    counts = measure(student, records)
    dropped = {
        name
        for name, count in counts.items()
        if count["harmed"] > (1 - args.min_non_degradation) * count["problems"]
    }
    print(f"left out: {', '.join(sorted(dropped)) or 'none'}")
    return dropped


def measure(student: Student, records: list[Record]) -> dict[str, Counter[str]]:
    """Prints and returns, by kind, how many problems the student solves alone and taught."""
    alone = demonstrations.right_answers(student, records, demonstrations.BASELINE)
    taught = demonstrations.right_answers(student, records, demonstrations.TAUGHT)
    counts = {record["kind"]: Counter[str]() for record in records}
    for record, before, after in zip(records, alone, taught, strict=True):
        counts[record["kind"]].update(
            problems=1, alone=before, taught=after, harmed=before and not after
        )
    columns = "problems", "alone", "taught", "harmed"
    print(f"{'kind':<12}" + "".join(f"{column:>10}" for column in columns))
    for name, count in (counts | {"all": sum(counts.values(), Counter())}).items():
        print(f"{name:<12}" + "".join(f"{count[column]:>10}" for column in columns))
    return counts


def demonstrate(
    student: Student, records: list[Record], kinds: Mapping[str, Kind], seed: int
) -> list[Record]:
    """Returns the records with the student's approach and a diagnosis of it."""
    probes = [demonstrations.PROBE.format(question=r["problem_text"]) for r in records]
    replies = student.reply(probes, demonstrations.PROBE_TOKENS)
    rng = random.Random(seed + 2)
    shown = []
    for record, reply in zip(records, replies, strict=True):
        told = record | {"student_approach": demonstrations.whole_sentences(reply)}
        # The first sentence alone: a whole lesson is to fit into max_new_tokens of the GRPO run.
        method, _, _ = demonstrations.diagnose(told, rng, kinds).partition(". ")
        shown.append(told | {"teacher_diagnosis": f"{method}."})
    return shown


def write(path: pathlib.Path, records: list[Record]) -> None:
    """Writes the records of one file, one JSON object a line."""
    rows = ({"id": f"demo-{path.stem}-{i:04d}"} | record for i, record in enumerate(records))
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    cli.tool(main)
