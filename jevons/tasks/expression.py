"""Arithmetic over given numbers: reading an answer exactly without running it, writing one, and finding all of them.

A tree is an int, or `(operator, left, right)`. Text from a model is never evaluated as code: it is bounded in length,
alphabet and nesting before anything looks at its structure, and values are exact fractions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd

MAX_CHARACTERS = 200
MAX_DIGITS = 6
MAX_NESTING = 20

Tree = int | tuple  # tuple: (operator, Tree, Tree)

_ALPHABET = re.compile(r"[0-9+\-*/() ]+")
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")


class ExpressionError(ValueError):
    """Text that is not an expression in + - * / and parentheses; the message says why."""


@dataclass(frozen=True)
class Parsed:
    """`value` is None where the expression divides by zero; `numbers` are its literals, sorted."""

    value: Fraction | None
    numbers: tuple[int, ...]


def parse(text: str) -> Parsed:
    """Read `text` as an expression. Binary + - * / and parentheses over plain ASCII integers, spaces between tokens.

    Raises ExpressionError for everything else: a unary sign, `**`, `//`, letters, leading zeros, two numbers side by
    side, more than MAX_CHARACTERS, MAX_DIGITS a number, or MAX_NESTING open parentheses.
    """
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"{len(text)} characters, more than {MAX_CHARACTERS}")
    if not _ALPHABET.fullmatch(text):
        raise ExpressionError("only digits, + - * / and parentheses are read")
    tokens = _TOKEN.findall(text)
    depth = 0
    for token in tokens:
        depth += (token == "(") - (token == ")")
        if depth > MAX_NESTING:
            raise ExpressionError(f"parentheses nested deeper than {MAX_NESTING}")
        if token.isdigit() and (len(token) > MAX_DIGITS or (token[0] == "0" and token != "0")):
            raise ExpressionError(f"number {token} has too many digits or a leading zero")
    reader = _Reader(tokens)
    top, bottom = reader.sum()
    if reader.at < len(tokens):
        raise ExpressionError(f"unexpected {tokens[reader.at]!r}")
    value = Fraction(top, bottom) if bottom else None
    return Parsed(value, tuple(sorted(int(token) for token in tokens if token.isdigit())))


class _Reader:
    """Recursive descent over checked tokens. Values are unreduced (top, bottom) pairs; bottom 0 is no value."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else "the end"

    def sum(self) -> tuple[int, int]:
        a, b = self.product()
        while (operator := self.peek()) in "+-":
            self.at += 1
            c, d = self.product()
            a, b = (a * d + c * b if operator == "+" else a * d - c * b), b * d
        return a, b

    def product(self) -> tuple[int, int]:
        a, b = self.atom()
        while (operator := self.peek()) in "*/":
            self.at += 1
            c, d = self.atom()
            # a divisor 1/0 has bottom d = 0, which turning it over would lose: the quotient has no value either
            a, b = (a * c, b * d) if operator == "*" else (a * d, b * c if d else 0)
        return a, b

    def atom(self) -> tuple[int, int]:
        token = self.peek()
        self.at += 1
        if token.isdigit():
            return int(token), 1
        if token != "(":
            raise ExpressionError(f"expected a number or '(', found {token!r}")
        inner = self.sum()
        if self.peek() != ")":
            raise ExpressionError(f"expected ')', found {self.peek()!r}")
        self.at += 1
        return inner


def write(tree: Tree) -> str:
    """The tree as text, with parentheses only where the value needs them: `(3+7)*4`, `19-(7-3)`, `3*7+19`."""
    if isinstance(tree, int):
        return str(tree)
    operator, left, right = tree
    kept_left = operator in "*/" and _operator(left) in ("+", "-")
    kept_right = _operator(right) in {"+": (), "-": ("+", "-"), "*": ("+", "-"), "/": ("+", "-", "*", "/")}[operator]
    left_text, right_text = write(left), write(right)
    return f"{f'({left_text})' if kept_left else left_text}{operator}{f'({right_text})' if kept_right else right_text}"


def _operator(tree: Tree) -> str:
    return "" if isinstance(tree, int) else tree[0]


def reachable(numbers: Sequence[int]) -> dict[int, Tree]:
    """Every integer >= 0 that `numbers` can make, each used exactly once, with one expression tree for it. Exhaustive.

    About 0.1 ms for three numbers and a few ms for four; each further number costs some fifty times more.
    """
    return {top: tree for (top, bottom), tree in _values(tuple(sorted(numbers))).items() if bottom == 1}


def _values(numbers: tuple[int, ...]) -> dict[tuple[int, int], Tree]:
    return _pair_values(numbers) if len(numbers) <= 2 else _all_values(numbers)


@lru_cache(maxsize=1024)
def _pair_values(numbers: tuple[int, ...]) -> dict[tuple[int, int], Tree]:
    return _all_values(numbers)


def _all_values(numbers: tuple[int, ...]) -> dict[tuple[int, int], Tree]:
    """Every non-negative value (top, bottom), reduced, that the sorted `numbers` make, with one tree for it.

    Negative intermediates add nothing: wherever one occurs, swapping the subtraction that made it and exchanging the
    + and - above gives the same absolute value. So a pair is combined in five ways: a+b, a*b, |a-b|, a/b, b/a.
    """
    if len(numbers) == 1:
        return {(numbers[0], 1): numbers[0]}
    splits = set()
    for mask in range(1, 1 << (len(numbers) - 1)):  # the last number is always on the right: each split once
        left = tuple(n for i, n in enumerate(numbers) if mask >> i & 1)
        splits.add((left, tuple(n for i, n in enumerate(numbers) if not mask >> i & 1)))
    found: dict[tuple[int, int], Tree] = {}
    for left, right in sorted(splits):
        others = _values(right).items()
        for (a, b), x in _values(left).items():
            for (c, d), y in others:
                ad, cb, bd = a * d, c * b, b * d
                results = [(ad + cb, bd, "+", x, y), (a * c, bd, "*", x, y)]
                results.append((ad - cb, bd, "-", x, y) if ad >= cb else (cb - ad, bd, "-", y, x))
                if c:
                    results.append((ad, cb, "/", x, y))
                if a:
                    results.append((cb, ad, "/", y, x))
                for top, bottom, operator, first, second in results:
                    shared = gcd(top, bottom)
                    value = (top // shared, bottom // shared)
                    if value not in found:
                        found[value] = (operator, first, second)
    return found
