"""Weights of a step in the precision of its products: cast once for all micro-batches. Their gradients come in that precision
too, and are added up in float32. What autocast computes, in half the passes over memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from jevons.numerics.fp8_gemm import grouped_mm
from jevons.numerics.fused import available, widen_into


class Casts:
    """A step's cast weights; valid until the optimizer's step."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._weights: dict[nn.Parameter, torch.Tensor] = {}

    def of(self, weight: nn.Parameter) -> torch.Tensor:
        found = self._weights.get(weight)
        return self._weights.setdefault(weight, weight.detach().to(self.dtype)) if found is None else found


class Kept:
    """A micro-batch's gradients of the weights that `casts` holds; they are not among autograd's."""

    def __init__(self, casts: Casts):
        self.casts = casts
        self.grads: dict[nn.Parameter, torch.Tensor] = {}

    def add(self, weight: nn.Parameter, grad: torch.Tensor) -> None:
        before = self.grads.get(weight)
        self.grads[weight] = grad if before is None else before.float() + grad

    def beside(self, weight: nn.Parameter, grad: torch.Tensor | None) -> torch.Tensor | None:
        """A weight's whole gradient; `grad` is autograd's part."""
        own = self.grads.get(weight)
        return grad if own is None else own if grad is None else grad + own


_here = threading.local()


@contextmanager
def micro_batch(casts: Casts | None) -> Iterator[Kept | None]:
    """What this thread records, or records again, meanwhile reads weights from `casts` (None: as autocast does)."""
    kept = None if casts is None else Kept(casts)
    before, _here.kept = getattr(_here, "kept", None), kept
    try:
        yield kept
    finally:
        _here.kept = before


def keeping(x: torch.Tensor, weight: torch.Tensor) -> Kept | None:
    """Where the gradient of a product of x and `weight` is to be kept; None where autograd sees to it."""
    kept = getattr(_here, "kept", None)
    if kept is None or type(weight) is not nn.Parameter or not (weight.requires_grad and torch.is_grad_enabled()):
        return None
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == kept.casts.dtype
    return kept if cast and available(x, weight) else None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, offs_E, kept: Kept):
        flat, w = x.reshape(-1, x.shape[-1]).to(kept.casts.dtype), kept.casts.of(weight)
        ctx.save_for_backward(flat, w, offs_E)
        ctx.weight, ctx.kept, ctx.like = weight, kept, (x.shape, x.dtype)
        out = flat @ w.t() if offs_E is None else grouped_mm(flat, w.transpose(-2, -1), offs_E)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        flat, w, offs_E = ctx.saved_tensors
        shape, dtype = ctx.like
        g = grad.reshape(-1, grad.shape[-1])
        ctx.kept.add(ctx.weight, g.t() @ flat if offs_E is None else grouped_mm(g.t(), flat, offs_E))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ w if offs_E is None else grouped_mm(g, w, offs_E)).to(dtype).view(shape)
        return dx, None, None, None


def product(x: torch.Tensor, weight: nn.Parameter, kept: Kept, offs_E: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] times weight [out, in]; with `offs_E` rows sorted by expert, which end there, times weight [E, out, in]."""
    return _Product.apply(x, weight, offs_E, kept)


def accumulate(total: torch.Tensor | None, grad: torch.Tensor) -> torch.Tensor:
    """total + grad in float32 (float64 stays), in place where there is a total."""
    if total is None:
        return grad.float() if grad.dtype == torch.bfloat16 else grad
    return widen_into(total, grad)
