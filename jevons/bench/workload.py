"""What is asked of every side, and what is read from the answers. No torch here.

A `Stepper` is a program that batches continuously: this engine, or llama.cpp with its slots. Both are driven by the same two
loops, everything at once (`run_all`) and by the clock (`run_timed`), so both pay for the same Python around a step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

OFFLINE = 64  # requests
PROMPT = (32, 256)  # tokens of their prompts and answers, uniform
ANSWER = (16, 256)
LOAD = 0.7  # of the measured capacity


class BenchError(ValueError):
    """A measurement that cannot be asked for; the message names the value and what would be right."""


@dataclass(frozen=True)
class Job:
    """A request of known length: `tokens` are produced, whatever they are."""

    prompt: list[int]
    tokens: int


class Stepper(Protocol):
    def submit(self, key: int, job: Job) -> None: ...

    def step(self) -> list[tuple[int, int]]:
        """One call of the model: (key, token) of every token that it gave; several of one key, where drafts were accepted."""

    @property
    def has_work(self) -> bool: ...


@dataclass
class Answer:
    """Tokens of one job, when each came, and when it was due."""

    due: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first token, waiting included."""
        return self.times[0] - self.due

    def intervals(self) -> list[float]:
        """Seconds between its tokens; tokens that came together share the time since the ones before them."""
        steps = [(at, len(list(together))) for at, together in groupby(self.times)]
        return [(at - before) / count for (before, _), (at, count) in zip(steps, steps[1:], strict=False) for _ in range(count)]


def random_jobs(count: int, vocab: int, context: int, seed: int, prompt: tuple[int, int] = PROMPT,
                answer: tuple[int, int] = ANSWER) -> list[Job]:
    """Jobs of unequal lengths, a function of the arguments; lengths shrink in proportion where `context` is short.
    Ids from 3 on: 0, 1 and 2 begin, end and pad in the models made here."""
    room = min(1.0, context / (prompt[1] + answer[1]))
    rng = random.Random(f"bench {seed}")

    def length(bounds: tuple[int, int]) -> int:
        return max(1, int(rng.randint(*bounds) * room))

    return [Job(random_prompt(length(prompt), vocab, rng.getrandbits(32)), length(answer)) for _ in range(count)]


def random_prompt(tokens: int, vocab: int, seed: int) -> list[int]:
    rng = random.Random(f"prompt {seed}")
    return [rng.randrange(min(3, vocab - 1), vocab) for _ in range(tokens)]


def shorter(jobs: Sequence[Job], times: int) -> list[Job]:
    """The same jobs with answers a fraction as long, for trying settings out."""
    return [Job(job.prompt, max(2, job.tokens // times)) for job in jobs]


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which `count` requests arrive, `rate` of them a second on average, independent of each other."""
    if not rate > 0:
        raise BenchError(f"an arrival rate of {rate} requests per second cannot be; it must be positive")
    rng, at, out = random.Random(f"arrivals {seed}"), 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        out.append(at)
    return out


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest of the sorted values; `share` 0.5 is the median."""
    if not values:
        raise BenchError("no values to take a percentile of")
    ranked = sorted(values)
    at = share * (len(ranked) - 1)
    low = min(int(at), len(ranked) - 2) if len(ranked) > 1 else 0
    return ranked[low] + (ranked[min(low + 1, len(ranked) - 1)] - ranked[low]) * (at - low)


def median(values: Sequence[float]) -> float:
    return percentile(values, 0.5)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Repetitions of one figure: median, and the spread they had."""
    return {"median": median(values), "min": min(values), "max": max(values), "values": list(values)}


def run_all(stepper: Stepper, jobs: Sequence[Job], clock: Callable[[], float] = time.perf_counter) -> list[Answer]:
    """Every job at once, until all have their tokens."""
    start = clock()
    answers = [Answer(start) for _ in jobs]
    for key, job in enumerate(jobs):
        stepper.submit(key, job)
    while stepper.has_work:
        _take(stepper, answers, clock)
    return _whole(answers, jobs)


def run_timed(stepper: Stepper, jobs: Sequence[Job], arrivals: Sequence[float], clock: Callable[[], float] = time.perf_counter,
              sleep: Callable[[float], None] = time.sleep) -> list[Answer]:
    """Each job when it arrives. One is due at its arrival, even where a step was running then."""
    start = clock()
    answers = [Answer(start + at) for at in arrivals]
    waiting = 0
    while waiting < len(jobs) or stepper.has_work:
        now = clock()
        while waiting < len(jobs) and answers[waiting].due <= now:
            stepper.submit(waiting, jobs[waiting])
            waiting += 1
        if stepper.has_work:
            _take(stepper, answers, clock)
        elif waiting < len(jobs):
            sleep(max(0.0, answers[waiting].due - clock()))
    return _whole(answers, jobs)


def _take(stepper: Stepper, answers: list[Answer], clock: Callable[[], float]) -> None:
    given = stepper.step()
    now = clock()
    for key, token in given:
        answers[key].tokens.append(token)
        answers[key].times.append(now)


def _whole(answers: list[Answer], jobs: Sequence[Job]) -> list[Answer]:
    for key, (answer, job) in enumerate(zip(answers, jobs, strict=True)):
        if len(answer.tokens) != job.tokens:  # then rates of two sides could not be compared
            raise BenchError(f"request {key} has {len(answer.tokens)} tokens, not the {job.tokens} that were asked for")
    return answers


def latencies(answers: Sequence[Answer]) -> dict[str, float]:
    """In milliseconds."""
    gaps = [1e3 * gap for answer in answers for gap in answer.intervals()]
    first = [1e3 * answer.first for answer in answers]
    return {"inter_token_p50_ms": median(gaps), "inter_token_p99_ms": percentile(gaps, 0.99),
            "first_token_p50_ms": median(first), "first_token_p99_ms": percentile(first, 0.99)}


def tune(options: dict[str, Sequence[Any]], rate: Callable[[dict[str, Any]], float],
         ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The best settings found by changing one option after the other, and every one tried with its `rate` (more is better).

    The first value of each option is where it starts; an option keeps its best value while the next one is tried."""
    best = {name: values[0] for name, values in options.items()}
    tried = [best | {"rate": rate(dict(best))}]
    top = tried[0]["rate"]
    for name, values in options.items():
        for value in values[1:]:
            settings = best | {name: value}
            tried.append(settings | {"rate": rate(dict(settings))})
        found = max(tried, key=lambda t: t["rate"])
        if found["rate"] > top:
            top, best = found["rate"], {k: v for k, v in found.items() if k != "rate"}
    return best, tried
