"""Model configurations: published ones open, what would change the mathematics is refused by name."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jevons.config import PRESETS, ConfigError, ModelConfig, preset

# As published beside the weights.
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
    "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 129280,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
}
V2 = {k: v for k, v in V3.items() if k not in ("num_nextn_predict_layers", "quantization_config")} | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 5120,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60, "first_k_dense_replace": 1,
    "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3,
    "routed_scaling_factor": 16.0, "scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False,
    "aux_loss_alpha": 0.001, "seq_aux": True, "bos_token_id": 100000, "eos_token_id": 100001,
    "rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
V2_LITE = V2 | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "n_group": 1, "topk_group": 1,
    "q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_method": "greedy",
}
DISTILL_QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960,
    "max_position_embeddings": 131072, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 12,
    "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.44.0", "use_cache": True,
    "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": [2, 3],
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 32000,
}
LLAMA3 = LLAMA | {"rope_theta": 500000.0, "max_position_embeddings": 131072, "rope_scaling": {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3"}}
PUBLISHED = {"v3": V3, "v2": V2, "v2-lite": V2_LITE, "distill": DISTILL_QWEN, "llama": LLAMA, "llama3": LLAMA3}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_open(name):
    raw = PUBLISHED[name]
    config = ModelConfig.from_hf(raw)
    for field in ("hidden_size", "vocab_size", "num_hidden_layers", "rope_theta", "tie_word_embeddings", "bos_token_id"):
        assert getattr(config, field) == raw[field]
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_what_they_mean():
    v3, qwen, llama = (ModelConfig.from_hf(PUBLISHED[name]) for name in ("v3", "distill", "llama"))
    assert v3.per_head_dim == 192 and v3.is_moe and v3.is_deepseek
    assert [v3.layer_is_moe(i) for i in (0, 2, 3, 61)] == [False, False, True, True]
    assert qwen.attention_bias and not llama.attention_bias and qwen.per_head_dim == 128 and qwen.kv_heads == 2
    assert llama.eos_token_id == 2 and not llama.is_moe


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("v3")])
def test_presets_are_whole_v3s_in_multiples_of_32(name):
    config = preset(name)
    assert config.is_moe and config.n_group > 1 and config.num_nextn_predict_layers == 1 and config.first_k_dense_replace >= 1
    for field in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank",
                  "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        assert getattr(config, field) % 32 == 0, field
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_unknown_preset_and_wrong_changes_are_named():
    with pytest.raises(ConfigError, match="v3-tiny"):
        preset("v3-huge")
    with pytest.raises(ConfigError, match="preset v3-nano: hidden = 3"):
        preset("v3-nano", hidden=3)
    with pytest.raises(ConfigError, match="preset v3-nano: num_experts_per_tok 9"):
        preset("v3-nano", num_experts_per_tok=9)


@pytest.mark.parametrize("name,changes,message", [
    ("v3", {"attention_sinks": 4}, "attention_sinks"),
    ("v3", {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
    ("v3", {"architectures": None}, "architectures"),
    ("v3", {"scoring_func": "softmax"}, "scoring_func"),
    ("v3", {"topk_method": "greedy"}, "topk_method"),
    ("v3", {"hidden_act": "gelu"}, "hidden_act"),
    ("v3", {"attention_bias": True}, "attention_bias"),
    ("v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config lacks weight_block_size"),
    ("v3", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.quant_method 'gptq'"),
    ("v3", {"quantization_config": V3["quantization_config"] | {"weight_block_size": [64, 64]}}, "weight_block_size"),
    ("v3", {"quantization_config": V3["quantization_config"] | {"activation_scheme": "static"}}, "activation_scheme"),
    ("v3", {"quantization_config": [8]}, "quantization_config"),
    ("v3", {"rope_scaling": {"type": "yarn", "factor": 40}}, "rope_scaling of type yarn lacks original_max"),
    ("v3", {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "factor": 0}}, "rope_scaling.factor is 0"),
    ("v3", {"rope_scaling": V3["rope_scaling"] | {"mscale_all_dim": 0}}, "one of mscale and mscale_all_dim"),
    ("v3", {"rope_scaling": V3["rope_scaling"] | {"attention_factor": 1.0}}, "attention_factor"),
    ("v3", {"rope_scaling": V3["rope_scaling"] | {"truncate": False}}, "truncate"),
    ("v3", {"rope_scaling": V3["rope_scaling"] | {"attention_temperature": 2}}, "attention_temperature"),
    ("v3", {"rope_scaling": LLAMA3["rope_scaling"]}, "llama3"),
    ("v3", {"rope_interleave": False}, "rope_interleave False is not supported; true"),
    ("v3", {"moe_layer_freq": 2}, "moe_layer_freq 2"),
    ("v2", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
    ("v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
    ("v2", {"norm_topk_prob": True}, "norm_topk_prob true"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling .* of type 'dynamic'"),
    ("llama", {"rope_scaling": {"type": ["yarn"], "factor": 2.0}}, "of type .'yarn'. is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
    ("llama3", {"rope_scaling": LLAMA3["rope_scaling"] | {"high_freq_factor": 1.0}}, "high_freq_factor 1.0 must be over"),
    ("distill", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("llama", {"n_routed_experts": 8, "num_experts_per_tok": 2}, "n_routed_experts"),
    ("llama", {"head_dim": 63}, "head_dim 63"),
    ("v3", {"n_routed_experts": 250}, "n_routed_experts 250"),
    ("v3", {"topk_group": 9}, "topk_group 9"),
    ("v3", {"num_experts_per_tok": 129}, "num_experts_per_tok 129"),
    ("v3", {"n_group": 256}, "topk_group|two experts|num_experts_per_tok"),
    ("v3", {"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
    ("v3", {"hidden_size": -1}, "hidden_size is -1"),
    ("v3", {"hidden_size": "wide"}, "hidden_size"),
    ("distill", {"use_sliding_window": True}, "use_sliding_window"),
    ("distill", {"use_mrope": True}, "use_mrope"),
    ("distill", {"num_key_value_heads": 5}, "num_key_value_heads 5"),
    ("distill", {"hidden_size": 1537}, "hidden_size 1537"),
    ("llama", {"attention_bias": True}, "attention_bias"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling"),
])
def test_what_is_not_implemented_is_refused_by_name(name, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig.from_hf(PUBLISHED[name] | changes, "some/config.json")
    assert str(error.value).startswith("some/config.json: ")


@pytest.mark.parametrize("name", ["n_group", "topk_group", "routed_scaling_factor"])
def test_a_router_without_its_settings_is_refused(name):
    raw = next(dict(raw) for raw in PUBLISHED.values() if raw["architectures"] == ["DeepseekV3ForCausalLM"])
    raw.pop(name)
    with pytest.raises(ConfigError, match=f"{name} missing"):
        ModelConfig.from_hf(raw)


def test_rope_parameters_of_transformers_5():
    theta = random.choice([1e4, 1e6])
    raw = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling")}
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    config = ModelConfig.from_hf(raw)
    assert config.rope_theta == theta and config.rope_scaling is None


@pytest.mark.parametrize("content", ["{", "[1]", "\x00", '"text"'])
def test_files_that_are_no_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="config.json"):
        ModelConfig.load(tmp_path)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        ModelConfig.load(tmp_path)


SIMPLE = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=4)
JSON = SIMPLE | st.lists(SIMPLE, max_size=3) | st.dictionaries(st.text(max_size=4), SIMPLE | st.lists(SIMPLE), max_size=3)


@given(st.sampled_from(sorted(PUBLISHED)), st.data())
def test_any_value_of_any_field_opens_or_is_refused_clearly(name, data):
    raw = dict(PUBLISHED[name])
    raw[data.draw(st.sampled_from(sorted([*raw, "rope_parameters", "head_dim", "rope_scaling"])))] = data.draw(JSON)
    try:
        ModelConfig.from_hf(raw)
    except ConfigError as error:
        assert "\n" not in str(error).replace(repr(raw), "")
