"""Makes the teaching demonstrations of the quickstart, and measures what their lessons are worth.

    python tools/make_demonstrations.py --model DIR --output configs/data/quickstart --measure

The approaches are what the student, the model in DIR, writes greedily. All else follows from the
seed.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import random
import re
from typing import Any, NamedTuple

from demonstration_kinds import KINDS, NAMES, Kind

TASK = 'Solve the problem in one short sentence, then write "Answer:" and the final answer.'
BASELINE = "{question}\n\n" + TASK
TAUGHT = "{question}\n\nHint: {teaching}\n\n" + TASK
PROBE = (
    "{question}\n\n"
    "Do not solve the problem. Describe in one or two short sentences how you would approach it."
)
PROBE_TOKENS = 60
ANSWER_TOKENS = 48

LEADS = (
    "Write the calculation first: {calc}.",
    "First write the calculation: {calc}.",
    "Always write the calculation first: {calc}.",
    "Write the {noun} first: {calc}.",
    "Write the calculation before the answer: {calc}.",
    "Write the calculation first, here {calc}.",
    "Write the calculation and its result: {calc} = ?",
)
"""How a lesson goes on after its reason."""


class Operation(NamedTuple):
    """What an operation is called, and how an approach may mention it."""

    noun: str
    mention: str


OPERATIONS = {
    "+": Operation("addition", r"\badd|\bsum\b|\bplus\b|\+"),
    "-": Operation("subtraction", r"subtract|\bminus\b|take away|difference|\d\s*-\s*\d"),
    "*": Operation("multiplication", r"multipl|\btimes\b(?! as many)|product|\*|\d\s*[x×]\s*\d"),
    "/": Operation("division", r"divi[ds]|quotient|\d\s*[/÷]\s*\d"),
}

Record = dict[str, str]


def main() -> None:
    """Writes `train.jsonl` and `eval.jsonl`, and prints the table of `--measure`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory of the student")
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--train", type=int, default=320)
    parser.add_argument("--eval", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
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


def make_problems(count: int, seed: int) -> list[Record]:
    """Returns different problems, the kinds in turn, none with its answer in question or lesson."""
    rng = random.Random(seed)
    seen: set[str] = set()
    records: list[Record] = []
    names = list(KINDS)
    while len(records) < count:
        name = names[len(records) % len(names)]
        record = {"kind": name} | make_problem(KINDS[name], rng)
        question, lesson = record["problem_text"], record["teacher_teaching"]
        if question in seen or record["ground_truth"] in numbers(f"{question} {lesson}"):
            continue
        seen.add(question)
        records.append(record)
    return records


def make_problem(kind: Kind, rng: random.Random) -> Record:
    """Returns one problem of a kind with its answer and its lesson."""
    x, y = rng.randint(*kind.first), rng.randint(*kind.second)
    if kind.operation == "/":
        x *= y
    answer = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[kind.operation]
    fields = {"name": rng.choice(NAMES), "x": x, "y": y} | rng.choice(kind.nouns)._asdict()
    lesson = f"{rng.choice(kind.reasons)} {rng.choice(LEADS)}"
    return {
        "problem_text": capitalise(rng.choice(kind.questions).format(**fields)),
        "ground_truth": str(answer),
        "teacher_teaching": lesson.format(
            calc=f"{x} {kind.operation} {y}", noun=OPERATIONS[kind.operation].noun, **fields
        ),
    }


def diagnose(record: Record, rng: random.Random) -> str:
    """Says what is right or missing in the student's approach, from what it mentions."""
    kind, approach = KINDS[record["kind"]], record["student_approach"]
    noun = OPERATIONS[kind.operation].noun
    named = {op for op, (_, mention) in OPERATIONS.items() if re.search(mention, approach, re.I)}
    if named == {kind.operation}:
        method = (f"The student rightly thinks of {noun}", f"Choosing {noun} is right")
    elif kind.operation in named:
        other = OPERATIONS[min(named - {kind.operation})].noun
        method = (
            f"The student mentions {noun} but mixes it with {other}",
            f"The right {noun} is there, but so is a needless {other}",
        )
    elif named:
        other = OPERATIONS[min(named)].noun
        method = (
            f"The student plans {other} where {noun} is needed",
            f"The plan turns to {other}, but the problem asks for {noun}",
        )
    else:
        method = (
            f"The student does not name an operation; {noun} is needed",
            f"The approach misses the {noun}",
        )
    return f"{rng.choice(method)}: {kind.clue}. {rng.choice(_about_numbers(record))}"


def _about_numbers(record: Record) -> tuple[str, ...]:
    """Returns sentences on how the approach deals with the numbers of the question."""
    given, used = set(numbers(record["problem_text"])), set(numbers(record["student_approach"]))
    if record["ground_truth"] in used:
        return (
            "The right value appears in it; one clear calculation should lead to it.",
            "The result is in it, but not the one calculation that a plan should show.",
        )
    if used - given:
        return (
            "It brings in numbers that do not belong there.",
            "Some of its numbers are made up or wrongly worked out.",
        )
    if given <= used:
        return (
            "Both numbers are there, but the one calculation is not written out.",
            "It repeats the numbers without putting them into one calculation.",
        )
    if used:
        return ("It uses only one of the two numbers.", "One of the two numbers is left out.")
    return ("It leaves the two numbers out.", "It does not say which numbers to use.")


def capitalise(text: str) -> str:
    """Returns the text with a capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]


def numbers(text: str) -> list[str]:
    """Returns the numbers in a text, without thousands separators."""
    return re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))


def whole_sentences(text: str) -> str:
    """Returns the text on one line, up to its last whole sentence."""
    line = " ".join(text.split())
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]*(?=\s|$)", line)]
    return line[: ends[-1]] if ends else line


def extract(reply: str) -> str:
    """Returns the final answer of a reply, a number, or an empty text.

    The last `<solution>` counts, else the line behind the last "Answer:" or "answer is", else the
    whole reply; of that, the last number, because "6 * 7 = 42" states 42.
    """
    tagged = re.findall(r"<solution>(.*?)</solution>", reply, re.IGNORECASE | re.DOTALL)
    marked = re.split(r"answer(?:\s+is)?\s*:|answer\s+is", reply, flags=re.IGNORECASE)
    part = tagged[-1] if tagged else marked[-1]
    if len(marked) > 1 and not tagged:
        part = part.strip().partition("\n")[0]
    found = numbers(part)
    return found[-1] if found else ""


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


def measure(student: Student, records: list[Record]) -> str:
    """Returns a Markdown table of right answers without and with the lesson, by kind."""
    right: dict[str, collections.Counter[str]] = {}
    for arm, template in (("alone", BASELINE), ("taught", TAUGHT)):
        prompts = [
            template.format(question=record["problem_text"], teaching=record["teacher_teaching"])
            for record in records
        ]
        pairs = zip(student.reply(prompts, ANSWER_TOKENS), records, strict=True)
        right[arm] = collections.Counter(
            record["kind"] for reply, record in pairs if extract(reply) == record["ground_truth"]
        )
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
    main()
