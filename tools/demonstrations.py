"""Problems, their demonstrations and the student that answers them: what make_demo.py is made of.

An approach is what the student writes greedily. All else follows from the seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

import _checkout  # noqa: F401  (comes first: see there)
from demo_kinds import METHODS, Kind

from atlas_jax import extras
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


def make_problems(count: int, seed: int, kinds: Mapping[str, Kind]) -> list[Record]:
    """Returns different problems, the kinds in turn, none with its answer in the lesson.

    Every kind has a draw of its own, so that its problems do not depend on the other kinds. One
    that has no further problem leaves the turns. No question has its answer in it.

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
        if question in seen or leaks or given:
            continue
        seen.add(question)
        return {
            "kind": name,
            "problem_text": question,
            "ground_truth": answer,
            "teacher_teaching": lesson,
        }
    return None


def diagnose(record: Record, rng: random.Random, kinds: Mapping[str, Kind]) -> str:
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
    diagnosis = f"{rng.choice(method)}: {kind.clue}. {rng.choice(_about_numbers(record))}"
    if states_answer(diagnosis, record["ground_truth"], record["problem_text"]):
        raise ValueError(
            f"the diagnosis {diagnosis!r} states the answer {record['ground_truth']!r}; word it "
            "without numbers"
        )
    return diagnosis


def _about_numbers(record: Record) -> tuple[str, ...]:
    """Returns sentences on how the approach deals with the numbers of the question."""
    given, used = set(numbers(record["problem_text"])), set(numbers(record["student_approach"]))
    foreign = used - given - set(numbers(record["teacher_teaching"]))
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


if __name__ == "__main__":
    raise SystemExit("error: this is a part of tools/make_demo.py and no command; run that")
