"""The small steps of training between matrix products, forward and backward: a reference in plain torch, and one native kernel
each for float32 and bf16 on a CPU, where torch takes up to ten passes over memory (it has no fused backward of RMSNorm there).

Every function has the reference's signature and takes torch's way where its kernel may not run. Kernels work in float32 and
round once, at the end; their sums do not depend on the number of threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from jevons.numerics.kernels import KINDS
from jevons.numerics.native import CMatrix, library

CHUNK = 64  # rows that fused.cpp sums at a time


def available(*tensors: torch.Tensor) -> bool:
    """Whether the kernels may take these, with gradients or without."""
    return all(t.device.type == "cpu" and t.dtype in KINDS and type(t) in (torch.Tensor, torch.nn.Parameter) and t.numel() > 0
               for t in tensors) and library() is not None


def upcast(x: torch.Tensor) -> torch.Tensor:
    """At least float32: where sums are delicate. float64 stays, so that parity between layouts can be read to 1e-9."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The precision that products of `x` are taken in here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[N, D], the numbers of each row one behind the other, as the kernels take them."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def as_matrix(x: torch.Tensor) -> CMatrix:
    """Rows by address; whoever passes it keeps the tensor."""
    return CMatrix(x.data_ptr(), x.stride(0), KINDS[x.dtype])


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        rows, rstd = as_rows(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
        out = torch.empty(x.shape, dtype=dtype)
        library().jevons_norm(as_matrix(rows), *rows.shape, weight.data_ptr(), eps, as_matrix(as_rows(out)), rstd.data_ptr())
        ctx.save_for_backward(rows, weight, rstd)
        return out

    @staticmethod
    def backward(ctx, grad):
        dx, dw = _norm_grad(grad, *ctx.saved_tensors)
        return dx.view(grad.shape), dw, None, None


def _norm_grad(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, plus: torch.Tensor | None = None,
               narrow: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    g, dx, dw = as_rows(grad), torch.empty(x.shape, dtype=x.dtype), torch.empty_like(weight)
    parts = torch.empty(-(-len(x) // CHUNK), x.shape[1])
    add, copy = (None if t is None else t.data_ptr() for t in (plus, narrow))
    library().jevons_norm_grad(as_matrix(g), as_matrix(x), *x.shape, weight.data_ptr(), rstd.data_ptr(), add, as_matrix(dx), copy,
                               parts.data_ptr(), dw.data_ptr())
    return dx, dw


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, rounded to `dtype` (x's)."""
    dtype = dtype or x.dtype
    if available(x, weight) and weight.dtype == torch.float32 and weight.is_contiguous() and dtype in KINDS:
        return _Norm.apply(x, weight, eps, dtype)
    return F.rms_norm(upcast(x), weight.shape, upcast(weight), eps).to(dtype)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, more):
        rows, total = as_rows(more), torch.empty_like(x)
        library().jevons_add(x.data_ptr(), as_matrix(rows), *rows.shape, total.data_ptr())
        ctx.dtype = more.dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.to(ctx.dtype)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, more, weight, eps, dtype):
        rows, total, out = as_rows(more), torch.empty_like(x), torch.empty(x.shape, dtype=dtype)
        rstd = torch.empty(len(rows))
        library().jevons_add_norm(x.data_ptr(), as_matrix(rows), *rows.shape, weight.data_ptr(), eps, total.data_ptr(),
                                  as_matrix(as_rows(out)), rstd.data_ptr())
        ctx.save_for_backward(as_rows(total), weight, rstd)
        ctx.dtype = more.dtype
        return total, out

    @staticmethod
    def backward(ctx, plus, grad):
        narrow = torch.empty(grad.shape, dtype=ctx.dtype) if ctx.dtype == torch.bfloat16 else None
        dx, dw = _norm_grad(grad, *ctx.saved_tensors, plus.contiguous(), narrow)
        dx = dx.view(grad.shape)
        return dx, dx if narrow is None else narrow, dw, None, None


def _adds(x: torch.Tensor, more: torch.Tensor) -> bool:
    return available(x, more) and x.dtype == torch.float32 and x.is_contiguous() and x.shape == more.shape


def add(x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """x + more, a residual stream and what a layer gives, which may be of less precision."""
    return _Add.apply(x, more) if _adds(x, more) else x + more


def add_norm(x: torch.Tensor, more: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None,
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """x + more, and the `rms_norm` of that."""
    dtype = dtype or x.dtype
    if _adds(x, more) and weight.dtype == torch.float32 and weight.is_contiguous() and dtype in KINDS:
        return _AddNorm.apply(x, more, weight, eps, dtype)
    total = x + more
    return total, rms_norm(total, weight, eps, dtype)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        rows = as_rows(h)
        out = torch.empty(*h.shape[:-1], h.shape[-1] // 2, dtype=h.dtype)
        library().jevons_swiglu(as_matrix(rows), len(rows), out.shape[-1], as_matrix(as_rows(out)))
        ctx.save_for_backward(rows)
        ctx.shape = h.shape
        return out

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        g, dh = as_rows(grad), torch.empty(h.shape, dtype=h.dtype)
        library().jevons_swiglu_grad(as_matrix(g), as_matrix(h), len(h), g.shape[1], as_matrix(dh))
        return dh.view(ctx.shape)


def swiglu(h: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of h = [gate | up] along the last dimension."""
    if available(h):
        return _Swiglu.apply(h)
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets):
        rows = as_rows(logits)
        losses, lse = torch.empty(len(rows)), torch.empty(len(rows))
        library().jevons_cross_entropy(as_matrix(rows), *rows.shape, targets.data_ptr(), losses.data_ptr(), lse.data_ptr())
        ctx.save_for_backward(rows, targets, lse)
        return losses

    @staticmethod
    def backward(ctx, grad):
        logits, targets, lse = ctx.saved_tensors
        g, d = grad.contiguous(), torch.empty(logits.shape, dtype=logits.dtype)
        library().jevons_cross_entropy_grad(g.data_ptr(), as_matrix(logits), *logits.shape, targets.data_ptr(), lse.data_ptr(),
                                            as_matrix(d))
        return d, None


def cross_entropy(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Each row's loss [N] in float32. Raises IndexError for a target past the vocabulary."""
    if not available(logits_NV):
        return F.cross_entropy(upcast(logits_NV), targets_N, reduction="none")
    if bool(((targets_N < 0) | (targets_N >= logits_NV.shape[1])).any()):
        worst = int(targets_N.min()) if int(targets_N.min()) < 0 else int(targets_N.max())
        raise IndexError(f"a target is {worst}; 0 to {logits_NV.shape[1] - 1} would be right")
    return _CrossEntropy.apply(logits_NV, targets_N.contiguous())


class _Dispatch(torch.autograd.Function):
    """Copy each token's row to its K cells (row i*K+j to cell_M[i*K+j]); other cells are zero. Backward collects and sums
    over K: no scatter-add, so it is deterministic whatever the thread count, which bit-exact resume needs."""

    @staticmethod
    def forward(ctx, x_ND, cell_M, k, size):
        ctx.save_for_backward(cell_M)
        ctx.k = k
        return x_ND.new_zeros(size, x_ND.shape[1]).index_copy_(0, cell_M, x_ND.repeat_interleave(k, dim=0))

    @staticmethod
    def backward(ctx, grad_MD):
        (cell_M,) = ctx.saved_tensors
        return grad_MD.index_select(0, cell_M).view(-1, ctx.k, grad_MD.shape[-1]).sum(1), None, None, None


class _Collect(torch.autograd.Function):
    """y[cell_M]; every cell is read at most once, so the backward is a copy too."""

    @staticmethod
    def forward(ctx, y_MD, cell_M):
        ctx.save_for_backward(cell_M)
        ctx.size = y_MD.shape[0]
        return y_MD.index_select(0, cell_M)

    @staticmethod
    def backward(ctx, grad_MD):
        (cell_M,) = ctx.saved_tensors
        return grad_MD.new_zeros(ctx.size, grad_MD.shape[1]).index_copy_(0, cell_M, grad_MD), None


class _NativeDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, cell_NK, size, dtype):
        x, out = as_rows(x_ND), torch.empty(size, x_ND.shape[1], dtype=dtype)
        library().jevons_dispatch(as_matrix(x), *x.shape, cell_NK.data_ptr(), cell_NK.shape[1], None, as_matrix(out), size)
        ctx.save_for_backward(cell_NK)
        ctx.dtype = x.dtype
        return out

    @staticmethod
    def backward(ctx, grad):
        (cell_NK,) = ctx.saved_tensors
        g, dx = as_rows(grad), torch.empty(len(cell_NK), grad.shape[1], dtype=ctx.dtype)
        library().jevons_collect(as_matrix(g), *dx.shape, cell_NK.data_ptr(), cell_NK.shape[1], None, as_matrix(dx))
        return dx, None, None, None


def dispatch(x_ND: torch.Tensor, cell_NK: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """[size, D] of `dtype`: row n of x in each of its K cells, zeros in cells that nobody has. No two cells are the same."""
    if available(x_ND) and dtype in KINDS:
        return _NativeDispatch.apply(x_ND, cell_NK.contiguous(), size, dtype)
    return _Dispatch.apply(x_ND.to(dtype), cell_NK.flatten(), cell_NK.shape[1], size)


class _NativeCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_MD, cell_NK, weights_NK):
        y, out = as_rows(y_MD), torch.empty(len(cell_NK), y_MD.shape[1], dtype=y_MD.dtype)
        library().jevons_collect(as_matrix(y), *out.shape, cell_NK.data_ptr(), cell_NK.shape[1], weights_NK.data_ptr(),
                                 as_matrix(out))
        ctx.save_for_backward(y, cell_NK, weights_NK)
        return out

    @staticmethod
    def backward(ctx, grad):
        y, cell_NK, weights_NK = ctx.saved_tensors
        g, dy, dots = as_rows(grad), torch.empty(y.shape, dtype=y.dtype), torch.empty_like(weights_NK)
        k = cell_NK.shape[1]
        library().jevons_dispatch(as_matrix(g), *g.shape, cell_NK.data_ptr(), k, weights_NK.data_ptr(), as_matrix(dy), len(y))
        library().jevons_collect_dots(as_matrix(g), as_matrix(y), *g.shape, cell_NK.data_ptr(), k, dots.data_ptr())
        return dy, None, dots


def combine(y_MD: torch.Tensor, cell_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """[N, D]: the sum over a token's K cells of weight * y[cell]."""
    if available(y_MD, weights_NK) and weights_NK.dtype == torch.float32:
        return _NativeCombine.apply(y_MD, cell_NK.contiguous(), weights_NK.contiguous())
    y_NKD = _Collect.apply(y_MD, cell_NK.flatten()).unflatten(0, cell_NK.shape)
    return (y_NKD * weights_NK[..., None].to(y_NKD.dtype)).sum(1)
