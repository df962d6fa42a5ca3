"""Decode over static buffers, the way a GPU captures it, run eagerly on a CPU: the same tokens as the ordinary path.

Rows are padded to buckets and queries to the longest; padding may touch no page that somebody owns.
"""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import lively, llama, nano, qwen2
from test_engine import explain, request, sampled

from jevons.engine.engine import PAGE, Engine
from jevons.engine.graphs import StaticStep, bucket, obstacle
from jevons.engine.sampler import keep_top_p, noise, sample, uniform
from jevons.engine.types import Request
from jevons.model import KVCache, build_meta
from jevons.model.pack import pack
from jevons.numerics import triton_mla


@given(st.integers(1, 600), st.integers(1, 600))
def test_buckets_hold_their_batch_and_waste_at_most_half(count, most):
    count = min(count, most)
    size = bucket(count, most)
    assert count <= size <= most and size <= 2 * count
    assert size - count < 32 and bucket(size, most) == size
    assert len({bucket(i, 600) for i in range(1, 601)}) < 32


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**31)), min_size=1, max_size=20))
def test_noise_of_tensors_is_numpys_to_the_bit(pairs):
    seeds, positions = (np.array(x, dtype=np.uint64) for x in zip(*pairs, strict=True))
    got = noise(torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(positions.view(np.int64)))
    assert got.dtype == torch.float64 and (got.numpy() == uniform(seeds, positions)).all()


def test_sampling_without_shapes_that_depend_on_data():
    for _ in range(20):
        logits, heat = torch.randn(7, 50) * 3, torch.tensor([0.0, 0.3, 1.0])[torch.randint(3, (7,))]
        top_p, u = torch.tensor([1.0, 0.5, 0.9])[torch.randint(3, (7,))], torch.rand(7, dtype=torch.float64)
        want = sample(logits, heat, top_p, u)
        got = sample(logits, heat, top_p, u, bool(((top_p < 1) & (heat > 0)).any()))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (keep_top_p(logits.softmax(-1), torch.full((7,), 0.5)) == 0).any()


def both(model, asked, **options):
    """The same requests with static steps and without."""
    texts = []
    for graphs in (True, False):
        engine = Engine(model, -1, **dict(max_batch=5, max_len=64, graphs=graphs) | options)
        done = engine.generate([Request(r.prompt_ids, r.params) for r in asked])
        texts.append([c.token_ids for c in done])
        assert (engine.graphs is not None) == graphs
        if graphs:
            assert len(engine.graphs.steps) > 1
            # with drafts asked for, a pass of no row with one is chance
            assert options.get("speculate") or 1 in {queries for _, queries in engine.graphs.steps}
        engine.scheduler.check_integrity()
    for r, static, plain in zip(asked, *texts, strict=True):
        explain(model, r, static)
        assert len(static) == len(plain)
    assert sum(a == b for a, b in zip(*texts, strict=True)) >= len(asked) - 1  # but for a near-tie that `explain` allowed
    return engine


@pytest.mark.parametrize("make", [nano, lambda: nano(q_lora_rank=None, num_nextn_predict_layers=0), qwen2, llama],
                         ids=["v3", "v3-plain-q", "qwen2", "llama"])
def test_static_steps_give_the_ordinary_tokens(make):
    both(lively(make()), [request(temperature=0.0) if i % 2 else sampled() for i in range(9)])


def test_static_steps_verify_drafts_of_uneven_numbers():
    """Limits cut drafts short, so that rows of one pass have different numbers of them."""
    model = lively(nano())
    asked = [request(temperature=0.0, max_tokens=random.randint(2, 20)) if i % 2 else sampled(max_tokens=12) for i in range(8)]
    engine = Engine(model, -1, max_batch=5, max_len=64, graphs=True, speculate=3)
    for r, done in zip(asked, engine.generate(asked), strict=True):
        explain(model, r, done.token_ids, done.logprobs)
        assert len(done.token_ids) == r.params.max_tokens
    stats = engine.stats()
    assert stats["drafted_tokens"] > 0 and max(q for _, q in engine.graphs.steps) == 4
    both(model, asked, speculate=2)


def test_deterministic_and_tight_pages_work_over_static_steps():
    model = lively(nano())
    asked = [sampled(max_tokens=20) for _ in range(5)]
    tight = Engine(model, -1, max_batch=4, max_len=64, graphs=True, pages=3)
    for r, done in zip(asked, tight.generate(asked), strict=True):
        explain(model, r, done.token_ids, done.logprobs)
    texts = []
    for crowd in (asked, asked[:1]):
        engine = Engine(model, -1, max_batch=4, max_len=64, graphs=True, deterministic=True)
        texts.append(engine.generate([Request(r.prompt_ids, r.params) for r in crowd])[0])
    assert texts[0].token_ids == texts[1].token_ids and texts[0].logprobs == texts[1].logprobs


def test_padding_touches_no_page_that_somebody_owns():
    config = nano(num_nextn_predict_layers=0, max_position_embeddings=64)
    model, pages = lively(config), 6
    cache = KVCache(config, pages + 1, 8)
    cache.data.normal_()
    before = cache.data.clone()
    step = StaticStep(4, 3, 8, scrap=pages, page_size=8, device=torch.device("cpu"))
    for context, tokens in ((8, [5]), (61, [7, 3]), (3, [1, 2, 3])):  # at the end of the rotary table padding would pass it
        cache.data.copy_(before)
        table = torch.full((1, 8), 4)
        table[0, : (context + len(tokens) - 1) // 8 + 1] = torch.arange((context + len(tokens) - 1) // 8 + 1) % 4
        step.fill([tokens], np.array([context]), np.zeros(1, np.uint64), np.zeros(1), np.ones(1), table)
        with torch.inference_mode():
            hidden, logits, chosen, logprobs = step.run(model, cache, False)
            changed = {tuple(i) for i in (cache.data != before).any(-1)[:, :pages].nonzero()[:, 1:].tolist()}
            assert changed == {(int(table[0, p // 8]), p % 8) for p in range(context, context + len(tokens))}
            other = KVCache(config, pages + 1, 8)
            other.data.copy_(before)
            meta = build_meta(table, [context], [len(tokens)], 8)
            want = model(torch.tensor(tokens), meta.positions_N, other, meta)
            torch.testing.assert_close(hidden[: len(tokens)], want, atol=1e-4, rtol=1e-3)
            best = model.logits(want).max(-1).values
            torch.testing.assert_close(logits[range(len(tokens)), chosen[: len(tokens)]], best, atol=1e-3, rtol=1e-3)


def test_what_cannot_be_captured_says_why():
    cpu = torch.device("cpu")
    if not triton_mla.INTERPRETED:
        assert obstacle(lively(nano()), cpu)
        assert Engine(lively(nano()), -1, max_batch=2, max_len=32).graphs is None
    patch = pytest.MonkeyPatch()
    with patch.context() as patch:
        patch.setattr(triton_mla, "why_not", lambda device: None)
        assert "grouped product" in obstacle(lively(nano()), cpu)
        assert "one by one" in obstacle(pack(lively(nano(hidden_size=64)), "bf16"), cpu)
        assert "integer" in obstacle(pack(lively(qwen2()), "int8"), cpu)
        assert obstacle(lively(qwen2()), cpu) is None
    assert PAGE == 32
