"""The training loop by itself: budgets, saves, skipped updates, stopping, and a resume that is the same to the last bit."""

import copy
import json
import math
import random
import threading
import time

import pytest
import torch
from whole_runs import metrics, timeless

from jevons.config import preset
from jevons.model import build_model
from jevons.plan import dollars
from jevons.recipe import GuardTable, OptimizerTable
from jevons.store.run_dir import MetricsLog
from jevons.store.train_state import load_latest, load_step
from jevons.train.loop import Interrupted, Loop, LoopSettings, TrainingDiverged
from jevons.train.objective import LossParts, Objective, update_router_bias


class Noise(Objective):
    """Predict the ids of a random sequence from (seed, step). `bad` names steps whose loss is not finite."""

    def __init__(self, model, steps=8, bad=(), micros=2, updates=1):
        self.model, self.steps, self.bad, self.micros, self.updates = model, steps, set(bad), micros, updates
        self.step, self.seen, self.loads = -1, [], []
        self.kept = torch.zeros(3)

    def next_batch(self, step):
        self.step = step
        self.seen.append(step)
        rng = torch.Generator().manual_seed(1000 + step)
        return [[torch.randint(0, 288, (48,), generator=rng) for _ in range(self.micros)] for _ in range(self.updates)]

    def loss(self, micro):
        out = self.model.forward_train(micro, torch.arange(16).repeat(3), [(3, 16)])
        loss = torch.nn.functional.cross_entropy(self.model.logits(out.hidden_ND[:-1]).float(), micro[1:])
        value = loss.item()
        if self.step in self.bad:
            loss = loss * float(("nan", "inf")[self.step % 2])
        return LossParts(loss, {"loss": value, "tokens": 48}, out.load_RE)

    def after_update(self, load):
        self.loads.append(load.sum().item())
        update_router_bias(self.model, load, 0.01)
        self.kept += 1

    def metrics(self, sums):
        return {"tokens": sums["tokens"], "loss": sums["loss"]}

    def samples(self):
        return [{"prompt": str(self.step)}] if self.step % 3 == 0 else []

    def state_dict(self):
        return {"loads": self.loads}

    def load_state_dict(self, state):
        self.loads = state["loads"]

    def tensors(self):
        return {"kept": self.kept}

    def load_tensors(self, tensors):
        self.kept = tensors["kept"]


def model_of(seed=1):
    return build_model(preset("v3-nano", vocab_size=288, max_position_embeddings=64), seed=seed)


def run(directory, model=None, objective=None, dtype=torch.float32, optimizer=None, resume=0, **options):
    """Run a loop in `directory`: (loop, records seen by on_step)."""
    model = model or model_of()
    objective = objective or Noise(model)
    records = []
    settings = LoopSettings("noise", directory, optimizer or OptimizerTable(warmup_steps=2), options.pop("save_every", 3), dtype,
                            dollars_per_hour=36.0, **options)
    if "on_step" not in options:
        settings.on_step = lambda record, steps: records.append(record)
    directory.mkdir(parents=True, exist_ok=True)
    with MetricsLog(directory / "metrics.jsonl") as log:
        loop = Loop(model, objective, settings, log)
        assert loop.resume() == resume
        loop.run()
    return loop, records


def test_what_a_step_logs(tmp_path):
    loop, records = run(tmp_path)
    lines = metrics(tmp_path)
    assert [x["step"] for x in lines if x["kind"] == "step"] == list(range(1, 9))
    assert [x["step"] for x in lines if x["kind"] == "samples"] == [1, 4, 7], "of the step just made"
    assert [json.loads(json.dumps(r)) for r in records] == [x for x in lines if x["kind"] == "step"]
    for step, record in enumerate(records, 1):
        assert record["stage"] == "noise" and record["tokens"] == step * 96 and record["skipped"] == 0
        assert record["grad_norm"] > 0
        assert record["lr"] == pytest.approx(3e-3 * (step / 2 if step <= 2 else 1 - (step - 3) / 6))
        assert record["time.dollars"] == pytest.approx(dollars(record["time.seconds"], 36.0), abs=1e-4)
        assert record["time.step_seconds"] <= record["time.seconds"] + 1e-3
    assert loop.objective.loads == [loop.objective.loads[0]] * 8, "the load of all micro-batches, once an update"
    # two micro-batches of 48 tokens, two experts each, in the MoE layer and the MTP module's
    assert loop.objective.loads[0] == 2 * 48 * 2 * len(loop.model.routers())


def test_saves_come_at_every_interval_and_at_the_end(tmp_path):
    saved = []

    class Watched(Noise):
        def tensors(self):
            saved.append(self.step + 1)
            return super().tensors()

    model = model_of()
    run(tmp_path, model, Watched(model), save_every=3)
    assert saved == [3, 6, 8]
    assert load_latest(tmp_path)[0] == 8


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_resume_is_the_same_to_the_last_bit(tmp_path, matrices):
    table = OptimizerTable(matrices=matrices, schedule="cosine")
    dtype = random.choice((torch.float32, torch.bfloat16))
    bad = [random.randrange(1, 8)]
    whole = model_of()
    reference, _ = run(tmp_path / "whole", whole, Noise(whole, bad=bad, updates=2), dtype, table)
    lost = random.choice((4, 5, 6, 7))

    def lose(record, steps):
        if record["step"] == lost:
            raise KeyboardInterrupt

    first = model_of()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halves", first, Noise(first, bad=bad, updates=2), dtype, table, on_step=lose)
    second = model_of(seed=2)  # whatever it holds is replaced
    objective = Noise(second, bad=bad, updates=2)
    loop, _ = run(tmp_path / "halves", second, objective, dtype, table, resume=(lost - 1) // 3 * 3)
    assert objective.seen == list(range((lost - 1) // 3 * 3, 8))
    assert timeless(metrics(tmp_path / "halves")) == timeless(metrics(tmp_path / "whole"))
    assert loop.progress.skipped == reference.progress.skipped == 2
    assert objective.loads == reference.objective.loads and torch.equal(objective.kept, reference.objective.kept)
    for (name, value), other in zip(second.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_resume_under_other_numbers_is_noted(tmp_path):
    stop = {"asked": False}

    def ask(record, steps):
        stop["asked"] = record["step"] == 2

    with pytest.raises(Interrupted, match="step 2 of 8"):
        run(tmp_path, on_step=ask, should_stop=lambda: stop["asked"])
    run(tmp_path, dtype=torch.bfloat16, resume=2)
    (note,) = [x for x in metrics(tmp_path) if x["kind"] == "note"]
    assert "dtype was torch.float32 and is torch.bfloat16" in note["text"]


def test_a_stop_saves_where_it_is_and_the_last_step_is_an_end(tmp_path):
    for at in (random.randint(1, 7), 8):
        stop = {"asked": False}
        directory = tmp_path / str(at)

        def ask(record, steps, at=at, stop=stop):
            stop["asked"] = record["step"] >= at

        if at < 8:
            with pytest.raises(Interrupted):
                run(directory, on_step=ask, should_stop=lambda stop=stop: stop["asked"])
        else:
            run(directory, on_step=ask, should_stop=lambda stop=stop: stop["asked"])
        assert load_latest(directory)[0] == at


def test_updates_without_a_finite_gradient_are_skipped_and_counted(tmp_path):
    model = model_of()
    bad = sorted(random.sample(range(8), 3))
    states = []

    class Watched(Noise):
        def next_batch(self, step):
            states.append(copy.deepcopy(self.model.state_dict()))
            return super().next_batch(step)

    loop, records = run(tmp_path, model, Watched(model, bad=bad))
    states.append(model.state_dict())
    for step in range(8):
        same = all(torch.equal(a, b) for a, b in zip(states[step].values(), states[step + 1].values(), strict=True))
        assert same == (step in bad), "weights and router biases stay where the update was skipped"
    assert [r["skipped"] for r in records] == [sum(b <= step for b in bad) for step in range(8)]
    lines = [x for x in metrics(tmp_path) if x["kind"] == "step"]
    assert [x["grad_norm"] is None for x in lines] == [step in bad for step in range(8)], "null, not NaN, in the file"
    assert all(torch.isfinite(t).all() for t in model.state_dict().values()) and len(loop.objective.loads) == 5


def test_ten_bad_steps_in_a_row_end_the_run_where_no_rollback_is_allowed(tmp_path):
    model, table = model_of(), GuardTable(max_rollbacks=0)
    limit = table.rollback_after
    first = random.randint(3, 6)
    bad = [0, *range(first, first + limit)]  # one alone before does not count
    with pytest.raises(TrainingDiverged, match=f"{limit} steps in a row were bad") as error:
        run(tmp_path, model, Noise(model, steps=40, bad=bad), guard=table)
    assert "learning rate" in str(error.value) and isinstance(error.value, ValueError)
    assert [x for x in metrics(tmp_path) if x["kind"] == "step"][-1]["step"] == first + limit
    step, tensors, meta = load_latest(tmp_path)
    assert step == (first + limit - 1) // 3 * 3 and all(torch.isfinite(t).all() for t in tensors.values())
    assert load_step(tmp_path, meta["progress"]["good_step"])[0] == first // 3 * 3, "the last good state outlives later ones"
    almost = model_of()
    run(tmp_path / "almost", almost, Noise(almost, steps=20, bad=range(5, 5 + limit - 1)), guard=table)


def test_micro_batches_add_up_to_one_update(tmp_path):
    """Two micro-batches and one of both are the same gradient."""
    table = OptimizerTable(matrices="adamw", grad_clip=1e9)

    class Joined(Noise):
        def next_batch(self, step):
            return [[torch.cat(super().next_batch(step)[0])]]

        def loss(self, micro):
            parts = [Noise.loss(self, half) for half in micro.split(48)]
            return LossParts(parts[0].loss + parts[1].loss, parts[0].sums | {"tokens": 96}, parts[0].load_RE)

    _, apart = run(tmp_path / "a", optimizer=table)
    model = model_of()
    _, joined = run(tmp_path / "b", model, Joined(model), optimizer=table)
    for one, other in zip(apart[:3], joined[:3], strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert one["tokens"] == other["tokens"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_on_two_cores_give_the_same_bits(tmp_path, dtype):
    """One weight is used twice, and between its uses the other micro-batch ends: no cast of it may be shared or lost."""
    before, states = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            model = model_of()
            seen = set()

            class Watched(Noise):
                def next_batch(self, step):
                    batch = super().next_batch(step)
                    self.first = batch[0][0]
                    return batch

                def loss(self, micro, seen=seen, threads=threads):
                    seen.add(threading.current_thread())
                    hidden = self.model.forward_train(micro, torch.arange(16).repeat(3), [(3, 16)]).hidden_ND
                    one = self.model.logits(hidden[:24]).float()
                    if threads == 2 and micro is self.first:
                        time.sleep(0.05)
                    two = self.model.logits(hidden[24:-1]).float()
                    parts = super().loss(micro)
                    loss = parts.loss + torch.nn.functional.cross_entropy(torch.cat([one, two]), micro[1:])
                    return LossParts(loss, parts.sums, parts.load_RE)

            run(tmp_path / f"{len(states)}", model, Watched(model, steps=4), dtype)
            assert (threading.main_thread() in seen) == (threads == 1)
            assert torch.get_num_threads() == threads
            states.append(model.state_dict())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(states[0][name], state[name]) for state in states[1:] for name in state)


def test_gradients_are_clipped_to_the_norm_they_are_given(tmp_path):
    seen = []

    def hook(optimizer, args, kwargs):
        squares = sum(p.grad.square().sum().item() for g in optimizer.param_groups for p in g["params"] if p.grad is not None)
        seen.append(math.sqrt(squares))

    model = model_of()
    settings = LoopSettings("noise", tmp_path, OptimizerTable(matrices="adamw", grad_clip=0.01), 99, torch.float32, 0.0)
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        loop = Loop(model, Noise(model, steps=3), settings, log)
        loop.optimizers[0].register_step_pre_hook(hook)
        loop.run()
    assert seen == pytest.approx([0.01] * 3, rel=1e-3)
    assert all(x["grad_norm"] > 0.05 for x in metrics(tmp_path) if x["kind"] == "step"), "what is logged is before the clip"
