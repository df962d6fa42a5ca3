"""Attention of training rows in native passes against plain torch in float64: values, gradients, padding."""

import random

import pytest
import torch

from jevons.model.attention import attend_segments
from jevons.model.layers import rotate_interleaved
from jevons.numerics import heads
from jevons.numerics.native import CWidths, library

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler: torch's own way is what runs")


def exact(q_NA, kv_NB, key_NR, rope, widths, segments, scale):
    """The definition, in the precision of its inputs."""
    q_nope, q_rope = q_NA.unflatten(-1, (widths.heads, -1)).split([widths.plain, widths.rotary], dim=-1)
    k_nope, v = kv_NB.unflatten(-1, (widths.heads, -1)).split([widths.plain, widths.value], dim=-1)
    shared = rotate_interleaved(key_NR, rope)[:, None].expand(-1, widths.heads, -1)
    q, k = torch.cat([q_nope, rotate_interleaved(q_rope, rope)], -1), torch.cat([k_nope, shared], -1)
    return attend_segments(q, k, v, segments, scale)


def inputs(widths, segments, dtype):
    """Leaves in views whose rows do not touch, and the rotations of random positions."""
    n = sum(rows * length for rows, length in segments) + random.choice([0, 5])
    shapes = [widths.heads * (widths.plain + widths.rotary), widths.heads * (widths.plain + widths.value), widths.rotary]
    leaves = [torch.randn(n, width + 3).to(dtype)[:, :width].detach().requires_grad_() for width in shapes]
    angle = torch.rand(n, 1, widths.rotary // 2, dtype=torch.float64) * 6
    return leaves, torch.cat([angle.cos(), angle.sin()], 1)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(1, 3, 2, 5), (2, 16, 16, 16), (4, 24, 8, 40), (3, 64, 32, 64)])
def test_causal(shape, dtype, tolerance):
    widths = CWidths(*shape)
    segments = [(random.randint(1, 3), random.randint(1, 70)) for _ in range(random.randint(1, 3))]
    leaves, rope = inputs(widths, segments, dtype)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    assert heads.usable(*leaves, segments) and not heads.usable(*doubles, segments)
    out = heads.causal(*leaves, rope.float(), widths, segments, 0.2)
    want = exact(*doubles, rope, widths, segments, 0.2)
    grad = torch.randn(want.shape).to(dtype)
    got = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(want, doubles, grad.double())
    for mine, theirs in zip([out, *got], [want, *expected], strict=True):
        assert mine.dtype == dtype and mine.shape == theirs.shape
        error = (mine.double() - theirs).detach().abs()
        assert float(error.max()) <= tolerance * float(theirs.detach().abs().max().clamp(min=1)), float(error.max())


def test_numbers_that_are_gone_stay_so():
    widths, segments = CWidths(2, 8, 8, 8), [(2, 9)]
    leaves, rope = inputs(widths, segments, torch.float32)
    with torch.no_grad():
        leaves[0][4] = torch.nan
    out = heads.causal(*leaves, rope.float(), widths, segments, 0.3)
    assert out[4].isnan().all() and torch.isfinite(out[[0, 3, 5, 12]]).all()
