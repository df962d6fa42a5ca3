"""What a task is: it samples problems, scores texts exactly, and may write worked solutions. No torch here.

A user's own task is one class in a file, named on the command line as `path/to/file.py:ClassName`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Problem:
    """One question. `key` identifies it up to wording (so splits and pairing work); `data` is what `score` needs."""

    prompt: str
    key: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reward:
    """Named parts of a score. `correct` is the verifier's verdict: 1.0 is right and nothing else is."""

    parts: dict[str, float]

    @property
    def correct(self) -> float:
        return self.parts.get("correct", 0.0)


@runtime_checkable
class Task(Protocol):
    """The verifier protocol. Only `sample` and `score` are required of a user's class."""

    name: str

    def sample(self, rng: random.Random) -> Problem:
        """A training problem. Never one of the held-out ones, whatever the generator's state."""

    def score(self, problem: Problem, text: str) -> Reward:
        """Score a completion's whole text, thought included (the answer is what follows `</think>`). Never raises."""


class HeldOut(Protocol):
    """Optional: a task with a held-out split."""

    def sample_heldout(self, rng: random.Random) -> Problem: ...


class Traced(Protocol):
    """Optional: worked solutions for a model that starts from nothing. `closing_words` is the line with which one of them
    gives up and answers all the same; a server that closes a thought early writes it there."""

    closing_words: str

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """`thought</think>\\nanswer`: what follows a prompt that ends in `<think>\\n`. Readable; not always right."""

    def examples(self) -> list[str]:
        """A few questions for the chat page."""

    def describe(self) -> str:
        """One line for people: what a model trained on this task was taught."""
