"""`jevons bench`: the workload's arithmetic, the driving loops by a clock of their own, and real sides on tiny networks."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import lively, llama, nano, plain_logits, qwen2

from jevons.bench import models
from jevons.bench.models import BUILT_IN, find_gguf, find_model, weight_bytes
from jevons.bench.run import FIGURE, MEASURES, Options, check, jobs_of, run
from jevons.bench.sides import Transformers, copied_bytes
from jevons.bench.worker import Answering, Worker, figures, pack_jobs
from jevons.bench.workload import (
    Answer,
    BenchError,
    Job,
    latencies,
    percentile,
    poisson_arrivals,
    random_jobs,
    run_all,
    run_timed,
    summary,
    tune,
)
from jevons.data.tokenizer import train_tokenizer
from jevons.model.pack import pack
from jevons.numerics import IntWeight
from jevons.plan import count_parameters
from jevons.runtime import Runtime
from jevons.store.checkpoint import save_checkpoint
from jevons.terminal.bench import sections

TOKENIZER = train_tokenizer(["3 7 19 -> 40, so the answer is 3*7+19\n"] * 5, 288)
QUICK = Options(peers="none", repeat=2, requests=5, single_tokens=9, load_seconds=0.2, prompts=3, threads=1)


# -- arithmetic -------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 1))
def test_percentiles_are_numpys(values, share):
    assert percentile(values, share) == pytest.approx(float(np.percentile(values, 100 * share)), rel=1e-9, abs=1e-6)


def test_no_values_have_no_percentile():
    with pytest.raises(BenchError, match="no values"):
        percentile([], 0.5)


@given(st.integers(0, 10**6), st.floats(0.01, 1e4))
@settings(max_examples=25)
def test_arrivals_are_poisson(seed, rate):
    """Gaps are exponential: mean and deviation 1 / rate, and the share under the mean is 1 - 1/e."""
    arrivals = poisson_arrivals(rate, 4000, seed)
    gaps = np.diff([0.0, *arrivals]) * rate
    assert (gaps > 0).all() and arrivals == poisson_arrivals(rate, 4000, seed)
    assert gaps.mean() == pytest.approx(1, abs=0.1) and gaps.std() == pytest.approx(1, abs=0.2)
    assert (gaps < 1).mean() == pytest.approx(1 - np.exp(-1), abs=0.05)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.1


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_cannot_be(rate):
    with pytest.raises(BenchError, match="must be positive"):
        poisson_arrivals(rate, 3, 0)


@given(st.integers(1, 80), st.integers(4, 5000), st.integers(2, 5000), st.integers(0, 99))
def test_jobs_fit_the_context(count, vocab, context, seed):
    jobs = random_jobs(count, vocab, context, seed)
    assert len(jobs) == count and jobs == random_jobs(count, vocab, context, seed)
    assert all(1 <= len(j.prompt) and 1 <= j.tokens and len(j.prompt) + j.tokens <= context for j in jobs)
    assert all(3 <= i < vocab for j in jobs for i in j.prompt)


@given(st.lists(st.tuples(st.floats(0.01, 5), st.integers(1, 4)), min_size=1, max_size=20))
def test_intervals_add_up(steps):
    """However many tokens came together: one interval a token after the first step, their sum the time between the steps."""
    times, now = [], 0.0
    for gap, count in steps:
        now += gap
        times += [now] * count
    gaps = Answer(0.0, [0] * len(times), times).intervals()
    assert len(gaps) == len(times) - steps[0][1]
    assert sum(gaps) == pytest.approx(times[-1] - times[0])


@given(st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), max_size=3),
       st.randoms())
def test_tuning_finds_the_best_of_what_it_tried(options, rng):
    goodness = {name: {v: rng.randrange(10**6) for v in values} for name, values in options.items()}
    rate = lambda s: sum(goodness[name][v] for name, v in s.items())
    best, tried = tune(options, rate)
    # the options do not depend on each other here, so one after the other finds the best of all
    assert best == {name: max(values, key=goodness[name].get) for name, values in options.items()}
    assert len(tried) == 1 + sum(len(values) - 1 for values in options.values())


def test_summary():
    values = [random.random() for _ in range(7)]
    assert summary(values) == {"median": sorted(values)[3], "min": min(values), "max": max(values), "values": values}


# -- the driving loops ------------------------------------------------------------------------------------------------


class Pretend:
    """A program with slots whose every step takes a second of a clock that only it and sleeping move."""

    def __init__(self, slots, burst=1):
        self.now, self.slots, self.burst, self.queue, self.running = 0.0, slots, burst, [], {}
        self.submitted, self.slept = {}, 0.0

    def clock(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0 and not self.has_work
        self.now += seconds
        self.slept += seconds

    @property
    def has_work(self):
        return bool(self.queue or self.running)

    def submit(self, key, job):
        assert key not in self.submitted
        self.submitted[key] = self.now
        self.queue.append((key, job.tokens))

    def step(self):
        self.now += 1.0
        while self.queue and len(self.running) < self.slots:
            key, tokens = self.queue.pop(0)
            self.running[key] = tokens
        out = []
        for key in list(self.running):
            for _ in range(min(self.burst, self.running[key])):
                self.running[key] -= 1
                out.append((key, key))
            if not self.running[key]:
                del self.running[key]
        return out


jobs_strategy = st.lists(st.builds(Job, st.just([5]), st.integers(1, 9)), min_size=1, max_size=12)


@given(jobs_strategy, st.integers(1, 4), st.integers(1, 3))
def test_everything_at_once(jobs, slots, burst):
    pretend = Pretend(slots, burst)
    answers = run_all(pretend, jobs, pretend.clock)
    assert [a.tokens for a in answers] == [[i] * job.tokens for i, job in enumerate(jobs)]
    found = figures("offline", jobs, answers)
    assert found["tokens_per_second"] == pytest.approx(sum(j.tokens for j in jobs) / pretend.now)
    assert found["requests_per_second"] == pytest.approx(len(jobs) / pretend.now)


@given(jobs_strategy, st.integers(1, 4), st.integers(0, 99), st.floats(0.05, 3))
def test_by_the_clock(jobs, slots, seed, rate):
    pretend = Pretend(slots)
    arrivals = poisson_arrivals(rate, len(jobs), seed)
    answers = run_timed(pretend, jobs, arrivals, pretend.clock, pretend.sleep)
    for key, (answer, at) in enumerate(zip(answers, arrivals, strict=True)):
        assert answer.due == at <= pretend.submitted[key] + 1e-9
        assert pretend.submitted[key] < at + 1 + 1e-9, "at the first chance after it was due"
        assert answer.first >= 1 - 1e-9 and len(answer.tokens) == jobs[key].tokens
    steps = pretend.now - pretend.slept
    assert steps == pytest.approx(round(steps)), "all time is steps or waiting for arrivals"
    if sum(job.tokens - 1 for job in jobs):
        found = latencies(answers)
        assert found["inter_token_p50_ms"] == pytest.approx(1000) and found["inter_token_p99_ms"] == pytest.approx(1000)


def test_too_few_tokens_are_an_error():
    class Lazy(Pretend):
        def submit(self, key, job):
            super().submit(key, replace(job, tokens=max(1, job.tokens - 1)))

    lazy = Lazy(2)
    with pytest.raises(BenchError, match="request 1 has 3 tokens, not the 4"):
        run_all(lazy, [Job([1], 1), Job([1], 4)], lazy.clock)


def test_figures_of_one_stream():
    job, answer = Job([7] * 30, 4), Answer(10.0, [1, 2, 3, 4], [12.0, 12.5, 13.0, 14.0])
    assert figures("prefill", [job], [Answer(10.0, [1], [12.0])])["prompt_tokens_per_second"] == pytest.approx(15)
    assert figures("ttft", [job], [answer])["first_token_ms"] == pytest.approx(2000)
    assert figures("single", [job], [answer])["tokens_per_second"] == pytest.approx(2)


# -- models -----------------------------------------------------------------------------------------------------------


def test_sizes_of_the_built_in_models():
    m, large = (count_parameters(BUILT_IN[name]()) for name in ("M", "L"))
    assert m.total == pytest.approx(300e6, rel=0.05) and m.active == pytest.approx(60e6, rel=0.1)
    assert large.total == 1_777_088_000  # R1-Distill-Qwen-1.5B's own count
    config = BUILT_IN["L"]()
    assert weight_bytes(config, "bf16") == 2 * (large.total - large.embedding)
    head = config.vocab_size * config.hidden_size
    assert weight_bytes(config, "int4") == (weight_bytes(config, "bf16") / 2 - head) * 4.5 / 8 + head * 8.125 / 8


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_bytes_of_weights_are_those_of_the_packed_model(kind):
    config = qwen2(vocab_size=1024, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
    model = pack(lively(config), kind)
    packed = [w for module in model.modules() for w in vars(module).values() if isinstance(w, IntWeight)]
    plain = [p for name, p in model.named_parameters() if "embed_tokens" not in name]
    read = sum(w.codes.nbytes + w.scale.nbytes for w in packed) + sum(p.nbytes for p in plain)
    assert weight_bytes(config, kind) == pytest.approx(read, rel=0.02)


def test_a_built_in_model_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILT_IN, "small", lambda: nano(vocab_size=320))
    said = []
    path, config = find_model("small", tmp_path, said.append)
    assert len(said) == 1 and (path / "model.safetensors").is_file()
    first, again = (find_gguf(path, "int8", tmp_path, said.append) for _ in range(2))
    assert first[0] == again[0] and first[0].name == "random-small-q8_0.gguf" and len(said) == 2
    assert "no MTP module" in first[1][-1]
    assert find_model("small", tmp_path, said.append)[0] == path and len(said) == 2
    monkeypatch.setitem(BUILT_IN, "small", lambda: nano(vocab_size=352))
    assert find_model("small", tmp_path, said.append)[1].vocab_size == 352 and len(said) == 3, "another shape: made anew"


def test_a_checkpoints_gguf_is_made_anew(tmp_path):
    said = []
    path = checkpoint(tmp_path / "c", qwen2(vocab_size=320))
    assert [find_gguf(path, "bf16", tmp_path, said.append) for _ in range(2)] == [(tmp_path / "c-f16.gguf", [])] * 2
    assert len(said) == 2, "what lies there may be of other weights"


def test_a_random_model_is_far_from_uniform(tmp_path):
    models.make_random(tmp_path / "m", nano(vocab_size=320), seed=random.randrange(10**6))
    from jevons.store.checkpoint import load_checkpoint

    loaded = load_checkpoint(tmp_path / "m")
    logits = plain_logits(loaded.model, [random.randrange(3, 320) for _ in range(20)])
    assert 0.3 < logits.std() < 3 and len(logits.argmax(-1).unique()) > 5


# -- sides ------------------------------------------------------------------------------------------------------------


def checkpoint(directory, config):
    save_checkpoint(directory, lively(config), TOKENIZER, {})
    return directory


@pytest.mark.parametrize("make", [nano, qwen2, llama])
def test_sides_agree_with_the_network(tmp_path, make):
    """Greedy tokens of every side that is here are those of the plain forward pass, up to near ties."""
    config = make(vocab_size=320)
    path = checkpoint(tmp_path / "c", config)
    from jevons.bench.ours import Jevons
    from jevons.store.checkpoint import load_checkpoint

    model = load_checkpoint(path).model
    jobs = [Job(job.prompt, min(job.tokens, 6)) for job in random_jobs(5, 320, 60, random.randrange(10**6))]
    sides = {"jevons": (Jevons(path, "float32", 1), {})}
    if pytest.importorskip("transformers"):
        settings_ = {"dtype": "float32", "threads": 1, "batch": 3} | ({"experts": "grouped_mm"} if config.is_moe else {})
        sides["transformers"] = (Transformers(path, "float32", 1), settings_)
    if "JEVONS_LLAMA_CPP" in os.environ:
        from jevons.bench.sides import LlamaCppSide

        gguf = find_gguf(path, "float32", tmp_path, lambda line: None)[0]
        sides["llama.cpp"] = (LlamaCppSide(gguf, "float32", 1), {"threads": 1, "slots": 2})
    for name, (side, chosen) in sides.items():
        answers = side.run("offline", jobs, chosen)
        differ = 0
        for job, answer in zip(jobs, answers, strict=True):
            assert len(answer.tokens) == len(answer.times) == job.tokens and answer.times == sorted(answer.times)
            ids = list(job.prompt)
            for token in answer.tokens:
                best = plain_logits(model, ids)[-1].topk(2)
                near = best.values[0] - best.values[1] < (0.1 if name == "llama.cpp" else 1e-3)
                differ += token != int(best.indices[0]) and not near
                ids.append(token)
        # one may take another expert where two tie in float16
        assert differ <= (2 if name == "llama.cpp" else 0), name


def test_transformers_is_not_run_out_of_memory(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    config, job, runtime = nano(vocab_size=320), Job([1] * 100, 1), Runtime.detect("cpu")
    side, needed = Transformers(checkpoint(tmp_path / "c", config), "float32", 1), copied_bytes(config, "prefill", [job])
    for memory, fits in ((4.01 * needed, True), (3.99 * needed, False)):
        monkeypatch.setattr(Runtime, "detect", lambda _, memory=memory: replace(runtime, memory_gib=memory / 2**30))
        assert ("batched_mm" in side.options("prefill", [job])["experts"]) == fits
    m = BUILT_IN["M"]()  # 64 prompts of 300 tokens: 151 GB
    assert copied_bytes(m, "offline", [Job([1] * 300, 9)] * 64) == 64 * 300 * 4 * 3 * 640 * 256 * 4


def test_what_the_worker_answers(tmp_path):
    """Ours, in this process: all compared measures and the load, their units and order of size."""
    from jevons.bench.ours import Jevons

    config = nano(vocab_size=320, num_nextn_predict_layers=0)
    answering = Answering(Jevons(checkpoint(tmp_path / "c", config), "bf16", 1))
    about = answering.describe()
    assert about["cache_bytes_per_token"] == about["planned_cache_bytes_per_token"]
    jobs = pack_jobs(random_jobs(4, 320, 100, 0))
    assert answering.prepare("offline", jobs) == {"settings": {}, "tried": []}
    measured = answering.measure("offline", jobs)
    assert [len(t) for t in measured["tokens"]] == [tokens for _, tokens in jobs]
    answering.prepare("load", jobs)
    found = answering.load(jobs, 0.2, seed=1)
    assert found["requests_per_second"] == pytest.approx(0.7 * found["capacity_requests_per_second"])
    free = found["without_pace"]
    assert free["requests_per_second"] == pytest.approx(0.7 * free["capacity_requests_per_second"]) and "without_pace" not in free
    for one in (found, free):
        assert 0 < one["inter_token_p50_ms"] <= one["inter_token_p99_ms"] and one["first_token_p50_ms"] > 0
        assert one["p99_over_unloaded"] == pytest.approx(one["inter_token_p99_ms"] / one["unloaded_inter_token_ms"])
    with pytest.raises(BenchError, match="no MTP module"):
        answering.speculation(2, 8, 1, 0)


def test_what_only_ours_is_asked_for(tmp_path):
    """The prefix cache and drafts are really used, and change no token but where two logits nearly tie."""
    from jevons.bench.ours import Jevons

    side = Jevons(checkpoint(tmp_path / "c", nano(vocab_size=320)), "float32", 1)
    found = side.prefix(80, seed=random.randrange(10**6))
    assert found["shared_tokens"] == 72 and 0.3 < found["cached_share"] <= 0.9
    assert found["same_first_tokens"] >= 31
    assert found["gain"] == found["first_token_without_cache_ms"] / found["first_token_with_cache_ms"]
    found = side.speculation(4, 12, 1, seed=random.randrange(10**6))
    assert found["identical_outputs"] >= 3 and found["of"] == "random ids"
    assert 1 <= found["tokens_per_pass"] <= 2 and 0 <= found["acceptance"] <= 1
    assert found["tokens_per_pass"] <= 1 + found["acceptance"] + 0.2
    assert found["share_of_ideal"] == pytest.approx(found["speedup"] / found["ideal_speedup"])
    assert found["relative_cost_of_a_pass"] > 1
    found = side.deterministic(pack_jobs(random_jobs(4, 320, 60, random.randrange(10**6))))
    assert found["deterministic_same_alone"] == found["requests"] == 4 >= found["ordinary_same_alone"] >= 3
    assert found["cost"] == found["ordinary_tokens_per_second"] / found["deterministic_tokens_per_second"] > 0


def test_a_side_that_refuses_or_dies_says_why(tmp_path):
    worker = Worker("jevons", checkpoint(tmp_path / "c", qwen2(vocab_size=320)), "bf16", 1)
    try:
        with pytest.raises(BenchError, match="the context of 96"):
            worker.ask("prepare", what="prefill", jobs=[[[5] * 200, 1]])
        assert worker.ask("prepare", what="prefill", jobs=[[[5] * 20, 1]])["settings"] == {}, "it lives on"
        with pytest.raises(BenchError, match="jevons ended with code 1: .*no_such_question"):
            worker.ask("no_such_question")
    finally:
        worker.close()


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_whole_run(tmp_path):
    """Through the command: table, page and record; transformers beside it where it is here."""
    pytest.importorskip("transformers")
    path = checkpoint(tmp_path / "c", qwen2(vocab_size=320))
    command = [sys.executable, "-m", "jevons.cli", "bench", path, "--what", "offline,ttft,load,prefix,speculation,deterministic",
               "--peers", "transformers", "--repeat", "1", "--requests", "4", "--tokens", "9", "--load-seconds", "0.1", "--json",
               "--html", tmp_path / "b.html", "--threads", "1", "--dir", tmp_path / "d"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert list(record["measures"]) == [what for what in MEASURES if what not in ("single", "prefill")]
    for what, figure in (("offline", "tokens_per_second"), ("ttft", "first_token_ms")):
        sides = record["measures"][what]["sides"]
        for side in ("jevons", "transformers"):
            values = sides[side][figure]
            assert len(values["values"]) == 1 and 0 < values["min"] <= values["median"] <= values["max"]
        ours, theirs = (sides[s][figure]["median"] for s in ("jevons", "transformers"))
        assert sides["transformers"]["jevons_is_times_better"] == pytest.approx(
            theirs / ours if what == "ttft" else ours / theirs)
    assert set(record["measures"]["offline"]["sides"]["transformers"]["settings"]) == {"dtype", "threads", "batch"}
    assert "generate takes no request" in record["measures"]["load"]["sides"]["transformers"]["not_available"]
    assert "no MTP module" in record["measures"]["speculation"]["sides"]["jevons"]["not_available"]
    page = (tmp_path / "b.html").read_text()
    assert page.count("<svg") == 3 and "http" not in page.replace("http://www.w3.org", "") and "<script" not in page
    for width in (80, 120):
        assert_fits(record, width)


def assert_fits(record, width):
    from io import StringIO

    import rich.console

    from jevons.terminal import plan

    out = StringIO()
    console = rich.console.Console
    try:
        rich.console.Console = lambda **options: console(file=out, width=width, **options)
        plan.print_sections("a run", sections(record))
    finally:
        rich.console.Console = console
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in out.getvalue()
    for what in ("many requests", "first token", "Under load", "no pace", "Prefix cache", "Speculation", "by itself"):
        assert any(what in line for line in lines), what


class Stub:
    """A worker without a process: its side takes a known time, whatever it is asked."""

    def __init__(self, side, path, weights, threads):
        if side == "llama.cpp":
            raise BenchError("the file is\n  damaged")
        self.side, self.about, self.asked = side, {"version": "1"}, []
        if side == "jevons":
            self.about |= {"weights": weights, "threads": threads, "torch": "2", "cache_bytes_per_token": 8,
                           "planned_cache_bytes_per_token": 8}

    def ask(self, do, what="", jobs=(), **arguments):
        if do == "machine":
            return {"read_gb_per_second": 10.0, "read_threads": 1}
        if do == "prepare":
            if self.side != "jevons" and what == "single":
                raise BenchError("it decodes nothing alone")
            return {"settings": {"batch": 8} if self.side != "jevons" else {}, "tried": []}
        assert do == "measure"
        self.asked.append(what)
        value = (30.0 if self.side == "jevons" else 6.0) + self.asked.count(what)
        return {FIGURE[what]: value, "rate": value, "tokens": [[len(job[0]) + (self.side != "jevons" and i % 2)]
                                                               for i, job in enumerate(jobs)]}

    def close(self):
        pass


def test_what_is_made_of_the_sides_answers(tmp_path, monkeypatch):
    """Medians in turns, ratios the right way round, refusals and absences by name."""
    from jevons.bench import run as module

    monkeypatch.setattr(module, "Worker", Stub)
    monkeypatch.setattr(module, "installed", lambda peer: "1")
    path = checkpoint(tmp_path / "c", qwen2(vocab_size=320))
    record = run(replace(QUICK, model=str(path), what=("offline", "single", "ttft"), peers="auto", repeat=3, requests=4))
    offline, single, first = (record["measures"][what]["sides"] for what in ("offline", "single", "ttft"))
    assert offline["jevons"]["tokens_per_second"] == {"median": 32, "min": 31, "max": 33, "values": [31, 32, 33]}
    assert offline["transformers"]["jevons_is_times_better"] == 32 / 8
    assert first["transformers"]["jevons_is_times_better"] == 8 / 32, "milliseconds: less is better"
    assert offline["transformers"]["same_first_token_share"] == 0.5
    assert single["transformers"] == {"not_available": "it decodes nothing alone"}
    expected = single["jevons"]["tokens_per_second"]["median"] * weight_bytes(qwen2(vocab_size=320), "bf16") / 1e9
    assert single["jevons"]["weights_gb_per_second"] == expected
    assert single["jevons"]["share_of_read_rate"] == expected / 10
    assert record["sides"]["llama.cpp"] == {"absent": "the file is damaged"}
    (note,) = [s.note for s in sections(record) if s.title == "Compared"]
    assert "llama.cpp is absent: the file is damaged." in note and "spread at most 25%" in note
    assert "transformers, single: not available, it decodes nothing alone." in note
    assert json.loads(json.dumps(record)) == json.loads(json.dumps(record, allow_nan=False))


def test_an_absent_peer_is_said(tmp_path, monkeypatch):
    from jevons.bench import run as module

    def nothing(peer):
        raise BenchError(f"{peer} is not here: get it")

    monkeypatch.setattr(module, "Worker", Stub)
    monkeypatch.setattr(module, "installed", nothing)
    path = checkpoint(tmp_path / "c", qwen2(vocab_size=320))
    record = run(replace(QUICK, model=str(path), what=("ttft",), peers="auto"))
    assert record["sides"]["llama.cpp"] == {"absent": "llama.cpp is not here: get it"}
    assert list(record["measures"]["ttft"]["sides"]) == ["jevons"]
    assert any("transformers is absent: transformers is not here: get it." in s.note for s in sections(record))
    with pytest.raises(BenchError, match="llama.cpp is not here"):
        run(replace(QUICK, model=str(path), peers="llama.cpp"))


def test_where_llama_cpp_is_looked_for(tmp_path, monkeypatch):
    from jevons.bench import llama_cpp

    monkeypatch.setenv(llama_cpp.FOLDER, str(tmp_path))
    with pytest.raises(BenchError, match="holds no libllama"):
        llama_cpp.find_library()
    (tmp_path / "libllama.v1.so").touch()
    assert llama_cpp.find_library() == (tmp_path, "unknown release")
    monkeypatch.delenv(llama_cpp.FOLDER)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchError, match="llama.cpp is not here: `pip install llama-cpp-python`"):
        llama_cpp.find_library()


@pytest.mark.parametrize("change,message", [
    (dict(what=("offline", "speed")), "--what speed is not a measure; offline, single,"),
    (dict(what=()), "names no measure"),
    (dict(peers="vllm"), "--peers vllm is not a peer; auto, none, transformers, llama.cpp are"),
    (dict(peers="transformers,"), "--peers  is not a peer"),
    (dict(weights="int2"), "--weights int2 is not a kind of weights; float32, bf16,"),
    (dict(repeat=0), "repeat is 0; it must be at least 1"),
    (dict(threads=0), "--threads 0"),
    (dict(model="nowhere"), "nowhere is neither a checkpoint directory nor one of the built-in models small, M, L"),
])
def test_what_cannot_be_asked_for(change, message):
    with pytest.raises(BenchError, match=re.escape(message)):
        run(replace(QUICK, **change))


def test_lengths_over_the_context():
    config = qwen2(max_position_embeddings=100)
    for what, change, message in [("prefill", dict(prompt_tokens=99), "--prompt-tokens 99 does not fit the model's context of"),
                                  ("prefill", dict(prompt_tokens=1), "2 to 98 would"),
                                  ("single", dict(single_tokens=80), "--tokens 80 does not fit")]:
        with pytest.raises(BenchError, match=re.escape(message)):
            jobs_of(what, config, replace(QUICK, **change))
    assert len(jobs_of("prefill", config, replace(QUICK, prompt_tokens=98))[0].prompt) == 98
    check(QUICK)


def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    from jevons import cli

    for arguments, named in [((tmp_path,), "config.json does not exist"), (("small", "--what", "speed"), "--what speed"),
                             (("small", "--html", tmp_path / "no" / "b"), "there is no directory"),
                             (("small", "--peers", "vllm"), "--peers vllm")]:
        monkeypatch.setattr(sys, "argv", ["jevons", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and named in line


# -- what the machine can do ------------------------------------------------------------------------------------------


def test_the_machines_rate():
    from jevons.numerics.peak import gemm_rate

    before = torch.get_num_threads()
    rate, threads = gemm_rate([1], 64, torch.float32, 1)
    assert rate > 0 and threads == 1 and torch.get_num_threads() == before
