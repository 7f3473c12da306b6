"""The kinds of problem of the quickstart's teaching demonstrations, and what draws one of each.

A kind is a table of wordings over two or three whole numbers. In arithmetic `{x}` and `{y}` are the
numbers in the order of the calculation, `{calc}` is the calculation and `{name}` a person; `{one}`,
`{ones}` and `{many}` come from the kind's nouns. A choice lists its numbers as `{a}`, `{b}`, `{c}`.
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
        chosen: whether the answer is one of the numbers of the question.
    """

    make: Callable[[random.Random], Problem]
    method: str
    clue: str
    chosen: bool = False


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


def choice(
    fits: Callable[[int, list[int]], bool], questions: tuple[str, ...], lessons: tuple[str, ...]
) -> Callable[[random.Random], Problem]:
    """Returns what draws three numbers with different tens of which one fits.

    `fits` tells whether a number is the answer among the three.
    """

    def make(rng: random.Random) -> Problem:
        while True:
            numbers = rng.sample(range(11, 99), 3)
            right = [number for number in numbers if fits(number, numbers)]
            if len(right) == 1 and len({number // 10 for number in numbers}) == len(numbers):
                break
        a, b, c = numbers
        question = rng.choice(questions).format(a=a, b=b, c=c)
        return Problem(question, str(right[0]), rng.choice(lessons))

    return make


LEADS = (
    "Write the calculation first: {calc}.",
    "First write the calculation: {calc}.",
    "Always write the calculation first: {calc}.",
    "Write the {noun} first: {calc}.",
    "Write the calculation before the answer: {calc}.",
    "Write the calculation first, here {calc}.",
    "Write the calculation and its result: {calc} = ?",
)
"""How a lesson goes on after its reason, where it hands over the calculation."""


def written(*reasons: str) -> tuple[str, ...]:
    """Returns the lessons that hand over the calculation, with every reason and lead."""
    return tuple(f"{reason} {lead}" for reason in reasons for lead in LEADS)


NAMES = (
    "Amir", "Anna", "Ben", "Clara", "David", "Elena", "Emma", "Felix", "Grace", "Henry", "Hugo",
    "Iris", "Ivan", "Jack", "Jonas", "Karl", "Lena", "Leo", "Lucy", "Marco", "Maria", "Mia",
    "Nina", "Noah", "Omar", "Paul", "Priya", "Rosa", "Sara", "Tom", "Zoe",
)  # fmt: skip

_THINGS = nouns(
    "apple/apples, pencil/pencils, marble/marbles, sticker/stickers, book/books, shell/shells, "
    "coin/coins, card/cards, button/buttons, cookie/cookies, stamp/stamps, balloon/balloons"
)
_GOODS = nouns(
    "pen/pens, book/books, lamp/lamps, cup/cups, hat/hats, bag/bags, ball/balls, toy/toys, "
    "mug/mugs, scarf/scarves, kite/kites, ticket/tickets"
)
_DISHES = nouns(
    "cake/cakes/eggs, pie/pies/apples, pizza/pizzas/tomatoes, salad/salads/carrots, "
    "soup/soups/potatoes, drink/drinks/lemons, omelet/omelets/eggs, stew/stews/onions"
)


def _make_tens(rng: random.Random) -> Problem:
    """Draws a question for the tens digit of a number of two digits."""
    number = rng.randint(21, 98)
    question = rng.choice(
        ("What is the tens digit of {x}?", "Which digit of {x} is the tens digit?")
    )
    lesson = rng.choice(
        ("The tens digit is the first digit of the number.", "The first digit is the tens digit.")
    )
    return Problem(question.format(x=number), str(number // 10), lesson)


_UNITS = (
    ("How many days are in {x} weeks?", 7),
    ("How many months are in {x} years?", 12),
    ("How many shoes are in {x} pairs?", 2),
    ("How many eggs are in {x} dozen?", 12),
    ("How many wheels do {x} cars have?", 4),
    ("How many fingers are on {x} hands?", 5),
)


def _make_units(rng: random.Random) -> Problem:
    """Draws a question whose answer needs a number that everybody knows."""
    question, size = rng.choice(_UNITS)
    x = rng.randint(2, 9)
    return Problem(
        question.format(x=x), str(x * size), f"Write the multiplication by {size} first."
    )


KINDS = {
    "smallest": Kind(choice(lambda number, all_: number == min(all_), (
        "Which number is the smallest: {a}, {b} or {c}?",
    ), (
        "The smallest number has the fewest tens. Look at the tens digit of each number.",
        "Look at the tens digit of each number. The smallest number has the fewest tens.",
    )), "order", "only one of the numbers has the fewest tens", chosen=True),
    "largest": Kind(choice(lambda number, all_: number == max(all_), (
        "Which number is the largest: {a}, {b} or {c}?",
    ), (
        "The largest number has the most tens. Look at the tens digit of each number.",
        "Look at the tens digit of each number. The largest number has the most tens.",
    )), "order", "only one of the numbers has the most tens", chosen=True),
    "tens": Kind(_make_tens, "place", "a number of two digits has tens and ones"),
    "units": Kind(_make_units, "*", "how many there are in each is known to everybody"),
    "half": Kind(arithmetic("/", (2, 15), (2, 2), (
        "What is half of {x}?",
        "{name} has {x} {many} and gives away half of them. "
        "How many {many} does {name} give away?",
    ), _THINGS, (
        "Write the division by 2 first.",
        "Half means divide by 2. Write the division by 2 first.",
    )), "/", "the word \"half\" names the operation"),
    "double": Kind(arithmetic("*", (3, 15), (2, 2), (
        "{name} has {x} {many}. Kim has double that number. How many {many} does Kim have?",
    ), _THINGS, (
        "Double means times 2. Write the multiplication by 2 first.",
    )), "*", "the word \"double\" names the operation"),
    "price": Kind(arithmetic("*", (2, 9), (2, 12), (
        "One {one} costs ${y}. How many dollars do {x} {ones} cost?",
        "{name} buys {x} {ones} for ${y} each. How many dollars does {name} pay?",
        "A shop sells each {one} for ${y}. How many dollars do {x} {ones} cost?",
    ), _GOODS, written(
        "Multiply the number bought by the price of one.",
        "Each one has the same price, so multiply.",
        "The price of one is paid for every one, so multiply.",
    )), "*", "the price given is for one only"),
    "daily": Kind(arithmetic("*", (3, 12), (2, 9), (
        "{name} {one} {x} {many} each day. How many {many} is that in {y} days?",
        "Every day {name} {one} {x} {many}. How many {many} is that in {y} days?",
    ), nouns(
        "reads/pages, runs/miles, writes/letters, bakes/cakes, plants/trees, draws/pictures, "
        "learns/words, washes/cars"
    ), written(
        "The number is the same every day, so multiply.",
        "Multiply the number for one day by the days.",
        "Equal days are put together by multiplying.",
    )), "*", "the number given is for one day only"),
    "recipe": Kind(arithmetic("*", (2, 9), (2, 9), (
        "One {one} needs {y} {many}. How many {many} do {x} {ones} need?",
        "{name} uses {y} {many} for each {one}. How many {many} does {name} use for {x} {ones}?",
        "A cook makes {x} {ones} with {y} {many} in each. How many {many} does the cook use?",
    ), _DISHES, written(
        "Each one needs the same amount, so multiply.",
        "Multiply the number made by the amount for one.",
        "The amount for one is repeated, so multiply.",
    )), "*", "the amount given is for one only"),
    "age": Kind(arithmetic("+", (4, 20), (3, 9), (
        "{name} is {x} years old. How old will {name} be in {y} years?",
        "{name} is {x} years old. Kim is {y} years older than {name}. How old is Kim?",
    ), _THINGS, written(
        "Older means more years, so add.",
        "Add the years to the age.",
        "An age grows with the years, so add.",
    )), "+", "the age grows"),
}  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(
        "error: this is a part of tools/make_demonstrations.py and no command; run that"
    )
