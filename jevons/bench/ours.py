"""This engine as one of the sides, and what only it is asked for: the gain of its prefix cache and of its speculation, and what
determinism costs."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch

from jevons import __version__
from jevons.bench.sides import BATCHED
from jevons.bench.workload import Answer, BenchError, Job, Stepper, median, random_prompt, run_all, shorter
from jevons.engine.drafts import Drafts
from jevons.engine.engine import Engine
from jevons.engine.rows import Rows
from jevons.engine.scheduler import Sequence
from jevons.engine.speculation import Speculation
from jevons.engine.types import Request, SamplingParams
from jevons.model import KVCache
from jevons.model.pack import pack
from jevons.numerics.kernels import read_rate
from jevons.plan import kv_bytes_per_token
from jevons.runtime import Runtime
from jevons.store.checkpoint import load_checkpoint

NEVER = -1  # an eos that no model produces: answers have the length that was asked for
SLOTS = 64
PACE = 2.4  # lone steps that one of `load` may take: under 3 by what two measurements of the lone one differ
PREFIX_REQUESTS, PREFIX_SHARE = 32, 0.9


class EngineStepper:
    def __init__(self, engine: Engine):
        self.engine = engine

    @property
    def has_work(self) -> bool:
        return self.engine.has_work

    def submit(self, key: int, job: Job) -> None:
        self.engine.submit(Request(job.prompt, SamplingParams(job.tokens, temperature=0.0), str(key)))

    def step(self) -> list[tuple[int, int]]:
        out = []
        for event in self.engine.step():
            if event.error:
                raise BenchError(event.error)
            if event.token_id is not None:
                out.append((int(event.request_id), event.token_id))
        return out


class Jevons:
    def __init__(self, checkpoint: Path, weights: str, threads: int):
        torch.set_num_threads(threads)
        self.checkpoint, self.weights, self.threads = checkpoint, weights, threads
        packed = weights != "float32"
        loaded = load_checkpoint(checkpoint, need_tokenizer=False, frozen=packed)
        self.model, self.tokenizer, self.provenance = loaded.model, loaded.tokenizer, loaded.provenance
        if packed:  # as `jevons serve --weights` does
            pack(self.model, weights, Runtime.detect("cpu").dtype)
        self._engine: tuple[Any, Engine | None] = (None, None)

    def describe(self) -> dict[str, Any]:
        engine = self.engine([Job([1], 1)], 1)
        cells = engine.cache.data.shape[1] * engine.cache.page_size
        return {"version": __version__, "torch": torch.__version__, "weights": self.weights, "threads": self.threads,
                "cache_bytes_per_token": engine.cache.nbytes / cells,
                "planned_cache_bytes_per_token": kv_bytes_per_token(self.model.config, engine.cache.data.itemsize)}

    def options(self, what: str, jobs: Seq[Job]) -> dict[str, list[Any]]:
        """Its own defaults, but whether drafts pay for a whole batch."""
        if what == "load":
            return {"pace": [PACE]}
        return {"speculate": [0, None]} if what == "offline" and self.model.mtp else {}

    def engine(self, jobs: Seq[Job], batch: int, eos: int = NEVER, **features: Any) -> Engine:
        """One that holds these jobs; the one before is given up. Without a prefix cache: repetitions would find it full."""
        longest = max(len(job.prompt) + job.tokens for job in jobs)
        wanted = dict(max_batch=batch, max_len=longest + 1, max_waiting=10**6) | features
        if self._engine[0] != (eos, wanted):
            if self._engine[1] is not None:
                self._engine[1].close()
            self._engine = (None, None)  # its cache's memory first
            self._engine = ((eos, wanted), Engine(self.model, eos, **wanted))
        return self._engine[1]

    def stepper(self, jobs: Seq[Job], settings: dict[str, Any], what: str = "load") -> Stepper:
        features = dict(speculate=None) | settings if what == "load" else settings  # under load as the server runs it
        return EngineStepper(self.engine(jobs, SLOTS if what in BATCHED else 1, **features))

    def run(self, what: str, jobs: Seq[Job], settings: dict[str, Any]) -> list[Answer]:
        return run_all(self.stepper(jobs, settings, what), jobs)

    def machine(self) -> dict[str, Any]:
        rate, threads = read_rate()
        return {"read_gb_per_second": rate / 1e9, "read_threads": threads}

    # -- the prefix cache ---------------------------------------------------------------------------------------------

    def prefix(self, tokens: int, seed: int) -> dict[str, Any]:
        """Requests that share nine tenths of their prompt, one after the other, after one that computed it; with and without the
        cache: median milliseconds to the first token."""
        vocab, shared = self.model.config.vocab_size, int(tokens * PREFIX_SHARE)
        common = random_prompt(shared, vocab, seed)
        jobs = [Job(common + random_prompt(tokens - shared, vocab, seed + 1 + i), 1) for i in range(PREFIX_REQUESTS + 1)]
        found: dict[str, Any] = {"prompt_tokens": tokens, "shared_tokens": shared, "requests": PREFIX_REQUESTS}
        outputs = []
        for name, on in (("with_cache", True), ("without_cache", False)):
            engine = self.engine(jobs, 2, prefix_cache=on)  # two: room for the cached pages beside the running one's
            stepper = EngineStepper(engine)
            answers = [run_all(stepper, [job])[0] for job in jobs][1:]
            found[f"first_token_{name}_ms"] = 1e3 * median([a.first for a in answers])
            outputs.append([a.tokens for a in answers])
            if on:
                found["cached_share"] = engine.stats()["cached_tokens"] / (PREFIX_REQUESTS * tokens)
        return found | {"gain": found["first_token_without_cache_ms"] / found["first_token_with_cache_ms"],
                        "same_first_tokens": sum(a == b for a, b in zip(*outputs, strict=True))}

    # -- the same text in any company ---------------------------------------------------------------------------------

    def deterministic(self, jobs: list[Any]) -> dict[str, Any]:
        """What `--deterministic` costs: tokens per second of the same requests at once with and without, and how many of them
        have the same text when each is alone."""
        work = [Job(*job) for job in jobs]
        found: dict[str, Any] = {"requests": len(work)}
        for name, on in (("ordinary", False), ("deterministic", True)):
            stepper = EngineStepper(self.engine(work, SLOTS, deterministic=on))
            run_all(stepper, shorter(work, 8))  # warm
            together = run_all(stepper, work)
            alone = [run_all(stepper, [job])[0] for job in work]
            seconds = max(a.times[-1] for a in together) - together[0].due
            found[f"{name}_tokens_per_second"] = sum(job.tokens for job in work) / seconds
            found[f"{name}_same_alone"] = sum(a.tokens == b.tokens for a, b in zip(together, alone, strict=True))
        return found | {"cost": found["ordinary_tokens_per_second"] / found["deterministic_tokens_per_second"]}

    # -- speculation --------------------------------------------------------------------------------------------------

    def speculation(self, prompts: int, tokens: int, drafts: int, seed: int) -> dict[str, Any]:
        """Greedy, one request at a time, each decoded plainly, with `drafts` a pass, and as the engine chooses by itself."""
        if not self.model.mtp:
            raise BenchError("the model has no MTP module")
        jobs, eos, source = self._questions(prompts, tokens, seed)
        ways, engines = {"plain": 0, "drafted": drafts, "automatic": None}, {}
        for name, speculate in ways.items():
            self._engine = (None, None)
            engines[name] = self.engine(jobs, 1, eos, speculate=speculate)
        seconds, passes = ({name: 0.0 for name in ways} for _ in range(2))
        outputs: dict[str, list[list[int]]] = {name: [] for name in ways}
        for engine in engines.values():  # warm
            _decode(engine, jobs[0])
        before = {name: dict(engine.stats()) for name, engine in engines.items()}
        for job in jobs:
            for name, engine in engines.items():
                ids, spent, steps = _decode(engine, job)
                outputs[name].append(ids)
                seconds[name] += spent
                passes[name] += steps
        gained = {name: {k: v - before[name].get(k, 0) for k, v in engine.stats().items()} for name, engine in engines.items()}
        decoded = sum(len(ids) - 1 for ids in outputs["plain"])
        per_pass = sum(len(ids) - 1 for ids in outputs["drafted"]) / passes["drafted"]
        cost = self.pass_cost(drafts, int(median([len(j.prompt) for j in jobs]) + tokens / 4))
        speedup = seconds["plain"] / seconds["drafted"]
        return {"prompts": len(jobs), "of": source, "drafts_per_pass": drafts,
                "plain_tokens_per_second": decoded / seconds["plain"],
                "tokens_per_second": decoded / seconds["drafted"], "speedup": speedup,
                "automatic_speedup": seconds["plain"] / seconds["automatic"], "tokens_per_pass": per_pass,
                "acceptance": gained["drafted"]["accepted_tokens"] / max(1, gained["drafted"]["drafted_tokens"]),
                "relative_cost_of_a_pass": cost, "ideal_speedup": per_pass / cost, "share_of_ideal": speedup * cost / per_pass,
                "identical_outputs": sum(a == b == c for a, b, c in zip(*outputs.values(), strict=True))}

    def _questions(self, count: int, tokens: int, seed: int) -> tuple[list[Job], int, str]:
        """(jobs, eos, what they are): held-out problems of the task that the checkpoint was trained on, or random ids."""
        task = self.provenance.get("task")
        if not task or self.tokenizer is None:
            vocab = self.model.config.vocab_size
            return [Job(random_prompt(32, vocab, seed + i), tokens) for i in range(count)], NEVER, "random ids"
        from jevons.tasks.registry import load_task

        the_task, rng = load_task(task["name"], task["args"]), random.Random(f"speculation {seed}")
        draw, render = getattr(the_task, "sample_heldout", the_task.sample), self.tokenizer.renderer()
        return ([Job(render.question(draw(rng).prompt), tokens) for _ in range(count)], self.tokenizer.eos_id,
                f"problems of {json.dumps(task)}")

    @torch.inference_mode()
    def pass_cost(self, drafts: int, context: int, rounds: int = 100) -> float:
        """What verifying `drafts` tokens and drafting as many anew costs over a plain pass, by the calls an engine makes for
        them: what it spends around these is not in it, so a perfect engine reaches tokens per pass / this."""
        model, page, most = self.model, 32, self.model.config.max_position_embeddings
        if context + 2 * drafts > most:
            raise BenchError(f"{context} tokens and {drafts} drafts are over the context of {most}")
        pages = -(-(context + 2 * drafts + 2) // page)
        trunk = KVCache(model.config, pages, page)
        ids = torch.randint(3, model.config.vocab_size, (context + 1,)).tolist()
        sequence = Sequence(Request(ids[:1]), 2 * most, 0, ids, pages=list(range(pages)), row=0)
        rows = Rows(1, pages, torch.device("cpu"))
        rows.set(sequence)
        rows.temperature.zero_()
        module = Drafts(model, rows, Speculation(drafts), KVCache(model.config, pages, page, layers=len(model.mtp)))
        module.admit(sequence)
        rows.step(model, trunk, 0, ids[:context], [context], [0])
        for _ in range(drafts):  # what the model says itself, so that all of it is accepted
            *_, said, _ = rows.step(model, trunk, 0, ids[-1:], [1], [len(ids) - 1])
            ids += said
        given = ids[context:]

        def plain() -> float:
            begin = time.perf_counter()
            rows.step(model, trunk, 0, given[:1], [1], [context])
            return time.perf_counter() - begin

        def drafted() -> float:
            del ids[context + 1 :]
            begin = time.perf_counter()
            hidden, _, said, *_ = module.verify([sequence], [given], [context], trunk)
            ids.extend(said)
            module.make(hidden, [(sequence, context, len(given), drafts)], 1)
            return time.perf_counter() - begin

        threads, alone = torch.get_num_threads(), getattr(self._engine[1], "_alone", False)
        if alone:
            torch.set_num_threads(1)
        try:
            times = [(plain(), drafted()) for _ in range(rounds)][rounds // 4 :]
        finally:
            torch.set_num_threads(threads)
        return median([b for _, b in times]) / median([a for a, _ in times])


def _decode(engine: Engine, job: Job) -> tuple[list[int], float, int]:
    """(tokens, seconds, passes) of one request; seconds and passes are those after the first token came."""
    engine.submit(Request(job.prompt, SamplingParams(job.tokens, temperature=0.0)))
    ids: list[int] = []
    begin, passes = 0.0, 0
    while engine.has_work:
        passes += bool(ids)
        ids += [e.token_id for e in engine.step() if e.token_id is not None]
        begin = begin or (time.perf_counter() if ids else 0.0)
    return ids, time.perf_counter() - begin, passes
