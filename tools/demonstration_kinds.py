"""The kinds of problem of the quickstart's teaching demonstrations, as data.

Each is a short word problem over two numbers. `{a}` and `{b}` are the numbers in the order of the
calculation; `{name}` and `{thing}` are drawn.
"""

from __future__ import annotations

from typing import NamedTuple

NAMES = (
    "Anna", "Ben", "Clara", "David", "Elena", "Felix", "Grace", "Hugo", "Ines", "Jonas", "Kira",
    "Leo", "Maria", "Noah", "Olga", "Paul",
)  # fmt: skip
THINGS = (
    "apples", "stamps", "marbles", "books", "shells", "coins", "cards", "pencils", "ribbons",
    "candles", "buttons",
)  # fmt: skip


class Kind(NamedTuple):
    """One kind of problem.

    Attributes:
        operation: `+`, `-`, `*` or `/`, between `a` and `b`.
        first: smallest and largest `a`; for `/` of the answer.
        second: smallest and largest `b`.
        questions: ways to ask.
        reasons: ways to say why the operation is the right one.
    """

    operation: str
    first: tuple[int, int]
    second: tuple[int, int]
    questions: tuple[str, ...]
    reasons: tuple[str, ...]


WORDS = {
    "+": ("addition", ("add", "sum", "plus", "total", "+")),
    "-": ("subtraction", ("subtract", "minus", "take away", "difference", "-")),
    "*": ("multiplication", ("multipl", "times", "product", "*", "×")),
    "/": ("division", ("divid", "share", "split", "quotient", "/")),
}
"""What each operation is called, and how an approach may mention it."""

LEADS = (
    "Write the calculation first: {a} {op} {b}.",
    "First write the calculation: {a} {op} {b}.",
    "Write this calculation first: {a} {op} {b}.",
)

KINDS = {
    "rows": Kind("*", (2, 9), (2, 9), (
        "There are {a} rows of {thing} with {b} {thing} in each row. How many {thing} are there?",
        "{name} lays out {a} rows of {b} {thing}. How many {thing} is that?",
    ), ("Equal rows are multiplied.", "Every row holds the same number, so multiply.")),
    "wage": Kind("*", (3, 12), (2, 6), (
        "{name} earns ${a} an hour and works {b} hours. How many dollars does {name} earn?",
        "{name} is paid ${a} for each hour. How many dollars is that for {b} hours?",
    ), ("Multiply the pay for one hour by the hours.", "Each hour pays the same, so multiply.")),
    "pages": Kind("*", (3, 12), (2, 6), (
        "{name} reads {a} pages a day. How many pages does {name} read in {b} days?",
        "{name} writes {a} pages every day for {b} days. How many pages is that?",
    ), ("The same number every day means multiply.", "Multiply the pages of one day by the days.")),
    "gaining": Kind("+", (3, 30), (2, 9), (
        "{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
        "{name} finds {a} {thing} in the morning and {b} in the evening. How many is that in all?",
    ), ("Getting more means adding.", "Both amounts are put together, so add.")),
    "age": Kind("+", (5, 30), (2, 10), (
        "{name} is {a} years old. How old will {name} be in {b} years?",
        "{name} is {a}, and her aunt is {b} years older. How old is the aunt?",
    ), ("Later means adding the years.", "Older means more years, so add.")),
    "weeks": Kind("*", (3, 12), (7, 7), (
        "How many days are there in {a} weeks?",
        "{name} is away for {a} weeks. How many days is that?",
    ), ("One week has 7 days.", "Each week has seven days, so multiply.")),
    "cakes": Kind("*", (2, 8), (2, 8), (
        "One cake needs {a} eggs. How many eggs do {b} cakes need?",
        "{name} uses {a} eggs for each cake and bakes {b} cakes. How many eggs is that?",
    ), ("Each cake needs the same amount, so multiply.",
        "Multiply the eggs of one cake by the cakes.")),
    "prices": Kind("*", (2, 12), (2, 7), (
        "One book costs ${a}. How many dollars do {b} books cost?",
        "{name} buys {b} tickets for ${a} each. How many dollars does {name} pay?",
    ), ("Every one costs the same, so multiply.",
        "Multiply the price of one by how many there are.")),
    "boxes": Kind("*", (2, 9), (2, 9), (
        "{name} has {a} boxes with {b} {thing} in each. How many {thing} does {name} have?",
        "There are {a} bags with {b} {thing} in each bag. How many {thing} are there?",
    ), ("Equal boxes are multiplied.", "Each one holds the same number, so multiply.")),
    "driving": Kind("*", (20, 60), (2, 5), (
        "A car drives {a} km an hour for {b} hours. How many km does it drive?",
        "{name} travels {b} hours at {a} km an hour. How many km is that?",
    ), ("Distance is speed times hours.", "Each hour adds the same distance, so multiply.")),
    "saving": Kind("*", (3, 12), (2, 8), (
        "{name} saves ${a} each week. How many dollars is that in {b} weeks?",
        "{name} puts ${a} into a jar every week for {b} weeks. How many dollars are in it?",
    ), ("The same amount every week means multiply.",
        "Multiply the dollars of one week by the weeks.")),
    "legs": Kind("*", (3, 12), (4, 4), (
        "How many legs do {a} cats have?",
        "{name} has {a} dogs. How many legs do the dogs have?",
    ), ("Each one has 4 legs.", "Every animal has four legs, so multiply.")),
    "together": Kind("+", (4, 30), (3, 20), (
        "{name} has {a} {thing} and Tom has {b}. How many {thing} do they have together?",
        "There are {a} red {thing} and {b} blue {thing}. How many {thing} are there in total?",
    ), ("Together means adding.", "Both amounts are put together, so add.")),
    "minutes": Kind("+", (10, 40), (5, 15), (
        "{name} walks {a} minutes and then rests {b} minutes. How many minutes is that in all?",
        "A film is {a} minutes long and the break takes {b} minutes. How many minutes in all?",
    ), ("Both times are put together, so add.", "In all means adding.")),
}  # fmt: skip
