"""Attention of training rows on a CPU: from the projections' rows to each head's queries, keys and values, rotated, in one native
pass, and back; causal softmax in place. `model.attention` holds the reference: the same in torch's own operations.

A token's row is cut into heads; a head's rows lie together, [rows * H, L, width] of each segment, which batched products take.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64

import torch

from jevons.numerics.fused import as_matrix, as_rows, available
from jevons.numerics.native import CWidths, library

Segments = list[tuple[int, int]]  # (rows, length): flat tokens are rows_0 * length_0 tokens, then rows_1 * length_1, ...
SHORT_ROW = 400  # length of rows up to which whole matrices of scores are the faster way
MOST = 512  # rotated dims, of training.cpp


def usable(q_NA: torch.Tensor, kv_NB: torch.Tensor, key_NR: torch.Tensor, segments: Segments) -> bool:
    """Whether `causal` may take these: one precision, on a CPU, short rows."""
    return (all(length <= SHORT_ROW for _, length in segments) and len({q_NA.dtype, kv_NB.dtype, key_NR.dtype}) == 1
            and key_NR.shape[1] <= MOST and available(q_NA, kv_NB, key_NR))


def _pairs(segments: Segments) -> ctypes.Array[c_int64]:
    return (c_int64 * (2 * len(segments)))(*(number for pair in segments for number in pair))


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_NA, kv_NB, key_NR, rope_NR, widths: CWidths, segments: Segments, scale: float):
        q, kv, key, pairs = as_rows(q_NA), as_rows(kv_NB), as_rows(key_NR), _pairs(segments)
        sizes = [rows * length * widths.heads for rows, length in segments]
        queries, keys, values = (q.new_empty(sum(sizes), width) for width in
                                 (widths.plain + widths.rotary, widths.plain + widths.rotary, widths.value))
        native = library()
        native.jevons_split_heads(widths, pairs, len(segments), as_matrix(q), as_matrix(kv), as_matrix(key), rope_NR.data_ptr(),
                                  queries.data_ptr(), keys.data_ptr(), values.data_ptr())
        mixed, probs = torch.empty_like(values), []
        for (_, length), *own in zip(segments, *(t.split(sizes) for t in (queries, keys, values, mixed)), strict=True):
            a, b, v, out = (t.view(-1, length, t.shape[1]) for t in own)
            probs.append(torch.bmm(a, b.transpose(1, 2)))
            native.jevons_causal_softmax(as_matrix(probs[-1].view(-1, length)), len(own[0]), length, scale)
            torch.bmm(probs[-1], v, out=out)
        out = q.new_empty(len(q), widths.heads * widths.value)
        ctx.rest = len(q) - sum(sizes) // widths.heads
        native.jevons_move_heads(widths.heads, widths.value, pairs, len(segments), ctx.rest, as_matrix(out), mixed.data_ptr(),
                                 True)
        ctx.save_for_backward(rope_NR, queries, keys, values, *probs)
        ctx.how = widths, segments, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        rope_NR, queries, keys, values, *probs = ctx.saved_tensors
        widths, segments, scale = ctx.how
        pairs, native, g = _pairs(segments), library(), as_rows(grad)
        mixed = torch.empty_like(values)
        native.jevons_move_heads(widths.heads, widths.value, pairs, len(segments), ctx.rest, as_matrix(g), mixed.data_ptr(),
                                 False)
        grads = [torch.empty_like(t) for t in (queries, keys, values)]
        sizes = [rows * length * widths.heads for rows, length in segments]
        for (_, length), p, *own in zip(segments, probs, *(t.split(sizes) for t in (queries, keys, values, mixed, *grads)),
                                        strict=True):
            a, b, v, gm, ga, gb, gv = (t.view(-1, length, t.shape[1]) for t in own)
            scores = torch.bmm(gm, v.transpose(1, 2))
            native.jevons_causal_softmax_grad(as_matrix(p.view(-1, length)), as_matrix(scores.view(-1, length)), len(own[0]),
                                              length, scale)
            torch.bmm(scores, b, out=ga)
            torch.bmm(scores.transpose(1, 2), a, out=gb)
            torch.bmm(p.transpose(1, 2), gm, out=gv)
        q, kv, key = (g.new_empty(len(g), width) for width in (
            widths.heads * (widths.plain + widths.rotary), widths.heads * (widths.plain + widths.value), widths.rotary))
        native.jevons_split_heads_grad(widths, pairs, len(segments), ctx.rest, *(t.data_ptr() for t in grads), rope_NR.data_ptr(),
                                       as_matrix(q), as_matrix(kv), as_matrix(key))
        return q, kv, key, None, None, None, None


def causal(q_NA: torch.Tensor, kv_NB: torch.Tensor, key_NR: torch.Tensor, rope_NR: torch.Tensor, widths: CWidths,
           segments: Segments, scale: float) -> torch.Tensor:
    """[N, H * value]: q [N, H (plain + rotary)] over kv [N, H (plain + value)] and the key [N, rotary] that heads share. Pairs of
    adjacent dims are rotated by `rope` [N, 2, rotary / 2]; causal within each row. Tokens past the segments get zeros."""
    return _Causal.apply(q_NA, kv_NB, key_NR, rope_NR.contiguous(), widths, segments, scale)
