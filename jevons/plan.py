"""What a model costs: parameters, FLOPs, cache bytes, dollars. No torch here; the same functions price a plan and a run."""

from __future__ import annotations

from dataclasses import dataclass

from jevons.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Counts by part. `active` is what one token uses: top-k experts instead of all, embedding and head included."""

    embedding: int
    head: int
    attention: int
    experts: int
    dense_mlp: int
    norms: int
    mtp: int
    total: int  # MTP module left out, as the papers count
    active: int


def attention_parameters(c: ModelConfig) -> int:
    """One layer's projections and biases, its inner norms left out."""
    d, h = c.hidden_size, c.num_attention_heads
    if not c.is_deepseek:
        wide, narrow = h * c.per_head_dim, c.kv_heads * c.per_head_dim
        return d * (wide + 2 * narrow) + wide * d + ((wide + 2 * narrow) if c.attention_bias else 0)
    qk = c.qk_nope_head_dim + c.qk_rope_head_dim
    queries = d * c.q_lora_rank + c.q_lora_rank * h * qk if c.q_lora_rank else d * h * qk
    keys_values = d * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank * h * (c.qk_nope_head_dim + c.v_head_dim)
    return queries + keys_values + h * c.v_head_dim * d


def ffn_parameters(c: ModelConfig, layer: int, active: bool) -> int:
    """One layer's feed-forward part, gate included (its bias is a buffer); `active` counts only what a token uses."""
    if not c.layer_is_moe(layer):
        return 3 * c.hidden_size * c.intermediate_size
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    routed = c.num_experts_per_tok if active else c.n_routed_experts
    return expert * (routed + c.n_shared_experts) + c.hidden_size * c.n_routed_experts


def norm_parameters(c: ModelConfig) -> int:
    """One layer's norms, MLA's inner ones included."""
    return 2 * c.hidden_size + ((c.q_lora_rank or 0) + c.kv_lora_rank if c.is_deepseek else 0)


def count_parameters(c: ModelConfig) -> Parameters:
    layers = range(c.num_hidden_layers)
    embedding = c.vocab_size * c.hidden_size
    head = 0 if c.tie_word_embeddings else embedding
    attention = c.num_hidden_layers * attention_parameters(c)
    moe = sum(ffn_parameters(c, i, False) for i in layers if c.layer_is_moe(i))
    dense = sum(ffn_parameters(c, i, False) for i in layers if not c.layer_is_moe(i))
    norms = c.num_hidden_layers * norm_parameters(c) + c.hidden_size
    active = embedding + head + attention + norms + sum(ffn_parameters(c, i, True) for i in layers)
    last = c.num_hidden_layers
    mtp = c.num_nextn_predict_layers * (attention_parameters(c) + ffn_parameters(c, last, False) + norm_parameters(c)
                                        + 2 * c.hidden_size**2 + 3 * c.hidden_size)
    total = embedding + head + attention + moe + dense + norms
    return Parameters(embedding, head, attention, moe, dense, norms, mtp, total, active)


def forward_flops(c: ModelConfig, context: float, mtp: bool = False) -> float:
    """FLOPs of one token's forward pass that attends to `context` tokens: 2 a weight, and the two attention products.

    For causal training rows of length T the mean context is (T + 1) / 2.
    """
    layers = c.num_hidden_layers + (c.num_nextn_predict_layers if mtp else 0)
    weights = c.vocab_size * c.hidden_size * (1 + (c.num_nextn_predict_layers if mtp else 0))
    for i in range(layers):
        weights += attention_parameters(c) + ffn_parameters(c, i, True)
    if mtp:
        weights += c.num_nextn_predict_layers * 2 * c.hidden_size**2
    value_dim = c.v_head_dim if c.is_deepseek else c.per_head_dim
    scores = layers * c.num_attention_heads * (c.per_head_dim + value_dim) * context
    return 2.0 * (weights + scores)


def training_flops(c: ModelConfig, tokens: float, row_length: float, mtp: bool = True) -> float:
    """Forward and backward (twice the forward) of causal rows."""
    return 3.0 * tokens * forward_flops(c, (row_length + 1) / 2, mtp)


def kv_bytes_per_token(c: ModelConfig, bytes_per_element: int = 2, mtp: bool = False) -> int:
    """Cache bytes a token takes over all layers; with `mtp`, the MTP layer's too."""
    width = c.kv_lora_rank + c.qk_rope_head_dim if c.is_deepseek else 2 * c.kv_heads * c.per_head_dim
    return width * (c.num_hidden_layers + (c.num_nextn_predict_layers if mtp else 0)) * bytes_per_element


def dollars(seconds: float, dollars_per_hour: float) -> float:
    return seconds / 3600 * dollars_per_hour
