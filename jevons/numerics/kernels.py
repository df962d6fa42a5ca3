"""What the native kernels do, as functions of tensors. Each returns None where its kernel may not run here: where gradients
are being recorded, off the CPU, under autocast, in another precision, without a compiler. The caller then goes torch's way."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
import torch

from jevons.numerics.memory import HugePages
from jevons.numerics.native import CChoice, CExpert, CRouted, CWeight, library, state

KINDS = {torch.float32: 0, torch.bfloat16: 1}  # `Kind` of common.h; 2 is FP8, 3 and 4 are 8 and 4 bits
FP8, INT8, INT4 = 2, 3, 4
# Rows up to which the kernels beat torch's own products (measured on Zen 4): of dense weights, and of FP8 blocks, which torch
# must unpack first. Of integers they do for any number of rows, or come within a tenth.
FEW = {torch.float32: 4, torch.bfloat16: 16}
FEW_FP8 = 96
FEW_SMALL = 16  # rows for the small steps: gates, products head by head
LEAST_F32 = 2**18  # elements; torch calls a float32 product of less with less ado
FEW_NUMBERS, FEW_PRODUCTS = 2**15, 2**18  # of a norm, and of a gate's scores, however many the rows


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
    if not 0 < rows <= FEW.get(x.dtype, 0) or not usable(x) or x.dtype != weight.dtype or not weight.is_contiguous():
        return None
    if x.dtype == torch.float32 and weight.numel() < LEAST_F32:
        return None
    flat = _flat(x)
    out = torch.empty(rows, weight.shape[0], dtype=x.dtype)
    bf16 = KINDS[x.dtype]
    library().jevons_linear_plain(weight.data_ptr(), bf16, *weight.shape, flat.data_ptr(), flat.stride(0), bf16, rows,
                                  None if bias is None else bias.data_ptr(), 0 if bias is None else KINDS[bias.dtype],
                                  out.data_ptr())
    return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)


def handle(weight: Any, dtype: torch.dtype) -> CWeight | None:
    """A weight as the kernels take it, for activations of `dtype`. It does not keep the weight alive."""
    if not isinstance(weight, torch.Tensor):
        return weight.native
    if weight.dtype != dtype or not weight.is_contiguous() or weight.device.type != "cpu":
        return None
    return CWeight(weight.data_ptr(), None, *weight.shape, KINDS[dtype], 0)


def linear_packed(x: torch.Tensor, weights: ctypes.Array[CWeight], width: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., in] times weights that lie one below the other, `width` rows in all. `usable(x)` must hold."""
    flat = _flat(x)
    out = torch.empty(flat.shape[0], width, dtype=x.dtype)
    library().jevons_linear(weights, len(weights), flat.data_ptr(), flat.stride(0), KINDS[x.dtype], flat.shape[0],
                            None if bias is None else bias.data_ptr(), 0 if bias is None else KINDS[bias.dtype], out.data_ptr())
    return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)


def unpack(weight: CWeight | None, dtype: torch.dtype) -> torch.Tensor | None:
    """FP8 blocks as a tensor; None where the kernels cannot."""
    if weight is None or dtype not in KINDS or library() is None:
        return None
    out = torch.empty(weight.rows, weight.columns, dtype=dtype)
    library().jevons_unpack(weight, KINDS[dtype], out.data_ptr())
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, for few numbers."""
    rows = x.numel() // x.shape[-1]
    if not 0 < x.numel() <= FEW_NUMBERS or not usable(x) or weight.dtype not in KINDS:
        return None
    flat = _flat(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    library().jevons_rms_norm(flat.data_ptr(), flat.stride(0), KINDS[x.dtype], rows, x.shape[-1], weight.data_ptr(),
                              KINDS[weight.dtype], eps, out.data_ptr())
    return out


def heads(x_NHA: torch.Tensor, w: torch.Tensor, across: bool) -> torch.Tensor:
    """Each head of few tokens times a matrix of its own: [H, N, B]. `w` is [H, B, A], or, `across`, [H, A, B]."""
    n, count, width = x_NHA.shape
    out = w.shape[2 if across else 1]
    dense = w.stride()[1:] == (w.shape[2], 1) and x_NHA.stride(2) == 1
    if not 0 < n <= FEW_SMALL or not dense or not usable(x_NHA) or w.dtype not in KINDS:
        return torch.bmm(x_NHA.transpose(0, 1), w if across else w.transpose(1, 2))
    y = torch.empty(count, n, out, dtype=x_NHA.dtype)
    library().jevons_heads(x_NHA.data_ptr(), x_NHA.stride(0), x_NHA.stride(1), KINDS[x_NHA.dtype], n, count, width, w.data_ptr(),
                           w.stride(0), KINDS[w.dtype], out, across, y.data_ptr())
    return y


def gate(x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, choice: CChoice,
         ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """What a gate chooses for few tokens: experts [N, K], their weights, tokens per expert as int64 and as float32."""
    few = 0 < len(x_ND) <= FEW_SMALL or 0 < len(x_ND) * weight_ED.numel() <= FEW_PRODUCTS
    if not few or not usable(x_ND) or weight_ED.dtype not in KINDS or not weight_ED.is_contiguous():
        return None
    flat = _flat(x_ND)
    chosen = torch.empty(len(flat), choice.k, dtype=torch.int64)
    weights = torch.empty(len(flat), choice.k)
    rows, load = torch.empty(choice.experts, dtype=torch.int64), torch.empty(choice.experts)
    library().jevons_gate(choice, flat.data_ptr(), flat.stride(0), KINDS[flat.dtype], *flat.shape, weight_ED.data_ptr(),
                          KINDS[weight_ED.dtype], None if bias_E is None else bias_E.data_ptr(), chosen.data_ptr(),
                          weights.data_ptr(), rows.data_ptr(), load.data_ptr())
    return chosen, weights, rows, load


def draw(logits_SV: torch.Tensor, temperature_S: torch.Tensor, top_p_S: torch.Tensor, seeds_S: np.ndarray,
         positions_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Tokens and log-probs as `engine.sampler` draws them. Seeds are uint64."""
    if not usable(logits_SV) or not len(logits_SV):
        return None
    flat, positions = _flat(logits_SV), positions_S.contiguous()
    temperature, top_p = temperature_S.contiguous(), top_p_S.contiguous()
    seeds = np.ascontiguousarray(seeds_S)
    tokens, logprobs = torch.empty(len(flat), dtype=torch.int64), torch.empty(len(flat))
    library().jevons_draw(flat.data_ptr(), flat.stride(0), KINDS[flat.dtype], *flat.shape, temperature.data_ptr(),
                          top_p.data_ptr(), seeds.ctypes.data, positions.data_ptr(), tokens.data_ptr(), logprobs.data_ptr())
    return tokens, logprobs


class ExpertTable:
    """down(silu(gate x) * up x) of one MLP, or of each expert of a layer, as the kernel takes them; built anew where weights have
    moved. Weights are a pair for one MLP, stacked tensors, or lists with one weight an expert."""

    def __init__(self) -> None:
        self.held: tuple[Any, ...] = ()
        self.array: ctypes.Array[CExpert] | None = None
        self.strides = (0, 0, 0)
        self.count = 0
        self.kinds: tuple[int, ...] = ()  # kind and group of gate and up, and of down

    @property
    def compact(self) -> bool:
        """Integers: the kernel is faster than torch's way for any number of rows."""
        return bool(self.kinds) and self.kinds[0] >= INT8

    def __getstate__(self) -> dict[str, Any]:
        return {}  # addresses: worthless in a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()

    def ready(self, gate_up: Any, down: Any, dtype: torch.dtype) -> bool:
        """Whether the kernel can take these weights with activations of `dtype`."""
        held = (_identity(gate_up), _identity(down), dtype)
        if len(self.held) != 3 or any(a is not b and a != b for a, b in zip(held, self.held, strict=True)):
            self._build(gate_up, down, dtype)
            self.held = held
        return self.array is not None

    def _build(self, gate_up: Any, down: Any, dtype: torch.dtype) -> None:
        """Two threads may build at once, one while the other uses what it built: nothing is unset on the way."""
        strides = (0, 0, 0)
        if isinstance(down, torch.Tensor) and down.dim() == 3:
            pairs, count = [(gate_up[0], down[0])], len(down)
            strides = (gate_up.stride(0) * gate_up.itemsize,) * 2 + (down.stride(0) * down.itemsize,)
        else:
            pairs = list(zip(gate_up, down, strict=True)) if isinstance(down, list) else [(gate_up, down)]
            count = len(pairs)
        rows = []
        for both, last in pairs:
            gate, up = both.parts if hasattr(both, "parts") else halves(both)
            rows.append([None if w is None else handle(w, dtype) for w in (gate, up, last)])
        array, kinds = None, ()
        if all(w for row in rows for w in row):
            found = {(g.kind, g.group, u.kind, u.group, d.kind, d.group) for g, u, d in rows}
            first = found.pop()
            if not found and first[:2] == first[2:4]:
                array, kinds = (CExpert * len(rows))(*(CExpert(*row) for row in rows)), first
        self.strides, self.count, self.kinds, self.array = strides, count, kinds, array


def _identity(weights: Any) -> Any:
    """What changes when a weight's memory does."""
    return (weights.data_ptr(), weights.dtype) if isinstance(weights, torch.Tensor) else weights


def halves(weight: Any) -> tuple[Any, Any]:
    """The first and the last half of a weight's rows, as views; None where they cannot be cut there."""
    half = weight.shape[0] // 2
    if isinstance(weight, torch.Tensor):
        return weight[:half], weight[half:]
    return weight.part(0, half), weight.part(half, half)


def experts(x_ND: torch.Tensor, table: ExpertTable | None, chosen_NK: torch.Tensor | None, weights_NK: torch.Tensor | None,
            shared: ExpertTable | None) -> torch.Tensor:
    """Sum over a token's K experts of weight * expert(x), plus the shared one's: [N, D]. `usable(x)` and `ready` must hold."""
    flat = _flat(x_ND)
    out = torch.empty(x_ND.shape, dtype=x_ND.dtype)
    routed = None
    if table is not None:
        chosen, weights = chosen_NK.contiguous(), weights_NK.float().contiguous()
        routed = CRouted(table.array, table.count, chosen.shape[1], table.strides, chosen.data_ptr(), weights.data_ptr())
    library().jevons_experts(routed, shared.array if shared is not None else None, flat.data_ptr(), flat.stride(0),
                             KINDS[flat.dtype], flat.shape[0], out.data_ptr())
    return out


def read_rate(size: int = 2**30, rounds: int = 3) -> tuple[float, int]:
    """How fast this machine reads memory, in bytes a second, at the number of threads (up to torch's) that is best for it.
    A buffer of `size` bytes, a multiple of 4 KiB, is read whole; it lies in huge pages where there are any."""
    buffer = HugePages().empty((size,), torch.uint8).fill_(1)
    native = library() if state() == "built" else None
    words, most, best = buffer.view(torch.int64), torch.get_num_threads(), (0.0, 1)
    try:
        for threads in sorted({1, most // 2 or 1, most}):
            torch.set_num_threads(threads)
            for _ in range(rounds):
                begin = time.perf_counter()
                if native is not None:
                    native.jevons_read(buffer.data_ptr(), size, threads)
                else:
                    words.sum()
                best = max(best, (size / (time.perf_counter() - begin), threads))
    finally:
        torch.set_num_threads(most)
    return best
