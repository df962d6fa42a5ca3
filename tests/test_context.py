"""Context extension by YaRN: what a stage leaves is what `transformers` computes from its config, past the first length too."""

import math
import random

import pytest
import torch
from nets import lively, llama, nano, qwen2
from test_pipeline import CPU, Quiet
from whole_runs import metrics, write_recipe

from jevons.config import ConfigError, ModelConfig, yarn_mscale
from jevons.model import build_model
from jevons.model.layers import rotary_frequencies
from jevons.plan.fit import table_config
from jevons.reason.pipeline import Run
from jevons.recipe import load_recipe
from jevons.recipe.tables import ModelTable
from jevons.store.checkpoint import load_checkpoint, save_checkpoint


def test_v3s_constants():
    """Report section 4.3; low 10, high 23 and the scale 0.135234 follow from them."""
    first = table_config(ModelTable(preset="deepseek-v3"), 0)
    assert first.max_position_embeddings == 4096 and first.rope_scaling is None
    second = first.with_context(32_768, 40)
    third = second.with_context(131_072, 40)
    assert second == third and third.max_position_embeddings == 163_840
    assert third.to_hf()["rope_scaling"] == {
        "type": "yarn", "rope_type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    plain, (stretched, magnitude) = rotary_frequencies(first)[0], rotary_frequencies(third)
    ratio = plain / stretched
    assert magnitude == 1.0, "the temperature is in the softmax"
    assert third.softmax_scale == pytest.approx(0.135234, abs=1e-6) and yarn_mscale(40) == pytest.approx(0.1 * math.log(40) + 1)
    assert (ratio[:11] == 1).all() and ratio[11] > 1 and ratio[22] < 40
    torch.testing.assert_close(ratio[23:], torch.full_like(ratio[23:], 40.0))


@pytest.mark.parametrize("make,kind", [(nano, "DeepseekV3ForCausalLM"), (qwen2, "Qwen2ForCausalLM"), (llama, "LlamaForCausalLM")])
def test_logits_past_the_first_length_are_those_of_transformers(tmp_path, make, kind):
    transformers = pytest.importorskip("transformers")
    factor, length = random.choice([2.0, 4.0, 7.5]), random.choice([16, 24])
    before = lively(make(max_position_embeddings=length))
    config = before.config.with_context(2 * length, factor)
    model = build_model(config)
    model.load_state_dict(before.state_dict())
    save_checkpoint(tmp_path, model, None, {})
    theirs = getattr(transformers, kind).from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(48, (2, config.max_position_embeddings))
    with torch.no_grad():
        out = model.forward_train(tokens.flatten(), torch.arange(tokens.shape[1]).repeat(2), [tuple(tokens.shape)], mtp=False)
        ours, expected = model.logits(out.hidden_ND).view(*tokens.shape, -1), theirs(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)
    assert ModelConfig.load(tmp_path) == config
    with torch.no_grad():  # the scaling does matter there
        plain = build_model(before.config.with_context(config.max_position_embeddings))
        plain.load_state_dict(before.state_dict())
        other = plain.forward_train(tokens.flatten(), torch.arange(tokens.shape[1]).repeat(2), [tuple(tokens.shape)], mtp=False)
    assert (plain.logits(other.hidden_ND).view_as(expected) - expected).abs().max() > 0.01


@pytest.mark.parametrize("config,arguments,message", [
    (nano(), (300, 2), r"context 300 is past 128 x yarn_factor 2 = 256"),
    (nano().with_context(200, 2), (300,), "context 300 is past the 256 positions of this model's rope_scaling; give yarn_"),
    (llama(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32}), (200, 4), "rope_scaling of type llama3 cannot become YaRN"),
])
def test_what_cannot_be_reached_is_said(config, arguments, message):
    with pytest.raises(ConfigError, match=message):
        config.with_context(*arguments)


def test_a_longer_context_without_yarn_and_a_further_stretch():
    assert nano().with_context(500) == nano(max_position_embeddings=500)
    once = nano().with_context(200, 2)
    again = once.with_context(500, 4)
    assert again.max_position_embeddings == 512 and again.rope_scaling["original_max_position_embeddings"] == 128
    assert once.with_context(100) is once


def test_two_stages_of_a_recipe(tmp_path):
    """Each stage's checkpoint says how far it reaches; a run that goes on from a stage's directory ends the same."""
    text = """
name = "long"
[model]
preset = "v3-nano"
set = { max_position_embeddings = 64 }
[task]
name = "own_tasks.py:Traced"
[tokenizer]
vocab_size = 288
samples = 60
[[stages]]
kind = "pretrain"
tokens = 600
batch_tokens = 300
[[stages]]
name = "longer"
kind = "pretrain"
tokens = 600
batch_tokens = 300
context = 128
yarn_factor = 8
[[stages]]
name = "longest"
kind = "pretrain"
tokens = 600
batch_tokens = 300
context = 512
yarn_factor = 8
"""
    recipe, text = load_recipe(str(write_recipe(tmp_path, text)))
    Run(recipe, text, tmp_path / "whole", Quiet(), CPU).execute()
    for stage in ("pretrain", "longer", "longest"):  # a process of its own for each
        Run(recipe, text, tmp_path / "parts", Quiet(), CPU).execute(stage)
    Run(recipe, text, tmp_path / "parts", Quiet(), CPU).execute()
    configs = [ModelConfig.load(tmp_path / f"whole/stages/{name}") for name in ("00-pretrain", "01-longer", "02-longest")]
    assert [c.max_position_embeddings for c in configs] == [64, 512, 512]
    assert configs[0].rope_scaling is None and configs[1] == configs[2]
    a, b = (load_checkpoint(tmp_path / where / "final").model for where in ("whole", "parts"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    losses = [[x["loss"] for x in metrics(tmp_path / where) if x["kind"] == "step"] for where in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
