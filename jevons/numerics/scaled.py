"""FP8 weights times activations that are quantised on the way (1 x 128 tiles), through torch's block-wise `scaled_mm` on Hopper.

The layouts are torch's (ScaledBlas.cpp): codes in rows; scales of activations [M, K/128] with strides (1, M), of weights
[K/128 up to a multiple of 4, N/128] with strides (1, that). `multiply` is what the call computes, from the same operands.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from jevons.numerics.fp8 import BLOCK, E4M3_MAX

ALIGN = 16  # rows and columns that the tensor cores' product wants multiples of


class Operand(NamedTuple):
    codes: torch.Tensor
    scale: torch.Tensor
    rows: int  # of these, without filling


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why `scaled_mm` cannot multiply blocks on `device`; None where it can."""
    if device.type != "cuda":
        return f"no GPU: the device is {device.type}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "only capability 9 (Hopper) multiplies FP8 blocks"
    cuda = torch.version.cuda or "0.0"
    return None if tuple(map(int, cuda.split(".")[:2])) >= (12, 9) else f"CUDA {cuda}: 12.9 would be right"


def activation(x_MK: torch.Tensor) -> Operand:
    """Quantise rows in tiles of 128: a tile's scale is its largest magnitude / 448, 1 for a tile of zeros."""
    m, k = x_MK.shape
    below, right = -m % ALIGN, -k % BLOCK
    tiles = F.pad(x_MK.float(), (0, right, 0, below)).unflatten(1, (-1, BLOCK))
    largest = tiles.abs().amax(-1)
    scale = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    codes = (tiles / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).flatten(1)
    return Operand(codes[:, : k + -k % ALIGN].contiguous(), scale.t().contiguous().t(), m)


def weight(codes_NK: torch.Tensor, scale_inv: torch.Tensor) -> Operand:
    """A published weight as the call wants it; its codes are copied only where a size is no multiple of 16."""
    n, k = codes_NK.shape
    below, right = -n % ALIGN, -k % ALIGN
    if below or right:
        codes_NK = F.pad(codes_NK.view(torch.uint8), (0, right, 0, below)).view(torch.float8_e4m3fn)
    scale = F.pad(scale_inv.float(), (0, -scale_inv.shape[1] % 4)).contiguous()
    return Operand(codes_NK.contiguous(), scale.t(), n)


def scaled_mm(a: Operand, b: Operand, dtype: torch.dtype) -> torch.Tensor:
    recipe = F.ScalingType
    return F.scaled_mm(a.codes, b.codes.t(), a.scale, recipe.BlockWise1x128, b.scale, recipe.BlockWise128x128, output_dtype=dtype)


def multiply(a: Operand, b: Operand, dtype: torch.dtype) -> torch.Tensor:
    """`scaled_mm` by the layouts' definition, anywhere."""
    k = a.codes.shape[1]
    x = a.codes.float() * a.scale.repeat_interleave(BLOCK, 1)[:, :k]
    w = b.codes.float() * b.scale.t().repeat_interleave(BLOCK, 0)[: len(b.codes)].repeat_interleave(BLOCK, 1)[:, :k]
    return (x @ w.t()).to(dtype)


def linear(x: torch.Tensor, w: Operand, bias: torch.Tensor | None, product=scaled_mm) -> torch.Tensor:
    """x [..., in] -> [..., out] in x's type (float32 is rounded to bf16 on the way: the product gives no more)."""
    a = activation(x.reshape(-1, x.shape[-1]))
    out = product(a, w, torch.bfloat16 if x.dtype == torch.float32 else x.dtype)[: a.rows, : w.rows].to(x.dtype)
    out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], w.rows)
