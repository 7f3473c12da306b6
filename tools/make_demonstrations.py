r"""Makes the teaching demonstrations of the quickstart, and measures what their lessons are worth.

    python tools/make_demonstrations.py --model DIR --output configs/data/quickstart \
      --measure

The approaches are what the student, the model in DIR, writes greedily. All else follows from the
seed.
"""

from __future__ import annotations

import collections
import json
import pathlib
import random
import re
from collections.abc import Mapping
from typing import Any

import _checkout  # noqa: F401  (comes first: see there)
from demonstration_kinds import KINDS, METHODS, Kind

from atlas_jax import cli, extras
from atlas_jax.rewards.answers import is_correct
from atlas_jax.rewards.leaks import states_answer

TASK = 'Solve the problem in one short sentence, then write "Answer:" and the final answer.'
BASELINE = "{question}\n\n" + TASK
TAUGHT = "{question}\n\nHint: {teaching}\n\n" + TASK
PROBE = (
    "{question}\n\n"
    "Do not solve the problem. Describe in one or two short sentences how you would approach it."
)
PROBE_TOKENS = 60
ANSWER_TOKENS = 48
_DRAWS = 2000  # without a new problem, after which a kind counts as exhausted

Record = dict[str, str]


def main() -> None:
    """Writes `train.jsonl` and `eval.jsonl`, and prints the table of `--measure`."""
    parser = cli.ToolParser(__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory of the student")
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--train", type=int, default=291)
    parser.add_argument("--eval", type=int, default=58)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves it to torch")
    parser.add_argument("--measure", action="store_true")
    args = parser.parse_args()
    student = Student(args.model, args.threads)
    records = make_problems(args.train + args.eval, args.seed)
    probes = [PROBE.format(question=record["problem_text"]) for record in records]
    rng = random.Random(args.seed + 1)
    for record, reply in zip(records, student.reply(probes, PROBE_TOKENS), strict=True):
        record["student_approach"] = whole_sentences(reply)
        record["teacher_diagnosis"] = diagnose(record, rng)
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output / "train.jsonl", "train", records[: args.train])
    write(args.output / "eval.jsonl", "eval", records[args.train :])
    if args.measure:
        print(measure(student, records))


def make_problems(count: int, seed: int, kinds: Mapping[str, Kind] = KINDS) -> list[Record]:
    """Returns different problems, the kinds in turn, none with its answer in the lesson.

    Every kind has a draw of its own, so that its problems do not depend on the other kinds. One
    that has no further problem leaves the turns. The answer is in the question only where it has
    to be chosen from there.

    Raises:
        ValueError: if the kinds have fewer problems.
    """
    draws = {name: random.Random(f"{seed} {name}") for name in kinds}
    seen: set[str] = set()
    records: list[Record] = []
    left = list(kinds)
    while len(records) < count:
        if not left:
            raise ValueError(f"the kinds have {len(records)} problems, not {count}; ask for fewer")
        for name in tuple(left):
            record = _draw(name, kinds[name], draws[name], seen)
            if record is None:
                left.remove(name)
            else:
                records.append(record)
    return records[:count]


def _draw(name: str, kind: Kind, rng: random.Random, seen: set[str]) -> Record | None:
    """Returns a problem that is not `seen` yet, which it then is; None if there is none left."""
    for _ in range(_DRAWS):
        question, answer, lesson = kind.make(rng)
        given = answer in numbers(question) or states_answer(question, answer)
        leaks = answer in numbers(lesson) or states_answer(lesson, answer, question)
        if question in seen or leaks or (given and not kind.chosen):
            continue
        seen.add(question)
        return {
            "kind": name,
            "problem_text": question,
            "ground_truth": answer,
            "teacher_teaching": lesson,
        }
    return None


def diagnose(record: Record, rng: random.Random, kinds: Mapping[str, Kind] = KINDS) -> str:
    """Says what is right or missing in the student's approach, from what it mentions.

    Raises:
        ValueError: if the diagnosis would state the answer.
    """
    kind, approach = kinds[record["kind"]], record["student_approach"]
    needed = METHODS[kind.method].noun
    named = {
        name
        for name, (_, mention) in METHODS.items()
        if re.search(mention, approach, re.IGNORECASE)
    }
    others = sorted(METHODS[name].noun for name in named - {kind.method})
    if kind.method in named and others:
        method = (
            f"The student mentions {needed} but mixes it with {others[0]}",
            f"The right {needed} is there, but so is a needless {others[0]}",
        )
    elif kind.method in named:
        method = (f"The student rightly thinks of {needed}", f"Choosing {needed} is right")
    elif others:
        method = (
            f"The student plans {others[0]} where {needed} is needed",
            f"The plan turns to {others[0]}, but the problem asks for {needed}",
        )
    else:
        method = (
            f"The student does not name a method; {needed} is needed",
            f"The approach misses the {needed}",
        )
    diagnosis = f"{rng.choice(method)}: {kind.clue}. {rng.choice(_about_numbers(record, kind))}"
    if states_answer(diagnosis, record["ground_truth"], record["problem_text"]):
        raise ValueError(
            f"the diagnosis {diagnosis!r} states the answer {record['ground_truth']!r}; word it "
            "without numbers"
        )
    return diagnosis


def _about_numbers(record: Record, kind: Kind) -> tuple[str, ...]:
    """Returns sentences on how the approach deals with the numbers of the question."""
    given, used = set(numbers(record["problem_text"])), set(numbers(record["student_approach"]))
    foreign = used - given - set(numbers(record["teacher_teaching"]))
    if kind.chosen:
        if foreign:
            return ("It brings in numbers that are not on offer.", "Some of its numbers are new.")
        if used:
            return (
                "It repeats numbers of the question without weighing them.",
                "Numbers are there, but not what to look at in them.",
            )
        return (
            "It does not say what to look at in the numbers.",
            "It stays general and leaves the numbers out.",
        )
    if record["ground_truth"] in used:
        return (
            "The right value appears in it; a clear plan should lead to it.",
            "The result is in it, but not the way that a plan should show.",
        )
    if foreign:
        return (
            "It brings in numbers that do not belong there.",
            "Some of its numbers are made up or wrongly worked out.",
        )
    if given and given <= used:
        return (
            "The numbers are repeated, but what to do with them is not written out.",
            "It repeats the question without a plan for its numbers.",
        )
    if used:
        return ("It uses only a part of the numbers.", "A number is left out.")
    return ("It leaves the numbers out.", "It does not say which numbers to use.")


def numbers(text: str) -> list[str]:
    """Returns the numbers in a text, without thousands separators."""
    return re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))


def whole_sentences(text: str) -> str:
    """Returns the text on one line, up to its last whole sentence."""
    line = " ".join(text.split())
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]*(?=\s|$)", line)]
    return line[: ends[-1]] if ends else line


def write(path: pathlib.Path, split: str, records: list[Record]) -> None:
    """Writes the records of one split, one JSON object a line."""
    fields = (
        "kind",
        "problem_text",
        "ground_truth",
        "student_approach",
        "teacher_diagnosis",
        "teacher_teaching",
    )
    rows = [
        {"id": f"quickstart-{split}-{i:03d}"} | {f: record[f] for f in fields}
        for i, record in enumerate(records)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


class Student:
    """A model behind its chat template, decoded greedily with transformers."""

    def __init__(self, path: str, threads: int) -> None:
        with extras.importing("hf", "a student by transformers"):
            import torch
        import transformers

        if threads:
            torch.set_num_threads(threads)
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32
        )

    def reply(self, prompts: list[str], max_new_tokens: int, batch: int = 48) -> list[str]:
        """Returns what the model says to each prompt, prompts of like length together."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        replies: dict[int, str] = {}
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            chats = [[{"role": "user", "content": prompts[i]}] for i in part]
            inputs = self._tokenizer.apply_chat_template(
                chats,
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            )
            output = self._model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id,
            )
            texts = self._tokenizer.batch_decode(
                output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            replies |= dict(zip(part, texts, strict=True))
        return [replies[i].strip() for i in range(len(prompts))]


def right_answers(student: Student, records: list[Record], template: str) -> list[bool]:
    """Returns whether the student answers each record right, asked by `BASELINE` or `TAUGHT`."""
    prompts = [
        template.format(question=record["problem_text"], teaching=record["teacher_teaching"])
        for record in records
    ]
    replies = student.reply(prompts, ANSWER_TOKENS)
    return [
        is_correct(reply, record["ground_truth"])
        for reply, record in zip(replies, records, strict=True)
    ]


def measure(student: Student, records: list[Record]) -> str:
    """Returns a Markdown table of right answers without and with the lesson, by kind."""
    right: dict[str, collections.Counter[str]] = {}
    for arm, template in (("alone", BASELINE), ("taught", TAUGHT)):
        pairs = zip(right_answers(student, records, template), records, strict=True)
        right[arm] = collections.Counter(record["kind"] for is_right, record in pairs if is_right)
    counts = collections.Counter(record["kind"] for record in records)
    lines = ["| kind | problems | alone | taught | gain |", "|---|---|---|---|---|"]
    lines += [
        _row(kind, n, right["alone"][kind], right["taught"][kind]) for kind, n in counts.items()
    ]
    lines.append(_row("all", *(sum(c.values()) for c in (counts, right["alone"], right["taught"]))))
    return "\n".join(lines)


def _row(kind: str, count: int, alone: int, taught: int) -> str:
    """Returns one line of the table of `measure`."""
    gain = 100 * (taught - alone) / count
    return (
        f"| {kind} | {count} | {alone} ({alone / count:.0%}) | {taught} ({taught / count:.0%}) "
        f"| {gain:+.0f} |"
    )


if __name__ == "__main__":
    cli.tool(main)
