"""The average of the weights: by hand, beside any objective, and the same after a resume (test_schedule kills one midway)."""

import random

import pytest
import torch
from nets import lively, nano
from test_loop import Noise, run

from jevons.recipe import RecipeError, parse_recipe
from jevons.store.train_state import load_latest
from jevons.train.ema import Averaged


def wrapped(decay, **options):
    model = lively(nano(vocab_size=288), seed=3)
    return model, Averaged(Noise(model, **options), model, decay)


def snapshot(model):
    biases = {n: b.clone() for n, b in model.named_buffers() if "bias" in n}
    return {n: p.detach().clone() for n, p in model.named_parameters()} | biases


def test_the_average_by_hand(tmp_path):
    decay, bad = random.choice([0.5, 0.9, 0.99]), random.randrange(1, 5)
    model, objective = wrapped(decay, steps=6, bad=(bad,))
    seen = [snapshot(model)]
    run(tmp_path, model, objective, on_step=lambda record, steps: seen.append(snapshot(model)))
    by_hand = {n: t.double() for n, t in seen[0].items()}
    for index, weights in enumerate(seen[1:]):
        if index != bad:  # a skipped update is none
            by_hand = {n: decay * by_hand[n] + (1 - decay) * weights[n].double() for n in by_hand}
    assert set(objective.average) == set(by_hand) and any("e_score" in n for n in by_hand)
    for name, tensor in objective.average.items():
        torch.testing.assert_close(tensor.double(), by_hand[name], atol=1e-5, rtol=1e-5)
    objective.step = 77
    assert objective.inner.step == 77, "what is set on it is set on what it wraps"
    assert objective.inner.loads and objective.state_dict() == {"loads": objective.inner.loads}, "what it wraps still works"


def test_the_weights_come_back(tmp_path):
    model, objective = wrapped(0.9, steps=3)
    run(tmp_path, model, objective)
    own = snapshot(model)
    with pytest.raises(RuntimeError, match="full"), objective.applied():
        for name, tensor in snapshot(model).items():
            assert torch.equal(tensor, objective.average[name]), name
        assert not torch.equal(model.lm_head.weight, own["lm_head.weight"])
        raise RuntimeError("the disk is full")
    assert all(torch.equal(t, own[n]) for n, t in snapshot(model).items())


def test_it_lies_in_the_state_beside_the_objectives_own(tmp_path):
    model, objective = wrapped(0.9, steps=4)
    run(tmp_path, model, objective, save_every=2)
    _, tensors, _ = load_latest(tmp_path)
    assert {n for n in tensors if n.startswith("objective.")} == {
        "objective.kept", *(f"objective.ema.{n}" for n in objective.average)}
    _, again = wrapped(0.9, steps=4)
    again.load_tensors({n.removeprefix("objective."): t for n, t in tensors.items() if n.startswith("objective.")})
    assert all(torch.equal(t, objective.average[n]) for n, t in again.average.items()) and again.inner.kept[0] == 4


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "1.5", "'slow'"])
def test_decays_that_are_none(value):
    text = 'name = "x"\n[model]\npreset = "v3-nano"\n[[stages]]\nkind = "pretrain"\ntokens = 10\nema_decay = '
    with pytest.raises(RecipeError, match="ema_decay"):
        parse_recipe(text + value)
    with pytest.raises(RecipeError, match="unknown key `stages.1..ema_decay`"):
        parse_recipe(text + "0.5\n[[stages]]\nkind = \"eval\"\nema_decay = 0.5\n")
