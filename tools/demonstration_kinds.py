"""The kinds of problem of the quickstart's teaching demonstrations, as tables of wording.

Each is a short word problem over two whole numbers. `{x}` and `{y}` are the numbers in the order of
the calculation and `{name}` is a person; `{one}`, `{ones}` and `{many}` come from the kind's nouns.
"""

from __future__ import annotations

from typing import NamedTuple


class Noun(NamedTuple):
    """What fills `{one}`, `{ones}` and `{many}`; a kind may use only some of them."""

    one: str
    ones: str
    many: str


class Kind(NamedTuple):
    """One kind of problem.

    Attributes:
        operation: `+`, `-`, `*` or `/`, between `x` and `y`.
        first: smallest and largest `x`; for `/` of the answer.
        second: smallest and largest `y`.
        questions: ways to ask.
        nouns: things to ask about.
        reasons: ways to say why the operation is the right one.
        clue: what in the question gives the operation away.
    """

    operation: str
    first: tuple[int, int]
    second: tuple[int, int]
    questions: tuple[str, ...]
    nouns: tuple[Noun, ...]
    reasons: tuple[str, ...]
    clue: str


def _nouns(text: str) -> tuple[Noun, ...]:
    """Reads "one/ones/many, …"; what is missing at the end repeats the last."""
    entries = [entry.strip().split("/") for entry in text.split(",")]
    return tuple(Noun(*(entry + entry[-1:] * (3 - len(entry)))) for entry in entries)


NAMES = (
    "Amir", "Anna", "Ben", "Clara", "David", "Elena", "Emma", "Felix", "Grace", "Henry", "Hugo",
    "Iris", "Ivan", "Jack", "Jonas", "Karl", "Lena", "Leo", "Lucy", "Marco", "Maria", "Mia",
    "Nina", "Noah", "Omar", "Paul", "Priya", "Rosa", "Sara", "Tom", "Zoe",
)  # fmt: skip

_THINGS = _nouns(
    "apple/apples, pencil/pencils, marble/marbles, sticker/stickers, book/books, shell/shells, "
    "coin/coins, card/cards, button/buttons, cookie/cookies, stamp/stamps, balloon/balloons"
)
_GOODS = _nouns(
    "pen/pens, book/books, lamp/lamps, cup/cups, hat/hats, bag/bags, ball/balls, toy/toys, "
    "mug/mugs, scarf/scarves, kite/kites, ticket/tickets"
)
_DISHES = _nouns(
    "cake/cakes/eggs, pie/pies/apples, pizza/pizzas/tomatoes, salad/salads/carrots, "
    "soup/soups/potatoes, drink/drinks/lemons, omelet/omelets/eggs, stew/stews/onions"
)
_PARTS = _nouns(
    "flower/flowers/petals, coat/coats/buttons, house/houses/windows, "
    "shelf/shelves/books, kite/kites/ribbons, fence/fences/posts, "
    "train/trains/cars, basket/baskets/apples"
)

KINDS = {
    "groups": Kind("*", (2, 9), (3, 12), (
        "{name} has {x} boxes with {y} {many} in each box. How many {many} does {name} have?",
        "There are {x} bags with {y} {many} in each bag. How many {many} are there?",
        "{name} has {x} jars. Each jar holds {y} {many}. How many {many} does {name} have?",
    ), _THINGS, (
        "Every group has the same size, so multiply.",
        "Multiply the number of groups by the number in each group.",
        "Equal groups are multiplied.",
    ), "all groups have the same size"),
    "recipe": Kind("*", (2, 9), (2, 9), (
        "One {one} needs {y} {many}. How many {many} do {x} {ones} need?",
        "{name} uses {y} {many} for each {one}. How many {many} does {name} use for {x} {ones}?",
        "A cook makes {x} {ones} with {y} {many} in each. How many {many} does the cook use?",
    ), _DISHES, (
        "Each one needs the same amount, so multiply.",
        "Multiply the number made by the amount for one.",
        "The amount for one is repeated, so multiply.",
    ), "the amount given is for one only"),
    "price": Kind("*", (2, 9), (2, 12), (
        "One {one} costs ${y}. How many dollars do {x} {ones} cost?",
        "{name} buys {x} {ones} for ${y} each. How many dollars does {name} pay?",
        "A shop sells each {one} for ${y}. How many dollars do {x} {ones} cost?",
    ), _GOODS, (
        "Multiply the number bought by the price of one.",
        "Each one has the same price, so multiply.",
        "The price of one is paid for every one, so multiply.",
    ), "the price given is for one only"),
    "wage": Kind("*", (4, 12), (2, 9), (
        "{name} earns ${x} an hour and works {y} hours. How many dollars does {name} earn?",
        "{name} works {y} hours as a {one} for ${x} an hour. How many dollars is that?",
        "A {one} gets ${x} for each hour. How many dollars are {y} hours of work?",
    ), _nouns("gardener, driver, cook, painter, cleaner, waiter, baker, guard"), (
        "Multiply the pay for one hour by the hours.",
        "The pay is the same every hour, so multiply.",
        "Each hour brings the same money, so multiply.",
    ), "the pay given is for one hour only"),
    "saving": Kind("*", (2, 9), (2, 12), (
        "{name} saves ${y} each week. How many dollars is that in {x} weeks?",
        "{name} saves ${y} every month. How many dollars does {name} save in {x} months?",
        "{name} puts ${y} into a box every day. How many dollars are in it after {x} days?",
    ), _THINGS, (
        "The same amount comes every time, so multiply.",
        "Multiply the number of times by the amount of one time.",
        "Equal amounts are put together by multiplying.",
    ), "the same amount comes again and again"),
    "daily": Kind("*", (3, 12), (2, 9), (
        "{name} {one} {x} {many} each day. How many {many} is that in {y} days?",
        "Every day {name} {one} {x} {many}. How many {many} is that in {y} days?",
    ), _nouns(
        "reads/pages, runs/miles, writes/letters, bakes/cakes, plants/trees, draws/pictures, "
        "learns/words, washes/cars"
    ), (
        "The number is the same every day, so multiply.",
        "Multiply the number for one day by the days.",
        "Equal days are put together by multiplying.",
    ), "the number given is for one day only"),
    "times": Kind("*", (2, 6), (3, 12), (
        "{name} has {y} {many}. Kim has {x} times as many. How many {many} does Kim have?",
        "{name} finds {y} {many} and Kim finds {x} times as many. How many {many} does Kim find?",
        "A small box holds {y} {many}. A big box holds {x} times as many. "
        "How many {many} does the big box hold?",
    ), _THINGS, (
        "Times as many means multiply.",
        "The word times tells you to multiply.",
        "Multiply the smaller number of {many} by how many times it is taken.",
    ), "the words \"times as many\" name the operation"),
    "parts": Kind("*", (2, 9), (2, 8), (
        "Each {one} has {y} {many}. How many {many} do {x} {ones} have?",
        "One {one} has {y} {many}. How many {many} are there on {x} {ones}?",
        "There are {x} {ones}, each with {y} {many}. How many {many} are there?",
    ), _PARTS, (
        "Each one has the same number, so multiply.",
        "Multiply how many there are by the number each one has.",
        "The number for one is repeated, so multiply.",
    ), "the number given belongs to each one"),
    "carrying": Kind("*", (2, 9), (2, 9), (
        "A {one} carries {y} {many}. How many {many} do {x} {ones} carry?",
        "{x} {ones} carry {y} {many} each. How many {many} do they carry in all?",
    ), _nouns(
        "bus/buses/people, truck/trucks/boxes, boat/boats/cars, cart/carts/sacks, "
        "wagon/wagons/barrels, mule/mules/bags"
    ), (
        "Each one carries the same number, so multiply.",
        "Multiply how many there are by what one carries.",
        "The load of one is repeated, so multiply.",
    ), "the load given is for one only"),
    "age": Kind("+", (4, 20), (3, 9), (
        "{name} is {x} years old. How old will {name} be in {y} years?",
        "{name} is {x} years old. Kim is {y} years older than {name}. How old is Kim?",
    ), _THINGS, (
        "Older means more years, so add.",
        "Add the years to the age.",
        "An age grows with the years, so add.",
    ), "the age grows"),
    "less": Kind("-", (6, 14), (2, 6), (
        "{name} has {x} {many} and gives away {y}. How many {many} does {name} have left?",
        "There are {x} {many} on a table. {name} takes {y} of them. How many {many} are left?",
        "{name} had {x} {many} and lost {y}. How many {many} does {name} have now?",
    ), _THINGS, (
        "What goes away is subtracted.",
        "The number gets smaller, so subtract.",
        "Take what is gone away from the whole.",
    ), "the number of things shrinks"),
    "sharing": Kind("/", (2, 10), (2, 10), (
        "{name} shares {x} {many} equally among {y} friends. How many {many} does each get?",
        "{x} {many} are put equally into {y} bags. How many {many} are in each bag?",
        "{y} children share {x} {many} equally. How many {many} does each child get?",
    ), _THINGS, (
        "Sharing equally means dividing.",
        "Divide all of them by the number of parts.",
        "Equal parts are found by dividing.",
    ), "the whole is split into equal parts"),
}  # fmt: skip
