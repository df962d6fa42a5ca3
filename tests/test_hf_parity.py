"""The same network as `transformers` on the same weights, in both directions: names, shapes and logits."""

import random

import pytest
import torch

from jevons.config import preset
from jevons.data.tokenizer import train_tokenizer
from jevons.model import build_model
from jevons.store.checkpoint import load_checkpoint, save_checkpoint

transformers = pytest.importorskip("transformers")
SHAPES = [(1, 1), (2, 17), (3, 40)]


def ours(model, *batches):
    """Logits of every batch [B, T], all of them segments of one call."""
    positions = torch.cat([torch.arange(t.shape[1]).repeat(t.shape[0]) for t in batches])
    with torch.no_grad():
        out = model.forward_train(torch.cat([t.flatten() for t in batches]), positions, [tuple(t.shape) for t in batches])
        logits = model.logits(out.hidden_ND).split([t.numel() for t in batches])
    return [flat.view(*t.shape, -1) for flat, t in zip(logits, batches, strict=True)]


def theirs(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def check_logits(model, reference, vocab):
    batches = [torch.randint(vocab, shape) for shape in SHAPES]
    for tokens, logits in zip(batches, ours(model, *batches), strict=True):
        expected = theirs(reference.eval(), tokens)
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["v3-nano", "v3-tiny"])
def test_transformers_opens_ours(tmp_path, name):
    config = preset(name)
    model = build_model(config, seed=random.randrange(2**31))
    with torch.no_grad():
        for parameter in model.parameters():  # far from the start, where everything is nearly zero
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for gate in model.routers():
            gate.e_score_correction_bias.normal_(std=0.2)
    save_checkpoint(tmp_path, model, train_tokenizer(["7"], config.vocab_size), {})
    loaded, info = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert all(key.startswith(f"model.layers.{config.num_hidden_layers}.") for key in info["unexpected_keys"]), info
    check_logits(model, loaded, config.vocab_size)


def check_foreign(directory, model, vocab):
    model.save_pretrained(directory)
    loaded = load_checkpoint(directory, need_tokenizer=False).model
    check_logits(loaded, model, vocab)
    return loaded


DENSE = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2)


@pytest.mark.parametrize("tied", [True, False])
def test_ours_opens_qwen2(tmp_path, tied):
    config = transformers.Qwen2Config(**DENSE, tie_word_embeddings=tied, rope_theta=random.choice([1e4, 1e6]))
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # transformers starts biases at zero and norms at one
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)  # with 1, float32 itself costs 1e-4 now and then
    loaded = check_foreign(tmp_path, model, 320)
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied
    save_checkpoint(tmp_path / "again", loaded, None, {})
    again, info = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokens = torch.randint(320, (2, 9))
    torch.testing.assert_close(theirs(again.eval(), tokens), theirs(model, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("head_dim", [16, 32])
def test_ours_opens_llama(tmp_path, head_dim):
    config = transformers.LlamaConfig(**DENSE, head_dim=head_dim, rope_theta=5e5, rms_norm_eps=1e-5)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    loaded = check_foreign(tmp_path, model, 320)
    save_checkpoint(tmp_path / "again", loaded, None, {})
    _, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


def test_ours_opens_a_deepseek_v3_that_transformers_wrote(tmp_path):
    """It writes no MTP layer; the config must say so."""
    values = preset("v3-nano", num_nextn_predict_layers=0, initializer_range=0.2).to_hf()
    config = transformers.DeepseekV3Config(**{k: v for k, v in values.items() if k not in ("architectures", "torch_dtype")})
    model = transformers.DeepseekV3ForCausalLM(config)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.normal_(std=0.2)
    check_foreign(tmp_path, model, config.vocab_size)


def test_without_low_rank_queries(tmp_path):
    """V2-Lite's shape: q_lora_rank null."""
    config = preset("v3-nano", q_lora_rank=None, routed_scaling_factor=2.5, norm_topk_prob=False)
    model = build_model(config, seed=random.randrange(2**31))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_checkpoint(tmp_path, model, None, {})
    check_logits(model, transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), config.vocab_size)
