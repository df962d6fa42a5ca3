"""FP8 weight blocks as published checkpoints store them (V3 report, section 3.3.2; facts: `weight_scale_inv`)."""

from __future__ import annotations

import torch

BLOCK = 128
E4M3_MAX = 448.0


def quantise_blocks(w_MN: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes float8_e4m3fn [M, N], scale_inv float32 [ceil(M/128), ceil(N/128)]): codes * scale_inv is about w.

    A block's scale_inv is its largest magnitude / 448 (rounded up to a power of two on request), 1 for a block of zeros.
    Blocks at the edges may be partial.
    """
    m, n = w_MN.shape
    rows, columns = -(-m // BLOCK), -(-n // BLOCK)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK, dtype=torch.float32, device=w_MN.device)
    padded[:m, :n] = w_MN
    largest = padded.abs().view(rows, BLOCK, columns, BLOCK).amax((1, 3))
    scale = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    # a scale that underflowed would give codes past the largest, which E4M3 turns into NaN
    codes = (w_MN.float() / _spread(scale, m, n)).clamp(-E4M3_MAX, E4M3_MAX)
    return codes.to(torch.float8_e4m3fn), scale


def dequantise_blocks(codes_MN: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[M, N] in `dtype`. Raises ValueError when the scales are not one per (partial) 128 x 128 block."""
    m, n = codes_MN.shape
    right = (-(-m // BLOCK), -(-n // BLOCK))
    if tuple(scale_inv.shape) != right:
        raise ValueError(f"scale_inv has shape {list(scale_inv.shape)}; a weight of [{m}, {n}] needs {list(right)}")
    return (codes_MN.float() * _spread(scale_inv.float(), m, n)).to(dtype)


def _spread(scale: torch.Tensor, m: int, n: int) -> torch.Tensor:
    return scale.repeat_interleave(BLOCK, 0)[:m].repeat_interleave(BLOCK, 1)[:, :n]
