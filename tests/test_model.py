"""The network against its formulas: attention by plain loops in float64, and every cached path against the uncached one.

Formulas: DeepSeek-V3 report, section 2.1.1; the interleaved pairs of its RoPE are those of the published weights.
"""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from nets import DENSE, lively, llama, nano, plain_hidden, plain_logits, qwen2, random_ids
from torch.autograd import gradcheck

from jevons.config import ModelConfig, preset
from jevons.data.packing import pack
from jevons.model import KVCache, attention, build_meta, build_model
from jevons.train.objective import mtp_loss

CONFIGS = {"v3": nano, "v3-plain-q": lambda: nano(q_lora_rank=None), "qwen2": qwen2, "llama": llama}


def rope_angles(position, dim, theta):
    return [position * theta ** (-2 * i / dim) for i in range(dim // 2)]


def rms_norm(x, weight, eps):
    return x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + eps) * weight


def causal_softmax(q, k, v, scale):
    """One head, row by row: [L, d], [L, d], [L, v] -> [L, v]."""
    rows = []
    for i in range(len(q)):
        scores = torch.stack([q[i] @ k[j] for j in range(i + 1)]) * scale
        weights = (scores - scores.max()).exp()
        rows.append((weights / weights.sum()) @ v[: i + 1])
    return torch.stack(rows)


def mla_reference(weights, h, config):
    """[L, D] -> [L, D] in float64 from the published tensors."""
    c, eps = config, config.rms_norm_eps
    w = {name: t.double() for name, t in weights.items()}

    def interleaved(x, position):
        out = x.clone()
        for i, a in enumerate(rope_angles(position, len(x), c.rope_theta)):
            turned = complex(x[2 * i], x[2 * i + 1]) * complex(math.cos(a), math.sin(a))
            out[2 * i], out[2 * i + 1] = turned.real, turned.imag
        return out

    if c.q_lora_rank:
        low = [rms_norm(w["q_a_proj.weight"] @ x, w["q_a_layernorm.weight"], eps) for x in h]
        queries = [w["q_b_proj.weight"] @ x for x in low]
    else:
        queries = [w["q_proj.weight"] @ x for x in h]
    compressed = [w["kv_a_proj_with_mqa.weight"] @ x for x in h]
    latents = [w["kv_b_proj.weight"] @ rms_norm(x[: c.kv_lora_rank], w["kv_a_layernorm.weight"], eps) for x in compressed]
    k_rope = [interleaved(x[c.kv_lora_rank :], i) for i, x in enumerate(compressed)]
    heads = []
    for head in range(c.num_attention_heads):
        own = c.qk_nope_head_dim + c.qk_rope_head_dim
        q = [x[head * own : (head + 1) * own] for x in queries]
        q = [torch.cat([x[: c.qk_nope_head_dim], interleaved(x[c.qk_nope_head_dim :], i)]) for i, x in enumerate(q)]
        both = c.qk_nope_head_dim + c.v_head_dim
        kv = [x[head * both : (head + 1) * both] for x in latents]
        k = [torch.cat([x[: c.qk_nope_head_dim], r]) for x, r in zip(kv, k_rope, strict=True)]
        v = torch.stack([x[c.qk_nope_head_dim :] for x in kv])
        heads.append(causal_softmax(q, k, v, own**-0.5))
    return torch.cat(heads, dim=1) @ w["o_proj.weight"].T


def gqa_reference(weights, h, config):
    """[L, D] -> [L, D] in float64 from the published tensors."""
    w = {name: t.double() for name, t in weights.items()}
    d = config.per_head_dim

    def project(name, index, position=None):
        rows = slice(index * d, (index + 1) * d)
        x = w[f"{name}.weight"][rows] @ h[len(out)] + (w[f"{name}.bias"][rows] if config.attention_bias else 0)
        if position is None:
            return x
        turned = x.clone()
        for i, a in enumerate(rope_angles(position, d, config.rope_theta)):
            turned[i] = x[i] * math.cos(a) - x[i + d // 2] * math.sin(a)
            turned[i + d // 2] = x[i + d // 2] * math.cos(a) + x[i] * math.sin(a)
        return turned

    heads = []
    for head in range(config.num_attention_heads):
        shared = head // (config.num_attention_heads // config.kv_heads)
        columns = []
        for name, index, turns in (("q_proj", head, True), ("k_proj", shared, True), ("v_proj", shared, False)):
            out = []
            for position in range(len(h)):
                out.append(project(name, index, position if turns else None))
            columns.append(out)
        q, k, v = columns
        heads.append(causal_softmax(q, k, torch.stack(v), d**-0.5))
    return torch.cat(heads, dim=1) @ w["o_proj.weight"].T


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_the_papers(name):
    """Both paths of one layer, at sequence lengths where pages and rows end unevenly."""
    config = CONFIGS[name]()
    model = lively(config)
    prefix = "model.layers.0.self_attn."
    weights = {n.removeprefix(prefix): t for n, t in model.hf_state_dict().items() if n.startswith(prefix)}
    attn, length = model.layers[0].self_attn, random.randint(9, 14)
    h = torch.randn(length, config.hidden_size)
    expected = (mla_reference if config.is_deepseek else gqa_reference)(weights, h.double(), config)
    assert expected.std() > 0.1
    rope, cache = model.rope[:length], KVCache(config, 5, 4)
    with torch.no_grad():
        expanded = attn.expanded(h, rope, [(1, length)])
        meta = build_meta(torch.randperm(5)[None], [0], [length], 4)
        cached = attn.cached(h, rope, 1, cache, meta)
    for got in (expanded, cached):
        torch.testing.assert_close(got.double(), expected, atol=3e-5, rtol=1e-4)
    assert (cache.data[0] == 0).all()  # the layer asked for, and no other


def pieces_of(ids, most):
    out = []
    while ids:
        size = random.randint(1, most)
        out.append(ids[:size])
        ids = ids[size:]
    return out


def run_cached(model, sequences, pieces, paged):
    """Every sequence through the cache piece by piece (those with most pieces first): hidden states [L, D] of each."""
    page, most = random.choice([3, 8]), max(len(s) for s in sequences)
    per_seq = -(-most // page) + random.randrange(2)
    extra = random.randrange(4)
    cache = KVCache(model.config, len(sequences) * per_seq + extra, page)
    cache.data.normal_().mul_(50)  # whatever a freed page holds must not matter
    table = torch.arange(len(sequences) * per_seq).view(len(sequences), per_seq) + extra
    if paged:
        table = torch.randperm(cache.data.shape[1])[: table.numel()].view_as(table)
    outs, done = [[] for _ in sequences], [0] * len(sequences)
    for turn in range(len(pieces[0])):
        active = [s for s in range(len(sequences)) if turn < len(pieces[s])]
        if paged:
            random.shuffle(active)
        now = [pieces[s][turn] for s in active]
        lens = [len(p) for p in now]
        meta = build_meta(table[active], [done[s] for s in active], None if set(lens) == {1} else lens, page)
        with torch.no_grad():
            hidden = model(torch.tensor([i for p in now for i in p]), meta.positions_N, cache, meta)
        for s, part in zip(active, hidden.split(lens), strict=True):
            outs[s].append(part)
            done[s] += len(part)
    return [torch.cat(parts) for parts in outs]


@pytest.mark.parametrize("paged", [False, True], ids=["in order", "paged"])
@pytest.mark.parametrize("how", ["prefill", "chunks", "one by one", "prompt, then one by one"])
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_is_uncached(name, how, paged):
    model = lively(CONFIGS[name]())
    lengths = [random.randint(1, 40) for _ in range(random.randint(2, 5))]
    sequences = [random_ids(n) for n in lengths]
    if how == "prefill":
        pieces = [[s] for s in sequences]
    elif how == "chunks":
        pieces = [pieces_of(s, 9) for s in sequences]
    elif how == "one by one":
        pieces = [[[i] for i in s] for s in sequences]
    else:
        cuts = [random.randint(1, n) for n in lengths]
        pieces = [[s[:cut], *([i] for i in s[cut:])] for s, cut in zip(sequences, cuts, strict=True)]
    order = sorted(range(len(sequences)), key=lambda s: -len(pieces[s]))
    sequences, pieces = [sequences[s] for s in order], [pieces[s] for s in order]
    with torch.no_grad():
        expected = plain_hidden(model, sequences)[1]
    for got, want in zip(run_cached(model, sequences, pieces, paged), expected, strict=True):
        assert want.std() > 0.3
        torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["v3", "qwen2"])
def test_rows_see_their_own_past_only(name):
    model = lively(CONFIGS[name]())
    rows, length = 3, 12
    tokens = torch.randint(48, (rows, length))
    changed, row, at = tokens.clone(), random.randrange(rows), random.randrange(1, length)
    changed[row, at] = (changed[row, at] + 1) % 48
    with torch.no_grad():
        a, b = (model.forward_train(t.flatten(), torch.arange(length).repeat(rows), [(rows, length)]).hidden_ND.view(
            rows, length, -1) for t in (tokens, changed))
    moved = (a - b).abs().amax(-1) > 1e-5
    expected = torch.zeros(rows, length, dtype=torch.bool)
    expected[row, at:] = True
    assert (moved == expected).all()


@pytest.mark.parametrize("config", [nano(), qwen2()], ids=["v3", "qwen2"])
def test_short_rows_attend_as_long_ones(config, monkeypatch):
    """The native pass or `ShortCausalAttention`, and torch's attention for long rows: forward and backward, any width of V."""
    model = lively(config)
    ids = [random_ids(random.randint(2, 20)) for _ in range(3)]
    results = []
    for limit in (attention.heads.SHORT_ROW, 0):
        monkeypatch.setattr(attention.heads, "SHORT_ROW", limit)
        model.zero_grad()
        hidden = plain_hidden(model, ids)[0].hidden_ND
        (hidden * torch.linspace(-1, 1, hidden.shape[1])).sum().backward()
        results.append([hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 10
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max() + 1), rtol=1e-3)


def short_inputs(batch, length, width, v_width, dtype):
    q, k = (torch.randn(batch, length, width, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, length, v_width, dtype=dtype)
    bias = torch.full((length, length), float("-inf"), dtype=dtype).triu_(1)
    return [t.requires_grad_() for t in (q, k, v)], bias


@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_attention_gradients(length):
    inputs, bias = short_inputs(2, length, 3, 2, torch.float64)
    assert gradcheck(lambda q, k, v: attention.ShortCausalAttention.apply(q, k, v, bias, 0.7), inputs)


@pytest.mark.parametrize("v_width", [8, 5, 11])
def test_short_attention_is_torchs(v_width):
    inputs, bias = short_inputs(3, random.randint(2, 30), 8, v_width, torch.float64)
    scale = random.uniform(0.1, 1.0)
    ours = attention.ShortCausalAttention.apply(*inputs, bias, scale)
    theirs = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=scale)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    grad = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_short_attention_in_bf16():
    """Scores, probabilities and outputs each round once: a few times 2^-8 of the largest value."""
    inputs, bias = short_inputs(4, 60, 16, 12, torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in inputs]
    out = attention.ShortCausalAttention.apply(*inputs, bias, 0.25)
    want = F.scaled_dot_product_attention(*exact, is_causal=True, scale=0.25)
    assert out.dtype == torch.bfloat16
    grad = torch.randn_like(want).bfloat16()
    gradients = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(want, exact, grad.float())
    for got, expected in [(out, want), *zip(*gradients, strict=True)]:
        assert got.dtype == torch.bfloat16
        error = (got.float() - expected).abs()
        assert error.max() < 8 * 2**-8 * expected.abs().max()
        assert error.pow(2).mean().sqrt() < 2 * 2**-8 * expected.pow(2).mean().sqrt()


def test_training_in_bf16_stays_near_float32():
    model, ids = lively(nano()), [random_ids(30), random_ids(11)]
    with torch.no_grad():
        want = plain_hidden(model, ids)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = plain_hidden(model, ids)[0]
    same = want.load_RE.eq(got.load_RE).all()  # one routing choice may turn over
    error = (got.hidden_ND.float() - want.hidden_ND).pow(2).mean().sqrt() / want.hidden_ND.pow(2).mean().sqrt()
    assert error < (0.05 if same else 0.4)
    assert not torch.equal(got.hidden_ND.float(), want.hidden_ND)


# -- multi-token prediction ----------------------------------------------------------------------------------------------


def test_mtp_over_its_own_cache():
    """What training sees is what speculation will: h_i with the embedding of t_{i+1}, at position i."""
    model = lively(nano())
    ids = random_ids(23)
    with torch.no_grad():
        out = plain_hidden(model, [ids])[0]
        cache = KVCache(model.config, 4, 8, layers=1)
        table, done, parts = torch.randperm(4)[None], 0, []
        for piece in pieces_of(list(range(len(ids) - 1)), 7):
            meta = build_meta(table, [done], [len(piece)], 8)
            following = torch.tensor([ids[i + 1] for i in piece])
            parts.append(model.forward_mtp(out.hidden_ND[piece], following, meta.positions_N, cache, meta))
            done += len(piece)
    torch.testing.assert_close(torch.cat(parts), out.mtp_hidden_ND[:-1], atol=2e-4, rtol=2e-4)


def test_mtp_reads_embedding_then_hidden():
    """The published order of `eh_proj`, each half under its own norm."""
    model = lively(nano())
    layer, c = model.mtp[0], model.config
    hidden, embed = torch.randn(5, c.hidden_size), torch.randn(5, c.hidden_size)
    with torch.no_grad():
        for i in range(5):
            parts = [rms_norm(embed[i].double(), layer.enorm.weight.double(), c.rms_norm_eps),
                     rms_norm(hidden[i].double(), layer.hnorm.weight.double(), c.rms_norm_eps)]
            expected = layer.eh_proj.weight.double() @ torch.cat(parts)
            torch.testing.assert_close(layer.merge(hidden, embed)[i].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("detached", [False, True])
def test_detached_mtp_teaches_only_itself(detached):
    model = lively(nano())
    batch = pack([(random_ids(n), [1.0] * n) for n in (9, 12, 4)], 0)
    out = model.forward_train(batch.tokens_N, batch.positions_N, batch.segments, detach_trunk=detached)
    mtp_loss(model, out, batch, detach_head=detached).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    own = {name for name, _ in model.named_parameters() if name.startswith("mtp.")}
    assert own <= moved
    assert moved == own if detached else {"embed_tokens.weight", "lm_head.weight", "layers.0.self_attn.o_proj.weight"} <= moved


def test_without_mtp_the_trunk_is_the_same():
    model, ids = lively(nano()), [random_ids(8), random_ids(3)]
    with torch.no_grad():
        a, b = plain_hidden(model, ids)[0], plain_hidden(model, ids, mtp=False)[0]
    assert torch.equal(a.hidden_ND, b.hidden_ND) and b.mtp_hidden_ND is None
    assert len(a.load_RE) == len(b.load_RE) + 1 == len(model.routers())


# -- published names -----------------------------------------------------------------------------------------------------


def v3_names(c):
    """Section 1.6 of the published weights' description, spelt out."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for layer in range(c.num_hidden_layers + 1):
        own = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        own += [f"self_attn.{n}.weight" for n in ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa",
                                                  "kv_a_layernorm", "kv_b_proj", "o_proj")]
        three = [f"{p}_proj.weight" for p in ("gate", "up", "down")]
        if layer < c.first_k_dense_replace:
            own += [f"mlp.{n}" for n in three]
        else:
            own += ["mlp.gate.weight", "mlp.gate.e_score_correction_bias"]
            own += [f"mlp.experts.{e}.{n}" for e in range(c.n_routed_experts) for n in three]
            own += [f"mlp.shared_experts.{n}" for n in three]
        if layer == c.num_hidden_layers:
            own += [f"{n}.weight" for n in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "embed_tokens", "shared_head.head")]
        names += [f"model.layers.{layer}.{n}" for n in own]
    return names


def test_published_names_of_v3():
    config = preset("v3-tiny")
    state = build_model(config, seed=1).hf_state_dict()
    expected = v3_names(config)
    assert len(expected) == len(set(expected)) and set(state) == set(expected)
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    shapes = {"model.layers.1.self_attn.kv_a_proj_with_mqa.weight": (latent + 32, 128), "lm_head.weight": (512, 128),
              "model.layers.2.self_attn.kv_b_proj.weight": (heads * 64, latent), "model.layers.4.eh_proj.weight": (128, 256),
              "model.layers.0.mlp.down_proj.weight": (128, 384), "model.layers.3.mlp.experts.7.up_proj.weight": (64, 128),
              "model.layers.2.mlp.experts.0.down_proj.weight": (128, 64), "model.layers.1.mlp.gate.weight": (8, 128)}
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize("name", [*CONFIGS, "tied"])
def test_round_trip_by_published_names(name):
    config = qwen2(tie_word_embeddings=True) if name == "tied" else CONFIGS[name]()
    model, other = lively(config), lively(config)
    state = {n: t.clone() for n, t in model.hf_state_dict().items()}
    assert len({t.data_ptr() for t in model.hf_state_dict().values()}) >= len(state) - 2  # views, one place each
    other.load_hf_state_dict(state)
    for (n, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), n
    for a, b in zip(model.routers(), other.routers(), strict=True):
        assert torch.equal(a.e_score_correction_bias, b.e_score_correction_bias)
    ids = random_ids(7)
    assert torch.equal(plain_logits(model, ids), plain_logits(other, ids))


def test_loading_is_strict():
    model = lively(nano())
    before = {n: p.clone() for n, p in model.named_parameters()}
    good = {n: torch.randn_like(t) for n, t in model.hf_state_dict().items()}
    mtp = f"model.layers.{model.config.num_hidden_layers}."
    good[f"{mtp}embed_tokens.weight"] = good["model.embed_tokens.weight"]
    good[f"{mtp}shared_head.head.weight"] = good["lm_head.weight"]
    optional = {f"{mtp}embed_tokens.weight", f"{mtp}shared_head.head.weight"}
    name = random.choice([n for n in good if n not in optional and n not in ("model.embed_tokens.weight", "lm_head.weight")])
    wrong = torch.zeros(good[name].shape[0] + 1, *good[name].shape[1:])
    for bad, error in [({n: t for n, t in good.items() if n != name}, KeyError),
                       (good | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, KeyError),
                       (good | {name: wrong}, ValueError),
                       (good | {f"{mtp}embed_tokens.weight": good["model.embed_tokens.weight"] + 1}, ValueError),
                       (good | {f"{mtp}shared_head.head.weight": good["lm_head.weight"].flip(0)}, ValueError)]:
        with pytest.raises(error):
            model.load_hf_state_dict(bad)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # nothing half loaded
    model.load_hf_state_dict({n: t for n, t in good.items() if n not in optional})
    assert all(torch.equal(t, good[n]) for n, t in model.hf_state_dict().items())


def test_tied_head_must_be_the_embedding():
    model = lively(qwen2(tie_word_embeddings=True))
    state = {n: t.clone() for n, t in model.hf_state_dict().items()}
    assert "lm_head.weight" not in state
    model.load_hf_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()})
    with pytest.raises(ValueError, match="lm_head"):
        model.load_hf_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"] * 2})


def test_matrix_parts_are_the_published_matrices():
    """Each published hidden matrix is one part; embedding, head, gates and vectors are none."""
    for make in CONFIGS.values():
        model = lively(make())
        parameters, shapes = dict(model.named_parameters()), []
        for name, rows in model.matrix_parts().items():
            p = parameters[name]
            assert sum(rows) == p.shape[-2]
            shapes += [(r, p.shape[-1]) for r in rows for _ in range(p.shape[0] if p.dim() == 3 else 1)]
        apart = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "shared_head.head.weight")
        expected = [tuple(t.shape) for n, t in model.hf_state_dict().items() if t.dim() == 2 and not n.endswith(apart)]
        assert sorted(shapes) == sorted(expected)


def test_initialisation_is_a_function_of_the_seed():
    config, seed = nano(initializer_range=0.05), random.randrange(2**31)
    a, b, c = build_model(config, seed), build_model(config, seed), build_model(config, seed + 1)
    for name, p in a.named_parameters():
        assert torch.equal(p, dict(b.named_parameters())[name])
        if p.dim() >= 2:
            assert not torch.equal(p, dict(c.named_parameters())[name])
            assert abs(p.std().item() / 0.05 - 1) < 6 / (2 * p.numel()) ** 0.5 and abs(p.mean().item()) < 0.3 * p.numel() ** -0.5
        else:
            assert (p == 1).all()
    assert all((gate.e_score_correction_bias == 0).all() for gate in a.routers())


# -- the cache -----------------------------------------------------------------------------------------------------------

V3 = dict(vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61, num_attention_heads=128,
          q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def test_cache_bytes_at_v3s_shape():
    """70,272 bytes a token in bf16 for 61 layers; the MTP layer's own 1,152."""
    config = ModelConfig(**V3)
    cache = KVCache(config, 10, 64, dtype=torch.bfloat16, device="meta")
    assert cache.nbytes == (512 + 64) * 61 * 2 * 640 == 70272 * 640
    assert KVCache(config, 10, 64, layers=1, dtype=torch.bfloat16, device="meta").nbytes == 1152 * 640


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_that_are_there(dtype):
    pages, page = random.randint(1, 9), random.randint(1, 40)
    config = nano()
    cache = KVCache(config, pages, page, dtype=dtype)
    assert cache.nbytes == cache.data.untyped_storage().nbytes() == (24 + 8) * 2 * dtype.itemsize * pages * page
    dense = KVCache(llama(), pages, page, dtype=dtype)
    assert dense.nbytes == 2 * DENSE["num_key_value_heads"] * 16 * DENSE["num_hidden_layers"] * dtype.itemsize * pages * page


def test_a_piece_of_no_tokens_is_refused():
    for lens in ([1, 0], [3, 0], [0]):
        with pytest.raises(ValueError, match="query_lens"):
            build_meta(torch.arange(6).view(2, 3)[: len(lens)], [0] * len(lens), lens, 4)
