"""Triton: quantising in one pass, and the block GEMM for dense weights, experts, and their gradients.

Same signatures as `fp8_gemm`'s reference. One kernel makes all three products: a table says, for each tile of the result, whose
rows it holds and which blocks of K it sums over. A product of 128 elements leaves the tensor core, is scaled, and is added in
float32: that is the promotion of the V3 report (section 3.3.2). Needs the package `triton`; nothing imports this file without it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from jevons.numerics.fp8 import BLOCK, Quantised

TILE = 128  # rows and columns of a result's tile
BAND = 8  # tiles of rows whose columns are made together, so that operands are still in the L2 cache


@triton.jit
def _quantise_kernel(x, x_scale, rows_p, codes, scale, m, k, x_m, x_k, xs_m, xs_k, c_e, c_m, s_e, s_m, s_k, x_e,
                     SQUARE: tl.constexpr, POWER: tl.constexpr, GATHER: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr):
    expert = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * 128 + tl.arange(0, 128)
    source, inside = j.to(tl.int64), j < k
    if GATHER:
        source = tl.load(rows_p + j, mask=inside, other=-1)
    use = (i < m)[:, None] & (inside & (source >= 0))[None, :]
    source = tl.where(source < 0, 0, source)
    v = tl.load(x + expert * x_e + i[:, None] * x_m + source[None, :] * x_k, mask=use, other=0.0).to(tl.float32)
    if CODES:
        v = v * tl.load(x_scale + (i // 128)[:, None] * xs_m + source[None, :] * xs_k, mask=use, other=0.0)
    # a maximum passes NaN over: what is not finite is found apart
    wrong = tl.where(tl.abs(v) < float("inf"), 0, 1)
    v = tl.where(wrong > 0, 0.0, v)
    largest, broken = tl.max(tl.abs(v), 1), tl.max(wrong, 1)
    if SQUARE:
        largest, broken = tl.max(largest, 0), tl.max(broken, 0)
    s = tl.div_rn(tl.where(largest > 1e-4, largest, 1e-4), 448.0)
    if POWER:
        s = ((s.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    rows_s = tl.zeros([ROWS], tl.float32) + s
    q = tl.div_rn(v, tl.broadcast_to(rows_s[:, None], [ROWS, 128]))
    tl.store(codes + expert * c_e + i[:, None] * c_m + j[None, :], q.to(codes.dtype.element_ty),
             mask=(i < m)[:, None] & inside[None, :])
    s = tl.where(broken > 0, float("nan"), s)
    if SQUARE:
        tl.store(scale + expert * s_e + tl.program_id(0) * s_m + tl.program_id(1) * s_k, s)
    else:
        tl.store(scale + i * s_m + tl.program_id(1) * s_k, s, mask=i < m)


def _quantise(x: torch.Tensor, strides: tuple[int, int], m: int, k: int, power_of_two: bool, square: bool,
              rows_P: torch.Tensor | None = None, x_scale: torch.Tensor | None = None,
              codes_dtype: torch.dtype = torch.float8_e4m3fn) -> Quantised:
    """[M, K] seen through `strides`, or stacked [E, M, K]; scales lie as `scaled_mm` wants them."""
    experts = x.shape[0] if x.dim() == 3 else 1
    height = BLOCK if square else 32
    codes = torch.empty(*x.shape[:-2], m, k, dtype=codes_dtype, device=x.device)
    blocks = -(-k // BLOCK)
    scale = (torch.empty(*x.shape[:-2], -(-m // BLOCK), blocks, device=x.device) if square
             else torch.empty(blocks, m, device=x.device).t())
    lead = (x.stride(0), codes.stride(0), scale.stride(0)) if x.dim() == 3 else (0, 0, 0)
    _quantise_kernel[(-(-m // height), blocks, experts)](
        x, x if x_scale is None else x_scale, x if rows_P is None else rows_P, codes, scale, m, k, *strides,
        *((0, 0) if x_scale is None else (x_scale.stride(1), x_scale.stride(0))), lead[1], codes.stride(-2), lead[2],
        scale.stride(-2), scale.stride(-1), lead[0], SQUARE=square, POWER=power_of_two, GATHER=rows_P is not None,
        CODES=x_scale is not None, ROWS=height, num_warps=4)
    return Quantised(codes, scale, BLOCK if square else 1)


def tiles(x_MK: torch.Tensor, power_of_two: bool = False, **out) -> Quantised:
    return _quantise(x_MK, x_MK.stride(), *x_MK.shape, power_of_two, False, **out)


def columns(x: torch.Tensor | Quantised, power_of_two: bool = False, rows_P: torch.Tensor | None = None, **out) -> Quantised:
    x, x_scale = (x.codes, x.scale) if isinstance(x, Quantised) else (x, None)
    k = x.shape[0] if rows_P is None else len(rows_P)
    return _quantise(x, (x.stride(1), x.stride(0)), x.shape[1], k, power_of_two, False, rows_P, x_scale, **out)


def weight(w: torch.Tensor, power_of_two: bool = False, **out) -> Quantised:
    return _quantise(w, w.stride()[-2:], *w.shape[-2:], power_of_two, True, **out)


@triton.jit
def _product_kernel(a, a_scale, b, b_scale, c, table, tiles_m, n, k, a_m, as_m, as_k, b_e, b_n, bs_e, bs_n, bs_k, c_e, c_m,
                    B_ROWS: tl.constexpr, TILE: tl.constexpr, BAND: tl.constexpr):
    tiles_n = tl.cdiv(n, TILE)
    band = tl.program_id(0) // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * tiles_n)
    row, column = band * BAND + within % height, within // height
    expert = tl.load(table + row * 5).to(tl.int64)
    first, end = tl.load(table + row * 5 + 1), tl.load(table + row * 5 + 2)
    k_first, k_end = tl.load(table + row * 5 + 3), tl.load(table + row * 5 + 4)
    if first < end:
        i = first + tl.arange(0, TILE)
        j = column * TILE + tl.arange(0, TILE)
        a_at = a + i.to(tl.int64)[:, None] * a_m
        b_at = b + expert * b_e + j.to(tl.int64)[:, None] * b_n
        total = tl.zeros([TILE, TILE], tl.float32)
        for block in range(k_first, k_end):
            x = block * 128 + tl.arange(0, 128)
            p = tl.load(a_at + x[None, :], mask=(i < end)[:, None] & (x < k)[None, :], other=0.0)
            q = tl.load(b_at + x[None, :], mask=(j < n)[:, None] & (x < k)[None, :], other=0.0)
            s = tl.load(a_scale + i * as_m + block * as_k, mask=i < end, other=0.0)
            product = tl.dot(p, tl.trans(q))
            if B_ROWS == TILE:
                total += product * (s * tl.load(b_scale + expert * bs_e + column * bs_n + block * bs_k))[:, None]
            else:
                t = tl.load(b_scale + expert * bs_e + j // B_ROWS * bs_n + block * bs_k, mask=j < n, other=0.0)
                total += product * s[:, None] * t[None, :]
        tl.store(c + expert * c_e + i.to(tl.int64)[:, None] * c_m + j[None, :], total.to(c.dtype.element_ty),
                 mask=(i < end)[:, None] & (j < n)[None, :])


def _product(a: Quantised, b: Quantised, out: torch.Tensor, table: torch.Tensor, stacked_b: bool) -> torch.Tensor:
    """Fill `out` [.., N] by the tiles of `table` [tiles, 5]: expert, first row, end, first block of K, end."""
    n, k = b.codes.shape[-2:]
    a_codes, b_codes = a.codes.contiguous(), b.codes.contiguous()  # tensor cores read FP8 along K only
    _product_kernel[(len(table) * -(-n // TILE),)](
        a_codes, a.scale, b_codes, b.scale, out, table, len(table), n, k, a_codes.stride(0), *a.scale.stride(),
        b_codes.stride(0) if stacked_b else 0, b_codes.stride(-2), b.scale.stride(0) if stacked_b else 0,
        *b.scale.stride()[-2:], out.stride(0) if out.dim() == 3 else 0, out.stride(-2), B_ROWS=b.rows, TILE=TILE, BAND=BAND,
        num_warps=8, num_stages=4)
    return out


def matmul(a: Quantised, b: Quantised, dtype: torch.dtype) -> torch.Tensor:
    m, k = a.codes.shape
    first = torch.arange(0, m, TILE, dtype=torch.int32, device=a.codes.device)
    table = torch.stack([torch.zeros_like(first), first, torch.full_like(first, m), torch.zeros_like(first),
                         torch.full_like(first, -(-k // BLOCK))], 1)
    return _product(a, b, torch.empty(m, b.codes.shape[0], dtype=dtype, device=first.device), table, False)


def grouped(a: Quantised, b: Quantised, offs_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    (m, k), experts = a.codes.shape, len(offs_E)
    starts = F.pad(offs_E[:-1], (1, 0))
    tiles_E = (offs_E - starts + TILE - 1) // TILE
    ends = tiles_E.cumsum(0)
    place = torch.arange(-(-m // TILE) + experts, device=offs_E.device)  # the most there could be: nothing waits for the device
    expert = torch.searchsorted(ends, place, right=True).clamp(max=experts - 1)
    first = starts[expert] + (place - (ends - tiles_E)[expert]) * TILE
    end = torch.where(place < ends[-1], offs_E[expert], 0)
    table = torch.stack([expert, first, end, torch.zeros_like(first), torch.full_like(first, -(-k // BLOCK))], 1).to(torch.int32)
    return _product(a, b, torch.empty(m, b.codes.shape[1], dtype=dtype, device=table.device), table, True)


def grouped_wgrad(a: Quantised, b: Quantised, offs_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    n, experts = a.codes.shape[0], len(offs_E)
    first = torch.arange(0, n, TILE, dtype=torch.int32, device=offs_E.device)
    table = torch.stack([torch.arange(experts, device=offs_E.device)[:, None].expand(-1, len(first)), first.expand(experts, -1),
                         torch.full((experts, len(first)), n, device=offs_E.device),
                         (F.pad(offs_E[:-1], (1, 0)) // BLOCK)[:, None].expand(-1, len(first)),
                         (offs_E // BLOCK)[:, None].expand(-1, len(first))], -1).flatten(0, 1).to(torch.int32).contiguous()
    out = torch.empty(experts, n, b.codes.shape[0], dtype=dtype, device=table.device)
    return _product(a, b, out, table, False)
