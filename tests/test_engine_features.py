"""Prefix cache, chunks, preemption, drafts, thoughts: none of them changes what a request's seed and prompt say."""

import random
from collections import Counter

import pytest
import torch
from nets import lively, llama, nano, plain_logits, qwen2, random_ids
from test_engine import engine_of, explain, request, run, sampled

from jevons.engine.disk import DiskTier
from jevons.engine.drafts import Drafts
from jevons.engine.engine import CHUNK, PAGE, Engine
from jevons.engine.rows import Rows
from jevons.engine.speculation import AGAIN, TRIES, Speculation
from jevons.engine.types import Request, SamplingParams, Thinking
from jevons.numerics.native import library, why_not


def usage_of(events, request_id):
    return next(e.usage for e in events if e.request_id == request_id and e.finish_reason)


@pytest.mark.parametrize("make", [nano, qwen2, llama])
@pytest.mark.parametrize("speculate", [0, 2])
def test_prefixes_are_read_and_nothing_else_changes(make, speculate):
    model = lively(make(max_position_embeddings=256))
    engine = engine_of(model, max_len=160, prefix_cache=True, speculate=speculate)
    shared = random_ids(75)
    first = sampled(prompt=[*shared, *random_ids(20)], max_tokens=30)
    (done,) = engine.generate([first])
    assert done.usage.cached_tokens == 0
    explain(model, first, done.token_ids, done.logprobs)
    again = [sampled(prompt=[*shared, *random_ids(n)], max_tokens=9) for n in (1, 7, 30)]
    turn = sampled(prompt=[*first.prompt_ids, *done.token_ids[:-3], *random_ids(5)], max_tokens=9)  # a second turn
    for asked, one in zip([*again, turn], engine.generate([*again, turn]), strict=True):
        explain(model, asked, one.token_ids, one.logprobs)
        # to the token within pages that are known, which are those that were full
        known, most = (3 * PAGE, 3 * PAGE) if asked is turn else (75, 75 + 3)
        assert known <= one.usage.cached_tokens <= most, "more can only be by chance"
    same = Request(first.prompt_ids, first.params)
    (repeat,) = engine.generate([same])
    assert 64 < repeat.usage.cached_tokens < len(first.prompt_ids)
    explain(model, first, repeat.token_ids, repeat.logprobs)
    stats = engine.stats()
    assert stats["pages_used"] == 0 < stats["pages_cached"] and stats["cached_tokens"] >= 4 * 64
    engine.scheduler.pool.clear()
    (cold,) = engine.generate([Request(first.prompt_ids, first.params)])
    assert cold.usage.cached_tokens == 0


def test_other_weights_find_nothing():
    model = lively(nano())
    engine = engine_of(model, max_len=100)
    asked = sampled(prompt=random_ids(70))
    for _ in range(2):
        (done,) = engine.generate([Request(asked.prompt_ids, asked.params)])
        assert done.usage.cached_tokens == 0, "the cache is on without having been asked for"


@pytest.mark.parametrize("pace,speculate", [(None, 0), (None, 2), (0.0, 0), (0.0, 2)])
def test_a_long_prompt_does_not_stall_those_that_run(pace, speculate):
    model = lively(nano(max_position_embeddings=4 * CHUNK))
    engine = engine_of(model, max_batch=4, max_len=4 * CHUNK, speculate=speculate, pace=pace)
    running = [sampled(max_tokens=60) for _ in range(2)]
    for one in running:
        engine.submit(one)
    engine.step()
    long, short = sampled(prompt=random_ids(3 * CHUNK), max_tokens=4), sampled(prompt=random_ids(5), max_tokens=4)
    engine.submit(long)
    engine.submit(short)
    first, steps, texts, ended = {}, 0, {}, set()
    while engine.has_work:
        events = engine.step()
        steps += 1
        for event in events:
            first.setdefault(event.request_id, steps)
            texts.setdefault(event.request_id, []).append(event.token_id)
        got = {e.request_id for e in events}
        if long.request_id not in first:
            assert {r.request_id for r in running} <= got | ended, "a running stream had to wait for a prompt"
        ended |= {e.request_id for e in events if e.finish_reason}
    assert first[short.request_id] < first[long.request_id] and first[long.request_id] >= 3
    explain(model, long, texts[long.request_id])
    explain(model, short, texts[short.request_id])


@pytest.mark.parametrize("speculate", [0, 3])
def test_with_too_few_pages_everybody_still_gets_what_is_theirs(speculate):
    model = lively(nano(vocab_size=5))
    engine = Engine(model, -1, max_batch=6, max_len=128, pages=5, prefix_cache=random.random() < 0.5, speculate=speculate)
    asked = {}
    for _ in range(12):
        one = sampled(prompt=random_ids(random.randint(1, 60), 5), max_tokens=random.randint(30, 68))
        asked[engine.submit(one)] = one
    for _ in range(2):  # two that together need more than there is, whatever the others do
        one = sampled(prompt=random_ids(20, 5), max_tokens=100)
        asked[engine.submit(one)] = one
    tokens, ends, logprobs, events = run(engine)
    assert engine.stats()["preemptions"] > 0 and set(ends.values()) == {"length"}
    assert sum(usage_of(events, i).preempted for i in asked) == engine.stats()["preemptions"]
    for request_id, one in asked.items():
        explain(model, one, tokens[request_id], logprobs[request_id])
    assert engine.stats()["pages_used"] == 0


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_drafts_change_nothing(drafts):
    """With few words to choose from, drafts are often right: greedy, sampled, stopped, limited, all as without them."""
    model = lively(nano(vocab_size=6))
    crowd = [request(random_ids(random.randint(1, 40), 6), temperature=0.0) if i % 2 else
             sampled(prompt=random_ids(random.randint(1, 40), 6), max_tokens=random.randint(1, 40)) for i in range(14)]
    crowd += [sampled(prompt=one.prompt_ids, max_tokens=40, stop_token_ids=(3,)) for one in crowd[:3]]
    engine = engine_of(model, max_len=96, speculate=drafts)
    plain = engine_of(model, max_len=96).generate([Request(r.prompt_ids, r.params) for r in crowd])
    same = 0
    for asked, with_drafts, without in zip(crowd, engine.generate(crowd), plain, strict=True):
        same += with_drafts.token_ids == without.token_ids
        explain(model, asked, with_drafts.token_ids, with_drafts.logprobs)
        assert with_drafts.finish_reason == without.finish_reason or with_drafts.token_ids != without.token_ids
        assert with_drafts.usage.drafted_tokens >= with_drafts.usage.accepted_tokens >= 0
    assert same >= len(crowd) - 2  # but for near-ties, which `explain` has seen
    stats = engine.stats()
    assert stats["accepted_tokens"] > 5 and stats["drafted_tokens"] > stats["accepted_tokens"]


def test_drafts_are_the_mtp_modules():
    """An MTP module that is right always: it reads from the hidden state what the model will say, so every draft is accepted."""
    model = lively(nano(vocab_size=6, num_hidden_layers=1))
    with torch.no_grad():  # the model says token + 1, whatever came before; its module says token + 1 after that
        eye = torch.eye(6, model.config.hidden_size)
        model.embed_tokens.weight.copy_(eye * 10)
        model.lm_head.weight.copy_(eye.roll(1, 0))
        for block in [*model.layers, *model.mtp]:
            block.self_attn.o_proj.weight.zero_()
            for name, parameter in block.mlp.named_parameters():
                if "down_proj" in name:
                    parameter.zero_()
        module = model.mtp[0]
        module.eh_proj.weight.zero_()
        module.eh_proj.weight[:, : model.config.hidden_size] = torch.eye(model.config.hidden_size)
        for norm in (model.norm, module.enorm, module.shared_head["norm"]):
            norm.weight.fill_(1.0)
    engine = engine_of(model, speculate=3)
    (done,) = engine.generate([request([2], temperature=0.0, max_tokens=30)])
    assert done.token_ids == [(3 + i) % 6 for i in range(30)]
    assert done.usage.accepted_tokens == done.usage.drafted_tokens >= 20


@pytest.mark.parametrize("drafts", [1, 3])
def test_drafts_of_the_same_call_are_those_of_a_call_of_their_own(drafts, monkeypatch):
    """Thoughts that are closed, limits and stops included: then the same call drafted for what was not said."""
    if library() is None:
        pytest.skip(why_not())
    model, made = lively(nano(vocab_size=12)), Counter()
    crowd = [sampled(prompt=random_ids(random.randint(1, 40), 12), max_tokens=random.randint(1, 60),
                     stop_token_ids=(2,) if i % 3 else (), thinking=Thinking(END, CLOSE, random.randint(1, 6)) if i % 2 else None)
             for i in range(24)]
    step, real = Rows.step, Drafts._made
    monkeypatch.setattr(Drafts, "_made", lambda self, *args: made.update([done := real(self, *args)]) or done)
    together, apart = engine_of(model, max_len=160, speculate=drafts), engine_of(model, max_len=160, speculate=drafts)
    first = together.generate(crowd)
    assert made[True] > max(20, made[False])
    made.clear()
    monkeypatch.setattr(Rows, "step", lambda self, *args, picked=None: step(self, *args[:6], picked=picked))
    second = apart.generate([Request(r.prompt_ids, r.params) for r in crowd])
    assert made[False] > 0 == made[True]
    for one, other in zip(first, second, strict=True):
        assert (one.token_ids, one.finish_reason, one.usage) == (other.token_ids, other.finish_reason, other.usage)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)  # products of other sizes


class Clock:
    """A machine where a pass with k drafts costs 1 + k * `cost`, and every draft is right with chance `right`. `disturbed`: the
    share of passes that take long for a reason of others."""

    def __init__(self, cost, right, disturbed=0.0):
        self.cost, self.right, self.disturbed = cost, right, disturbed

    def run(self, speculation, passes, batch=1):
        counts = Counter()
        for _ in range(passes):
            k = speculation.drafts(batch)
            counts[k] += 1
            if k is None:
                continue
            tokens = 1
            while tokens <= k and random.random() < self.right:
                tokens += 1
            held_up = 50 if random.random() < self.disturbed else 1
            speculation.record(batch, k, (1 + k * self.cost) * random.uniform(0.95, 1.1) * held_up, tokens)
        return counts


def test_it_drafts_as_many_as_pay():
    speculation = Speculation()
    assert Clock(0.05, 0.95).run(speculation, 1500)[3] > 800
    assert Clock(0.5, 0.6).run(speculation, 6 * AGAIN)  # the text, or the load, has changed
    assert Clock(0.5, 0.6).run(speculation, 3 * AGAIN)[3] < AGAIN
    assert Clock(0.2, 0.9).run(Speculation(), 100, batch=17) == {None: 100}
    assert Clock(9.0, 0.1).run(Speculation(2), 100) == {2: 100}


def test_a_busy_machine_does_not_mislead_it():
    shares = [Clock(0.1, 0.9, disturbed=0.15).run(Speculation(), 400)[None] for _ in range(20)]
    assert sum(share == 0 for share in shares) >= 17


def test_it_switches_itself_off_and_looks_again():
    speculation = Speculation()
    counts = Clock(0.9, 0.2).run(speculation, 200)
    assert counts[None] > 100 and not speculation.paying and counts[2] + counts[3] == 0
    assert [speculation.enrol() for _ in range(16)].count(True) == 2
    assert Clock(0.05, 0.95).run(speculation, 10 * TRIES)[None] == 0 and speculation.paying and speculation.enrol()


def test_an_engine_that_finds_out_by_itself():
    model = lively(nano(vocab_size=6))
    engine = engine_of(model, speculate=None)
    requests = [sampled(prompt=random_ids(8, 6), max_tokens=40) for _ in range(12)]
    for asked, done in zip(requests, engine.generate(requests), strict=True):
        explain(model, asked, done.token_ids, done.logprobs)
    assert engine.stats()["drafted_tokens"] > 0
    assert engine_of(lively(qwen2()), speculate=None).drafts is None  # no module, no drafts


END, CLOSE = 3, (7, 3, 9)


def thinker(limit=None, **params):
    return sampled(prompt=random_ids(6), thinking=Thinking(END, CLOSE, limit), **dict(max_tokens=40) | params)


@pytest.mark.parametrize("speculate", [0, 2])
def test_a_thought_is_closed_when_its_budget_is_used(speculate):
    model = lively(nano())
    for limit in (0, 1, 7, 23):
        asked = thinker(limit)
        (done,) = engine_of(model, speculate=speculate).generate([asked])
        ids = done.token_ids
        if END in ids[:limit]:
            assert done.usage.thought_closed is None
            continue
        assert tuple(ids[limit : limit + 3]) == CLOSE and len(ids) == 40 and done.usage.thought_closed == "budget"
        explain(model, asked, ids[:limit])
        free = Request([*asked.prompt_ids, *ids[: limit + 3]], asked.params)
        explain(model, free, ids[limit + 3 :])  # what follows is the model's own
        logp = plain_logits(model, [*asked.prompt_ids, *ids]).div(asked.params.temperature).log_softmax(-1)
        for i in range(limit, limit + 3):
            assert abs(logp[len(asked.prompt_ids) + i - 1, ids[i]].item() - done.logprobs[i]) < 1e-3


@pytest.mark.parametrize("speculate", [0, 2])
def test_answer_now(speculate):
    model = lively(nano())
    with torch.no_grad():
        model.lm_head.weight[END] = -model.lm_head.weight[END].abs() * 0  # it rarely ends a thought by itself
    engine = engine_of(model, speculate=speculate, max_batch=2)
    asked, other, waiting = thinker(), thinker(), thinker(max_tokens=20)
    for one in (asked, other, waiting):
        engine.submit(one)
    for _ in range(5):
        engine.step()
    engine.end_thought("nobody")
    so_far = len(engine.scheduler.find(asked.request_id).tokens) - 6
    engine.end_thought(asked.request_id)
    engine.end_thought(asked.request_id)
    engine.end_thought(waiting.request_id)  # before it has begun
    tokens, ends, _, events = run(engine)
    whole = engine_of(model).generate([Request(asked.prompt_ids, asked.params)])[0].token_ids[:so_far]
    if END not in whole:
        assert usage_of(events, asked.request_id).thought_closed == "asked"
        assert tuple(tokens[asked.request_id][:3]) == CLOSE  # the tokens before were handed out earlier
    assert tuple(tokens[waiting.request_id][:3]) == CLOSE and len(tokens[waiting.request_id]) == 20
    assert usage_of(events, other.request_id).thought_closed is None


def test_an_endless_repetition_is_ended():
    model = lively(nano(vocab_size=12, max_position_embeddings=512))
    with torch.no_grad():
        model.lm_head.weight.zero_()  # it says token 0 for ever
    engine, prompt = Engine(model, -1, max_len=512), random_ids(4, 12)
    asked = [Request(prompt, SamplingParams(300, 0.0, loop_guard=guard, thinking=thinking)) for guard, thinking in
             ((True, None), (True, Thinking(3, (7, 3))), (False, None))]
    guarded, thinking, free = engine.generate(asked)
    assert free.token_ids == [0] * 300 and not free.usage.loop
    assert 90 < len(guarded.token_ids) < 130 and guarded.finish_reason == "length" and guarded.usage.loop
    assert thinking.usage.thought_closed == "loop" and thinking.usage.loop
    assert 90 < thinking.token_ids.index(3) < 130 and 190 < len(thinking.token_ids) < 260


def test_deterministic_is_the_same_to_the_bit_in_any_company():
    model = lively(random.choice([nano, qwen2])(max_position_embeddings=1024))
    asked = sampled(prompt=random_ids(CHUNK + 70), max_tokens=25)
    seen = set()
    for batch, others in ((1, 0), (3, 4), (5, 9)):
        crowd = [sampled(prompt=random_ids(random.choice([3, 40, 700])), max_tokens=random.randint(1, 30)) for _ in range(others)]
        mine = Request(asked.prompt_ids, asked.params)
        crowd.insert(random.randint(0, others), mine)
        engine = engine_of(model, max_batch=batch, max_len=1024, deterministic=True, prefix_cache=True, speculate=2)
        done = {c.request_id: c for c in engine.generate(crowd)}[mine.request_id]
        seen.add((tuple(done.token_ids), tuple(done.logprobs)))
    assert len(seen) == 1
    explain(model, asked, done.token_ids)
    with pytest.raises(ValueError, match="pages 5"):
        engine_of(model, pages=5, deterministic=True)


def test_every_core_decodes_its_share(monkeypatch):
    """With many rows of a small model the cores split them; each token is still its own seed's."""
    monkeypatch.setattr("jevons.engine.passes.SHARED", 4)
    model = lively(nano())
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        engine = engine_of(model, max_batch=9)
        requests = [sampled(max_tokens=random.randint(1, 25)) for _ in range(14)]
        for asked, done in zip(requests, engine.generate(requests), strict=True):
            explain(model, asked, done.token_ids, done.logprobs)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("make,dtype", [(nano, torch.float32), (qwen2, torch.bfloat16)])
@pytest.mark.parametrize("speculate", [0, 2])
def test_prefixes_survive_a_restart(tmp_path, make, dtype, speculate):
    model, prompt = lively(make(max_position_embeddings=256)), random_ids(100)

    def ask(root, tail):
        engine = engine_of(model, max_len=160, prefix_cache=True, disk=DiskTier(tmp_path, 10**8), root=root, speculate=speculate,
                           cache_dtype=dtype)
        asked = sampled(prompt=[*prompt, *random_ids(tail)], max_tokens=20)
        (done,) = engine.generate([asked])
        engine.close()
        if dtype is torch.float32:
            explain(model, asked, done.token_ids, done.logprobs)
        return done.usage.cached_tokens

    assert ask(b"weights", 9) == 0
    assert ask(b"weights", 30) == 96
    assert ask(b"other weights", 9) == 0
    for path in tmp_path.glob("*.page"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01")
    assert ask(b"weights", 9) == 0
    assert [ask(b"weights", 9) for _ in range(3)] == [32, 64, 96]  # each finds one more damaged page, and writes it again


def test_a_storm():
    """Everything at once, with few pages: requests of every kind come, are cancelled, are told to answer; the books agree after
    every step, and all that ends by itself is what its seed says."""
    for _ in range(3):
        model = lively(nano(vocab_size=8))
        engine = Engine(model, -1, max_batch=5, max_len=96, pages=random.choice([3, 5, 9]), prefix_cache=random.random() < 0.7,
                        speculate=random.choice([0, 1, 3, None]), max_waiting=8, pace=random.choice([None, 0.0, 1.5, 3.0]))
        asked, gone, prompts = {}, set(), [random_ids(50, 8)]

        def disturb(step, engine=engine, asked=asked, gone=gone, prompts=prompts):
            if step > 60:
                return
            for _ in range(random.choice([0, 0, 1, 3])):
                if len(engine.scheduler.waiting) < 8:
                    prompt = (random.choice(prompts)[: random.randint(1, 60)] + random_ids(random.randint(0, 30), 8))[:90]
                    prompts.append(prompt)
                    one = sampled(prompt=prompt, max_tokens=random.choice([1, 5, 30, None]), top_p=1.0)
                    asked[engine.submit(one)] = one
            for _ in range(random.choice([0, 0, 0, 1, 4])):
                if asked:
                    victim = random.choice(list(asked))
                    if engine.scheduler.find(victim) is not None:
                        gone.add(victim)
                    engine.cancel(victim)

        engine.submit(first := sampled(prompt=prompts[0], max_tokens=5, top_p=1.0))
        asked[first.request_id] = first
        tokens, ends, logprobs, _ = run(engine, disturb)
        assert set(ends) == set(asked) and engine.stats()["pages_used"] == 0
        for request_id, one in asked.items():
            assert (ends[request_id] == "cancelled") == (request_id in gone)
            if request_id not in gone:
                explain(model, one, tokens[request_id], logprobs[request_id])


def test_requests_at_their_extremes():
    model = lively(nano())
    engine = engine_of(model, max_len=64, prefix_cache=True, speculate=2)
    extremes = [Request(random_ids(63), SamplingParams(None, 100.0, 1e-9, seed=-(2**70))),
                Request([0], SamplingParams(10**9, 0.0)),
                Request(random_ids(63), SamplingParams(1, 1e-30, 1.0, loop_guard=True, thinking=Thinking(3, (3,) * 50, 0)))]
    done = engine.generate(extremes)
    assert [len(c.token_ids) for c in done] == [1, 63, 1] and done[2].token_ids == [3]
    with pytest.raises(ValueError, match="pages 1 "):
        engine_of(model, max_len=64, pages=1)
    with pytest.raises(ValueError, match="close_ids.*vocabulary of 48"):
        engine.submit(Request([1], SamplingParams(thinking=Thinking(3, (3, 48)))))


def test_whoever_is_preempted_at_the_end_of_a_known_page_goes_on():
    """All of its cells are known then; it must run again all the same."""
    model = lively(nano(vocab_size=5))
    engine = Engine(model, -1, max_batch=2, max_len=128, pages=8, speculate=0, prefix_cache=True)
    one = sampled(prompt=random_ids(PAGE - 3, 5), max_tokens=20)
    engine.submit(one)
    while engine.scheduler.running == [] or engine.scheduler.running[0].computed < PAGE:
        engine.step()
    (sequence,) = engine.scheduler.running
    engine._register(sequence)
    engine.scheduler.preempt(sequence)
    assert sequence.goal == PAGE and len(sequence.tokens) == PAGE + 1
    tokens, ends, _, _ = run(engine)
    assert set(ends.values()) == {"length"} and sequence.preempted == 1
