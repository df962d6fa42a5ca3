"""A pass of few tokens as one native call (native/pass.cpp): from Python a dozen calls a block take longer than the work.

A network is described once, as a table of addresses; every call checks that the weights still lie there, for a trainer or
`pack` may have moved them. What cannot be described (a weight in another precision, no compiler) goes torch's way.

`step` and `draft` are the engine's: with the head, and tokens drawn as its rows say.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn

from jevons.model.attention import LEAVE, MLA
from jevons.model.cache import BatchMeta, KVCache
from jevons.model.layers import Linear, RMSNorm
from jevons.model.moe import ExpertBank, MoE
from jevons.numerics import Rows, kernels
from jevons.numerics.kernels import KINDS, ExpertTable
from jevons.numerics.native import CChoice, CExpert, CRouted, CWeight, library
from jevons.numerics.paged import Heads

MOST_ROWS = {torch.float32: 256, torch.bfloat16: 256}  # rows up to which one native call beats torch's products


class CProjection(ctypes.Structure):
    _fields_ = [("parts", POINTER(CWeight)), ("count", c_int64), ("rows", c_int64), ("bias", c_void_p), ("bias_bf16", c_int32)]


class CNorm(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("bf16", c_int32), ("epsilon", c_float)]


class CBlock(ctypes.Structure):
    """`Block` of pass.cpp."""

    _fields_ = [("before", CNorm), ("between", CNorm), ("qkv", CProjection), ("q_b", CProjection), ("output", CProjection),
                ("q_norm", CNorm), ("kv_norm", CNorm), *[(name, c_int64) for name in ("q_rank", "latent", "nope", "value")],
                ("kv", c_void_p), ("kv_bf16", c_int32), ("gate_bf16", c_int32), ("heads", Heads), ("gate", c_void_p),
                ("gate_bias", c_void_p), ("choice", CChoice), ("routed", CRouted), ("shared", POINTER(CExpert))]


class CMerge(ctypes.Structure):
    """`Merge` of pass.cpp."""

    _fields_ = [("embedding", CNorm), ("hidden", CNorm), ("project", CProjection)]


class CCall(ctypes.Structure):
    """`Call` of pass.cpp."""

    _fields_ = [*[(name, c_void_p) for name in ("tokens", "positions", "embedding", "x", "out", "rope", "cache")],
                ("batch", c_void_p), *[(name, c_int64) for name in ("n", "dim", "vocabulary", "length", "cache_stride", "pages")],
                ("bf16", c_int32), ("cell_bf16", c_int32), ("last", CNorm)]


class CRows(ctypes.Structure):
    """`Rows` of pass.cpp: how the engine's rows are drawn, and their pages. Holds on to what it points at."""

    _fields_ = [("table", c_void_p), *[(name, c_int64) for name in ("width", "stride")],
                *[(name, c_void_p) for name in ("temperature", "top_p", "seeds")]]

    def __init__(self, table: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, seeds: np.ndarray):
        """`table` [rows, pages] int64, the others [rows]: float32, float32, uint64; all on the CPU."""
        self.kept = table, temperature, top_p, seeds
        super().__init__(table.data_ptr(), table.shape[1], table.stride(0), temperature.data_ptr(), top_p.data_ptr(),
                         seeds.ctypes.data)


class CStep(ctypes.Structure):
    """`Step` of pass.cpp."""

    _fields_ = [("sequences", c_int64), ("page_size", c_int64), *[(name, c_void_p) for name in ("contexts", "counts", "rows")],
                ("all", c_void_p), ("head", CProjection), *[(name, c_void_p) for name in ("logits", "drawn", "logprobs")],
                ("picks", c_int64), ("picked", c_void_p)]


class CDraft(ctypes.Structure):
    """`Draft` of pass.cpp."""

    _fields_ = [*[(name, c_void_p) for name in ("block", "way", "call", "hidden", "last", "wanted")], ("most", c_int64),
                ("drafts", c_void_p)]


class Ahead:
    """Drafts to be made in the same call as a step whose tokens but each sequence's first are drafts: room[i] for sequence i, at
    most `most`, less those accepted. `drafts`: as far as they were made, `most` numbers a sequence, of which that many count."""

    def __init__(self, module: NativePass, cache: KVCache, most: int, room: list[int]):
        self.module, self.cache, self.most, self.room = module, cache, most, room
        self.drafts: list[int] | None = None


NO_PAGE, OUTSIDE = 1, 2  # `Outcome` of pass.cpp
Held = list[tuple[dict[str, Any], str, Any]]  # where a weight is looked up, its name, itself


class Undescribed(Exception):
    """A weight that the native pass cannot take."""


class NativePass:
    """Some blocks of a network, the norm after them, and the head. `way`, an MTP layer, is what they begin with; without it they
    begin at tokens."""

    def __init__(self, blocks: Sequence[nn.Module], last: RMSNorm, embedding: nn.Embedding, head: Linear,
                 way: nn.Module | None = None):
        self.modules = list(blocks), last, embedding, head, way
        self.array: ctypes.Array[CBlock] | None = None
        self.head: CProjection | None = None
        self.dtype: torch.dtype | None = None
        self.held: tuple[Any, Any] = ((), (), ()), ((), [])

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self.modules}  # addresses: worthless in a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["modules"])

    def __call__(self, x: torch.Tensor | None, tokens_N: torch.Tensor | None, positions_N: torch.Tensor, rope: torch.Tensor,
                 cache: KVCache, meta: BatchMeta, first: int = 0) -> torch.Tensor | None:
        """Normed hidden states [N, D] of tokens, or of the hidden states `x`; the blocks' cache layers begin at `first`.
        None where the kernels may not run here, or torch is faster. Raises IndexError where a token, a position or the page
        table leads outside."""
        like = self.modules[2].weight if x is None else x
        if meta.static or not self._fits(like, len(positions_N), cache):
            return None
        if isinstance(attention := self.modules[0][0].self_attn, MLA) and attention.expands(meta, LEAVE[like.dtype]):
            return None
        x = None if x is None else x.clone(memory_format=torch.contiguous_format)
        out, positions = torch.empty(len(positions_N), like.shape[1], dtype=like.dtype), positions_N.contiguous()
        tokens = None if tokens_N is None else tokens_N.contiguous()
        call = self._call(None if tokens is None else tokens.data_ptr(), len(positions), out.data_ptr(), rope, cache, first)
        call.positions, call.batch = positions.data_ptr(), ctypes.addressof(meta.batch)
        call.x = None if x is None else x.data_ptr()
        _check(library().jevons_pass(self.array, len(self.array), ctypes.byref(call)), meta.sequences)
        return out

    def step(self, tokens: list[int], counts: list[int], contexts: list[int], rows: Sequence[int], params: CRows,
             rope: torch.Tensor, cache: KVCache, ahead: Ahead | None = None, picked: Sequence[int] | None = None,
             ) -> tuple[torch.Tensor, torch.Tensor, list[int], list[float]] | None:
        """Sequences' tokens, counts[i] from position contexts[i] on: hidden states [N, D], logits [N, V], and the token that row
        rows[i] draws after each, with its log-prob; logits and what follows only of the tokens `picked`, where it is given (and
        `ahead` is not). None, and IndexError, as above."""
        like, n, room = self.modules[2].weight, len(tokens), ()
        if not self._fits(like, n, cache) or self.head is None:
            return None
        if ahead is not None:
            if ahead.module._fits(like, n, ahead.cache) and ahead.module.head is not None:
                room = ahead.room
            else:
                ahead = None
        picks = n if picked is None else len(picked)
        out, logits = torch.empty(n, like.shape[1], dtype=like.dtype), torch.empty(picks, self.head.rows, dtype=like.dtype)
        array, (flat, *where, room_at, picked_at) = _integers(tokens, contexts, counts, rows, room, picked or ())
        drawn, logprobs = (c_int64 * picks)(), (c_float * picks)()
        call = self._call(flat, n, out.data_ptr(), rope, cache, 0)
        step = CStep(len(counts), cache.page_size, *where, ctypes.addressof(params), self.head, logits.data_ptr(),
                     ctypes.addressof(drawn), ctypes.addressof(logprobs), picks, None if picked is None else picked_at)
        step.kept, draft = array, None
        if ahead is not None:
            drafts = (c_int64 * (len(counts) * ahead.most))()
            draft = ahead.module._draft(rope, ahead.cache, None, None, None, room_at, ahead.most, drafts)
        outcome = library().jevons_step(self.array, len(self.array), ctypes.byref(call), ctypes.byref(step),
                                        draft and ctypes.byref(draft))
        _check(outcome, len(counts))
        if ahead is not None:
            ahead.drafts = drafts[:]
        return out, logits, drawn[:], logprobs[:]

    def draft(self, hidden: torch.Tensor, last: list[int], tokens: list[int], counts: list[int], contexts: list[int],
              rows: list[int], wanted: list[int], params: CRows, rope: torch.Tensor, cache: KVCache) -> list[list[int]] | None:
        """The MTP module over the states of tokens, those of sequence i up to row last[i] of `hidden`, and the tokens that follow
        them, and then over what it drafts: wanted[i] tokens, drawn as row rows[i] says. None, and IndexError, as above."""
        if not self._fits(hidden, len(tokens), cache) or self.head is None or not hidden.is_contiguous():
            return None
        most = max(wanted)
        array, (flat, *where, last_at, wanted_at) = _integers(tokens, contexts, counts, rows, last, wanted)
        drafts = (c_int64 * (len(counts) * most))()
        step = CStep(len(counts), cache.page_size, *where, ctypes.addressof(params), self.head)
        draft = self._draft(rope, cache, flat, hidden.data_ptr(), last_at, wanted_at, most, drafts)
        step.kept = array
        outcome = library().jevons_draft(ctypes.byref(step), ctypes.byref(draft))
        _check(outcome, len(counts))
        return [drafts[i * most : i * most + count] for i, count in enumerate(wanted)]

    def _draft(self, rope: torch.Tensor, cache: KVCache, tokens: int | None, hidden: int | None, last: int | None, wanted: int,
               most: int, drafts: ctypes.Array[c_int64]) -> CDraft:
        call = self._call(tokens, 0, None, rope, cache, 0)
        draft = CDraft(*map(ctypes.addressof, (self.array, self.way, call)), hidden, last, wanted, most, ctypes.addressof(drafts))
        draft.kept = call, self.array, self.way
        return draft

    def _call(self, tokens: int | None, n: int, out: int | None, rope: torch.Tensor, cache: KVCache, first: int) -> CCall:
        """A copy of what is made once for a cache. After a pass, what Python touches has left the processor's caches."""
        data, kept = cache.data, self.kept
        if kept[0] is not data or kept[1] is not rope or kept[2] != first:
            table, layer = self.modules[2].weight, data.stride(0) * data.itemsize
            call = CCall(None, None, table.data_ptr(), None, None, rope.data_ptr(), data.data_ptr() + first * layer, None, 0,
                         table.shape[1], table.shape[0], len(rope), layer, data.shape[1], KINDS[table.dtype], KINDS[data.dtype],
                         self.last)
            self.kept = kept = data, rope, first, call
        call = CCall.from_buffer_copy(kept[3])
        call.tokens, call.n, call.out = tokens, n, out
        return call

    def _fits(self, like: torch.Tensor, n: int, cache: KVCache) -> bool:
        """Whether a call over `n` tokens with activations like these may run here, and is faster than torch."""
        if not 0 < n <= MOST_ROWS.get(like.dtype, 0) or not kernels.usable(like) or cache.data.dtype not in KINDS:
            return False
        if not self._ready(like.dtype):
            return False
        watch = self.banks[0].watch if self.banks else None
        return watch is None or not watch.due(len(self.banks))

    # -- the table ----------------------------------------------------------------------------------------------------

    def _ready(self, dtype: torch.dtype) -> bool:
        (where, names, weights), (tensors, addresses) = self.held
        if dtype is not self.dtype or not all(map(is_, map(dict.get, where, names), weights)) \
                or list(map(torch.Tensor.data_ptr, tensors)) != addresses:
            self._describe(dtype)
        return self.array is not None

    def _describe(self, dtype: torch.dtype) -> None:
        """Two threads may do this at once, one while the other uses what it made: nothing is unset on the way."""
        blocks, last, embedding, head, way = self.modules
        held: Held = []
        array, norm, c_head, c_way = None, None, None, None
        try:
            if _hold(embedding, "weight", held).dtype != dtype or not embedding.weight.is_contiguous():
                raise Undescribed
            blocks_, norm = (CBlock * len(blocks))(*(_block(b, dtype, held) for b in blocks)), _norm(last, held)
            if way is not None:
                c_way = CMerge(_norm(way.enorm, held), _norm(way.hnorm, held), _projection(way.eh_proj, dtype, held))
            array = blocks_
            c_head = _projection(head, dtype, held)
        except Undescribed:
            pass
        self.banks = [b.mlp.experts for b in blocks if isinstance(b.mlp, MoE)]
        tensors = [weight for *_, weight in held if isinstance(weight, torch.Tensor)]
        self.held = [*zip(*held, strict=True)], (tensors, [t.data_ptr() for t in tensors])
        self.head, self.way, self.last, self.array, self.dtype, self.kept = c_head, c_way, norm, array, dtype, (None,) * 4


def _integers(*lists: Sequence[int]) -> tuple[Any, list[int]]:
    """The lists as int64, one behind the other, and where each begins: addresses that hold while the array is kept."""
    flat = [number for one in lists for number in one]
    array = (c_int64 * len(flat))(*flat)
    at, addresses = ctypes.addressof(array), []
    for one in lists:
        addresses.append(at)
        at += 8 * len(one)
    return array, addresses


def _check(outcome: int, sequences: int) -> None:
    if outcome == OUTSIDE:
        raise IndexError("a token or a position is outside the network's tables")
    if outcome == NO_PAGE:
        raise IndexError(f"the page table of a call of {sequences} sequences leads outside the cache, or is too short")


def _hold(module: nn.Module, name: str, held: Held) -> Any:
    """A module's weight, noted down so that a change is seen."""
    for where in (module._parameters, module._buffers, module.__dict__):
        if name in where:
            weight = where[name]
            if isinstance(weight, torch.Tensor) and type(weight) not in (torch.Tensor, nn.Parameter):
                raise Undescribed  # a tensor spread over processes, say
            held.append((where, name, weight))
            return weight
    raise AttributeError(name)


def _norm(norm: RMSNorm, held: Held) -> CNorm:
    weight = _hold(norm, "weight", held)
    if weight.dtype not in KINDS or not weight.is_contiguous():
        raise Undescribed
    return CNorm(weight.data_ptr(), KINDS[weight.dtype], norm.eps)


def _projection(linear: Linear, dtype: torch.dtype, held: Held) -> CProjection:
    weight, bias = _hold(linear, "weight", held), _hold(linear, "bias", held) if linear.bias is not None else None
    parts = [None if isinstance(part, Rows) else kernels.handle(part, dtype)
             for part in (weight.parts if isinstance(weight, Rows) else [weight])]
    if not all(parts) or bias is not None and (bias.dtype not in KINDS or not bias.is_contiguous()):
        raise Undescribed
    return CProjection((CWeight * len(parts))(*parts), len(parts), weight.shape[0], None if bias is None else bias.data_ptr(),
                       0 if bias is None else KINDS[bias.dtype])


def _experts(table: ExpertTable, module: nn.Module, dtype: torch.dtype, held: Held) -> ExpertTable:
    """The table of a bank or of an MLP, its arrays kept alive by whoever points at them."""
    if isinstance(module.down_proj, Linear):
        weights = [_hold(part, "weight", held) for part in (module.gate_up_proj, module.down_proj)]
    else:
        weights = [_hold(module, name, held) for name in ("gate_up_proj", "down_proj")]
    if not table.ready(*weights, dtype):
        raise Undescribed
    return table


def _block(block: nn.Module, dtype: torch.dtype, held: Held) -> CBlock:
    attention, mlp = block.self_attn, block.mlp
    c = CBlock(before=_norm(block.input_layernorm, held), between=_norm(block.post_attention_layernorm, held),
               output=_projection(attention.o_proj, dtype, held), heads=attention.paged)
    if isinstance(attention, MLA):
        c.qkv = _projection(attention.qkv_a_proj, dtype, held)
        c.q_rank, c.latent = attention.config.q_lora_rank or 0, attention.config.kv_lora_rank
        c.nope, c.value, c.kv_norm = attention.nope, attention.v, _norm(attention.kv_a_layernorm, held)
        if c.q_rank:
            c.q_norm, c.q_b = _norm(attention.q_a_layernorm, held), _projection(attention.q_b_proj, dtype, held)
        weight = _hold(attention.kv_b_proj, "weight", held)
        dense = attention.kv_b_proj.dense(dtype)  # kept by `Linear` where it is a copy of a packed weight
        if isinstance(weight, torch.Tensor) and dense.data_ptr() != weight.data_ptr() or not dense.is_contiguous():
            raise Undescribed
        c.kv, c.kv_bf16 = dense.data_ptr(), KINDS[dense.dtype]
    else:
        c.qkv = _projection(attention.qkv_proj, dtype, held)
    if not isinstance(mlp, MoE):
        c.shared = _experts(mlp.table, mlp, dtype, held).array
        return c
    gate, bank, shared = mlp.gate, mlp.experts, mlp.shared_experts
    if not isinstance(bank, ExpertBank):
        raise Undescribed
    weight = _hold(gate, "weight", held)
    if weight.dtype not in KINDS or not weight.is_contiguous():
        raise Undescribed
    c.gate, c.gate_bf16, c.choice = weight.data_ptr(), KINDS[weight.dtype], gate.choice
    if gate.config.has_router_bias:
        c.gate_bias = _hold(gate, "e_score_correction_bias", held).data_ptr()
    table = _experts(bank.table, bank, dtype, held)
    c.routed = CRouted(table.array, table.count, gate.choice.k, table.strides, None, None)
    if shared is not None:
        c.shared = _experts(shared.table, shared, dtype, held).array
        if shared.table.kinds != table.kinds:
            raise Undescribed
    return c
