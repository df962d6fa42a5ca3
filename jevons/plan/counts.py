"""Parameters, FLOPs and bytes, from a model's shape alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict

from jevons.config import DEEPSEEK_V2, DEEPSEEK_V3, QWEN2, ConfigError, ModelConfig, architecture_of

FP8_BLOCK = 128
_NO_COST = {"architecture", "scoring_func", "topk_method", "norm_topk_prob", "rope_scaling", "rope_theta", "bos_token_id",
            "eos_token_id", "hidden_act", "initializer_range"}


class PlanError(ValueError):
    """A plan that cannot be made; the message names the field, the value and what would be right."""


class Shape(ModelConfig):
    """The sizes of any published DeepSeek-V3/R1/V2, Qwen2 or Llama, those that cannot be run here included."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    published_fp8: bool = False

    @classmethod
    def from_hf(cls, raw: dict[str, Any], source: str = "config.json") -> Shape:
        """What a `config.json` costs. Fields that change no size are passed over; raises PlanError for the others."""
        try:
            architecture = architecture_of(raw, source)
        except ConfigError as error:
            raise PlanError(str(error)) from None
        qwen = architecture == QWEN2
        for name, only in (("moe_layer_freq", 1), ("mlp_bias", False), *([] if qwen else [("attention_bias", False)])):
            if raw.get(name, only) != only:
                raise PlanError(f"{source}: {name} {raw[name]!r} is not supported for {architecture}; {only} would be right")
        missing = [name for name, field in cls.model_fields.items() if field.is_required() and name not in raw]
        if missing:
            raise PlanError(f"{source}: {missing[0]} is missing; a positive number would be right")
        values = {k: v for k, v in raw.items() if k in cls.model_fields and k not in _NO_COST and v is not None}
        values |= {"architecture": architecture, "attention_bias": qwen, "published_fp8": bool(raw.get("quantization_config"))}
        if architecture == DEEPSEEK_V2:  # the gate changes no size, but decides what groups may be
            values |= {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
        if architecture in (DEEPSEEK_V2, DEEPSEEK_V3):
            values.pop("num_key_value_heads", None)  # the latent is shared by all heads; the field says nothing
        try:
            shape = cls.build(values, source)
        except ConfigError as error:
            raise PlanError(str(error)) from None
        if shape.num_hidden_layers + shape.num_nextn_predict_layers > 10_000:
            raise PlanError(f"{source}: num_hidden_layers {shape.num_hidden_layers} and num_nextn_predict_layers "
                            f"{shape.num_nextn_predict_layers} are more than 10,000 layers together")
        return shape


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
    router_biases: int = 0  # V3's; buffers here and in `transformers`, parameters in DeepSeek's own count


def attention_matrices(c: ModelConfig) -> list[tuple[int, int, int]]:
    """(how many, out, in) of one layer's attention projections."""
    d, h = c.hidden_size, c.num_attention_heads
    if not c.is_deepseek:
        wide, narrow = h * c.per_head_dim, c.kv_heads * c.per_head_dim
        return [(1, wide, d), (2, narrow, d), (1, d, wide)]
    queries, rank = h * c.per_head_dim, c.q_lora_rank
    return [*([(1, rank, d), (1, queries, rank)] if rank else [(1, queries, d)]), (1, c.kv_lora_rank + c.qk_rope_head_dim, d),
            (1, h * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank), (1, d, h * c.v_head_dim)]


def attention_parameters(c: ModelConfig) -> int:
    """One layer's projections and biases, its inner norms left out."""
    biases = (c.num_attention_heads + 2 * c.kv_heads) * c.per_head_dim if c.attention_bias else 0
    return sum(n * rows * columns for n, rows, columns in attention_matrices(c)) + biases


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
    biases = c.n_routed_experts * sum(map(c.layer_is_moe, layers)) if c.has_router_bias else 0
    return Parameters(embedding, head, attention, moe, dense, norms, mtp, total, active, biases)


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


def decode_attention_flops(c: ModelConfig, context: float) -> float:
    """FLOPs of one generated token's attention products, absorbed for MLA: queries meet the latent, not keys and values."""
    width = 2 * c.kv_lora_rank + c.qk_rope_head_dim if c.is_deepseek else 2 * c.per_head_dim
    return 2.0 * c.num_hidden_layers * c.num_attention_heads * width * context


def kv_beside(c: ModelConfig) -> dict[str, int]:
    """Cache bytes per token (bf16) of this model, and of others of its layers and heads."""
    width = c.v_head_dim if c.is_deepseek else c.per_head_dim
    heads, layers = c.num_attention_heads, c.num_hidden_layers
    groups = 8 if heads > 8 else max(1, heads // 2)
    own = "MLA" if c.is_deepseek else "GQA" if c.kv_heads < heads else "MHA"
    rows = {f"this model ({own})": kv_bytes_per_token(c), f"MHA, {heads} heads of {width}": 4 * heads * width * layers,
            f"GQA, {groups} KV heads of {width}": 4 * groups * width * layers}
    if c.is_deepseek:
        rows["MLA, expanded"] = 2 * heads * (c.per_head_dim + width) * layers
    return rows


def _ffn_matrices(c: ModelConfig, layer: int) -> list[tuple[int, int, int]]:
    """(how many, out, in) of one layer's feed-forward projections, the router left out."""
    d, width = c.hidden_size, c.moe_intermediate_size
    experts = [(c.n_routed_experts, width), (1, c.n_shared_experts * width)]
    shapes = experts if c.layer_is_moe(layer) else [(1, c.intermediate_size)]
    return [m for n, inner in shapes for m in ((2 * n, inner, d), (n, d, inner))]


@dataclass(frozen=True)
class Census:
    """Elements of a checkpoint by stored type, the MTP layer and its copies of embedding and head included."""

    f8_e4m3: int
    bf16: int
    f32: int

    @property
    def nbytes(self) -> int:
        return self.f8_e4m3 + 2 * self.bf16 + 4 * self.f32


def census(c: ModelConfig, fp8: bool) -> Census:
    """What DeepSeek's layout stores: in FP8 every projection, with one FP32 scale a 128x128 block; embeddings, head,
    routers, norms and `eh_proj` stay bf16, router biases FP32."""
    p, mtp = count_parameters(c), c.num_nextn_predict_layers
    biases = p.router_biases + (mtp * c.n_routed_experts if p.router_biases else 0)
    everything = p.total + p.mtp + 2 * mtp * c.vocab_size * c.hidden_size
    if not fp8:
        return Census(0, everything, biases)
    matrices = [m for i in range(c.num_hidden_layers + mtp) for m in attention_matrices(c) + _ffn_matrices(c, i)]
    stored = sum(n * rows * columns for n, rows, columns in matrices)
    scales = sum(n * -(-rows // FP8_BLOCK) * -(-columns // FP8_BLOCK) for n, rows, columns in matrices)
    return Census(stored, everything - stored, scales + biases)
