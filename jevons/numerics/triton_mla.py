"""Attention over the paged cache on a GPU: absorbed MLA and grouped-query heads, decode, drafts and chunks of prompts.

The context of a sequence is cut into splits that run side by side ("flash-decoding"): each leaves its partial result and the
logarithm of its softmax's sum, and a second kernel joins them. So one sequence with a long context fills the GPU too. What
defines the result is `model.attention.attend_gathered`; Triton's interpreter runs the kernels on a CPU for the parity tests.

Shape suffixes: N flat tokens, S sequences, H heads, W a head's key (plain + rotary), V its value, P pages of a table.
"""

from __future__ import annotations

import functools
import os

import torch

from jevons.numerics.paged import Heads

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # no wheel for this system: the gathering path is taken
    triton = tl = None

    def jit(function):
        return function


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOST_SPLITS = 64
LEAST_TILES = 4  # of the context that a split is worth
WAVES = 2  # programs for each multiprocessor


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`; None where they can."""
    if triton is None:
        return "triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and INTERPRETED):
        return None
    return f"no GPU: the device is {device.type}"


def available(q: torch.Tensor) -> bool:
    return why_not(q.device) is None and q.dtype in (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def chip(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have. A small GPU's, where there is none."""
    if device.type != "cuda":
        return 4, 100_000
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 100_000)


def choose_splits(programs: int, longest: int, tile: int, sms: int) -> int:
    """Into how many parts to cut contexts of up to `longest` cells, where one part each makes `programs` programs."""
    wanted, worth = -(-WAVES * sms // programs), longest // (LEAST_TILES * tile)
    return max(1, min(wanted, worth, MOST_SPLITS))


def tiles(heads: Heads, max_query: int, itemsize: int, shared_memory: int) -> tuple[int, int, int, int]:
    """Rows (queries times heads of a group) and cells of a tile, warps and stages: the largest that shared memory holds.
    What compiles, and to what, is shown by benchmarks/gpu_compile.py without a GPU."""
    key, value = heads.plain + heads.rotary, 0 if _shared(heads) else heads.value
    wanted = _power(max_query * (heads.heads // heads.groups))
    for rows, cells, warps, stages in ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 4, 2)):
        held = (rows * key + stages * cells * (key + value)) * itemsize + rows * cells * 4
        if (rows <= wanted or rows == 16) and held <= 0.95 * shared_memory:
            return rows, cells, warps, stages
    return 16, 16, 4, 1


def _power(n: int) -> int:
    """The least power of two that is at least `n` and 16, which a product's tile needs."""
    return max(16, 1 << (n - 1).bit_length())


def _shared(heads: Heads) -> bool:
    """Whether a key's first part is the value too."""
    return heads.plain > 0 and heads.groups == 1 and (heads.value, heads.value_at) == (heads.plain, heads.key_at)


@jit
def _attend(q, cells, table, starts, contexts, lengths, out, sums, scale, q_token, q_head, page_step, cell_step, table_step,
            out_split, out_token, out_head, page_size, share, row_blocks, tokens, heads, splits, key_at, key_step, value_at,
            value_step, first_width, second_width, value_width,
            ROWS: tl.constexpr, CELLS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, VALUE: tl.constexpr,
            SHARED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr):
    """One split of one sequence for ROWS (query, head) pairs of one group. A key is FIRST wide and SECOND more; SHARED: its
    first part is the value too. Sums are base-2 logarithms. DOT is the type that products take: q's, but for the interpreter,
    which multiplies no bf16."""
    s, split = tl.program_id(0), tl.program_id(2)
    group, block = tl.program_id(1) // row_blocks, tl.program_id(1) % row_blocks
    begin, context, length = tl.load(starts + s), tl.load(contexts + s), tl.load(lengths + s)
    queries = tl.load(starts + s + 1) - begin
    row = block * ROWS + tl.arange(0, ROWS)
    query, head = row // share, group * share + row % share
    live, token = query < queries, begin + query
    d1, d2, dv = tl.arange(0, FIRST), tl.arange(0, SECOND if SECOND > 0 else 1), tl.arange(0, VALUE)
    at_q = q + token * q_token + head * q_head
    q1 = tl.load(at_q[:, None] + d1[None, :], mask=live[:, None] & (d1 < first_width)[None, :], other=0.0).to(DOT)
    if SECOND > 0:
        at_q2, wide = at_q + first_width, (d2 < second_width)[None, :]
        q2 = tl.load(at_q2[:, None] + d2[None, :], mask=live[:, None] & wide, other=0.0).to(DOT)
    per_split = tl.cdiv(tl.cdiv(length, splits), CELLS) * CELLS
    # the last query of these rows sees no further than its own position
    seen = tl.minimum(length, context + (block * ROWS + ROWS - 1) // share + 1)
    low = split * per_split
    high = tl.minimum(low + per_split, seen)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE], tl.float32)
    for n in range(low, high, CELLS):
        at = n + tl.arange(0, CELLS)
        inside = at < high
        page = tl.load(table + s * table_step + at // page_size, mask=inside, other=0).to(tl.int64)
        cell = cells + page * page_step + (at % page_size) * cell_step
        key = cell + key_at + group * key_step
        k1 = tl.load(key[:, None] + d1[None, :], mask=inside[:, None] & (d1 < first_width)[None, :], other=0.0).to(DOT)
        scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        if SECOND > 0:
            k2 = tl.load(key[:, None] + first_width + d2[None, :], mask=inside[:, None] & wide, other=0.0).to(DOT)
            scores += tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
        visible = inside[None, :] & (at[None, :] <= (context + query)[:, None])
        scores = tl.where(visible, scores * scale, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # a row that sees nothing of this tile
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(most - base)
        total = total * kept + tl.sum(weights, 1)
        if SHARED:
            v = k1
        else:
            value = cell + value_at + group * value_step
            v = tl.load(value[:, None] + dv[None, :], mask=inside[:, None] & (dv < value_width)[None, :], other=0.0).to(DOT)
        acc = acc * kept[:, None] + tl.dot(weights.to(q.dtype.element_ty).to(DOT), v, input_precision=PRECISION)
        most = highest
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    to = out + split * out_split + token * out_token + head * out_head
    tl.store(to[:, None] + dv[None, :], acc.to(out.dtype.element_ty), mask=live[:, None] & (dv < value_width)[None, :])
    if SPLIT:
        tl.store(sums + (split * tokens + token) * heads + head,
                 tl.where(total == 0, float("-inf"), most + tl.log2(tl.where(total == 0, 1.0, total))), mask=live)


@jit
def _join(parts, sums, out, pairs, splits, value_width, SPLITS: tl.constexpr, VALUE: tl.constexpr):
    """Splits' results, weighted by their shares of the whole sum, for one (token, head)."""
    pair = tl.program_id(0).to(tl.int64)
    k, dv = tl.arange(0, SPLITS), tl.arange(0, VALUE)
    logs = tl.load(sums + k * pairs + pair, mask=k < splits, other=float("-inf"))
    most = tl.max(logs, 0)
    most = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(tl.exp2(logs - most), 0)
    acc = tl.zeros([VALUE], tl.float32)
    for i in range(splits):
        share = tl.exp2(tl.load(sums + i * pairs + pair) - most)
        acc += share * tl.load(parts + (i * pairs + pair) * value_width + dv, mask=dv < value_width, other=0.0)
    acc = acc / tl.where(total == 0, 1.0, total)
    tl.store(out + pair * value_width + dv, acc.to(out.dtype.element_ty), mask=dv < value_width)


def attend(heads: Heads, q_NHW: torch.Tensor, layer_PSW: torch.Tensor, table_SP: torch.Tensor, starts: torch.Tensor,
           contexts_S: torch.Tensor, lengths_S: torch.Tensor, max_query: int, longest: int, splits: int | None = None,
           ) -> torch.Tensor:
    """softmax(scale q k^T) v for every token over its sequence's cells up to itself: [N, H, V]. q is rotated already.

    `starts` [S + 1], `contexts_S` (cells before the call) and `lengths_S` (cells after it) are int64 on q's device. `max_query`
    and `longest` bound a sequence's queries and cells: the launch depends on them alone, so it can be captured. A query past
    its sequence's length (padding) sees all of it; where the length is 0, the result is 0."""
    n, h, width = q_NHW.shape
    if width != heads.plain + heads.rotary or h != heads.heads or q_NHW.stride(2) != 1 or layer_PSW.stride(2) != 1:
        raise ValueError(f"q {list(q_NHW.shape)} with strides {q_NHW.stride()}: [N, {heads.heads}, {heads.plain + heads.rotary}] "
                         "with dense rows would be right")
    first = heads.plain or heads.rotary
    second = heads.rotary if heads.plain else 0
    sms, memory = chip(q_NHW.device)
    rows, cells, warps, stages = tiles(heads, max_query, q_NHW.itemsize, memory)
    share = heads.heads // heads.groups
    row_blocks, sequences = -(-max_query * share // rows), len(contexts_S)
    programs = sequences * heads.groups * row_blocks
    if splits is None:
        splits = choose_splits(programs, longest, cells, sms)
    out = torch.empty(n, h, heads.value, dtype=q_NHW.dtype, device=q_NHW.device)
    parts = out[None] if splits == 1 else torch.empty(splits, n, h, heads.value, dtype=torch.float32, device=q_NHW.device)
    sums = torch.empty(splits, n, h, dtype=torch.float32, device=q_NHW.device)
    _attend[(sequences, heads.groups * row_blocks, splits)](
        q_NHW, layer_PSW, table_SP, starts, contexts_S, lengths_S, parts, sums, heads.scale * 1.4426950408889634,
        q_NHW.stride(0), q_NHW.stride(1), layer_PSW.stride(0), layer_PSW.stride(1), table_SP.stride(0), *parts.stride()[:3],
        layer_PSW.shape[1], share, row_blocks, n, h, splits, heads.key_at, heads.key_step, heads.value_at, heads.value_step,
        first, second, heads.value, ROWS=rows, CELLS=cells, FIRST=_power(first),
        SECOND=_power(second) if second else 0, VALUE=_power(heads.value), SHARED=_shared(heads), SPLIT=splits > 1,
        PRECISION="ieee" if q_NHW.dtype == torch.float32 else "tf32",
        DOT=tl.float32 if INTERPRETED else getattr(tl, str(q_NHW.dtype).removeprefix("torch.")),
        num_warps=warps, num_stages=stages)
    if splits > 1:
        _join[(n * h,)](parts, sums, out, n * h, splits, heads.value, SPLITS=_power(splits), VALUE=_power(heads.value))
    return out
