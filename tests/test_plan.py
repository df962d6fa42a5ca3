"""The planner's numbers against built models, their caches, a FLOP counter, and what the papers print."""

import random

import pytest
import torch
from nets import llama, nano, qwen2
from torch.utils.flop_counter import FlopCounterMode

from jevons.config import PRESETS, ModelConfig, preset
from jevons.model import KVCache, build_model
from jevons.plan import count_parameters, dollars, forward_flops, kv_bytes_per_token, training_flops

V3 = dict(vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
          first_k_dense_replace=3, num_attention_heads=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
          n_group=8, topk_group=4, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
          v_head_dim=128, num_nextn_predict_layers=1)
V2 = V3 | dict(vocab_size=102400, hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=60,
               first_k_dense_replace=1, n_routed_experts=160, n_shared_experts=2, num_experts_per_tok=6, topk_group=3,
               num_nextn_predict_layers=0)
V2_LITE = V2 | dict(hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
                    num_attention_heads=16, n_routed_experts=64, n_group=1, topk_group=1, q_lora_rank=None)
BUILT = {name: preset(name) for name in PRESETS} | {
    "nano": nano(), "nano without MTP": nano(num_nextn_predict_layers=0),
    "nano without low-rank queries": nano(q_lora_rank=None), "nano, all dense": nano(first_k_dense_replace=9),
    "qwen2": qwen2(), "qwen2, tied": qwen2(tie_word_embeddings=True), "llama": llama()}


@pytest.mark.parametrize("name", BUILT)
def test_parameters_are_those_of_the_built_model(name):
    config = BUILT[name]
    model, counted = build_model(config), count_parameters(config)
    mtp = sum(p.numel() for n, p in model.named_parameters() if n.startswith("mtp."))
    assert (counted.total, counted.mtp) == (sum(p.numel() for p in model.parameters()) - mtp, mtp)
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n and not n.startswith("mtp."))
    experts = sum(p.numel() for n, p in model.named_parameters()
                  if n.startswith("layers.") and (".experts." in n or ".shared_experts." in n or ".gate." in n))
    assert (counted.norms, counted.experts, counted.embedding) == (norms, experts, model.embed_tokens.weight.numel())
    routed = sum(p.numel() for n, p in model.named_parameters() if n.startswith("layers.") and ".experts." in n)
    asleep = routed * (1 - config.num_experts_per_tok / config.n_routed_experts) if routed else 0
    assert counted.active == counted.total - asleep


def test_the_published_models():
    v3, v2, lite = (count_parameters(ModelConfig(**c)) for c in (V3, V2, V2_LITE))
    # DeepSeek's code counts the 58 routers' 256 biases as parameters; here they are buffers
    assert v3.total + 58 * 256 == 671_026_419_200
    assert v2.total == 235_741_434_880 and lite.total == 15_706_484_224
    assert [round(p.active / 1e9, 2) for p in (v3, v2, lite)] == [37.55, 21.38, 2.66]
    assert round(v3.mtp / 1e9, 2) == 11.61
    assert training_flops(ModelConfig(**V3), 1, 4096, mtp=False) == pytest.approx(250.5e9, rel=1e-3)
    assert [kv_bytes_per_token(ModelConfig(**c)) for c in (V3, V2, V2_LITE)] == [70_272, 69_120, 31_104]
    assert kv_bytes_per_token(ModelConfig(**V3), mtp=True) == 70_272 + 2 * 576


def grouped_mm_flops(x_shape, w_shape, *args, out_shape=None, **kwargs):
    """Every row meets one expert."""
    return 2 * x_shape[0] * x_shape[1] * w_shape[-1]


@pytest.mark.parametrize("name", ["v3-nano", "v3-tiny", "nano", "nano without low-rank queries", "qwen2", "llama"])
@pytest.mark.parametrize("with_mtp", [False, True])
def test_flops_are_those_a_counter_sees(name, with_mtp):
    config = BUILT[name]
    model = build_model(config, seed=0)
    rows, length = random.randint(1, 4), random.randint(8, 64)
    tokens = torch.randint(0, config.vocab_size, (rows * length,))
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_mm_flops})
    with counter:  # gradients on: the native kernels, which it does not see, stay away
        out = model.forward_train(tokens, torch.arange(length).repeat(rows), [(rows, length)], mtp=with_mtp)
        model.logits(out.hidden_ND)
        if out.mtp_hidden_ND is not None:
            model.logits(out.mtp_hidden_ND)
    # short rows compute the whole square of scores, so the context is the length. Lookups, norms, rotations, softmax,
    # activations and the sorting of experts are left out by both; the planner alone counts Qwen2's biases as weights.
    planned = rows * length * forward_flops(config, length, with_mtp)
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.01 if name == "qwen2" else 1e-9)


def test_training_is_three_forwards_of_causal_rows():
    config = preset("v3-tiny")
    length = random.randint(2, 500)
    by_hand = sum(forward_flops(config, i + 1, True) for i in range(length)) * 3
    assert training_flops(config, length, length) == pytest.approx(by_hand)


@pytest.mark.parametrize("name", BUILT)
def test_cache_bytes_are_those_allocated(name):
    config = BUILT[name]
    pages, size, dtype = random.randint(1, 9), random.choice((16, 32)), random.choice((torch.float32, torch.bfloat16))
    cache = KVCache(config, pages, size, dtype=dtype)
    assert cache.nbytes == cache.data.untyped_storage().nbytes() == pages * size * kv_bytes_per_token(config, dtype.itemsize)
    if config.num_nextn_predict_layers:
        both = cache.nbytes + KVCache(config, pages, size, layers=config.num_nextn_predict_layers, dtype=dtype).nbytes
        assert both == pages * size * kv_bytes_per_token(config, dtype.itemsize, mtp=True)


def test_dollars():
    assert dollars(1800, 3.0) == 1.5 and dollars(100, 0) == 0
