"""Experts in RAM with the hot ones in slots, and experts in a file's map: the same outputs, bounds kept, hits counted right."""

import gc
import os
import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import lively, nano, qwen2, random_ids
from test_engine import engine_of, explain, request

from jevons.engine.types import Request, SamplingParams
from jevons.model import KVCache, build_meta
from jevons.model.offload import HALF_LIFE, HotExperts, OffloadedExperts, expert_bytes, place, watch_mapped
from jevons.model.pack import pack
from jevons.numerics.memory import resident
from jevons.serve.ledger import Ledger
from jevons.store.checkpoint import load_checkpoint, save_checkpoint

CALLS = st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 7), min_size=1, max_size=4)), max_size=60)


@given(CALLS, st.integers(0, 6))
def test_slots_are_bounded_unique_and_hits_are_those_that_lie_there(calls, slots):
    counts = {}
    hot, lies, hits, uses, copies = HotExperts(slots, counts), {}, 0, 0, 0
    for layer, experts in calls:
        found = hot.use(layer, experts)
        assert found == {e: lies[layer, e] for e in experts if (layer, e) in lies}
        hits, uses = hits + len(found), uses + len(experts)
        moved = hot.promote(layer, experts - set(found))
        if moved is not None:
            expert, slot = moved
            assert expert in experts and expert not in found and 0 <= slot < slots
            gone = [key for key, at in lies.items() if at == slot]
            for key in gone:
                assert len(lies) == slots and hot.heat(key) < hot.heat((layer, expert))
                del lies[key]
            lies[layer, expert], copies = slot, copies + 1
        else:
            missing = experts - set(found)
            assert not missing or len(lies) == slots
        assert hot.slot_of == lies and len(lies) <= slots and len(set(lies.values())) == len(lies)
    assert (counts["expert_hits"], counts["expert_uses"], counts["expert_copies"]) == (hits, uses, copies)
    assert counts["expert_hit_rate"] == (hits / uses if uses else 0)


def test_the_hot_ones_are_those_used_of_late():
    hot = HotExperts(2, {})
    for expert in [0, 1] * 40 + [2, 3] * (2 * HALF_LIFE):
        found = hot.use(0, [expert])
        hot.promote(0, [] if found else [expert])
    assert set(hot.slot_of) == {(0, 2), (0, 3)}
    for expert in (4, 5, 6):  # once each: not worth a copy
        hot.use(0, [expert])
        assert hot.promote(0, [expert]) is None


def run(model, ids, dtype=torch.float32):
    """Hidden states of a prompt and of a few tokens after it."""
    cache, outs = KVCache(model.config, 4, 16, dtype=dtype), []
    with torch.inference_mode():
        for start, part in ((0, ids[:-4]), (len(ids) - 4, ids[-4:])):
            meta = build_meta(torch.arange(4)[None], [start], [len(part)], 16)
            outs.append(model(torch.tensor(part), meta.positions_N, cache, meta))
    return torch.cat(outs)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("kind", [None, "bf16", "fp8", "int8", "int4"])
def test_offloaded_is_plain(kind, native, monkeypatch):
    if not native:
        monkeypatch.setattr("jevons.numerics.kernels.usable", lambda x: False)
    config = nano(hidden_size=64, moe_intermediate_size=32, num_nextn_predict_layers=0)
    model, ids = lively(config, seed=random.randrange(2**31)), random_ids(40)
    if kind:
        pack(model, kind, torch.float32)
    dtype = model.embed_tokens.weight.dtype
    want = run(model, ids, dtype)
    slots = random.choice([0, 1, 3, 100])
    place(model, "cpu", slots * expert_bytes(model) + expert_bytes(model) // 2)
    offloaded = [m for m in model.modules() if isinstance(m, OffloadedExperts)]
    assert len(offloaded) == 1 and len(offloaded[0].slots[0]) == min(slots, config.n_routed_experts)
    for _ in range(4):  # with ever more of them in slots
        got = run(model, ids, dtype)
        bound = 2e-4 if dtype == torch.float32 else 0.06
        assert (got - want).norm() <= bound * want.norm()
    counts = model.expert_counts
    assert counts["expert_copies"] <= 8 and len(offloaded[0].hot.slot_of) == min(slots, counts["expert_copies"])
    assert (counts["expert_hits"] > 0) == (slots > 0)


def test_the_engine_serves_offloaded_experts_and_shows_the_hit_rate():
    model = lively(nano())
    plain = lively(nano(), seed=3)
    plain.load_state_dict(model.state_dict())
    place(model, "cpu", 4 * expert_bytes(model))
    engine = engine_of(model, speculate=1)
    asked = [request(temperature=0.0, max_tokens=12) for _ in range(4)]
    for r, done in zip(asked, engine.generate(asked), strict=True):
        explain(plain, r, done.token_ids)
    stats = engine.stats()
    ledger = Ledger()
    ledger.watch(lambda: (0, 0), lambda: stats)
    assert f"jevons_engine_expert_hit_rate {stats['expert_hit_rate']}" in ledger.metrics().decode()
    assert stats["expert_slots"] == 4 and 0 < stats["expert_hit_rate"] == stats["expert_hits"] / stats["expert_uses"] < 1


def test_placing_keeps_ties_packs_and_outputs():
    for make in (lambda: nano(tie_word_embeddings=True), lambda: qwen2(tie_word_embeddings=True), nano):
        for kind in (None, "int8", "fp8"):
            model, ids = lively(make()), random_ids(20)
            if kind:
                pack(model, kind, torch.float32)
            want = run(model, ids)
            place(model, torch.device("cpu"))
            assert (model.lm_head.weight is model.embed_tokens.weight) == (model.config.tie_word_embeddings and kind is None)
            torch.testing.assert_close(run(model, ids), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="has none"):
        place(lively(qwen2()), "cpu", 10**6)


def evict(path):
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def test_the_hit_rate_of_mapped_experts_falls_when_they_are_evicted(tmp_path):
    """And what was missed is read ahead, so that the next call finds it."""
    config = nano(hidden_size=256, moe_intermediate_size=128, num_nextn_predict_layers=0)
    save_checkpoint(tmp_path, lively(config), None, {})

    def load():
        model = watch_mapped(load_checkpoint(tmp_path, need_tokenizer=False, frozen=True).model)
        return model, model.layers[1].mlp.experts

    model, bank = load()
    engine = engine_of(model)
    engine.generate([Request(random_ids(30), SamplingParams(8, 0.0))])
    stats = engine.stats()
    assert stats["expert_hit_rate"] == 1.0 and stats["expert_bytes_seen"] == stats["expert_bytes_resident"] > 0
    del model, bank, engine  # a page that is mapped stays
    gc.collect()
    evict(tmp_path / "model.safetensors")
    model, bank = load()
    held = [t for e in (0, 5) for t in (*bank.gate_up_proj[e].parts, bank.down_proj[e])]
    if (resident(held[-1]) or 0) > 0.5:
        pytest.skip("this file system keeps its pages, or does not tell")
    share = sum(resident(t) * t.nbytes for t in held) / sum(t.nbytes for t in held)
    bank.watch(bank, torch.tensor([[0, 5], [5, 0]]))
    assert model.expert_counts["expert_hit_rate"] <= max(share, 0.9) and bank.watch._missed
    deadline = time.monotonic() + 20
    while min(map(resident, held)) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    bank.watch(bank, torch.tensor([[0, 5]]))
    assert not bank.watch._missed and model.expert_counts["expert_bytes_seen"] == 2 * sum(t.nbytes for t in held)
