"""Worked Countdown thoughts of mixed quality, with backtracking, for a model that starts from nothing.

Each thought has a hidden author. The planner searches completely and says which number it uses last; the hasty one
looks at a part of that and guesses; the wanderer tries whole expressions at random. All three do their arithmetic
right. Their first words differ, so reinforcement learning has something to choose between. Texts are compact
(`3*7=21`, no spaces) because a space before a digit is a token of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, islice

from jevons.chat import END_THINK
from jevons.tasks.expression import Tree, write

AUTHORS = {"planner": 0.5, "hasty": 0.3, "wanderer": 0.2}
TAKES = 6  # first steps that a planner tries with four or more numbers
WANDERINGS = 3  # mean number of expressions that a wanderer tries
MAX_WANDERINGS = 8
LARGEST = 150  # products beyond this are the hardest sums, and no target under 100 needs them

Piece = tuple[int, Tree]  # a number on the table and how it was made


def write_trace(numbers: Sequence[int], target: int, rng: random.Random, authors: dict[str, float]) -> str:
    """`thought</think>\\nanswer`. The answer uses every number once, and is wrong where the author found nothing."""
    name = rng.choices(list(authors), list(authors.values()))[0]
    author = {"planner": _planner, "hasty": _hasty, "wanderer": _wanderer}[name]
    thought, answer = author([(n, n) for n in numbers], target, rng)
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


def _needs(target: int, last: int, brief: bool) -> dict[int, tuple[str, str]]:
    """What the other numbers must make so that `last` finishes the sum: the sum that says so, and how it finishes (`p` is
    theirs, `c` is the last one).

    Always in the order |t-c|, t+c, then t/c and c/t where they divide. `brief` stops after t+c. What only a division at
    the very end reaches is not looked for (3.6 % of problems with three numbers): t*c is the hardest sum of all to
    learn, and the rarest to help.
    """
    high, low = max(target, last), min(target, last)
    needs = {high - low: (f"{high}-{low}={high - low}", "p+c" if target >= last else "c-p")}
    needs.setdefault(target + last, (f"{target}+{last}={target + last}", "p-c"))
    if not brief and low and high % low == 0:
        needs.setdefault(high // low, (f"{high}/{low}={high // low}", "p*c" if target >= last else "c/p"))
    return needs


def _line(word: str, table: list[Piece], last: int, target: int, brief: bool, pairs: int) -> tuple[str, Tree | None]:
    """One line of search: put the number at `last` aside and try at most `pairs` results of the other one or two.

    Every sum is written out with both its operands: what stands beside a result is all that is needed to know it, and
    the same few hundred sums come up in every thought.
    """
    value, tree = table[last]
    rest = table[:last] + table[last + 1 :]
    needs = _needs(target, value, brief)
    text = f"{word} {value}: {' '.join(sum_ for sum_, _ in needs.values())}."
    steps = list(_combine(*rest))[:pairs] if len(rest) == 2 else [(str(rest[0][0]), rest[0])]
    for step, (result, made) in steps:
        text += f" {step}"
        if result in needs:
            left, operator, right = needs[result][1]
            return text + " yes\n", (operator, made, tree) if left == "p" else (operator, tree, made)
    return text + " no\n", None


def _lasts(table: list[Piece], rng: random.Random) -> list[int]:
    """Indices of the table in random order, each value once: putting an equal number aside is the same search."""
    order = {table[i][0]: i for i in rng.sample(range(len(table)), len(table))}
    return list(order.values())


def _takes(table: list[Piece], rng: random.Random) -> Iterator[tuple[str, list[Piece]]]:
    """First steps in random order, small results first more often: the step as text, and the table after it."""
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
            yield f"take {step}: {','.join(str(value) for value, _ in left)}\n", left


def _planner(table: list[Piece], target: int, rng: random.Random) -> tuple[str, Tree]:
    """Complete for two and three numbers; with more, TAKES first steps, each followed by the complete search."""
    thought = ""
    tables = [("", table)] if len(table) <= 3 else islice(_takes(table, rng), TAKES)
    for step, left in tables:
        thought += step
        while len(left) > 3:
            step, left = next(_takes(left, rng))
            thought += step
        for last in _lasts(left, rng):
            text, found = _line("last", left, last, target, brief=False, pairs=4)
            thought += text
            if found:
                return thought + f"so {write(found)}={target}\n", found
    text, guess = _guess(table, rng)
    return thought + text, guess


def _hasty(table: list[Piece], target: int, rng: random.Random) -> tuple[str, Tree]:
    """One or two lines of the planner's search with something left out, then a guess."""
    thought, left = "", table
    while len(left) > 3:
        step, left = next(_takes(left, rng))
        thought += f"maybe {step}"
    brief = rng.random() < 0.5
    for last in _lasts(left, rng)[: rng.randint(1, 2)]:
        text, found = _line("maybe", left, last, target, brief, pairs=4 if brief else 2)
        thought += text
        if found:
            return thought + f"so {write(found)}={target}\n", found
    text, guess = _guess(left, rng)
    return thought + text, guess


def _wanderer(table: list[Piece], target: int, rng: random.Random) -> tuple[str, Tree]:
    """All numbers combined at random, step by step, a geometric number of times; without a hit the closest is the answer."""
    tries = 1
    while tries < MAX_WANDERINGS and rng.random() > 1 / WANDERINGS:
        tries += 1
    texts: list[str] = []
    best: Piece | None = None
    for _ in range(tries):
        steps, (value, tree) = _random_steps(table, rng)
        if f"{steps} no" in texts:
            continue
        if value == target:
            return f"try {', '.join([*texts, f'{steps} yes'])}\n", tree
        texts.append(f"{steps} no")
        if best is None or abs(value - target) < abs(best[0] - target):
            best = (value, tree)
    return f"try {', '.join(texts)}\n", best[1]


def _guess(table: list[Piece], rng: random.Random) -> tuple[str, Tree]:
    steps, (_, tree) = _random_steps(table, rng)
    return f"guess {steps}\n", tree


def _random_steps(table: list[Piece], rng: random.Random) -> tuple[str, Piece]:
    """All numbers of the table combined in random order: the steps as text, and the piece; every result is an integer from
    0 to about LARGEST."""
    table = rng.sample(table, len(table))
    texts = []
    while len(table) > 1:
        x, y, *rest = table
        steps = list(_combine(x, y))
        text, made = rng.choice([s for s in steps if s[1][0] <= LARGEST] or steps[1:2])  # a difference is never larger
        texts.append(text)
        table = [made, *rest]
        if len(table) > 2:
            rng.shuffle(table)
    return " ".join(texts), table[0]


def random_target(numbers: Sequence[int], rng: random.Random) -> int:
    """What a random expression over all of `numbers` is worth: a reachable integer >= 0, without solving anything."""
    return _random_steps([(n, n) for n in numbers], rng)[1][0]
