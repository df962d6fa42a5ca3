"""FP8 (E4M3) blocks: weights as published checkpoints store them, and the tiles that training quantises online.

V3 report, section 3.3.2. A tile is 1 x 128 (activations, and gradients along what is summed over) or 128 x 128 (weights); tiles
at the edges may be partial. Suffixes: M rows, K what a product sums over, N rows of the other operand, T tiles along K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

BLOCK = 128
E4M3_MAX = 448.0
LEAST_AMAX = 1e-4  # DeepSeek's published kernel: a tile of zeros has a scale all the same


class Quantised(NamedTuple):
    """codes * scale is about the matrix. `codes` float8_e4m3fn [.., M, K]; `scale` float32 [.., ceil(M/rows), ceil(K/128)]."""

    codes: torch.Tensor
    scale: torch.Tensor
    rows: int  # of a tile: 1 or 128

    def t(self) -> Quantised:
        """The transpose of 128 x 128 blocks: the same codes and scales, seen the other way."""
        if self.rows != BLOCK:
            raise ValueError("tiles of 1 x 128 are not tiles of the transpose: dequantise, transpose and quantise again")
        return Quantised(self.codes.transpose(-2, -1), self.scale.transpose(-2, -1), BLOCK)


def tile_scale(largest: torch.Tensor, power_of_two: bool = False, least: float = LEAST_AMAX) -> torch.Tensor:
    """max(largest, least) / 448, or the power of two at or above it. NaN where `largest` is not finite: codes saturate, so the
    scale is what keeps an overflow visible in every product of its tile."""
    scale = largest.float().clamp(min=least) / E4M3_MAX
    scale = _up_to_power_of_two(scale) if power_of_two else scale
    return torch.where(largest.isfinite(), scale, torch.nan)


def quantise_tiles(x_MK: torch.Tensor, power_of_two: bool = False, least: float = LEAST_AMAX) -> Quantised:
    """1 x 128 tiles. codes = round(x / scale), the quotient in float32."""
    m, k = x_MK.shape
    tiles = F.pad(x_MK.float(), (0, -k % BLOCK)).reshape(m, -1, BLOCK)
    scale = tile_scale(tiles.abs().amax(-1), power_of_two, least)
    codes = (tiles / scale[..., None]).to(torch.float8_e4m3fn).view(m, -1)
    return Quantised(codes if k % BLOCK == 0 else codes[:, :k].contiguous(), scale, 1)


def quantise_columns(x_KM: torch.Tensor, power_of_two: bool = False) -> Quantised:
    """The transpose of `x_KM`, as `quantise_tiles` would give it: x's own tiles are 128 x 1. Nothing is moved: codes [M, K]
    are a view of memory that lies as x does."""
    k, m = x_KM.shape
    tiles = F.pad(x_KM.float(), (0, 0, 0, -k % BLOCK)).reshape(-1, BLOCK, m)
    scale = tile_scale(tiles.abs().amax(1), power_of_two)
    codes = (tiles / scale[:, None]).to(torch.float8_e4m3fn).view(-1, m)[:k]
    return Quantised(codes.t(), scale.t(), 1)


def quantise_weight(w_NK: torch.Tensor, power_of_two: bool = False) -> Quantised:
    """128 x 128 blocks of a weight [N, K], or of stacked ones [E, N, K], each expert's from its own first row on."""
    *lead, n, k = w_NK.shape
    padded = F.pad(w_NK.float(), (0, -k % BLOCK, 0, -n % BLOCK)).unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = tile_scale(padded.abs().amax((-3, -1)), power_of_two)
    codes = (padded / scale[..., :, None, :, None]).to(torch.float8_e4m3fn).flatten(-4, -3).flatten(-2, -1)
    return Quantised(codes[..., :n, :k].contiguous(), scale, BLOCK)


def widen(codes: torch.Tensor) -> torch.Tensor:
    """codes / 256 in float32, exactly: E4M3's bits, moved into place, are an FP16 number 256 times too small. Seven times the
    speed of torch's own cast on a CPU. The code of NaN gives 1.875; its scale is NaN too."""
    if codes.device.type != "cpu":
        return codes.float() / 256
    wide = codes.view(torch.int8).to(torch.int16)
    return (wide & 0x7F).bitwise_left_shift_(7).bitwise_or_(wide.bitwise_and_(-0x8000)).view(torch.float16).float()


def dequantise(q: Quantised, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """codes * scale. In float32 it is one rounding from exact; with scales that are powers of two it is exact, in bf16 too."""
    if q.codes.transpose(-2, -1).is_contiguous() and not q.codes.is_contiguous():
        return _spread(widen(q.codes.transpose(-2, -1)), q.scale.transpose(-2, -1), BLOCK, q.rows).to(dtype).transpose(-2, -1)
    return _spread(widen(q.codes), q.scale, q.rows, BLOCK).to(dtype)


def _spread(codes: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """codes * 256 * scale in place, a scale for each `rows` x `columns`."""
    m, k = codes.shape[-2:]
    scale = scale * 256
    if m % rows == 0 and k % columns == 0:
        tiles = codes.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
        tiles.mul_(scale[..., :, None, :, None])
        return codes
    wide = scale.repeat_interleave(rows, -2)[..., :m, :] if rows > 1 else scale
    return codes.mul_(wide.repeat_interleave(columns, -1)[..., :k] if columns > 1 else wide)


def pack_e5m6(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes uint8 [M, 3 ceil(K/2)], scale [M, ceil(K/128)]): 12-bit floats, two in three bytes, with the same 1 x 128
    power-of-two scales that E4M3 would get. What V3 caches the input of attention's output projection in.

    E5M6 is FP16 with 6 of its 10 mantissa bits, rounded here to nearest even.
    """
    m, k = x_MK.shape
    tiles = F.pad(x_MK.float(), (0, -k % BLOCK)).reshape(m, -1, BLOCK)
    scale = tile_scale(tiles.abs().amax(-1), True)
    x = (tiles / scale[..., None]).view(m, -1)[:, : k + k % 2]
    bits = x.contiguous().view(torch.int32)
    kept = (bits + 0xFFFF + ((bits >> 17) & 1)).bitwise_and_(-(1 << 17)).view(torch.float32)
    x = torch.where(x.abs() < 2.0**-14, (x * 2.0**20).round() / 2.0**20, kept)
    a, b = (x.half().view(torch.int16).int() >> 4 & 0xFFF).view(m, -1, 2).unbind(-1)
    return torch.stack([a & 0xFF, a >> 8 | (b & 0xF) << 4, b >> 4], -1).to(torch.uint8).flatten(1), scale


def unpack_e5m6(packed: torch.Tensor, scale: torch.Tensor, k: int) -> torch.Tensor:
    """[M, K] float32."""
    x, y, z = packed.view(len(packed), -1, 3).int().unbind(-1)
    bits = torch.stack([x | (y & 0xF) << 8, y >> 4 | z << 4], -1) << 4
    return bits.to(torch.int16).view(torch.float16).float().flatten(1)[:, :k] * scale.repeat_interleave(BLOCK, 1)[:, :k]


# -- as checkpoints store weights ---------------------------------------------------------------------------------------


def quantise_blocks(w_MN: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes float8_e4m3fn [M, N], scale_inv float32 [ceil(M/128), ceil(N/128)]): codes * scale_inv is about w.

    A block's scale_inv is its largest magnitude / 448 (rounded up to a power of two on request), 1 for a block of zeros.
    Blocks at the edges may be partial.
    """
    m, n = w_MN.shape
    rows, columns = -(-m // BLOCK), -(-n // BLOCK)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK, dtype=torch.float32, device=w_MN.device)
    padded[:m, :n] = w_MN
    largest = padded.abs().view(rows, BLOCK, columns, BLOCK).amax((1, 3))
    scale = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    if power_of_two:
        scale = _up_to_power_of_two(scale)
    # a scale that underflowed would give codes past the largest, which E4M3 turns into NaN
    codes = (w_MN.float() / _each(scale, m, n)).clamp(-E4M3_MAX, E4M3_MAX)
    return codes.to(torch.float8_e4m3fn), scale


def dequantise_blocks(codes_MN: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[M, N] in `dtype`. Raises ValueError when the scales are not one per (partial) 128 x 128 block."""
    m, n = codes_MN.shape
    right = (-(-m // BLOCK), -(-n // BLOCK))
    if tuple(scale_inv.shape) != right:
        raise ValueError(f"scale_inv has shape {list(scale_inv.shape)}; a weight of [{m}, {n}] needs {list(right)}")
    return (codes_MN.float() * _each(scale_inv.float(), m, n)).to(dtype)


def _each(scale: torch.Tensor, m: int, n: int) -> torch.Tensor:
    return scale.repeat_interleave(BLOCK, 0)[:m].repeat_interleave(BLOCK, 1)[:, :n]


def _up_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """2^ceil(log2 scale), exactly, by the float's own exponent: a rounded logarithm would double some powers of two."""
    bits = scale.contiguous().view(torch.int32)
    return (bits + 0x7FFFFF).bitwise_and_(0x7F800000).view(torch.float32)
