"""Attention over the paged cache, native and gathered, against plain float64 on the same numbers.

Tables are arbitrary: sequences share their first pages, own pages lie anywhere, and every cell that a sequence may not see
holds NaN, infinity or a huge number.
"""

import ctypes
import functools
import platform
import random
import subprocess

import pytest
import torch
from nets import lively, llama, nano, qwen2, random_ids

from jevons.config import ModelConfig
from jevons.model import KVCache, attention, build_meta, build_model
from jevons.numerics import Fp8Weight, native, paged
from jevons.numerics.fp8 import quantise_blocks
from jevons.runtime import cpu_info, find_compiler

needs_native = pytest.mark.skipif(native.why_not() is not None, reason=f"no native kernels: {native.why_not()}")
either = pytest.mark.parametrize("path", [pytest.param("native", marks=needs_native), "gathered"])
dtypes = pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=["cells-f32", "cells-bf16"])
query_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e30]


def mla_config() -> ModelConfig:
    """Widths that are often no multiple of a vector."""
    return nano(num_attention_heads=random.choice([1, 2, 3, 4, 7, 16]), kv_lora_rank=random.choice([5, 16, 24, 64, 136]),
                qk_rope_head_dim=random.choice([2, 8, 16, 32]))


def gqa_config() -> ModelConfig:
    groups = random.choice([1, 2, 3])
    return llama(num_attention_heads=groups * random.choice([1, 2, 3, 6]), num_key_value_heads=groups, hidden_size=36,
                 head_dim=random.choice([2, 10, 16, 64, 80]))


def scene(config: ModelConfig, contexts, lens, cache_dtype):
    """A cache whose pages are shared and scattered, the call's meta, and each sequence's cells."""
    page, width = random.choice([16, 32]), KVCache(config, 1, 1).data.shape[-1]
    totals = [c + n for c, n in zip(contexts, lens, strict=True)]
    per_seq = [-(-t // page) for t in totals]
    pages = sum(per_seq) + 3
    free = torch.randperm(pages).tolist()
    table = torch.randint(-9, pages + 9, (len(contexts), max(per_seq) + random.randrange(3)))  # past a sequence's pages: anything
    for s, count in enumerate(per_seq):
        other = random.randrange(s or 1)
        shared = min(contexts[s], contexts[other]) // page if s and random.random() < 0.5 else 0
        own = [free.pop() for _ in range(count - shared)]
        table[s, :count] = torch.tensor([*table[other, :shared].tolist(), *own])
    cache = KVCache(config, pages, page, layers=2, dtype=cache_dtype)
    cache.data.copy_(torch.tensor(GARBAGE)[torch.randint(len(GARBAGE), cache.data.shape)])
    cells = cache.layers[1].view(-1, width)
    where = []
    for s, total in enumerate(totals):
        at = torch.arange(total)
        where.append(table[s, at // page] * page + at % page)
        cells[where[-1]] = torch.randn(total, width).to(cache_dtype)
    meta = build_meta(table, contexts, None if set(lens) == {1} and random.random() < 0.5 else lens, page)
    return cache, meta, [cells[w].clone() for w in where]


def reference(heads, q_NHW, kept, contexts, lens):
    """[N, H, V] in float64."""
    outs, share = [], heads.heads // heads.groups
    for cells, context, q in zip(kept, contexts, q_NHW.double().split(lens), strict=True):
        hidden = torch.arange(len(cells)) > context + torch.arange(len(q))[:, None]
        for h in range(heads.heads):
            g = h // share
            k = cells.double()[:, heads.key_at + g * heads.key_step :][:, : heads.plain + heads.rotary]
            v = cells.double()[:, heads.value_at + g * heads.value_step :][:, : heads.value]
            scores = (q[:, h] @ k.T * heads.scale).masked_fill(hidden, float("-inf"))
            outs.append((scores.softmax(-1) @ v, h))
    rows = [torch.stack([o for o, _ in outs[i : i + heads.heads]], dim=1) for i in range(0, len(outs), heads.heads)]
    return torch.cat(rows)


def unrotated(heads, part):
    """What rotation by angle 0 brings to `part`."""
    return torch.stack(part.chunk(2, dim=-1), dim=-1).flatten(-2) if heads.adjacent else part


def attend(path, heads, q_NHW, cache, meta):
    if path == "gathered":
        return attention.attend_gathered(heads, q_NHW, cache, 1, meta)
    n = len(q_NHW)
    rope = torch.stack([torch.ones(n, heads.rotary // 2), torch.zeros(n, heads.rotary // 2)], dim=1)
    plain, rotary = q_NHW.split([heads.plain, heads.rotary], dim=-1)
    out = torch.full((heads.heads, n, heads.value), 7.0, dtype=q_NHW.dtype).transpose(0, 1)  # any strides will do
    return paged.attend(heads, meta.batch, plain, unrotated(heads, rotary), rope, cache.layers[1], out)


def heads_of(config: ModelConfig):
    return build_model(config, device="meta").layers[0].self_attn.paged


def ragged():
    count = random.randint(1, 6)
    kind = random.choice(["decode", "drafts", "mixed"])
    lens = [{"decode": 1, "drafts": random.randint(1, 5), "mixed": random.randint(1, 70)}[kind] for _ in range(count)]
    return [random.choice([0, random.randint(0, 90), random.randint(0, 700)]) for _ in range(count)], lens


def near(got, want, values, dtype, path="native"):
    """float32: scores reach 40, and their rounding is the weights' relative error. bf16: weights and result round once each;
    gathered, scores do too."""
    bound = 2e-5 if dtype == torch.float32 else 2**-7 if path == "native" else 2**-4
    assert got.dtype == dtype and got.shape == want.shape
    assert ((got.double() - want).abs().max() <= bound * max(float(v.abs().max()) for v in values)).item()


@query_dtypes
@dtypes
@pytest.mark.parametrize("make", [mla_config, gqa_config], ids=["mla", "gqa"])
@either
def test_any_table_any_lengths(path, make, cache_dtype, dtype):
    for _ in range(6):
        config, (contexts, lens) = make(), ragged()
        heads = heads_of(config)
        cache, meta, kept = scene(config, contexts, lens, cache_dtype)
        q = (torch.randn(sum(lens), heads.heads, heads.plain + heads.rotary) * random.choice([1, 3])).to(dtype)
        near(attend(path, heads, q, cache, meta), reference(heads, q, kept, contexts, lens), kept, dtype, path)


@either
def test_v3s_heads(path):
    config = nano(num_attention_heads=128, kv_lora_rank=512, qk_rope_head_dim=64)
    heads, contexts, lens = heads_of(config), [33, 0], [1, 2]
    for dtype in (torch.float32, torch.bfloat16):
        cache, meta, kept = scene(config, contexts, lens, dtype)
        q = torch.randn(3, 128, 576).to(dtype)
        near(attend(path, heads, q, cache, meta), reference(heads, q, kept, contexts, lens), kept, dtype, path)


@pytest.mark.parametrize("most", [1, 100, 3000])
def test_gathering_in_parts_is_gathering_at_once(monkeypatch, most):
    config, (contexts, lens) = mla_config(), ragged()
    heads = heads_of(config)
    cache, meta, _ = scene(config, contexts, lens, torch.float32)
    q = torch.randn(sum(lens), heads.heads, heads.plain + heads.rotary)
    want = attend("gathered", heads, q, cache, meta)
    held = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda t, *a, **k: (held.append(t.numel()), softmax(t, *a, **k))[1])
    monkeypatch.setattr(attention, "MOST_SCORES", most)
    torch.testing.assert_close(attend("gathered", heads, q, cache, meta), want, atol=2e-5, rtol=1e-4)
    assert max(held) <= max(most, heads.heads * meta.max_context)  # one query is not cut


@needs_native
@pytest.mark.parametrize("make", [mla_config, gqa_config], ids=["mla", "gqa"])
def test_a_tokens_bits_depend_on_its_sequence_alone(make):
    """Not on the company, the pages, or the threads; contexts long and short of a span."""
    config, threads = make(), torch.get_num_threads()
    heads, contexts = heads_of(config), [3000, *random.choices(range(1200), k=9)]
    lens = [1] * len(contexts)
    for dtype in (torch.float32, torch.bfloat16):
        cache, meta, kept = scene(config, contexts, lens, dtype)
        q = torch.randn(sum(lens), heads.heads, heads.plain + heads.rotary).to(dtype)
        want = attend("native", heads, q, cache, meta)
        for s, context in enumerate(contexts):
            alone = KVCache(config, -(-len(kept[s]) // 7), 7, layers=2, dtype=dtype)
            pages = torch.randperm(alone.data.shape[1])
            at = torch.arange(len(kept[s]))
            alone.layers[1].view(-1, alone.data.shape[-1])[pages[at // 7] * 7 + at % 7] = kept[s]
            try:
                torch.set_num_threads(random.choice([1, 2, 3]))
                got = attend("native", heads, q[s : s + 1], alone, build_meta(pages[None], [context], None, 7))
            finally:
                torch.set_num_threads(threads)
            assert torch.equal(got, want[s : s + 1])


@either
def test_ones_own_nan_is_seen(path):
    config = random.choice([mla_config, gqa_config])()
    heads, contexts, lens = heads_of(config), [40, 200, 0], [1, 3, 2]
    cache, meta, kept = scene(config, contexts, lens, torch.float32)
    q = torch.randn(sum(lens), heads.heads, heads.plain + heads.rotary)
    q[1] = float("nan")
    got = attend(path, heads, q, cache, meta)
    assert got[1].isnan().all()
    rest = torch.cat([got[:1], got[2:]])
    want = reference(heads, q, kept, contexts, lens)
    near(rest, torch.cat([want[:1], want[2:]]), kept, torch.float32)


# -- the layer -------------------------------------------------------------------------------------------------------------

LAYERS = {"v3": nano, "v3-plain-q": lambda: nano(q_lora_rank=None), "qwen2": qwen2, "llama": llama}


@needs_native
@query_dtypes
@dtypes
@pytest.mark.parametrize("name", [*LAYERS, "v3 expanded"])
def test_native_layer_is_the_gathering_one(name, cache_dtype, dtype, monkeypatch):
    """Norm, rotation, what is written to the cache and what comes out; cells of others stay as they are."""
    config, contexts, lens = LAYERS[name.removesuffix(" expanded")](), [0, 37, 12], [5, 1, 30]
    if "expanded" in name:
        monkeypatch.setattr(attention, "EXPAND", -(10**9))
        monkeypatch.setattr(attention, "MOST_EXPANDED", random.choice([1, 10**4, 10**8]))
    model = lively(config).to(dtype)
    attn, h = model.layers[0].self_attn, torch.randn(sum(lens), config.hidden_size).to(dtype)
    cache, meta, _ = scene(config, contexts, lens, cache_dtype)
    rope = model.rope.float()[meta.positions_N]
    other = KVCache(config, cache.data.shape[1], cache.page_size, layers=2, dtype=cache_dtype)
    other.data.copy_(cache.data)
    calls, real = [], paged.attend
    monkeypatch.setattr(paged, "attend", lambda *args: (calls.append(1), real(*args))[1])
    with torch.no_grad():
        got = attn.cached(h, rope, 1, cache, meta)
        in_parts = "expanded" in name and attention.MOST_EXPANDED < 10**6
        assert 1 < len(calls) <= config.num_attention_heads if in_parts else len(calls) == 1
        monkeypatch.setattr(paged, "available", lambda *args: False)
        want = attn.cached(h, rope, 1, other, meta)
    bound = 2e-5 if dtype == torch.float32 == cache_dtype else 2**-6
    torch.testing.assert_close(got.float(), want.float(), atol=bound * float(want.abs().max()), rtol=bound)
    written = torch.zeros(cache.data.shape[1:3], dtype=torch.bool).flatten()
    written[meta.cells_N] = True
    a, b = (c.layers[1].flatten(0, 1) for c in (cache, other))
    torch.testing.assert_close(a[written].float(), b[written].float(), atol=bound * 2, rtol=bound)
    assert torch.equal(a[~written].view(torch.uint8), b[~written].view(torch.uint8)) and written.sum() == sum(lens)
    assert torch.equal(cache.data[0].view(torch.uint8), other.data[0].view(torch.uint8))


@needs_native
def test_prompts_expand_where_that_is_less_work(monkeypatch):
    """Fresh prompts do, chunks of many tokens do, decode and drafts over a long context do not: by multiplications, counted one
    by one. The hidden states are the same to 1e-4. Where few are saved, a whole pass stays one native call."""
    config = nano(kv_lora_rank=64, num_nextn_predict_layers=0, max_position_embeddings=512)
    model, taken, real = lively(config), [], attention.MLA._attend_expanded
    monkeypatch.setattr(attention.MLA, "_attend_expanded", lambda *args: (taken.append(1), real(*args))[1])
    heads, latent, rotary = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    both = config.qk_nope_head_dim + config.v_head_dim

    def worth(multiplications):
        monkeypatch.setattr(attention, "EXPAND", multiplications)
        monkeypatch.setitem(attention.LEAVE, torch.float32, multiplications)

    for contexts, lens in ([0, 0], [40, 3]), ([300, 9], [1, 1]), ([300], [4]), ([90], [80]), ([200, 0, 3], [2, 60, 30]):
        worth(0)
        absorbed = expanded = 0
        for context, length in zip(contexts, lens, strict=True):
            for i in range(length):
                absorbed += heads * ((context + i + 1) * (2 * latent + rotary) + latent * both)
                expanded += heads * (context + i + 1) * (both + rotary)
            expanded += heads * (context + length) * latent * both
        cache, meta, _ = scene(config, contexts, lens, torch.float32)
        cache.layers[0].copy_(cache.layers[1])
        ids, before = torch.tensor(random_ids(sum(lens))), cache.data.clone()
        with torch.no_grad():
            first = model(ids, meta.positions_N, cache, meta)
            assert bool(taken) == (expanded < absorbed and max(lens) > 1)
            cache.data.copy_(before)
            worth(10**12 if taken else -(10**12))
            torch.testing.assert_close(model(ids, meta.positions_N, cache, meta), first, atol=1e-4, rtol=1e-4)
            taken.clear()
            monkeypatch.setattr(attention, "EXPAND", 0)
            monkeypatch.setitem(attention.LEAVE, torch.float32, 2**25)
            model(ids, meta.positions_N, cache, meta)
            assert not taken


@needs_native
@pytest.mark.parametrize("make", [nano, qwen2])
def test_a_table_that_leads_astray_is_refused(make):
    """Pages that are not there, and too few of them, before anything is written."""
    model = lively(make())
    attn, h = model.layers[0].self_attn, torch.randn(3, model.config.hidden_size)
    cache = KVCache(model.config, 6, 4)
    for first_row, context in ([1, 6], 4), ([1, -1], 4), ([1, 2], 8):
        meta = build_meta(torch.tensor([first_row, [0, 3]]), [context, 0], [1, 2], 4)
        with torch.no_grad(), pytest.raises(IndexError):
            attn.cached(h, model.rope[meta.positions_N], 0, cache, meta)
        assert (cache.data == 0).all()


def test_a_table_of_other_integers_is_refused():
    for table in (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.long).T):
        with pytest.raises(ValueError, match="page_table"):
            build_meta(table, [0, 1], None, 4)


@either
def test_live_weights_are_read_anew(path, monkeypatch):
    """An update of a parameter, in place as optimizers do it, shows in the very next call."""
    model = lively(nano())
    if path == "gathered":
        monkeypatch.setattr(paged, "available", lambda *args: False)
    attn, h = model.layers[0].self_attn, torch.randn(4, model.config.hidden_size)

    @torch.no_grad()
    def run(module):
        meta = build_meta(torch.arange(2)[None], [0], [4], 4)
        return module.cached(h, model.rope[meta.positions_N], 0, KVCache(model.config, 2, 4), meta)

    before = run(attn)
    with torch.no_grad():
        attn.kv_b_proj.weight.data.mul_(-1.5)  # past autograd's version counter too
    other = lively(nano())
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(attn), run(other.layers[0].self_attn)) and not torch.allclose(run(attn), before, atol=0.1)


def test_a_packed_weight_is_unpacked_once(monkeypatch):
    model = lively(nano())
    attn, h = model.layers[0].self_attn, torch.randn(4, model.config.hidden_size)
    unpacked, real = [], Fp8Weight.dense
    monkeypatch.setattr(Fp8Weight, "dense", lambda self, dtype: (unpacked.append(dtype), real(self, dtype))[1])

    @torch.no_grad()
    def run(weight):
        del attn.kv_b_proj.weight
        attn.kv_b_proj.weight = weight
        meta = build_meta(torch.arange(2)[None], [0], [4], 4)
        outs = [attn.cached(h, model.rope[meta.positions_N], 0, KVCache(model.config, 2, 4), meta) for _ in range(3)]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[1], outs[2])
        return outs[0]

    shape = attn.kv_b_proj.weight.shape
    weights = [Fp8Weight(*quantise_blocks(torch.randn(shape) * 0.3)) for _ in range(2)]
    outs = [run(w) for w in weights]
    assert unpacked == [torch.float32] * 2  # another weight is another copy
    for packed, out in zip(weights, outs, strict=True):
        torch.testing.assert_close(run(torch.nn.Parameter(real(packed, torch.float32))), out, atol=1e-6, rtol=1e-6)


def test_meta_of_every_kind():
    """What the native kernels and the gathering path are told is one and the same."""
    for _ in range(20):
        contexts, lens = ragged()
        page, per_seq = random.randint(1, 9), 800
        table = torch.randint(50, (len(lens), per_seq))
        meta = build_meta(table, random.choice([list, torch.tensor])(contexts), lens, page)
        positions = [c + i for c, n in zip(contexts, lens, strict=True) for i in range(n)]
        owners = [s for s, n in enumerate(lens) for _ in range(n)]
        assert meta.positions_N.tolist() == positions and meta.sequence_N.tolist() == owners
        assert meta.cells_N.tolist() == [table[s, p // page] * page + p % page for s, p in zip(owners, positions, strict=True)]
        assert meta.starts.tolist() == [sum(lens[:s]) for s in range(len(lens) + 1)]
        assert meta.max_context == max(c + n for c, n in zip(contexts, lens, strict=True)) and meta.max_query == max(lens)


@pytest.mark.skipif(platform.machine() != "x86_64" or find_compiler() is None, reason="compiles for other x86 processors")
@pytest.mark.parametrize("flags", [["-march=x86-64-v3"], ["-march=x86-64"]], ids=["avx2", "plain"])
def test_other_processors(flags, tmp_path, monkeypatch):
    """The same kernel in narrower vectors, and without AVX."""
    if flags == ["-march=x86-64-v3"] and not {"avx2", "fma"} <= cpu_info()["flags"]:
        pytest.skip("no AVX2 here")
    kept, built = [f for f in native.FLAGS if f not in ("-O3", "-march=native")], str(tmp_path / "built.so")
    source = str(native.HERE / "attention.cpp")
    subprocess.run([find_compiler(), "-O1", *flags, *kept, "-shared", source, "-o", built], check=True)
    monkeypatch.setattr(native, "library", lambda: ctypes.CDLL(built))
    monkeypatch.setattr(paged, "_functions", functools.cache(paged._functions.__wrapped__))
    for make in (mla_config, gqa_config) * 2:
        config, (contexts, lens) = make(), ragged()
        heads = heads_of(config)
        for dtype in (torch.float32, torch.bfloat16):
            cache, meta, kept_cells = scene(config, contexts, lens, dtype)
            q = torch.randn(sum(lens), heads.heads, heads.plain + heads.rotary).to(dtype)
            near(attend("native", heads, q, cache, meta), reference(heads, q, kept_cells, contexts, lens), kept_cells, dtype)


@needs_native
def test_gradients_take_the_gathering_path():
    model = lively(random.choice([nano, qwen2])())
    meta = build_meta(torch.arange(3)[None], [0], [9], 4)
    hidden = model(torch.tensor(random_ids(9)), meta.positions_N, KVCache(model.config, 3, 4), meta)
    hidden.square().sum().backward()
    assert all(block.self_attn.o_proj.weight.grad.abs().max() > 0 for block in model.layers)
