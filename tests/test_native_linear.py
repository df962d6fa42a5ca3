"""Native kernels and packed weights: against float64, against torch's way, on every kind of processor they are written for.

`native` runs a test three times: as built for this machine, for AVX2, and for no vector extension at all; each must give what
the plain definition gives. Where there is no compiler they are skipped, and the rest of the suite runs on torch's way anyway.
"""

import copy
import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from nets import lively, llama, nano, qwen2, random_ids
from test_loading import FP8_CONFIG, rewrite, to_fp8
from test_moe import SHAPES, naive_experts, random_bank, random_gate, random_routing

from jevons.engine.engine import Engine
from jevons.engine.types import Request, SamplingParams
from jevons.model import KVCache, build_meta, build_model
from jevons.model import moe as moe_module
from jevons.model.layers import MLP, RMSNorm
from jevons.model.moe import MoE
from jevons.model.pack import KINDS, pack
from jevons.numerics import Fp8Weight, IntWeight, Rows, dense, kernels, linear
from jevons.numerics import native as native_module
from jevons.numerics.fp8 import quantise_blocks
from jevons.numerics.memory import HUGE, SLAB, HugePages
from jevons.runtime import cpu_info, find_compiler
from jevons.store.checkpoint import load_checkpoint, save_checkpoint
from jevons.terminal.checkpoint import open_checkpoint

MAKERS = {"dense": lambda w, dtype: w.to(dtype), "fp8": lambda w, _: Fp8Weight(*quantise_blocks(w)),
          "int8": lambda w, _: IntWeight.of(w, 8, 128), "int8-32": lambda w, _: IntWeight.of(w, 8, 32),
          "int4": lambda w, _: IntWeight.of(w, 4, 32), "int4-128": lambda w, _: IntWeight.of(w, 4, 128)}
DTYPES = [torch.float32, torch.bfloat16]
V2 = dict(architecture="DeepseekV2ForCausalLM", scoring_func="softmax", topk_method="group_limited_greedy",
          norm_topk_prob=False)
VARIANTS = {"here": None, "avx2": ["-mavx2", "-mfma"], "plain": []}


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    folder, built = tmp_path_factory.mktemp("native"), {"here": native_module.library()}

    def get(variant):
        if variant not in built:
            flags = [f.replace("-O3", "-O1") for f in native_module.FLAGS if f != "-march=native"] + VARIANTS[variant]
            target = folder / f"{variant}.so"
            assert native_module.build(find_compiler(), flags, target) is None
            built[variant] = native_module.open_library(target)
        return built[variant]

    return get


@pytest.fixture(params=VARIANTS)
def native(request, libraries, monkeypatch):
    """Inference, with the kernels of one processor."""
    if find_compiler() is None or native_module.library() is None:
        pytest.skip(f"no native kernels here: {native_module.why_not()}")
    if request.param == "avx2" and not {"avx2", "fma"} <= cpu_info()["flags"]:
        pytest.skip("this processor has no AVX2")
    library = libraries(request.param)
    monkeypatch.setattr(kernels, "library", lambda: library)
    monkeypatch.setattr(kernels, "LEAST_F32", 0)
    for dtype in DTYPES:  # more than where they are the faster way
        monkeypatch.setitem(kernels.FEW, dtype, 400)
    with torch.no_grad():
        yield library


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)


def relative_error(y, x, w, bias):
    """Of y against x w^T + bias in float64, in units of what rounding may do: |x| |w|."""
    x, w = x.double(), w.double()
    exact = x @ w.T + (0 if bias is None else bias.double())
    room = x.norm(dim=-1, keepdim=True) * w.norm(dim=-1) + (0 if bias is None else bias.double().abs()) + 1e-30
    return ((y.double() - exact).abs() / room).max().item()


def bound(dtype):
    return 3e-5 if dtype == torch.float32 else 5e-3


def random_shape():
    """Rows and columns that are no multiples of panels, vectors, groups or blocks, and sometimes all of them."""
    if random.random() < 0.3:
        return random.choice([16, 128, 256]), random.choice([128, 256, 384])
    return random.randint(1, 300), random.randint(1, 400)


# -- products ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_products_against_float64(native, kind, dtype):
    for rows in (*random.sample(range(1, 21), 5), 70, 300):
        out, columns = random_shape()
        x, w = torch.randn(rows, columns).to(dtype) * 10 ** random.uniform(-3, 3), torch.randn(out, columns)
        bias = random.choice([None, torch.randn(out).to(dtype)])
        weight = MAKERS[kind](w, dtype)
        y = linear(x, weight, bias)
        assert y.dtype == dtype and y.shape == (rows, out)
        # many rows are multiplied by weights that were made bf16: two roundings of 2^-8 instead of one
        limit = 2**-7 if kind == "fp8" and dtype == torch.bfloat16 and rows > kernels.FEW_FP8 else bound(dtype)
        assert relative_error(y, x, dense(weight, torch.float64), bias) < limit, (rows, out, columns)


@pytest.mark.parametrize("kind", MAKERS)
def test_native_is_the_reference(native, kind, monkeypatch):
    """The same numbers as torch's way, for input of any number of dimensions and any strides."""
    out, columns = random_shape()
    weight, bias = MAKERS[kind](torch.randn(out, columns), torch.float32), torch.randn(out)
    wide = torch.randn(3, 2, 2 * columns)
    inputs = [wide[..., :columns], wide[..., columns:], torch.randn(columns, 5).T, torch.randn(columns)]
    fast = [linear(x, weight, bias) for x in inputs]
    monkeypatch.setattr(kernels, "library", lambda: None)
    for x, y in zip(inputs, fast, strict=True):
        expected = linear(x, weight, bias)
        room = (x.norm(dim=-1, keepdim=True) * dense(weight, torch.float32).norm(dim=-1) + 1).max()
        assert y.shape == expected.shape and (y - expected).abs().max() < 3e-5 * room


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_held_apart_are_one_product(native, dtype):
    columns = random.randint(1, 400)
    parts = [MAKERS[kind](torch.randn(random.randint(1, 90), columns), dtype) for kind in random.sample(list(MAKERS), 3)]
    x = torch.randn(random.randint(1, 20), columns).to(dtype)
    both = Rows([*parts, Rows(parts[:1])] if random.random() < 0.3 else parts)
    bias = torch.randn(both.shape[0]).to(dtype)
    assert relative_error(both.linear(x, bias), x, both.dense(torch.float64), bias) < bound(dtype)
    assert torch.equal(copy.deepcopy(both).linear(x, bias), both.linear(x, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_row_that_is_not_finite_stays_alone(native, kind, dtype):
    out, columns = random_shape()
    x, weight = torch.randn(9, columns).to(dtype), MAKERS[kind](torch.randn(out, columns), dtype)
    clean = linear(x, weight)
    x[2, random.randrange(columns)], x[5, random.randrange(columns)] = math.nan, math.inf
    x[7] = 0
    y = linear(x, weight)
    assert not y[2].isfinite().any() and not y[5].isfinite().all() and (y[7] == 0).all()
    kept = [0, 1, 3, 4, 6, 8]
    assert torch.equal(y[kept], clean[kept])


def test_a_code_that_is_no_number_shows(native):
    codes, scale = quantise_blocks(torch.randn(40, 200))
    codes.view(torch.uint8)[7, 130] = 0xFF
    y = linear(torch.randn(3, 200), Fp8Weight(codes, scale))
    assert y[:, 7].isnan().all() and y[:, [r for r in range(40) if r != 7]].isfinite().all()


def test_every_fp8_code(native):
    """Each code times one, subnormal ones and zeros of both signs included."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0
    weight = Fp8Weight(codes.view(torch.float8_e4m3fn).view(256, 1), torch.tensor([[0.5], [2.0]]))
    expected = weight.codes.float()[:, 0] * torch.tensor([0.5, 2.0]).repeat_interleave(128)
    assert torch.equal(linear(torch.ones(1, 1), weight)[0], expected)


def test_rows_do_not_depend_on_each_other(native):
    """Packed into integers, a row's product is the same to the bit, alone or among others."""
    for rows in (random.randint(4, 20), random.randint(21, 130)):  # tiles of AMX are 16 rows
        out, columns = random_shape()
        weight = IntWeight.of(torch.randn(out, columns), random.choice([4, 8]), random.choice([32, 128]))
        x = torch.randn(rows, columns)
        together = linear(x, weight)
        assert all(torch.equal(linear(x[i : i + 1], weight)[0], together[i]) for i in range(rows))


def test_nothing_is_read_past_the_end_or_written_past_it(native):
    out, columns = random_shape()
    for kind in ("dense", "fp8"):
        weight = MAKERS[kind](torch.randn(out, columns), torch.float32)
        if kind == "dense":
            around = torch.full((out * columns + 64,), math.nan)
            around[: out * columns] = weight.flatten()
            weight = around[: out * columns].view(out, columns)
        x = torch.full((3 * columns + 64,), math.nan)
        x[: 3 * columns] = torch.randn(3 * columns)
        assert linear(x[: 3 * columns].view(3, columns), weight).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(native, dtype):
    for rows in (1, 5):
        dim = random.randint(1, 300)
        norm, x = RMSNorm(dim, 1e-6), (torch.randn(rows, 2 * dim) * 30).to(dtype)[:, dim:]
        norm.weight.normal_()
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
        got = norm(x)
        assert got.dtype == dtype and got.shape == x.shape
        torch.testing.assert_close(got.double(), exact, atol=1e-30, rtol=1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_head_by_its_own_matrix(native, dtype):
    for tokens in (1, 7):
        count, width, out = random.randint(1, 5), random.randint(1, 150), random.choice([64, 128, random.randint(1, 200)])
        x = torch.randn(tokens, count, 2 * width).to(dtype)[..., width:]
        whole = torch.randn(count, width + 3, out).to(dtype)
        for w, across in ((whole[:, :width], True), (torch.randn(count, out + 2, width).to(dtype)[:, 1:-1], False)):
            exact = torch.einsum("nha,hab->hnb" if across else "nha,hba->hnb", x.double(), w.double())
            got = kernels.heads(x, w, across)
            assert got.dtype == dtype and got.shape == exact.shape
            room = x.double().norm(dim=-1).T[..., None] * w.double().norm(dim=1 if across else 2)[:, None] + 1e-30
            assert ((got.double() - exact).abs() / room).max() < bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("variant", [{}, dict(norm_topk_prob=False), V2], ids=str)
def test_a_gate_chooses_as_torchs(native, shape, variant, dtype, monkeypatch):
    gate = random_gate(shape, routed_scaling_factor=2.5, **variant)
    x = torch.randn(random.choice([1, 9]), 40).to(dtype)
    fast = gate(x)
    monkeypatch.setattr(kernels, "library", lambda: None)
    slow = gate(x)
    assert torch.equal(fast.experts_NK.sort().values, slow.experts_NK.sort().values)
    assert torch.equal(fast.rows_E, slow.rows_E) and torch.equal(fast.load_E, slow.load_E)
    order, other = fast.experts_NK.argsort(), slow.experts_NK.argsort()
    torch.testing.assert_close(fast.weights_NK.gather(1, order), slow.weights_NK.gather(1, other), atol=1e-6, rtol=1e-5)


def test_a_gate_names_experts_that_exist_whatever_comes_in(native):
    gate = random_gate(SHAPES[1])
    x = torch.randn(6, 40)
    x[1], x[3, 5], x[4, 0] = math.nan, math.inf, -math.inf
    chosen = gate(x).experts_NK
    assert (0 <= chosen).all() and (chosen < 12).all() and all(len(set(row)) == 5 for row in chosen.tolist())


def test_two_callers_at_once(native):
    """Both get their own numbers, whoever has the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        weights = [IntWeight.of(torch.randn(400, 512), 8, 128) for _ in range(2)]
        inputs = [torch.randn(20, 512) for _ in range(2)]
        expected = [linear(x, w) for x, w in zip(inputs, weights, strict=True)]

        def many(i):
            with torch.no_grad():
                return all(torch.equal(linear(inputs[i], weights[i]), expected[i]) for _ in range(50))

        with ThreadPoolExecutor(2) as callers:
            assert all(callers.map(many, range(2)))
    finally:
        torch.set_num_threads(before)


# -- experts ----------------------------------------------------------------------------------------------------------------


def packed_bank(bank, kind):
    """A bank of the same experts as lists, each packed; and its dense weights, as they then are."""
    if kind != "stacked":
        make = MAKERS["dense" if kind == "lists" else kind]
        gate_up = [Rows([make(half.detach(), torch.float32) for half in w.chunk(2)]) for w in bank.gate_up_proj]
        down = [make(w.detach(), torch.float32) for w in bank.down_proj]
        del bank.gate_up_proj, bank.down_proj
        bank.gate_up_proj, bank.down_proj = gate_up, down
    return [dense(w, torch.float64) for w in bank.gate_up_proj], [dense(w, torch.float64) for w in bank.down_proj]


@pytest.mark.parametrize("kind", ["stacked", "lists", "fp8", "int8", "int4"])
def test_experts_for_few_tokens(native, kind):
    for n, k, allowed, shared in ((1, 1, None, False), (1, 3, None, True), (9, 2, [1, 4], False), (17, 2, None, True),
                                  (90, 2, None, True)):
        dim, inter = (random.randint(1, 22) * 4 if kind == "stacked" else random.randint(3, 90) for _ in range(2))
        bank, routing = random_bank(6, dim, inter), random_routing(n, k, 6, allowed)
        mlp = None
        if shared:  # its width is its own
            mlp = MLP(dim, random.randint(3, 200))
            for weight in (mlp.gate_up_proj.weight, mlp.down_proj.weight):
                weight.normal_(std=weight.shape[1] ** -0.5)
            if kind in MAKERS:
                gate_up = Rows([MAKERS[kind](half, torch.float32) for half in mlp.gate_up_proj.weight.detach().chunk(2)])
                down = MAKERS[kind](mlp.down_proj.weight.detach(), torch.float32)
                del mlp.gate_up_proj.weight, mlp.down_proj.weight
                mlp.gate_up_proj.weight, mlp.down_proj.weight = gate_up, down
        gate_up, down = packed_bank(bank, kind)
        x = torch.randn(n, dim)
        out = bank.for_few(x, routing, mlp)
        assert out is not None
        expected = naive_experts(x.double(), routing, gate_up, down)
        if shared:
            gate, up = (x.double() @ dense(mlp.gate_up_proj.weight, torch.float64).T).chunk(2, dim=-1)
            expected = expected + (F.silu(gate) * up) @ dense(mlp.down_proj.weight, torch.float64).T
            alone = mlp(x[:16])
            wanted = (F.silu(gate) * up)[:16] @ dense(mlp.down_proj.weight, torch.float64).T
            assert (alone.double() - wanted).abs().max() < 3e-4 * wanted.abs().max()
        assert (out.double() - expected).abs().max() < 3e-4 * expected.abs().max()
        one_by_one = bank(x, routing) + (mlp(x) if shared else 0)
        assert (one_by_one - out).abs().max() < 3e-4 * expected.abs().max()


def test_experts_follow_weights_that_move(native):
    """Stacked weights are live: replaced or changed, the next call sees them."""
    bank, routing, x = random_bank(), random_routing(4, 2, 6), torch.randn(4, 16)
    first = bank.for_few(x, routing, None)
    bank.down_proj.mul_(2)
    torch.testing.assert_close(bank.for_few(x, routing, None), 2 * first)
    bank.down_proj.data = bank.down_proj * 2
    torch.testing.assert_close(bank.for_few(x, routing, None), 4 * first)
    other = copy.deepcopy(bank)
    bank.down_proj.zero_()
    torch.testing.assert_close(other.for_few(x, routing, None), 4 * first)
    assert bank.to(torch.bfloat16).for_few(x, routing, None) is None  # float32 activations, bf16 experts


def test_many_tokens_go_torchs_way(native):
    bank = random_bank()
    most = moe_module.FEW_ROWS // 2
    assert bank.for_few(torch.randn(most, 16), random_routing(most, 2, 6), None) is not None
    assert bank.for_few(torch.randn(most + 1, 16), random_routing(most + 1, 2, 6), None) is None


def test_one_damaged_token_stays_alone(native):
    moe = MoE(nano())
    for p in moe.parameters():
        p.normal_(std=p.shape[-1] ** -0.5)
    x = torch.randn(4, 40)
    clean = moe(x)[0]
    x[1] = math.nan
    # not to the bit: an expert with one row fewer or more adds up in another order
    torch.testing.assert_close(moe(x)[0][[0, 2, 3]], clean[[0, 2, 3]])


class Forbidden:
    def __getattr__(self, name):
        raise AssertionError(f"{name} was called where gradients are recorded")


def test_what_needs_a_gradient_never_goes_native(monkeypatch):
    monkeypatch.setattr(kernels, "library", Forbidden)
    model = lively(nano())
    ids = torch.tensor(random_ids(6))
    model.logits(model.forward_train(ids, torch.arange(6), [(1, 6)]).hidden_ND).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("mtp") and "gate." not in name)
    x = torch.randn(2, 40, requires_grad=True)
    linear(x, MAKERS["int8"](torch.randn(7, 40), torch.float32)).sum().backward()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, torch.randn(7, 40)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_gradients_pass_through_packed_weights(kind):
    """To what comes in; the weight itself takes none."""
    x, weight = torch.randn(5, 60, requires_grad=True), MAKERS[kind](torch.randn(30, 60), torch.float32)
    grad = torch.randn(5, 30)
    linear(x, weight).backward(grad)
    torch.testing.assert_close(x.grad, grad @ dense(weight, torch.float32))


# -- integers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits,group", [(8, 128), (8, 32), (4, 32), (4, 128)])
def test_integers_are_near_the_weight(bits, group):
    """8 bits: within half a step of the group's largest / 127. 4 bits: a step is an eighth of the largest, at most."""
    out, columns = random_shape()
    w = torch.randn(out, columns) * torch.logspace(-4, 2, columns)
    back = dense(IntWeight.of(w, bits, group), torch.float32)
    padded = F.pad(w, (0, -columns % group)).view(out, -1, group)
    largest = padded.abs().amax(-1, keepdim=True).expand_as(padded).reshape(out, -1)[:, :columns]
    step = largest / (127 if bits == 8 else 8)
    error = (back - w).abs()
    assert (error <= step * (0.51 if bits == 8 else 2.0) + 1e-30).all()  # the furthest may be cut where the rest gains by it
    assert error.square().mean() <= (step.square() * (0.09 if bits == 8 else 0.12)).mean()


def test_the_layout_is_what_the_kernels_read():
    """Row r, column k by its definition: panel, vector, byte, nibble."""
    out, columns = random.randint(17, 60), random.randint(130, 300)
    w = torch.randn(out, columns)
    for bits, group in ((8, 128), (4, 32)):
        packed = IntWeight.of(w, bits, group)
        back, per = dense(packed, torch.float32), 32 // bits
        for _ in range(200):
            r, k = random.randrange(out), random.randrange(columns)
            byte = int(packed.codes[r // 16, k // per, r % 16 * 4 + k % 4])
            code = byte - 128 if bits == 8 else (byte >> 4 if k % 8 >= 4 else byte & 15) - 8
            assert back[r, k] == code * packed.scale[r // 16, k // group, r % 16].float()


def test_groups_of_zeros_and_of_tiny_numbers_are_finite():
    for value in (0.0, 1e-38, -3e38):
        for bits in (4, 8):
            back = dense(IntWeight.of(torch.full((20, 70), value), bits, 32), torch.float32)
            torch.testing.assert_close(back, torch.full((20, 70), value), rtol=0.02, atol=1e-37)


def test_packed_without_kernels(no_native):
    out, columns = random_shape()
    for kind in ("fp8", "int8", "int4"):
        weight, x, bias = MAKERS[kind](torch.randn(out, columns), None), torch.randn(2, 3, columns), torch.randn(out)
        with torch.no_grad():
            assert relative_error(linear(x, weight, bias), x, dense(weight, torch.float64), bias) < 1e-5


# -- whole models -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def logits_of(model, ids):
    cache, pages = KVCache(model.config, 16, 8), torch.arange(16)[None]
    meta = build_meta(pages, [0], [len(ids)], 8)
    return model.logits(model(torch.tensor(ids), meta.positions_N, cache, meta)).float()


def unpacked(model, packed):
    """A float32 model whose weights are what the packed one's became."""
    twin = copy.deepcopy(model)
    modules = dict(packed.named_modules())
    with torch.no_grad():
        for name, module in twin.named_modules():
            other = modules[name]
            for key in ("weight", "bias", "gate_up_proj", "down_proj"):
                mine = getattr(module, key, None)
                if not isinstance(mine, torch.nn.Parameter):
                    continue
                theirs = getattr(other, key)
                if isinstance(theirs, list):
                    theirs = torch.stack([dense(w, torch.float32) for w in theirs])
                if name == "lm_head" and key == "weight" and mine is twin.embed_tokens.weight:
                    module.weight = torch.nn.Parameter(dense(theirs, torch.float32))
                else:
                    mine.copy_(dense(theirs, torch.float32))
    return twin


@pytest.mark.parametrize("make", [nano, qwen2, llama, lambda: qwen2(tie_word_embeddings=True),
                                  lambda: nano(n_shared_experts=0, moe_intermediate_size=136, hidden_size=152)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_model_is_the_network_of_its_weights(make, kind):
    model = lively(make())
    packed = pack(copy.deepcopy(model), kind, torch.float32)
    ids = random_ids(20)
    expected, got = logits_of(unpacked(model, packed), ids), logits_of(packed, ids)
    if kind == "bf16":  # activations are bf16 too
        off = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        least = 0.8 if model.routers() else 1.0  # a rounding may choose another expert for a token or two
        assert (off < 0.1).float().mean() >= least
    else:
        torch.testing.assert_close(got, expected, atol=2e-3 * float(expected.abs().max()), rtol=0)
    assert not any(p.requires_grad for p in packed.parameters())
    answer = Engine(packed, -1, max_batch=2).generate([Request(ids, SamplingParams(12, 0.0))] )[0]
    assert len(answer.token_ids) == 12 and answer.finish_reason == "length"


def test_what_is_packed_and_what_is_not():
    for kind, expected in (("int8", IntWeight), ("int4", IntWeight), ("fp8", Fp8Weight)):
        model = pack(lively(nano()), kind)
        block = model.layers[1]
        heads = [model.lm_head.weight, block.self_attn.o_proj.weight, *block.mlp.experts.down_proj,
                 *(p for w in block.mlp.experts.gate_up_proj for p in w.parts), model.mtp[0].eh_proj.weight]
        assert all(isinstance(w, expected) for w in heads)
        assert [w.bits for w in heads[:2]] == ([8, 4] if kind == "int4" else [8, 8]) if kind != "fp8" else True
        assert block.self_attn.kv_b_proj.weight.dtype == model.embed_tokens.weight.dtype == torch.bfloat16
        assert block.mlp.gate.weight.dtype == block.input_layernorm.weight.dtype == torch.float32


def test_packed_bytes():
    """What is promised of memory: 8 bits and 1/64, 4 bits and 1/2 of a bit, one byte."""
    config = llama(hidden_size=256, intermediate_size=512)
    for kind, per_weight in (("int8", 1 + 2 / 128), ("int4", 0.5 + 2 / 32), ("fp8", 1 + 4 / 128**2), ("bf16", 2)):
        weight = pack(build_model(config, seed=0), kind).layers[0].mlp.down_proj.weight
        tensors = [weight] if isinstance(weight, torch.Tensor) else vars(weight).values()
        assert sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)) == round(256 * 512 * per_weight)


def test_packing_a_mapped_checkpoint(tmp_path):
    """Fused and stacked in memory, or one by one in a file's map: the same packed network."""
    save_checkpoint(tmp_path, lively(nano()), None, {}, dtype=torch.bfloat16)
    for kind in KINDS:
        mapped, copied = (pack(load_checkpoint(tmp_path, need_tokenizer=False, frozen=f).model, kind) for f in (True, False))
        ids = random_ids(10)
        assert torch.equal(logits_of(mapped, ids), logits_of(copied, ids))


def test_fp8_blocks_of_a_checkpoint_stay_where_they_are(tmp_path):
    save_checkpoint(tmp_path, lively(nano()), None, {})
    rewrite(tmp_path, to_fp8, quantization_config=FP8_CONFIG)
    model = load_checkpoint(tmp_path, need_tokenizer=False, frozen=True).model
    codes = model.layers[0].self_attn.o_proj.weight.codes
    assert pack(model, "fp8").layers[0].self_attn.o_proj.weight.codes.data_ptr() == codes.data_ptr()


def test_kv_b_of_a_mapped_fp8_checkpoint_is_unpacked_once(tmp_path):
    save_checkpoint(tmp_path, lively(nano()), None, {})
    module = load_checkpoint(tmp_path, need_tokenizer=False, frozen=True).model.layers[0].self_attn.kv_b_proj
    dense_weight = module.weight.detach()
    del module.weight
    module.weight = Fp8Weight(*quantise_blocks(dense_weight))
    first = module.dense(torch.float32)
    assert module.dense(torch.float32) is first and module.dense(torch.bfloat16).dtype == torch.bfloat16
    module.weight = Fp8Weight(*quantise_blocks(torch.zeros(module.weight.shape)))
    assert (module.dense(torch.float32) == 0).all()


def test_bad_packings(tmp_path):
    with pytest.raises(ValueError, match="weights 'int5': bf16, int8, fp8 or int4 would be right"):
        pack(lively(nano()), "int5")
    with pytest.raises(ValueError, match="weights 'q8': bf16"):
        open_checkpoint(tmp_path, "q8")  # before anything is read
    for kind in ("int8", "int4", "fp8"):
        model = lively(nano())
        with torch.no_grad():
            model.layers[1].mlp.experts.down_proj[3, 2, 1] = math.nan
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: a weight that is not finite"):
            pack(model, kind)
    with pytest.raises(ValueError, match="q_proj.weight was packed for inference"):
        pack(lively(llama()), "int8").hf_state_dict()


# -- memory -------------------------------------------------------------------------------------------------------------------


def test_huge_pages_hand_out_memory_of_their_own():
    pages = HugePages()
    taken = [pages.empty((random.randint(1, 70), random.randint(1, 50)), random.choice(DTYPES)) for _ in range(50)]
    taken.append(pages.empty((SLAB + 3,), torch.uint8))
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in taken)
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
    assert all(t.data_ptr() % 64 == 0 and t.is_contiguous() for t in taken) and taken[0].data_ptr() % HUGE == 0
    copied = pages.copy(torch.arange(6.0).view(2, 3), torch.bfloat16)
    assert torch.equal(copied, torch.arange(6.0).view(2, 3).bfloat16())


def test_the_read_rate_is_a_rate(no_native):
    before = torch.get_num_threads()
    rate, threads = kernels.read_rate(2**22)
    assert rate > 1e6 and 1 <= threads <= before == torch.get_num_threads()
