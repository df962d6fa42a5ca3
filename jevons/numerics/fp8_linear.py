"""The linear of FP8 training: Fprop, Dgrad and Wgrad in E4M3 (V3 report, section 3.3), one `autograd.Function` for dense weights
and for stacked experts.

    Fprop   y[M, N]  = x, 1 x 128 tiles         times  w, 128 x 128 blocks
    Dgrad   dx[M, K] = dy, 1 x 128 tiles        times  the same blocks of w, transposed
    Wgrad   dw[N, K] = dy, 128 x 1 tiles        times  x, 128 x 1 tiles: dequantised, transposed, quantised again; in float32

What waits for the backward pass is kept as codes and scales, never as x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from jevons.numerics.fp8 import Quantised, dequantise, pack_e5m6, unpack_e5m6
from jevons.numerics.fp8_gemm import Backend, best_backend, whole_tiles


@dataclass(frozen=True)
class Fp8:
    """How one projection trains in FP8. `cache` is what it keeps of its input: E4M3 as multiplied; the 12 bits of E5M6 (V3:
    before attention's output projection); or, for `swiglu_linear`, SwiGLU's inputs in E4M3, its output computed again."""

    cache: Literal["e4m3", "e5m6", "swiglu"] = "e4m3"
    power_of_two: bool = False  # all scales
    x_power_of_two: bool = False  # those of the input (with E5M6 they are so in any case)
    grad_power_of_two: bool = False  # those of the output's gradient
    accumulation: Literal["promoted", "limited"] = "promoted"
    backend: Backend | None = None  # None: the best one of the device

    def choose(self, device: torch.device) -> Backend:
        return self.backend or best_backend(device.type, self.accumulation)


def training(fp8: Fp8 | None) -> bool:
    """Whether a module that `fp8` was attached to is to use it: not in the engine, which runs in inference mode."""
    return fp8 is not None and not torch.is_inference_mode_enabled()


def fp8_linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, fp8: Fp8, offs_E: torch.Tensor | None = None,
               swiglu: bool = False) -> torch.Tensor:
    """x [..., K] times w [N, K] -> [..., N]; with `offs_E`, rows sorted by expert times w [E, N, K] (given as [E, S], the ends of
    every expert's parts, rows of two parts share no tile in Wgrad). With `swiglu` x is [gate | up], and silu(gate) * up is
    multiplied. The result is in autocast's precision, or in x's."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    out = _Linear.apply(x.reshape(-1, x.shape[-1]), w, offs_E, fp8, dtype, swiglu)
    out = out.view(*x.shape[:-1], -1)
    return out if bias is None else out + bias.to(out.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MK, w, offs_E, fp8: Fp8, dtype: torch.dtype, swiglu: bool):
        back = fp8.choose(x_MK.device)
        power = fp8.power_of_two or fp8.x_power_of_two or fp8.cache == "e5m6"
        h = back.fuse(_swiglu)(x_MK) if swiglu else x_MK
        x, w8 = back.tiles(h, power), back.weight(w, fp8.power_of_two)
        if swiglu:
            kept = back.tiles(x_MK, fp8.power_of_two)[:2]
        else:
            kept = back.fuse(pack_e5m6)(x_MK) if fp8.cache == "e5m6" else x[:2]
        ctx.save_for_backward(*kept, w8.codes, w8.scale, offs_E)
        ctx.how, ctx.power, ctx.types = (fp8, back, swiglu), power, (x_MK.dtype, w.dtype)
        ctx.k, ctx.w_rows = h.shape[1], w8.rows
        return back.matmul(x, w8, dtype) if offs_E is None else back.grouped(x, w8, _of_experts(offs_E), dtype)

    @staticmethod
    def backward(ctx, grad_MN):
        kept, kept_scale, w_codes, w_scale, offs_E = ctx.saved_tensors
        (fp8, back, swiglu), (x_dtype, w_dtype) = ctx.how, ctx.types
        grad_power = fp8.power_of_two or fp8.grad_power_of_two
        grad_x = grad_w = None
        x = Quantised(kept, kept_scale, 1)  # what Wgrad makes its 128 x 1 tiles of
        if swiglu:
            gate_up, x = back.fuse(_again)(kept, kept_scale)
        elif fp8.cache == "e5m6":
            x = back.fuse(unpack_e5m6)(kept, kept_scale, ctx.k)
        if ctx.needs_input_grad[0]:
            grad, w_t = back.tiles(grad_MN, grad_power), Quantised(w_codes, w_scale, ctx.w_rows).t()
            grad_x = back.matmul(grad, w_t, x_dtype) if offs_E is None else back.grouped(grad, w_t, _of_experts(offs_E), x_dtype)
            grad_x = back.fuse(_swiglu_backward)(grad_x, gate_up) if swiglu else grad_x
        if ctx.needs_input_grad[1]:
            rows, ends = (None, None) if offs_E is None else whole_tiles(offs_E.flatten(), len(grad_MN))
            grad, x = back.columns(grad_MN, grad_power, rows), back.columns(x, ctx.power, rows)
            grad_w = (back.matmul(grad, x, w_dtype) if offs_E is None
                      else back.grouped_wgrad(grad, x, _of_experts(ends.view(offs_E.shape)), w_dtype))
        return grad_x, grad_w, None, None, None, None


def _of_experts(offs: torch.Tensor) -> torch.Tensor:
    """Where each expert's rows end."""
    return offs if offs.dim() == 1 else offs[:, -1].contiguous()


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _again(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[gate | up] as it was kept, and SwiGLU of it, in float32."""
    gate_up = dequantise(Quantised(codes, scale, 1))
    return gate_up, _swiglu(gate_up)


def _swiglu_backward(grad_h: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    s = gate.sigmoid()
    return torch.cat([grad_h * up * s * (1 + gate * (1 - s)), grad_h * gate * s], dim=-1).to(grad_h.dtype)
