"""Multi-head latent attention (V3 report, section 2.1.1) and the dense models' grouped-query attention.

Each has two paths over flat tokens: `expanded` for training rows (per-head keys and values, no cache) and
`cached` for the engine (MLA absorbed: scores are taken in the latent space, so the cache stays 1/57 of MHA's at V3's
shape). A parity test holds one to the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from jevons.config import ModelConfig
from jevons.model.cache import BatchMeta, KVCache
from jevons.model.layers import Linear, RMSNorm, rotate_half, rotate_interleaved
from jevons.numerics import heads, kernels, paged, recompute, triton_mla
from jevons.numerics.heads import Segments
from jevons.numerics.native import CWidths
from jevons.numerics.paged import Heads

INNER_EPS = 1e-6  # DeepSeek's published code gives the inner norms no eps: rms_norm_eps says nothing about them
MOST_SCORES = 2**24  # what `attend_gathered` holds at a time (64 MiB in float32)
MOST_EXPANDED = 2**24  # elements of per-head keys and values that a prompt holds at a time
EXPAND = 2**22  # multiplications saved under which expanding is not worth its calls: under 0.1 ms
LEAVE = {torch.float32: 2**25, torch.bfloat16: 2**29}  # the same where a pass is one native call


class ShortCausalAttention(torch.autograd.Function):
    """softmax(scale q k^T + causal) v by batched matmuls, probabilities kept for the backward pass.

    For CPU rows under about 400 tokens: in bf16 five times the speed of torch's CPU flash kernel at 100 tokens (whose
    backward is written for long rows), and V keeps its own width.
    """

    @staticmethod
    def forward(ctx, q_BLd, k_BLd, v_BLv, bias_LL, scale):
        probs = torch.baddbmm(bias_LL, q_BLd, k_BLd.transpose(1, 2), alpha=scale).softmax(-1)
        ctx.save_for_backward(q_BLd, k_BLd, v_BLv, probs)
        ctx.scale = scale
        return torch.bmm(probs, v_BLv)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, probs = ctx.saved_tensors
        grad_v = torch.bmm(probs.transpose(1, 2), grad)
        grad_scores = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), probs, -1, probs.dtype).mul_(ctx.scale)
        return torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q), grad_v, None, None


def causal_attention(q_BHLd, k_BHLd, v_BHLv, scale: float) -> torch.Tensor:
    """[B, H, L, v]: torch's own attention, or the batched matmuls where those are faster."""
    length, width, v_width = q_BHLd.shape[2], q_BHLd.shape[3], v_BHLv.shape[3]
    if q_BHLd.device.type == "cpu" and length <= heads.SHORT_ROW:
        bias = q_BHLd.new_full((length, length), float("-inf")).triu_(1)
        q, k, v = (t.flatten(0, 1) for t in (q_BHLd, k_BHLd, v_BHLv))
        return ShortCausalAttention.apply(q, k, v, bias, scale).unflatten(0, q_BHLd.shape[:2])
    # V padded to the QK width: with dv != d CPU attention falls to the slow path
    v_BHLv = F.pad(v_BHLv, (0, width - v_width)) if v_width < width else v_BHLv
    return F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLv, is_causal=True, scale=scale)[..., :v_width]


def attend_segments(q_NHd, k_NHd, v_NHv, segments: Segments, scale: float) -> torch.Tensor:
    """Causal attention within each row of each segment -> [N, H * v]. One call per segment: rows of like length share
    one, so short documents do not pay for long ones' squares. Tokens past the last segment are padding and get zeros."""
    sizes = [rows * length for rows, length in segments]
    tail = q_NHd.shape[0] - sum(sizes)
    outs = []
    for (rows, _), *qkv in zip(segments, *(t.split([*sizes, tail]) for t in (q_NHd, k_NHd, v_NHv)), strict=False):
        q, k, v = (t.unflatten(0, (rows, -1)).transpose(1, 2) for t in qkv)
        outs.append(causal_attention(q, k, v, scale).transpose(1, 2).flatten(0, 1))
    return torch.cat([*outs, outs[0].new_zeros(tail, *outs[0].shape[1:])]).flatten(1)


def pad_queries(x_NHW: torch.Tensor, meta: BatchMeta) -> torch.Tensor:
    """Flat [N, H, W] -> [S, H, max_query, W]."""
    if meta.max_query == 1:
        return x_NHW[:, :, None]
    out = x_NHW.new_zeros(meta.sequences, meta.max_query, *x_NHW.shape[1:])
    out[meta.sequence_N, meta.query_N] = x_NHW
    return out.transpose(1, 2)


def unpad_queries(x_SHQW: torch.Tensor, meta: BatchMeta) -> torch.Tensor:
    """The reverse: [S, H, max_query, W] -> [N, H, W]."""
    return x_SHQW[:, :, 0] if meta.max_query == 1 else x_SHQW[meta.sequence_N, :, meta.query_N]


def attend_gathered(heads: Heads, q_NHW: torch.Tensor, cache: KVCache, layer: int, meta: BatchMeta) -> torch.Tensor:
    """What `paged.attend` computes, by gathering every sequence's cells: any device, any type; q is rotated already.

    Heads that share a key are folded into the query dimension (one matmul for all of them)."""
    groups, width, value = heads.groups, heads.plain + heads.rotary, heads.value
    scores = meta.sequences * heads.heads * meta.max_query * meta.max_context
    if scores > MOST_SCORES and (meta.sequences > 1 or meta.max_query > 1):
        parts = meta.halves()
        sizes = [len(part.positions_N) for part in parts]
        return torch.cat([attend_gathered(heads, q, cache, layer, m) for q, m in zip(q_NHW.split(sizes), parts, strict=True)])
    kept = cache.read(layer, meta).to(q_NHW.dtype)
    k_SGLW, v_SGLV = (kept[..., at : at + groups * w].unflatten(-1, (groups, w)).transpose(1, 2)
                      for at, w in ((heads.key_at, width), (heads.value_at, value)))
    q = pad_queries(q_NHW * heads.scale, meta).reshape(meta.sequences, groups, -1, width)
    scores = (q @ k_SGLW.transpose(-1, -2)).view(meta.sequences, heads.heads, meta.max_query, -1)
    probs = (scores.float() + meta.mask_SQL[:, None]).softmax(dim=-1).to(q.dtype)
    out = probs.view(meta.sequences, groups, -1, meta.max_context) @ v_SGLV
    return unpad_queries(out.view(meta.sequences, heads.heads, meta.max_query, value), meta)


def attend_paged(heads: Heads, q_NHW: torch.Tensor, cache: KVCache, layer: int, meta: BatchMeta) -> torch.Tensor:
    """`attend_gathered`, or the GPU's kernel where that may run."""
    if not triton_mla.available(q_NHW):
        return attend_gathered(heads, q_NHW, cache, layer, meta)
    return triton_mla.attend(heads, q_NHW, cache.layers[layer], meta.page_table_SP, *meta.on_device, meta.lengths_S,
                             meta.max_query, meta.max_context)


class MLA(nn.Module):
    """q = q_b(norm(q_a h)); [c_kv; k_rope] = kv_a h; keys and values are kv_b(norm(c_kv)), k_rope shared by all heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.heads, self.nope, self.rope, self.v = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        self.scale = c.softmax_scale
        q_rows = c.q_lora_rank or self.heads * (self.nope + self.rope)
        self.qkv_a_proj = Linear(c.hidden_size, q_rows + c.kv_lora_rank + self.rope, parts={
            "q_a_proj" if c.q_lora_rank else "q_proj": q_rows, "kv_a_proj_with_mqa": c.kv_lora_rank + self.rope})
        self.split = [q_rows, c.kv_lora_rank, self.rope]
        if c.q_lora_rank:
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, INNER_EPS)
            self.q_b_proj = Linear(c.q_lora_rank, self.heads * (self.nope + self.rope))
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, INNER_EPS)
        self.kv_b_proj = Linear(c.kv_lora_rank, self.heads * (self.nope + self.v))
        self.o_proj = Linear(self.heads * self.v, c.hidden_size)
        self.recompute = False  # see model/precision.py
        self.widths = CWidths(self.heads, self.nope, self.rope, self.v)
        self.paged = paged.latent_heads(self.heads, c.kv_lora_rank, self.rope, self.scale, INNER_EPS)

    def _project(self, x_ND):
        """Queries [N, H * (nope + R)], latent and shared key, as the projections give them."""
        return self._raise(self.qkv_a_proj(x_ND))

    def _raise(self, down_NA):
        q, latent_NC, k_rope_NR = down_NA.split(self.split, dim=-1)
        if self.config.q_lora_rank:
            q = self.q_b_proj(self.q_a_layernorm(q))
        return q, latent_NC, k_rope_NR

    def _parts(self, q_NA):
        """Queries' two parts, [N, H, nope] and [N, H, R]."""
        return q_NA.view(-1, self.heads, self.nope + self.rope).split([self.nope, self.rope], dim=-1)

    def _kv(self, dtype: torch.dtype) -> torch.Tensor:
        """W_k and W_v of every head, [H, nope + v, C]. A dense parameter is only viewed, for training moves it; a packed weight
        never changes, so its dense copy is made once and kept."""
        return self.kv_b_proj.dense(dtype).view(self.heads, self.nope + self.v, -1)

    def expanded(self, x_ND, rope_NR, segments: Segments) -> torch.Tensor:
        """Training rows: per-head keys and values, no cache."""
        own = x_ND.device.type != "cpu" or any(length > heads.SHORT_ROW for _, length in segments)  # torch's attention
        return self.o_proj(recompute.again(self.recompute, self._attend_from, self.qkv_a_proj(x_ND), rope_NR, segments,
                                           keep_attention=own))

    def _attend_from(self, down_NA, rope_NR, segments: Segments) -> torch.Tensor:
        q_NA, latent_NC, k_rope_NR = self._raise(down_NA)
        kv_NB = self.kv_b_proj(self.kv_a_layernorm(latent_NC))
        if heads.usable(q_NA, kv_NB, k_rope_NR, segments):
            return heads.causal(q_NA, kv_NB, k_rope_NR, rope_NR, self.widths, segments, self.scale)
        q_nope, q_rope = self._parts(q_NA)
        rotated = rotate_interleaved(q_rope, rope_NR), rotate_interleaved(k_rope_NR, rope_NR)
        return self._attend_per_head(q_nope, rotated[0], kv_NB, rotated[1], segments)

    def _attend_per_head(self, q_nope, q_rope, kv_NB, k_rope_NR, segments: Segments) -> torch.Tensor:
        """[N, H * v] over keys and values per head of these tokens alone."""
        k_nope, v = kv_NB.view(-1, self.heads, self.nope + self.v).split([self.nope, self.v], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope_NR[:, None].expand(-1, self.heads, -1).to(k_nope.dtype)], dim=-1)
        return attend_segments(q, k, v, segments, self.scale)

    def cached(self, x_ND, rope_NR, layer: int, cache: KVCache, meta: BatchMeta) -> torch.Tensor:
        """Absorbed: q' = q_nope W_k; score = q'.c + q_rope.k_rope; out = (p c) W_v. This is MQA of width C + R. Natively,
        long prompts take per-head keys and values instead, made from the cached latents."""
        q_NA, latent_NC, k_rope_NR = self._project(x_ND)
        q_nope, q_rope = self._parts(q_NA)
        native = not meta.static and paged.available(q_nope, cache.data)
        if native:
            data = cache.layers[layer]
            paged.store(self.paged, meta.batch, latent_NC, k_rope_NR[:, None], rope_NR, data, self.kv_a_layernorm.weight)
            if self.expands(meta):
                return self.o_proj(self._attend_expanded(q_nope, q_rope, rope_NR, data, meta))
        else:
            latent_NC, k_rope_NR = self.kv_a_layernorm(latent_NC), rotate_interleaved(k_rope_NR, rope_NR)
            q_rope = rotate_interleaved(q_rope, rope_NR)
            cache.write(layer, meta.cells_N, torch.cat([latent_NC, k_rope_NR], dim=-1))
            if meta.fresh and triton_mla.available(x_ND):
                return self.o_proj(self._attend_per_head(q_nope, q_rope, self.kv_b_proj(latent_NC), k_rope_NR, meta.fresh))
        w_k, w_v = self._kv(q_nope.dtype).split([self.nope, self.v], dim=1)
        q_latent_HNC = kernels.heads(q_nope, w_k, across=True)
        if native:
            out_HNC = torch.empty_like(q_latent_HNC)
            paged.attend(self.paged, meta.batch, q_latent_HNC.transpose(0, 1), q_rope, rope_NR, data, out_HNC.transpose(0, 1))
        else:
            q = torch.cat([q_latent_HNC.transpose(0, 1), q_rope], dim=-1)
            out_HNC = attend_paged(self.paged, q, cache, layer, meta).transpose(0, 1)
        return self.o_proj(kernels.heads(out_HNC.transpose(0, 1), w_v, across=False).transpose(0, 1).flatten(1))

    def expands(self, meta: BatchMeta, least: int | None = None) -> bool:
        """Whether keys and values per head are the faster way for these tokens: they save more than `least` multiplications."""
        return meta.max_query > 1 and self.saved_by_expanding(meta) > (EXPAND if least is None else least)

    def saved_by_expanding(self, meta: BatchMeta) -> int:
        """Multiplications that per-head keys and values save over the latent: a pair costs nope + R + v, not 2 C + R, and
        every cell that was there before costs C (nope + v) to expand, where the call's own cost as much absorbed."""
        latent, (pairs, cells) = self.config.kv_lora_rank, meta.seen
        return self.heads * (pairs * (2 * latent - self.nope - self.v) - cells * latent * (self.nope + self.v))

    def _attend_expanded(self, q_nope, q_rope, rope_NR, data: torch.Tensor, meta: BatchMeta) -> torch.Tensor:
        """[N, H * v] over the cells in `data`, some heads at a time so that memory stays bounded."""
        pages, batch = meta.in_order
        kept_LW = data[pages].flatten(0, 1).to(q_nope.dtype)
        latent_LC, k_rope_LR = kept_LW.split([self.config.kv_lora_rank, self.rope], dim=-1)
        width, key = self.nope + self.rope + self.v, self.nope + self.rope
        out_NHv = torch.empty(len(q_nope), self.heads, self.v, dtype=q_nope.dtype)
        step = max(1, MOST_EXPANDED // (len(kept_LW) * width))
        w_kv = self._kv(q_nope.dtype)
        for first in range(0, self.heads, step):
            part = slice(first, min(first + step, self.heads))
            own = F.linear(latent_LC, w_kv[part].flatten(0, 1)).unflatten(-1, (-1, self.nope + self.v))
            cells = own.new_empty(len(own), own.shape[1], width)  # [k_nope | k_rope | v] of each head
            cells[..., : self.nope], cells[..., key:] = own.split([self.nope, self.v], dim=-1)
            cells[..., self.nope : key] = k_rope_LR[:, None]
            heads = paged.expanded_heads(own.shape[1], self.nope, self.rope, self.v, self.scale)
            paged.attend(heads, batch, q_nope[:, part], q_rope[:, part], rope_NR, cells.view(len(pages), -1, cells[0].numel()),
                         out_NHv[:, part])
        return out_NHv.flatten(1)


class GQA(nn.Module):
    """Grouped-query attention with rotate-half RoPE; Qwen2 carries biases on q, k and v, Llama none."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.kv_heads, config.per_head_dim
        self.split = [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim]
        self.qkv_proj = Linear(config.hidden_size, sum(self.split), bias=config.attention_bias,
                               parts=dict(zip(("q_proj", "k_proj", "v_proj"), self.split, strict=True)))
        self.o_proj = Linear(self.heads * self.dim, config.hidden_size)
        self.paged = paged.grouped_heads(self.heads, self.kv_heads, self.dim, self.dim**-0.5)

    def _project(self, x_ND):
        return (t.unflatten(-1, (-1, self.dim)) for t in self.qkv_proj(x_ND).split(self.split, dim=-1))

    def expanded(self, x_ND, rope_NR, segments: Segments) -> torch.Tensor:
        q, k, v = self._project(x_ND)
        return self.o_proj(self._attend_fresh(rotate_half(q, rope_NR), rotate_half(k, rope_NR), v, segments))

    def _attend_fresh(self, q, k, v, segments: Segments) -> torch.Tensor:
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        return attend_segments(q, k, v, segments, self.dim**-0.5)

    def cached(self, x_ND, rope_NR, layer: int, cache: KVCache, meta: BatchMeta) -> torch.Tensor:
        q, k, v = self._project(x_ND)
        if not meta.static and paged.available(q, cache.data):
            data, out = cache.layers[layer], torch.empty(q.shape, dtype=q.dtype)
            paged.store(self.paged, meta.batch, v.flatten(1), k, rope_NR, data)
            paged.attend(self.paged, meta.batch, q[..., :0], q, rope_NR, data, out)
        else:
            q, k = rotate_half(q, rope_NR), rotate_half(k, rope_NR)
            cache.write(layer, meta.cells_N, torch.cat([k.flatten(1), v.flatten(1)], dim=-1))
            if meta.fresh and triton_mla.available(x_ND):
                return self.o_proj(self._attend_fresh(q, k, v, meta.fresh))
            out = attend_paged(self.paged, q, cache, layer, meta)
        return self.o_proj(out.flatten(1))
