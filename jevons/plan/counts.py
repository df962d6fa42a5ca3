"""Parameters, FLOPs and bytes, from a model's shape alone."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from jevons.config import ModelConfig

_V2, _V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
ARCHITECTURES = (_V3, _V2, "Qwen2ForCausalLM", "LlamaForCausalLM")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
FP8_BLOCK = 128


class PlanError(ValueError):
    """A plan that cannot be made; the message names the field, the value and what would be right."""


@dataclass(frozen=True)
class Shape:
    """What a cost depends on, of any published DeepSeek-V3/R1/V2, Qwen2 or Llama; the names are those of `ModelConfig`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    first_k_dense_replace: int = 0
    num_nextn_predict_layers: int = 0
    published_fp8: bool = False

    @classmethod
    def from_hf(cls, raw: dict[str, Any], source: str = "config.json") -> Shape:
        """From a Hugging Face `config.json`. Raises PlanError naming `source`, the field and what would be right."""
        named = raw.get("architectures")
        architecture = named[0] if isinstance(named, list) and named else named
        if architecture not in ARCHITECTURES:
            raise PlanError(f"{source}: architectures {named!r} is not one of {', '.join(ARCHITECTURES)}")
        values: dict[str, Any] = {"architecture": architecture, "published_fp8": bool(raw.get("quantization_config"))}
        for field in fields(cls)[1:-1]:
            value = raw.get(field.name)
            if value is None:
                continue
            right = bool if field.type == "bool" else int
            if type(value) is not right or value < 0:
                raise PlanError(f"{source}: {field.name} is {value!r}; a {'truth value' if right is bool else 'whole number'}"
                                f"{'' if right is bool else ' from 0 up'} would be right")
            values[field.name] = value
        latent = architecture in (_V2, _V3)
        for name in _SIZES + (_LATENT if latent else ()):
            if not values.get(name):
                raise PlanError(f"{source}: {name} is {raw.get(name)!r}; a positive number would be right")
        for name, only in (("moe_layer_freq", 1), ("mlp_bias", False)):
            if raw.get(name, only) != only:
                raise PlanError(f"{source}: {name} {raw[name]!r} is not supported; {only} would be right")
        if values.get("attention_bias") and architecture != "Qwen2ForCausalLM":
            raise PlanError(f"{source}: attention_bias true is not supported for {architecture}; false would be right")
        values["attention_bias"] = architecture == "Qwen2ForCausalLM"  # its q, k and v carry one; the config is silent
        shape = cls(**values)
        if not latent and not shape.head_dim and shape.hidden_size % shape.num_attention_heads:
            raise PlanError(f"{source}: hidden_size {shape.hidden_size} is not a multiple of num_attention_heads "
                            f"{shape.num_attention_heads}")
        if not latent and shape.num_attention_heads % shape.kv_heads:
            raise PlanError(f"{source}: num_attention_heads {shape.num_attention_heads} is not a multiple of "
                            f"num_key_value_heads {shape.kv_heads}")
        if shape.is_moe and not (shape.moe_intermediate_size and 0 < shape.num_experts_per_tok <= shape.n_routed_experts):
            raise PlanError(f"{source}: num_experts_per_tok {shape.num_experts_per_tok} and moe_intermediate_size "
                            f"{shape.moe_intermediate_size} do not fit n_routed_experts {shape.n_routed_experts}")
        return shape

    @property
    def is_deepseek(self) -> bool:
        return self.architecture in (_V2, _V3)

    @property
    def is_moe(self) -> bool:
        return self.n_routed_experts > 0

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def per_head_dim(self) -> int:
        if self.is_deepseek:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def layer_is_moe(self, index: int) -> bool:
        return self.is_moe and index >= self.first_k_dense_replace


Model = ModelConfig | Shape  # the functions below read only what both have


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


def attention_parameters(c: Model) -> int:
    """One layer's projections and biases, its inner norms left out."""
    d, h = c.hidden_size, c.num_attention_heads
    if not c.is_deepseek:
        wide, narrow = h * c.per_head_dim, c.kv_heads * c.per_head_dim
        return d * (wide + 2 * narrow) + wide * d + ((wide + 2 * narrow) if c.attention_bias else 0)
    qk = c.qk_nope_head_dim + c.qk_rope_head_dim
    queries = d * c.q_lora_rank + c.q_lora_rank * h * qk if c.q_lora_rank else d * h * qk
    keys_values = d * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank * h * (c.qk_nope_head_dim + c.v_head_dim)
    return queries + keys_values + h * c.v_head_dim * d


def ffn_parameters(c: Model, layer: int, active: bool) -> int:
    """One layer's feed-forward part, gate included (its bias is a buffer); `active` counts only what a token uses."""
    if not c.layer_is_moe(layer):
        return 3 * c.hidden_size * c.intermediate_size
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    routed = c.num_experts_per_tok if active else c.n_routed_experts
    return expert * (routed + c.n_shared_experts) + c.hidden_size * c.n_routed_experts


def norm_parameters(c: Model) -> int:
    """One layer's norms, MLA's inner ones included."""
    return 2 * c.hidden_size + ((c.q_lora_rank or 0) + c.kv_lora_rank if c.is_deepseek else 0)


def count_parameters(c: Model) -> Parameters:
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
    biases = c.n_routed_experts * sum(map(c.layer_is_moe, layers)) if c.architecture == _V3 else 0
    return Parameters(embedding, head, attention, moe, dense, norms, mtp, total, active, biases)


def forward_flops(c: Model, context: float, mtp: bool = False) -> float:
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


def training_flops(c: Model, tokens: float, row_length: float, mtp: bool = True) -> float:
    """Forward and backward (twice the forward) of causal rows."""
    return 3.0 * tokens * forward_flops(c, (row_length + 1) / 2, mtp)


def kv_bytes_per_token(c: Model, bytes_per_element: int = 2, mtp: bool = False) -> int:
    """Cache bytes a token takes over all layers; with `mtp`, the MTP layer's too."""
    width = c.kv_lora_rank + c.qk_rope_head_dim if c.is_deepseek else 2 * c.kv_heads * c.per_head_dim
    return width * (c.num_hidden_layers + (c.num_nextn_predict_layers if mtp else 0)) * bytes_per_element


def decode_attention_flops(c: Model, context: float) -> float:
    """FLOPs of one generated token's attention products, absorbed for MLA: queries meet the latent, not keys and values."""
    width = 2 * c.kv_lora_rank + c.qk_rope_head_dim if c.is_deepseek else 2 * c.per_head_dim
    return 2.0 * c.num_hidden_layers * c.num_attention_heads * width * context


def kv_beside(c: Model) -> dict[str, int]:
    """Cache bytes per token (bf16) of this model, and of others of its layers and heads."""
    width = c.v_head_dim if c.is_deepseek else c.per_head_dim
    heads, layers = c.num_attention_heads, c.num_hidden_layers
    groups = 8 if heads > 8 else max(1, heads // 2)
    own = "MLA" if c.is_deepseek else "GQA" if c.kv_heads < heads else "MHA"
    rows = {f"this model ({own})": kv_bytes_per_token(c), f"MHA, {heads} heads of {width}": 4 * heads * width * layers,
            f"GQA, {groups} KV heads of {width}": 4 * groups * width * layers}
    if c.is_deepseek:
        rows["MLA cached expanded"] = 2 * heads * (c.per_head_dim + width) * layers
    return rows


def _projections(c: Model, layer: int) -> list[tuple[int, int, int]]:
    """(how many, out, in) of a layer's matrices that an FP8 checkpoint stores in blocks: all but the router."""
    d, h = c.hidden_size, c.num_attention_heads
    if c.is_deepseek:
        q = [(1, c.q_lora_rank, d), (1, h * c.per_head_dim, c.q_lora_rank)] if c.q_lora_rank else [(1, h * c.per_head_dim, d)]
        attention = [*q, (1, c.kv_lora_rank + c.qk_rope_head_dim, d),
                     (1, h * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank), (1, d, h * c.v_head_dim)]
    else:
        wide, narrow = h * c.per_head_dim, c.kv_heads * c.per_head_dim
        attention = [(1, wide, d), (2, narrow, d), (1, d, wide)]

    def mlp(count: int, width: int) -> list[tuple[int, int, int]]:
        return [(2 * count, width, d), (count, d, width)] if width else []

    if not c.layer_is_moe(layer):
        return attention + mlp(1, c.intermediate_size)
    width = c.moe_intermediate_size
    return attention + mlp(c.n_routed_experts, width) + mlp(1, c.n_shared_experts * width)


@dataclass(frozen=True)
class Census:
    """Elements of a checkpoint by stored type, the MTP layer and its copies of embedding and head included."""

    f8_e4m3: int
    bf16: int
    f32: int

    @property
    def nbytes(self) -> int:
        return self.f8_e4m3 + 2 * self.bf16 + 4 * self.f32


def census(c: Model, fp8: bool) -> Census:
    """What DeepSeek's layout stores: in FP8 every projection, with one FP32 scale a 128x128 block; embeddings, head,
    routers, norms and `eh_proj` stay bf16, router biases FP32."""
    p, mtp = count_parameters(c), c.num_nextn_predict_layers
    biases = p.router_biases + (mtp * c.n_routed_experts if p.router_biases else 0)
    everything = p.total + p.mtp + 2 * mtp * c.vocab_size * c.hidden_size
    if not fp8:
        return Census(0, everything, biases)
    matrices = [m for layer in range(c.num_hidden_layers + mtp) for m in _projections(c, layer)]
    stored = sum(n * rows * columns for n, rows, columns in matrices)
    scales = sum(n * -(-rows // FP8_BLOCK) * -(-columns // FP8_BLOCK) for n, rows, columns in matrices)
    return Census(stored, everything - stored, scales + biases)
