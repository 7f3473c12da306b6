"""The kinds of problem of the demo: those that are trained on, and those that never are.

They are made like those of the quickstart, ten of which are among the first. Every lesson is an
oracle: it says what to do, and never what comes out.
"""

from __future__ import annotations

import random

from demonstration_kinds import KINDS, Kind, Problem, arithmetic, nouns, written

_THINGS = nouns(
    "apple/apples, pencil/pencils, marble/marbles, sticker/stickers, book/books, shell/shells, "
    "coin/coins, card/cards, button/buttons, cookie/cookies, stamp/stamps, balloon/balloons"
)
_BOXES = nouns(
    "box/boxes/pens, bag/bags/apples, jar/jars/cookies, basket/baskets/eggs, pack/packs/cards, "
    "shelf/shelves/books, tray/trays/cups, crate/crates/bottles, drawer/drawers/spoons"
)
_ROWS = nouns(
    "hall/halls/chairs, garden/gardens/trees, field/fields/tents, park/parks/benches, "
    "room/rooms/desks, yard/yards/plants, theater/theaters/seats"
)
_WORK = nouns("shop, farm, bakery, library, market, hotel, garage, museum")
_LONG = nouns("rope, road, river, fence, ribbon, train, bridge, cable")


def _make_ones(rng: random.Random) -> Problem:
    """Draws a question for the ones digit of a number of two digits."""
    number = rng.choice([n for n in range(21, 99) if n % 10 and n % 11])
    question = rng.choice(
        ("What is the ones digit of {x}?", "Which digit of {x} is the ones digit?")
    )
    lesson = rng.choice(
        ("The ones digit is the last digit of the number.", "The last digit is the ones digit.")
    )
    return Problem(question.format(x=number), str(number % 10), lesson)


TRAINED = KINDS | {
    "boxes": Kind(arithmetic("*", (2, 9), (3, 12), (
        "{name} has {x} {ones} with {y} {many} in each. How many {many} does {name} have?",
        "There are {y} {many} in every {one}. How many {many} are in {x} {ones}?",
    ), _BOXES, written(
        "Every one holds the same number, so multiply.",
        "Multiply the number in one by how many there are.",
    )), "*", "the number given is in one of them only"),
    "rows": Kind(arithmetic("*", (3, 12), (3, 12), (
        "A {one} has {x} rows of {y} {many}. How many {many} does the {one} have?",
        "The {many} of a {one} stand in {x} rows with {y} in each. How many {many} are there?",
    ), _ROWS, written(
        "Every row has the same number, so multiply.",
        "Multiply the rows by the number in one row.",
    )), "*", "the number given is in one row only"),
    "wage": Kind(arithmetic("*", (2, 9), (5, 15), (
        "{name} earns ${y} an hour at a {one}. How many dollars does {name} earn in {x} hours?",
        "A {one} pays {name} ${y} for each hour. How many dollars is that for {x} hours?",
    ), _WORK, written(
        "Each hour is paid the same, so multiply.",
        "Multiply the hours by the pay for one hour.",
    )), "*", "the pay given is for one hour only"),
    "times": Kind(arithmetic("*", (3, 12), (3, 9), (
        "{name} has {x} {many}. Kim has {y} times as many {many}. How many {many} does Kim have?",
    ), _THINGS, written(
        "Times as many means multiply.",
        "The number is taken several times, so multiply.",
    )), "*", "the words \"times as many\" name the operation"),
    "weekly": Kind(arithmetic("*", (3, 12), (2, 9), (
        "{name} {one} {x} {many} each week. How many {many} is that in {y} weeks?",
        "Every week {name} {one} {x} {many}. How many {many} is that in {y} weeks?",
    ), nouns(
        "sells/paintings, paints/doors, fixes/bikes, sews/shirts, visits/friends, cleans/windows, "
        "saves/dollars, swims/miles"
    ), written(
        "The number is the same every week, so multiply.",
        "Multiply the number for one week by the weeks.",
    )), "*", "the number given is for one week only"),
    "longer": Kind(arithmetic("+", (6, 40), (3, 9), (
        "A {one} is {x} meters long. Another {one} is {y} meters longer. "
        "How many meters long is the other {one}?",
    ), _LONG, written(
        "Longer means more meters, so add.",
        "Add the meters to the length.",
    )), "+", "the word \"longer\" names the operation"),
    "gets": Kind(arithmetic("+", (6, 30), (3, 12), (
        "{name} has {x} {many} and gets {y} more. How many {many} does {name} have now?",
        "{name} had {x} {many} and found {y} more {many}. How many {many} are there now?",
    ), _THINGS, written(
        "Getting more means adding.",
        "What is new is added to what was there, so add.",
    )), "+", "the number grows"),
    "both": Kind(arithmetic("+", (4, 30), (3, 15), (
        "{name} has {x} {many} and Kim has {y} {many}. How many {many} do both have together?",
        "There are {x} {many} on one table and {y} on another. How many {many} is that together?",
    ), _THINGS, written(
        "Together means add.",
        "Put both numbers together, so add.",
    )), "+", "the word \"together\" names the operation"),
    "younger": Kind(arithmetic("-", (14, 40), (3, 9), (
        "{name} is {x} years old. Kim is {y} years younger than {name}. How old is Kim?",
        "{name} is {x} years old. How old was {name} {y} years ago?",
    ), _THINGS, written(
        "Younger means fewer years, so subtract.",
        "Take the years away from the age, so subtract.",
    )), "-", "the age shrinks"),
    "left": Kind(arithmetic("-", (14, 40), (3, 9), (
        "{name} has {x} {many} and loses {y} of them. How many {many} are left?",
        "There were {x} {many} and {name} took {y} of them. How many {many} are left?",
    ), _THINGS, written(
        "What is left is less, so subtract.",
        "Take away what is gone, so subtract.",
    )), "-", "the word \"left\" names the operation"),
    "difference": Kind(arithmetic("-", (14, 40), (3, 9), (
        "{name} has {x} {many} and Kim has {y}. How many more {many} does {name} have than Kim?",
    ), _THINGS, written(
        "How many more means subtract.",
        "Subtract the smaller number from the larger one.",
    )), "-", "the words \"how many more\" ask for a difference"),
    "share": Kind(arithmetic("/", (2, 9), (2, 6), (
        "{x} {many} are shared equally by {y} children. How many {many} does each child get?",
        "{name} gives {x} {many} to {y} friends, all the same. How many {many} does each get?",
    ), _THINGS, written(
        "Equal shares mean division.",
        "Sharing equally means divide.",
    )), "/", "equal shares name the operation"),
    "each": Kind(arithmetic("/", (2, 12), (2, 6), (
        "{y} {ones} cost ${x} together. How many dollars does one {one} cost?",
        "{name} pays ${x} for {y} {ones} of the same price. How many dollars is one {one}?",
    ), nouns(
        "pen/pens, cup/cups, hat/hats, ball/balls, toy/toys, mug/mugs, kite/kites, ticket/tickets"
    ), written(
        "The price of one is a part of the whole, so divide.",
        "Divide the whole price by the number bought.",
    )), "/", "the price given is for all of them"),
}  # fmt: skip
"""Kinds of the training questions and of the held-out ones."""

UNSEEN = {
    "triple": Kind(arithmetic("*", (4, 15), (3, 3), (
        "{name} has {x} {many}. Kim has triple that number. How many {many} does Kim have?",
    ), _THINGS, (
        "Triple means times 3. Write the multiplication by 3 first.",
    )), "*", "the word \"triple\" names the operation"),
    "speed": Kind(arithmetic("*", (2, 9), (3, 12), (
        "A {one} goes {y} miles each hour. How many miles does it go in {x} hours?",
    ), nouns("boat, cart, bike, horse, bus, ship, sled, tractor"), written(
        "Every hour is as far as the others, so multiply.",
        "Multiply the miles of one hour by the hours.",
    )), "*", "the distance given is for one hour only"),
    "warmer": Kind(arithmetic("+", (6, 30), (3, 9), (
        "It is {x} degrees in the {one}. At noon it is {y} degrees warmer. "
        "How many degrees is it at noon?",
    ), nouns("morning, garden, valley, town, city, forest, village, street"), written(
        "Warmer means more degrees, so add.",
        "Add the degrees to the temperature.",
    )), "+", "the word \"warmer\" names the operation"),
    "shorter": Kind(arithmetic("-", (14, 60), (3, 9), (
        "A {one} is {x} meters long. Another {one} is {y} meters shorter. "
        "How many meters long is the other {one}?",
    ), _LONG, written(
        "Shorter means fewer meters, so subtract.",
        "Take the meters away from the length, so subtract.",
    )), "-", "the word \"shorter\" names the operation"),
    "packed": Kind(arithmetic("/", (2, 9), (2, 6), (
        "{name} packs {x} {many} with {y} in each {one}. How many {ones} does {name} fill?",
    ), _BOXES, written(
        "Every one takes the same number, so divide.",
        "Divide all of them by the number in one.",
    )), "/", "the number given goes into each of them"),
    "ones": Kind(_make_ones, "place", "a number of two digits has tens and ones"),
}  # fmt: skip
"""Kinds that are evaluated and never trained on: one or two for each operation, and a place."""


if __name__ == "__main__":
    raise SystemExit("error: this is a part of tools/make_demo.py and no command; run that")
