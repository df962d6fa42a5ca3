"""Products of FP8 blocks: what they are, and the back ends that make them.

    matmul         C[M, N] = A[M, K] B[N, K]^T; A in 1 x 128 tiles, B in 128 x 128 blocks or in 1 x 128 tiles
    grouped        the same with rows of A sorted by expert, each times its own expert's B[E, N, K]
    grouped_wgrad  C[E, N, K]: for each expert A[N, P] B[K, P]^T over its own columns P, which begin at multiples of 128

`matmul_blockwise` is the definition (V3 report, section 3.3.2): products of 128 elements are summed, scaled, and added up in
float32. The other ways are held to it by tests.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from jevons.numerics.fp8 import BLOCK, Quantised, dequantise, quantise_columns, quantise_tiles, quantise_weight, widen

Matmul = Callable[[Quantised, Quantised, torch.dtype], torch.Tensor]
Grouped = Callable[[Quantised, Quantised, torch.Tensor, torch.dtype], torch.Tensor]
KEPT_BITS = 14  # that Hopper's FP8 tensor cores keep of a sum (V3 report, section 3.5.2)
GROUP = 8  # products that are summed before the sum is cut: 1.2 to 5 % at K = 4096, as inputs are; the report says nearly 2 %


@dataclass(frozen=True)
class Backend:
    """One way to quantise and to multiply; `columns(x, power_of_two, rows_P)` first gathers rows (-1: zeros), and takes what
    is quantised already too: dequantised, transposed, quantised again."""

    name: str
    matmul: Matmul
    grouped: Grouped
    grouped_wgrad: Grouped
    tiles: Callable[[torch.Tensor, bool], Quantised] = quantise_tiles
    columns: Callable[[torch.Tensor | Quantised, bool, torch.Tensor | None], Quantised] = None
    weight: Callable[[torch.Tensor, bool], Quantised] = quantise_weight
    fuse: Callable[[Callable], Callable] = lambda f: f  # of small operations, where a compiler makes one kernel of them


def matmul_blockwise(a: Quantised, b: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """The definition: a block of 128 at a time, its sum scaled and added in float32."""
    a_codes, b_codes = widen(a.codes) * 256, widen(b.codes) * 256
    b_scale = b.scale.repeat_interleave(b.rows, 0)[: b_codes.shape[0]]
    out = a_codes.new_zeros(a_codes.shape[0], b_codes.shape[0])
    with torch.autocast(out.device.type, enabled=False):
        for block in range(a.scale.shape[1]):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            out += (a_codes[:, part] @ b_codes[:, part].t()) * a.scale[:, block, None] * b_scale[None, :, block]
    return out.to(dtype)


def matmul_limited(a: Quantised, b: Quantised, dtype: torch.dtype, promote_every: int | None = None) -> torch.Tensor:
    """What limited accumulation does: the running sum keeps 14 bits, cut towards zero, over all of K; or over `promote_every`
    elements, after which it is added up in float32."""
    x, y = dequantise(a), dequantise(b)
    total = acc = x.new_zeros(x.shape[0], y.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        for k in range(0, x.shape[1], GROUP):
            acc = _cut(acc + x[:, k : k + GROUP] @ y[:, k : k + GROUP].t())
            if promote_every and (k + GROUP) % promote_every == 0:
                total, acc = total + acc, torch.zeros_like(acc)
    return (total + acc).to(dtype)


def _cut(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32).bitwise_and(-(1 << (24 - KEPT_BITS))).view(torch.float32)


def _operands(a: Quantised, b: Quantised, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Both dequantised: in float32, or in bf16 where that is exact and the result is bf16 too (three times the speed)."""
    exact = dtype == torch.bfloat16 and not any(bool(q.scale.view(torch.int32).bitwise_and(0x7FFFFF).any()) for q in (a, b))
    return dequantise(a, dtype if exact else torch.float32), dequantise(b, dtype if exact else torch.float32)


def matmul_fast(a: Quantised, b: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """One product of the dequantised operands: `matmul_blockwise` but for the order of float32 sums."""
    x, y = _operands(a, b, dtype)
    with torch.autocast(x.device.type, enabled=False):
        return (x @ y.t()).to(dtype)


def grouped_fast(a: Quantised, b: Quantised, offs_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    x, y = _operands(a, b, dtype)
    with torch.autocast(x.device.type, enabled=False):
        return grouped_mm(x, y.transpose(-2, -1), offs_E).to(dtype)


def grouped_wgrad_fast(a: Quantised, b: Quantised, offs_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast(a.codes.device.type, enabled=False):
        return grouped_mm(dequantise(a), dequantise(b).t(), offs_E).to(dtype)


def grouped_mm(x: torch.Tensor, y: torch.Tensor, offs_E: torch.Tensor) -> torch.Tensor:
    """`F.grouped_mm`, or one product an expert where it asks for strides of 16 bytes that these have not, and in float64."""
    sides = [*y.shape[-2:], *(x.shape if y.dim() == 2 else x.shape[-1:])]
    if x.dtype != torch.float64 and all(side * x.element_size() % 16 == 0 for side in sides):
        return F.grouped_mm(x, y, offs=offs_E)
    ends = offs_E.tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    if y.dim() == 2:
        return torch.stack([x[:, i:j] @ y[i:j] for i, j in spans])
    rest = x.new_zeros(len(x) - ends[-1], y.shape[-1])
    return torch.cat([*(x[i:j] @ y[e] for e, (i, j) in enumerate(spans)), rest])


def _by_expert(matmul: Matmul) -> tuple[Grouped, Grouped]:
    """`grouped` and `grouped_wgrad` as one `matmul` an expert."""

    def grouped(a: Quantised, b: Quantised, offs_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ends = offs_E.tolist()
        outs = [matmul(Quantised(a.codes[i:j], a.scale[i:j], 1), Quantised(b.codes[e], b.scale[e], b.rows), dtype)
                for e, (i, j) in enumerate(zip([0, *ends], ends, strict=False))]
        return torch.cat([*outs, outs[0].new_zeros(len(a.codes) - ends[-1], outs[0].shape[1])])

    def grouped_wgrad(a: Quantised, b: Quantised, offs_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ends = offs_E.tolist()

        def part(q: Quantised, i: int, j: int) -> Quantised:
            return Quantised(q.codes[:, i:j], q.scale[:, i // BLOCK : j // BLOCK], 1)

        return torch.stack([matmul(part(a, i, j), part(b, i, j), dtype) for i, j in zip([0, *ends], ends, strict=False)])

    return grouped, grouped_wgrad


def columns(x: torch.Tensor | Quantised, power_of_two: bool = False, rows_P: torch.Tensor | None = None) -> Quantised:
    """128 x 1 tiles of x [K, M] (or of its rows `rows_P`), transposed: [M, K]."""
    x = dequantise(x) if isinstance(x, Quantised) else x
    if rows_P is not None:
        x = x.index_select(0, rows_P.clamp(min=0)).masked_fill_((rows_P < 0)[:, None], 0)
    return quantise_columns(x, power_of_two)


def whole_tiles(offs_E: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows_P, ends_E): each expert's rows in order, filled up with -1 to a multiple of 128, so that no tile along them belongs
    to two. P is what the experts need on a CPU, the most they could need elsewhere (to read it would wait for the device)."""
    starts = F.pad(offs_E[:-1], (1, 0))
    ends = ((offs_E - starts + BLOCK - 1) // BLOCK * BLOCK).cumsum(0)
    most = (rows + (BLOCK - 1) * len(offs_E)) // BLOCK * BLOCK
    size = max(BLOCK, int(ends[-1])) if offs_E.device.type == "cpu" else most
    place = torch.arange(size, device=offs_E.device)
    expert = torch.searchsorted(ends, place, right=True).clamp(max=len(offs_E) - 1)
    source = place - F.pad(ends[:-1], (1, 0))[expert] + starts[expert]
    return torch.where(source < offs_E[expert], source, -1), ends.to(torch.int32)


@functools.cache
def why_no_scaled_mm(device: torch.device) -> str | None:
    """Why torch's `scaled_mm` cannot multiply blocks on `device`; None where it can."""
    if device.type != "cuda":
        return f"no GPU: the device is {device.type}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "only capability 9 (Hopper) multiplies FP8 blocks"
    cuda = torch.version.cuda or "0.0"
    return None if tuple(map(int, cuda.split(".")[:2])) >= (12, 9) else f"CUDA {cuda}: 12.9 would be right"


def scaled_mm(a: Quantised, b: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """cuBLASLt's block-wise product (Hopper). Its sizes are multiples of 16, its scales lie along M and N; what does not fit is
    filled up with zeros."""
    scaling = F.ScalingType
    m, n = a.codes.shape[0], b.codes.shape[0]
    codes = [_fill(q.codes.contiguous()) for q in (a, b)]
    scale_a, scale_b = _fill(a.scale, columns=1), b.scale if b.rows == BLOCK else _fill(b.scale, columns=1)
    if b.rows == BLOCK:
        scale_b = F.pad(scale_b, (0, -scale_b.shape[1] % 4)).contiguous().t()
    else:
        scale_b = scale_b.t().contiguous().t()
    recipe_b = scaling.BlockWise128x128 if b.rows == BLOCK else scaling.BlockWise1x128
    out = F.scaled_mm(codes[0], codes[1].t(), scale_a.t().contiguous().t(), scaling.BlockWise1x128, scale_b, recipe_b,
                      output_dtype=dtype)
    return out if out.shape == (m, n) else out[:m, :n]


def _fill(x: torch.Tensor, columns: int = 16) -> torch.Tensor:
    """Zeros (of codes: as bytes) up to multiples of 16 rows and `columns` columns."""
    below, right = -x.shape[0] % 16, -x.shape[1] % columns
    if not below and not right:
        return x
    plain = x.view(torch.uint8) if x.element_size() == 1 else x
    return F.pad(plain, (0, right, 0, below)).view(x.dtype)


BLOCKWISE = Backend("blockwise", matmul_blockwise, *_by_expert(matmul_blockwise), columns=columns)
REFERENCE = Backend("reference", matmul_fast, grouped_fast, grouped_wgrad_fast, columns=columns)
LIMITED = Backend("limited", matmul_limited, *_by_expert(matmul_limited), columns=columns)


@functools.cache
def best_backend(device: str, accumulation: str = "promoted") -> Backend:
    """What multiplies on "cpu" or "cuda", by what is there: Hopper's tensor cores through torch, and through Triton for the
    experts and for quantising; the reference everywhere else. "limited" accumulation is an experiment of the reference's."""
    if accumulation == "limited":
        return LIMITED
    hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    if not hopper or importlib.util.find_spec("triton") is None:
        return REFERENCE
    from jevons.numerics import triton_fp8 as t

    cublas = why_no_scaled_mm(torch.device(device)) is None
    return Backend("scaled_mm+triton" if cublas else "triton", scaled_mm if cublas else t.matmul, t.grouped, t.grouped_wgrad,
                   t.tiles, t.columns, t.weight, functools.cache(functools.partial(torch.compile, dynamic=True)))
