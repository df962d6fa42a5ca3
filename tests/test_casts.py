"""Products with weights that are cast once a step: against float64, and a whole model's gradients against autocast's."""

import random

import pytest
import torch
from nets import lively, llama, nano, random_ids
from torch import nn

from jevons.numerics import casts, grouped_linear, linear
from jevons.numerics.native import library

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler: autocast's own casts are what runs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [0, 3])
def test_products(experts, dtype):
    n, wide, narrow = random.randint(1, 50), 8 * random.randint(1, 9), 8 * random.randint(1, 9)
    weight = nn.Parameter(torch.randn(*([experts] if experts else []), narrow, wide))
    x = torch.randn(n, wide, dtype=dtype, requires_grad=True)
    sizes = torch.bincount(torch.randint(0, max(experts, 1), (n,)), minlength=max(experts, 1))
    ends = sizes.cumsum(0).to(torch.int32)
    kept_of = casts.Casts(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), casts.micro_batch(kept_of) as kept:
        out = grouped_linear(x, weight, ends) if experts else linear(x, weight)
    grad = torch.randn(n, narrow).bfloat16()
    (dx,) = torch.autograd.grad(out, x, grad)
    doubles = [x.detach().bfloat16().double().requires_grad_(), weight.detach().bfloat16().double().requires_grad_()]
    parts = doubles[0].split(sizes.tolist())
    want = torch.cat([part @ w.t() for part, w in zip(parts, doubles[1] if experts else [doubles[1]], strict=True)])
    exact = torch.autograd.grad(want, doubles, grad.double())
    assert out.dtype == torch.bfloat16 and dx.dtype == dtype and kept_of.of(weight) is kept_of.of(weight)
    for mine, theirs in zip((out, dx, kept.grads[weight]), (want, *exact), strict=True):
        assert mine.shape == theirs.shape
        assert float((mine.double() - theirs).detach().abs().max()) <= 8e-3 * float(theirs.detach().abs().max().clamp(min=1))


@pytest.mark.parametrize("config", [nano(), llama(tie_word_embeddings=True)], ids=["v3", "tied"])
def test_gradients_of_two_micro_batches(config):
    model, ids = lively(config), random_ids(24)
    parameters = list(model.parameters())

    def gradients(kept_of):
        totals = [None] * len(parameters)
        for part in torch.tensor(ids).chunk(2):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), casts.micro_batch(kept_of) as kept:
                hidden = model.forward_train(part, torch.arange(len(part)), [(1, len(part))], mtp=False).hidden_ND
                loss = model.logits(hidden).float().logsumexp(-1).sum()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            found = found if kept is None else list(map(kept.beside, parameters, found))
            totals = [t if g is None else casts.accumulate(t, g) for t, g in zip(totals, found, strict=True)]
        return totals

    kept_of = casts.Casts(torch.bfloat16)
    for mine, theirs in zip(gradients(kept_of), gradients(None), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine, theirs, atol=2e-2 * float(theirs.abs().max()), rtol=0)
