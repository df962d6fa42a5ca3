"""Tasks as a person would write them, in a file of their own: only what the protocol asks for."""

import random

from jevons.tasks.base import Problem, Reward

WORDS = ("sun", "moon", "rain", "wind", "sea", "hill", "tree", "leaf")


class Even:
    """Right when the text has an even number of characters: a model that knows nothing has spread."""

    name = "even"

    def sample(self, rng: random.Random) -> Problem:
        words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 4)))
        return Problem(f"write {words}", words)

    def score(self, problem: Problem, text: str) -> Reward:
        return Reward({"correct": float(len(text) % 2 == 0)})


class Traced(Even):
    """The same with worked solutions, so that a model can start from nothing."""

    def trace(self, problem: Problem, rng: random.Random) -> str:
        words = problem.key.split()
        rng.shuffle(words)
        return f"{', '.join(words)}.</think>\n{problem.key}"


class LongPrompts(Even):
    """Prompts longer than the room that rollouts leave by default."""

    name = "long"

    def sample(self, rng: random.Random) -> Problem:
        words = " ".join(rng.choice(WORDS) for _ in range(120))
        return Problem(words, words)
