"""The kinds of problem of the demo: those that are trained on, and those that never are.

They are problems of one step that the student can work out and does not know how to begin: it adds
where it should multiply. Every lesson is an oracle: it says what to do, and never what comes out.

A kind is a table of wordings over two whole numbers. `{x}` and `{y}` are the numbers in the order
of the calculation, `{calc}` is the calculation and `{name}` a person; `{one}`, `{ones}` and
`{many}` come from the kind's nouns.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple


class Problem(NamedTuple):
    """A question, its answer and a lesson that does not state the answer."""

    question: str
    answer: str
    lesson: str


class Method(NamedTuple):
    """What a method is called, and how an approach may mention it."""

    noun: str
    mention: str


class Kind(NamedTuple):
    """One kind of problem.

    Attributes:
        make: draws a problem.
        method: the key in `METHODS` of what solves it.
        clue: what in the question gives the method away.
    """

    make: Callable[[random.Random], Problem]
    method: str
    clue: str


class Noun(NamedTuple):
    """What fills `{one}`, `{ones}` and `{many}`; a kind may use only some of them."""

    one: str
    ones: str
    many: str


METHODS = {
    "+": Method("addition", r"\badd|\bsum\b|\bplus\b|\+"),
    "-": Method("subtraction", r"subtract|\bminus\b|take away|difference|\d\s*-\s*\d"),
    "*": Method("multiplication", r"multipl|\btimes\b(?! as many)|product|\*|\d\s*[x×]\s*\d"),
    "/": Method("division", r"\bdivid(?:es?|ing)\b|division|quotient|\d\s*[/÷]\s*\d"),
    "order": Method("comparison", r"compar|\border\b|sort|rank|larger|smaller|bigger"),
    "ending": Method("divisibility", r"\bends?\b|ending|last digit|multiple of|divisib"),
    "place": Method("place value", r"tens place|place value|first digit|\bleft"),
}
"""The methods that a diagnosis can name."""


def nouns(text: str) -> tuple[Noun, ...]:
    """Reads "one/ones/many, …"; what is missing at the end repeats the last."""
    entries = [entry.strip().split("/") for entry in text.split(",")]
    return tuple(Noun(*(entry + entry[-1:] * (3 - len(entry)))) for entry in entries)


def arithmetic(
    operation: str,
    first: tuple[int, int],
    second: tuple[int, int],
    questions: tuple[str, ...],
    nouns: tuple[Noun, ...],
    lessons: tuple[str, ...],
) -> Callable[[random.Random], Problem]:
    """Returns what draws a problem of one operation.

    `first` and `second` are the smallest and largest `x` and `y`; for `/` the first is the answer.
    """

    def make(rng: random.Random) -> Problem:
        x, y = rng.randint(*first), rng.randint(*second)
        x = x * y if operation == "/" else x
        answer = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[operation]
        fields = {"name": rng.choice(NAMES), "x": x, "y": y} | rng.choice(nouns)._asdict()
        question = rng.choice(questions).format(**fields)
        calc, noun = f"{x} {operation} {y}", METHODS[operation].noun
        lesson = rng.choice(lessons).format(calc=calc, noun=noun, **fields)
        return Problem(question[:1].upper() + question[1:], str(answer), lesson)

    return make


NAMES = (
    "Amir", "Anna", "Ben", "Clara", "David", "Elena", "Emma", "Felix", "Grace", "Henry", "Hugo",
    "Iris", "Ivan", "Jack", "Jonas", "Karl", "Lena", "Leo", "Lucy", "Marco", "Maria", "Mia",
    "Nina", "Noah", "Omar", "Paul", "Priya", "Rosa", "Sara", "Tom", "Zoe",
)  # fmt: skip

_THINGS = nouns(
    "apple/apples, pencil/pencils, marble/marbles, sticker/stickers, book/books, shell/shells, "
    "coin/coins, card/cards, button/buttons, cookie/cookies, stamp/stamps, balloon/balloons"
)
_BOXES = nouns(
    "box/boxes/pens, bag/bags/apples, jar/jars/cookies, basket/baskets/eggs, pack/packs/cards, "
    "shelf/shelves/books, tray/trays/cups, crate/crates/bottles, drawer/drawers/spoons"
)
_WIDE = nouns("garden, room, field, yard, park, hall, kitchen, court")
_HEAVY = nouns("cat//dog, goat//pig, chair//table, bag//box, fox//wolf, cow//horse")
_FAST = nouns("bike//car, boat//train, cart//bus, horse//truck, ship//plane")
_HIGH = nouns("tree//tower, house//hill, wall//church, bush//pole, tent//castle")

_LEADS = (
    "Write the calculation first, here {calc}.",
    "Write the {noun} first: {calc}.",
    "Always write the calculation first: {calc}.",
    "Write {calc} first.",
    "Write only {calc} and its result.",
    "The answer is the result of {calc}.",
)
"""How a lesson goes on after its reason."""


def _lessons(*reasons: str) -> tuple[str, ...]:
    return tuple(f"{reason} {lead}" for reason in reasons for lead in _LEADS)


def _times(question: str, word: str, things: tuple[Noun, ...] = _THINGS) -> Kind:
    """Returns the problems of something that is so many times as much, `word`, as another."""
    reasons = f"Times as {word} means multiply.", f"{{y}} times as {word}: multiply by {{y}}."
    make = arithmetic("*", (3, 10), (3, 9), (question,), things, _lessons(*reasons))
    return Kind(make, "*", f'the words "times as {word}" name the operation')


def _multiple(word: str, factor: int) -> Kind:
    """Returns the problems of a multiple that has a name of its own."""
    question = (
        f"{{name}} has {{x}} {{many}}. Kim has {word} that number. How many {{many}} does Kim have?"
    )
    lessons = _lessons(f"{word.capitalize()} means times {factor}.")
    make = arithmetic("*", (3, 10), (factor, factor), (question,), _THINGS, lessons)
    return Kind(make, "*", f'the word "{word}" names the operation')


def _division(question: str, reason: str, things: tuple[Noun, ...], clue: str) -> Kind:
    """Returns the problems of equal parts."""
    return Kind(arithmetic("/", (2, 5), (2, 5), (question,), things, _lessons(reason)), "/", clue)


TRAINED = {
    "points": _times(
        "{name} scores {x} points. Kim scores {y} times as many points. "
        "How many points does Kim score?",
        "many",
    ),
    "old": _times("{name} is {x} years old. Kim is {y} times as old. How old is Kim?", "old"),
    "heavy": _times(
        "A {one} weighs {x} kilos. A {many} weighs {y} times as much. "
        "How many kilos does the {many} weigh?",
        "much",
        _HEAVY,
    ),
    "far": _times(
        "{name} walks {x} miles. Kim walks {y} times as far. How many miles does Kim walk?", "far"
    ),
    "waits": _times(
        "{name} waits {x} minutes. Kim waits {y} times as long. How many minutes does Kim wait?",
        "long",
    ),
    "double": _multiple("double", 2),
    "four": _multiple("four times", 4),
    "area": Kind(
        arithmetic(
            "*",
            (3, 10),
            (2, 9),
            (
                "A {one} is {x} meters long and {y} meters wide. "
                "How many square meters is its area?",
            ),
            _WIDE,
            _lessons("The area is length times width.", "Multiply the length by the width."),
        ),
        "*",
        "length and width are given",
    ),
    "packed": _division(
        "{name} packs {x} {many} with {y} in each {one}. How many {ones} does {name} fill?",
        "Every one takes the same number, so divide.",
        _BOXES,
        "the number given goes into each of them",
    ),
    "share": _division(
        "{x} {many} are shared equally by {y} children. How many {many} does each child get?",
        "Equal shares mean division.",
        _THINGS,
        "equal shares name the operation",
    ),
}
"""Kinds of the training questions and of the held-out ones."""

UNSEEN = {
    "fast": _times(
        "A {one} goes {x} miles an hour. A {many} goes {y} times as fast. "
        "How many miles an hour does the {many} go?",
        "fast",
        _FAST,
    ),
    "high": _times(
        "A {one} is {x} meters high. A {many} is {y} times as high. "
        "How many meters high is the {many}?",
        "high",
        _HIGH,
    ),
    "triple": _multiple("triple", 3),
    "each": _division(
        "{y} {many} cost ${x} together. How many dollars does one {one} cost?",
        "Divide the whole price by the number bought.",
        _THINGS,
        "the price given is for all of them",
    ),
}
"""Kinds that are evaluated and never trained on."""


if __name__ == "__main__":
    raise SystemExit("error: this is a part of tools/make_demo.py and no command; run that")
