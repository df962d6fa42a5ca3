"""What was published, recomputed: shapes against `transformers` on the meta device, the table of docs/plan.md row by row."""

import random
from pathlib import Path

import pytest
import torch

from jevons.config import MODEL_TYPES
from jevons.plan.counts import Shape, census, count_parameters
from jevons.plan.reproduce import figures, markdown
from jevons.published import CONFIGS

DOCS = Path(__file__).resolve().parent.parent / "docs/plan.md"


def on_meta(raw):
    """The model of `transformers`, without memory for its weights."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    fields = {k: v for k, v in raw.items() if k not in ("architectures", "quantization_config")}
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[MODEL_TYPES[raw["architectures"][0]]](**fields))


def one_of(raw):
    """A random smaller relative of a published model, no size of which need be a multiple of a block."""
    small = {"vocab_size": random.randint(50, 400), "hidden_size": 16 * random.randint(10, 30),
             "intermediate_size": random.randint(100, 500), "num_hidden_layers": random.randint(1, 4), "num_attention_heads": 8}
    if "kv_lora_rank" in raw:
        small |= {"moe_intermediate_size": random.randint(30, 200), "n_routed_experts": 16, "n_group": 4, "topk_group": 2,
                  "num_experts_per_tok": 2, "first_k_dense_replace": random.randint(0, 2), "num_nextn_predict_layers": 0,
                  "q_lora_rank": random.choice((None, 100)) if raw["q_lora_rank"] is None else 100, "kv_lora_rank": 200}
    else:
        small |= {"num_key_value_heads": random.choice((1, 2, 4)), "tie_word_embeddings": random.random() < 0.5}
    return raw | small


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_transformers(name):
    for raw in (CONFIGS[name], one_of(CONFIGS[name])):
        model, counted = on_meta(raw), count_parameters(Shape.from_hf(raw))
        assert counted.total == sum(p.numel() for p in model.parameters())
        assert counted.router_biases == sum(b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
        experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        kept = 1 - raw["num_experts_per_tok"] / raw["n_routed_experts"] if experts else 0
        assert counted.active == pytest.approx(counted.total - experts * kept, abs=1)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "r1-distill-qwen-7b", "r1-distill-llama-8b"])
def test_the_census_is_the_sum_over_the_tensors_of_a_model(name):
    raw = one_of(CONFIGS[name])
    model, d = on_meta(raw), raw["hidden_size"]
    fp8 = scales = other = 0
    for key, value in model.named_parameters():
        if ".experts." in key:  # stacked [E, 2I, d] and [E, d, I]; a checkpoint has three matrices an expert
            inner = raw["moe_intermediate_size"]
            shapes = [(inner, d)] * 2 if "gate_up" in key else [(d, inner)]
            shapes = shapes * raw["n_routed_experts"]
            assert sum(a * b for a, b in shapes) == value.numel()
        else:
            shapes = [tuple(value.shape)] if "proj" in key and value.ndim == 2 else []
        fp8 += sum(a * b for a, b in shapes)
        scales += sum(-(-a // 128) * -(-b // 128) for a, b in shapes)
        other += 0 if shapes else value.numel()
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    shape = Shape.from_hf(raw)
    counted = census(shape, True)
    assert (counted.f8_e4m3, counted.bf16, counted.f32) == (fp8, other, scales + biases)
    assert counted.nbytes == fp8 + 2 * other + 4 * (scales + biases)
    whole = census(shape, False)
    assert (whole.f8_e4m3, whole.bf16, whole.f32) == (0, fp8 + other, biases)


def computed(what, n=0):
    return [f.computed for f in figures() if f.what == what][n]


def test_the_figures_the_issue_asks_for():
    assert computed("V3 parameters") == 671_026_419_200
    stored = census(Shape.from_hf(CONFIGS["deepseek-v3"]), True)
    assert (stored.f8_e4m3, stored.bf16, stored.f32) == (680_571_043_840, 3_918_786_560, 41_555_600)
    assert stored.f8_e4m3 + stored.bf16 + stored.f32 == 684_531_386_000
    assert round(stored.nbytes / 1e9, 1) == 688.6
    assert (computed("V2 parameters"), computed("V2-Lite parameters")) == (235_741_434_880, 15_706_484_224)
    assert [computed(f"{m} cache, bytes/token") for m in ("V3", "V2", "V2-Lite")] == [70_272, 69_120, 31_104]
    assert round(computed("V3 training, GFLOP/token"), 1) == 250.5
    assert computed("V3 pre-training, GPU hours") == 2664e3
    assert computed("V3 pre-training, GPU hours", 1) == pytest.approx(2664e3, rel=0.005)
    assert round(computed("V3 pre-training, days"), 1) == 54.2 and computed("V3 all training") == 5.576e6
    names = ("1f1b", "zb1p", "dualpipe", "dualpipev")
    assert [computed(f"bubble, PP8, {s}") for s in names] == [21, 7, 6, 6]
    assert [computed(f"bubble, PP16, {s}") for s in names] == [45, 15, 14, 14]
    assert (computed("R1 in all, GPU hours"), computed("R1 in all")) == (147e3, 294e3)
    assert computed("serving day, cost") == 87_072 and round(computed("serving day, margin")) == 545


@pytest.mark.parametrize("figure", figures(), ids=lambda f: f"{f.what}-{f.inputs}".replace("/", "|"))
def test_every_row_of_the_docs_is_what_is_computed_now(figure):
    assert figure.agrees
    shown = [figure.what, figure.inputs, figure.show.format(figure.published), figure.show.format(figure.computed)]
    assert f"| {' | '.join(shown)} |" in DOCS.read_text(encoding="utf-8").splitlines()


def test_the_docs_hold_no_other_rows():
    assert markdown() in DOCS.read_text(encoding="utf-8")
