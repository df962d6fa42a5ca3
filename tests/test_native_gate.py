"""The native choice of experts against torch's, on the same scores."""

import random

import pytest
import torch
from nets import nano

from jevons.config import ModelConfig
from jevons.model.moe import Gate
from jevons.numerics import gate as native_gate
from jevons.numerics import native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no native kernels: {native.why_not()}")


def v2(**changes) -> ModelConfig:
    return nano(architecture="DeepseekV2ForCausalLM", scoring_func="softmax", norm_topk_prob=False, **changes)


def config_of(kind: str) -> ModelConfig:
    groups = random.choice([1, 2, 4])
    experts = groups * random.randint(2, 12)
    kept = random.randint(1, groups)
    shape = dict(n_routed_experts=experts, n_group=groups, topk_group=kept, routed_scaling_factor=random.choice([1.0, 2.5]),
                 num_experts_per_tok=random.randint(1, min(8, experts // groups * kept)))
    if kind == "v3":
        return nano(**shape, norm_topk_prob=random.choice([True, False]))
    return v2(**shape, topk_method="group_limited_greedy")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_native_choice_is_torchs(kind, monkeypatch):
    for _ in range(30):
        gate = Gate(config_of(kind))
        gate.weight.normal_()
        gate.e_score_correction_bias.normal_()
        x = torch.randn(random.randint(1, 40), gate.config.hidden_size)
        native_routing = gate(x)
        monkeypatch.setattr("jevons.model.moe.choose", lambda *_: None)
        plain = gate(x)
        monkeypatch.undo()
        assert torch.equal(native_routing.experts_NK, plain.experts_NK) and torch.equal(native_routing.rows_E, plain.rows_E)
        assert torch.equal(native_routing.load_E, plain.load_E)
        torch.testing.assert_close(native_routing.weights_NK, plain.weights_NK, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_scores_that_are_not_numbers_still_choose_experts_that_exist():
    """The request they belong to fails by its own NaN; the choice must not lead outside the experts, nor change the others'."""
    for kind in ("v3", "v2"):
        gate = Gate(config_of(kind))
        gate.weight.normal_()
        x = torch.randn(6, gate.config.hidden_size)
        want = gate(x)
        x[2], x[4, 0] = float("nan"), float("inf")
        got = gate(x)
        healthy = [0, 1, 3, 5]
        assert torch.equal(got.experts_NK[healthy], want.experts_NK[healthy])
        assert torch.equal(got.weights_NK[healthy], want.weights_NK[healthy])
        assert got.weights_NK[2].isnan().all() and got.rows_E.sum() == got.experts_NK.numel()
        for row in got.experts_NK.tolist():
            assert len(set(row)) == len(row) and all(0 <= e < gate.config.n_routed_experts for e in row)


def test_with_gradients_the_choice_is_torchs(monkeypatch):
    gate = Gate(config_of("v3"))
    with torch.no_grad():
        gate.weight.normal_()
    assert native_gate.choose(torch.rand(2, 8, requires_grad=True), None, 1, 1, 2, True, 1.0) is None
    gate(torch.randn(3, gate.config.hidden_size)).weights_NK.square().sum().backward()
    assert gate.weight.grad is not None
