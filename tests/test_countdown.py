"""The Countdown task: an exact scorer that never runs text, a solver against brute force, and a split that holds."""

import random
import re
from fractions import Fraction
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jevons.tasks import wordings
from jevons.tasks.base import Problem
from jevons.tasks.countdown import Countdown, is_heldout, problem_key
from jevons.tasks.expression import MAX_CHARACTERS, MAX_NESTING, ExpressionError, parse, reachable, write

TASK = Countdown()
small = st.integers(1, 30)


def problem(numbers, target):
    return Problem("", problem_key(numbers, target), {"numbers": list(numbers), "target": target})


def score(numbers, target, answer):
    return TASK.score(problem(numbers, target), f"thought</think>\n{answer}").parts


def value_of(tree):
    """An evaluator that shares nothing with the package but the shape of trees. None where a division by zero is."""
    if isinstance(tree, int):
        return Fraction(tree)
    left, right = value_of(tree[1]), value_of(tree[2])
    if left is None or right is None or (tree[0] == "/" and right == 0):
        return None
    return {"+": left.__add__, "-": left.__sub__, "*": left.__mul__, "/": left.__truediv__}[tree[0]](right)


def exact(text):
    """Python's own reading of text that is known to be plain arithmetic, over fractions."""
    assert re.fullmatch(r"[0-9+\-*/() ]+", text) and "**" not in text and "//" not in text
    return eval(re.sub(r"[0-9]+", r"Fraction('\g<0>')", text))


def leaves(tree):
    return [tree] if isinstance(tree, int) else leaves(tree[1]) + leaves(tree[2])


trees = st.recursive(st.integers(0, 30), lambda t: st.tuples(st.sampled_from("+-*/"), t, t), max_leaves=8)


def bracketed(tree):
    return str(tree) if isinstance(tree, int) else f"({bracketed(tree[1])} {tree[0]} {bracketed(tree[2])})"


@given(trees)
def test_written_and_bracketed_expressions_are_read_at_their_exact_value(tree):
    for text in (write(tree), bracketed(tree)):
        parsed = parse(text)
        assert parsed.value == value_of(tree), text
        assert parsed.numbers == tuple(sorted(leaves(tree)))


@given(trees, st.integers(0, 2**64))
def test_no_written_pair_of_parentheses_can_be_left_out(tree, seed):
    # other literals in the same places, random and large, so that two different formulas do not agree by chance
    rng = random.Random(seed)
    text = re.sub("[0-9]+", lambda _: str(rng.randint(10_000, 99_999)), write(tree))
    opened = []
    for i, character in enumerate(text):
        if character == "(":
            opened.append(i)
        elif character == ")":
            j = opened.pop()
            without = text[:j] + text[j + 1 : i] + text[i + 1 :]
            assert exact(without) != exact(text), (text, without)


@given(trees, st.data())
def test_score_agrees_with_an_independent_evaluator(tree, data):
    numbers, value = leaves(tree), value_of(tree)
    whole = value is not None and value.denominator == 1 and value > 0
    target = int(value) if whole else data.draw(st.integers(1, 100))
    assert score(numbers, target, write(tree)) == {"correct": float(value == target), "format": 1.0}
    assert score(numbers, target, f"{write(tree)} = {target}")["correct"] == float(value == target)
    assert score(numbers, target, f"{write(tree)} = {target + 1}") == {"correct": 0.0, "format": 1.0}
    assert score(numbers, target + 1, write(tree))["correct"] == 0.0
    assert score([*numbers, 5], target, write(tree))["correct"] == 0.0
    assert score([numbers[0] + 1, *numbers[1:]], target, write(tree))["correct"] == 0.0


@given(st.text())
def test_no_text_makes_the_scorer_raise(text):
    for whole in (text, f"</think>{text}", f"{text}</think>3*7+19"):
        parts = TASK.score(problem([3, 7, 19], 40), whole).parts
        assert set(parts) == {"correct", "format"} and all(part in (0.0, 1.0) for part in parts.values())


damage = st.tuples(st.integers(0, 60), st.sampled_from("0123456789+-*/()= .,eE_x×÷−٣３²\n\t#'\""))


@given(trees, st.lists(damage, max_size=4))
def test_a_damaged_expression_is_right_only_where_it_still_is(tree, edits):
    text = write(tree)
    for place, character in edits:
        place %= len(text) + 1
        text = text[:place] + character + text[place + (place % 2) :]
    numbers, target = leaves(tree), 24
    if score(numbers, target, text)["correct"] == 1.0:
        left, equals, right = text.strip().partition("=")
        assert exact(left) == target
        assert sorted(map(int, re.findall("[0-9]+", left))) == sorted(numbers)
        assert not equals or int(right) == target


@pytest.mark.parametrize(
    "answer",
    [
        *("", "=", "= 40", "3*7+19 = ", "3*7+19=-40", "3*7+19==40", "3*7+19=40=40", "3*7+19=4e1"),
        *("-3+7", "3*-7", "(-3)", "+3", "3--7", "3*", "*3", "()", ")3(", "(3*7+19", "3*7)+19"),
        *("3 7", "3 + 7 19", "37(19)", "(3)(7)", "07", "3_0", "1234567", "1" * 10_000),
        *("3**7", "9**9**9", "7//3", "3*7+19.", "3*7+19.0", "3e1", "0x3", "3;3", "\x003", "three", "__import__('os')"),
        *("3×7+19", "3÷7", "3−7", "3x7", "٣*7+19", "３*7+19", "3²"),
        *("3*7+19\n3*7+19", "3*7\t+19", "so 3*7+19", "`3*7+19`", "3*7+19</think>3*7+19"),
        *("(" * 1000 + "3" + ")" * 1000, "3" + "+3" * 100, "3" + " " * MAX_CHARACTERS + "+3"),
    ],
)
def test_what_is_not_an_expression_is_refused(answer):
    assert score([3, 7, 19], 40, answer) == {"correct": 0.0, "format": 0.0}


def test_what_is_accepted():
    numbers, right = [7, 19, 3], {"correct": 1.0, "format": 1.0}
    for answer in ("3*7+19", " 3 * 7 + 19 ", "19+(3*7)", "((19))+7*3", "3*7+19=40", "3*7+19 = 40", "\n\n3*7+19\n"):
        assert score(numbers, 40, answer) == right, answer
    assert score([2, 4, 9], 18, "9/(2/4)") == right, "fractions on the way"
    assert score([2, 9, 9], 2, "2-9+9") == right, "negative on the way"
    assert score([2, 5, 5], 2, "2/(5-5)") == {"correct": 0.0, "format": 1.0}
    assert score([2, 5, 5, 1], 2, "1/(2/(5-5))") == {"correct": 0.0, "format": 1.0}
    for text in ("1/(2/0)", "0*(1/0)", "1/0+1", "1/0-1/0", "0/0"):
        assert parse(text).value is None, text
    assert score([37], 37, "37") == right
    assert score([3, 7], 37, "37") == {"correct": 0.0, "format": 1.0}, "joined digits are not the given numbers"
    assert score([5], 5, "(" * MAX_NESTING + "5" + ")" * MAX_NESTING) == right
    assert score([5], 5, "(" * (MAX_NESTING + 1) + "5" + ")" * (MAX_NESTING + 1))["format"] == 0.0


def test_the_answer_follows_the_first_closed_thought():
    asked = problem([3, 7, 19], 40)
    assert TASK.score(asked, "3*7+19").parts == {"correct": 0.0, "format": 0.0}
    assert TASK.score(asked, "no idea</think>3*7+19").correct == 1.0
    assert TASK.score(asked, "a</think>b</think>3*7+19").correct == 0.0


def test_errors_say_why():
    with pytest.raises(ExpressionError, match="nested deeper"):
        parse("(" * 30 + "1" + ")" * 30)
    with pytest.raises(ExpressionError, match=r"unexpected '7'"):
        parse("3 7")
    with pytest.raises(ExpressionError, match=r"found '-'"):
        parse("3*-7")


def brute(numbers):
    """Integers >= 0 that any shape, order and operators make, by way of negative values too."""

    def values(sequence):
        if len(sequence) == 1:
            return {Fraction(sequence[0])}
        found = set()
        for cut in range(1, len(sequence)):
            for a, b in product(values(sequence[:cut]), values(sequence[cut:])):
                found |= {a + b, a - b, a * b} | ({a / b} if b else set())
        return found

    everything = set().union(*(values(order) for order in set(permutations(numbers))))
    return {int(value) for value in everything if value.denominator == 1 and value >= 0}


def test_reachable_is_what_brute_force_finds():
    rng = random.Random()
    cases = [[rng.randint(1, 30) for _ in range(n)] for n in (1, 2, 3, 3, 3, 3, 3, 3)]
    cases += [[5, 5, 5], [1, 1, 2], [rng.randint(1, 12) for _ in range(4)]]
    for numbers in cases:
        found = reachable(numbers)
        assert set(found) == brute(numbers), numbers
        for target, tree in found.items():
            assert value_of(tree) == target and sorted(leaves(tree)) == sorted(numbers), (numbers, target, tree)
            assert score(numbers, target, write(tree))["correct"] == 1.0


@pytest.mark.parametrize("numbers", [2, 3, 4, 5])
def test_the_sampler_never_draws_a_heldout_problem(numbers):
    rng = random.Random()
    task = Countdown(numbers=numbers)
    for _ in range(30_000 if numbers == 3 else 1_000):
        drawn = task.sample(rng)
        assert not is_heldout(drawn.data["numbers"], drawn.data["target"]), drawn
    for _ in range(20):
        drawn = task.sample_heldout(rng)
        assert is_heldout(drawn.data["numbers"], drawn.data["target"])


def test_sampled_problems_can_be_solved_and_lie_in_the_ranges():
    rng = random.Random()
    for numbers in (2, 3, 4):
        task = Countdown(numbers=numbers, low=2, high=12, target_low=5, target_high=50)
        for draw in [task.sample] * 30 + [task.sample_heldout] * 5:
            drawn = draw(rng)
            given_numbers, target = drawn.data["numbers"], drawn.data["target"]
            assert len(given_numbers) == numbers and all(2 <= n <= 12 for n in given_numbers) and 5 <= target <= 50
            assert drawn.key == problem_key(given_numbers, target)
            assert target in reachable(given_numbers)


@given(st.lists(small, min_size=2, max_size=4), st.integers(1, 100), st.randoms())
def test_the_split_ignores_the_order_of_numbers(numbers, target, rng):
    assert is_heldout(numbers, target) == is_heldout(rng.sample(numbers, len(numbers)), target)


def test_the_split_is_a_tenth_and_stays_what_it_is():
    everything = [(a, b, c, t) for a in range(1, 12) for b in range(a, 12) for c in range(b, 12) for t in range(1, 101)]
    heldout = sum(is_heldout(numbers, t) for *numbers, t in everything)
    assert 0.09 < heldout / len(everything) < 0.11
    assert problem_key([19, 3, 7], 40) == "3,7,19->40"
    # pinned: a checkpoint trained yesterday must not meet its held-out problems in training tomorrow
    assert [t for t in range(1, 60) if is_heldout([3, 7, 19], t)] == [8, 40, 41, 42, 45, 48]


def test_wordings_keep_numbers_and_target_and_the_short_form_leads():
    rng = random.Random()
    drawn = [TASK.sample(rng) for _ in range(2_000)]
    short = 0
    for p in drawn:
        numbers, target = p.data["numbers"], p.data["target"]
        body = p.prompt.split("\n\n")[0]
        mentioned = [int(n) for n in re.findall("[0-9]+", body)]
        assert sorted(mentioned) == sorted([*numbers, target])
        short += p.prompt == f"{' '.join(map(str, numbers))} -> {target}"
    assert 0.34 < short / len(drawn) < 0.46
    assert len({re.sub("[0-9]+", "N", p.prompt) for p in drawn}) > 100


def test_a_persons_own_question_is_one_of_the_wordings():
    asked = {wordings.ask([3, 7, 19], 40, random.Random(seed)).lower().rstrip(".?! ") for seed in range(40_000)}
    for own in ("how can i make 40 with 3, 7 and 19", "make 40 from 3 7 19", "please get 40 with the numbers 3, 7, 19",
                "with 3, 7, 19, make 40"):
        assert own in asked


def test_the_questions_of_reasoning_gym_are_among_the_wordings():
    gym = pytest.importorskip("reasoning_gym")
    module = pytest.importorskip("reasoning_gym.games.countdown")
    assert wordings.GYM_FORMAT == module.QUESTION_FORMAT_TEMPLATE
    dataset = gym.create_dataset("countdown", min_numbers=3, max_numbers=3, max_value=30, min_target=1, max_target=100,
                                 size=5, seed=random.randrange(10_000))
    assert list(wordings.GYM_QUESTIONS) == dataset._prompt_templates
    for entry in dataset:
        numbers, target = entry["metadata"]["numbers"], entry["metadata"]["target"]
        rng = random.Random(0)
        assert entry["question"] in {wordings.ask(numbers, target, rng) for _ in range(500)}


def test_examples_are_four_heldout_questions_and_always_the_same():
    for task in (TASK, Countdown(numbers=4)):
        questions = task.examples()
        assert len(questions) == 4 and questions == task.examples()
        for question in questions:
            found = [int(n) for n in re.findall("[0-9]+", question)]
            target = found.pop(0) if question.startswith(("Can", "How")) else found.pop()
            assert is_heldout(found, target) and target in reachable(found)
        assert "\n" not in task.describe()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"numbers": 1}, "numbers must be 2 to 6, got 1"),
        ({"numbers": 3.0}, "numbers must be an integer, got 3.0"),
        ({"low": 0}, "low=0"),
        ({"low": 9, "high": 8}, "low=9, high=8"),
        ({"target_low": 0}, "got 0 and 100"),
        ({"target_low": 50, "target_high": 40}, "got 50 and 40"),
        ({"authors": {"dreamer": 1}}, "unknown author 'dreamer'; known: planner"),
        ({"authors": {"planner": -1}}, "authors.planner"),
        ({"authors": {"planner": 0}}, "needs a weight above 0"),
    ],
)
def test_wrong_settings_are_refused(args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Countdown(**args)


def test_ranges_without_a_problem_are_an_error_not_a_loop():
    with pytest.raises(ValueError, match="found no training problem of 2 numbers"):
        Countdown(numbers=2, low=1, high=2, target_low=90).sample(random.Random())
