"""Small networks far from their start, and plain ways to run them, for the tests of model, engine and training."""

import random

import torch

from jevons.config import ModelConfig, preset
from jevons.model import build_model

DENSE = dict(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=96)


def qwen2(**changes) -> ModelConfig:
    return ModelConfig(architecture="Qwen2ForCausalLM", attention_bias=True, **DENSE | changes)


def llama(**changes) -> ModelConfig:
    return ModelConfig(architecture="LlamaForCausalLM", **DENSE | dict(head_dim=16) | changes)


def nano(**changes) -> ModelConfig:
    """Every V3 feature, with widths that all differ, so that no two can be mistaken for each other."""
    return preset("v3-nano", **dict(vocab_size=48, hidden_size=40, num_attention_heads=3, q_lora_rank=20, kv_lora_rank=24,
                                    qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=16, intermediate_size=56,
                                    max_position_embeddings=128, routed_scaling_factor=1.5) | changes)


def lively(config: ModelConfig, seed: int | None = None):
    """A model whose attention, gates and logits are far from uniform: every term matters."""
    model = build_model(config, seed=random.randrange(2**31) if seed is None else seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=1.4 * parameter.shape[-1] ** -0.5)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0).add_(torch.randn_like(parameter) * 0.3)
        model.embed_tokens.weight.normal_()
        for gate in model.routers():
            gate.e_score_correction_bias.normal_(std=0.3)
    return model.eval()


def plain_hidden(model, sequences, **options):
    """`forward_train` on sequences of any lengths, each a segment of its own: output, and hidden states [L, D] of each."""
    lengths = [len(s) for s in sequences]
    out = model.forward_train(torch.tensor([i for s in sequences for i in s]), torch.cat([torch.arange(n) for n in lengths]),
                              [(1, n) for n in lengths], **options)
    return out, out.hidden_ND.split(lengths)


@torch.no_grad()
def plain_logits(model, ids):
    """Logits [L, V] of one sequence without any cache."""
    return model.logits(plain_hidden(model, [ids], mtp=False)[0].hidden_ND)


def random_ids(count, vocab=48):
    return [random.randrange(vocab) for _ in range(count)]
