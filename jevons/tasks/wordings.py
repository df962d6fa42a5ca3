"""The ways in which a Countdown problem is asked, from shorthand to whole sentences."""

from __future__ import annotations

import random
from collections.abc import Sequence

# The questions that the reasoning-gym package asks for this game, so that a model trained here has seen them.
GYM_FORMAT = """{question}

Final answer format instructions:
1. Provide your solution as a arithmetic expression (no '=' sign).
2. Do not include the target number in the expression.
3. Use '*' for multiplication.
4. Use '/' for division.
5. Do not include any other text or formatting.
"""
GYM_QUESTIONS = (
    "Using all the numbers {numbers}, create an expression that equals {target}.\nYou can only use each number once.",
    "Find a way to make {target} using all of these numbers: {numbers}.\nEach number can only be used once.",
    "Calculate {target} using all of these numbers: {numbers}.\nEach number may be used at most once.",
)
SHORT = "{spaced} -> {target}"
SENTENCES = (
    "Use {listed} to make {target}.",
    "Can you get {target} from {listed}?",
    "How do I make {target} with {listed}?",
    "numbers: {listed} target: {target}",
    "make {target} out of {listed}",
    "Reach {target} with {listed}. Use + - * / and parentheses, and each number exactly once.",
)
OPENERS = ("", "", "", "Please ", "Can you ", "How can I ", "How do I ", "How would you ", "Is there a way to ", "I want to ")
VERBS = ("make", "make", "get", "get", "reach", "build", "find")
JOINERS = ("with", "from", "using", "out of", "with the numbers", "from the numbers")
ASKING = {"C", "H", "I"}  # initials of openers that end in a question mark; "I want to" does not mind
SHORT_SHARE, GYM_SHARE, FREE_SHARE = 0.4, 0.1, 0.25


def ask(numbers: Sequence[int], target: int, rng: random.Random) -> str:
    """One question in a random wording; the numbers stay in the order given."""
    kind = rng.random()
    if kind < SHORT_SHARE:
        return SHORT.format(spaced=" ".join(map(str, numbers)), target=target)
    if kind < SHORT_SHARE + GYM_SHARE:
        question = rng.choice(GYM_QUESTIONS).format(numbers=", ".join(map(str, numbers)), target=target)
        return GYM_FORMAT.format(question=question)
    listed = _listed(numbers, rng)
    if kind < SHORT_SHARE + GYM_SHARE + FREE_SHARE:
        text = _free(listed, target, rng)
    else:
        text = rng.choice(SENTENCES).format(listed=listed, target=target)
    if rng.random() < 0.2:
        text = text.lower()
    if rng.random() < 0.2:
        text = text.rstrip(".?") + rng.choice(["", ".", "?", "!"])
    return text


def _free(listed: str, target: int, rng: random.Random) -> str:
    """A sentence put together from parts, so that a person's own is seldom far from one that was seen."""
    opener, verb, joiner = rng.choice(OPENERS), rng.choice(VERBS), rng.choice(JOINERS)
    if not opener and rng.random() < 0.3:
        text = f"{rng.choice(['With', 'Using', 'From'])} {listed}, {verb} {target}"
    else:
        text = f"{opener}{verb} {target} {joiner} {listed}"
    return text[0].upper() + text[1:] + ("?" if opener[:1] in ASKING else ".")


def _listed(numbers: Sequence[int], rng: random.Random) -> str:
    *most, last = map(str, numbers)
    style = rng.choice(["and", "comma", "comma", "space", "tight"])
    if style == "and":
        return f"{', '.join(most)} and {last}"
    return {"comma": ", ", "space": " ", "tight": ","}[style].join([*most, last])
