"""A pass of few tokens as one native call (native/pass.cpp): from Python a dozen calls a block take longer than the work.

A network is described once, as a table of addresses; every call checks that the weights still lie there, for a trainer or
`pack` may have moved them. What cannot be described (a weight in another precision, no compiler) goes torch's way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import nn

from jevons.model.attention import MLA
from jevons.model.cache import BatchMeta, KVCache
from jevons.model.layers import Linear, RMSNorm
from jevons.model.moe import ExpertBank, MoE
from jevons.numerics import Rows, kernels
from jevons.numerics.kernels import KINDS, ExpertTable
from jevons.numerics.native import CChoice, CExpert, CRouted, CWeight, library
from jevons.numerics.paged import Batch, Heads

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


class CCall(ctypes.Structure):
    """`Call` of pass.cpp."""

    _fields_ = [*[(name, c_void_p) for name in ("tokens", "positions", "embedding", "x", "out", "rope", "cache")],
                ("batch", POINTER(Batch)), *[(name, c_int64) for name in ("n", "dim", "cache_stride", "pages")],
                ("bf16", c_int32), ("cell_bf16", c_int32), ("last", CNorm)]


Held = list[tuple[dict[str, Any], str, Any, int | None]]  # where a weight is looked up, its name, itself, its address


class Undescribed(Exception):
    """A weight that the native pass cannot take."""


class NativePass:
    """Some blocks of a network and the norm after them; with an embedding they begin at tokens."""

    def __init__(self, blocks: Sequence[nn.Module], last: RMSNorm, embedding: nn.Embedding):
        self.modules = list(blocks), last, embedding
        self.array: ctypes.Array[CBlock] | None = None
        self.dtype: torch.dtype | None = None
        self.held: Held = []

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self.modules}  # addresses: worthless in a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["modules"])

    def __call__(self, x: torch.Tensor | None, tokens_N: torch.Tensor | None, positions_N: torch.Tensor, rope: torch.Tensor,
                 cache: KVCache, meta: BatchMeta, first: int = 0) -> torch.Tensor | None:
        """Normed hidden states [N, D] of tokens, or of the hidden states `x`; the blocks' cache layers begin at `first`.
        None where the kernels may not run here, or torch is faster. Raises IndexError where a token, a position or the page
        table leads outside."""
        blocks, last, embedding = self.modules
        weight, n = embedding.weight, len(positions_N)
        like = weight if x is None else x
        if meta.static or not 0 < n <= MOST_ROWS.get(like.dtype, 0) or not kernels.usable(like) or cache.data.dtype not in KINDS:
            return None
        if isinstance(attention := blocks[0].self_attn, MLA) and attention.expands(meta):
            return None
        banks = [b.mlp.experts for b in blocks if isinstance(b.mlp, MoE)]
        if banks and banks[0].watch is not None and banks[0].watch.due(len(banks)):
            return None
        if not self._ready(like.dtype) or (x is None and not weight.is_contiguous()):
            return None
        if int(positions_N.max()) >= len(rope) or x is None and not 0 <= int(tokens_N.min()) <= int(tokens_N.max()) < len(weight):
            raise IndexError(f"a token or a position is outside the tables of {len(weight)} tokens and {len(rope)} positions")
        tokens = None if x is not None else tokens_N.contiguous()
        x = torch.empty(n, weight.shape[1], dtype=weight.dtype) if x is None else x.clone(memory_format=torch.contiguous_format)
        out, positions, data, bf16 = torch.empty_like(x), positions_N.contiguous(), cache.data, KINDS[x.dtype]
        sources = (None, positions.data_ptr(), None) if tokens is None else (t.data_ptr() for t in (tokens, positions, weight))
        layer = data.stride(0) * data.itemsize
        call = CCall(*sources, x.data_ptr(), out.data_ptr(), rope.data_ptr(), data.data_ptr() + first * layer,
                     ctypes.pointer(meta.batch), n, x.shape[1], layer, data.shape[1], bf16, KINDS[data.dtype], self.last)
        if library().jevons_pass(self.array, len(blocks), ctypes.byref(call)):
            raise IndexError(f"the page table of a call of {meta.sequences} sequences leads outside the cache, or is too short")
        return out

    # -- the table ----------------------------------------------------------------------------------------------------

    def _ready(self, dtype: torch.dtype) -> bool:
        if dtype is not self.dtype or any(
                where.get(name) is not held or address is not None and held.data_ptr() != address
                for where, name, held, address in self.held):
            self._describe(dtype)
        return self.array is not None

    def _describe(self, dtype: torch.dtype) -> None:
        """Two threads may do this at once, one while the other uses what it made: nothing is unset on the way."""
        blocks, last, embedding = self.modules
        held: Held = []
        try:
            _hold(embedding, "weight", held)
            array, norm = (CBlock * len(blocks))(*(_block(b, dtype, held) for b in blocks)), _norm(last, held)
        except Undescribed:
            array, norm = None, None
        self.held, self.last, self.array, self.dtype = held, norm, array, dtype


def _hold(module: nn.Module, name: str, held: Held) -> Any:
    """A module's weight, noted down so that a change is seen."""
    for where in (module._parameters, module._buffers, module.__dict__):
        if name in where:
            weight = where[name]
            if isinstance(weight, torch.Tensor) and type(weight) not in (torch.Tensor, nn.Parameter):
                raise Undescribed  # a tensor spread over processes, say
            held.append((where, name, weight, weight.data_ptr() if isinstance(weight, torch.Tensor) else None))
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
