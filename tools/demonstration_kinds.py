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
    "The calculation is {a} {op} {b}.",
    "Begin with the calculation {a} {op} {b}.",
    "Write down {a} {op} {b} and work it out.",
)

KINDS = {
    "rows": Kind("*", (3, 12), (3, 9), (
        "There are {a} rows of {thing} with {b} {thing} in each row. How many {thing} are there?",
        "{name} lays out {a} rows of {b} {thing}. How many {thing} is that?",
    ), ("Equal rows are multiplied.", "Every row holds the same number, so multiply.")),
    "wage": Kind("*", (4, 15), (3, 8), (
        "{name} earns ${a} an hour and works {b} hours. How many dollars does {name} earn?",
        "{name} is paid ${a} for each hour. How many dollars is that for {b} hours?",
    ), ("Multiply the pay for one hour by the hours.", "Each hour pays the same, so multiply.")),
    "pages": Kind("*", (4, 20), (3, 7), (
        "{name} reads {a} pages a day. How many pages does {name} read in {b} days?",
        "{name} writes {a} pages every day for {b} days. How many pages is that?",
    ), ("The same number every day means multiply.", "Multiply the pages of one day by the days.")),
    "teams": Kind("/", (3, 9), (3, 9), (
        "A class of {a} children is put into teams of {b}. How many teams are there?",
        "{a} {thing} are packed {b} to a box. How many boxes are needed?",
        "{name} ties {a} {thing} into bundles of {b}. How many bundles are there?",
    ), ("Divide all of them by the size of one group.", "Groups of equal size mean division.")),
    "sharing": Kind("/", (3, 9), (2, 8), (
        "{name} shares {a} {thing} equally among {b} friends. How many does each friend get?",
        "{a} {thing} are split equally between {b} children. How many does each child get?",
    ), ("Sharing equally means dividing.", "Equal shares come from division.")),
    "gaining": Kind("+", (6, 40), (5, 40), (
        "{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
        "{name} finds {a} {thing} in the morning and {b} in the evening. How many is that in all?",
    ), ("Getting more means adding.", "Both amounts are put together, so add.")),
    "giving": Kind("-", (15, 60), (3, 14), (
        "{name} has {a} {thing} and gives away {b}. How many {thing} are left?",
        "There were {a} {thing} in the box and {name} took {b} out. How many are still there?",
    ), ("Giving away means subtracting.", "Fewer are left, so take the smaller number away.")),
    "bus": Kind("-", (14, 48), (3, 12), (
        "There are {a} people on a bus and {b} people get off. How many people are on the bus now?",
        "A hall has {a} guests and {b} of them go home. How many guests are left?",
    ), ("People who leave make fewer people.", "Those who go are subtracted.")),
    "age": Kind("+", (5, 40), (3, 25), (
        "{name} is {a} years old. How old will {name} be in {b} years?",
        "{name} is {a}, and her aunt is {b} years older. How old is the aunt?",
    ), ("Later means adding the years.", "Older means more years, so add.")),
    "weeks": Kind("*", (3, 12), (7, 7), (
        "How many days are there in {a} weeks?",
        "{name} is away for {a} weeks. How many days is that?",
    ), ("One week has 7 days.", "Each week has seven days, so multiply.")),
}  # fmt: skip
