"""The mixture of experts against plain Python, token by token and expert by expert.

Formulas: DeepSeek-V3 report, section 2.1.2 (gate, auxiliary-free balancing, sequence-wise balance loss of eq. 17-20).
"""

import math
import random

import pytest
import torch
from nets import lively, nano, random_ids
from torch.autograd import gradcheck

from jevons.data.packing import pack
from jevons.model.moe import ExpertBank, Gate, MoE, Routing
from jevons.numerics.fused import _Collect, _Dispatch
from jevons.train.objective import load_metrics, update_router_bias

SHAPES = [dict(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=2),
          dict(n_routed_experts=12, n_group=3, topk_group=2, num_experts_per_tok=5),
          dict(n_routed_experts=6, n_group=1, topk_group=1, num_experts_per_tok=3),
          dict(n_routed_experts=16, n_group=4, topk_group=4, num_experts_per_tok=4),
          dict(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2),
          dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1)]


def random_gate(shape, **changes):
    gate = Gate(nano(**shape, **changes))
    with torch.no_grad():
        gate.weight.normal_(std=0.3)
    gate.e_score_correction_bias.normal_(std=0.4)
    return gate


def best(values, count):
    """Indices of the largest, and how far the last of them is from the next."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    gap = values[order[count - 1]] - values[order[count]] if count < len(order) else math.inf
    return order[:count], gap


def route(x, gate):
    """One token: its experts with their weights, and the smallest gap that a choice rested on."""
    c = gate.config
    scores = [1 / (1 + math.exp(-sum(a * b for a, b in zip(x, row, strict=True)))) for row in gate.weight.tolist()]
    biased = [s + b for s, b in zip(scores, gate.e_score_correction_bias.tolist(), strict=True)]
    size = c.n_routed_experts // c.n_group
    if c.n_group > 1:
        strength = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(c.n_group)]
        groups, group_gap = best(strength, c.topk_group)
    else:
        groups, group_gap = [0], math.inf
    allowed = [biased[e] if e // size in groups else -math.inf for e in range(c.n_routed_experts)]
    chosen, gap = best(allowed, c.num_experts_per_tok)
    total = sum(scores[e] for e in chosen) if c.norm_topk_prob else 1.0
    return {e: scores[e] / total * c.routed_scaling_factor for e in chosen}, min(gap, group_gap)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("norm", [True, False])
def test_gate(shape, norm):
    gate = random_gate(shape, norm_topk_prob=norm, routed_scaling_factor=2.5)
    x = torch.randn(random.choice([1, 40]), 40)
    routing = gate(x)
    counts = torch.zeros(shape["n_routed_experts"])
    for row, experts, weights in zip(x.tolist(), routing.experts_NK.tolist(), routing.weights_NK.tolist(), strict=True):
        assert len(set(experts)) == shape["num_experts_per_tok"]
        counts[experts] += 1
        expected, gap = route(row, gate)
        if gap < 1e-5:
            continue  # rounding decides
        assert set(experts) == set(expected)
        for e, w in zip(experts, weights, strict=True):
            assert math.isclose(w, expected[e], rel_tol=1e-4)
    assert torch.equal(routing.load_E, counts) and counts.sum() == len(x) * shape["num_experts_per_tok"]


def test_the_bias_chooses_and_never_weighs():
    shape = SHAPES[2]
    gate, x = random_gate(shape), torch.randn(1, 40)
    favourite = random.randrange(6)
    gate.e_score_correction_bias.zero_()[favourite] = 10
    routing = gate(x)
    scores = (x @ gate.weight.T).sigmoid()[0]
    assert favourite in routing.experts_NK[0].tolist()
    chosen = scores[routing.experts_NK[0]]
    torch.testing.assert_close(routing.weights_NK[0], chosen / chosen.sum() * 1.5)
    gate.e_score_correction_bias[favourite] = -10
    assert favourite not in gate(x).experts_NK[0].tolist()


def test_no_expert_of_a_group_left_out_is_chosen():
    """Even where every score of the groups that remain is below those of the others once biased."""
    shape = dict(n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=4)
    gate = random_gate(shape)
    gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9, -9, -9, 8, 8, 8, 8]))
    assert sorted(gate(torch.randn(1, 40)).experts_NK[0].tolist()) == [0, 1, 2, 3]


def test_the_gate_stays_in_float32_under_autocast():
    gate, x = random_gate(SHAPES[0]), torch.randn(30, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = gate(x)
    plain = gate(x)
    assert under.weights_NK.dtype == torch.float32 and torch.equal(under.weights_NK, plain.weights_NK)


def plain_balance(scores, segments, k):
    """Mean over rows of sum_i f_i P_i; T is the row's own length."""
    n, start, losses = scores.shape[1], 0, []
    for rows, length in segments:
        for _ in range(rows):
            own = scores[start : start + length].tolist()
            start += length
            loss = 0.0
            for i in range(n):
                count = sum(i in sorted(range(n), key=lambda e: -s[e])[:k] for s in own)
                f = n / (k * length) * count
                loss += f * sum(s[i] / sum(s) for s in own) / length
            losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_balance_loss(shape):
    gate = random_gate(shape)
    segments = [(2, 3), (1, 7), (3, 1)]
    x = torch.randn(16, 40)
    loss = gate(x, segments).balance_loss
    scores = (x.double() @ gate.weight.double().T).sigmoid()
    assert math.isclose(loss.item(), plain_balance(scores, segments, shape["num_experts_per_tok"]), rel_tol=1e-4)
    assert gate(x).balance_loss == 0


def test_padding_counts_in_no_statistic():
    """Padding within rows and past the last one: load and balance loss are those of the real tokens alone."""
    gate, lengths = random_gate(SHAPES[0]), [3, 5, 1, 6]
    segments, real = [(2, 5), (2, 6)], torch.zeros(26)  # 22 tokens in rows, 4 past them
    for start, length in zip([0, 5, 10, 16], lengths, strict=True):
        real[start : start + length] = 1
    x = torch.randn(26, 40)
    padded, dense = gate(x, segments, real), gate(x[real == 1], [(1, n) for n in lengths])
    assert torch.equal(padded.load_E, dense.load_E) and padded.rows_E.sum() == 26 * 2
    torch.testing.assert_close(padded.balance_loss, dense.balance_loss)
    other = gate(x + torch.randn_like(x) * (1 - real[:, None]), segments, real)
    assert torch.equal(other.load_E, padded.load_E)
    torch.testing.assert_close(other.balance_loss, padded.balance_loss)


def test_the_load_is_exact_under_autocast():
    """Whole tokens, not rounded to the eight bits of bf16: the bias moves by the sign of their differences."""
    gate, real = random_gate(SHAPES[5]), (torch.rand(3001) < 0.9).float()
    x = torch.randn(3001, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = gate(x, None, real)
    assert routing.load_E.dtype == torch.float32
    assert torch.equal(routing.load_E, torch.bincount(routing.experts_NK[real == 1].flatten(), minlength=4).float())


def test_balance_loss_of_equal_scores_is_one():
    gate = random_gate(SHAPES[2])
    with torch.no_grad():
        gate.weight.zero_()
    assert math.isclose(gate(torch.randn(12, 40), [(3, 4)]).balance_loss.item(), 1.0, rel_tol=1e-5)


def test_the_gradient_of_the_balance_loss_goes_through_p_only():
    gate, x, k = random_gate(SHAPES[1]), torch.randn(15, 40), 5
    gate(x, [(3, 5)]).balance_loss.backward()
    w = gate.weight.detach().double().requires_grad_()
    scores = (x.double() @ w.T).sigmoid().view(3, 5, 12)
    f = torch.zeros_like(scores).scatter_(2, scores.topk(k).indices, 12 / k).mean(1)
    (f * (scores / scores.sum(-1, keepdim=True)).mean(1)).sum(-1).mean().backward()
    torch.testing.assert_close(gate.weight.grad.double(), w.grad, atol=1e-6, rtol=1e-3)


# -- experts -------------------------------------------------------------------------------------------------------------


def random_bank(experts=6, dim=16, inter=24):
    bank = ExpertBank(nano(n_routed_experts=experts, n_group=1, topk_group=1, num_experts_per_tok=1, hidden_size=dim,
                           moe_intermediate_size=inter))
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_(std=p.shape[-1] ** -0.5)
    return bank


def random_routing(n, k, experts, allowed=None):
    chosen = torch.stack([torch.tensor(random.sample(allowed or range(experts), k)) for _ in range(n)])
    weights = torch.rand(n, k).requires_grad_()
    load = torch.zeros(experts).index_add_(0, chosen.flatten(), torch.ones(n * k))
    return Routing(chosen, weights, load.long(), load, torch.zeros(()))


def naive_experts(x, routing, gate_up, down):
    """Token by token, expert by expert, in the precision of what comes in."""
    rows = []
    for token, experts, weights in zip(x, routing.experts_NK.tolist(), routing.weights_NK, strict=True):
        total = torch.zeros_like(token)
        for e, w in zip(experts, weights, strict=True):
            gate, up = (gate_up[e] @ token).chunk(2)
            total = total + w.to(token.dtype) * (down[e] @ (gate * torch.sigmoid(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("dim,inter", [(16, 24), (7, 24), (16, 5)])  # odd widths have no grouped product
@pytest.mark.parametrize("n,k,allowed", [(25, 2, None), (1, 3, None), (1, 1, None), (9, 2, [1, 4]), (5, 1, [5]), (5, 1, [0]),
                                         (40, 6, None)])
def test_experts_and_their_gradients(n, k, allowed, dim, inter):
    """Experts that get no token included: their gradient is zero, and nothing of another leaks into it."""
    bank, routing = random_bank(dim=dim, inter=inter), random_routing(n, k, 6, allowed)
    x = torch.randn(n, dim, requires_grad=True)
    out = bank(x, routing)
    exact = [t.detach().double().requires_grad_() for t in (x, bank.gate_up_proj, bank.down_proj)]
    weights = routing.weights_NK.detach().double().requires_grad_()
    expected = naive_experts(exact[0], Routing(routing.experts_NK, weights, routing.rows_E, routing.load_E, None), *exact[1:])
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)
    grad = torch.randn(n, dim)
    got = torch.autograd.grad(out, [x, bank.gate_up_proj, bank.down_proj, routing.weights_NK], grad)
    want = torch.autograd.grad(expected, [*exact, weights], grad.double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-4)
    idle = [e for e in range(6) if routing.load_E[e] == 0]
    assert all((g[idle] == 0).all() for g in got[1:3])


@pytest.mark.parametrize("dim", [16, 12])
@pytest.mark.parametrize("n,allowed", [(1, None), (37, None), (200, None), (200, [1, 4])])  # many rows: in aligned blocks
def test_experts_in_bf16(n, allowed, dim):
    bank, routing = random_bank(dim=dim), random_routing(n, 2, 6, allowed)
    x = torch.randn(n, dim)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = bank(x, routing)
    expected = naive_experts(x, routing, bank.gate_up_proj, bank.down_proj)
    assert (out.float() - expected).abs().max() < 6 * 2**-8 * expected.abs().max()
    out.float().sum().backward()
    assert bank.down_proj.grad.dtype == bank.gate_up_proj.grad.dtype == torch.float32
    naive = torch.autograd.grad(expected.sum(), [bank.gate_up_proj, bank.down_proj])
    for p, g in zip([bank.gate_up_proj, bank.down_proj], naive, strict=True):
        assert (p.grad[routing.rows_E == 0] == 0).all()
        assert (p.grad - g).abs().max() < 8 * 2**-8 * g.abs().max()


def test_the_same_gradients_bit_by_bit():
    bank, routing = random_bank(), random_routing(50, 3, 6)
    x, grad = torch.randn(50, 16, requires_grad=True), torch.randn(50, 16)
    runs = [torch.autograd.grad(bank(x, routing), [x, bank.gate_up_proj, bank.down_proj], grad) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_dispatching_and_collecting_have_exact_gradients():
    cells = torch.randperm(20)[:12]  # more cells than rows: the others stay zero
    assert gradcheck(lambda x: _Dispatch.apply(x, cells, 3, 20), torch.randn(4, 2, dtype=torch.float64, requires_grad=True))
    assert gradcheck(lambda y: _Collect.apply(y, cells), torch.randn(20, 2, dtype=torch.float64, requires_grad=True))
    x = torch.randn(4, 2)
    sent = _Dispatch.apply(x, cells, 3, 20)
    assert torch.equal(_Collect.apply(sent, cells).view(4, 3, 2), x[:, None].expand(4, 3, 2))
    assert sent.count_nonzero() == 24


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_the_whole_layer(shared):
    moe = MoE(nano(n_shared_experts=shared))
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(std=p.shape[-1] ** -0.5)
    x = torch.randn(17, 40)
    with torch.no_grad():
        y, routing = moe(x)
        expected = naive_experts(x, routing, moe.experts.gate_up_proj, moe.experts.down_proj)
        if shared:
            gate, up = (x @ moe.shared_experts.gate_up_proj.weight.T).chunk(2, dim=-1)
            assert gate.shape[1] == shared * 32
            expected = expected + (gate * gate.sigmoid() * up) @ moe.shared_experts.down_proj.weight.T
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
        alone = torch.cat([moe(row[None])[0] for row in x])  # a token's output does not depend on the others
        torch.testing.assert_close(y, alone, atol=1e-5, rtol=1e-4)


def test_the_gate_learns_through_its_weights():
    moe = MoE(nano())
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(std=p.shape[-1] ** -0.5)
    moe(torch.randn(9, 40))[0].sum().backward()
    assert moe.gate.weight.grad.abs().max() > 0


# -- balancing -----------------------------------------------------------------------------------------------------------


def train_once(model):
    batch = pack([(random_ids(n), [1.0] * n) for n in (20, 9, 31)], 0)
    return model.forward_train(batch.tokens_N, batch.positions_N, batch.segments)


def test_every_router_moves_towards_balance():
    model = lively(nano(num_hidden_layers=3))
    out = train_once(model)
    assert out.load_RE.shape == (3, 8) and (out.load_RE.sum(1) == out.load_RE.sum(1)[0]).all()
    before = [g.e_score_correction_bias.clone() for g in model.routers()]
    update_router_bias(model, out.load_RE, 0.25)
    for gate, old, load in zip(model.routers(), before, out.load_RE, strict=True):
        mean = load.sum().item() / 8
        expected = [old[e].item() + (0.25 if load[e] < mean else -0.25 if load[e] > mean else 0.0) for e in range(8)]
        torch.testing.assert_close(gate.e_score_correction_bias, torch.tensor(expected))
    assert model.mtp[0].mlp.gate is model.routers()[-1]
    assert not torch.equal(model.routers()[-1].e_score_correction_bias, before[-1])


def test_loads_are_those_of_their_own_router():
    """Row r of the load belongs to routers()[r]: a bias that draws every token to one expert of one layer shows there."""
    model = lively(nano(num_hidden_layers=3))
    for index, gate in enumerate(model.routers()):
        gate.e_score_correction_bias[1] += 100
        load = train_once(model).load_RE
        assert load[index, 1] == load[index].sum() / 2  # two experts a token
        gate.e_score_correction_bias[1] -= 100


def test_speed_zero_freezes_the_bias():
    model = lively(nano())
    before = [g.e_score_correction_bias.clone() for g in model.routers()]
    update_router_bias(model, train_once(model).load_RE, 0.0)
    assert all(torch.equal(a, g.e_score_correction_bias) for a, g in zip(before, model.routers(), strict=True))


def test_balancing_without_the_mtp_module():
    """`mtp=False` gives no load for the last router; its bias stays."""
    model = lively(nano())
    ids = random_ids(30)
    out = model.forward_train(torch.tensor(ids), torch.arange(30), [(1, 30)], mtp=False)
    before = [g.e_score_correction_bias.clone() for g in model.routers()]
    update_router_bias(model, out.load_RE, 0.1)
    assert torch.equal(before[-1], model.routers()[-1].e_score_correction_bias)
    assert not torch.equal(before[0], model.routers()[0].e_score_correction_bias)


def test_balancing_evens_a_skewed_load():
    gate, x = random_gate(SHAPES[2]), torch.randn(200, 40)
    gate.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, 6))

    class Holder:
        def routers(self):
            return [gate]

    def worst():
        return load_metrics(gate(x).load_E[None])["max_violation"]

    first = worst()
    for _ in range(100):
        update_router_bias(Holder(), gate(x).load_E[None], 0.01)
    assert worst() < 0.15 < first


def test_load_metrics():
    load = torch.tensor([[3.0, 1, 0, 4], [2, 2, 2, 2]])
    assert load_metrics(load) == {"expert_load": [[0.375, 0.125, 0.0, 0.5], [0.25] * 4], "max_violation": 1.0,
                                  "violation": [1.0, 0.0]}
    assert load_metrics(None) == {}
