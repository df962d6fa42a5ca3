"""One run: the sides one after the other, in turns, and one record of what came of it."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jevons.bench.models import BUILT_IN, WEIGHTS, find_gguf, find_model, weight_bytes
from jevons.bench.sides import installed
from jevons.bench.worker import SIDES, Worker, pack_jobs
from jevons.bench.workload import ANSWER, OFFLINE, PROMPT, BenchError, Job, random_jobs, random_prompt, summary
from jevons.config import ModelConfig
from jevons.plan import count_parameters
from jevons.runtime import Runtime

COMPARED = ("offline", "single", "prefill", "ttft")  # measures that every side repeats in turns
MEASURES = (*COMPARED, "load", "prefix", "speculation", "deterministic")
PEERS = SIDES[1:]
FIGURE = {"offline": "tokens_per_second", "single": "tokens_per_second", "prefill": "prompt_tokens_per_second",
          "ttft": "first_token_ms"}
SINGLE_PROMPT, FIRST_PROMPT = 32, 128  # tokens of the prompts of single and ttft
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    model: str = "small"
    what: tuple[str, ...] = MEASURES
    peers: str = "auto"
    weights: str = "bf16"
    threads: int | None = None  # None: this machine's cores
    repeat: int = 3
    requests: int = OFFLINE
    prompt_tokens: int | None = None  # of prefill and prefix; None: 2,000, or what the context holds
    single_tokens: int = 128
    load_seconds: float = 20.0
    prompts: int = 200  # of speculation
    drafts: int = 1
    directory: Path | None = None  # where built-in models and GGUF files are kept; None: nowhere
    seed: int = 0


def check(options: Options) -> None:
    """Raises BenchError naming what cannot be asked for."""
    for name in options.what:
        if name not in MEASURES:
            raise BenchError(f"--what {name} is not a measure; {', '.join(MEASURES)} are")
    if not options.what:
        raise BenchError(f"--what names no measure; {', '.join(MEASURES)} are there")
    if options.weights not in WEIGHTS:
        raise BenchError(f"--weights {options.weights} is not a kind of weights; {', '.join(WEIGHTS)} are")
    peers_of(options.peers)
    for name in ("repeat", "requests", "single_tokens", "prompts", "drafts"):
        if getattr(options, name) < 1:
            raise BenchError(f"{name} is {getattr(options, name)}; it must be at least 1")
    if options.threads is not None and options.threads < 1:
        raise BenchError(f"--threads {options.threads}: at least 1 would be right")


def peers_of(text: str) -> tuple[str, ...]:
    """The peers that `--peers` names. Raises BenchError for one that is unknown."""
    if text in ("auto", "none"):
        return PEERS if text == "auto" else ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in PEERS:
            raise BenchError(f"--peers {name} is not a peer; auto, none, {', '.join(PEERS)} are")
    return names


def jobs_of(what: str, config: ModelConfig, options: Options) -> list[Job]:
    """What a compared measure asks for. Raises BenchError for a length over the context."""
    vocab, context = config.vocab_size, config.max_position_embeddings
    if what in ("offline", "load", "deterministic"):
        return random_jobs(options.requests, vocab, context - 1, options.seed)
    if what == "single":
        return [Job(random_prompt(min(SINGLE_PROMPT, context // 4), vocab, options.seed),
                    fit(options.single_tokens, context - SINGLE_PROMPT - 1, "--tokens", context))]
    length = prompt_tokens(config, options) if what == "prefill" else min(FIRST_PROMPT, context // 2)
    return [Job(random_prompt(length, vocab, options.seed), 1)]


def prompt_tokens(config: ModelConfig, options: Options) -> int:
    room = config.max_position_embeddings - 2
    if options.prompt_tokens is None:
        return min(2000, room)
    return fit(options.prompt_tokens, room, "--prompt-tokens", config.max_position_embeddings)


def fit(tokens: int, room: int, name: str, context: int) -> int:
    if not 2 <= tokens <= room:
        raise BenchError(f"{name} {tokens} does not fit the model's context of {context}; 2 to {room} would")
    return tokens


def run(options: Options, say: Say = lambda line: None) -> dict[str, Any]:
    """The record of a run, units in its names. Raises BenchError, ConfigError, CheckpointError."""
    check(options)
    absent: dict[str, str] = {}
    peers = []
    for peer in peers_of(options.peers):
        try:
            installed(peer)
            peers.append(peer)
        except BenchError as error:
            if options.peers != "auto":
                raise
            absent[peer] = str(error)
    runtime = Runtime.detect("cpu")
    threads = options.threads or runtime.threads
    with contextlib.ExitStack() as stack:
        directory = options.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        checkpoint, config = find_model(options.model, directory, say)
        for what in options.what:  # a length that does not fit is said before anything is loaded
            prompt_tokens(config, options) if what == "prefix" else jobs_of(what, config, options)
        workers = dict(_open(options, peers, checkpoint, threads, directory, absent, stack, say))
        measures = {what: _measure(what, workers, config, options, say) for what in options.what}
        sides = {name: worker.about for name, worker in workers.items()} | {n: {"absent": why} for n, why in absent.items()}
        machine = {"cpu": runtime.cpu, "cores": runtime.threads, "memory_gib": runtime.memory_gib, "threads": threads}
        if "single" in measures:
            machine |= workers["jevons"].ask("machine")
            _bandwidth(measures["single"], weight_bytes(config, options.weights), machine["read_gb_per_second"])
    total = count_parameters(config)
    model = {"name": options.model, "random": options.model in BUILT_IN, "architecture": config.architecture,
             "parameters": total.total, "active_parameters": total.active, "context_tokens": config.max_position_embeddings,
             "weights": options.weights}
    return {"machine": machine, "model": model, "sides": sides, "seed": options.seed, "measures": measures}


def _open(options: Options, peers: Sequence[str], checkpoint: Path, threads: int, directory: Path, absent: dict[str, str],
          stack: contextlib.ExitStack, say: Say) -> Iterator[tuple[str, Worker]]:
    """The sides that open, ours first; why another does not is put into `absent`."""
    for side in ("jevons", *peers):
        say(f"{side}: loading")
        try:
            path, notes = checkpoint, []
            if side == "llama.cpp":
                path, notes = find_gguf(checkpoint, options.weights, directory, say)
            worker = stack.enter_context(contextlib.closing(Worker(side, path, options.weights, threads)))
            worker.about |= {"notes": notes} if notes else {}
            yield side, worker
        except ValueError as error:
            if side == "jevons":
                raise
            absent[side] = " ".join(str(error).split())


def _measure(what: str, workers: dict[str, Worker], config: ModelConfig, options: Options, say: Say) -> dict[str, Any]:
    if what in COMPARED:
        return _compare(what, workers, jobs_of(what, config, options), options, say)
    if what == "load":
        jobs = pack_jobs(jobs_of(what, config, options))

        def under_load(worker: Worker) -> dict[str, Any]:
            prepared = worker.ask("prepare", what="load", jobs=jobs)
            return {"settings": prepared["settings"]} | worker.ask("load", jobs=jobs, seconds=options.load_seconds,
                                                                   seed=options.seed)

        return {"sides": {name: _ask(worker, what, say, under_load) for name, worker in workers.items()}}
    if what == "prefix":
        ask = lambda worker: worker.ask("prefix", tokens=prompt_tokens(config, options), seed=options.seed)
    elif what == "deterministic":
        ask = lambda worker: worker.ask(what, jobs=pack_jobs(jobs_of(what, config, options)))
    else:
        room = config.max_position_embeddings // 2
        ask = lambda worker: worker.ask("speculation", prompts=options.prompts, tokens=min(224, room), drafts=options.drafts,
                                        seed=options.seed)
    return {"sides": {"jevons": _ask(workers["jevons"], what, say, ask)}}


def _ask(worker: Worker, what: str, say: Say, ask: Callable[[Worker], dict[str, Any]]) -> dict[str, Any]:
    """What a side answers, or why it does not."""
    say(f"{what}: {worker.side}")
    try:
        return ask(worker)
    except BenchError as error:
        return {"not_available": str(error)}


def _compare(what: str, workers: dict[str, Worker], jobs: list[Job], options: Options, say: Say) -> dict[str, Any]:
    """Each side finds its best settings; then all repeat the measure in turns."""
    packed, figure = pack_jobs(jobs), FIGURE[what]
    sides: dict[str, dict[str, Any]] = {}
    for name, worker in workers.items():
        sides[name] = _ask(worker, f"{what}, finding settings", say, lambda w: w.ask("prepare", what=what, jobs=packed))
    values: dict[str, list[float]] = {name: [] for name, side in sides.items() if "not_available" not in side}
    tokens: dict[str, list[list[int]]] = {}
    for turn in range(options.repeat):
        for name in list(values):
            found = _ask(workers[name], f"{what} {turn + 1}/{options.repeat}", say,
                         lambda w: w.ask("measure", what=what, jobs=packed))
            if "not_available" in found:
                sides[name] = found
                del values[name]
                continue
            values[name].append(found[figure])
            tokens[name] = found["tokens"]
    for name, repeated in values.items():
        sides[name] |= {figure: summary(repeated)}
        if name != "jevons" and "jevons" in values:
            ours, theirs = (statistics.median(values[n]) for n in ("jevons", name))
            sides[name]["jevons_is_times_better"] = theirs / ours if figure.endswith("_ms") else ours / theirs
            # a sign that both compute the same network
            sides[name]["same_first_token_share"] = statistics.mean(
                a[0] == b[0] for a, b in zip(tokens["jevons"], tokens[name], strict=True))
    work = {"requests": len(jobs), "prompt_tokens": sum(len(j.prompt) for j in jobs),
            "answer_tokens": sum(j.tokens for j in jobs)}
    if what == "offline":
        work |= {"prompt_range": PROMPT, "answer_range": ANSWER}
    return {"figure": figure, "work": work, "repeat": options.repeat, "sides": sides}


def _bandwidth(single: dict[str, Any], nbytes: float, read_rate: float) -> None:
    """What a single stream's decode reads of the weights, against what this machine reads at most."""
    single["weight_bytes_per_token"] = nbytes
    ours = single["sides"]["jevons"]
    if "tokens_per_second" in ours:
        ours["weights_gb_per_second"] = ours["tokens_per_second"]["median"] * nbytes / 1e9
        ours["share_of_read_rate"] = ours["weights_gb_per_second"] / read_rate
