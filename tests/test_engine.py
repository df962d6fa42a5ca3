"""The engine against plain uncached forwards: whatever else runs beside a request, its tokens are those its seed gives.

`explain` holds every token of a completion to the definition: greedy is the best logit, else the inverse of the cumulative
distribution at the noise of (seed, position). It allows what float32 allows: near-ties.
"""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from nets import lively, llama, nano, plain_logits, qwen2, random_ids

from jevons.data.tokenizer import train_tokenizer
from jevons.engine.engine import Engine
from jevons.engine.sampler import uniform
from jevons.engine.types import PromptTooLong, QueueFull, Request, SamplingParams

EOS = 1
TIE = 1e-3


def engine_of(model, **options):
    """With a pace, prompts ride in the pass of the rows that decode."""
    return Engine(model, options.pop("eos_id", -1), **dict(max_batch=5, max_len=64, pace=random.choice([None, 0.0])) | options)


def request(prompt=None, **params):
    return Request(random_ids(random.randint(1, 20)) if prompt is None else prompt,
                   SamplingParams(**dict(max_tokens=random.randint(1, 20), seed=random.randrange(2**63)) | params))


def sampled(**params):
    return request(**dict(temperature=random.uniform(0.4, 1.5), top_p=random.choice([1.0, 1.0, 0.8])) | params)


def explain(model, asked, token_ids, logprobs=None):
    """Raises unless every token is the one that the request's parameters define."""
    p, n = asked.params, len(asked.prompt_ids)
    logits = plain_logits(model, [*asked.prompt_ids, *token_ids[:-1]])[n - 1 :].double()
    logp = (logits / (p.temperature or 1.0)).log_softmax(-1)
    for i, token in enumerate(token_ids):
        if logprobs is not None:
            assert abs(logprobs[i] - logp[i, token].item()) < 1e-4 / min(p.temperature or 1.0, 1.0) + 1e-4
        if p.temperature == 0:
            assert logits[i].max() - logits[i, token] < TIE, f"token {i} is not the best one"
            continue
        probs = logp[i].exp()
        if p.top_p < 1:
            ranked, order = probs.sort(descending=True)
            before = ranked.cumsum(0) - ranked
            if (before - p.top_p).abs().min() < 1e-4:
                continue  # rounding decides what the nucleus is
            probs = torch.zeros_like(probs).scatter_(0, order, ranked.masked_fill(before >= p.top_p, 0.0))
        edges = probs.cumsum(0) / probs.sum()
        u = float(uniform(np.array([p.seed % 2**64], dtype=np.uint64), np.array([n + i], dtype=np.uint64))[0])
        assert (edges[token - 1] if token else 0.0) - TIE <= u <= edges[token] + TIE, f"token {i} is not the noise's"


def run(engine, at_step=lambda step: None):
    """Step to the end: {id: tokens}, {id: finish reason}, {id: log-probs}, and all events."""
    tokens, ends, logprobs, events, step = {}, {}, {}, [], 0
    while engine.has_work:
        at_step(step)
        for event in engine.step():
            events.append(event)
            assert event.request_id not in ends, "an event after the end"
            if event.token_id is not None:
                tokens.setdefault(event.request_id, []).append(event.token_id)
                logprobs.setdefault(event.request_id, []).append(event.logprob)
            if event.finish_reason:
                ends[event.request_id] = event.finish_reason
        engine.scheduler.check_integrity()
        step += 1
        assert step < 2000
    return tokens, ends, logprobs, events


@pytest.mark.parametrize("config", [nano(), nano(q_lora_rank=None, num_nextn_predict_layers=0), qwen2(), llama()],
                         ids=["v3", "v3-plain-q", "qwen2", "llama"])
def test_greedy_and_sampled_are_the_plain_forwards(config):
    model = lively(config)
    requests = [request(temperature=0.0) if i % 2 else sampled() for i in range(11)]
    completions = engine_of(model).generate(requests)
    for asked, done in zip(requests, completions, strict=True):
        assert (done.request_id, done.prompt_ids) == (asked.request_id, asked.prompt_ids)
        assert done.finish_reason == "length" and len(done.token_ids) == len(done.logprobs) == asked.params.max_tokens
        explain(model, asked, done.token_ids, done.logprobs)


def test_explain_can_fail():
    model, asked = lively(nano()), request(temperature=0.0, max_tokens=6)
    (done,) = engine_of(model).generate([asked])
    wrong = list(done.token_ids)
    wrong[-1] = plain_logits(model, asked.prompt_ids + wrong)[-2].argmin().item()
    with pytest.raises(AssertionError):
        explain(model, asked, wrong)
    other = Request(asked.prompt_ids, SamplingParams(max_tokens=20, temperature=1.5, seed=asked.params.seed + 1))
    (done,) = engine_of(model).generate([other])
    with pytest.raises(AssertionError):
        explain(model, Request(asked.prompt_ids, SamplingParams(temperature=1.5, seed=asked.params.seed)), done.token_ids)


def test_the_same_seed_gives_the_same_text_in_any_company():
    model = lively(nano())
    asked = sampled(max_tokens=25, temperature=1.0)
    texts = []
    for batch, others in ((1, 0), (2, 3), (6, 9), (4, 1)):
        crowd = [sampled(max_tokens=random.randint(1, 30)) for _ in range(others)]
        again = Request(asked.prompt_ids, asked.params)
        crowd.insert(random.randint(0, others), again)
        by_id = {c.request_id: c for c in engine_of(model, max_batch=batch).generate(crowd)}
        texts.append(by_id[again.request_id].token_ids)
        explain(model, asked, texts[-1])
    assert len(set(map(tuple, texts))) <= 2  # equal, but for a near-tie that `explain` allowed
    assert Counter(map(tuple, texts)).most_common(1)[0][1] >= 3


def test_different_seeds_differ():
    model, prompt = lively(nano()), random_ids(5)
    done = engine_of(model).generate([request(prompt, temperature=1.5, seed=s, max_tokens=20) for s in range(8)])
    assert len({tuple(c.token_ids) for c in done}) == 8
    negative, huge = engine_of(model).generate([request(prompt, seed=s, max_tokens=20, temperature=1.5) for s in (-1, 2**64 - 1)])
    assert negative.token_ids == huge.token_ids


@pytest.mark.parametrize("drafts", [0, 1])
def test_token_shares_match_softmax(drafts):
    """First and second token of many seeds; the second over the pairs, so that the two draws are seen to be independent. With
    drafts the second was often foretold: the distribution is the model's all the same."""
    vocab, count = 4, 1500
    model, prompt = lively(nano(vocab_size=vocab, num_hidden_layers=1)), [random.randrange(vocab) for _ in range(3)]
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)
    base = random.randrange(2**40)
    engine = engine_of(model, max_batch=128, max_waiting=2000, speculate=drafts)
    done = engine.generate([Request(prompt, SamplingParams(3, 1.3, seed=base + i)) for i in range(count)])
    assert not drafts or engine.stats()["accepted_tokens"] > count / 8
    counts = Counter(tuple(c.token_ids[:2]) for c in done)
    first = (plain_logits(model, prompt)[-1] / 1.3).softmax(-1).tolist()
    chi, cells = 0.0, 0
    for a in range(vocab):
        second = (plain_logits(model, [*prompt, a])[-1] / 1.3).softmax(-1).tolist()
        for b in range(vocab):
            expected = count * first[a] * second[b]
            if expected >= 5:
                chi, cells = chi + (counts[a, b] - expected) ** 2 / expected, cells + 1
            else:
                assert counts[a, b] < 30
    assert cells > 3 and chi < cells + 5.5 * math.sqrt(2 * cells) + 12


def test_slots_are_taken_over_without_a_trace():
    """Cancel at random times in the middle, submit more: survivors have the tokens that their own seeds give."""
    for _ in range(4):
        model = lively(random.choice([nano(), qwen2()]))
        engine = engine_of(model, max_batch=random.randint(2, 6), max_len=90)
        asked, gone = {}, set()

        def submit(engine=engine, asked=asked):
            new = sampled(prompt=random_ids(random.choice([1, 3, 31, 32, 33, 50])), max_tokens=random.randint(2, 40))
            asked[engine.submit(new)] = new

        for _ in range(8):
            submit()

        def disturb(step, engine=engine, asked=asked, gone=gone, submit=submit):
            if step > 40:
                return
            if random.random() < 0.25 or step == 1:
                victim = random.choice([i for i in asked if step > 1 or engine.scheduler.find(i)])
                if engine.scheduler.find(victim) is not None:
                    gone.add(victim)
                engine.cancel(victim)
            if random.random() < 0.2:
                submit()

        tokens, ends, logprobs, _ = run(engine, disturb)
        assert set(ends) == set(asked) and gone and len(gone) < len(asked)
        for request_id, one in asked.items():
            got = tokens.get(request_id, [])
            if request_id in gone:
                assert ends[request_id] == "cancelled" and len(got) < one.params.max_tokens
            else:
                assert ends[request_id] == "length"
                assert len(got) == min(one.params.max_tokens, 90 - len(one.prompt_ids))
            if got:
                explain(model, one, got, logprobs[request_id])


def test_live_weights_are_read():
    """Training between two requests changes the second's text, without any copying."""
    model = lively(nano())
    engine, asked = engine_of(model), request(temperature=0.0, max_tokens=12)
    explain(model, asked, engine.generate([asked])[0].token_ids)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    asked = Request(asked.prompt_ids, asked.params)
    explain(model, asked, engine.generate([asked])[0].token_ids)


# -- ends ----------------------------------------------------------------------------------------------------------------


def test_eos_and_stop_tokens_end_and_are_kept():
    model = lively(nano())
    free = request(max_tokens=30, temperature=1.5, prompt=random_ids(4))
    text = engine_of(model).generate([free])[0].token_ids
    for token in set(text):
        at = text.index(token)
        for eos, stops in ((token, ()), (-1, (999, token))):
            engine = engine_of(model, eos_id=eos)
            asked = Request(free.prompt_ids, SamplingParams(30, 1.5, seed=free.params.seed, stop_token_ids=stops))
            (done,) = engine.generate([asked])
            assert (done.token_ids, done.finish_reason) == (text[: at + 1], "stop")
            assert not engine.has_work


def test_the_context_is_the_limit():
    model, length = lively(nano()), 20
    engine = engine_of(model, max_len=length)
    longest, some = Request(random_ids(length - 1)), Request(random_ids(12), SamplingParams(max_tokens=100))
    a, b = engine.generate([longest, some])
    assert (len(a.token_ids), len(b.token_ids)) == (1, 8) and a.finish_reason == b.finish_reason == "length"
    explain(model, longest, a.token_ids)
    explain(model, some, b.token_ids)
    with pytest.raises(PromptTooLong):
        engine.submit(Request(random_ids(length)))
    assert not engine.has_work


def test_a_context_beyond_the_model_is_cut_to_it():
    engine = engine_of(lively(nano(max_position_embeddings=30)), max_len=100)
    assert engine.max_len == 30
    assert len(engine.generate([Request(random_ids(5))])[0].token_ids) == 25


PIECES = ["a", "b", "ab", "ba", " ", "the ", "c", "abc"]


class Pieces:
    """A tokenizer whose ids are pieces of text."""

    def decode_stream(self):
        class Stream:
            def step(self, token_id):
                return PIECES[token_id % len(PIECES)]

        return Stream()


def test_stop_strings_end_where_they_first_appear():
    model = lively(nano())
    free = request(max_tokens=40, temperature=1.5, prompt=random_ids(3))
    ids = engine_of(model).generate([free])[0].token_ids
    text = "".join(PIECES[i % len(PIECES)] for i in ids)
    for _ in range(12):
        start = random.randrange(len(text))
        stop = text[start : start + random.randint(1, 12)]
        expected = next(n for n in range(1, 41) if stop in "".join(PIECES[i % len(PIECES)] for i in ids[:n]))
        params = SamplingParams(40, 1.5, seed=free.params.seed, stop=("never", stop))
        company = sampled(stop=("neither",))
        done, other = engine_of(model, tokenizer=Pieces()).generate([Request(free.prompt_ids, params), company])
        assert (done.token_ids, done.finish_reason) == (ids[:expected], "stop")
        assert len(other.token_ids) == company.params.max_tokens


def test_stop_strings_with_the_real_tokenizer():
    tokenizer = train_tokenizer(["the cat sat on the mat; größer, 12+34=46"] * 3, 320)
    model = lively(nano(vocab_size=320))
    free = request(random_ids(4, 320), max_tokens=40, temperature=1.2)
    ids = engine_of(model).generate([free])[0].token_ids
    stream, text, at = tokenizer.decode_stream(), "", []
    for i in ids:
        text += stream.step(i) or ""
        at.append(len(text))
    start = random.randrange(len(text))
    stop = text[start : start + 3]
    expected = next(n for n, end in enumerate(at, 1) if stop in text[:end])
    params = SamplingParams(40, 1.2, seed=free.params.seed, stop=(stop,))
    (done,) = engine_of(model, tokenizer=tokenizer).generate([Request(free.prompt_ids, params)])
    assert (done.token_ids, done.finish_reason) == (ids[:expected], "stop")


@pytest.mark.parametrize("params", [
    dict(temperature=-0.1), dict(temperature=float("nan")), dict(temperature=float("inf")), dict(top_p=0.0), dict(top_p=1.5),
    dict(top_p=float("nan")), dict(max_tokens=0), dict(max_tokens=-3), dict(stop=("",)), dict(stop=("x", ""))], ids=str)
def test_parameters_that_cannot_be_run(params):
    engine = engine_of(lively(nano()), tokenizer=Pieces())
    with pytest.raises(ValueError):
        engine.submit(Request([3], SamplingParams(**params)))
    assert not engine.has_work


def test_prompts_that_cannot_be_run():
    engine = engine_of(lively(nano()))
    for prompt in ([], [48], [3, -1]):
        with pytest.raises(ValueError):
            engine.submit(Request(prompt))
    with pytest.raises(ValueError, match="tokenizer"):
        engine.submit(Request([3], SamplingParams(stop=("x",))))
    engine.submit(Request([3], request_id="one"))
    with pytest.raises(ValueError, match="one"):
        engine.submit(Request([4], request_id="one"))
    run(engine)
    engine.submit(Request([4], request_id="one"))  # finished: the name is free again


def test_a_temperature_next_to_zero_is_greedy():
    """Logits divided by 1e-40 are infinite; that is no damage to the weights."""
    model, prompt = lively(nano()), random_ids(6)
    greedy, *tiny = engine_of(model).generate([request(prompt, max_tokens=9, temperature=t) for t in (0.0, 1e-45, 1e-38, 1e-12)])
    assert all(c.token_ids == greedy.token_ids and c.finish_reason == "length" for c in tiny)


# -- queue, cancel, damage ------------------------------------------------------------------------------------------------


def test_the_queue_is_bounded_and_first_come_first_served():
    engine = engine_of(lively(nano()), max_batch=2, max_waiting=3)
    asked = [request(max_tokens=random.randint(1, 6)) for _ in range(3)]
    for one in asked:
        engine.submit(one)
    with pytest.raises(QueueFull) as caught:
        engine.submit(request())
    assert caught.value.retry_after > 0
    firsts = []
    _, ends, _, events = run(engine)
    for event in events:
        if event.request_id not in firsts:
            firsts.append(event.request_id)
    assert firsts == [r.request_id for r in asked] and set(ends.values()) == {"length"}


def test_generate_takes_more_than_fits():
    model = lively(nano())
    requests = [sampled(max_tokens=random.randint(1, 5)) for _ in range(23)]
    done = engine_of(model, max_batch=3, max_waiting=2).generate(requests)
    assert [c.request_id for c in done] == [r.request_id for r in requests]
    for asked, one in zip(requests, done, strict=True):
        explain(model, asked, one.token_ids)


def test_a_refused_request_leaves_nothing_behind():
    """`generate` with one prompt too long: it raises, and the engine is as free as before."""
    model = lively(nano())
    engine, good = engine_of(model), request(max_tokens=5)
    with pytest.raises(PromptTooLong):
        engine.generate([request(max_tokens=50), request(random_ids(64)), request()])
    (done,) = engine.generate([good])
    explain(model, good, done.token_ids)
    assert not engine.scheduler.running and not engine.scheduler.waiting


def test_generate_beside_requests_of_others():
    """Training's rollouts in an engine that also serves: events of the others come with the next step, none is lost."""
    model = lively(nano())
    engine = engine_of(model, max_batch=3)
    others = [sampled(max_tokens=n) for n in (2, 15, 30)]
    for one in others:
        engine.submit(one)
    engine.cancel(others[0].request_id)
    events = engine.step()
    mine = [sampled(max_tokens=9) for _ in range(3)]
    for asked, done in zip(mine, engine.generate(mine), strict=True):
        explain(model, asked, done.token_ids)
        assert done.finish_reason == "length"
    assert engine.has_work
    tokens, ends, _, later = run(engine)
    merged = {o.request_id: [e.token_id for e in [*events, *later] if e.request_id == o.request_id and e.token_id is not None]
              for o in others}
    for one in others[1:]:
        assert len(merged[one.request_id]) == one.params.max_tokens and ends[one.request_id] == "length"
        explain(model, one, merged[one.request_id])
    assert not merged[others[0].request_id]


def test_cancel_in_every_state():
    model = lively(nano())
    engine = engine_of(model, max_batch=2)
    running, other, waiting = (request(max_tokens=20) for _ in range(3))
    for one in (running, other, waiting):
        engine.submit(one)
    engine.step()
    engine.cancel("nobody")
    for one in (running, waiting, running):
        engine.cancel(one.request_id)
    assert engine.has_work
    tokens, ends, _, events = run(engine)
    assert ends == {running.request_id: "cancelled", waiting.request_id: "cancelled", other.request_id: "length"}
    assert all(e.token_id is None for e in events if e.finish_reason == "cancelled")
    engine.cancel(other.request_id)
    assert not engine.has_work and engine.step() == []


def test_everything_cancelled_leaves_an_engine_that_works():
    model = lively(nano())
    engine = engine_of(model, max_batch=4)
    asked = [request(max_tokens=20) for _ in range(6)]
    for one in asked:
        engine.submit(one)
    for _ in range(random.randrange(4)):
        engine.step()
    for one in random.sample(asked, 6):
        engine.cancel(one.request_id)
    assert set(run(engine)[1].values()) == {"cancelled"}
    one = sampled()
    explain(model, one, engine.generate([one])[0].token_ids)


def test_damaged_weights_are_an_error_of_every_request():
    model = lively(nano())
    engine, asked = engine_of(model), [request(), sampled(), request(temperature=0.0)]
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight[0, 0] = float("nan")
    for one in asked:
        engine.submit(one)
    _, ends, _, events = run(engine)
    assert set(ends.values()) == {"error"} and len(events) == 3
    for event in events:
        assert event.token_id is None and "not finite" in event.error and math.isfinite(event.logprob)


@pytest.mark.parametrize("make", [nano, qwen2])
def test_one_damaged_request_leaves_the_others_alone(make):
    """An embedding that is NaN reaches only the requests that use it, not those that get their slots and pages later."""
    model, bad = lively(make()), 47
    with torch.no_grad():
        model.embed_tokens.weight[bad] = float("nan")
    engine = engine_of(model, max_batch=4)
    asked = {}
    for _ in range(14):
        prompt = random_ids(random.randint(1, 40), 47)
        if random.random() < 0.4:
            prompt[random.randrange(len(prompt))] = bad
        one = sampled(prompt=prompt, max_tokens=random.randint(1, 15))
        asked[engine.submit(one)] = one
    tokens, ends, _, _ = run(engine)
    for request_id, one in asked.items():
        got = tokens.get(request_id, [])
        if bad in one.prompt_ids:
            assert ends[request_id] == "error" and not got
        elif bad in got and len(got) < one.params.max_tokens:  # it wrote the token itself
            assert ends[request_id] == "error" and got.index(bad) == len(got) - 1
        else:
            assert ends[request_id] == "length", "a healthy request failed"
            explain(model, one, got)


def test_prompts_run_in_calls_of_bounded_size(monkeypatch):
    """One long prompt among many short ones must not pad all of them to its length in one call."""
    from jevons.engine import engine, passes

    monkeypatch.setattr(engine, "PREFILL_TOKENS", 100)
    model, sizes = lively(nano()), []
    monkeypatch.setattr(passes, "build_meta", lambda *args, **kwargs: (
        sizes.append(len(args[2]) * max(args[2]) if args[2] else 0), build_meta(*args, **kwargs))[1])
    from jevons.model import build_meta

    requests = [sampled(prompt=random_ids(n), max_tokens=3) for n in (2, 60, 3, 1, 44, 5, 20, 63, 4)]
    for asked, done in zip(requests, engine_of(model, max_batch=9, max_len=66, pace=None).generate(requests), strict=True):
        explain(model, asked, done.token_ids)
    assert max(sizes) <= 100 and sum(s > 0 for s in sizes) < len(requests)


def test_bf16_cache_and_bytes():
    model = lively(nano())
    engine = engine_of(model, max_batch=3, max_len=70, cache_dtype=torch.bfloat16)
    tokens = 3 * 96  # three slots of whole pages of 32
    assert engine.cache.nbytes == engine.cache.data.untyped_storage().nbytes() == (24 + 8) * 2 * 2 * tokens
    requests, short = [request(temperature=0.0, max_tokens=10) for _ in range(4)], []
    for asked, done in zip(requests, engine.generate(requests), strict=True):
        logits = plain_logits(model, asked.prompt_ids + done.token_ids)[len(asked.prompt_ids) - 1 : -1]
        short += [(row.max() - row[token]).item() for row, token in zip(logits, done.token_ids, strict=True)]
    assert len(short) == 40 and sorted(short)[36] < 1.5, "with bf16 keys and values they are near the best one"


def test_a_small_model_decodes_on_one_thread_and_leaves_the_others_as_they_were(monkeypatch):
    before, seen = torch.get_num_threads(), []
    model = lively(nano())
    model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        for small in (True, False):
            monkeypatch.setattr("jevons.engine.engine.SMALL", 10**9 if small else 0)
            engine = engine_of(model)
            engine.submit(request(max_tokens=3))
            run(engine)
            assert torch.get_num_threads() == 2 and set(seen) == ({1} if small else {2})
            seen.clear()
    finally:
        torch.set_num_threads(before)
