"""A side in a process of its own: `Worker` here asks, `main` there answers. One JSON object a line, errors among them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jevons.bench.workload import (
    LOAD,
    Answer,
    BenchError,
    Job,
    latencies,
    median,
    poisson_arrivals,
    run_all,
    run_timed,
    shorter,
    tune,
)

SIDES = ("jevons", "transformers", "llama.cpp")
TRY = 8  # settings are tried on answers of an eighth
SHORT = 0.5  # seconds that a measure is repeated for, where once takes less


class Worker:
    """The asking end. Raises BenchError for what the other end refuses, or when it died."""

    def __init__(self, side: str, path: Path, weights: str, threads: int):
        environment = dict(os.environ)
        if side != "jevons":
            environment.pop("GOMP_SPINCOUNT", None)  # ours (cli.py); others run as they would by themselves
        self.side, self._said = side, tempfile.TemporaryFile()
        self._process = subprocess.Popen([sys.executable, "-m", "jevons.bench.worker", side, str(path), weights, str(threads)],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
                                         env=environment)
        try:
            self.about: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # it died; the answer says so
            self._process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            last = [text for text in self._said.read().decode("utf-8", "replace").splitlines() if text.strip()][-3:]
            raise BenchError(f"{self.side} ended with code {code}: {' | '.join(last) or 'it said nothing'}")
        answer = json.loads(line)
        if "refused" in answer:
            raise BenchError(answer["refused"])
        return answer

    def close(self) -> None:
        with suppress(BrokenPipeError):  # of one that died before
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()


def pack_jobs(jobs: Sequence[Job]) -> list[Any]:
    return [[job.prompt, job.tokens] for job in jobs]


class Answering:
    """What a side is asked, whichever it is."""

    def __init__(self, side: Any):
        self.side = side
        self._settings: dict[str, dict[str, Any]] = {}

    def prepare(self, what: str, jobs: list[Any]) -> dict[str, Any]:
        """Find this side's best settings for a measure; they are kept, and everything is warm."""
        work = [Job(*job) for job in jobs]
        options = self.side.options(what, work)
        if what == "load" and "offline" in self._settings:  # the same jobs
            self._settings["load"] = {name: self._settings["offline"].get(name, values[0]) for name, values in options.items()}
            return {"settings": self._settings["load"]}
        if any(len(values) > 1 for values in options.values()):
            less = shorter(work, TRY)

            def rate(settings: dict[str, Any]) -> float:
                self.side.run(what, less[: len(less) // 8 or 1], settings)
                return max(f["rate"] for f, _ in self._repeated(what, less, settings, 3))

            best, tried = tune(options, rate)
        else:
            best, tried = {name: values[0] for name, values in options.items()}, []
        self._settings[what] = best
        self.side.run(what, shorter(work, TRY), best)
        return {"settings": best, "tried": tried}

    def measure(self, what: str, jobs: list[Any]) -> dict[str, Any]:
        """The figure; the median of several where one is short."""
        found = self._repeated(what, [Job(*job) for job in jobs], self._settings[what], 20)
        ranked = sorted((f for f, _ in found), key=lambda f: f["rate"])
        return ranked[len(ranked) // 2] | {"tokens": [a.tokens for a in found[-1][1]]}

    def _repeated(self, what: str, jobs: list[Job], settings: dict[str, Any], most: int) -> list[tuple[dict, list[Answer]]]:
        """Figures and answers of a measure run once, or again while all of them took less than SHORT."""
        found, start = [], time.perf_counter()
        while not found or (len(found) < most and time.perf_counter() - start < SHORT):
            answers = self.side.run(what, jobs, settings)
            found.append((figures(what, jobs, answers), answers))
        return found

    def load(self, jobs: list[Any], seconds: float, seed: int) -> dict[str, Any]:
        """Requests at LOAD of the capacity that everything at once has, for about so many seconds; where the side keeps a pace,
        without it too."""
        work, settings = [Job(*job) for job in jobs], self._settings["load"]
        found = self._load(work, settings, seconds, seed)
        return found | ({"without_pace": self._load(work, settings | {"pace": 0.0}, seconds, seed)} if "pace" in settings else {})

    def _load(self, work: list[Job], settings: dict[str, Any], seconds: float, seed: int) -> dict[str, Any]:
        stepper = self.side.stepper(work, settings)
        alone = run_all(stepper, [max(work, key=lambda job: job.tokens)])[0]
        capacity = figures("offline", work, run_all(stepper, work))["requests_per_second"]
        rate = LOAD * capacity
        count = min(4000, max(len(work), int(rate * seconds)))
        many = [work[i % len(work)] for i in range(count)]
        found = latencies(run_timed(stepper, many, poisson_arrivals(rate, count, seed)))
        unloaded = 1e3 * median(alone.intervals())
        return found | {"requests": count, "requests_per_second": rate, "capacity_requests_per_second": capacity,
                        "unloaded_inter_token_ms": unloaded, "p99_over_unloaded": found["inter_token_p99_ms"] / unloaded}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.side, name)  # what only one side is asked for


def figures(what: str, jobs: Sequence[Job], answers: Sequence[Answer]) -> dict[str, float]:
    """The figure of a measure, units in its names, and `rate`, which is more the better it is."""
    start, end = min(a.due for a in answers), max(a.times[-1] for a in answers)
    if what in ("offline", "load"):
        rate = sum(len(a.tokens) for a in answers) / (end - start)
        return {"tokens_per_second": rate, "requests_per_second": len(jobs) / (end - start), "rate": rate}
    if what == "single":
        rate = 1 / median([gap for a in answers for gap in a.intervals()])
        return {"tokens_per_second": rate, "rate": rate}
    if what == "prefill":
        rate = sum(len(job.prompt) for job in jobs) / (end - start)
        return {"prompt_tokens_per_second": rate, "rate": rate}
    first = median([a.first for a in answers])
    return {"first_token_ms": 1e3 * first, "rate": 1 / first}


def open_side(side: str, path: Path, weights: str, threads: int) -> Any:
    if side == "jevons":
        from jevons.bench.ours import Jevons

        return Jevons(path, weights, threads)
    from jevons.bench.sides import LlamaCppSide, Transformers

    return (Transformers if side == "transformers" else LlamaCppSide)(path, weights, threads)


def main() -> None:
    side, path, weights, threads = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    try:
        answering = Answering(open_side(side, Path(path), weights, int(threads)))
        say(answering.describe())
    except (ValueError, OSError) as error:
        say({"refused": str(error)})
        return
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            say(getattr(answering, arguments.pop("do"))(**arguments))
        except ValueError as error:
            say({"refused": str(error)})


if __name__ == "__main__":
    main()
