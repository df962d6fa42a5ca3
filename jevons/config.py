"""The shape of a model, in Hugging Face's field names. No torch here.

One `ModelConfig` covers DeepSeek-V3/R1, V2 and V2-Lite, and the dense Qwen2 and Llama students. `from_hf` reads a `config.json`
and refuses, by name, what would change the mathematics and is not implemented; `to_hf` writes one that
`transformers` opens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

DEEPSEEK_V3 = "DeepseekV3ForCausalLM"
DEEPSEEK_V2 = "DeepseekV2ForCausalLM"  # V2, V2-Lite, V2.5
QWEN2 = "Qwen2ForCausalLM"
LLAMA = "LlamaForCausalLM"
MODEL_TYPES = {DEEPSEEK_V3: "deepseek_v3", DEEPSEEK_V2: "deepseek_v2", QWEN2: "qwen2", LLAMA: "llama"}

# Fields of published configs that say nothing about the mathematics of a forward pass here.
_IGNORED = {
    "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "auto_map", "pad_token_id",
    "attention_dropout", "ep_size", "pretraining_tp", "seq_aux", "pad_token", "sliding_window", "max_window_layers",
    "_name_or_path", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "use_mtp", "output_router_logits",
}
# Fields with one value that is implemented; any other would change the mathematics.
_ONLY: dict[str, Any] = {"use_sliding_window": False, "mlp_bias": False, "use_mrope": False, "moe_layer_freq": 1,
                         "rope_interleave": True}
# The numbers of each rope type: needed, and possible. Both names of the type field are in published configs.
_ROPE = {"yarn": ({"factor", "original_max_position_embeddings"},
                  {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"}),
         "llama3": ({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}, set())}


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field, the value and what would be right."""


class ModelConfig(BaseModel):
    """Everything a network's shape depends on; the names are those of Hugging Face's `config.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: Literal["DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM"] = DEEPSEEK_V3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # rope_type "yarn" or "llama3", and its numbers (`_ROPE`)
    tie_word_embeddings: bool = False
    initializer_range: float = 0.006  # V3 report, section 4.2
    bos_token_id: int = 0
    eos_token_id: int = 1
    hidden_act: Literal["silu"] = "silu"

    # dense (Qwen2, Llama)
    head_dim: int | None = None
    attention_bias: bool = False

    # multi-head latent attention
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0

    # mixture of experts
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    first_k_dense_replace: int = 0
    aux_loss_alpha: float = 0.0001  # sequence-wise balance loss, V3 report section 4.2

    # multi-token prediction
    num_nextn_predict_layers: int = 0

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise ConfigError(message)

        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "n_group",
                    "max_position_embeddings", "rms_norm_eps", "rope_theta")
        for name in type(self).model_fields:
            value = getattr(self, name)
            if type(value) in (int, float):
                need(value > 0 if name in positive else value >= 0, f"{name} is {value}; it must be positive")
        for name, most in (("num_hidden_layers", 4096), ("n_routed_experts", 65_536)):  # more only takes time to be refused
            need(getattr(self, name) <= most, f"{name} is {getattr(self, name)}; at most {most:,} would be right")
        if self.is_moe:
            need(self.is_deepseek, f"n_routed_experts {self.n_routed_experts} is not supported for {self.architecture}")
            need(self.n_routed_experts % self.n_group == 0,
                 f"n_routed_experts {self.n_routed_experts} is not a multiple of n_group {self.n_group}")
            need(1 <= self.topk_group <= self.n_group, f"topk_group {self.topk_group} must lie in 1..n_group {self.n_group}")
            reachable = self.n_routed_experts // self.n_group * self.topk_group
            need(1 <= self.num_experts_per_tok <= reachable,
                 f"num_experts_per_tok {self.num_experts_per_tok} must lie in 1..{reachable} (the experts of topk_group groups)")
            sigmoid = self.architecture == DEEPSEEK_V3
            need(self.n_routed_experts // self.n_group >= 2 or self.n_group == 1 or not sigmoid,
                 "a group must hold at least two experts: its score is the sum of its two best")
            for name, right in (("scoring_func", ["sigmoid"] if sigmoid else ["softmax"]),
                                ("topk_method", ["noaux_tc"] if sigmoid else ["greedy", "group_limited_greedy"])):
                value = getattr(self, name)
                need(value in right,
                     f"{name} {value!r} is not supported for {self.architecture}; {' or '.join(right)} would be right")
            # where V2 normalises, DeepSeek's code leaves the scaling factor out and transformers ignores the field
            need(sigmoid or not self.norm_topk_prob,
                 f"norm_topk_prob true is not supported for {self.architecture}; false would be right")
        if self.is_deepseek:
            need(self.qk_rope_head_dim % 2 == 0 and self.qk_rope_head_dim > 0, "qk_rope_head_dim must be even and positive")
            need(self.kv_lora_rank > 0 and self.v_head_dim > 0, "kv_lora_rank and v_head_dim must be positive")
        else:
            need(self.hidden_size % self.num_attention_heads == 0 or self.head_dim is not None,
                 f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")
            need(self.num_attention_heads % self.kv_heads == 0,
                 f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads {self.kv_heads}")
            need(self.per_head_dim % 2 == 0, f"head_dim {self.per_head_dim} is odd; rotary pairs need an even one")
        return self

    @property
    def is_deepseek(self) -> bool:
        """DeepSeek's block: latent attention, and experts where there are any."""
        return self.architecture in (DEEPSEEK_V3, DEEPSEEK_V2)

    @property
    def has_router_bias(self) -> bool:
        """V3 balances by a bias on the router's choice; V2 has none."""
        return self.topk_method == "noaux_tc"

    @property
    def is_moe(self) -> bool:
        return self.n_routed_experts > 0

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def per_head_dim(self) -> int:
        """Query/key width per head: 192 in V3 (128 + 64), head_dim in dense models."""
        if self.is_deepseek:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def softmax_scale(self) -> float:
        """What scores are multiplied with: 1/sqrt(width), and by YaRN's m(mscale_all_dim)^2 in DeepSeek's models."""
        yarn = self.rope_scaling or {}
        m = yarn_mscale(yarn["factor"], yarn["mscale_all_dim"]) if self.is_deepseek and "mscale_all_dim" in yarn else 1.0
        return self.per_head_dim**-0.5 * m * m

    def layer_is_moe(self, index: int) -> bool:
        """Layers past `first_k_dense_replace`, the MTP layer (index `num_hidden_layers`) included, are MoE."""
        return self.is_moe and index >= self.first_k_dense_replace

    def with_context(self, context: int, yarn_factor: float | None = None) -> ModelConfig:
        """This model for rows of `context` tokens. With `yarn_factor` s, YaRN stretches s times the length that the model was
        first trained at (V3 report section 4.3: alpha 1, beta 32, sqrt(t) = 0.1 ln s + 1, on the decoupled key and its query).
        Raises ConfigError."""
        scaling, source = self.rope_scaling, "context extension"
        if yarn_factor is None:
            if scaling and context > self.max_position_embeddings:
                raise ConfigError(f"{source}: context {context} is past the {self.max_position_embeddings} positions of this "
                                  "model's rope_scaling; give yarn_factor")
            return self if scaling else self.build(self.model_dump() | {"max_position_embeddings": context}, source)
        if scaling and scaling["rope_type"] != "yarn":
            raise ConfigError(f"{source}: rope_scaling of type {scaling['rope_type']} cannot become YaRN; a model with yarn or "
                              "without scaling would be right")
        original = scaling["original_max_position_embeddings"] if scaling else self.max_position_embeddings
        if context > (length := round(original * yarn_factor)):
            raise ConfigError(f"{source}: context {context} is past {original} x yarn_factor {yarn_factor:g} = {length}")
        yarn = {"rope_type": "yarn", "factor": yarn_factor, "original_max_position_embeddings": original, "beta_fast": 32.0,
                "beta_slow": 1.0}
        yarn |= {"mscale": 1.0, "mscale_all_dim": 1.0} if self.is_deepseek else {}
        return self.build(self.model_dump() | {"rope_scaling": yarn, "max_position_embeddings": length}, source)

    @classmethod
    def from_hf(cls, raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
        """Read a Hugging Face `config.json`. Raises ConfigError naming the field that is unknown or unsupported."""
        architecture = architecture_of(raw, source)
        known = set(cls.model_fields) - {"architecture"}
        values: dict[str, Any] = {"architecture": architecture, "initializer_range": 0.02}
        if architecture == DEEPSEEK_V2:
            values |= {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
        accepted = _IGNORED | {"architectures", "rope_parameters", "quantization_config", "num_mtp_layers", "layer_types",
                               "qk_head_dim", *_ONLY}
        for key, value in raw.items():
            if key in known:
                values[key] = value
            elif key not in accepted:
                raise ConfigError(f"{source}: field {key!r} = {value!r} is not known and might change the mathematics")
        for name, right in _ONLY.items():
            if raw.get(name, right) not in (right, None):
                raise ConfigError(f"{source}: {name} {raw[name]!r} is not supported; {json.dumps(right)} would be right")
        layers = raw.get("layer_types") or []
        if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
            raise ConfigError(f"{source}: layer_types {layers!r} is not supported; 'full_attention' everywhere would be right")
        _check_quantisation(raw.get("quantization_config"), source)
        # transformers 5 folds theta and scaling into rope_parameters; published files have rope_scaling beside rope_theta
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise ConfigError(f"{source}: rope_scaling {rope!r} is not an object")
        values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
        values["rope_scaling"] = _rope_scaling(rope, architecture, source)
        if "num_mtp_layers" in raw:  # transformers' newer name
            values.setdefault("num_nextn_predict_layers", raw["num_mtp_layers"])
        if architecture == DEEPSEEK_V3 and values.get("n_routed_experts"):
            # programs disagree on what their absence means, and no tensor's shape would tell
            missing = [name for name in ("n_group", "topk_group", "routed_scaling_factor") if name not in raw]
            if missing:
                raise ConfigError(f"{source}: {', '.join(missing)} missing; a mixture of experts needs its router's settings")
        if architecture in (DEEPSEEK_V3, DEEPSEEK_V2):
            for name in ("num_key_value_heads", "head_dim"):  # the latent is shared by all heads; they say nothing
                values.pop(name, None)
            if architecture == DEEPSEEK_V2 and values["topk_method"] == "greedy":
                values |= {"n_group": 1, "topk_group": 1}
            for name in ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor"):
                if name in values and values[name] is None:
                    values.pop(name)
        if architecture == QWEN2:
            values["attention_bias"] = True  # q, k and v carry one, o does not; the published config is silent
        elif values.get("attention_bias"):
            raise ConfigError(f"{source}: attention_bias true is not supported for {architecture}; false would be right")
        for name in ("bos_token_id", "eos_token_id"):
            if isinstance(values.get(name), list) and values[name]:
                values[name] = values[name][0]
            elif values.get(name, 0) is None:
                values.pop(name)
        return cls.build(values, source)

    @classmethod
    def build(cls, values: dict[str, Any], source: str) -> ModelConfig:
        """From this class's own fields. Raises ConfigError naming `source`, the field and what is wrong with it."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            field = "".join(f"{part} = {first['input']!r:.80}: " for part in first["loc"][:1])
            raise ConfigError(f"{source}: {field}{first['msg'].removeprefix('Value error, ')}") from None

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model, as `transformers`, vLLM and llama.cpp's converter expect it."""
        values = self.model_dump(exclude={"architecture"})
        common = {"architectures": [self.architecture], "model_type": MODEL_TYPES[self.architecture], "torch_dtype": "float32"}
        moe_only = {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                    "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group",
                    "topk_group", "routed_scaling_factor", "scoring_func", "topk_method", "norm_topk_prob",
                    "first_k_dense_replace", "aux_loss_alpha", "num_nextn_predict_layers"}
        if self.rope_scaling:  # DeepSeek's own code and older programs read `type`
            values["rope_scaling"] = self.rope_scaling | {"type": self.rope_scaling["rope_type"]}
        if self.is_deepseek:
            values["num_key_value_heads"] = self.num_attention_heads
            values.pop("head_dim")
        else:
            values = {k: v for k, v in values.items() if k not in moe_only}
            values["num_key_value_heads"] = self.kv_heads
            if self.architecture == QWEN2:
                values.pop("attention_bias")
            if self.head_dim is None:
                values.pop("head_dim")
        return common | values

    @classmethod
    def load(cls, directory: str | Path) -> ModelConfig:
        """The config of a checkpoint directory. Raises ConfigError naming the file."""
        path = Path(directory) / "config.json"
        return cls.from_hf(read_config(path), str(path))


def read_config(path: Path) -> dict[str, Any]:
    """A `config.json` as it stands. Raises ConfigError naming the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a checkpoint directory holds config.json beside its safetensors") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}; an object would be right")
    return raw


def architecture_of(raw: dict[str, Any], source: str) -> str:
    """The architecture a `config.json` names. Raises ConfigError where it is not one that is known."""
    match raw.get("architectures"):
        case [str(name), *_] | str(name) if name in MODEL_TYPES:
            return name
    raise ConfigError(f"{source}: architectures {raw.get('architectures')!r} is not one of {', '.join(MODEL_TYPES)}")


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's m = 0.1 mscale ln(factor) + 1, 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _rope_scaling(rope: dict[str, Any], architecture: str, source: str) -> dict[str, Any] | None:
    """The scaling in `rope`, checked, under one spelling; None for plain rotary embeddings. Raises ConfigError."""
    where = f"{source}: rope_scaling"
    kind = rope.get("rope_type", rope.get("type", "default"))
    values = {k: v for k, v in rope.items() if k not in ("type", "rope_type", "rope_theta") and v is not None}
    if values.pop("truncate", True) is not True or values.pop("partial_rotary_factor", 1) != 1:
        raise ConfigError(f"{where} {rope!r}: truncate false and a partial_rotary_factor are not supported")
    if kind in ("default", None) and not values:
        return None
    if not isinstance(kind, str) or kind not in _ROPE or (kind == "llama3" and architecture in (DEEPSEEK_V3, DEEPSEEK_V2)):
        raise ConfigError(f"{where} {rope!r} of type {kind!r} is not supported for {architecture}; "
                          "yarn, llama3 (Llama, Qwen2) or null would be right")
    needed, possible = _ROPE[kind]
    for key, value in values.items():
        if key not in needed | possible:
            raise ConfigError(f"{where} field {key!r} = {value!r} is not known for {kind} and might change the mathematics")
        if type(value) not in (int, float) or not 0 <= value < math.inf or (value == 0 and not key.startswith("mscale")):
            raise ConfigError(f"{where}.{key} is {value!r}; a positive number would be right")
    if missing := sorted(needed - set(values)):
        raise ConfigError(f"{where} of type {kind} lacks {', '.join(missing)}")
    # with one of them alone, DeepSeek's code and transformers disagree on the scale
    if bool(values.get("mscale")) != bool(values.get("mscale_all_dim")):
        raise ConfigError(f"{where} has one of mscale and mscale_all_dim; both or neither would be right")
    if architecture in (DEEPSEEK_V3, DEEPSEEK_V2) and "attention_factor" in values:
        raise ConfigError(f"{where}.attention_factor is not supported for {architecture}; mscale and mscale_all_dim are")
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ConfigError(f"{where}.high_freq_factor {values['high_freq_factor']} must be over low_freq_factor "
                          f"{values['low_freq_factor']}")
    return {"rope_type": kind} | {k: v for k, v in sorted(values.items()) if v != 0}


def _check_quantisation(quantisation: Any, source: str) -> None:
    """DeepSeek's FP8 blocks are the one quantisation that can be read. Raises ConfigError naming the field."""
    if not quantisation:
        return
    right = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    harmless = {"scale_fmt", "modules_to_not_convert", "ignored_layers", "dequantize"}
    if not isinstance(quantisation, dict) or "quant_method" not in quantisation:
        raise ConfigError(f"{source}: quantization_config {quantisation!r} is not supported; {right} would be right")
    for key, value in quantisation.items():
        if key not in harmless and right.get(key, ...) != value:
            raise ConfigError(f"{source}: quantization_config.{key} {value!r} is not supported; {right} would be right")
    if quantisation.get("weight_block_size") is None:
        raise ConfigError(f"{source}: quantization_config lacks weight_block_size; {right} would be right")


_TINY = dict(
    vocab_size=512, hidden_size=128, intermediate_size=384, moe_intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=4, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=4, topk_group=2,
    routed_scaling_factor=1.0, first_k_dense_replace=1, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32,
    qk_rope_head_dim=32, v_head_dim=32, num_nextn_predict_layers=1, max_position_embeddings=1024, initializer_range=0.02,
)

_DENSE = dict(
    architecture=QWEN2, attention_bias=True, vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.02, tie_word_embeddings=True,
)

# Tiny presets: every V3 feature on (in V3's), every matrix dimension a multiple of 32, trainable on two CPU cores.
PRESETS: dict[str, dict[str, Any]] = {
    "v3-nano": _TINY | dict(hidden_size=64, num_attention_heads=2, intermediate_size=128, moe_intermediate_size=32,
                            num_hidden_layers=2, q_lora_rank=32, kv_lora_rank=32),
    "v3-tiny": _TINY,
    "v3-small": _TINY | dict(hidden_size=192, num_attention_heads=6, intermediate_size=576, moe_intermediate_size=96,
                             n_routed_experts=16, num_hidden_layers=6),
    # students for distillation, which every program runs
    "qwen2-nano": _DENSE | dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2),
    "qwen2-tiny": _DENSE,
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """A preset by name, with fields changed. Raises ConfigError naming the presets there are."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not one of {sorted(PRESETS)}")
    return ModelConfig.build(PRESETS[name] | changes, f"preset {name}")
