"""Evaluation: intervals, held-out problems, and numbers that anybody can rescore."""

import json
import random

import pytest
import torch
from nets import lively
from own_tasks import Even, Traced

from jevons.config import preset
from jevons.data.tokenizer import train_tokenizer
from jevons.engine.types import Completion, PromptTooLong
from jevons.reason.evaluate import evaluate, held_out_problems, mtp_acceptance, paired_interval, wilson
from jevons.tasks.base import Problem
from jevons.tasks.countdown import Countdown, is_heldout


@pytest.fixture(scope="module")
def tokenizer():
    rng, task = random.Random(3), Traced()
    return train_tokenizer([t for p in (task.sample(rng) for _ in range(50)) for t in (p.prompt, task.trace(p, rng))], 288)


@pytest.fixture
def model():
    return lively(preset("v3-nano", vocab_size=288, max_position_embeddings=96))


def test_wilson_intervals():
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # Wilson's own score, as tables have it
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4) and wilson(20, 20) == pytest.approx((0.8389, 1), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    rate, n = random.uniform(0.1, 0.9), 200
    inside = 0
    for _ in range(400):
        low, high = wilson(sum(random.random() < rate for _ in range(n)), n)
        inside += low <= rate <= high
    assert inside >= 0.90 * 400, "95 % intervals hold the truth about 95 times in 100"


def test_paired_intervals():
    before = [float(random.random() < 0.5) for _ in range(300)]
    assert paired_interval(before, before) == (0, 0, 0)
    after = [max(b, float(random.random() < 0.4)) for b in before]
    mean, low, high = paired_interval(before, after)
    gains = torch.tensor(after) - torch.tensor(before)
    assert mean == pytest.approx(gains.mean().item(), abs=1e-6) and 0 < low < mean < high
    assert high - mean == pytest.approx(1.96 * gains.std().item() / 300**0.5, rel=1e-4)
    assert paired_interval(after, before)[0] == -mean
    with pytest.raises(ValueError):
        paired_interval([1.0], [1.0, 0.0])


def test_problems_are_held_out_and_the_same_for_one_seed():
    task, seed = Countdown(), random.randrange(1000)
    problems = held_out_problems(task, 50, seed)
    assert problems == held_out_problems(Countdown(), 50, seed) != held_out_problems(task, 50, seed + 1)
    assert all(is_heldout(p.data["numbers"], p.data["target"]) for p in problems)
    assert len(held_out_problems(Even(), 5, seed)) == 5, "a task without a split gives problems all the same"


def test_what_is_reported_is_what_was_answered(tokenizer, model, tmp_path):
    task, n = Even(), random.randint(5, 30)
    result, shares = evaluate(model, tokenizer, task, n, seed=4, max_tokens=12, dump=tmp_path / "d.jsonl", max_batch=7)
    lines = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    problems = held_out_problems(task, n, 4)
    assert [x["prompt"] for x in lines] == [p.prompt for p in problems] and [x["key"] for x in lines] == [p.key for p in problems]
    rescored = [task.score(Problem(x["prompt"], x["key"], x["data"]), x["completion"]).correct for x in lines]
    assert rescored == [x["correct"] for x in lines] == shares
    assert result.accuracy == sum(rescored) / n and (result.low, result.high) == wilson(sum(rescored), n)
    assert result.truncated == sum(x["finish_reason"] == "length" for x in lines) / n
    assert 0 < result.thinking_length <= result.length <= 12 and 0 <= result.mtp_acceptance <= 1
    assert set(result.record()) == {"n", "accuracy", "low", "high", "thinking_length", "length", "truncated", "samples",
                                    "mtp_acceptance"}
    again, _ = evaluate(model, tokenizer, task, n, seed=4, max_tokens=12, max_batch=7)
    assert again == result


def test_several_samples_a_problem(tokenizer, model, tmp_path):
    result, shares = evaluate(model, tokenizer, Even(), 12, seed=1, max_tokens=6, samples=5, temperature=1.0,
                              dump=tmp_path / "d.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert len(lines) == 60 and len({(x["key"], x["completion"]) for x in lines}) > 30, "samples differ"
    by_problem = [[x["correct"] for x in lines[i : i + 5]] for i in range(0, 60, 5)]
    assert shares == [sum(c) / 5 for c in by_problem]
    assert result.pass_at_k == sum(any(c) for c in by_problem) / 12 >= result.accuracy
    assert (result.pass_low, result.pass_high) == wilson(round(12 * result.pass_at_k), 12)
    assert result.mtp_acceptance is None, "that is a number about greedy answers"


def test_the_majority_s_answer_is_what_is_scored(tokenizer, model, monkeypatch):
    """cons@k against a plain count: of what ended by itself, the commonest text after the thought, the first of equals."""
    n, k = 40, random.randint(2, 7)
    answers = [random.choice(["even", "odd", " even\n", "\\boxed{odd}", "other", ""]) for _ in range(n * k)]
    cut = [random.random() < 0.2 for _ in answers]
    texts = [f"hm{'m' * i}</think>{answer}" for i, answer in enumerate(answers)]

    class Scripted:
        def __init__(self, *args, **options):
            pass

        def generate(self, requests, on_step):
            return [Completion(r.request_id, r.prompt_ids, tokenizer.renderer().completion(text)[: -1 if short else None],
                               finish_reason="length" if short else "stop")
                    for r, text, short in zip(requests, texts, cut, strict=True)]

    monkeypatch.setattr("jevons.reason.evaluate.Engine", Scripted)
    result, shares = evaluate(model, tokenizer, Even(), n, samples=k, temperature=1.0)
    right = 0
    for i in range(0, n * k, k):
        votes = {}
        for j in range(i, i + k):
            final = {"\\boxed{odd}": "odd"}.get(answers[j], answers[j].strip())
            if final and not cut[j]:
                votes.setdefault(final, []).append(j)
        chosen = max(votes.values(), key=len)[0] if votes else i  # max keeps the first of equals
        right += len(texts[chosen]) % 2 == 0
    assert result.cons_at_k == right / n and (result.cons_low, result.cons_high) == wilson(right, n)
    assert shares == [sum(len(text) % 2 == 0 for text in texts[i : i + k]) / k for i in range(0, n * k, k)]


def test_mtp_acceptance_is_a_plain_count(tokenizer, model):
    completions = []
    for _ in range(9):
        prompt, answer = ([random.randrange(288) for _ in range(random.randint(lo, hi))] for lo, hi in ((1, 9), (1, 14)))
        completions.append(Completion("x", prompt, answer))
    right = total = 0
    for c in completions:
        ids = c.prompt_ids + c.token_ids
        out = model.forward_train(torch.tensor(ids), torch.arange(len(ids)), [(1, len(ids))])
        guesses = model.logits(out.mtp_hidden_ND).argmax(-1).tolist()
        for i in range(len(ids) - 2):
            if i + 2 >= len(c.prompt_ids):  # only the model's own tokens are guessed
                right, total = right + (guesses[i] == ids[i + 2]), total + 1
    assert mtp_acceptance(model, completions, tokenizer.pad_id) == right / total
    assert mtp_acceptance(model, [], tokenizer.pad_id) == 0


def test_what_cannot_be_evaluated_is_said(tokenizer, model):
    class Long(Even):
        def sample(self, rng):
            return Problem("sun " * 200, "x")

    with pytest.raises(PromptTooLong):
        evaluate(model, tokenizer, Long(), 2, max_tokens=4)

    asked = []

    def stop():
        asked.append(1)
        if len(asked) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluate(model, tokenizer, Even(), 4, max_tokens=12, on_step=stop)
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        evaluate(model, tokenizer, Even(), 2, max_tokens=4)
