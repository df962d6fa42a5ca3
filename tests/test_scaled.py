"""What the GPU's block-wise FP8 product is given: layouts as torch demands them, and the numbers they stand for. The call itself
needs Hopper; `scaled.multiply` takes the same operands in its place."""

import random

import pytest
import torch

from jevons.numerics import Fp8Weight, scaled
from jevons.numerics.fp8 import quantise_blocks

SIZES = [1, 5, 16, 64, 127, 128, 130, 256, 300, 576]


def check_as_torch_does(a, b):
    """The conditions of `_scaled_block1x128_block128x128`, and 16-byte rows."""
    (m, k), n, blocks = a.codes.shape, b.codes.shape[0], -(-a.codes.shape[1] // 128)
    assert b.codes.shape[1] == k and k % 16 == 0 and n % 16 == 0 and m % 16 == 0
    assert a.codes.dtype == b.codes.dtype == torch.float8_e4m3fn and a.codes.is_contiguous() and b.codes.is_contiguous()
    assert a.scale.shape == (m, blocks) and a.scale.dtype == torch.float32
    assert a.scale.stride(0) == 1 and (a.scale.stride(1) == m or blocks == 1 == a.scale.stride(1))
    padded = blocks + -blocks % 4
    assert b.scale.shape == (padded, -(-n // 128)) and b.scale.dtype == torch.float32
    assert b.scale.stride(0) == 1 and (b.scale.stride(1) == padded or b.scale.shape[1] == 1)


def test_layouts_and_numbers_of_any_shape():
    for _ in range(30):
        m, n, k = random.randint(1, 40), random.choice(SIZES), random.choice(SIZES)
        w = torch.randn(n, k) * torch.randn(n, 1).exp()
        codes, scale_inv = quantise_blocks(w)
        a, b = scaled.activation(torch.randn(m, k) * random.choice([1e-6, 1.0, 1e4])), scaled.weight(codes, scale_inv)
        check_as_torch_does(a, b)
        held = Fp8Weight(codes, scale_inv)
        x = torch.randn(m, k) * torch.randn(m, 1).exp()
        x[0, :2] = 0
        got = scaled.linear(x, held.operand, None, product=lambda a, b, _: scaled.multiply(a, b, torch.float32))
        want = x.double() @ held.dense(torch.float64).T
        size = x.double().abs() @ held.dense(torch.float64).abs().T
        # E4M3 rounds by up to 2^-4, and what is far below its tile's largest by a little more
        assert got.shape == (m, n) and ((got - want).abs() <= (2**-4 + 2e-3) * size + 1e-30).all()


def test_what_the_tiles_hold_is_exact_where_e4m3_is():
    """Small integers times powers of two lose nothing: any wrong scale, row or column would show."""
    x = torch.randint(-8, 9, (7, 300)).float()
    x[:, ::128] = 448  # each tile's scale is 1
    w = torch.randint(-8, 9, (200, 300)).float()
    w[::128, ::128] = 448
    codes, scale_inv = quantise_blocks(w)
    scale_inv = scale_inv * 2.0 ** torch.randint(-3, 4, scale_inv.shape)
    held, bias = Fp8Weight(codes, scale_inv), torch.randint(-5, 6, (200,)).float()
    got = scaled.linear(x[:, None], held.operand, bias, product=lambda a, b, _: scaled.multiply(a, b, torch.float32))
    assert torch.equal(got, (x.double() @ held.dense(torch.float64).T + bias).float()[:, None])


def test_off_a_gpu_it_says_why_not():
    assert "no GPU" in scaled.why_not(torch.device("cpu"))


@pytest.mark.skipif(scaled.why_not(torch.device("cuda")) is not None if torch.cuda.is_available() else True,
                    reason="needs a Hopper GPU and CUDA 12.9")
def test_the_call_itself():
    for m, n, k in (1, 128, 256), (17, 576, 7168), (128, 4096, 512):
        x, w = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), torch.randn(n, k, device="cuda")
        held = Fp8Weight(*quantise_blocks(w))
        want = scaled.multiply(scaled.activation(x), held.operand, torch.float64)[:m, :n]
        got = held.linear(x, None).double()
        assert (got - want).norm() / want.norm() < 5e-3
