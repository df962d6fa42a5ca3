"""Schedules in tokens: what every step has is known beforehand, and a kill in the middle of a ramp changes no number."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import lively, nano
from own_tasks import Traced
from whole_runs import metrics, timeless

from jevons.data.tokenizer import train_tokenizer
from jevons.recipe import OptimizerTable, PretrainStage, RecipeError, load_recipe, parse_recipe
from jevons.recipe.schedule import Phase, Timeline, value_at
from jevons.store.run_dir import MetricsLog
from jevons.train.ema import Averaged
from jevons.train.loop import Interrupted, Loop, LoopSettings
from jevons.train.objective import load_metrics
from jevons.train.pretrain import Pretrain
from jevons.train.schedule import lr_factor


@st.composite
def phases(draw, lowest=0.0, highest=1e3):
    """(phases in order, up to the end)."""
    ends = sorted(draw(st.sets(st.integers(1, 99), max_size=4)))
    values = st.floats(lowest, highest, allow_nan=False)
    out = []
    for until in [*(e / 100 for e in ends), 1.0]:
        shape = draw(st.sampled_from(["constant", "linear", "cosine"]))
        start = draw(values) if shape != "constant" and (not out or draw(st.booleans())) else None
        out.append(Phase(until=until, to=draw(values), shape=shape, start=start))
    return tuple(out)


@given(phases(), st.floats(0, 1), st.integers(1, 10**13))
def test_a_value_lies_between_the_ends_of_its_phase(schedule, part, total):
    value = value_at(schedule, part * total, total)
    ends = [p.to for p in schedule] + [p.start for p in schedule if p.start is not None]
    assert min(ends) - 1e-9 <= value <= max(ends) + 1e-9
    begin = before = 0.0
    for phase in schedule:  # again, by hand
        end = phase.until * total
        if begin <= part * total < end:
            f, a = (part * total - begin) / (end - begin), before if phase.start is None else phase.start
            f = {"constant": 1.0, "linear": f, "cosine": math.sin(math.pi * f / 2) ** 2}[phase.shape]
            assert value == pytest.approx(a + (phase.to - a) * f, rel=1e-9, abs=1e-9)
        begin, before = end, phase.to


@given(phases(), st.floats(0, 1), st.integers(2, 10**13))
def test_tokens_and_parts_say_the_same(schedule, part, total):
    in_tokens = tuple(p.model_copy(update={"until": p.until * total}) for p in schedule)
    if in_tokens[0].until > 1:
        expected = value_at(schedule, part * total, total)
        assert value_at(in_tokens, part * total, total) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(st.integers(1, 30_000), st.integers(1, 5000) | phases(20, 5000))
def test_the_steps_of_a_ramp_come_nearest_to_the_budget(tokens, batch):
    timeline = Timeline.of(tokens, batch)
    sizes = [timeline.batch(step) for step in range(min(timeline.steps, 300))]
    assert timeline.steps >= 1 and timeline.bounds[0] == 0 and all(s >= 1 for s in sizes)
    assert sizes[:3] == [timeline.bounds[i + 1] - timeline.bounds[i] for i in range(len(sizes[:3]))]
    last = timeline.batch(timeline.steps - 1)
    if timeline.steps > 1:
        assert timeline.bounds[-1] - last / 2 <= tokens + 0.5, "without the last step it would be nearer"
    following = batch if isinstance(batch, int) else max(1, round(value_at(batch, timeline.bounds[-1], tokens)))
    assert tokens - timeline.bounds[-1] <= following / 2
    if isinstance(batch, int):
        assert timeline.steps == max(1, round(tokens / batch)), "as recipes without a ramp have always counted"
    assert timeline.batch(timeline.steps + 5) == last, "a look past the end is harmless"
    spans = [timeline.span(step, 16) for step in range(min(timeline.steps, 300))]
    assert spans[0][0] == 0 and all(a + n == b for (a, n), (b, _) in zip(spans, spans[1:], strict=False))
    assert all(abs(16 * n - size) < 16 for (_, n), size in zip(spans, sizes, strict=True))


def test_v3s_own_run():
    """Report section 4.2, by the numbers printed there."""
    stage = load_recipe("v3-671b")[0].stages[0]
    line, table = stage.timeline, stage.optimizer
    assert line.batch(0) == 3072 * 4096 and line.batch(line.steps - 1) == 15360 * 4096
    full = next(i for i in range(line.steps) if line.batch(i) == 15360 * 4096)
    assert abs(line.bounds[full] - 469e9) < line.batch(0) and abs(line.bounds[-1] - 14.8e12) < line.batch(full) / 2

    def at(tokens):
        step = next(i for i in range(int(tokens / line.batch(full)), line.steps) if line.bounds[i] >= tokens)
        return table.lr * lr_factor(step, line.steps, table, line)

    assert [table.lr * lr_factor(i, line.steps, table, line) for i in (0, 999, 1999, 2000)] == pytest.approx(
        [1.1e-7, 1.1e-4, 2.2e-4, 2.2e-4])
    assert [at(x) for x in (9.99e12, 12.15e12, 14.31e12, 14.63e12, 14.64e12, 14.79e12)] == pytest.approx(
        [2.2e-4, (2.2e-4 + 2.2e-5) / 2, 2.2e-5, 2.2e-5, 7.3e-6, 7.3e-6], rel=1e-3)
    last = line.steps - 1
    assert (line.value(stage.mtp_weight, 0), line.value(stage.mtp_weight, last)) == (0.3, 0.1)
    assert (line.value(stage.bias_update_speed, 0), line.value(stage.bias_update_speed, last)) == (0.001, 0.0)
    table = load_recipe("v3-671b")[0].stages[3].optimizer
    assert [table.lr * lr_factor(i, 1001, table) for i in (0, 1000)] == pytest.approx([5e-6, 1e-6], rel=1e-3)


def test_warm_up_and_phases_meet():
    table = OptimizerTable(lr=0.1, warmup_steps=5, schedule=(Phase(until=0.5, to=0.1), Phase(to=0.02, shape="linear")))
    rates = [table.lr * lr_factor(i, 20, table) for i in range(20)]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1]) and rates[5:11] == pytest.approx([0.1] * 6)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[15] == pytest.approx(0.06)


TEXT = """
name = "x"
[model]
preset = "v3-nano"
[[stages]]
kind = "pretrain"
tokens = 1000
{}
"""


@pytest.mark.parametrize("lines,message", [
    ("mtp_weight = [{ untill = 0.5, to = 1 }]",
     r"unknown key `stages\[0\].mtp_weight\[0\].untill`; .*`stages\[0\].mtp_weight\[0\].until`"),
    ("mtp_weight = [{ until = 500, to = 1 }, { until = 400, to = 2 }]", r"mtp_weight\[1\].until = 400 must be past.*500.*1000"),
    ("mtp_weight = [{ until = 2000, to = 1 }]", r"mtp_weight\[0\].until = 2000 must be .* within the stage \(1000\)"),
    ("bias_update_speed = [{ from = 0.1, to = 0.2 }]", "`from` does nothing in a constant phase"),
    ("bias_update_speed = []", "bias_update_speed"),
    ("mtp_weight = -1", r"mtp_weight` = -1"),
    ("batch_tokens = [{ shape = \"linear\", to = 200 }]", r"batch_tokens\[0\] has 0 tokens at one end; give `from`"),
    ("batch_tokens = 0", "batch_tokens` = 0"),
    ("optimizer = { schedule = [{ to = 1e-3 }], final_lr_fraction = 0.1 }", "final_lr_fraction does nothing beside phases"),
    ("optimizer = { schedule = \"cosin\" }", "optimizer.schedule"),
    ("optimizer = { schedule = [{ until = 1500, to = 1e-3 }] }", r"optimizer.schedule\[0\].until = 1500 must be"),
    ("yarn_factor = 4", "yarn_factor 4 needs `context`"),
])
def test_mistakes_are_named(lines, message):
    with pytest.raises(RecipeError, match=message) as error:
        parse_recipe(TEXT.format(lines), "my.toml")
    assert "my.toml" in str(error.value)


def test_reinforcement_learning_counts_no_tokens_beforehand():
    text = TEXT.format("[[stages]]\nkind = \"grpo\"\nsteps = 9\noptimizer = { schedule = [{ until = 500, to = 1e-3 }] }")
    with pytest.raises(RecipeError, match="tokens are not known before it runs; a part of it, from 0 to 1"):
        parse_recipe(text)
    assert parse_recipe(text.replace("500", "0.5"))


# -- in the loop -----------------------------------------------------------------------------------------------------------

STAGE = PretrainStage(
    kind="pretrain", tokens=6000, save_every=3,
    batch_tokens=(Phase(until=0.6, start=300, to=900, shape="linear"), Phase(to=900)),
    mtp_weight=(Phase(until=3000, to=0.3), Phase(to=0.0)), bias_update_speed=(Phase(until=4000, to=0.01), Phase(to=0.0)),
    ema_decay=0.9, optimizer=OptimizerTable(lr=0.004, schedule=(Phase(until=3000, to=0.004), Phase(to=0.001, shape="cosine"))))
TOKENIZER = train_tokenizer(["sun moon rain wind sea hill tree leaf."] * 3, 288)


class Killed(Exception):
    """Ends the loop between two saves."""


def trained(directory, stop_after=None, kill_after=None):
    directory.mkdir(exist_ok=True)
    model = lively(nano(vocab_size=288), seed=5)
    objective = Averaged(Pretrain(model, TOKENIZER, Traced(), STAGE, 7), model, STAGE.ema_decay)
    stopping = {"now": False}

    def on_step(record, steps):
        stopping["now"] = record["step"] == stop_after
        if record["step"] == kill_after:
            raise Killed

    with MetricsLog(directory / "metrics.jsonl") as log:
        loop = Loop(model, objective, LoopSettings("pretrain", directory, STAGE.optimizer, STAGE.save_every, torch.float32, 1.0,
                                                   should_stop=lambda: stopping["now"], on_step=on_step), log)
        loop.resume()
        loop.run()
    return loop


def fixed_start(directory, **options):
    """Every run from the same weights, whatever the test before drew."""
    torch.manual_seed(3)
    random.seed(3)
    return trained(directory, **options)


def test_killed_in_the_ramp_and_resumed_is_the_same(tmp_path):
    whole = fixed_start(tmp_path / "whole")
    steps = STAGE.timeline.steps
    stop = random.Random().randrange(1, steps - 1)
    with pytest.raises(Interrupted):
        fixed_start(tmp_path / "again", stop_after=stop)
    with pytest.raises(Killed):
        trained(tmp_path / "again", kill_after=random.randrange(stop + 1, steps))
    again = trained(tmp_path / "again")  # from any weights: the state has its own
    assert timeless(metrics(tmp_path / "again")) == timeless(metrics(tmp_path / "whole")), stop
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for name, a in whole.objective.average.items():
        assert torch.equal(a, again.objective.average[name]), name

    lines = [x for x in metrics(tmp_path / "whole") if x["kind"] == "step"]
    assert len(lines) == steps
    done = 0
    for index, line in enumerate(lines):
        nominal, read = STAGE.timeline.batch(index), line["tokens"] - done
        assert abs(read - nominal) < 250, "whole documents, and whole segments of four of them"
        done = line["tokens"]
        assert line["lr"] == pytest.approx(0.004 * lr_factor(index, steps, STAGE.optimizer, STAGE.timeline))
        with_mtp = STAGE.timeline.bounds[index] < 3000
        assert (line["mtp_loss"] > 0) == with_mtp and line["max_violation"] == max(line["violation"])
        assert len(line["violation"]) == 1 + with_mtp, "the MTP module's router too, while it learns"


def test_the_bias_stands_still_where_its_speed_is_zero(tmp_path):
    loop = fixed_start(tmp_path)
    objective, gates = loop.objective.inner, loop.model.routers()
    load = torch.rand(len(gates), 8)
    for step, moves in ((0, True), (STAGE.timeline.steps - 1, False)):
        objective.at_step(step, STAGE.mtp_weight, STAGE.bias_update_speed)
        before = [g.e_score_correction_bias.clone() for g in gates]
        objective.after_update(load)
        change = [g.e_score_correction_bias - b for g, b in zip(gates, before, strict=True)]
        for moved, row in zip(change, load, strict=True):
            expected = 0.01 * torch.sign(row.mean() - row) if moves else torch.zeros(8)
            torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0)


@given(st.lists(st.lists(st.integers(0, 1000), min_size=4, max_size=4).filter(any), min_size=1, max_size=5))
def test_violation_of_balance(loads):
    logged = load_metrics(torch.tensor(loads, dtype=torch.float32))
    by_hand = [max(row) * len(row) / sum(row) - 1 for row in loads]
    assert logged["violation"] == pytest.approx(by_hand, abs=1e-4) and logged["max_violation"] == max(logged["violation"])
    assert load_metrics(None) == {}
