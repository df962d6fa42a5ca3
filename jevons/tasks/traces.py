"""Worked Countdown thoughts of mixed quality, with backtracking, for a model that starts from nothing.

A thought puts one number aside to be used last, and tries what the others make, each time finished with that last one:

    last 7:3+19=22+7=29;19-3=16+7=23;3*19=57-7=50; no
    last 3:7+19=26+3=29;19-7=12+3=15;7*19=133-3=130; no
    last 19:7+3=10+19=29;7-3=4+19=23;7*3=21+19=40; yes

With more numbers it first takes a step, searches what is left, and at the end puts the step back in:

    take 18-8=10: 10,7,14 -> 28
    last 10:7+14=21+10=31;14-7=7+10=17;7*14=98-10=88; no
    last 7:10+14=24+7=31;14-10=4+7=11,7*4=28; yes
    so (14-10)*7 where 10=18-8

Two hidden authors search alike and do their arithmetic right. The planner goes on to the end; the hasty one gives up
after one line and guesses. Which one to be is what reinforcement learning can find out. Texts are compact because a
space before a digit is a token of its own, and `;` stands by itself because the verdict needs the whole number before it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, islice

from jevons.chat import END_THINK
from jevons.tasks.expression import Tree, write

AUTHORS = {"planner": 0.4, "hasty": 0.6}
TAKES = 6  # first steps that a planner tries with four or more numbers
LARGEST = 150  # products beyond this are the hardest sums, and no target under 100 needs them

Piece = tuple[int, Tree]  # a number on the table and how it was made


def write_trace(numbers: Sequence[int], target: int, rng: random.Random, authors: dict[str, float]) -> str:
    """`thought</think>\\nanswer`. The answer uses every number once, and is wrong where the author found nothing."""
    name = rng.choices(list(authors), list(authors.values()))[0]
    thought, answer = _search([(n, n) for n in numbers], target, rng, patience=1 if name == "hasty" else 10**9)
    return f"{thought}{END_THINK}\n{write(answer)}"


def check_authors(authors: dict[str, float]) -> dict[str, float]:
    """The weights themselves. Raises ValueError for an unknown author, a negative weight, or no weight at all."""
    for name, weight in authors.items():
        if name not in AUTHORS:
            raise ValueError(f"authors: unknown author {name!r}; known: {', '.join(AUTHORS)}")
        if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise ValueError(f"authors.{name}: weight must be a number >= 0, got {weight!r}")
    if sum(authors.values()) <= 0:
        raise ValueError(f"authors: at least one of {', '.join(AUTHORS)} needs a weight above 0")
    return authors


def _combine(x: Piece, y: Piece) -> Iterator[tuple[str, Piece]]:
    """Results of two numbers in the order that they are tried: x+y, larger-smaller, x*y unless that is
    past LARGEST, larger/smaller if it divides.

    Yields the step as text (`7-3=4`) and the piece it makes.
    """
    (a, p), (b, q) = x, y
    yield f"{a}+{b}={a + b}", (a + b, ("+", p, q))
    (c, r), (d, s) = (x, y) if a >= b else (y, x)
    yield f"{c}-{d}={c - d}", (c - d, ("-", r, s))
    if a * b <= LARGEST:
        yield f"{a}*{b}={a * b}", (a * b, ("*", p, q))
    if d and c % d == 0:
        yield f"{c}/{d}={c // d}", (c // d, ("/", r, s))


def _finishes(made: Piece, last: Piece, target: int) -> Iterator[tuple[str, Piece]]:
    """How `last` may finish what the others made, in the order tried: only what can be the target by its size, and
    products only where `last` divides the target."""
    (r, p), (c, q) = made, last
    if r < target:
        yield f"{r}+{c}={r + c}", (r + c, ("+", p, q))
    elif r > target and r >= c:
        yield f"{r}-{c}={r - c}", (r - c, ("-", p, q))
    if c > target and c > r:
        yield f"{c}-{r}={c - r}", (c - r, ("-", q, p))
    if (c > 1 or r == target) and target % c == 0 and r * c <= LARGEST:
        yield f"{r}*{c}={r * c}", (r * c, ("*", p, q))
    if r > target and c > 1 and r % c == 0:
        yield f"{r}/{c}={r // c}", (r // c, ("/", p, q))
    if c > target and r > 1 and c % r == 0:
        yield f"{c}/{r}={c // r}", (c // r, ("/", q, p))


def _line(table: list[Piece], index: int, target: int) -> tuple[str, Tree | None]:
    """One line of search: put the number at `index` aside and try what the other one or two make.

    Nothing has to be looked up but the target: whether a finished sum is a hit stands in its last number.
    """
    last, rest = table[index], table[:index] + table[index + 1 :]
    text = f"last {last[0]}:"
    for step, made in _combine(*rest) if len(rest) == 2 else [(str(rest[0][0]), rest[0])]:
        text += step
        first = f"{made[0]}"
        for number, (finish, (value, tree)) in enumerate(_finishes(made, last, target)):
            if number == 0:  # goes on from the step where it begins with the step's result: 3+19=22+7=29
                goes_on = finish.startswith(first) and not finish[len(first)].isdigit()
                finish = finish.removeprefix(first) if goes_on else f",{finish}"
            text += f"{finish};"
            if value == target:
                return f"{text} yes\n", tree
        text = text.removesuffix(";") + ";"
    return f"{text} no\n", None


def _lasts(table: list[Piece]) -> list[int]:
    """Indices of the table in order, each value once: putting an equal number aside is the same search. A value that comes
    twice has the turn of its last place."""
    last = {value: i for i, (value, _) in enumerate(table)}
    first = {value: i for i, (value, _) in reversed(list(enumerate(table)))}
    return [first[value] for value in sorted(last, key=last.get)]


def _takes(table: list[Piece], target: int, rng: random.Random) -> Iterator[tuple[str, list[Piece]]]:
    """First steps in random order, small results first more often: the step as text, and the table after it. The text ends
    as the short form of a question does, so that what follows has its target near."""
    options = []
    for i, j in combinations(range(len(table)), 2):
        rest = [piece for k, piece in enumerate(table) if k not in (i, j)]
        for step, made in _combine(table[i], table[j]):
            if made[0]:
                # exponential clocks: the order is a weighted draw without replacement, weight 1/(10+result)
                options.append((rng.expovariate(1 / (10 + made[0])), step, [made, *rest]))
    seen = set()
    for _, step, left in sorted(options, key=lambda option: option[0]):
        values = tuple(sorted(value for value, _ in left))
        if values not in seen:
            seen.add(values)
            table_left = ",".join(str(value) for value, _ in left)
            yield f"take {step}: {table_left} -> {target}\n", left


def _search(table: list[Piece], target: int, rng: random.Random, patience: int) -> tuple[str, Tree]:
    """Up to `patience` lines; complete for two and three numbers, with more TAKES first steps, each searched completely."""
    thought = ""
    tables = [("", table)] if len(table) <= 3 else islice(_takes(table, target, rng), TAKES)
    for step, left in tables:
        thought, steps = thought + step, [step]
        while len(left) > 3:
            step, left = next(_takes(left, target, rng))
            thought, steps = thought + step, [*steps, step]
        for last in _lasts(left):
            text, found = _line(left, last, target)
            thought, patience = thought + text, patience - 1
            if found:
                return thought + _substitution(left, last, target, steps), found
            if not patience:
                return f"{thought}guess\n", _random_steps(table, rng)[1]
    return f"{thought}guess\n", _random_steps(table, rng)[1]


def _substitution(left: list[Piece], last: int, target: int, steps: list[str]) -> str:
    """What was found, with the numbers that were taken as they stand on the table, and what they were made of, the last first:
    `so (14-10)*7 where 10=18-8`. Nothing where nothing was taken."""
    made = [step.removeprefix("take ").partition(":")[0].split("=") for step in reversed(steps) if step]
    if not made:
        return ""
    plain = _line([(value, value) for value, _ in left], last, target)[1]
    return f"so {write(plain)} where {','.join(f'{value}={how}' for how, value in made)}\n"


def _random_steps(table: list[Piece], rng: random.Random) -> Piece:
    """All numbers of the table combined in random order; every result is an integer from 0 to about LARGEST."""
    while len(table) > 1:
        x, y, *rest = rng.sample(table, len(table))
        steps = list(_combine(x, y))
        table = [rng.choice([s for s in steps if s[1][0] <= LARGEST] or steps[1:2])[1], *rest]  # a difference is never larger
    return table[0]


def random_target(numbers: Sequence[int], rng: random.Random) -> int:
    """What a random expression over all of `numbers` is worth: a reachable integer >= 0, without solving anything."""
    return _random_steps([(n, n) for n in numbers], rng)[0]
