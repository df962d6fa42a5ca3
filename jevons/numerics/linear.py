"""`linear(x, weight)`: every projection of every network. A weight is dense, or packed (FP8 blocks, rows held apart)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from jevons.numerics.fp8_gemm import grouped_mm
from jevons.numerics.fp8_linear import Fp8, fp8_linear, training
from jevons.numerics.fused import swiglu
from jevons.numerics.kernels import FEW, FEW_FP8, handle, linear_dense, linear_packed, usable
from jevons.numerics.native import CWeight
from jevons.numerics.packed import Fp8Weight, IntWeight
from jevons.numerics.recompute import remade


class PackedWeight(Protocol):
    """A weight that is not a dense tensor; it knows how to multiply itself. For inference: no gradient reaches it."""

    shape: torch.Size

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., in] -> [..., out]"""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as one tensor [out, in]: a copy."""


Weight = torch.Tensor | PackedWeight


class Rows:
    """Weights of the same input, one below the other, each where it lies (in a file's memory map): no fusing copy."""

    def __init__(self, parts: Sequence[Weight]):
        self.parts = list(parts)
        self.shape = torch.Size([sum(p.shape[0] for p in parts), parts[0].shape[1]])
        self._kept: dict[torch.dtype, ctypes.Array[CWeight] | None] = {}

    def _handles(self, dtype: torch.dtype) -> ctypes.Array[CWeight] | None:
        if dtype not in self._kept:
            handles = [None if isinstance(part, Rows) else handle(part, dtype) for part in self.parts]
            self._kept[dtype] = (CWeight * len(handles))(*handles) if all(handles) else None
        return self._kept[dtype]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": {}}  # addresses: worthless in a copy

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        few = all(rows <= _most_rows(part, x.dtype) for part in self.parts)
        if few and usable(x) and (handles := self._handles(x.dtype)) is not None:
            return linear_packed(x, handles, self.shape[0], bias)
        out = torch.cat([linear(x, part) for part in self.parts], dim=-1)
        return out if bias is None else out + bias

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([dense(part, dtype) for part in self.parts])


def _most_rows(weight: Weight, dtype: torch.dtype) -> float:
    """Rows of input up to which the kernels are the faster way."""
    return math.inf if isinstance(weight, IntWeight) else FEW_FP8 if isinstance(weight, Fp8Weight) else FEW.get(dtype, 0)


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, fp8: Fp8 | None = None) -> torch.Tensor:
    """x [..., in], weight [out, in] -> [..., out]; as `fp8` says where it is given, but for the engine."""
    if training(fp8):
        return fp8_linear(x, weight, bias, fp8)
    if isinstance(weight, torch.Tensor):
        out = linear_dense(x, weight, bias)
        return F.linear(x, weight, bias) if out is None else out
    return weight.linear(x, bias)


def dense(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight as a tensor of `dtype`; itself where it is one."""
    return weight.to(dtype) if isinstance(weight, torch.Tensor) else weight.dense(dtype)


def grouped_linear(x_MD: torch.Tensor, w_EFD: torch.Tensor | Sequence[Weight], offs_E: torch.Tensor, fp8: Fp8 | None = None,
                   ) -> torch.Tensor:
    """Rows of `x_MD`, sorted by expert, times their own expert's weight: [M, F]. Weights are stacked, or one an expert.

    `offs_E` (int32) holds the end of each expert's rows; the last one is M. Under autocast both operands are cast,
    as `F.linear` does by itself and `grouped_mm` does not.
    """
    if training(fp8):
        return fp8_linear(x_MD, w_EFD, None, fp8, offs_E)
    if not isinstance(w_EFD, torch.Tensor):
        ends = offs_E.tolist()
        outs = [linear(x_MD[begin:end], w) for w, begin, end in zip(w_EFD, [0, *ends], ends, strict=False) if end > begin]
        return torch.cat(outs)
    if torch.is_autocast_enabled(x_MD.device.type):
        dtype = torch.get_autocast_dtype(x_MD.device.type)
        x_MD, w_EFD = x_MD.to(dtype), w_EFD.to(dtype)
    return grouped_mm(x_MD, w_EFD.transpose(-2, -1), offs_E)


def swiglu_linear(gate_up: torch.Tensor, weight: Weight | Sequence[Weight], offs_E: torch.Tensor | None = None,
                  fp8: Fp8 | None = None, recompute: bool = False) -> torch.Tensor:
    """silu(gate) * up times the weight; with `offs_E` a grouped product. In FP8, or with `recompute`, gate and up are kept, not
    what is multiplied."""
    if training(fp8):
        return fp8_linear(gate_up, weight, None, fp8, offs_E, swiglu=True)
    h = swiglu(gate_up)
    with remade(recompute, h, lambda: swiglu(gate_up)):
        return linear(h, weight) if offs_E is None else grouped_linear(h, weight, offs_E)
