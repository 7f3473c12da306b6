r"""Canonical forms of expressions of school algebra, independent of their spelling.

    "\frac{1}{2}x + 1"  and  "1 + x/2"  have one form, and so have  "\frac{1}{\sqrt{2}}"  and
    "\sqrt{2}/2".

A form is a sum of products: terms and factors are sorted, numbers are exact, like terms are added,
and roots of whole numbers are reduced. Products of sums are not expanded. Arithmetic on plain
numbers such as 48 + 24 has no form, because it is not an answer yet.
"""

from __future__ import annotations

import math
import re
import unicodedata
from fractions import Fraction
from typing import Any

MAX_CHARS = 300
_MAX_DEPTH = 24
_MAX_DIGITS = 300  # of a power
_MAX_ROOT = 10**10  # largest number under a root that is reduced
_MAX_FACTORIAL = 20

Factors = tuple[tuple[Any, Fraction], ...]  # bases with their exponents, sorted
Sum = dict[Factors, Fraction]  # coefficients of terms, by their factors

_TOKEN = re.compile(
    r"\s*(?:(\d+(?:\.\d+)?(?:_\{?\d+\}?)?|\.\d+)"
    r"|(\\[A-Za-z]+|\\[{}|]|[A-Za-zΑ-Ωα-ω]+)"
    r"|(\*\*|[-+*/^_(){}\[\]|!×÷]))"
)
_SPACE = re.compile(r"\s*\Z")
_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "log", "ln", "exp",
    "sinh", "cosh", "tanh", "lg",
}  # fmt: skip
_SIGNS = {"cdot": "*", "times": "*", "div": "/", "{": "(", "}": ")"}


class NotAnExpressionError(ValueError):
    """A text that is not an expression, or is too large."""


def form(latex: str) -> Fraction | tuple[Any, ...] | None:
    """Returns the form of an expression, a fraction for a number; None for other texts.

    Args:
        latex: the text, from `plain.latex`.
    """
    if len(latex) > MAX_CHARS:
        return None
    try:
        parser = _ExpressionParser(_tokens(latex))
        total = parser.sum(0)
        if parser.rest():
            return None
        number = _number(total)
        if number is not None:
            return None if parser.is_arithmetic else number
        return _key(total)
    except (
        ValueError,
        ZeroDivisionError,
        OverflowError,
    ):  # not an expression, or numbers too large
        return None


def _tokens(text: str) -> list[str]:
    """Returns numbers, names and signs; adjacent letters are factors, so each is a name."""
    tokens = []
    at = 0
    while not _SPACE.match(text, at):
        match = _TOKEN.match(text, at)
        if match is None:
            raise NotAnExpressionError
        at = match.end()
        (number, name, sign) = match.groups()
        if number or sign:
            tokens.append({"**": "^", "×": "*", "÷": "/"}.get(sign, number or sign))
            continue
        bare = name.removeprefix("\\")
        if name[0] == "\\" or bare in _FUNCTIONS or bare in ("sqrt", "pi"):
            tokens.append(_SIGNS.get(bare, f"\\{bare}"))
        elif len(bare) > 3 or _is_word(text, at - len(name), at, tokens):
            raise NotAnExpressionError
        else:
            tokens += [_symbol(letter) for letter in bare]
    if not any(t[0].isdigit() or t[0] in "\\+-*/^!" for t in tokens) and len(tokens) > 1:
        raise NotAnExpressionError  # letters alone are a word
    return tokens


def _is_word(text: str, start: int, end: int, tokens: list[str]) -> bool:
    """Returns whether letters form a word: several next to a space, or after other words."""
    is_behind = start > 0 and text[start - 1] == " "
    if end - start > 1 and (is_behind or text.startswith(" ", end)):
        return True
    return is_behind and bool(tokens) and tokens[-1].isalpha()


def _symbol(letter: str) -> str:
    name = unicodedata.name(letter, "")
    if not name.startswith("GREEK"):
        return letter
    word = name.rsplit(" ", 1)[-1].lower()
    return f"\\{word.capitalize() if 'CAPITAL' in name else word}"


class _ExpressionParser:
    """A recursive-descent parser of sums, products, powers and atoms; each method returns a sum."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0
        self.is_arithmetic = False  # numbers were added, subtracted or multiplied

    def rest(self) -> bool:
        return self._at < len(self._tokens)

    def _peek(self) -> str:
        return self._tokens[self._at] if self.rest() else ""

    def _take(self, *wanted: str) -> str:
        token = self._peek()
        if token and token in wanted:
            self._at += 1
            return token
        return ""

    def _need(self, token: str) -> None:
        if not self._take(token):
            raise NotAnExpressionError

    def sum(self, depth: int) -> Sum:
        if depth > _MAX_DEPTH:
            raise NotAnExpressionError
        sign = -1 if self._take("-", "+") == "-" else 1
        total = _scaled(self._product(depth + 1), Fraction(sign))
        while operator := self._take("+", "-"):
            term = self._product(depth + 1)
            self.is_arithmetic |= () in total and () in term
            total = _added(total, _scaled(term, Fraction(-1 if operator == "-" else 1)))
        return total

    def _product(self, depth: int) -> Sum:
        total = self._power(depth)
        divided = False
        while self.rest():
            operator = self._take("*", "/")
            following = self._peek()
            if not operator and following in (*")]}+-|^_!", "\\}"):
                break
            if not operator and following[0].isdigit() and not self._ends_group():
                raise NotAnExpressionError  # "2 3", "x2"
            sign = -1 if operator and self._take("-") else 1
            factor = _scaled(self._power(depth), Fraction(sign))
            both = _number(total) is not None and _number(factor) is not None
            if operator == "/":
                if divided and both:
                    raise NotAnExpressionError  # a date
                divided = True
                factor = _raised(factor, Fraction(-1))
            elif both and not _is_power_of_ten(factor):
                self.is_arithmetic = True
            total = _multiplied(total, factor)
        return total

    def _ends_group(self) -> bool:
        return self._tokens[self._at - 1] in (")", "]")

    def _power(self, depth: int) -> Sum:
        base = self._atom(depth)
        while self._take("!"):
            number = _number(base)
            if number is None or number.denominator > 1 or not 0 <= number <= _MAX_FACTORIAL:
                raise NotAnExpressionError
            base = {(): Fraction(math.factorial(int(number)))}
        if self._take("^"):
            sign = -1 if self._take("-") else 1
            base = _to_the(base, _scaled(self._argument(depth), Fraction(sign)))
        return base

    def _argument(self, depth: int) -> Sum:
        """Returns the argument of a command or of "^": a group, or one token."""
        if depth > _MAX_DEPTH:
            raise NotAnExpressionError
        return self._atom(depth + 1)

    def _atom(self, depth: int) -> Sum:
        token = self._peek()
        if not token or token in "+-*/^_!)}]":
            raise NotAnExpressionError
        self._at += 1
        if token in ("(", "{", "["):
            inner = self.sum(depth + 1)
            self._need({"(": ")", "{": "}", "[": "]"}[token])
            return inner
        if token == "|":
            inner = self.sum(depth + 1)
            self._need("|")
            return {((("abs", _key(inner)), Fraction(1)),): Fraction(1)}
        if token[0].isdigit() or token[0] == ".":
            if "_" in token:
                return _name(re.sub(r"[{}]", "", token))
            return {(): Fraction(token)} if Fraction(token) else {}
        return self._command(token, depth)

    def _command(self, token: str, depth: int) -> Sum:
        name = token.removeprefix("\\")
        if re.fullmatch("[dtc]?frac", name):
            top, bottom = self._halves(depth)
            return _multiplied(top, _raised(bottom, Fraction(-1)))
        if name == "sqrt":
            root = Fraction(2)
            if self._take("["):
                number = _number(self.sum(depth + 1))
                self._need("]")
                root = number or Fraction(0)
            if root.denominator > 1 or not 2 <= root <= 20:
                raise NotAnExpressionError
            return _raised(self._argument(depth), 1 / root)
        if name in _FUNCTIONS:
            base = self._subscript()
            power = self._argument(depth) if self._take("^") else None
            argument = self._power(depth + 1)
            call = _name((name, base, _key(argument)))
            return call if power is None else _to_the(call, power)
        return _name(token + self._subscript())

    def _halves(self, depth: int) -> tuple[Sum, Sum]:
        token = self._peek()
        if token.isdigit() and len(token) == 2:  # \frac12
            self._at += 1
            return {(): Fraction(token[0])}, {(): Fraction(token[1])}
        return self._argument(depth), self._argument(depth)

    def _subscript(self) -> str:
        if not self._take("_"):
            return ""
        group = []
        if self._take("{"):
            while self.rest() and self._peek() != "}":
                group.append(self._tokens[self._at])
                self._at += 1
            self._need("}")
        elif self.rest():
            group.append(self._tokens[self._at])
            self._at += 1
        return f"_{''.join(group)}"


def _name(base: Any) -> Sum:
    return {((base, Fraction(1)),): Fraction(1)}


def _number(total: Sum) -> Fraction | None:
    return total.get((), Fraction(0)) if not total.keys() - {()} else None


def _key(total: Sum) -> tuple[Any, ...]:
    return tuple(sorted(total.items(), key=repr))


def _is_power_of_ten(factor: Sum) -> bool:
    number = _number(factor)
    return bool(number) and re.fullmatch(r"1(?:/1)?0+", str(number)) is not None


def _added(left: Sum, right: Sum) -> Sum:
    total = dict(left)
    for factors, size in right.items():
        total[factors] = total.get(factors, Fraction(0)) + size
    return {factors: size for factors, size in total.items() if size}


def _scaled(total: Sum, by: Fraction) -> Sum:
    return {factors: size * by for factors, size in total.items()}


def _one_term(total: Sum) -> tuple[Factors, Fraction]:
    """Returns a sum as one term; several terms become a factor with a first coefficient of 1."""
    if not total:
        return (), Fraction(0)
    if len(total) == 1:
        return next(iter(total.items()))
    first = min(total.items(), key=repr)[1]
    return ((("sum", _key(_scaled(total, 1 / first))), Fraction(1)),), first


def _multiplied(left: Sum, right: Sum) -> Sum:
    number = _number(left)
    if number is not None and len(right) > 1:
        return _scaled(right, number) if number else {}
    number = _number(right)
    if number is not None and len(left) > 1:
        return _scaled(left, number) if number else {}
    (factors, size) = _one_term(left)
    (more, other) = _one_term(right)
    powers = dict(factors)
    for base, exponent in more:
        powers[base] = powers.get(base, Fraction(0)) + exponent
    return _reduced(powers, size * other)


def _raised(total: Sum, exponent: Fraction) -> Sum:
    factors, size = _one_term(total)
    if not size:
        if exponent <= 0:
            raise NotAnExpressionError
        return {}
    powers = {base: power * exponent for base, power in factors}
    if exponent.denominator == 1:
        digits = max(len(str(size.numerator)), len(str(size.denominator)))
        if abs(exponent) * digits > _MAX_DIGITS:
            raise NotAnExpressionError
        return _reduced(powers, size ** int(exponent))
    if size < 0 or max(size.numerator, size.denominator) > _MAX_ROOT:
        raise NotAnExpressionError
    for number, power in ((size.numerator, exponent), (size.denominator, -exponent)):
        if number > 1:
            powers[number] = powers.get(number, Fraction(0)) + power
    return _reduced(powers, Fraction(1))


def _to_the(base: Sum, exponent: Sum) -> Sum:
    number = _number(exponent)
    if number is not None:
        return _raised(base, number)
    return _name(("power", _key(base), _key(exponent)))


def _reduced(powers: dict[Any, Fraction], size: Fraction) -> Sum:
    """Returns the term with whole powers of numbers in its coefficient, and roots as factors."""
    roots: dict[Any, Fraction] = {}
    for base, exponent in powers.items():
        if not isinstance(base, int):
            roots[base] = exponent
            continue
        for prime, count in _primes(base).items():
            roots[prime] = roots.get(prime, Fraction(0)) + exponent * count
    for base in [b for b in roots if isinstance(b, int)]:
        whole = math.floor(roots[base])
        if abs(whole) > _MAX_DIGITS:
            raise NotAnExpressionError
        size *= Fraction(base) ** whole
        roots[base] -= whole
    factors = sorted(((b, e) for b, e in roots.items() if e), key=repr)
    return {tuple(factors): size} if size else {}


def _primes(number: int) -> dict[int, int]:
    """Returns the prime factors of a number; a cofactor without small factors is not split."""
    factors: dict[int, int] = {}
    for prime in range(2, 1000):
        if prime * prime > number:
            break
        while number % prime == 0:
            factors[prime] = factors.get(prime, 0) + 1
            number //= prime
    if number > 1:
        factors[number] = factors.get(number, 0) + 1
    return factors
