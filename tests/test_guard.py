"""Bad batches, saves in a thread, stops within a step, clocks that jump: nothing is lost, and a replay gives the same numbers."""

import contextlib
import ctypes
import hashlib
import json
import math
import random
import threading
import time

import pytest
import torch
from nets import nano
from test_loop import Noise, model_of, run
from whole_runs import metrics, timeless

from jevons.config import preset
from jevons.model import build_model
from jevons.numerics import peak
from jevons.plan import training_flops
from jevons.plan.counts import PlanError
from jevons.plan.fit import check_fits, training_bytes
from jevons.recipe import GuardTable, OptimizerTable, parse_recipe
from jevons.runtime import Runtime
from jevons.store import train_state
from jevons.store.files import StoreError
from jevons.store.train_state import Writer, load_latest, load_step
from jevons.train import state as state_module
from jevons.train.cost import Energy, Meter
from jevons.train.guard import LEAST, WINDOW, Guard, TrainingDiverged
from jevons.train.loop import Interrupted
from jevons.train.objective import LossParts, Objective
from jevons.train.optim import build_optimizers
from jevons.train.state import Progress


def kinds(directory, kind):
    return [x for x in metrics(directory) if x["kind"] == kind]


# -- judgement ---------------------------------------------------------------------------------------------------------


def test_what_is_bad():
    guard = Guard(GuardTable(spike=20, loss_spike=4), watch_loss=True)
    norm = random.uniform(0.01, 10)
    for _ in range(LEAST - 1):
        assert guard.judge(norm * random.uniform(0.99, 1.01), 2.0) is None
    assert guard.judge(norm * 1000, 2.0) is None, "too few updates say nothing of what is usual"
    assert guard.judge(norm * 19, 2.0) is None
    assert "times its running median" in guard.judge(norm * 21, 2.0)
    assert guard.judge(norm, 7.9) is None and guard.judge(norm, 8.1).startswith("the loss is 8.1, 4.0 times")
    for bad in (math.nan, math.inf, -math.inf):
        assert guard.judge(bad, 2.0) == f"the gradient norm is {bad}" and guard.judge(norm, bad) == f"the loss is {bad}"
    before = guard.state_dict()
    guard.judge(norm * 500, 2.0)
    assert guard.state_dict() == before, "what is bad is not usual"
    for _ in range(2 * WINDOW):
        guard.judge(norm * 15, 2.0)
    assert guard.judge(norm * 200, 2.0) is None, "the median goes along with the run"
    assert len(guard.state_dict()["loss"]) == WINDOW


def test_a_policy_loss_and_a_guard_that_is_off():
    loose, off = Guard(GuardTable(), watch_loss=False), Guard(GuardTable(spike=0, loss_spike=0), watch_loss=True)
    for _ in range(LEAST):
        loose.judge(1.0, 0.001)
        off.judge(1.0, 0.001)
    assert loose.judge(1.0, 5.0) is None and off.judge(1e9, 5.0) is None
    assert off.judge(math.inf, 5.0) is not None, "what is not finite is always bad"


@pytest.mark.parametrize("line, problem", [
    ("spike = 0.5", "`guard.spike` = 0.5: 0 \\(off\\) or above 1 would be right"),
    ("rollback_after = 0", "`guard.rollback_after` = 0"), ("keep = 0", "`guard.keep` = 0"),
    ("roll_back_after = 3", "unknown key `guard.roll_back_after`; the nearest known key is `guard.rollback_after`")])
def test_a_table_that_is_wrong(line, problem):
    text = f'name = "x"\n[model]\npreset = "v3-nano"\n[guard]\n{line}\n[[stages]]\nkind = "pretrain"\ntokens = 10\n'
    with pytest.raises(ValueError, match=problem):
        parse_recipe(text)


class Spiky(Noise):
    """`spiky` names data steps whose loss is a thousand times what it should be: finite, and far from usual."""

    def __init__(self, model, spiky=(), **options):
        super().__init__(model, **options)
        self.spiky = spiky

    def loss(self, micro):
        parts = super().loss(micro)
        return LossParts(parts.loss * 1000, parts.sums, parts.load_RE) if self.step in self.spiky else parts


def test_a_spike_is_skipped_and_its_batch_can_be_made_again(tmp_path):
    model, at = model_of(), LEAST + random.randint(0, 3)
    objective = Spiky(model, spiky=[at], steps=LEAST + 6, micros=1)
    loop, records = run(tmp_path, model, objective)
    assert [r["skipped"] for r in records] == [int(step >= at) for step in range(LEAST + 6)]
    (bad,) = kinds(tmp_path, "bad_batch")
    assert (bad["step"], bad["data_step"], bad["update"]) == (at + 1, at, 0) and "times its running median" in bad["why"]
    ids = objective.next_batch(bad["data_step"])[bad["update"]][0]
    assert bad["first_ids"] == ids[:32].tolist() and bad["tokens"] == 48
    assert bad["ids_sha256"] == hashlib.sha256(ids.numpy().tobytes()).hexdigest()


# -- rolling back ------------------------------------------------------------------------------------------------------

TABLE = GuardTable(rollback_after=3, max_rollbacks=2)


def test_a_rollback_goes_back_to_the_good_state_and_past_the_data(tmp_path):
    model, first = model_of(), random.choice((4, 5, 7))
    good = first // 3 * 3
    objective = Noise(model, steps=12, bad=range(first, first + 3))
    loop, records = run(tmp_path, model, objective, guard=TABLE)
    met = first + 3
    assert objective.seen == [*range(met), *range(met, met + 12 - good)], "no data is met twice"
    (back,) = kinds(tmp_path, "rollback")
    assert (back["step"], back["to_step"], back["data_from"], back["data_to"]) == (met, good, good, met)
    assert [r["step"] for r in records] == [*range(1, met + 1), *range(good + 1, 13)]
    assert loop.progress.rollbacks == 1 and loop.progress.skipped == 3 and loop.progress.passed_over == met - good
    assert records[-1]["tokens"] == 12 * 96, "tokens are those of the steps that count"
    assert records[-1]["time.seconds"] >= max(r["time.seconds"] for r in records[:-1]), "time that was lost was paid for"

    class Later(Noise):  # the same weights as a run that met only the data that counts
        def next_batch(self, step):
            return super().next_batch(step if step < good else step + met - good)

    other = model_of()
    run(tmp_path / "other", other, Later(other, steps=12), guard=TABLE)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_killed_around_rollbacks_it_ends_with_the_same_numbers(tmp_path, asynchronous):
    """Two rollbacks, the second from the state that the first went back to; ended without a word at random steps."""
    table = TABLE.model_copy(update={"async_save": asynchronous, "keep": 1})
    bad = [1, *range(7, 10), *range(11, 14)]

    def whole(directory, seed=1, **options):
        model = model_of(seed)
        return run(directory, model, Noise(model, steps=14, bad=bad), guard=table, **options)

    reference, records = whole(tmp_path / "whole")
    assert reference.progress.rollbacks == 2 and reference.progress.skipped == 7
    for lost in [*sorted(random.sample(range(1, len(records)), 4)), None]:
        directory = tmp_path / "halves"
        found = load_latest(directory)
        if found is None:
            (directory / "metrics.jsonl").unlink(missing_ok=True)  # the pipeline cuts it to where the stage began
        kept = (directory / "metrics.jsonl").read_bytes()[: found[2]["metrics_position"]] if found else b""
        made = [sum(json.loads(line)["kind"] == "step" for line in kept.splitlines())]

        def lose(record, steps, lost=lost, made=made):
            made[0] += 1
            if made[0] == lost:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            whole(directory, seed=2 if found else 1, on_step=lose, resume=found[0] if found else 0)
    assert timeless(metrics(tmp_path / "halves")) == timeless(metrics(tmp_path / "whole"))
    mine, its = load_latest(tmp_path / "halves"), load_latest(tmp_path / "whole")
    assert mine[0] == its[0] == 14 and all(torch.equal(mine[1][k], its[1][k]) for k in its[1])
    mine, its = ({k: v for k, v in found[2]["progress"].items() if k not in ("seconds", "joules")} for found in (mine, its))
    assert mine == its


def test_after_the_last_rollback_it_stops_and_the_good_state_stays(tmp_path):
    model = model_of()
    with pytest.raises(TrainingDiverged, match="3 steps in a row were bad .*after 2 of 2 rollbacks; the last good state, step 3"):
        run(tmp_path, model, Noise(model, steps=90, bad=range(3, 90)), guard=TABLE)
    assert len(kinds(tmp_path, "rollback")) == 2
    _, tensors, meta = load_step(tmp_path, 3)
    assert meta["progress"]["bad_in_a_row"] == 0 and all(torch.isfinite(t).all() for t in tensors.values())
    fresh = model_of()
    with pytest.raises(TrainingDiverged, match="no good state was saved before"):
        run(tmp_path / "early", fresh, Noise(fresh, bad=range(90)), guard=TABLE)


def test_a_step_with_one_good_update_is_no_bad_step(tmp_path):
    class Half(Noise):
        def loss(self, micro):
            parts = super().loss(micro)
            self.count = getattr(self, "count", 0) + 1
            return parts if self.count % 4 in (1, 2) else LossParts(parts.loss * math.nan, parts.sums, parts.load_RE)

    model = model_of()
    loop, _ = run(tmp_path, model, Half(model, updates=2), guard=TABLE)
    assert loop.progress.skipped == 8 and loop.progress.rollbacks == 0
    assert [x["update"] for x in kinds(tmp_path, "bad_batch")] == [1] * 8


# -- saves -------------------------------------------------------------------------------------------------------------


def steps_of(directory):
    return sorted(int(p.name[5:]) for p in (directory / "train_state").glob("step-*"))


def test_the_best_is_kept_beside_the_last(tmp_path):
    model = model_of()
    losses = [5, 4, 3, 1, 1, 1, 6, 7, 8, 9, 9, 9]

    class Scored(Noise):
        def metrics(self, sums):
            return {"tokens": 1, "loss": 3.0, "val_loss": losses[self.step] if self.step % 3 == 2 else None}

    loop, _ = run(tmp_path, model, Scored(model, steps=12), save_every=3, guard=GuardTable(keep=2))
    assert loop.progress.best_step == 6 and loop.progress.best_score == -1
    assert steps_of(tmp_path) == [6, 9, 12] and (tmp_path / "train_state" / "best").resolve().name == "step-00000006"
    assert loop.states.restore_best() == 6
    kept = load_step(tmp_path, 6)[1]
    assert all(torch.equal(p, kept[f"model.{n}"]) for n, p in model.named_parameters())
    (tmp_path / "train_state" / "step-00000006" / "state.safetensors").write_bytes(b"damaged")
    assert loop.states.restore_best() is None


@pytest.mark.parametrize("key, sign, values", [("loss", -1, [3.0, 2.0, 1.0, 9.0]), ("accuracy", 1, [0.1, 0.2, 0.9, 0.1])])
def test_the_score_is_smoothed(key, sign, values):
    progress, smooth = Progress(), sign * values[0]
    for value in values:
        progress.see({key: value}, key, sign)
        smooth = 0.9 * smooth + 0.1 * sign * value
        assert progress.score == pytest.approx(smooth)
    progress.see({key: None}, key, sign)
    progress.see({key: math.nan}, key, sign)
    assert progress.score == pytest.approx(smooth)
    progress.best_step, progress.best_score = 3, 100.0
    progress.see({key: 0.5, "val_loss": 2.5}, key, sign)
    assert progress.score == -2.5 and progress.best_step is None, "a validation loss is another scale"
    progress.see({key: 0.0}, key, sign)
    assert progress.score == -2.5


def test_a_step_pays_for_the_copy_alone(tmp_path, monkeypatch):
    """Steps go on while a thread writes, and what it writes is the state of then."""
    writing, release, copies = threading.Event(), threading.Event(), []
    write, snapshot = train_state.write_train_state, train_state.snapshot

    def slow(*args, **options):
        assert threading.current_thread() is not threading.main_thread()
        writing.set()
        assert release.wait(60)
        return write(*args, **options)

    def copied(tensors):
        assert threading.current_thread() is threading.main_thread()
        copies.append(snapshot(tensors))
        return copies[-1]

    monkeypatch.setattr(state_module, "write_train_state", slow)
    monkeypatch.setattr(state_module, "snapshot", copied)
    seen = []

    def on_step(record, steps):
        seen.append((record["step"], writing.is_set(), release.is_set()))
        if record["step"] == 5:
            release.set()

    model = model_of()
    run(tmp_path, model, Noise(model, steps=5), save_every=3, on_step=on_step)
    assert (4, True, False) in seen or (5, True, False) in seen, "a step was made while the state was being written"
    saved = load_step(tmp_path, 3)[1]
    assert all(torch.equal(saved[k], copies[0][k]) for k in saved)
    assert any(not torch.equal(saved[f"model.{n}"], p) for n, p in model.named_parameters())


def test_never_two_writers_and_a_failure_is_told_once():
    writer, running, most = Writer(), [], []

    def write():
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()

    for _ in range(4):
        writer.submit(write)
        writer.check()
    writer.wait()
    assert most == [1] * 4

    def fail():
        raise StoreError(28, "disk full")

    writer.submit(fail)
    with pytest.raises(StoreError, match="disk full"):
        writer.wait()
    writer.check()
    writer.close()


def test_a_disk_that_fills_during_an_async_save(tmp_path, monkeypatch):
    """Reported at a later step than the one that saved; the last good state is intact, and the run goes on from it."""
    save, calls = train_state.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            save(tensors, path)
            with open(path, "r+b") as file:
                file.truncate(1000)
            raise OSError(28, "No space left on device")
        save(tensors, path)

    steps = []

    def on_step(record, total):
        steps.append(record["step"])
        time.sleep(0.05 if record["step"] > 6 else 0)

    monkeypatch.setattr(train_state, "save_file", full)
    model = model_of()
    with pytest.raises(StoreError, match="step-00000006 could not be written: .*No space left on device"):
        run(tmp_path, model, Noise(model, steps=30), save_every=3, on_step=on_step)
    assert 7 <= steps[-1] <= 9
    assert steps_of(tmp_path) == [3] and not list((tmp_path / "train_state").glob("*.tmp-*"))
    monkeypatch.undo()
    model, whole = model_of(seed=2), model_of()
    run(tmp_path, model, Noise(model, steps=9), save_every=3, resume=3)
    run(tmp_path / "whole", whole, Noise(whole, steps=9), save_every=3)
    assert timeless(metrics(tmp_path)) == timeless(metrics(tmp_path / "whole"))


# -- stops and clocks --------------------------------------------------------------------------------------------------


def test_a_stop_leaves_a_step_that_has_changed_nothing(tmp_path):
    """Asked while the data of step 6 is made: the state after step 5 is saved, and step 6 begins again."""
    whole = model_of()
    run(tmp_path / "whole", whole, Noise(whole))
    stop = {"asked": False}

    class Long(Noise):
        def next_batch(self, step):
            if step == 5:
                stop["asked"] = True
                self.interrupt()
                raise AssertionError("it went on")
            return super().next_batch(step)

    model = model_of()
    with pytest.raises(Interrupted, match="after step 5 of 8; the state is saved"):
        run(tmp_path / "halves", model, Long(model), should_stop=lambda: stop["asked"])
    second = model_of(seed=2)
    run(tmp_path / "halves", second, Noise(second), resume=5)
    assert timeless(metrics(tmp_path / "halves")) == timeless(metrics(tmp_path / "whole"))
    assert all(torch.equal(a, b) for a, b in zip(second.state_dict().values(), whole.state_dict().values(), strict=True))


def test_a_stop_between_micro_batches(tmp_path):
    stop = {"asked": False}

    class Asked(Noise):
        def loss(self, micro):
            parts = super().loss(micro)
            self.count = getattr(self, "count", 0) + 1
            stop["asked"] = self.count >= 8  # of four a step: in the second step's second update, after one was made
            return parts

    model = model_of()
    objective = Asked(model, updates=2)
    with pytest.raises(Interrupted, match="after step 2 of 8"):
        run(tmp_path, model, objective, should_stop=lambda: stop["asked"])
    assert objective.count == 8
    fresh, stop["asked"] = model_of(), False

    class First(Asked):
        def loss(self, micro):
            parts = super().loss(micro)
            stop["asked"] = self.count >= 5
            return parts

    objective = First(fresh, updates=2)
    with pytest.raises(Interrupted, match="after step 1 of 8"):
        run(tmp_path / "first", fresh, objective, should_stop=lambda: stop["asked"])
    assert all(p.grad is None for p in fresh.parameters())


def test_a_clock_that_jumps_changes_no_number(tmp_path, monkeypatch):
    whole = model_of()
    run(tmp_path / "whole", whole, Noise(whole, bad=[4]))
    real = time.time

    def jump():
        return real() + random.choice((-1e9, 1e9, 0, -3600, 3600))

    monkeypatch.setattr(time, "time", jump)
    monkeypatch.setattr(time, "monotonic", lambda: random.choice((0.0, 5.0, 1e9)))  # backwards too, which it never does
    stop = {"asked": False}

    def ask(record, steps):
        stop["asked"] = record["step"] == 5

    first, second = model_of(), model_of(seed=2)
    with pytest.raises(Interrupted):
        run(tmp_path / "halves", first, Noise(first, bad=[4]), on_step=ask, should_stop=lambda: stop["asked"])
    run(tmp_path / "halves", second, Noise(second, bad=[4]), resume=5)
    assert timeless(metrics(tmp_path / "halves")) == timeless(metrics(tmp_path / "whole"))


def test_what_makes_a_resume_inexact_is_named(tmp_path, monkeypatch):
    stop = {"asked": False}

    def ask(record, steps):
        stop["asked"] = record["step"] == 2

    with pytest.raises(Interrupted):
        run(tmp_path, on_step=ask, should_stop=lambda: stop["asked"])
    machine = state_module._machine
    monkeypatch.setattr(state_module, "_machine", lambda dtype: machine(dtype) | {
        "torch": "9.9", "cpu features": "avx2", "native kernels": "none", "torch's cpu kernels": "DEFAULT"})
    run(tmp_path, resume=2)
    (note,) = kinds(tmp_path, "note")
    for part in ("torch was 2.", "and is 9.9", "cpu features was", "and is avx2", "torch's cpu kernels was", "and is DEFAULT"):
        assert part in note["text"], part


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_flops_are_the_plans_for_whole_rows():
    """A batch of unpadded rows costs what the plan says of rows of that length; padding costs nothing."""
    from jevons.data.packing import pack

    class Mine(Objective):
        model = build_model(nano(), seed=0)

    for rows, length in ((4, 32), (3, 48)):
        documents = [([1] * length, [1.0] * length) for _ in range(rows)]
        assert Mine().flops(pack(documents, 0)) == pytest.approx(training_flops(nano(), rows * length, length))
    lengths = [random.randint(3, 40) for _ in range(9)]
    mixed = Mine().flops(pack([([1] * n, [1.0] * n) for n in lengths], 0))
    assert mixed == pytest.approx(sum(training_flops(nano(), n, n) for n in lengths))


def test_a_step_reports_what_the_machine_tells(tmp_path):
    class Counted(Noise):
        def flops(self, micro):
            return 1e9

    model = model_of()
    _, records = run(tmp_path, model, Counted(model, micros=3), peak_flops=1e12)
    for record in records:
        assert record["flops"] == 3e9
        assert record["time.mfu"] == pytest.approx(3e9 / record["time.step_seconds"] / 1e12, rel=0.02)
        assert record["time.peak_bytes"] > 50e6
    (held,) = kinds(tmp_path, "memory")
    parameters = sum(p.numel() for p in model.parameters())
    assert held["gradients"] == 4 * parameters and 4 * parameters <= held["weights"] <= 5 * parameters
    assert "time.joules" not in records[0] or records[0]["time.joules"] > 0


def test_energy_where_the_machine_tells(tmp_path):
    class Silent:
        def nvmlDeviceGetHandleByIndex_v2(self, index, out):  # noqa: N802
            return 3

    assert Energy(tmp_path, Silent()).joules() is None
    assert "time.joules" not in Meter(None, lambda: None).read(0.0, 1.0, Progress()), "absent, not zero"
    for name, value in (("intel-rapl:0", 5_000_000), ("intel-rapl:0:0", 77), ("intel-rapl:1", 900_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")

    class Nvml:
        def nvmlDeviceGetHandleByIndex_v2(self, index, out):  # noqa: N802
            return 0

        def nvmlDeviceGetTotalEnergyConsumption(self, device, out):  # noqa: N802
            ctypes.cast(out, ctypes.POINTER(ctypes.c_ulonglong))[0] = 2500
            return 0

    energy, progress = Energy(tmp_path, Nvml()), Progress(joules=10.0)
    assert energy.joules() == pytest.approx(5.9 + 2.5)
    meter = Meter(None, energy.joules)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1000000\n")  # the counter began again: 6 J more
    assert meter.read(0.0, 1.0, progress)["time.joules"] == pytest.approx(16.0)


def test_the_peak_is_kept_and_only_grows(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rates = iter((50.0, 20.0, 80.0))
    monkeypatch.setattr(peak, "gemm_rate", lambda *args: (next(rates), 1))
    runtime = Runtime.detect("cpu")
    state = torch.get_rng_state()
    assert [peak.peak_flops(runtime, torch.float32) for _ in range(3)] == [50e9, 50e9, 80e9]
    (tmp_path / "jevons" / "gemm-peak.json").write_text("[broken")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert peak.peak_flops(runtime, torch.float32) > 1e8
    assert torch.equal(torch.get_rng_state(), state), "measuring takes no random number from a run"


# -- whether it fits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_the_plans_memory_is_what_training_holds(matrices):
    config = preset("v3-tiny")
    model = build_model(config, seed=0)
    optimizers = build_optimizers(model, OptimizerTable(matrices=matrices))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    held = Meter.held(model, optimizers)
    stage = parse_recipe(RECIPE.format(width=64)).stages[0]
    stage = stage.model_copy(update={"optimizer": OptimizerTable(matrices=matrices)})
    memory = training_bytes(config, stage)
    assert memory["weights"] == pytest.approx(held["weights"], rel=0.1)  # buffers and router biases aside
    assert memory["gradients"] == pytest.approx(held["gradients"], rel=0.01)
    assert memory["optimizer"] == pytest.approx(held["optimizer"], rel=0.02)


RECIPE = """
name = "huge"
[model]
preset = "v3-nano"
set = {{ hidden_size = {width}, num_hidden_layers = 12 }}
[[stages]]
kind = "pretrain"
tokens = 1_000_000
batch_tokens = 8192
"""


def test_a_recipe_that_does_not_fit_is_refused_with_its_plan():
    recipe = parse_recipe(RECIPE.format(width=65536))
    config, stage = preset("v3-nano", vocab_size=512, **recipe.model.set), recipe.stages[0]
    parts = training_bytes(config, stage)
    need = sum(parts.values())
    with pytest.raises(PlanError) as error:
        check_fits(recipe, need * 0.99, 1, lambda: "the plan")
    text = str(error.value)
    for part in ("recipe huge, stage pretrain does not fit in memory", *parts, "GB", "the plan"):
        assert part in text
    check_fits(recipe, need * 1.01, 1, lambda: "")
    less = training_bytes(config, stage.model_copy(update={"micro_batch_tokens": 1024}))["activations"]
    assert less == parts["activations"] / 8
    assert training_bytes(config, stage.model_copy(update={"micro_batch_tokens": 1024}), threads=2)["activations"] == 2 * less


def test_a_run_that_does_not_fit_leaves_no_directory(tmp_path):
    from test_pipeline import Quiet

    from jevons.reason.pipeline import Run

    text = RECIPE.format(width=65536).replace("[[stages]]", '[task]\nname = "countdown"\n[[stages]]')
    with pytest.raises(PlanError, match="does not fit"):
        Run(parse_recipe(text), text, tmp_path / "out", Quiet())
    assert not (tmp_path / "out").exists()


# -- whole stages ------------------------------------------------------------------------------------------------------


def test_a_stage_may_end_with_its_best_weights(tmp_path, monkeypatch):
    """The validation loss only grows: the first state saved is the best, and the next stage starts from it."""
    import whole_runs
    from safetensors.torch import load_file
    from test_pipeline import Quiet

    from jevons.reason.pipeline import Run
    from jevons.recipe import load_recipe
    from jevons.store.checkpoint import read_provenance
    from jevons.train.pretrain import Pretrain

    own = Pretrain.metrics
    monkeypatch.setattr(Pretrain, "metrics", lambda self, sums: (record := own(self, sums)) | {"val_loss": 9 - record["loss"]})
    text = whole_runs.RECIPE.split("[[stages]]\nkind = \"grpo\"")[0].replace("[cost]", "[guard]\nuse_best = true\n[cost]")
    recipe, text = load_recipe(str(whole_runs.write_recipe(tmp_path, text)))
    kept = {}

    class Keeping(Quiet):
        def on_step(self, record, budget):
            super().on_step(record, budget)
            for path in (tmp_path / "out" / "stages" / "00-pretrain" / "train_state").glob("step-????????"):
                kept.setdefault(int(path.name[5:]), load_file(path / "state.safetensors"))

    stage = tmp_path / "out" / "stages" / "00-pretrain"
    final = Run(recipe, text, tmp_path / "out", Keeping()).execute()
    best = read_provenance(stage)["weights_of_step"]
    assert best < read_provenance(stage)["steps"] and best in kept
    for directory in (stage, final):
        weights = load_file(directory / "model.safetensors")
        assert torch.equal(weights["model.embed_tokens.weight"], kept[best]["model.embed_tokens.weight"])
