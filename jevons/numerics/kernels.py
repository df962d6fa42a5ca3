"""What the native kernels do, as functions of tensors. Each returns None where its kernel may not run here: where gradients
are being recorded, off the CPU, under autocast, in another precision, without a compiler. The caller then goes torch's way."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from jevons.numerics.native import CExpert, CRouted, CWeight, library

KINDS = {torch.float32: 0, torch.bfloat16: 1}  # `Kind` of common.h; 2 is FP8, 3 and 4 are 8 and 4 bits
FP8, INT8, INT4 = 2, 3, 4
FEW = 16  # rows; with more of them torch's own products of dense weights are faster


def usable(x: torch.Tensor) -> bool:
    """Whether a kernel may take `x`."""
    return (not torch.is_grad_enabled() and x.dtype in KINDS and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
            and library() is not None)


def _flat(x: torch.Tensor) -> torch.Tensor:
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def linear_dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """x [..., in] times a dense weight [out, in] of its precision, for few rows."""
    rows = x.numel() // x.shape[-1]
    if not 0 < rows <= FEW or not usable(x) or x.dtype != weight.dtype or not weight.is_contiguous():
        return None
    flat = _flat(x)
    out = torch.empty(rows, weight.shape[0], dtype=x.dtype)
    bf16 = KINDS[x.dtype]
    library().jevons_linear_plain(weight.data_ptr(), bf16, *weight.shape, flat.data_ptr(), flat.stride(0), bf16, rows,
                                  None if bias is None else bias.data_ptr(), 0 if bias is None else KINDS[bias.dtype],
                                  out.data_ptr())
    return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)


def linear_packed(x: torch.Tensor, weights: ctypes.Array[CWeight], width: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., in] times weights that lie one below the other, `width` rows in all. `usable(x)` must hold."""
    flat = _flat(x)
    out = torch.empty(flat.shape[0], width, dtype=x.dtype)
    library().jevons_linear(weights, len(weights), flat.data_ptr(), flat.stride(0), KINDS[x.dtype], flat.shape[0],
                            None if bias is None else bias.data_ptr(), 0 if bias is None else KINDS[bias.dtype], out.data_ptr())
    return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, for few rows."""
    rows = x.numel() // x.shape[-1]
    if not 0 < rows <= FEW or not usable(x) or weight.dtype not in KINDS:
        return None
    flat = _flat(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    library().jevons_rms_norm(flat.data_ptr(), flat.stride(0), KINDS[x.dtype], rows, x.shape[-1], weight.data_ptr(),
                              KINDS[weight.dtype], eps, out.data_ptr())
    return out
