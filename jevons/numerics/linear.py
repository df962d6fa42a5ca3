"""`linear(x, weight)`: every projection of every network. A weight is dense, or packed (FP8 blocks, int8, int4)."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F


class PackedWeight(Protocol):
    """A weight that is not a dense tensor; it knows how to multiply itself."""

    shape: torch.Size

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., in] -> [..., out]"""


Weight = torch.Tensor | PackedWeight


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in], weight [out, in] -> [..., out]"""
    if isinstance(weight, torch.Tensor):
        return F.linear(x, weight, bias)
    return weight.linear(x, bias)


def grouped_linear(x_MD: torch.Tensor, w_EFD: torch.Tensor, offs_E: torch.Tensor) -> torch.Tensor:
    """Rows of `x_MD`, sorted by expert, times their own expert's weight: [M, F].

    `offs_E` (int32) holds the end of each expert's rows; the last one is M. Under autocast both operands are cast,
    as `F.linear` does by itself and `grouped_mm` does not.
    """
    if torch.is_autocast_enabled(x_MD.device.type):
        dtype = torch.get_autocast_dtype(x_MD.device.type)
        x_MD, w_EFD = x_MD.to(dtype), w_EFD.to(dtype)
    return F.grouped_mm(x_MD, w_EFD.transpose(-2, -1), offs=offs_E)
