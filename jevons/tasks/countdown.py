"""The Countdown game: reach a target with + - * / and parentheses, using each given number exactly once."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from jevons.chat import END_THINK
from jevons.tasks import traces, wordings
from jevons.tasks.base import Problem, Reward
from jevons.tasks.expression import ExpressionError, parse, reachable

SOLVED = 4  # up to this many numbers, targets are drawn from all reachable ones
REMEMBERED = 50_000  # solved multisets kept by a task: all 40,920 of four numbers up to 30, about 20 MB


def problem_key(numbers: Sequence[int], target: int) -> str:
    """`3,7,19->40`: the problem without its wording and the order of its numbers."""
    return f"{','.join(map(str, sorted(numbers)))}->{target}"


def is_heldout(numbers: Sequence[int], target: int) -> bool:
    """Whether a problem belongs to the tenth that is never trained on. A hash decides, so it never changes."""
    digest = hashlib.blake2b(problem_key(numbers, target).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10 == 0


class Countdown:
    """Problems of `numbers` numbers in [low, high] with a reachable target in [target_low, target_high].

    `authors` weighs the hidden authors of worked thoughts (see `traces`). With up to SOLVED numbers a target is uniform
    among all reachable ones (0.5 ms for four numbers the first time, then looked up); with more it is the value of a
    random expression. Held-out problems come from the same distribution.
    """

    name = "countdown"
    closing_words = "guess"  # the last line of a thought that found nothing (see `traces`)

    def __init__(self, numbers: int = 3, low: int = 1, high: int = 30, target_low: int = 1, target_high: int = 100,
                 authors: dict[str, float] | None = None):
        given = {"numbers": numbers, "low": low, "high": high, "target_low": target_low, "target_high": target_high}
        for field, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"countdown: {field} must be an integer, got {value!r}")
        if not 2 <= numbers <= 6:
            raise ValueError(f"countdown: numbers must be 2 to 6, got {numbers}")
        if not 1 <= low <= high <= 999:
            raise ValueError(f"countdown: 1 <= low <= high <= 999 must hold, got low={low}, high={high}")
        if not 1 <= target_low <= target_high <= 99_999:
            raise ValueError(
                f"countdown: 1 <= target_low <= target_high <= 99999 must hold, got {target_low} and {target_high}"
            )
        self.numbers, self.low, self.high = numbers, low, high
        self.target_low, self.target_high = target_low, target_high
        self.authors = traces.check_authors(dict(traces.AUTHORS if authors is None else authors))
        self._targets: dict[tuple[int, ...], tuple[int, ...]] = {}

    def sample(self, rng: random.Random) -> Problem:
        """A training problem. Raises ValueError if the ranges hold none that can be reached."""
        return self._draw(rng, heldout=False)

    def sample_heldout(self, rng: random.Random) -> Problem:
        """A problem of the held-out tenth. Raises ValueError if the ranges hold none."""
        return self._draw(rng, heldout=True)

    def _draw(self, rng: random.Random, heldout: bool) -> Problem:
        for _ in range(20_000):
            numbers = [rng.randint(self.low, self.high) for _ in range(self.numbers)]
            if self.numbers <= SOLVED:
                targets = self.targets(numbers)
                target = rng.choice(targets) if targets else 0
            else:
                target = traces.random_target(numbers, rng)
            if self.target_low <= target <= self.target_high and is_heldout(numbers, target) == heldout:
                prompt = wordings.ask(numbers, target, rng)
                return Problem(prompt, problem_key(numbers, target), {"numbers": numbers, "target": target})
        raise ValueError(
            f"countdown: found no {'held-out' if heldout else 'training'} problem of {self.numbers} numbers in "
            f"[{self.low}, {self.high}] with a target in [{self.target_low}, {self.target_high}]; widen the ranges"
        )

    def targets(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """The reachable targets within the range, in order."""
        key = tuple(sorted(numbers))
        found = self._targets.get(key)
        if found is None:
            found = tuple(sorted(t for t in reachable(key) if self.target_low <= t <= self.target_high))
            if len(self._targets) < REMEMBERED:
                self._targets[key] = found
        return found

    def score(self, problem: Problem, text: str) -> Reward:
        """`format`: the thought was closed and an expression follows, alone or with `= number`. `correct`: it also uses
        each number exactly once, is worth the target, and the number after `=`, if any, is the target.
        """
        _, closed, answer = text.partition(END_THINK)
        expression, equals, claimed = answer.strip(" \t\r\n").partition("=")
        claimed = claimed.strip(" ")
        if not closed or (equals and not (claimed.isascii() and claimed.isdigit() and len(claimed) <= 9)):
            return Reward({"correct": 0.0, "format": 0.0})
        try:
            parsed = parse(expression)
        except ExpressionError:
            return Reward({"correct": 0.0, "format": 0.0})
        target = problem.data["target"]
        correct = (
            parsed.value == target
            and parsed.numbers == tuple(sorted(problem.data["numbers"]))
            and (not equals or int(claimed) == target)
        )
        return Reward({"correct": float(correct), "format": 1.0})

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """A worked thought and answer by a hidden author; see `traces`."""
        return traces.write_trace(problem.data["numbers"], problem.data["target"], rng, self.authors)

    def examples(self) -> list[str]:
        """Four held-out questions, always the same ones."""
        rng = random.Random(f"examples {self.numbers} {self.low} {self.high} {self.target_low} {self.target_high}")
        problems = [self.sample_heldout(rng).data for _ in range(4)]
        styles = ["Use {listed} to make {target}.", "Can you get {target} from {listed}?", wordings.SHORT,
                  "How do I make {target} with {listed}?"]
        return [
            style.format(listed=", ".join(map(str, data["numbers"])), spaced=" ".join(map(str, data["numbers"])),
                         target=data["target"])
            for style, data in zip(styles, problems, strict=True)
        ]

    def describe(self) -> str:
        """What a model trained on this task was taught, in one line."""
        return (
            f"Countdown: reach a target from {self.target_low} to {self.target_high} with {self.numbers} numbers from "
            f"{self.low} to {self.high}, each used exactly once, with + - * / and parentheses"
        )
