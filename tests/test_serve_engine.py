"""The server with the real engine and a small random network: what the fake engine of the other tests only plays."""

import random
from contextlib import contextmanager

import httpx
import pytest
import torch
from fake_engine import Live, read_events
from nets import lively
from own_tasks import Traced
from test_serve_thinking import joined, texts

from jevons.chat import END_THINK, EOS
from jevons.config import preset
from jevons.data.tokenizer import train_tokenizer
from jevons.engine.engine import Engine


@pytest.fixture(scope="module")
def tokenizer():
    rng, task = random.Random(3), Traced()
    return train_tokenizer([t for p in (task.sample(rng) for _ in range(50)) for t in (p.prompt, task.trace(p, rng))], 288)


@contextmanager
def serving(tokenizer, owned=True, settings=None, **options):
    """A live server with the real engine. The network never prefers eos or `</think>`."""
    model = lively(preset("v3-nano", vocab_size=288, max_position_embeddings=512))
    with torch.no_grad():
        for name in (EOS, END_THINK):
            model.lm_head.weight[tokenizer.special[name]] = 0.0  # a logit of 0 among 286 others around it
    with Live(owned=owned, settings={"closing_words": "so", **(settings or {})}) as live:
        live.tokenizer, live.model = tokenizer, model
        live.real = Engine(model, tokenizer.eos_id, max_batch=8, max_len=512, tokenizer=tokenizer, **options)
        live.host.set_engine(live.real, "real")
        yield live


@pytest.mark.parametrize("options", [{}, {"speculate": 2, "prefix_cache": True}])
def test_budget_and_answer(tokenizer, options):
    budget, close = random.randint(0, 9), tokenizer.renderer().close_thought("so")
    fields = dict(max_thinking_tokens=budget, max_tokens=40, temperature=0, loop_guard=False)
    with serving(tokenizer, **options) as live:
        first, again = (live.ask("write sun moon", **fields).json() for _ in range(2))
        metrics = httpx.get(live.url + "/metrics").text
    thought, _ = texts(first["choices"][0])
    assert thought.endswith("\nso\n") and tokenizer.decode(close) == f"\nso\n{END_THINK}\n"
    usage, hits = first["usage"], again["usage"]["prompt_cache_hit_tokens"]
    details = usage["completion_tokens_details"]
    assert usage["jevons"]["thought_closed"] == "budget"
    assert details["reasoning_tokens"] == budget + close.index(tokenizer.special[END_THINK]) + 1
    assert (details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] > 0) == bool(options)
    assert texts(again["choices"][0]) == texts(first["choices"][0]) and (hits > 0) == bool(options)
    assert f"jevons_engine_generated_tokens_total {2.0 * usage['completion_tokens']}" in metrics
    assert f"jevons_engine_cached_tokens_total {float(hits)}" in metrics


def test_choices_are_what_single_requests_get(tokenizer):
    seed, n = random.randrange(10**6), 3
    fields = dict(max_tokens=25, max_thinking_tokens=10)
    with serving(tokenizer, deterministic=True) as live:
        together = live.ask("write sea", n=n, seed=seed, **fields).json()["choices"]
        alone = [live.ask("write sea", seed=seed + i, **fields).json()["choices"][0] for i in range(n)]
        events = read_events(live.ask("write sea", n=n, seed=seed, stream=True, **fields).text)
        votes = live.ask("write sea", votes=n, seed=seed, **fields).json()
    assert [texts(c) for c in together] == [texts(c) for c in alone] and len({texts(c) for c in together}) == n
    assert [joined(events, i)[:2] for i in range(n)] == [texts(c) for c in alone]
    assert texts(votes["choices"][0]) == texts(alone[votes["votes"]["index"]])


def test_answer_now(tokenizer):
    body = {"messages": [{"role": "user", "content": "write hill"}], "stream": True, "max_tokens": 60, "n": 2, "temperature": 0}
    with serving(tokenizer, owned=False, settings={"grace": 0.05, "keep_alive": 0.05}, speculate=1) as live:
        with httpx.stream("POST", live.url + "/v1/chat/completions", json=body, timeout=60) as response:
            assert live.wait(lambda: live.host.counts() == (0, 2), 5)
            live.host.pump(max_steps=7)
            reply = httpx.post(f"{live.url}/v1/chat/completions/{response.headers['x-request-id']}/answer_now")
            assert reply.json()["closes_thought"]
            live.host.pump()
            events = read_events("".join(response.iter_text()))
    assert events[-1]["usage"]["jevons"]["thought_closed"] == "asked"
    for i in range(2):
        thought, answer, _ = joined(events, i)
        assert thought.endswith("\nso\n") and answer


def test_a_damaged_weight_is_named(tokenizer):
    with serving(tokenizer) as live:
        assert live.ask(max_tokens=3).status_code == 200
        norm = live.model.norm.weight
        before = norm.detach().clone()
        with torch.no_grad():
            norm[3] = float("nan")
        for fields in ({}, {"n": 3}, {"votes": 3}):
            reply = live.ask(max_tokens=3, **fields)
            assert reply.status_code == 500 and "not finite" in reply.json()["error"]["message"]
        with torch.no_grad():
            norm.copy_(before)
        assert live.ask(max_tokens=3, n=3).status_code == 200 and live.wait(lambda: not live.real.has_work, 2)
