"""Worked thoughts: every sum in them is right, every verdict is true, and each author is what it claims to be."""

import random
import re
from fractions import Fraction
from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jevons.tasks import traces
from jevons.tasks.countdown import Countdown

LINE = re.compile(r"last ([0-9]+):((?:[^,;]+(?:,[^,;]+)?;)+) (yes|no)")


def exact(text):
    """Python's own reading of text that is known to be plain arithmetic, over fractions."""
    assert re.fullmatch(r"[0-9+\-*/()]+", text) and "**" not in text and "//" not in text
    return eval(re.sub(r"[0-9]+", r"Fraction('\g<0>')", text))


def draw(author, numbers, rng):
    task = Countdown(numbers=numbers, authors={author: 1.0})
    problem = task.sample(rng)
    return task, problem, task.trace(problem, rng)


def check_line(match, target, pair):
    """One line of search against its own meaning: every sum is right, and the verdict is about the finished ones. `pair`:
    two numbers are left beside the last one, and the first sum is of both."""
    last, others, finished = int(match[1]), None, []
    tries = match[2].removesuffix(";").split(";")
    for number, attempt in enumerate(tries):
        for position, chain in enumerate(attempt.split(",")):
            first, *more = chain.split("=")
            for depth, term in enumerate(more):
                value = int(re.match("[0-9]+", term)[0])
                assert exact(first) == value, match[0]
                operands = sorted(map(int, re.findall("[0-9]+", first)))
                others = others or operands
                if not (pair and position == depth == 0 and operands == others):
                    assert last in operands, match[0]
                    finished.append(value)
                first = term
        assert target not in finished or number == len(tries) - 1, match[0]
    assert value == target if match[2] and match[3] == "yes" else target not in finished, match[0]


def reward_of_substitution(plain, where, answer, target):
    """Whether every step is right, and putting the steps in for their values leads to the answer's numbers and value."""
    numbers = sorted(re.findall("[0-9]+", plain))
    for step in where.split(","):
        value, how = step.split("=")
        assert exact(how) == int(value)
        numbers.remove(value)  # where it is not there, the step was not one of those taken
        numbers += re.findall("[0-9]+", how)
    return sorted(numbers) == sorted(re.findall("[0-9]+", answer)) and exact(answer) == target


@pytest.mark.parametrize("author", list(traces.AUTHORS))
@given(numbers=st.integers(2, 6), seed=st.integers(0, 2**64))
def test_all_arithmetic_and_every_verdict_is_right(author, numbers, seed):
    task, problem, text = draw(author, numbers, random.Random(seed))
    target = problem.data["target"]
    thought, answer = text.split("</think>\n")
    assert text.startswith("last" if numbers <= 3 else "take")
    assert author == "planner" or text.count("last ") == 1
    assert thought.endswith("\n") and "\n" not in answer
    for line in thought.splitlines():
        if match := LINE.fullmatch(line):
            check_line(match, target, numbers > 2)
        elif taken := re.fullmatch(rf"take (.*)=([0-9]+): ([0-9,]+) -> {target}", line):
            assert exact(taken[1]) == int(taken[2]) and taken[2] in taken[3].split(",")
        elif so := re.fullmatch(r"so (.*) where (.*)", line):
            assert exact(so[1]) == target and reward_of_substitution(so[1], so[2], answer, target)
        else:
            assert line == "guess"
    assert all(int(product) <= traces.LARGEST for product in re.findall(r"\*[0-9]+=([0-9]+)", thought))
    assert sorted(map(int, re.findall("[0-9]+", answer))) == sorted(problem.data["numbers"]), text
    reward = task.score(problem, text)
    assert reward.parts == {"correct": float(exact(answer) == target), "format": 1.0}
    if "yes" in thought:
        assert reward.correct == 1.0, text


def test_what_is_taken_leaves_the_other_numbers_on_the_table():
    rng = random.Random()
    for _ in range(100):
        _, problem, text = draw("planner", 4, rng)
        for left, right, table in re.findall(r"^take ([0-9+\-*/]+)=([0-9]+): ([0-9,]+) -> [0-9]+$", text, re.M):
            rest = sorted([*map(int, re.findall("[0-9]+", left)), *map(int, table.split(",")[1:])])
            assert rest == sorted(problem.data["numbers"]) and table.split(",")[0] == right, text


def needs_a_large_last_division(numbers, target):
    """Whether no way of whole steps reaches the target but one that divides a product past LARGEST at the end."""
    for i, last in enumerate(numbers):
        a, b = (n for j, n in enumerate(numbers) if j != i)
        made = {a + b, abs(a - b), a * b, *({max(a, b) // min(a, b)} if max(a, b) % min(a, b) == 0 else ())}
        if {m for m in made if m <= traces.LARGEST} & {target - last, last - target, target + last, target * last,
                                                       Fraction(target, last), Fraction(last, target)}:
            return False
    return True


def test_the_planner_solves_every_problem_of_three_numbers_but_those_that_need_a_large_last_division():
    rng = random.Random()
    task = Countdown(authors={"planner": 1.0})
    everything = list(combinations_with_replacement(range(1, 31), 3))
    for numbers in [*rng.sample(everything, 150), (1, 1, 1), (1, 2, 3), (30, 30, 30)]:
        for target in task.targets(numbers):
            text = traces.write_trace(rng.sample(numbers, 3), target, rng, task.authors)
            if needs_a_large_last_division(numbers, target):
                assert "\nguess\n" in text, (numbers, target, text)
                continue
            assert " yes\n</think>" in text and exact(text.split("\n")[-1]) == target, (numbers, target, text)


def test_authors_differ_in_how_often_they_are_right():
    rng = random.Random()
    rate = {}
    for author in traces.AUTHORS:
        task = Countdown(authors={author: 1.0})
        problems = [task.sample(rng) for _ in range(400)]
        rate[author] = sum(task.score(p, task.trace(p, rng)).correct for p in problems) / 400
    assert 0.97 < rate["planner"] <= 1.0
    assert 0.6 < rate["hasty"] < 0.85


def test_four_numbers_are_mostly_solved_within_the_budget():
    rng = random.Random()
    task = Countdown(numbers=4, authors={"planner": 1.0})
    problems = [task.sample(rng) for _ in range(150)]
    texts = [task.trace(p, rng) for p in problems]
    assert sum(task.score(p, t).correct for p, t in zip(problems, texts, strict=True)) / 150 > 0.5
    assert max(t.count("take ") for t in texts) <= traces.TAKES


def test_authors_are_drawn_by_their_weights():
    rng = random.Random()
    texts = [traces.write_trace([1, 2, 3], 97, rng, {"planner": 1, "hasty": 3}) for _ in range(1_000)]
    lines = [text.count("last ") for text in texts]
    assert set(lines) == {1, 3} and 0.65 < lines.count(1) / 1_000 < 0.85


def test_a_problem_that_cannot_be_solved_still_gets_a_whole_thought():
    rng = random.Random()
    for author in traces.AUTHORS:
        text = traces.write_trace([1, 1, 1], 97, rng, {author: 1.0})
        thought, answer = text.split("</think>\n")
        assert "yes" not in thought and re.findall("[0-9]+", answer) == ["1", "1", "1"]


def test_the_same_generator_state_gives_the_same_text():
    task, seed = Countdown(), random.randrange(2**32)
    rngs = (random.Random(seed), random.Random(seed))
    first, second = ([task.trace(task.sample(rng), rng) for _ in range(20)] for rng in rngs)
    assert first == second
