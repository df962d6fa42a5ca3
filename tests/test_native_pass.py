"""A pass as one native call against the same pass block by block, on random networks and page tables."""

import copy
import random

import numpy as np
import pytest
import torch
from nets import lively, llama, nano, qwen2, random_ids

from jevons.engine.drafts import Drafts
from jevons.engine.rows import Rows
from jevons.engine.sampler import sample, uniform
from jevons.engine.scheduler import Sequence
from jevons.engine.speculation import Speculation
from jevons.engine.types import Request
from jevons.model import KVCache, build_meta
from jevons.model.cache import cache_width
from jevons.model.pack import pack, settle
from jevons.numerics import kernels
from jevons.numerics import native as native_module

PAGE = 8
V3 = dict(intermediate_size=64)  # packed integers are cut at multiples of 16 rows
NETS = {
    "v3": lambda: nano(**V3),
    "wide": lambda: nano(**V3, hidden_size=144, num_attention_heads=5, qk_nope_head_dim=40, kv_lora_rank=136, v_head_dim=72),
    "ungrouped": lambda: nano(**V3, n_group=1, topk_group=1, n_routed_experts=6, num_experts_per_tok=3),
    "softmax": lambda: nano(**V3, architecture="DeepseekV2ForCausalLM", scoring_func="softmax",
                            topk_method="group_limited_greedy", norm_topk_prob=False),
    "no q rank": lambda: nano(**V3, q_lora_rank=None),
    "no shared": lambda: nano(**V3, n_shared_experts=0),
    "no mixture": lambda: nano(**V3, first_k_dense_replace=9),
    "qwen2": qwen2,
    "tied llama": lambda: llama(tie_word_embeddings=True),
}
TOLERANCE = {None: 1e-5, "bf16": 3e-2, "int8": 3e-2, "fp8": 3e-2, "int4": 3e-2}  # of the hidden states' norm


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if native_module.library() is None:
        pytest.skip(native_module.why_not())


class Both:
    """The same calls over two caches, natively and block by block."""

    def __init__(self, model, cell=torch.float32, sequences=3):
        self.model, self.contexts = model, [0] * sequences
        self.caches = [KVCache(model.config, 24, PAGE, dtype=cell) for _ in range(2)]
        self.table = torch.randperm(24)[: sequences * 6].view(sequences, 6)

    @torch.inference_mode()
    def __call__(self, lens):
        meta = build_meta(self.table, torch.tensor(self.contexts), lens, PAGE)
        tokens = torch.tensor(random_ids(len(meta.positions_N), self.model.config.vocab_size))
        fast = self.model.native(None, tokens, meta.positions_N, self.model.rope, self.caches[0], meta)
        plain = by_blocks(self.model, tokens, meta, self.caches[1])
        self.contexts = [c + n for c, n in zip(self.contexts, lens or [1] * len(self.contexts), strict=True)]
        return fast, plain


def by_blocks(model, tokens, meta, cache):
    x, rope = model.embed_tokens(tokens), model.rope[meta.positions_N]
    for index, block in enumerate(model.layers):
        x, _ = block(x, lambda attn, h, index=index: attn.cached(h, rope, index, cache, meta))
    return model.norm(x)


def far(a, b):
    return ((a - b).float().norm() / b.float().norm()).item()


def near(a, b, kind):
    """Rows are the same. In bf16 one rounding more may choose another expert where two are equally good: all but one, or a
    sixth, are then."""
    off = (a - b).float().norm(dim=-1) / b.float().norm(dim=-1) >= TOLERANCE[kind]
    return a.dtype == b.dtype and off.sum() <= (max(1, len(off) // 6) if kind else 0)


@pytest.mark.parametrize("kind", [None, "bf16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("net", NETS)
def test_a_pass_equals_its_blocks(net, kind):
    model = lively(NETS[net]())
    if kind:
        pack(model, kind)
    both = Both(model, random.choice([torch.float32, torch.bfloat16]) if kind else torch.float32)
    outs = [both(lens) for lens in ([random.randint(1, 9) for _ in range(3)], None, None, [2, 1, 3], None)]
    assert near(*(torch.cat(side) for side in zip(*outs, strict=True)), kind)
    fast, plain = (cache.data[:, both.table.flatten()].float() for cache in both.caches)
    written = plain.abs().sum(-1) > 0
    assert torch.equal(fast.abs().sum(-1) > 0, written) and near(fast[written], plain[written], kind)


@pytest.mark.parametrize("rows", [1, 2, 7, 33, 100])
def test_any_number_of_rows(rows):
    model = lively(NETS["wide"]())
    with torch.inference_mode():
        tables = torch.randperm(2 * rows).view(rows, 2)
        contexts = torch.randint(0, 9, (rows,))
        meta, tokens = build_meta(tables, contexts, None, PAGE), torch.tensor(random_ids(rows))
        caches = [KVCache(model.config, 2 * rows, PAGE) for _ in range(2)]
        cells = torch.randn_like(caches[0].data)
        for cache in caches:
            cache.data.copy_(cells)
        fast = model.native(None, tokens, meta.positions_N, model.rope, caches[0], meta)
        plain = by_blocks(model, tokens, meta, caches[1])
    assert far(fast, plain) < 1e-5 and far(*(cache.data for cache in caches)) < 1e-5


@pytest.mark.parametrize("kind", [None, "bf16", "int8"])
def test_the_mtp_module(kind, monkeypatch):
    model = lively(NETS["v3"]())
    if kind:
        pack(model, kind)
    with torch.inference_mode():
        meta = build_meta(torch.randperm(24)[:12].view(3, 4), [0, 0, 0], [5, 1, 8], PAGE)
        hidden = torch.randn(14, model.config.hidden_size, dtype=model.embed_tokens.weight.dtype)
        before, tokens = hidden.clone(), torch.tensor(random_ids(14))
        caches = [KVCache(model.config, 24, PAGE, layers=1) for _ in range(2)]
        fast = model.forward_mtp(hidden, tokens, meta.positions_N, caches[0], meta)
        assert torch.equal(hidden, before)
        monkeypatch.setattr(model, "native_mtp", [lambda *_: None])
        plain = model.forward_mtp(hidden, tokens, meta.positions_N, caches[1], meta)
    assert near(fast, plain, kind) and far(*(c.data for c in caches)) < TOLERANCE[kind]


def test_weights_that_move_are_followed():
    model = lively(NETS["v3"]())
    both = Both(model)
    assert far(*both([3, 1, 2])) < 1e-5
    with torch.no_grad():  # a trainer's step; then tensors of their own, then another form
        for p in model.parameters():
            p.mul_(1.1)
        assert far(*both(None)) < 1e-5
        model.layers[1].mlp.experts.down_proj.data = torch.randn_like(model.layers[1].mlp.experts.down_proj)
        model.layers[0].self_attn.o_proj.weight = torch.nn.Parameter(torch.randn_like(model.layers[0].self_attn.o_proj.weight))
        model.layers[1].mlp.gate.e_score_correction_bias = torch.randn(model.config.n_routed_experts)
    assert far(*both(None)) < 1e-5
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.norm.weight.mul_(2)
    assert far(*both(None)) < 1e-5
    pack(model, "int8")
    assert far(*both(None)) < 0.03


def test_where_it_may_not_run():
    model = lively(NETS["v3"]())
    meta = build_meta(torch.arange(6)[None], [0], [3], PAGE)
    cache, tokens = KVCache(model.config, 6, PAGE), torch.tensor([1, 2, 3])

    def native():
        return model.native(None, tokens, meta.positions_N, model.rope, cache, meta)

    assert native() is None  # gradients are recorded
    with torch.no_grad():
        assert native() is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert native() is None
        model.layers[0].self_attn.o_proj.to(torch.bfloat16)
        assert native() is None


@torch.inference_mode()
def test_what_lies_outside_is_refused():
    model = lively(NETS["v3"]())
    cache = KVCache(model.config, 4, PAGE)
    for table, tokens, context in (([0, 9], [1], 9), ([0], [1], 8), ([0, 1], [48], 0), ([0, 1], [-1], 0),
                                   ([0] * 99, [1], model.config.max_position_embeddings)):
        meta = build_meta(torch.tensor([table]), [context], None, PAGE)
        with pytest.raises(IndexError):
            model(torch.tensor(tokens), meta.positions_N, cache, meta)


@pytest.mark.parametrize("vocab", [1, 15, 48, 1000])
def test_tokens_are_drawn_as_the_sampler_draws_them(vocab):
    logits = torch.randn(400, vocab) * 4
    if vocab > 15:
        logits[torch.rand_like(logits) < 0.2] = -torch.inf
        logits[:, vocab // 2] = logits[:, vocab // 3] = 9.0  # of equals the first
    heat = torch.where(torch.rand(400) < 0.3, 0.0, torch.rand(400) * 2 + 0.1)
    top_p = torch.where(torch.rand(400) < 0.5, 1.0, torch.rand(400))
    top_p[torch.rand(400) < 0.1] = 1e-30
    seeds, positions = np.random.randint(0, 2**63, 400).astype(np.uint64) * np.uint64(2), torch.randint(0, 10**6, (400,))
    with torch.inference_mode():
        tokens, logprobs = kernels.draw(logits, heat, top_p, seeds, positions)
    noise = torch.from_numpy(uniform(seeds, positions.numpy().astype(np.uint64)))
    expected, wanted = sample(logits, heat, top_p, noise)
    same = tokens == expected
    assert same[heat == 0].all() and same.float().mean() > 0.99  # a draw on the border of two tokens may go either way
    assert torch.allclose(logprobs[same], wanted[same], atol=2e-5)


@torch.inference_mode()
def test_a_damaged_row_is_told_apart():
    logits = torch.randn(3, 40)
    logits[1, 7], logits[2, 3] = torch.nan, torch.inf
    _, logprobs = kernels.draw(logits, torch.tensor([0.0, 1.0, 0.0]), torch.ones(3), np.zeros(3, np.uint64), torch.arange(3))
    assert logprobs[0].isfinite() and logprobs[1:].isnan().all()


@pytest.mark.parametrize("kind", [None, "bf16", "fp8"])
@pytest.mark.parametrize("net", ["v3", "qwen2", "tied llama"])
def test_settled_weights_are_the_same_ones(net, kind):
    model = lively(NETS[net]())
    if kind:
        pack(model, kind)
    both, before = Both(model), model.lm_head.weight
    assert not settle(model, 100) and model.lm_head.weight is before
    settled = copy.deepcopy(model)
    assert settle(settled, 2**30)
    tied = settled.lm_head.weight is settled.embed_tokens.weight
    assert tied == (model.lm_head.weight is model.embed_tokens.weight)
    meta = build_meta(both.table, [0, 0, 0], [4, 2, 5], PAGE)
    tokens = torch.tensor(random_ids(11))
    with torch.inference_mode():
        pairs = zip((model, settled), both.caches, strict=True)
        outs = [m.logits(m(tokens, meta.positions_N, cache, meta)) for m, cache in pairs]
    assert torch.equal(*outs)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("kind", [None, "bf16", "int8"])
def test_threads_do_not_change_a_bit(kind, rows):
    """Wide enough that threads share every product."""
    model = lively(nano(hidden_size=1024, intermediate_size=1024, moe_intermediate_size=256, num_attention_heads=8,
                        qk_nope_head_dim=64, kv_lora_rank=256, v_head_dim=64, max_position_embeddings=640))
    if kind:
        pack(model, kind)
    outs, threads = [], torch.get_num_threads()
    tables, tokens = torch.randperm(rows * 16).view(rows, 16), torch.tensor(random_ids(rows))
    cells = torch.randn(model.config.num_hidden_layers, rows * 16, 32, 256 + model.config.qk_rope_head_dim)
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            with torch.inference_mode():
                meta, cache = build_meta(tables, torch.full((rows,), 500), None, 32), KVCache(model.config, rows * 16, 32)
                cache.data.copy_(cells)
                outs.append(model.native(None, tokens, meta.positions_N, model.rope, cache, meta))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[1], outs[2])


class Drawing:
    """The engine's rows with random parameters, over random pages."""

    def __init__(self, model, count):
        self.model, self.rows = model, Rows(count, 6, torch.device("cpu"))
        self.rows.table.copy_(torch.randperm(6 * count).view(count, 6))
        self.rows.temperature.copy_(torch.where(torch.rand(count) < 0.5, 0.0, torch.rand(count) + 0.1))
        self.rows.seed[:] = np.random.randint(0, 2**63, count).astype(np.uint64) * np.uint64(2)
        self.rows.top_p.copy_(torch.where(torch.rand(count) < 0.5, 1.0, 0.7))

    def caches(self, layers=None):
        cells = torch.randn(layers or self.model.config.num_hidden_layers, self.rows.table.numel(), PAGE,
                            cache_width(self.model.config))
        out = [KVCache(self.model.config, self.rows.table.numel(), PAGE, layers=layers) for _ in range(2)]
        for cache in out:
            cache.data.copy_(cells)
        return out


@pytest.mark.parametrize("kind", [None, "bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("net", ["v3", "no shared", "qwen2", "tied llama"])
@torch.inference_mode()
def test_a_step_draws_what_the_parts_draw(net, kind, monkeypatch):
    """Some consecutive rows with one token or several: states, logits, cells and tokens as with pass, head and sampler. Some of
    the tokens may be all that is drawn after."""
    model = lively(NETS[net]())
    if kind:
        pack(model, kind)
    drawing, first, counts = Drawing(model, 4), 1, random.choices([1, 2, 5], k=2)
    caches, contexts = drawing.caches(), random.choices(range(40), k=2)
    given = first, random_ids(sum(counts)), counts, contexts
    picked = random.choice([None, None, [], sorted(random.sample(range(sum(counts)), random.randint(1, sum(counts))))])
    fast = drawing.rows.step(model, caches[0], *given, picked=picked)
    monkeypatch.setattr(drawing.rows, "native", None)
    monkeypatch.setattr(model, "native", lambda *_: None)
    plain = drawing.rows.step(model, caches[1], *given, picked=picked)
    assert fast[0].shape == plain[0].shape and fast[1].shape == plain[1].shape and len(fast[1]) == len(fast[2]) == len(fast[3])
    assert near(fast[0], plain[0], kind) and (picked == [] or near(fast[1], plain[1], kind))
    assert far(*(c.data for c in caches)) < TOLERANCE[kind]
    drawn_after = [(row + first, c + i + 1) for row, (c, n) in enumerate(zip(contexts, counts, strict=True)) for i in range(n)]
    if picked is not None:
        drawn_after = [drawn_after[at] for at in picked]
    if drawn_after:
        flat = drawing.rows.choose(fast[1], *map(torch.tensor, zip(*drawn_after, strict=True)))
        assert fast[2] == flat[0].tolist() and fast[3] == flat[1].tolist()


@pytest.mark.parametrize("kind", [None, "bf16", "int8"])
@torch.inference_mode()
def test_drafts_are_drawn_as_module_by_module(kind, monkeypatch):
    """Sequences that were given one token or several, in any order of rows, and want none, one or more drafts; prompts, which
    are in no row yet, want none."""
    model = lively(nano(**V3, vocab_size=5))
    if kind:
        pack(model, kind)
    same = total = 0
    for _ in range(12):
        drawing, count = Drawing(model, 8), 3
        rows, counts = random.sample(range(5), count), random.choices([1, 2, 4], k=count)
        starts = random.choices(range(1, 30), k=count)
        hidden = torch.randn(sum(counts) + 2, model.config.hidden_size, dtype=model.embed_tokens.weight.dtype)
        parts, at = [], 1
        for i in range(count):
            sequence = Sequence(Request(random_ids(starts[i], 5)), 48, i, random_ids(starts[i] + counts[i] + 1, 5))
            sequence.row, sequence.pages = rows[i], drawing.rows.table[rows[i]].tolist()
            sequence.limit = sequence.produced + random.randint(1, 5)
            if random.random() < 0.3:
                sequence.row = None
            parts.append((sequence, starts[i], counts[i], at + counts[i] - 1))
            at += counts[i]
        caches = drawing.caches(1)
        both = [Drafts(model, drawing.rows, Speculation(3), cache) for cache in caches]
        for drafts in both:
            drafts.update((part[0], []) for part in parts)
        monkeypatch.setattr(both[0], "_by_layers", None)
        monkeypatch.setattr(both[1], "_natively", lambda *_: False)
        for drafts in both:
            drafts.make(hidden, parts, 5)
        assert [len(d) for d in both[0].values()] == [0 if s.row is None else min(3, s.limit - s.produced - 1) for s, *_ in parts]
        same += sum(a == b for a, b in zip(both[0].values(), both[1].values(), strict=True))
        total += count
        if both[0] == both[1]:
            assert far(*(c.data for c in caches)) < TOLERANCE[kind]
    assert same >= total * (0.6 if kind else 0.95)  # two logits that nearly tie
