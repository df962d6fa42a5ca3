"""What the backward pass computes again: the same bits, fewer bytes, and attention over long rows only once."""

import random

import pytest
import torch
from nets import lively, nano, qwen2
from test_loop import model_of, run
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from jevons.config import preset
from jevons.model import build_model
from jevons.model.precision import set_training_precision
from jevons.numerics import Fp8
from jevons.recipe import load_recipe
from jevons.store.train_state import load_latest

KINDS = {"float32": (torch.float32, None), "bf16": (torch.bfloat16, None), "fp8": (torch.bfloat16, Fp8())}


def forward(model, segments, dtype, padding=3):
    lengths = [length for rows, length in segments for _ in range(rows)]
    positions = torch.cat([*map(torch.arange, lengths), torch.full((padding,), -1)])
    tokens = torch.randint(model.config.vocab_size, positions.shape, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False):
        return model.forward_train(tokens, positions, segments)


def gradients(model, segments, dtype):
    out = forward(model, segments, dtype)
    loss = out.hidden_ND.float().square().mean() + out.balance_loss
    if out.mtp_hidden_ND is not None:
        loss = loss + out.mtp_hidden_ND.float().abs().mean()
    return [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [nano, qwen2], ids=["mla", "gqa"])
def test_the_same_to_the_bit(config, kind):
    dtype, fp8 = KINDS[kind]
    model = lively(config(max_position_embeddings=512)).train()
    for segments in ([(2, random.randint(2, 30)), (1, 7)], [(1, 410), (1, 5)]):
        both = []
        for recompute in (False, True):
            set_training_precision(model, fp8, recompute)
            both.append(gradients(model, segments, dtype))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*both, strict=True)), segments


def held(model, rows, length, dtype):
    """Bytes that a forward pass leaves in memory; those of the process, whatever holds them."""
    forward(model, [(rows, length)], dtype, 0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        out = forward(model, [(rows, length)], dtype, 0)
    assert out.hidden_ND.requires_grad
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


@pytest.mark.parametrize("kind,share", [("float32", 0.6), ("bf16", 0.65), ("fp8", 0.7)])
def test_less_is_kept(kind, share):
    dtype, fp8 = KINDS[kind]
    model, kept = build_model(preset("v3-tiny"), seed=0).train(), []
    for recompute in (False, True):
        set_training_precision(model, fp8, recompute)
        kept.append(held(model, 4, 64, dtype) - held(model, 2, 64, dtype))  # of weights nothing
    assert 128 * 10_000 < kept[1] < share * kept[0], [bytes / 128 for bytes in kept]


def test_attention_over_long_rows_is_made_once():
    model = build_model(preset("v3-tiny"), seed=0).train()
    set_training_precision(model, None, recompute=True)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func)
            return func(*args, **kwargs or {})

    with Watch():
        gradients(model, [(1, 420)], torch.float32)
    assert made.count(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default) == len(model.layers) + len(model.mtp)


@pytest.mark.parametrize("fp8", [None, Fp8()], ids=["bf16", "fp8"])
def test_a_loop_of_many_cores_trains_to_the_same_weights(tmp_path, fp8):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # micro-batches side by side
        for name in ("kept", "again"):
            model = model_of()
            run(tmp_path / name, model, dtype=torch.bfloat16, fp8=fp8, recompute=name == "again")
            assert model.layers[0].recompute == (name == "again")
    finally:
        torch.set_num_threads(before)
    a, b = (load_latest(tmp_path / name)[1] for name in ("kept", "again"))
    assert a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def test_v3_is_trained_as_its_report_says():
    table = load_recipe("v3-671b")[0].precision
    assert (table.compute, table.moments, table.recompute) == ("fp8", "bf16", True)
