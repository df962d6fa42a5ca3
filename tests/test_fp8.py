"""FP8 blocks: within one step of the value, whatever the shape; zero and denormal blocks are finite."""

from __future__ import annotations

import pytest
import torch

from jevons.numerics.fp8 import dequantise_blocks, quantise_blocks


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (576, 7), (300, 128)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_round_trip_is_within_half_a_step(shape, power_of_two):
    w = torch.randn(shape, dtype=torch.float64) * torch.logspace(-3, 3, shape[1], dtype=torch.float64)
    codes, scale = quantise_blocks(w, power_of_two)
    back = dequantise_blocks(codes, scale, torch.float64)
    spread = scale.double().repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    # E4M3: 3 bits of mantissa, denormal below 2**-6 in steps of 2**-9
    step = torch.maximum(w.abs() / 16, spread * 2**-10)
    assert ((back - w).abs() <= step * 1.001).all()
    assert codes.dtype is torch.float8_e4m3fn and tuple(scale.shape) == (-(-shape[0] // 128), -(-shape[1] // 128))
    if power_of_two:
        assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))


def test_zero_and_tiny_blocks_are_finite():
    for value in (0.0, 1e-38, 3e38):
        w = torch.full((130, 130), value)
        back = dequantise_blocks(*quantise_blocks(w), torch.float32)
        assert torch.isfinite(back).all() and torch.allclose(back, w, rtol=0.07, atol=1e-38)


def test_wrong_scales_are_refused():
    codes, scale = quantise_blocks(torch.randn(130, 128))
    with pytest.raises(ValueError, match=r"needs \[2, 1\]"):
        dequantise_blocks(codes, scale[:1])
