"""What was published, as plain data: model shapes in `config.json` fields, trainings, one day of serving. No torch here.

Shapes hold what a cost depends on; the whole configs lie beside the weights. Sources: V3 and R1 reports, DeepSeek's
"open-infra" day 6, the V2 report, and the `config.json` of each repository.
"""

from __future__ import annotations

from typing import Any

_V3 = dict(
    architectures=["DeepseekV3ForCausalLM"], vocab_size=129280, hidden_size=7168, intermediate_size=18432,
    moe_intermediate_size=2048, num_hidden_layers=61, first_k_dense_replace=3, num_attention_heads=128, n_routed_experts=256,
    n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4, q_lora_rank=1536, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_nextn_predict_layers=1, max_position_embeddings=163840,
    routed_scaling_factor=2.5,
    quantization_config=dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128], activation_scheme="dynamic"))
_V2 = {k: v for k, v in _V3.items() if k not in ("num_nextn_predict_layers", "quantization_config")} | dict(
    architectures=["DeepseekV2ForCausalLM"], vocab_size=102400, hidden_size=5120, intermediate_size=12288,
    moe_intermediate_size=1536, num_hidden_layers=60, first_k_dense_replace=1, n_routed_experts=160, n_shared_experts=2,
    num_experts_per_tok=6, topk_group=3, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False,
    routed_scaling_factor=16.0)


def _dense(architecture: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return dict(architectures=[architecture], vocab_size=vocab, hidden_size=hidden, intermediate_size=inner,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False,
                max_position_embeddings=131072)


CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-v3": _V3,
    "deepseek-r1": _V3,
    "deepseek-v2": _V2,
    "deepseek-v2-lite": _V2 | dict(
        hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27, num_attention_heads=16,
        n_routed_experts=64, n_group=1, topk_group=1, q_lora_rank=None, topk_method="greedy",
        routed_scaling_factor=1.0),
    "r1-distill-qwen-1.5b": _dense("Qwen2ForCausalLM", 1536, 8960, 28, 12, 2, 151936),
    "r1-distill-qwen-7b": _dense("Qwen2ForCausalLM", 3584, 18944, 28, 28, 4, 152064),
    "r1-distill-qwen-14b": _dense("Qwen2ForCausalLM", 5120, 13824, 48, 40, 8, 152064),
    "r1-distill-qwen-32b": _dense("Qwen2ForCausalLM", 5120, 27648, 64, 40, 8, 152064),
    "r1-distill-llama-8b": _dense("LlamaForCausalLM", 4096, 14336, 32, 32, 8, 128256),
    "r1-distill-llama-70b": _dense("LlamaForCausalLM", 8192, 28672, 80, 64, 8, 128256),
}

_V3_TRAINING: dict[str, Any] = dict(gpu="h800", gpus=2048, tokens=14.8e12, pp=16, ep=64, schedule="dualpipe",
                                    micro_batches=120)  # batch 15360 rows over 128 pipelines; V3 report 3.2, 4.2
_DISTILLED: dict[str, Any] = dict(tokens=2 * 804_745 * 5_355)  # two epochs of the 800k traces, R1 table 5
# How each model was trained; the planner's defaults. How many GPUs V2 and V2-Lite had is an assumption of ours, as are V2's
# micro-batches.
TRAININGS: dict[str, dict[str, Any]] = {
    "deepseek-v3": _V3_TRAINING, "deepseek-r1": _V3_TRAINING,
    "deepseek-v2": dict(gpu="h800", gpus=1024, tokens=8.1e12, pp=16, ep=8, schedule="zb1p", micro_batches=64),
    "deepseek-v2-lite": dict(gpu="h800", gpus=64, tokens=5.7e12, ep=8),
} | {name: _DISTILLED for name in CONFIGS if "distill" in name}

V3_HOURS = dict(per_trillion=180e3, trillions=14.8, context=119e3, post_training=5e3, dollars_per_hour=2.0, gpus=2048)
R1_RUNS = dict(zero=(512, 198), r1=(512, 80), sft_hours=5e3, zero_hours=101e3, r1_hours=41e3, dollars_per_hour=2.0)
SERVING_DAY = dict(nodes=226.75, gpus_per_node=8, dollars_per_hour=2.0, hits=342e9, misses=608e9 - 342e9, output=168e9,
                   price_hit=0.14, price_miss=0.55, price_output=2.19, revenue=562_027, mean_context=4_989,
                   decode_per_node=14.8e3)
