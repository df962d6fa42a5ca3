"""Weights that are stored in fewer bits than they are multiplied in: FP8 blocks as published, integers of 8 and 4 bits.

Integers are laid out for `native/rows.cpp`: panels of 16 rows, within which a vector of 64 bytes holds four columns (8 bits) or
eight (4 bits) of each row. A scale (bf16) belongs to one row and `group` columns.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from jevons.numerics.fp8 import BLOCK, Quantised, dequantise, quantise_tiles
from jevons.numerics.fp8_gemm import scaled_mm, why_no_scaled_mm
from jevons.numerics.kernels import FEW_FP8, FP8, INT4, INT8, linear_packed, unpack, usable
from jevons.numerics.native import CWeight

STRIP = BLOCK  # rows dequantised at a time: at 512 of 7168 columns the copies leave the cache, and it takes five times as long
NATIVE_STRIP = 2048  # the kernel writes each number once: larger products, fewer of them
PANEL = 16


class Fp8Weight:
    """A published FP8 weight: codes [out, in] and a scale per 128 x 128 block, dequantised as it is used."""

    def __init__(self, codes: torch.Tensor, scale_inv: torch.Tensor):
        self.codes, self.scale_inv, self.shape = codes, scale_inv, codes.shape

    @functools.cached_property
    def native(self) -> CWeight | None:
        """The kernels' handle; None where the codes do not lie as they need it."""
        if self.codes.device.type != "cpu" or not self.codes.is_contiguous():
            return None
        self._scale = self.scale_inv.float().contiguous()
        return CWeight(self.codes.data_ptr(), self._scale.data_ptr(), *self.shape, FP8, BLOCK)

    def part(self, first: int, rows: int) -> Fp8Weight | None:
        """Rows from `first` on, as views; None where they do not begin with a block."""
        if first % BLOCK:
            return None
        return Fp8Weight(self.codes[first : first + rows], self.scale_inv[first // BLOCK : -(-(first + rows) // BLOCK)])

    def __getstate__(self) -> dict[str, Any]:
        return {"codes": self.codes, "scale_inv": self.scale_inv, "shape": self.shape}

    def strip(self, row: int, dtype: torch.dtype, rows: int = STRIP) -> torch.Tensor:
        """Rows from `row` on (a multiple of BLOCK), or what is left of them."""
        part = self.part(row, min(rows, self.shape[0] - row))
        out = unpack(part.native, dtype)
        if out is not None:
            return out
        return dequantise(Quantised(part.codes, part.scale_inv, BLOCK), dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if why_no_scaled_mm(x.device) is None and x.numel():
            out = self._on_tensor_cores(x)
            return out if bias is None else out + bias
        if not usable(x) or self.native is None:
            out = torch.cat([F.linear(x, self.strip(row, x.dtype)) for row in range(0, self.shape[0], STRIP)], dim=-1)
        elif x.numel() <= FEW_FP8 * x.shape[-1]:
            return linear_packed(x, (CWeight * 1)(self.native), self.shape[0], bias)
        else:
            rows = range(0, self.shape[0], NATIVE_STRIP)
            out = torch.cat([F.linear(x, self.strip(row, x.dtype, NATIVE_STRIP)) for row in rows], dim=-1)
        return out if bias is None else out + bias

    def _on_tensor_cores(self, x: torch.Tensor) -> torch.Tensor:
        """x is quantised on the way, in tiles of 1 x 128 (float32 goes through bf16: the product gives no more)."""
        dtype = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
        tiles = quantise_tiles(x.reshape(-1, x.shape[-1]))
        out = scaled_mm(tiles, Quantised(self.codes, self.scale_inv.float(), BLOCK), dtype)
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([self.strip(row, dtype) for row in range(0, self.shape[0], STRIP)])


class IntWeight:
    """A weight as integers of 8 or 4 bits. Activations are taken as 16-bit integers, so that what is lost is the weight's."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, shape: torch.Size, bits: int, group: int):
        """codes uint8 [panels, in / columns a vector, 64]; scale bf16 [panels, in / group, 16]; sizes rounded up."""
        self.codes, self.scale, self.shape, self.bits, self.group = codes, scale, torch.Size(shape), bits, group

    @classmethod
    def of(cls, w_NK: torch.Tensor, bits: int, group: int) -> IntWeight:
        """Quantise. Raises ValueError where a number is not finite."""
        rows, columns = w_NK.shape
        panels, groups = -(-rows // PANEL), -(-columns // group)
        w = torch.zeros(panels * PANEL, groups * group)
        w[:rows, :columns] = w_NK
        if not w.isfinite().all():
            raise ValueError("a weight that is not finite cannot be packed")
        scale = _scales(w.view(-1, groups, group), bits)
        inverse = torch.where(scale == 0, 0.0, 1 / scale.float())[..., None]
        half = 2 ** (bits - 1)
        lowest = -half if bits == 4 else 1 - half
        codes = (w.view(-1, groups, group) * inverse).round_().clamp_(lowest, half - 1).add_(half).to(torch.uint8)
        codes = codes.view(panels, PANEL, -1, 32 // bits)
        if bits == 4:
            codes = codes[..., :4] | codes[..., 4:] << 4
        codes = codes.transpose(1, 2).reshape(panels, -1, 64)
        return cls(codes, scale.view(panels, PANEL, groups).transpose(1, 2).contiguous(), w_NK.shape, bits, group)

    @functools.cached_property
    def native(self) -> CWeight | None:
        if self.codes.device.type != "cpu":
            return None
        return CWeight(self.codes.data_ptr(), self.scale.data_ptr(), *self.shape, INT8 if self.bits == 8 else INT4, self.group)

    def part(self, first: int, rows: int) -> IntWeight | None:
        """Rows from `first` on, as views; None where they do not begin with a panel."""
        if first % PANEL:
            return None
        panels = slice(first // PANEL, -(-(first + rows) // PANEL))
        return IntWeight(self.codes[panels], self.scale[panels], (rows, self.shape[1]), self.bits, self.group)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "native"}

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if usable(x) and self.native is not None:
            return linear_packed(x, (CWeight * 1)(self.native), self.shape[0], bias)
        return F.linear(x, self.dense(x.dtype), bias)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        codes = self.codes.view(*self.codes.shape[:2], PANEL, 4)
        if self.bits == 4:
            codes = torch.cat([codes & 0x0F, codes >> 4], dim=-1)
        rows = codes.transpose(1, 2).reshape(len(codes) * PANEL, -1).float().sub_(2 ** (self.bits - 1))
        scale = self.scale.transpose(1, 2).reshape(len(rows), -1, 1).float()
        rows = rows.view(*scale.shape[:2], self.group).mul_(scale).view(len(rows), -1)
        return rows[: self.shape[0], : self.shape[1]].to(dtype)


def _scales(w_NGS: torch.Tensor, bits: int) -> torch.Tensor:
    """A scale (bf16) for each group: 8 bits reach as far as its largest number; of 4 bits the one of the smallest error.

    Four bits go from -8 to 7, so the number of the largest magnitude becomes -8, whatever its sign."""
    if bits == 8:
        return (w_NGS.abs().amax(-1) / 127).bfloat16()
    furthest = w_NGS.gather(-1, w_NGS.abs().argmax(-1, keepdim=True)) / -8
    best, least = None, None
    for factor in (1.0, 0.95, 0.9, 0.85, 0.8):
        scale = (furthest * factor).bfloat16().float()
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        error = (w_NGS * inverse).round_().clamp_(-8, 7).mul_(scale).sub_(w_NGS).square_().sum(-1, keepdim=True)
        if best is None:
            best, least = scale, error
        else:
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best.squeeze(-1).bfloat16()
