"""Experiments and the training benchmark run in their quick form: what they compare is what they say, and tables are whole."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from jevons.plan import count_parameters

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def load(monkeypatch):
    """A script of experiments/ or benchmarks/ as a module."""
    def one(folder, name):
        monkeypatch.syspath_prepend(str(ROOT / folder))
        return importlib.import_module(name)

    threads = torch.get_num_threads()
    yield one
    torch.set_num_threads(threads)
    for name in ("text_runs", "balancing", "mtp", "nanogpt", "train_against_trainer"):
        sys.modules.pop(name, None)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 60)
    return path


def cells(table):
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]


def test_windows_hold_what_follows(load):
    runs = load("experiments", "text_runs")
    ids = torch.arange(100, 200)
    batch = runs.windows(ids, torch.tensor([0, 95 - 8, 99 - 8]), 8)
    rows = batch.tokens_N.view(3, 8)
    assert rows[:, 0].tolist() == [100, 187, 191]
    assert torch.equal(batch.targets_N.view(3, 8), rows + 1)
    inner = batch.mtp_weights_N.view(3, 8) > 0
    assert inner[:, :-1].all() and not inner[:, -1].any()
    assert torch.equal(batch.mtp_targets_N.view(3, 8)[inner], (rows + 2)[inner])
    assert batch.tokens == 24 and batch.segments == [(3, 8)]


def test_windows_of_a_step_do_not_depend_on_the_model(load, data):
    runs = load("experiments", "text_runs")
    text = runs.Text.read(data)
    made = [runs.Characters(None, text, seed=3, steps=9, rows=6, length=16, micros=m) for m in (1, 2)]
    whole, halves = ([b.tokens_N for b in objective.next_batch(5)[0]] for objective in made)
    assert torch.equal(torch.cat(whole), torch.cat(halves))
    assert not torch.equal(whole[0], made[0].next_batch(6)[0][0].tokens_N)


def test_intervals(load):
    runs = load("experiments", "text_runs")
    mean, low, high = runs.interval([1.0, 2.0, 3.0])
    assert mean == 2 and low == pytest.approx(2 - 4.303 / 3**0.5) and high == pytest.approx(2 + 4.303 / 3**0.5)
    assert runs.interval([5.0])[1:] == (float("-inf"), float("inf"))


def test_balancing(load, data, tmp_path, capsys):
    script = load("experiments", "balancing")
    options = ["--data", str(data), "--quick", "--seeds", "0", "1", "--out", str(tmp_path / "out")]
    results = script.main(options)
    table = cells(capsys.readouterr().out)
    assert [row[0] for row in table[2:]] == list(script.ARMS) and {len(row) for row in table} == {6}
    assert {(r["arm"], r["seed"]) for r in results} == {(arm, seed) for arm in script.ARMS for seed in (0, 1)}
    for key in ("tokens", "active", "parameters", "valid_tokens"):
        assert len({r[key] for r in results}) == 1, key
    assert all(1 <= r[key] <= 16 for r in results for key in ("busiest_valid", "busiest_train", "busiest_step"))
    losses = {(r["arm"], r["seed"]): r["valid_loss"] for r in results}
    assert len(set(losses.values())) == len(losses)  # every arm had its effect
    assert script.main(options) == results  # nothing is run twice
    with pytest.raises(SystemExit, match="other settings"):
        script.main([*options[:2], *options[3:], "--steps", "3"])


def test_batch_wise_loss_sees_one_row(load):
    script = load("experiments", "balancing")
    config = script.mixture(20, 32, 16, aux_loss_alpha=0.1)
    tokens, positions = torch.randint(20, (48,)), torch.arange(12).repeat(4)
    found = []
    for arm in ("sequence", "batch"):
        model = script.build(config, 0)
        if arm == "batch":
            script.over_the_batch(model)
        found.append(model.forward_train(tokens, positions, [(4, 12)]))
    rows, whole = found
    assert torch.equal(rows.hidden_ND, whole.hidden_ND) and torch.equal(rows.load_RE, whole.load_RE)
    assert whole.balance_loss < rows.balance_loss  # shares of all rows together are the flatter ones


def test_mtp(load, data, capsys):
    script = load("experiments", "mtp")
    results = script.main(["--data", str(data), "--quick", "--seeds", "0", "1"])
    table = cells(capsys.readouterr().out)
    assert [row[0] for row in table[2:]] == ["off", "on"] and {len(row) for row in table} == {6}
    assert len({(r["tokens"], r["active"], r["valid_tokens"]) for r in results}) == 1
    assert all((r["mtp_parameters"] > 0) == (r["arm"] == "on") for r in results)
    assert all(0 <= r[key] <= 1 for r in results if r["arm"] == "on" for key in ("acceptance_on_text", "acceptance_generated"))


def test_mtp_arms_begin_with_the_same_weights(load):
    script = load("experiments", "mtp")
    off, on = (script.build(script.mixture(20, 32, 16, num_nextn_predict_layers=int(mtp)), 7) for mtp in (False, True))
    theirs = dict(on.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in off.named_parameters())
    assert count_parameters(off.config).active == count_parameters(on.config).active


def test_nanogpt_ours(load, data, capsys):
    script = load("experiments", "nanogpt")
    sides = script.main(["--data", str(data), "--quick"])
    side = sides["ours"]
    assert [step for step, *_ in side["curve"]] == [3, 6] and side["characters"] == 6 * 12 * 64
    assert cells(capsys.readouterr().out)[2][0] == "ours"
    # with tiny-shakespeare's 65 characters: at most nanoGPT's 795,904, and within 1 %
    active = count_parameters(script.config_of(script.Settings(), 65)).active
    assert 0.99 * 795_904 <= active <= 795_904


def test_nanogpt_log_is_read(load):
    script = load("experiments", "nanogpt")
    lines = ["found vocab_size = 65 (inside meta.pkl)", "num decayed parameter tensors: 18, with 802,944 parameters",
             "num non-decayed parameter tensors: 9, with 1,152 parameters", "step 0: train loss 4.1, val loss 4.2",
             "iter 0: loss 4.2, time 900.00ms, mfu -100.00%", "iter 1: loss 4.1, time 10.00ms, mfu 1%",
             "iter 2: loss 4.0, time 20.00ms, mfu 1%", "iter 3: loss 4.0, time 30.00ms, mfu 1%",
             "step 4: train loss 1.9, val loss 1.87", "iter 4: loss 1.9, time 800.00ms, mfu 1%"]
    found = script.read_log(lines, every=4)
    assert found["active"] == found["parameters"] == 795_904 and found["vocabulary"] == 65
    # an evaluating iteration counts as the median of the others: 20, 10, 20, 30 ms
    assert found["curve"] == [(4, 1.87, pytest.approx(0.08))] and script.reached(found["curve"]) == (4, pytest.approx(0.08))


@pytest.mark.timeout(600)
def test_training_step_is_the_trainers(load, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    script = load("benchmarks", "train_against_trainer")
    (found,) = script.main(["--quick", "--threads", "1"])
    assert len(found["ours"]["losses"]) == len(found["theirs"]["losses"]) == 8
    for a, b in zip(found["ours"]["losses"], found["theirs"]["losses"], strict=True):
        assert a == pytest.approx(b, abs=5e-3)
    assert found["ours"]["losses"][-1] < found["ours"]["losses"][0]
    assert {len(row) for row in cells(capsys.readouterr().out)} == {8}
