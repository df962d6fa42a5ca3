"""FP8 training: codes and scales to the bit, products of every back end, the linear's three products, whole runs."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import nano, qwen2
from test_loop import Noise, model_of, run
from whole_runs import metrics, timeless, write_recipe

from jevons.model import build_model
from jevons.model.precision import fp8_settings, set_training_precision
from jevons.numerics import Fp8, Fp8Weight, fp8_gemm, packed
from jevons.numerics.fp8 import (
    Quantised,
    dequantise,
    pack_e5m6,
    quantise_blocks,
    quantise_columns,
    quantise_tiles,
    quantise_weight,
    tile_scale,
    unpack_e5m6,
)
from jevons.numerics.fp8_gemm import BLOCKWISE, LIMITED, REFERENCE, matmul_blockwise, matmul_limited, whole_tiles
from jevons.numerics.fp8_linear import fp8_linear
from jevons.recipe import OptimizerTable, PrecisionTable, RecipeError, parse_recipe
from jevons.store.train_state import load_latest
from jevons.train.optim import AdamWBF16, load_optimizer_tensors

SHAPES = [(1, 1), (5, 130), (128, 128), (131, 257), (300, 77)]
GRID = np.array([m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127])  # E4M3's


def spread(m, k):
    """Normal numbers of very different columns, a tile of zeros, and an outlier of 1e5 times the rest."""
    x = torch.randn(m, k) * torch.logspace(-4, 2, k)
    x[torch.randint(m, ()), torch.randint(k, ())] *= 1e5
    x[: m // 2, : min(k, 128)] *= 0
    return x


def expected(tile, power_of_two):
    """(scale, codes) of a tile by the definition, in float64; quotient and scale are rounded once, to float32."""
    scale = np.float32(max(np.abs(tile).max(), np.float64(np.float32(1e-4))) / 448.0)
    if power_of_two:
        scale = np.float32(min(2.0**e for e in range(-40, 40) if 2.0**e >= scale))
    quotient = (tile / np.float64(scale)).astype(np.float32).astype(np.float64)
    size = np.minimum(np.abs(quotient), 448.0)
    above = np.searchsorted(GRID, size)
    below = np.maximum(above - 1, 0)
    down, up = size - GRID[below], GRID[above] - size
    code = np.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    return scale, (code + 128 * np.signbit(quotient)).astype(np.uint8)


def deepgemm_metric(x, y):
    x, y = x.double(), y.double()
    return (1 - 2 * (x * y).sum() / (x * x + y * y).sum()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_codes_and_scales_to_the_bit(shape, power_of_two):
    x = spread(*shape)
    for q, matrix, rows in [(quantise_tiles(x, power_of_two), x, 1), (quantise_columns(x, power_of_two), x.t(), 1),
                            (quantise_weight(x, power_of_two), x, 128), (quantise_weight(x[None], power_of_two), x, 128)]:
        codes, scale = (t.reshape(t.shape[-2:]) for t in (q.codes.contiguous().view(torch.uint8), q.scale))
        wide = matrix.double().numpy()
        assert tuple(scale.shape) == (-(-wide.shape[0] // rows), -(-wide.shape[1] // 128)) and q.rows == rows
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = slice(i * rows, (i + 1) * rows), slice(j * 128, (j + 1) * 128)
                want_scale, want_codes = expected(wide[part], power_of_two)
                assert scale[i, j].item() == want_scale
                np.testing.assert_array_equal(codes[part].numpy(), want_codes)
        back = dequantise(q).reshape(matrix.shape)
        assert torch.equal(back, (q.codes.reshape(matrix.shape).float() * scale.repeat_interleave(rows, 0)[: len(matrix)]
                                  .repeat_interleave(128, 1)[:, : matrix.shape[1]]))
        if power_of_two:
            assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5)), "exact powers of two"
            assert torch.equal(back.bfloat16().float(), back), "exact in bf16"


def test_powers_of_two_stay_themselves():
    exponents = torch.arange(-20.0, 100.0)
    largest = 448 * torch.exp2(exponents)
    assert torch.equal(tile_scale(largest, True), torch.exp2(exponents))
    assert torch.equal(tile_scale(largest * 1.0001, True), torch.exp2(exponents + 1))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_visible(bad):
    x, w = torch.randn(40, 300), torch.randn(2, 20, 300)
    x[7, 150] = w[1, 3, 280] = bad
    for q, tile in [(quantise_tiles(x), (7, 1)), (quantise_columns(x), (150, 0)), (quantise_weight(w), (1, 0, 2))]:
        assert q.scale.isnan().nonzero().tolist() == [list(tile)]
        assert dequantise(q).isnan().any()
    leaf, weight = x.requires_grad_(), torch.randn(20, 300, requires_grad=True)
    y = fp8_linear(leaf, weight, None, Fp8())
    assert y[7].isnan().all() and y[:7].isfinite().all() and y[8:].isfinite().all()
    _, grad_w = torch.autograd.grad(y.nan_to_num().sum(), (leaf, weight))
    assert grad_w[:, 150].isnan().all(), "so the loop skips the step"


def test_e5m6_is_the_nearest_of_its_numbers():
    m, k = 9, 301
    x = torch.randn(m, k) * torch.logspace(-7, 3, k)
    packed, scale = pack_e5m6(x)
    assert packed.dtype == torch.uint8 and packed.numel() == m * 3 * ((k + 1) // 2)
    back = unpack_e5m6(packed, scale, k)
    spread_scale = scale.repeat_interleave(128, 1)[:, :k].double()
    quotient = x.double() / spread_scale
    exponent = torch.floor(torch.log2(quotient.abs())).clamp(min=-14)
    step = torch.exp2(exponent - 6)
    assert torch.equal(back.double(), torch.round(quotient / step) * step * spread_scale)  # torch rounds to even, as we do
    assert torch.equal(unpack_e5m6(*pack_e5m6(back), k), back), "its own numbers come back"
    assert torch.equal(quantise_tiles(x, True).scale, scale)
    assert pack_e5m6(torch.full((1, 2), float("inf")))[1].isnan().all()


# -- products ---------------------------------------------------------------------------------------------------------------


def close(got, a, b, tolerance):
    """Every element within `tolerance` of the sum of the magnitudes it is made of (float64, of the quantised operands)."""
    a, b = dequantise(a).double(), dequantise(b).double()
    want, size = a @ b.t(), a.abs() @ b.abs().t()
    assert ((got.double() - want).abs() <= tolerance * size + 1e-30).all(), ((got.double() - want).abs() / size).max()


@pytest.mark.parametrize("backend", [REFERENCE, BLOCKWISE], ids=lambda b: b.name)
@pytest.mark.parametrize("m,n,k", [(70, 200, 300), (1, 3, 5), (128, 256, 128), (33, 129, 640)])
def test_products_against_float64(backend, m, n, k):
    x, w = spread(m, k), torch.randn(n, k)
    for power_of_two in (False, True):
        a = quantise_tiles(x, power_of_two)
        for b in (quantise_weight(w, power_of_two), quantise_tiles(w, power_of_two)):
            close(backend.matmul(a, b, torch.float32), a, b, 1e-5)
            close(backend.matmul(a, b, torch.bfloat16), a, b, 5e-3)
    w_t = quantise_weight(w).t()
    g = quantise_tiles(torch.randn(m, n))
    close(backend.matmul(g, w_t, torch.float32), g, w_t, 1e-5)


@pytest.mark.parametrize("backend", [REFERENCE, BLOCKWISE], ids=lambda b: b.name)
@pytest.mark.parametrize("n,k", [(64, 96), (70, 201)])
def test_products_by_expert_against_float64(backend, n, k):
    offs = torch.tensor([60, 60, 188, 190], dtype=torch.int32)
    x, w, g = spread(200, k), torch.randn(4, n, k), torch.randn(200, n)
    a, b = quantise_tiles(x), quantise_weight(w)
    got = backend.grouped(a, b, offs, torch.float32)
    rows, ends = whole_tiles(offs, 200)
    kept = rows[rows >= 0]
    assert torch.equal(kept, torch.arange(190)) and ends.tolist() == [128, 128, 256, 384]
    grad, cols = fp8_gemm.columns(g, False, rows), fp8_gemm.columns(a, False, rows)
    got_w = backend.grouped_wgrad(grad, cols, ends, torch.float32)
    first = start = 0
    for e, (i, j) in enumerate(zip(offs.tolist(), ends.tolist(), strict=True)):
        close(got[first:i], Quantised(a.codes[first:i], a.scale[first:i], 1), Quantised(b.codes[e], b.scale[e], 128), 1e-5)
        close(got_w[e], *(Quantised(q.codes[:, start:j], q.scale[:, start // 128 : j // 128], 1) for q in (grad, cols)), 1e-5)
        if i > first:  # no tile belongs to two experts
            assert torch.equal(cols.codes[:, start : start + i - first].view(torch.uint8),
                               quantise_columns(dequantise(a)[first:i]).codes.view(torch.uint8))
        else:
            assert not got_w[e].any()
        first, start = i, j


@pytest.mark.parametrize("m,n,k", [(256, 384, 512), (130, 300, 1000)])
def test_deepgemm_metric_against_what_was_not_quantised(m, n, k):
    x, w = torch.randn(m, k), torch.randn(n, k)
    for b in (quantise_weight(w), quantise_tiles(w)):
        for backend in (REFERENCE, BLOCKWISE, LIMITED):
            assert deepgemm_metric(backend.matmul(quantise_tiles(x), b, torch.bfloat16), x.double() @ w.double().t()) < 0.001


def test_limited_accumulation_is_worse_and_promotion_mends_it():
    a, b = quantise_tiles(torch.rand(24, 4096)), quantise_weight(torch.rand(40, 4096))
    want = dequantise(a).double() @ dequantise(b).double().t()

    def worst(got):
        return ((got.double() - want).abs() / want).max().item()

    limited = worst(matmul_limited(a, b, torch.float32))
    promoted = worst(matmul_limited(a, b, torch.float32, promote_every=128))
    assert 0.005 < limited < 0.05, "the report sees nearly 2 % at K = 4096"
    assert promoted < limited / 10 and worst(matmul_blockwise(a, b, torch.float32)) < 1e-6


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_in_its_interpreter():
    script = Path(__file__).parent / "triton_interpreted.py"
    done = subprocess.run([sys.executable, str(script), str(torch.initial_seed())], capture_output=True, text=True, timeout=250,
                          env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0 and done.stdout.split() == ["quantise", "matmul", "grouped", "wgrad"], done.stdout + done.stderr


def test_the_back_end_is_chosen_by_capability(monkeypatch):
    fp8_gemm.best_backend.cache_clear()
    assert fp8_gemm.best_backend("cpu") is REFERENCE and fp8_gemm.best_backend("cpu", "limited") is LIMITED
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert fp8_gemm.best_backend("cuda") is REFERENCE, "no Hopper"
    fp8_gemm.best_backend.cache_clear()


def checked_scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, output_dtype):
    """`F.scaled_mm` by the definition, behind torch's own checks of its layouts."""
    m, k, n, blocks = *a.shape, b.shape[1], -(-a.shape[1] // 128)
    assert m % 16 == k % 16 == n % 16 == 0 and a.stride() == (k, 1) and b.stride() == (1, k)
    assert scale_a.shape == (m, blocks) and scale_a.stride(0) == 1 and (scale_a.stride(1) == m or blocks == 1)
    square = recipe_b == F.ScalingType.BlockWise128x128
    length = -(-blocks // 4) * 4 if square else n
    assert scale_b.shape == ((length, -(-n // 128)) if square else (n, blocks))
    assert scale_b.stride(0) == 1 and (scale_b.stride(1) == length or scale_b.shape[1] == 1)
    right = scale_b.t()[:, :blocks] if square else scale_b
    return matmul_blockwise(Quantised(a, scale_a, 1), Quantised(b.t(), right, 128 if square else 1), output_dtype)


def test_what_scaled_mm_is_given(monkeypatch):
    monkeypatch.setattr(F, "scaled_mm", checked_scaled_mm)
    for m, n, k in [(128, 256, 640), (17, 130, 75), (1, 1, 1)]:
        a, w = quantise_tiles(torch.randn(m, k)), torch.randn(n, k)
        for b in (quantise_weight(w), quantise_tiles(w), quantise_weight(w.t().contiguous()).t()):
            assert torch.equal(fp8_gemm.scaled_mm(a, b, torch.float32), matmul_blockwise(a, b, torch.float32))


def test_a_published_weight_on_tensor_cores(monkeypatch):
    """Small integers times powers of two lose nothing in E4M3: any wrong scale, row or column would show."""
    monkeypatch.setattr(F, "scaled_mm", checked_scaled_mm)
    monkeypatch.setattr(packed, "why_no_scaled_mm", lambda device: None)
    for n, k in [(200, 300), (128, 256), (1, 5)]:
        x, w = torch.randint(-8, 9, (7, k)).float(), torch.randint(-8, 9, (n, k)).float()
        x[:, ::128], w[::128, ::128] = 448, 448  # each tile's scale is 1
        codes, scale_inv = quantise_blocks(w)
        scale_inv = scale_inv * 2.0 ** torch.randint(-3, 4, scale_inv.shape)
        held, bias = Fp8Weight(codes, scale_inv), torch.randint(-5, 6, (n,)).float()
        want = x.double() @ held.dense(torch.float64).T
        assert torch.equal(held.linear(x[:, None], None), want.bfloat16().float()[:, None])
        assert torch.equal(held.linear(x[:, None], bias), want.bfloat16().float()[:, None] + bias)


def test_off_a_gpu_it_says_why_not():
    assert "no GPU" in fp8_gemm.why_no_scaled_mm(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available() or fp8_gemm.why_no_scaled_mm(torch.device("cuda")) is not None,
                    reason="needs a Hopper GPU and CUDA 12.9")
def test_scaled_mm_itself():
    for m, n, k in (1, 128, 256), (17, 576, 7168), (128, 4096, 512):
        x, w = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), torch.randn(n, k, device="cuda")
        held = Fp8Weight(*quantise_blocks(w))
        want = dequantise(quantise_tiles(x)).double() @ held.dense(torch.float64).T
        assert (held.linear(x, None).double() - want).norm() / want.norm() < 5e-3


# -- the linear ---------------------------------------------------------------------------------------------------------------


def plain(x, w, offs, swiglu):
    if swiglu:
        gate, up = x.chunk(2, -1)
        x = F.silu(gate) * up
    if offs is None:
        return x @ w.t()
    ends = offs.tolist()
    return torch.cat([x[i:j] @ w[e].t() for e, (i, j) in enumerate(zip([0, *ends], ends, strict=False))])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("cache", ["e4m3", "e5m6", "swiglu"])
def test_gradients_against_a_dense_reference_in_float64(cache, grouped):
    swiglu, n, k = cache == "swiglu", 140, 200
    offs = torch.tensor([50, 50, 170, 300], dtype=torch.int32) if grouped else None
    x = torch.randn(300, 2 * k if swiglu else k, requires_grad=True)
    w = torch.randn(*([4] if grouped else []), n, k, requires_grad=True)
    for backend in (None, BLOCKWISE, LIMITED):
        y = fp8_linear(x, w, None, Fp8(cache=cache, backend=backend), offs, swiglu)
        grad = torch.randn_like(y)
        got = torch.autograd.grad(y, (x, w), grad)
        wide = [t.detach().double().requires_grad_() for t in (x, w)]
        want_y = plain(*wide, offs, swiglu)
        want = torch.autograd.grad(want_y, wide, grad.double())
        assert deepgemm_metric(y, want_y) < 0.001
        assert all(deepgemm_metric(*pair) < 0.002 and pair[0].dtype == torch.float32 for pair in zip(got, want, strict=True))


def test_parts_of_an_experts_rows_share_no_tile():
    """Gradients of weights are the sum of what each part alone gives: so tokens of several processes are what they are in one."""
    ends = [[20, 50], [50, 90], [170, 170]]
    x, w, g = spread(170, 200).requires_grad_(), torch.randn(3, 70, 200, requires_grad=True), torch.randn(170, 70)
    offs = torch.tensor(ends, dtype=torch.int32)

    def wgrad(rows, offs):
        return torch.autograd.grad(fp8_linear(x[rows], w, None, Fp8(), offs), w, g[rows])[0]

    whole, mixed = wgrad(torch.arange(170), offs), wgrad(torch.arange(170), offs[:, -1])
    apart = [0, 0]
    starts = [0, *offs.flatten().tolist()]
    for part in (0, 1):
        rows = [torch.arange(starts[2 * e + part], starts[2 * e + part + 1]) for e in range(3)]
        alone = torch.tensor([len(r) for r in rows]).cumsum(0).to(torch.int32)
        apart[part] = wgrad(torch.cat(rows), alone)
    torch.testing.assert_close(whole, apart[0] + apart[1], rtol=1e-5, atol=1e-5 * whole.abs().max().item())
    assert (mixed - whole)[0].abs().max() > 1e-4 * whole[0].abs().max()


def test_the_three_products_are_what_the_report_says():
    """Each of them exactly the product of its own quantised operands."""
    x, w, g = torch.randn(150, 200, requires_grad=True), torch.randn(70, 200, requires_grad=True), torch.randn(150, 70)
    for cache, power in (("e4m3", False), ("e5m6", True)):
        y = fp8_linear(x, w, None, Fp8(cache=cache))
        grad_x, grad_w = torch.autograd.grad(y, (x, w), g)
        x8, w8 = quantise_tiles(x.detach(), power), quantise_weight(w.detach())
        close(y.detach(), x8, w8, 1e-5)
        close(grad_x, quantise_tiles(g), w8.t(), 1e-5)
        kept = dequantise(x8) if cache == "e4m3" else unpack_e5m6(*pack_e5m6(x.detach()), 200)
        close(grad_w, quantise_columns(g), quantise_columns(kept, power), 1e-5)


def test_a_linear_with_bias_and_bf16_under_autocast():
    x, w, b = torch.randn(3, 20, 64), torch.randn(48, 64, requires_grad=True), torch.randn(48, requires_grad=True)
    plain_y = fp8_linear(x, w, b, Fp8())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fp8_linear(x, w, b, Fp8())
    assert plain_y.dtype == torch.float32 and y.dtype == torch.bfloat16 and y.shape == (3, 20, 48)
    assert torch.allclose(y.float(), plain_y, atol=0.2, rtol=0.02)
    grads = torch.autograd.grad(y.float().sum(), (w, b))
    assert all(g.dtype == torch.float32 for g in grads) and torch.equal(grads[1], torch.full((48,), 60.0))


@pytest.mark.parametrize("cache,bytes_each", [("e4m3", 1), ("e5m6", 1.5), ("swiglu", 2)])
def test_what_waits_for_the_backward_pass_is_fp8(cache, bytes_each):
    m, n, k = 512, 256, 384
    saved = []
    x = torch.randn(m, 2 * k if cache == "swiglu" else k, requires_grad=True)
    w = torch.randn(n, k, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fp8_linear(x, w, None, Fp8(cache=cache), swiglu=cache == "swiglu")
    y.sum().backward()
    assert {t.dtype for t in saved} <= {torch.float8_e4m3fn, torch.uint8, torch.float32}
    codes = sum(t.numel() for t in saved if t.dtype != torch.float32)
    scales = sum(t.numel() for t in saved if t.dtype == torch.float32)
    assert codes == m * k * bytes_each + n * k
    assert scales == m * k * (2 if cache == "swiglu" else 1) // 128 + (n // 128) * (k // 128)


# -- networks -------------------------------------------------------------------------------------------------------------------


def test_which_projections_train_in_fp8():
    model = build_model(nano(), seed=1)
    names = set_training_precision(model, Fp8())
    high = {n for n, p in model.named_parameters() if p.dim() >= 2} - {
        f"{n}.weight" for n in names} - {f"{n}.{w}" for n in names for w in ("gate_up_proj", "down_proj")}
    moe = [n for n in dict(model.named_modules()) if n.endswith("mlp.gate")]
    assert high == {"embed_tokens.weight", "lm_head.weight", "mtp.0.eh_proj.weight"} | {f"{n}.weight" for n in moe}
    block = model.layers[1]
    assert block.self_attn.o_proj.fp8.cache == "e5m6" and block.mlp.shared_experts.fp8.cache == "swiglu"
    assert block.mlp.experts.fp8_up.x_power_of_two and block.mlp.experts.fp8_down.grad_power_of_two
    assert not block.self_attn.qkv_a_proj.fp8.x_power_of_two
    set_training_precision(model, None)
    assert all(getattr(m, a, None) is None for m in model.modules() for a in ("fp8", "fp8_up", "fp8_down"))


@pytest.mark.parametrize("config", [nano, qwen2])
def test_training_passes_are_fp8_and_the_engine_is_not(config):
    model = build_model(config(), seed=3)
    ids = torch.randint(0, 48, (24,))

    def rows():
        return model.forward_train(ids, torch.arange(12).repeat(2), [(2, 12)], mtp=False).hidden_ND

    with torch.no_grad():
        before = rows()
    set_training_precision(model, Fp8())
    with torch.no_grad():
        during = rows()
    with torch.inference_mode():
        engine = rows()
    effect = ((during - before).norm() / before.norm()).item()
    assert torch.allclose(engine, before, atol=1e-5) and 0.005 < effect < 0.3
    # with gradients or without, but for the native norm's last bits, which turn a code here and there
    assert ((during - rows()).norm() / before.norm()).item() < effect / 3


def test_a_step_in_fp8_goes_where_one_in_float32_goes():
    config = nano(hidden_size=136, moe_intermediate_size=72)
    model = build_model(config, seed=4)
    ids = torch.randint(0, 48, (130,))

    def gradients(fp8):
        set_training_precision(model, fp8)
        out = model.forward_train(ids, torch.arange(65).repeat(2), [(2, 65)])
        loss = F.cross_entropy(model.logits(out.hidden_ND[:-1]), ids[1:]) + F.cross_entropy(
            model.logits(out.mtp_hidden_ND[:-2]), ids[2:])
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return loss.item(), torch.cat([g.flatten() for g in grads if g is not None])

    plain_loss, plain_grad = gradients(None)
    for fp8 in (Fp8(), Fp8(power_of_two=True)):
        loss, grad = gradients(fp8)
        assert loss == pytest.approx(plain_loss, rel=0.01) and not torch.equal(grad, plain_grad)
        assert F.cosine_similarity(grad, plain_grad, dim=0) > 0.95


def test_resume_in_fp8_with_bf16_moments_is_the_same_to_the_last_bit(tmp_path):
    table = OptimizerTable(matrices="adamw", schedule="constant")
    options = dict(moments="bf16", fp8=Fp8(), dtype=torch.bfloat16, save_every=2, optimizer=table)
    whole, _ = run(tmp_path / "whole", **options)
    adam = whole.optimizers[0]
    assert isinstance(adam, AdamWBF16) and {s["exp_avg_sq"].dtype for s in adam.state.values()} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in whole.model.parameters())
    model = model_of()
    run(tmp_path / "halves", model, Noise(model, steps=4), **options)
    again, _ = run(tmp_path / "halves", model_of(seed=9), **options, resume=4)
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    assert not any(line["kind"] == "note" for line in metrics(tmp_path / "halves"))
    step = lambda out: timeless([x for x in metrics(out) if x["kind"] == "step"])
    assert step(tmp_path / "whole") == step(tmp_path / "halves")


def test_another_precision_is_named_at_resume(tmp_path):
    model = model_of()
    run(tmp_path, model, Noise(model, steps=3), moments="bf16", fp8=Fp8())
    tensors = load_latest(tmp_path)[1]
    assert {t.dtype for n, t in tensors.items() if n.startswith("optimizer.0") and "exp_avg" in n} == {torch.bfloat16}
    assert {t.dtype for n, t in tensors.items() if n.startswith("model.")} == {torch.float32}
    with pytest.raises(ValueError, match=r"exp_avg.* is torch.bfloat16.*keeps torch.float32.*precision.moments"):
        run(tmp_path, resume=3)
    run(tmp_path, moments="bf16", resume=3)
    note = next(line["text"] for line in metrics(tmp_path) if line["kind"] == "note")
    assert "dtype was torch.float32 with FP8 projections" in note


def test_bf16_moments_follow_torch_s_own():
    start = [torch.randn(40, 30), torch.randn(30)]
    mine, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    settings = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    a, b = AdamWBF16(mine, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(30):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn_like(p) + 0.5
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, s in zip(mine, theirs, start, strict=True):
        assert ((p - q).norm() / (q - s).norm()).item() < 0.01 and not torch.equal(p, q)
        assert torch.allclose(a.state[p]["exp_avg_sq"].float(), b.state[q]["exp_avg_sq"], rtol=0.03)
        assert a.state[p]["step"].item() == 30
    with pytest.raises(ValueError, match="belongs to no parameter"):
        load_optimizer_tensors(model_of(), [], {"optimizer.0.lm_head.weight.exp_avg": start[0]})


RECIPE = """
name = "eight"
[model]
preset = "v3-nano"
[task]
name = "own_tasks.py:Traced"
[tokenizer]
vocab_size = 288
samples = 60
[precision]
compute = "fp8"
moments = "bf16"
[[stages]]
kind = "pretrain"
tokens = 1_500
batch_tokens = 500
[[stages]]
kind = "grpo"
steps = 2
problems = 3
group_size = 4
max_tokens = 8
mask_truncated = false
"""


def test_a_recipe_in_fp8_trains_and_its_rollouts_work(tmp_path):
    from test_pipeline import run as run_recipe

    seen = {}
    for name, text in (("fp8", RECIPE), ("float32", RECIPE.replace('"fp8"', '"float32"'))):
        (tmp_path / name).mkdir()
        run_recipe(write_recipe(tmp_path / name, text), tmp_path / name / "out")
        seen[name] = [x for x in metrics(tmp_path / name / "out") if x["kind"] == "step"]
    losses = {name: [x["loss"] for x in lines if x["stage"] == "pretrain"] for name, lines in seen.items()}
    assert losses["fp8"] != losses["float32"] and losses["fp8"] == pytest.approx(losses["float32"], rel=0.02)
    gaps = [x["logprob_gap"] for x in seen["fp8"] if "logprob_gap" in x]
    assert gaps and 0 < max(gaps) < 0.05, "the trainer's log-probs are FP8's, the engine's are not, and they are close"


@pytest.mark.parametrize("lines,message", [
    ('compute = "fp16"', r"`precision.compute` = 'fp16'"),
    ('scale = "float"', r"unknown key `precision.scale`; the nearest known key is `precision.scales`"),
    ('scales = "power_of_two"', r"compute is 'auto'.*compute = 'fp8'"),
    ('accumulation = "limited"', r"accumulation = 'limited'.*compute = 'fp8'"),
])
def test_precision_tables_that_cannot_be(lines, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(f"{RECIPE.partition('[precision]')[0]}[precision]\n{lines}\n[[stages]]\nkind = 'pretrain'\ntokens = 10\n")


def test_betas_too_slow_for_bf16_moments():
    text = RECIPE + "[stages.optimizer]\nbetas = [0.9, 0.999]\n"
    with pytest.raises(RecipeError, match=r"stages\[1\].optimizer.betas \[0.9, 0.999\].*0.99"):
        parse_recipe(text)
    assert parse_recipe(text.replace('moments = "bf16"', "")).precision.moments == "float32"


def test_every_key_of_the_table_has_its_effect():
    assert fp8_settings(PrecisionTable()) is None and fp8_settings(PrecisionTable(compute="bf16")) is None
    assert fp8_settings(PrecisionTable(compute="fp8")) == Fp8()
    both = PrecisionTable(compute="fp8", scales="power_of_two", accumulation="limited")
    assert fp8_settings(both) == Fp8(power_of_two=True, accumulation="limited")
    assert fp8_settings(both).choose(torch.device("cpu")) is LIMITED


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_compile_for_hopper(tmp_path, monkeypatch):
    """No GPU is needed for that: four FP8 tensor core products of 32 elements, and then the sum leaves the core."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from jevons.numerics import triton_fp8

    def assembly(kernel, pointers, constants, warps):
        names = kernel.arg_names
        signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and not n.endswith("s_k")}
        source = ASTSource(fn=kernel, signature=signature, attrs=aligned,
                           constexprs={(names.index(n),): value for n, value in constants.items()})
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm

    codes, scale = "*fp8e4nv", "*fp32"
    for rows, out in ((128, "*bf16"), (1, "*fp32")):
        asm = assembly(triton_fp8._product_kernel, dict(a=codes, a_scale=scale, b=codes, b_scale=scale, c=out, table="*i32"),
                       dict(as_m=1, B_ROWS=rows, TILE=128, BAND=8), 8)
        assert asm["ptx"].count("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3") == 4 and asm["cubin"]
    for square, again in ((False, True), (True, False)):
        kinds = dict(x=codes if again else "*bf16", x_scale=scale, rows_p="*i64", codes=codes, scale=scale)
        flags = dict(SQUARE=square, POWER=True, GATHER=again, CODES=again, ROWS=128 if square else 32)
        asm = assembly(triton_fp8._quantise_kernel, kinds, flags, 4)
        assert "cvt.rn.satfinite.e4m3x2.f32" in asm["ptx"] and "div.rn.f32" in asm["ptx"], "rounded as the reference rounds"
