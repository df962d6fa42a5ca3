"""The fused steps of training against plain torch in float64: values and gradients, strides, odd widths, any thread count."""

import random

import pytest
import torch
import torch.nn.functional as F

from jevons.numerics import fused
from jevons.numerics.native import library

needs_native = pytest.mark.skipif(library() is None, reason="no compiler: torch's own way is what runs")
TOLERANCE = {torch.float32: dict(atol=2e-6, rtol=2e-5), torch.bfloat16: dict(atol=1e-2, rtol=1e-2)}
DTYPES = [torch.float32, torch.bfloat16]


def check(fast, exact, inputs, dtype):
    """`fast` on `inputs` (leaves of any dtype) against `exact` on the same numbers in float64: outputs and all gradients."""
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    out, want = fast(*inputs), exact(*doubles)
    grad = torch.randn(out.shape).to(out.dtype)
    torch.testing.assert_close(out.double(), want, **TOLERANCE[dtype])
    got = torch.autograd.grad(out, inputs, grad)
    expected = torch.autograd.grad(want, doubles, grad.double())
    for mine, theirs, given in zip(got, expected, inputs, strict=True):
        assert mine.dtype == given.dtype and mine.shape == given.shape
        scale = theirs.abs().max().clamp(min=1)  # sums over rows grow with their number
        torch.testing.assert_close(mine.double() / scale, theirs / scale, **TOLERANCE[dtype])


def leaf(*shape, dtype=torch.float32):
    """Random numbers, some rows far larger than others, in a view whose rows do not touch."""
    wide = torch.randn(*shape[:-1], shape[-1] + random.choice([0, 3])).mul_(torch.rand(*shape[:-1], 1) * 4)
    return wide.to(dtype)[..., : shape[-1]].detach().requires_grad_()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (65, 40), (2, 70, 33), (200, 128)])
def test_rms_norm(shape, dtype):
    x, weight = leaf(*shape, dtype=dtype), torch.randn(shape[-1]).requires_grad_()
    check(lambda x, w: fused.rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), [x, weight], dtype)


@needs_native
def test_a_norm_may_round_its_output_alone():
    x, weight = leaf(37, 48), torch.randn(48).requires_grad_()
    wide, narrow = fused.rms_norm(x, weight, 1e-6), fused.rms_norm(x, weight, 1e-6, torch.bfloat16)
    assert torch.equal(narrow, wide.bfloat16())
    grad = torch.randn(37, 48).bfloat16()
    for a, b in zip(*(torch.autograd.grad(y, [x, weight], grad.to(y.dtype)) for y in (narrow, wide)), strict=True):
        assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (65, 40), (200, 128)])
def test_add_norm(shape, dtype):
    """Both results at once, so that the gradients of both meet."""
    def exact(x, more, w):
        return torch.cat([x + more, F.rms_norm(x + more, w.shape, w, 1e-6)], 1)

    x, more = torch.randn(shape).requires_grad_(), leaf(*shape, dtype=dtype)
    inputs = [x, more, torch.randn(shape[1]).requires_grad_()]
    check(lambda *t: torch.cat(fused.add_norm(*t, 1e-6), 1), exact, inputs, dtype)
    total, out = fused.add_norm(*inputs, 1e-6, torch.bfloat16)
    assert torch.equal(total, x + more) and torch.equal(out, fused.rms_norm(total, inputs[2], 1e-6, torch.bfloat16))
    check(fused.add, lambda a, b: a + b, [x, more], dtype)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 2 * 17), (130, 2 * 64), (2, 3, 2 * 40)])
def test_swiglu(shape, dtype):
    def exact(h):
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    check(fused.swiglu, exact, [leaf(*shape, dtype=dtype)], dtype)


@needs_native
def test_swiglu_at_its_ends():
    gate = torch.tensor([[-200.0, -88.0, -30.0, 0.0, 30.0, 88.0, 200.0, 3e38]]).requires_grad_()
    h = torch.cat([gate, torch.ones_like(gate)], 1)
    out = fused.swiglu(h)
    torch.testing.assert_close(out, F.silu(gate.detach()))
    (grad,) = torch.autograd.grad(out.sum(), gate)
    assert torch.isfinite(grad).all()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,vocab", [(1, 1), (7, 15), (33, 65), (90, 512)])
def test_cross_entropy(rows, vocab, dtype):
    targets = torch.randint(vocab, (rows,))
    check(lambda x: fused.cross_entropy(x, targets), lambda x: F.cross_entropy(x, targets, reduction="none"),
          [leaf(rows, vocab, dtype=dtype)], torch.float32 if dtype == torch.float32 else dtype)


@needs_native
def test_cross_entropy_takes_what_torch_takes():
    logits, targets = torch.tensor([[3e4, -3e4, 0.0] * 7, [-torch.inf, 1.0, 2.0] * 7]), torch.tensor([1, 2])
    torch.testing.assert_close(fused.cross_entropy(logits, targets), F.cross_entropy(logits, targets, reduction="none"))
    for bad in (torch.nan, torch.inf):  # a run must see that its numbers are gone
        for place in (0, 20):
            broken = torch.randn(2, 21)
            broken[1, place] = bad
            losses = fused.cross_entropy(broken, targets)
            assert torch.isfinite(losses[0]) and not torch.isfinite(losses[1])
    for wrong in (-1, 21):
        with pytest.raises(IndexError, match=f"a target is {wrong}; 0 to 20 would be right"):
            fused.cross_entropy(logits, torch.tensor([0, wrong]))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_dispatch_and_combine(dtype):
    n, k, width = random.randint(1, 90), random.randint(1, 4), random.choice([5, 16, 48])
    size = n * k + random.randint(0, 40)
    cells = torch.randperm(size)[: n * k].view(n, k)

    def exact_dispatch(x):
        return x.new_zeros(size, width).index_copy(0, cells.flatten(), x.repeat_interleave(k, 0))

    check(lambda x: fused.dispatch(x, cells, size, dtype), exact_dispatch, [leaf(n, width)], dtype)
    check(lambda y, w: fused.combine(y, cells, w), lambda y, w: (y[cells] * w[..., None]).sum(1),
          [leaf(size, width, dtype=dtype), torch.rand(n, k).requires_grad_()], dtype)


@needs_native
def test_plain_way_is_the_same(monkeypatch):
    n, k, size = 50, 2, 130
    cells, targets = torch.randperm(size)[: n * k].view(n, k), torch.randint(40, (n,))
    x, weight, w = leaf(n, 40), torch.rand(40).requires_grad_(), torch.rand(n, k).requires_grad_()

    def step():
        sent = fused.dispatch(fused.rms_norm(x, weight, 1e-6), cells, size, torch.float32)
        loss = fused.cross_entropy(fused.combine(sent, cells, w), targets).sum() + fused.swiglu(x).sum()
        return [loss, *torch.autograd.grad(loss, [x, weight, w])]

    native = step()
    monkeypatch.setattr(fused, "library", lambda: None)
    for a, b in zip(native, step(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@needs_native
def test_sums_do_not_depend_on_threads():
    x, weight, grad = leaf(1000, 96), torch.rand(96).requires_grad_(), torch.randn(1000, 96)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(fused.rms_norm(x, weight, 1e-6), [x, weight], grad))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
