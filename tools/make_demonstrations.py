"""Makes the teaching demonstrations of the quickstart, and measures what their lessons are worth.

    python tools/make_demonstrations.py --model DIR --output configs/data/quickstart --measure 120

The student's approaches are what the model at DIR writes; everything else follows from the seed.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import re
from typing import Any

from tools.demonstration_kinds import KINDS, LEADS, NAMES, THINGS, WORDS, Kind

TASK = 'Solve the problem in one short sentence, then write "Answer:" and the final answer.'
BASELINE = "{question}\n\n" + TASK
TAUGHT = "{question}\n\nHint: {teaching}\n\n" + TASK
PROBE = "{question}\n\nIn one sentence, how would you approach this problem? Do not solve it."

Record = dict[str, str]


def main() -> None:
    """Writes `train.jsonl` and `eval.jsonl`, and prints the table of `--measure`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory of the student")
    parser.add_argument("--output", required=True)
    parser.add_argument("--train", type=int, default=320)
    parser.add_argument("--eval", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", type=int, default=0, help="problems to measure, from the end")
    args = parser.parse_args()
    student = Student(args.model)
    records = problems(args.train + args.eval, args.seed)
    probes = [PROBE.format(question=r["problem_text"]) for r in records]
    rng = random.Random(args.seed + 1)
    for record, approach in zip(records, student.answer(probes, 32), strict=True):
        complete(record, first_sentences(approach), rng)
    for name, part in (("train", records[: args.train]), ("eval", records[args.train :])):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in part)
        (pathlib.Path(args.output) / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    if args.measure:
        print(measure(student, records[-args.measure :]))


def problems(count: int, seed: int) -> list[Record]:
    """Returns different problems, the kinds in turn; no question or lesson holds its answer."""
    rng, seen, found = random.Random(seed), set(), []
    while len(found) < count:
        kind = list(KINDS)[len(found) % len(KINDS)]
        record = problem(kind, KINDS[kind], rng)
        numbers = re.findall(r"\d+", record["problem_text"] + record["teacher_teaching"])
        if record["problem_text"] in seen or record["ground_truth"] in numbers:
            continue
        seen.add(record["problem_text"])
        found.append({"id": f"quickstart-{len(found):03d}"} | record)
    return found


def problem(name: str, kind: Kind, rng: random.Random) -> Record:
    """Returns one problem of a kind with its answer and its lesson."""
    a, b = rng.randint(*kind.first), rng.randint(*kind.second)
    if kind.operation == "/":
        a *= b
    answer = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[kind.operation]
    values = {"a": a, "b": b, "op": kind.operation}
    names = {"name": rng.choice(NAMES), "thing": rng.choice(THINGS)}
    lesson = f"{rng.choice(kind.reasons)} {rng.choice(LEADS)}"
    return {
        "kind": name,
        "problem_text": rng.choice(kind.questions).format(**values, **names),
        "ground_truth": str(answer),
        "teacher_teaching": lesson.format(**values),
    }


def complete(record: Record, approach: str, rng: random.Random) -> None:
    """Adds the student's approach, and a diagnosis of what is right or missing in it."""
    word, mentions = WORDS[KINDS[record["kind"]].operation]
    numbers = re.findall(r"\d+", record["problem_text"])
    named = any(mention in approach.lower() for mention in mentions)
    used = sum(number in approach for number in numbers)
    first = (
        (f"The student sees that this calls for {word}.", f"Naming {word} is right.")
        if named
        else (f"The student does not say that this calls for {word}.", f"The {word} is missing.")
    )
    second = (
        ("The numbers are there, but no calculation is written out.",
         "The numbers are named; what lacks is the one calculation to do.")
        if used == len(numbers)
        else ("The plan stays general and leaves the numbers of the problem out.",
              "Nothing is said about the numbers to use.")
    )  # fmt: skip
    record["student_approach"] = approach
    record["teacher_diagnosis"] = f"{rng.choice(first)} {rng.choice(second)}"


def first_sentences(text: str) -> str:
    """Returns the text up to its last whole sentence, on one line."""
    line = " ".join(text.split())
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", line)]
    return line[: ends[-1]] if ends else line


def extract(text: str) -> str:
    """Returns the final number of an answer: behind the last "answer", else the last of all."""
    marked = re.split(r"answer(?:\s+is)?\s*:?", text, flags=re.IGNORECASE)[1:]
    behind = re.findall(r"\d+(?:\.\d+)?", marked[-1].replace(",", "")) if marked else []
    every = re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))
    found = behind[:1] or every[-1:]
    return found[0] if found else ""


class Student:
    """A model behind its chat template, decoded greedily with transformers."""

    def __init__(self, path: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count() or 1)
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32
        )

    def answer(self, prompts: list[str], max_new_tokens: int, batch: int = 64) -> list[str]:
        """Returns what the model says to each prompt, prompts of like length together."""
        answers: dict[int, str] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            chats = [[{"role": "user", "content": prompts[i]}] for i in part]
            inputs = self.tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_tensors="pt",
                return_dict=True,
            )  # fmt: skip
            output = self.model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
            )  # fmt: skip
            texts = self.tokenizer.batch_decode(
                output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            answers |= dict(zip(part, texts, strict=True))
        return [answers[i].strip() for i in range(len(prompts))]


def measure(student: Student, records: list[Record]) -> str:
    """Returns a Markdown table of right answers without and with the lesson, by kind."""
    right = []
    for template in (BASELINE, TAUGHT):
        prompts = [
            template.format(question=r["problem_text"], teaching=r["teacher_teaching"])
            for r in records
        ]
        answers = student.answer(prompts, 40)
        right.append(
            [extract(a) == r["ground_truth"] for a, r in zip(answers, records, strict=True)]
        )
    totals = collections.Counter(r["kind"] for r in records) | {"all": len(records)}
    lines = ["| kind | problems | alone | taught |", "|---|---|---|---|"]
    for kind, total in totals.items():
        of_kind = [kind in (r["kind"], "all") for r in records]
        alone, taught = (
            sum(hit and mine for hit, mine in zip(hits, of_kind, strict=True)) for hits in right
        )
        lines.append(f"| {kind} | {total} | {alone / total:.0%} | {taught / total:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
