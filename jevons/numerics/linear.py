"""`linear(x, weight)`: every projection of every network. A weight is dense, or packed (FP8 blocks, rows held apart)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from jevons.numerics.fp8 import BLOCK, dequantise_blocks

STRIP = BLOCK  # rows dequantised at a time: at 512 of 7168 columns the copies leave the cache, and it takes five times as long


class PackedWeight(Protocol):
    """A weight that is not a dense tensor; it knows how to multiply itself. For inference: no gradient reaches it."""

    shape: torch.Size

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., in] -> [..., out]"""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as one tensor [out, in]: a copy."""


Weight = torch.Tensor | PackedWeight


class Fp8Weight:
    """A published FP8 weight: codes [out, in] and a scale per 128 x 128 block, dequantised as it is used."""

    def __init__(self, codes: torch.Tensor, scale_inv: torch.Tensor):
        self.codes, self.scale_inv, self.shape = codes, scale_inv, codes.shape

    def strip(self, row: int, dtype: torch.dtype) -> torch.Tensor:
        """STRIP rows from `row` on (a multiple of BLOCK), or what is left of them."""
        codes, scale_inv = self.codes[row : row + STRIP], self.scale_inv[row // BLOCK : (row + STRIP) // BLOCK]
        if codes.device.type != "cpu" or codes.shape[0] % BLOCK or codes.shape[1] % BLOCK:
            return dequantise_blocks(codes, scale_inv, dtype)
        # The same numbers at 2.7 times the speed: E4M3's bits, moved into place, are an FP16 number 256 times too small.
        wide = codes.view(torch.int8).to(torch.int16)
        bits = (wide & 0x7F).bitwise_left_shift_(7).bitwise_or_(wide.bitwise_and_(-0x8000))
        blocks = bits.view(torch.float16).float().view(len(scale_inv), BLOCK, -1, BLOCK)
        return blocks.mul_(scale_inv[:, None, :, None] * 256).view(codes.shape).to(dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = torch.cat([F.linear(x, self.strip(row, x.dtype)) for row in range(0, self.shape[0], STRIP)], dim=-1)
        return out if bias is None else out + bias

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([self.strip(row, dtype) for row in range(0, self.shape[0], STRIP)])


class Rows:
    """Weights of the same input, one below the other, each where it lies (in a file's memory map): no fusing copy."""

    def __init__(self, parts: Sequence[Weight]):
        self.parts = list(parts)
        self.shape = torch.Size([sum(p.shape[0] for p in parts), parts[0].shape[1]])

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = torch.cat([linear(x, part) for part in self.parts], dim=-1)
        return out if bias is None else out + bias

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([dense(part, dtype) for part in self.parts])


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in], weight [out, in] -> [..., out]"""
    if isinstance(weight, torch.Tensor):
        return F.linear(x, weight, bias)
    return weight.linear(x, bias)


def dense(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight as a tensor of `dtype`; itself where it is one."""
    return weight.to(dtype) if isinstance(weight, torch.Tensor) else weight.dense(dtype)


def grouped_linear(x_MD: torch.Tensor, w_EFD: torch.Tensor | Sequence[Weight], offs_E: torch.Tensor) -> torch.Tensor:
    """Rows of `x_MD`, sorted by expert, times their own expert's weight: [M, F]. Weights are stacked, or one an expert.

    `offs_E` (int32) holds the end of each expert's rows; the last one is M. Under autocast both operands are cast,
    as `F.linear` does by itself and `grouped_mm` does not.
    """
    if not isinstance(w_EFD, torch.Tensor):
        ends = offs_E.tolist()
        outs = [linear(x_MD[begin:end], w) for w, begin, end in zip(w_EFD, [0, *ends], ends, strict=False) if end > begin]
        return torch.cat(outs)
    if torch.is_autocast_enabled(x_MD.device.type):
        dtype = torch.get_autocast_dtype(x_MD.device.type)
        x_MD, w_EFD = x_MD.to(dtype), w_EFD.to(dtype)
    return F.grouped_mm(x_MD, w_EFD.transpose(-2, -1), offs=offs_E)
