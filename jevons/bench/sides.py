"""The programs that are compared. Each lives in a process of its own (worker.py) and answers `run(what, jobs, settings)`.

A side says which settings it can be run with (`options`: the worker tries them and keeps the best) and may refuse a measure with
BenchError, which the table shows.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jevons.bench.workload import Answer, BenchError, Job, Stepper, run_all
from jevons.runtime import Runtime

BATCHED = ("offline", "load")  # measures of many requests at once; the others are of one


def counts(threads: int) -> list[int]:
    """Thread counts that a side tries, the likelier best one first."""
    return [threads, 1] if threads > 1 else [1]


def sizes(jobs: int) -> list[int]:
    """Batch sizes that a side tries, the likelier best one first."""
    return [n for n in (32, 64, 16, 8) if n <= jobs] or [jobs]


def copied_bytes(config: Any, what: str, jobs: Sequence[Job]) -> float:
    """What `batched_mm` takes for the prompts of a call: a copy, in float32, of the chosen experts for every token."""
    longest = max(len(job.prompt) for job in jobs)
    tokens = longest * (max(sizes(len(jobs))) if what in BATCHED else 1)
    return tokens * config.num_experts_per_tok * 3 * config.hidden_size * config.moe_intermediate_size * 4


class Transformers:
    """`generate` on batches padded to the left; a batch lasts until its longest answer is done, as it does there."""

    def __init__(self, checkpoint: Path, weights: str, threads: int):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.torch, self.transformers, self.checkpoint, self.threads = torch, transformers, checkpoint, threads
        self._models: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        return {"version": self.transformers.__version__}

    def options(self, what: str, jobs: Sequence[Job]) -> dict[str, list[Any]]:
        if what == "load":
            raise BenchError("generate takes no request while it runs")
        found: dict[str, list[Any]] = {"dtype": ["bfloat16", "float32"], "threads": counts(self.threads)}
        config = self.transformers.AutoConfig.from_pretrained(self.checkpoint)
        if getattr(config, "n_routed_experts", None):
            found["experts"] = ["grouped_mm", "batched_mm", "eager"]
            if copied_bytes(config, what, jobs) > Runtime.detect("cpu").memory_gib * 2**30 / 4:
                found["experts"].remove("batched_mm")
        if what in BATCHED:
            found["batch"] = sizes(len(jobs))
        return found

    def stepper(self, jobs: Sequence[Job], settings: dict[str, Any]) -> Stepper:
        raise BenchError("generate takes no request while it runs")

    def _model(self, dtype: str) -> Any:
        if dtype not in self._models:
            if any(m.num_parameters() > 5e8 for m in self._models.values()):
                self._models.clear()  # of a large one only one at a time
            self._models[dtype] = self.transformers.AutoModelForCausalLM.from_pretrained(
                self.checkpoint, dtype=getattr(self.torch, dtype)).eval()
            # ids for padding only: nothing ends an answer before its length
            self._models[dtype].generation_config.update(eos_token_id=None, pad_token_id=0)
        return self._models[dtype]

    def run(self, what: str, jobs: Sequence[Job], settings: dict[str, Any]) -> list[Answer]:
        model, torch = self._model(settings["dtype"]), self.torch
        torch.set_num_threads(settings["threads"])
        if "experts" in settings:
            model.set_experts_implementation(settings["experts"])
        start = time.perf_counter()
        answers = [Answer(start) for _ in jobs]
        # what a program can know before: prompts of like length share a batch
        order = sorted(range(len(jobs)), key=lambda i: len(jobs[i].prompt))
        size = settings.get("batch", 1)
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            longest = max(len(jobs[i].prompt) for i in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, longest - len(jobs[i].prompt) :] = torch.tensor(jobs[i].prompt)
                mask[row, longest - len(jobs[i].prompt) :] = 1
            most, clock = max(jobs[i].tokens for i in batch), _Clock()
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False,
                                 streamer=clock)
            for row, i in enumerate(batch):
                answers[i].tokens = out[row, longest : longest + jobs[i].tokens].tolist()
                answers[i].times = clock.times[: jobs[i].tokens]
        return answers


class _Clock:
    """A streamer that keeps when tokens came; the first thing that `generate` hands out is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: Any) -> None:
        if not self._prompt:
            self.times.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        pass


class LlamaCppSide:
    def __init__(self, gguf: Path, weights: str, threads: int):
        from jevons.bench.llama_cpp import LlamaCpp, find_library

        library, self.version = find_library()
        self.gguf, self.threads, self._opened = gguf, threads, None
        self.llama = LlamaCpp(library, gguf)

    def describe(self) -> dict[str, Any]:
        return {"version": self.version, "file": self.gguf.name}

    def options(self, what: str, jobs: Sequence[Job]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"threads": counts(self.threads)}
        if what in BATCHED:
            found["slots"] = sizes(len(jobs))
        if what == "prefill":
            found["ubatch"] = [512, 2048, 1024, 256]
        return found

    def stepper(self, jobs: Sequence[Job], settings: dict[str, Any]) -> Stepper:
        from jevons.bench.llama_cpp import UBATCH, Slots

        slots = settings.get("slots", 1)
        wanted = (max(len(j.prompt) + j.tokens for j in jobs), slots, settings["threads"], settings.get("ubatch", UBATCH))
        if wanted != self._opened:
            self.llama.open(*wanted)
            self._opened = wanted
        return Slots(self.llama, slots)

    def run(self, what: str, jobs: Sequence[Job], settings: dict[str, Any]) -> list[Answer]:
        return run_all(self.stepper(jobs, settings), jobs)


def installed(peer: str) -> str:
    """The version of a peer that is here. Raises BenchError saying how it would come."""
    if peer == "transformers":
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version("transformers")
        raise BenchError("transformers is not here: `pip install transformers`")
    from jevons.bench.llama_cpp import find_library

    return find_library()[1]
