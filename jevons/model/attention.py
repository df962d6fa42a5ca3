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

INNER_EPS = 1e-6  # DeepSeek's published code gives the inner norms no eps: rms_norm_eps says nothing about them
SHORT_ROW = 400  # CPU rows up to this length use ShortCausalAttention
Segments = list[tuple[int, int]]  # (rows, length): flat tokens are rows_0 * length_0 tokens, then rows_1 * length_1, ...


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
    if q_BHLd.device.type == "cpu" and length <= SHORT_ROW:
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
    """Flat [N, H, W] -> [S, H * max_query, W], heads folded into the query dimension (one matmul for all heads)."""
    n, heads, width = x_NHW.shape
    if meta.max_query == 1:
        return x_NHW
    out = x_NHW.new_zeros(meta.sequences, meta.max_query, heads, width)
    out[meta.sequence_N, meta.query_N] = x_NHW
    return out.transpose(1, 2).reshape(meta.sequences, heads * meta.max_query, width)


def unpad_queries(x_SQW: torch.Tensor, heads: int, meta: BatchMeta) -> torch.Tensor:
    """The reverse: [S, H * max_query, W] -> [N, H, W]."""
    if meta.max_query == 1:
        return x_SQW
    x = x_SQW.view(meta.sequences, heads, meta.max_query, -1)
    return x[meta.sequence_N, :, meta.query_N]


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

    def _queries_and_latent(self, x_ND, rope_NR):
        q, latent_NC, k_rope_NR = self.qkv_a_proj(x_ND).split(self.split, dim=-1)
        if self.config.q_lora_rank:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q_nope, q_rope = q.view(-1, self.heads, self.nope + self.rope).split([self.nope, self.rope], dim=-1)
        return q_nope, rotate_interleaved(q_rope, rope_NR), self.kv_a_layernorm(latent_NC), rotate_interleaved(k_rope_NR, rope_NR)

    def expanded(self, x_ND, rope_NR, segments: Segments) -> torch.Tensor:
        """Training rows: per-head keys and values, no cache."""
        q_nope, q_rope, latent_NC, k_rope_NR = self._queries_and_latent(x_ND, rope_NR)
        k_nope, v = self.kv_b_proj(latent_NC).view(-1, self.heads, self.nope + self.v).split([self.nope, self.v], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope_NR[:, None].expand(-1, self.heads, -1).to(k_nope.dtype)], dim=-1)
        return self.o_proj(attend_segments(q, k, v, segments, self.scale))

    def cached(self, x_ND, rope_NR, layer: int, cache: KVCache, meta: BatchMeta) -> torch.Tensor:
        """Absorbed: q' = q_nope W_k; score = q'.c + q_rope.k_rope; out = (p c) W_v. This is MQA of width C + R."""
        q_nope, q_rope, latent_NC, k_rope_NR = self._queries_and_latent(x_ND, rope_NR)
        cache.write(layer, meta.cells_N, torch.cat([latent_NC, k_rope_NR], dim=-1))
        w_kv = self.kv_b_proj.dense(x_ND.dtype).view(self.heads, self.nope + self.v, -1)
        w_k, w_v = w_kv.split([self.nope, self.v], dim=1)
        q_latent = torch.bmm(q_nope.transpose(0, 1), w_k).transpose(0, 1)  # [N, H, C]
        q = pad_queries(torch.cat([q_latent, q_rope], dim=-1) * self.scale, meta)
        kept_SLW = cache.read(layer, meta).to(q.dtype)
        scores = torch.bmm(q, kept_SLW.transpose(1, 2)).view(meta.sequences, self.heads, meta.max_query, -1)
        probs = (scores.float() + meta.mask[:, None]).softmax(dim=-1).to(q.dtype).flatten(1, 2)
        out = torch.bmm(probs, kept_SLW[..., : self.config.kv_lora_rank])
        out_NHC = unpad_queries(out, self.heads, meta)
        return self.o_proj(torch.bmm(out_NHC.transpose(0, 1), w_v.transpose(1, 2)).transpose(0, 1).flatten(1))


class GQA(nn.Module):
    """Grouped-query attention with rotate-half RoPE; Qwen2 carries biases on q, k and v, Llama none."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.kv_heads, config.per_head_dim
        self.split = [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim]
        self.qkv_proj = Linear(config.hidden_size, sum(self.split), bias=config.attention_bias,
                               parts=dict(zip(("q_proj", "k_proj", "v_proj"), self.split, strict=True)))
        self.o_proj = Linear(self.heads * self.dim, config.hidden_size)

    def _qkv(self, x_ND, rope_NR):
        q, k, v = self.qkv_proj(x_ND).split(self.split, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self.dim)) for t in (q, k, v))
        return rotate_half(q, rope_NR), rotate_half(k, rope_NR), v

    def expanded(self, x_ND, rope_NR, segments: Segments) -> torch.Tensor:
        q, k, v = self._qkv(x_ND, rope_NR)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        return self.o_proj(attend_segments(q, k, v, segments, self.dim**-0.5))

    def cached(self, x_ND, rope_NR, layer: int, cache: KVCache, meta: BatchMeta) -> torch.Tensor:
        q, k, v = self._qkv(x_ND, rope_NR)
        cache.write(layer, meta.cells_N, torch.cat([k.flatten(1), v.flatten(1)], dim=-1))
        kept = cache.read(layer, meta).to(q.dtype).unflatten(-1, (2, self.kv_heads, self.dim))
        k_SGLd, v_SGLd = kept[:, :, 0].transpose(1, 2), kept[:, :, 1].transpose(1, 2)
        group = self.heads // self.kv_heads
        q = pad_queries(q, meta).view(meta.sequences, self.kv_heads, group * meta.max_query, self.dim)
        scores = (q * self.dim**-0.5) @ k_SGLd.transpose(-1, -2)
        scores = scores.view(meta.sequences, self.heads, meta.max_query, -1)
        probs = (scores.float() + meta.mask[:, None]).softmax(dim=-1).to(q.dtype)
        out = probs.view(meta.sequences, self.kv_heads, group * meta.max_query, -1) @ v_SGLd
        out = out.reshape(meta.sequences, self.heads * meta.max_query, self.dim)
        return self.o_proj(unpad_queries(out, self.heads, meta).flatten(1))
