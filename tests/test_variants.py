"""Every published variant against `transformers` on the same random weights: prefill and decode through the paged cache
(absorbed attention), the expanded training forward, past YaRN's original length, and 64 greedy tokens."""

import random

import pytest
import torch
from test_config import PUBLISHED

from jevons.config import ModelConfig
from jevons.engine.engine import Engine
from jevons.engine.types import Request, SamplingParams
from jevons.model import KVCache, build_meta, build_model
from jevons.plan import count_parameters, kv_bytes_per_token
from jevons.store.checkpoint import load_checkpoint

transformers = pytest.importorskip("transformers")

# The range makes logits of deviation 1, where float32 itself costs 1e-5; at 0.25 it costs up to 1.3e-4, past the bound of 1e-4.
SHAPE = dict(vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=256, initializer_range=0.15)
MLA = SHAPE | dict(num_key_value_heads=4, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, q_lora_rank=20,
                   moe_intermediate_size=20, n_routed_experts=16, n_shared_experts=2, num_experts_per_tok=4,
                   first_k_dense_replace=1, n_group=4, topk_group=2, num_nextn_predict_layers=0)
GQA = SHAPE | dict(num_key_value_heads=2)
YARN = dict(type="yarn", factor=8, original_max_position_embeddings=32, beta_fast=32, beta_slow=1)
V3_YARN, V2_YARN = (YARN | dict(mscale=m, mscale_all_dim=m) for m in (1.0, 0.707))
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
V2 = MLA | dict(topk_method="group_limited_greedy", routed_scaling_factor=4.0, norm_topk_prob=False)
VARIANTS = {
    "v3": ("DeepseekV3", MLA | dict(rope_scaling=V3_YARN)),
    "v3-unequal-mscales": ("DeepseekV3", MLA | dict(rope_scaling=YARN | dict(mscale=0.7, mscale_all_dim=1.2))),
    "v3-yarn-bare": ("DeepseekV3", MLA | dict(rope_scaling=YARN, n_group=1, topk_group=1, norm_topk_prob=False)),
    "v2": ("DeepseekV2", V2 | dict(rope_scaling=V2_YARN)),
    "v2-lite": ("DeepseekV2", V2 | dict(rope_scaling=V2_YARN, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1)),
    "qwen2": ("Qwen2", GQA | dict(rope_theta=1e6)),
    "qwen2-tied": ("Qwen2", GQA | dict(tie_word_embeddings=True)),
    "qwen2-yarn": ("Qwen2", GQA | dict(rope_scaling=YARN)),
    "llama": ("Llama", GQA | dict(rms_norm_eps=1e-5)),
    "llama3": ("Llama", GQA | dict(rope_scaling=LLAMA3, rope_theta=5e5, head_dim=16)),
    "llama3-tied": ("Llama", GQA | dict(rope_scaling=LLAMA3, tie_word_embeddings=True)),
}


def reference(name):
    family, values = VARIANTS[name]
    config = getattr(transformers, f"{family}Config")(**values)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("bias"):
                tensor.normal_(std=0.3)
            elif "norm" in key:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours, loaded from what it saved)."""
    torch.manual_seed(random.SystemRandom().randrange(2**31))
    theirs, directory = reference(request.param), tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    return theirs, load_checkpoint(directory, need_tokenizer=False).model


@torch.no_grad()
def test_logits_of_every_path(pair):
    """Prefill and token-by-token decode through the cache, and the expanded rows, past the original 32 positions."""
    theirs, ours = pair
    length, prefix = 120, random.randint(1, 60)
    ids = torch.randint(96, (1, length))
    expected = theirs(ids).logits[0]
    assert expected.std() > 0.5
    cache, table = KVCache(ours.config, 16, 8), torch.arange(16)[None]
    meta = build_meta(table, [0], [prefix], 8)
    cached = [ours.logits(ours(ids[0, :prefix], meta.positions_N, cache, meta))]
    for at in range(prefix, length):
        meta = build_meta(table, [at], None, 8)
        cached.append(ours.logits(ours(ids[0, at : at + 1], meta.positions_N, cache, meta)))
    out = ours.forward_train(ids[0], torch.arange(length), [(1, length)])
    for got in (torch.cat(cached), ours.logits(out.hidden_ND)):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_continuation_of_64_tokens(pair):
    theirs, ours = pair
    prompts = [torch.randint(96, (n,)).tolist() for n in (5, 40)]
    engine = Engine(ours, eos_id=-1, max_batch=2, max_len=128)
    answers = engine.generate([Request(p, SamplingParams(64, 0.0)) for p in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        # their logits along our tokens: every choice must be theirs, but where their two best are within 1e-3
        logits = theirs(torch.tensor([prompt + answer.token_ids])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2, dim=-1)
        clear = best.values[:, 0] - best.values[:, 1] > 1e-3
        assert len(answer.token_ids) == 64 and clear.float().mean() > 0.9
        assert (best.indices[:, 0] == torch.tensor(answer.token_ids))[clear].all()


@pytest.mark.parametrize("name", ["v3", "v2", "llama3", "qwen2-yarn"])
def test_what_we_write_transformers_opens(name, tmp_path):
    """The config we write, rope scaling and gate included, means the same to `transformers`."""
    from jevons.store.checkpoint import save_checkpoint

    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "a")
    save_checkpoint(tmp_path / "b", load_checkpoint(tmp_path / "a", need_tokenizer=False).model, None, {})
    again, info = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True, dtype=torch.float32)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.randint(96, (1, 80))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


def test_published_sizes():
    v3, v2, lite = (ModelConfig.from_hf(PUBLISHED[name]) for name in ("v3", "v2", "v2-lite"))
    assert [count_parameters(c).total for c in (v2, lite)] == [235_741_434_880, 15_706_484_224]
    assert [kv_bytes_per_token(c) for c in (v3, v2, lite)] == [70_272, 69_120, 31_104]
    assert v3.softmax_scale == pytest.approx(0.135234, abs=1e-6)  # 192^-0.5 (0.1 ln 40 + 1)^2
    assert lite.softmax_scale == pytest.approx(192**-0.5 * 1.2608**2, rel=1e-4)


def test_yarn_of_v3_keeps_the_fast_pairs_and_divides_the_slow():
    """Facts section 1.2: low 10, high 23 of 32 pairs, factor 40."""
    from jevons.model.layers import rotary_frequencies

    config = ModelConfig.from_hf(PUBLISHED["v3"])
    stretched, magnitude = rotary_frequencies(config)
    ratio = rotary_frequencies(config.model_copy(update={"rope_scaling": None}))[0] / stretched
    assert magnitude == 1.0
    torch.testing.assert_close(ratio[:11], torch.ones(11, dtype=torch.float64))
    torch.testing.assert_close(ratio[23:], torch.full((9,), 40.0, dtype=torch.float64))
    assert (ratio.diff() > -1e-9).all() and 1 < ratio[11] < ratio[22] < 40


def test_training_runs_on_a_v2_gate():
    """Gradients reach the gate through the weights; its balance loss is the softmax's own share."""
    from transformers import DeepseekV2Config

    raw = DeepseekV2Config(**VARIANTS["v2"][1]).to_dict() | {"architectures": ["DeepseekV2ForCausalLM"]}
    model = build_model(ModelConfig.from_hf(raw), seed=1)
    out = model.forward_train(torch.randint(96, (24,)), torch.arange(12).repeat(2), [(2, 12)])
    (model.logits(out.hidden_ND).square().mean() + out.balance_loss).backward()
    assert all(gate.weight.grad.abs().max() > 0 for gate in model.routers())
    assert "model.layers.1.mlp.gate.e_score_correction_bias" not in model.hf_state_dict()
