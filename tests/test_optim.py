"""Muon against torch's own, matrix by matrix; which parameter gets which optimizer; schedules; resuming bit by bit."""

import math
import random

import pytest
import torch
from nets import lively, nano, qwen2, random_ids

from jevons.data.packing import pack
from jevons.recipe import OptimizerTable
from jevons.train.objective import mtp_loss, token_losses
from jevons.train.optim import (
    Muon,
    build_optimizers,
    load_optimizer_tensors,
    optimizer_tensors,
    orthogonalise,
)
from jevons.train.schedule import lr_factor

SHAPES = [(8, 8), (24, 8), (8, 24), (40, 16), (1, 12), (12, 1)]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def moves(make_optimizer, start, gradients):
    """What every step adds to each of the parameters: [step][parameter]."""
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer, out = make_optimizer(params), []
    for step in gradients:
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        out.append([p.detach() - b for p, b in zip(params, before, strict=True)])
    return out


def random_gradients(shapes, steps=4):
    return [[torch.randn(s) * 10 ** random.uniform(-4, 2) for s in shapes] for _ in range(steps)]


def test_muon_is_torchs():
    """Newton-Schulz runs in bf16 in both, whose roundings differ a little: 2 % of an update."""
    settings = dict(lr=random.uniform(0.001, 0.1), momentum=random.uniform(0.8, 0.97), weight_decay=random.uniform(0, 0.3))
    start, gradients = [torch.randn(s) for s in SHAPES], random_gradients(SHAPES)
    ours = moves(lambda params: Muon(params, [[p.shape[0]] for p in params], **settings), start, gradients)
    theirs = moves(lambda params: torch.optim.Muon(params, nesterov=True, **settings), start, gradients)
    for step_ours, step_theirs in zip(ours, theirs, strict=True):
        for a, b in zip(step_ours, step_theirs, strict=True):
            assert relative(a, b) < 0.02, a.shape


def test_stacked_experts_are_matrices_of_their_own():
    shapes, settings = [(5, 12, 20), (5, 20, 6)], dict(lr=0.05, momentum=0.9, weight_decay=0.1)
    start, gradients = [torch.randn(s) for s in shapes], random_gradients(shapes)
    for step in gradients:
        step[0][2] *= 1e3  # an expert with large gradients must not drown the others
    stacked = moves(lambda params: Muon(params, [[p.shape[1]] for p in params], **settings), start, gradients)
    alone = moves(lambda params: Muon(params, [[p.shape[0]] for p in params], **settings),
                  [m for p in start for m in p], [[m for g in step for m in g] for step in gradients])
    for a, b in zip(stacked, alone, strict=True):
        for x, y in zip([m for p in a for m in p], b, strict=True):
            assert relative(x, y) < 0.02


@pytest.mark.parametrize("experts", [None, 3])
def test_fused_parts_are_matrices_of_their_own(experts):
    parts, columns, settings = [10, 24, 10, 6], 16, dict(lr=0.05, momentum=0.9, weight_decay=0.1)
    shape = (sum(parts), columns) if experts is None else (experts, sum(parts), columns)
    start, gradients = torch.randn(shape), random_gradients([shape])
    for step in gradients:
        step[0][..., :10, :] *= 1e3
    fused = moves(lambda params: Muon(params, [parts], **settings), [start], gradients)
    apart = moves(lambda params: Muon(params, [[p.shape[-2]] for p in params], **settings),
                  [t.clone() for t in start.split(parts, dim=-2)], [step[0].split(parts, dim=-2) for step in gradients])
    for (whole,), pieces in zip(fused, apart, strict=True):
        for x, y in zip(whole.split(parts, dim=-2), pieces, strict=True):
            assert relative(x, y) < 0.02
    first = fused[0][0] + settings["lr"] * settings["weight_decay"] * start
    for piece in first.split(parts, dim=-2):  # a wide part's update has singular values of about lr, a tall one's more
        values = torch.linalg.svdvals(piece) / (0.05 * math.sqrt(max(1, piece.shape[-2] / columns)))
        assert values.max() < 1.3 and values.median() > 0.6


def test_orthogonalise():
    """U S V^T becomes nearly U V^T, whatever the scale."""
    for shape in [(3, 16, 16), (2, 30, 12), (4, 12, 30)]:
        g = torch.randn(shape)
        for scale in (1e-6, 1.0, 1e5):
            o = orthogonalise(g * scale).float()
            u, s, v = torch.linalg.svd(g, full_matrices=False)
            inside = torch.einsum("bmi,bmn,bin->bi", u, o, v)  # singular values along the old directions
            strong = s > 0.1 * s.max()
            assert ((inside > 0.55) & (inside < 1.3))[strong].all()
    assert (orthogonalise(torch.zeros(2, 4, 6)) == 0).all()


def test_an_expert_without_gradient_only_decays():
    p = torch.nn.Parameter(torch.randn(3, 8, 6))
    start, optimizer = p.detach().clone(), Muon([p], [[8]], lr=0.1, weight_decay=0.2)
    p.grad = torch.randn(3, 8, 6)
    p.grad[1] = 0
    optimizer.step()
    torch.testing.assert_close(p[1].detach(), start[1] * (1 - 0.1 * 0.2))
    assert p.isfinite().all() and not torch.allclose(p[0], start[0] * 0.98)


def test_parameters_without_gradients_stay():
    a, b = (torch.nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    start, optimizer = b.detach().clone(), Muon([a, b], [[4], [4]])
    a.grad = torch.randn(4, 4)
    optimizer.step()
    assert torch.equal(b, start) and b not in optimizer.state


# -- who gets what -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [nano(), qwen2(tie_word_embeddings=True), qwen2()], ids=["v3", "tied", "qwen2"])
@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_every_parameter_has_one_optimizer(config, matrices):
    model = lively(config)
    table = OptimizerTable(matrices=matrices, lr=0.003, matrix_lr=0.02, weight_decay=0.07, betas=(0.8, 0.9))
    optimizers = build_optimizers(model, table)
    assert [type(o).__name__ for o in optimizers] == ["AdamW", "Muon"][: 1 + (matrices == "muon")]
    place = {p: (i, group) for i, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    assert len(place) == sum(len(g["params"]) for o in optimizers for g in o.param_groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        index, group = place[p]
        hidden = p.dim() >= 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"))
        assert index == int(matrices == "muon" and hidden), name
        assert group["lr"] == group["base_lr"] == (0.02 if index else 0.003)
        assert group["weight_decay"] == (0.07 if p.dim() >= 2 else 0.0), name
        if not index:
            assert tuple(group["betas"]) == (0.8, 0.9)


def plain_factor(step, steps, warmup, schedule, final):
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return {"constant": 1.0, "linear": 1 - done * (1 - final),
            "cosine": final + (1 - final) * (1 + math.cos(math.pi * done)) / 2}[schedule]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule(schedule):
    steps, warmup, final = random.randint(20, 60), random.choice([0, 1, 7]), random.choice([0.0, 0.1])
    table = OptimizerTable(schedule=schedule, warmup_steps=warmup, final_lr_fraction=final)
    factors = [lr_factor(step, steps, table) for step in range(steps)]
    for step, factor in enumerate(factors):
        assert math.isclose(factor, plain_factor(step, steps, warmup, schedule, final), abs_tol=1e-12)
    assert max(factors) == 1.0 and min(factors) > 0
    assert factors[:warmup] == sorted(factors[:warmup]) and factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_a_warmup_longer_than_the_run():
    table = OptimizerTable(warmup_steps=10)
    assert [lr_factor(i, 3, table) for i in range(3)] == [0.1, 0.2, 0.3]


# -- resuming ------------------------------------------------------------------------------------------------------------


def train(model, optimizers, batches, first=0):
    for step, batch in enumerate(batches, first):
        out = model.forward_train(batch.tokens_N, batch.positions_N, batch.segments)
        loss = token_losses(model, out.hidden_ND, batch.targets_N, batch.weights_N) / batch.weights_N.sum()
        (loss + (0.3 * mtp_loss(model, out, batch) if model.mtp else 0) + 0.001 * out.balance_loss).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * (1 - step / 20)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return loss.item()


@pytest.mark.parametrize("config", [nano(), qwen2(tie_word_embeddings=True)], ids=["v3", "tied"])
@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_the_state_carries_on_bit_by_bit(config, matrices):
    table, seed = OptimizerTable(matrices=matrices), random.randrange(2**31)
    batches = [pack([(random_ids(n), [1.0] * n) for n in (9, 17, 4)], 0) for _ in range(6)]
    model = lively(config, seed)
    optimizers = build_optimizers(model, table)
    train(model, optimizers, batches[:3])
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {n: t.detach().clone() for n, t in optimizer_tensors(model, optimizers).items()}
    assert all(isinstance(t, torch.Tensor) for t in state.values()) and len(state) == len(set(state))
    loss = train(model, optimizers, batches[3:], 3)
    again = lively(config, seed + 1)
    with torch.no_grad():
        for name, p in again.named_parameters():
            p.copy_(weights[name])
        for new, old in zip(again.routers(), model.routers(), strict=True):
            new.e_score_correction_bias.copy_(old.e_score_correction_bias)
    others = build_optimizers(again, table)
    load_optimizer_tensors(again, others, {"model.embed_tokens.weight": torch.zeros(1)} | state)
    assert {n: t.shape for n, t in optimizer_tensors(again, others).items()} == {n: t.shape for n, t in state.items()}
    assert train(again, others, batches[3:], 3) == loss
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_training_brings_the_loss_down():
    for matrices in ("muon", "adamw"):
        model = lively(nano())
        batch = pack([(random_ids(n), [1.0] * n) for n in (30, 25)], 0)
        optimizers = build_optimizers(model, OptimizerTable(matrices=matrices))
        assert train(model, optimizers, [batch] * 12) < 0.8 * train(lively(nano()), [], [batch])


@pytest.mark.parametrize("name", ["optimizer.0.no.such.weight.exp_avg", "optimizer.7.embed_tokens.weight.exp_avg",
                                  "optimizer.1.embed_tokens.weight.momentum_buffer"])
def test_state_of_another_model_or_optimizer_is_refused(name):
    model = lively(nano())
    optimizers = build_optimizers(model, OptimizerTable(matrices="muon"))
    with pytest.raises(ValueError, match=name.split(".weight")[0]):
        load_optimizer_tensors(model, optimizers, {name: torch.zeros(1)})
