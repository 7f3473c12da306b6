"""The kinds of problem of the demo: those that are trained on, and those that never are.

They are problems of one step that the student can work out and does not know how to begin: it adds
where it should multiply. Every lesson is an oracle: it says what to do, and never what comes out.
"""

from __future__ import annotations

from demonstration_kinds import Kind, Noun, arithmetic, nouns

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
_DEEP = nouns("pond//lake, well//cave, pool//river, ditch//mine")

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
