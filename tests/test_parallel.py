"""Many processes against one: every layout trains to the same weights, states go from any layout to any other, and a process
that dies ends the others with a sentence."""

import dataclasses
import json
import os
import random
import shutil
import signal
import time

import parallel_worker as worker
import pytest
import torch
from safetensors.torch import load_file
from test_distil import TOKENIZER, talkative, teacher_model
from whole_runs import metrics, write_recipe

from jevons.numerics import Fp8
from jevons.recipe import MeshError, MeshTable, RecipeError, parse_recipe
from jevons.recipe.mesh import check_model, check_processes, override, spread_stage
from jevons.store.checkpoint import load_checkpoint, save_checkpoint
from jevons.train.parallel.experts import from_bytes, to_bytes
from jevons.train.parallel.mesh import share_out

pytestmark = pytest.mark.timeout(600)  # where many other programs want the cores, each message waits for its turn
CLOSE = 1e-9  # over 4 steps; benchmarks/parallel_parity.py takes 20, in float32 too
STEPS, KEPT = 4, 2  # states every two steps, the last two kept
TWO = {"fsdp own": dict(data=2, train=dict(reads_own=True)), "fsdp": dict(data=2), "experts": dict(expert=2),
       "1f1b": dict(pipeline=2), "zbv": dict(pipeline=2, schedule="zbv", train=dict(recompute=True)),
       "dualpipev": dict(pipeline=2, schedule="dualpipev")}
FOUR = {"fsdp": dict(data=4), "experts": dict(expert=4), "both": dict(data=2, expert=2, train=dict(recompute=True))}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return worker.train(tmp_path_factory.mktemp("alone"), save_every=KEPT)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """(results, directory) of the layouts of four."""
    directory = tmp_path_factory.mktemp("four")
    return worker.run(4, worker.layouts, (FOUR, directory, dict(save_every=KEPT)), directory), directory


def hold(result, alone, since=0):
    alone = dataclasses.replace(alone, losses=alone.losses[since:], norms=alone.norms[since:], loads=alone.loads[since:])
    assert worker.difference(result, alone) < CLOSE
    assert result.loads == alone.loads, "every token of every process counts in the routers' load"
    for gate, other in zip(result.model.routers(), alone.model.routers(), strict=True):
        assert torch.allclose(gate.e_score_correction_bias, other.e_score_correction_bias, rtol=0, atol=1e-6)


def test_two_processes_train_to_what_one_trains_to(alone, tmp_path):
    assert alone.losses[-1] < alone.losses[0] and len(alone.losses) == STEPS
    assert all(worker.difference(alone, dataclasses.replace(alone, model=m)) > 1e-4 for m in (alone.averaged, alone.best))
    tables = {name: table for name, table in TWO.items() if name != "fsdp"}  # which four are, and go on as two
    results = worker.run(2, worker.layouts, (tables, tmp_path, dict(save_every=KEPT)), tmp_path)
    assert list(results) == list(tables)
    for result in results.values():
        hold(result, alone)


def test_four_processes_train_to_what_one_trains_to(alone, four):
    for name in FOUR:
        hold(four[0][name], alone)


def test_four_go_on_as_two_and_as_one(alone, four, tmp_path):
    """From the step before the last, saved while training went on."""
    left = four[1] / "both" / "train_state"
    assert sorted(p.name for p in left.iterdir()) == ["dcp-00000002", "dcp-00000004"]
    for name in ("fsdp", "dualpipev", "one"):
        shutil.copytree(left.parent, tmp_path / name)
        shutil.rmtree(tmp_path / name / "train_state" / "dcp-00000004")
    hold(worker.train(tmp_path / "one", save_every=KEPT), alone, KEPT)
    two = {name: TWO[name] for name in ("fsdp", "dualpipev")}
    for result in worker.run(2, worker.layouts, (two, tmp_path, dict(save_every=KEPT)), tmp_path).values():
        hold(result, alone, KEPT)
    hold(worker.train(tmp_path / "one"), alone, STEPS)  # nothing left to do, from two or from one


def test_a_state_counts_once_it_is_whole(alone, four, tmp_path):
    """A save that was cut off, and a file that lost its end: the step before is what counts."""
    shutil.copytree(four[1] / "experts", tmp_path, dirs_exist_ok=True)
    left = tmp_path / "train_state"
    (left / "dcp-00000025.tmp").mkdir()
    (left / "dcp-00000030").mkdir()
    short = random.choice(sorted((left / "dcp-00000004").glob("__*")))
    short.write_bytes(short.read_bytes()[:-1])
    hold(worker.train(tmp_path), alone, KEPT)
    assert not (left / "dcp-00000025.tmp").exists()


def test_one_goes_on_as_two(alone, tmp_path):
    worker.train(tmp_path / "1f1b", save_every=KEPT)
    shutil.rmtree(tmp_path / "1f1b" / "train_state" / "step-00000004")
    shutil.copytree(tmp_path / "1f1b", tmp_path / "experts", symlinks=True)
    two = {name: TWO[name] for name in ("1f1b", "experts")}
    for result in worker.run(2, worker.layouts, (two, tmp_path, {}), tmp_path).values():
        hold(result, alone, KEPT)


def test_gathered_weights_make_a_checkpoint(four, tmp_path):
    model = four[0]["both"].model.float()
    save_checkpoint(tmp_path, model, None, {})
    loaded = load_checkpoint(tmp_path, need_tokenizer=False).model
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_fp8_on_two_processes(tmp_path):
    """Training in FP8 is what one process makes of it: tiles are the same whatever is sharded, and in float64 around them only
    experts' float32 sums differ, by the company of their rows. Dispatch in FP8: other numbers, the same course."""
    tiles, small = dict(fp8=Fp8(), matrices="adamw"), dict(dtype=torch.float32, micros=2)
    again = tiles | dict(recompute=True)
    tables = {"fsdp": dict(data=2, train=again), "experts": dict(expert=2, train=again), "1f1b": dict(pipeline=2, train=again),
              "dispatch": dict(expert=2, fp8_dispatch=True, train=small)}
    results = worker.run(2, worker.layouts, (tables, tmp_path, {}), tmp_path)
    alone = worker.train(tmp_path / "alone", **tiles)
    far = worker.difference(worker.train(tmp_path / "not", matrices="adamw"), alone)
    gaps = {name: worker.difference(results[name], alone) for name in ("fsdp", "experts", "1f1b")}
    assert gaps["fsdp"] < CLOSE and gaps["1f1b"] < CLOSE and gaps["experts"] < 1e-4 < far / 100, (gaps, far)
    plain, dispatch = worker.train(tmp_path / "plain", **small).losses, results["dispatch"].losses
    assert plain != dispatch
    assert all(abs(a - b) / a < 0.02 for a, b in zip(plain, dispatch, strict=True)), (plain, dispatch)


def test_tiles():
    """Against float64: an element is off by at most 2^-4 of its own size, or by half the smallest step of its tile."""
    n, d = random.randint(1, 9), random.choice([1, 127, 128, 129, 300])
    x = torch.randn(n, d) * 10 ** torch.empty(n, d).uniform_(-12, 3)
    x[0], x[-1, 0] = 0, 1e5
    codes, exponents = to_bytes(x)
    assert codes.dtype == exponents.dtype == torch.uint8 and exponents.shape == (n, -(-d // 128))
    scale = (exponents.double() - 127).exp2().repeat_interleave(128, 1)[:, :d]
    back = from_bytes(codes, exponents, torch.float32).double()
    assert ((back - x.double()).abs() <= torch.maximum(x.double().abs() / 16, scale * 2**-10)).all()
    largest = torch.stack([t.abs().amax(1) for t in x.double().split(128, 1)], 1)
    tight = (exponents.double() - 127).exp2() * 448
    assert ((largest <= tight) & ((largest > tight / 2) | (largest == 0))).all(), "the least power of two that holds the tile"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_gone_ends_the_other_with_a_sentence(tmp_path, how):
    layout = random.choice([dict(data=2), dict(expert=2), dict(pipeline=2)])
    processes, outs = worker.start(2, worker.until_lost, (layout | dict(timeout=15.0), tmp_path), tmp_path)
    try:
        end = time.monotonic() + 200
        while not list(tmp_path.glob("train_state/dcp-*[0-9]")) and time.monotonic() < end:
            time.sleep(0.05)
        victim = random.randrange(2)
        os.kill(processes[victim].pid, how)
        began = time.monotonic()
        processes[1 - victim].join(100)
        assert processes[1 - victim].exitcode == 0 and time.monotonic() - began < 90
        message = outs[1 - victim].read_bytes()
        assert b"another of the run's 2 processes died, or did not answer for 15 s" in message
    finally:
        for process in processes:
            process.kill()
    kept = sorted(p.name for p in (tmp_path / "train_state").glob("dcp-*") if not p.name.endswith(".tmp"))
    step = int(kept[-1][4:])
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    result = worker.train(tmp_path, steps=step + 1)  # the run goes on with fewer processes
    assert len(result.losses) == 1
    for record in logged:
        if record["kind"] == "step" and record["step"] == step + 1:  # made, and not saved
            assert result.losses[0] == pytest.approx(record["loss"], rel=CLOSE)


WHOLE = """
name = "nano"
seed = 5
[model]
preset = "v3-nano"
[task]
name = "own_tasks.py:Traced"
[mesh]
data = 2
[tokenizer]
vocab_size = 288
samples = 60
[[stages]]
kind = "pretrain"
tokens = 1_500
batch_tokens = 500
micro_batch_tokens = 250
[[stages]]
kind = "grpo"
steps = 2
problems = 3
group_size = 4
max_tokens = 10
[[stages]]
kind = "distil"
teacher = "teacher"
student = { preset = "qwen2-nano" }
mode = "logits"
problems = 130
max_tokens = 20
keep = "all"
epochs = 1
micro_batch_tokens = 200
ema_decay = 0.8
[[stages]]
kind = "eval"
n = 2
max_tokens = 4
[guard]
use_best = true
"""


def test_one_command_runs_every_stage(tmp_path):
    """Pretraining sharded, rollouts and a teacher's answers shared out, evaluation by the leader: what is logged is what one
    process logs."""
    write_recipe(tmp_path, WHOLE)
    save_checkpoint(tmp_path / "teacher", talkative(teacher_model()), TOKENIZER, {})
    assert worker.run(2, worker.whole_run, (["--out", "two"], tmp_path), tmp_path) == 0
    assert worker.run(1, worker.whole_run, (["--out", "one", "--mesh", "data=1"], tmp_path), tmp_path) == 0
    two, one = (metrics(tmp_path / name) for name in ("two", "one"))
    assert [(x["kind"], x.get("stage"), x.get("step")) for x in two] == [(x["kind"], x.get("stage"), x.get("step")) for x in one]
    steps = [(a, b) for a, b in zip(two, one, strict=True) if a["kind"] == "step"]
    assert [a["stage"] for a, _ in steps] == ["pretrain"] * 3 + ["grpo"] * 2 + ["distil"] * (len(steps) - 5)
    for a, b in steps[:4] + steps[5:]:
        assert a.keys() == b.keys() and a["tokens"] == b["tokens"]
        if "loss" in b:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-2, abs=1e-3)
    first, other = steps[3]
    for key in ("reward", "length", "truncated", "zero_spread", "accuracy"):
        assert first[key] == other[key], key
    assert (tmp_path / "two" / "final" / "model.safetensors").stat().st_size > 0
    taught = [tmp_path / name / "stages" / "02-distil" for name in ("two", "one")]
    traces = [(directory / "traces.jsonl").read_bytes() for directory in taught]
    assert len(steps) > 5 and traces[0] == traces[1] and traces[0].count(b"\n") > 10
    for kind in (".", "ema"):
        a, b = (load_file(directory / kind / "model.safetensors") for directory in taught)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


def test_everyone_gets_as_many():
    items, places = list(range(random.randint(1, 9))), random.randint(1, 4)
    shares = [share_out(items, place, places) for place in range(places)]
    assert len({len(s) for s in shares}) == 1
    assert sorted(i for s in shares for i, real in s if real) == items


RECIPE = """
name = "x"
[model]
preset = "v3-nano"
[mesh]
{mesh}
[[stages]]
kind = "pretrain"
tokens = 4000
batch_tokens = 1000
{stage}
"""


def test_a_mesh_that_does_not_fit_is_refused_with_its_numbers():
    def mesh(**values):
        return MeshTable(**values)

    config = worker.tiny()
    check_model(mesh(data=2, expert=2), config)
    for table, words in [
        (mesh(expert=3), "8 routed experts do not divide by mesh.expert = 3"),
        (mesh(expert=2, data=3), "which does not divide by mesh.data = 3"),
        (mesh(pipeline=5), "4 layers do not fill 5 stages"),
        (mesh(pipeline=3, schedule="zbv"), "4 layers do not fill 6 stages .* mesh.pipeline = 2 would be the most"),
        (mesh(pipeline=2, schedule="dualpipev", micro_batches=3), "mesh.micro_batches = 3 does not fill 4 stages"),
    ]:
        with pytest.raises(MeshError, match=words):
            check_model(table, config)
    with pytest.raises(MeshError, match="the model has no routed experts"):
        check_model(mesh(expert=2), config.model_copy(update={"n_routed_experts": None}))
    with pytest.raises(MeshError, match="tie_word_embeddings"):
        check_model(mesh(pipeline=2), config.model_copy(update={"tie_word_embeddings": True}))
    with pytest.raises(MeshError, match="needs 4 processes and there is one.*torchrun --nproc-per-node 4"):
        check_processes(mesh(data=2, expert=2), 1)
    with pytest.raises(MeshError, match="needs one process and there are 2"):
        check_processes(mesh(), 2)


def test_recipes_name_a_mesh_in_a_line():
    recipe = parse_recipe(RECIPE.format(mesh="data = 2\nexpert = 2", stage=""))
    assert recipe.mesh.size == recipe.mesh.replicas == 4
    assert spread_stage(recipe.mesh, recipe.stages[0], "p").micro_batch_tokens == 250
    assert spread_stage(MeshTable(), recipe.stages[0], "p") == recipe.stages[0]
    assert spread_stage(MeshTable(pipeline=2), recipe.stages[0], "p").micro_batch_tokens == 250
    fixed = parse_recipe(RECIPE.format(mesh="", stage="micro_batch_tokens = 334")).stages[0]
    with pytest.raises(MeshError, match="is 3 micro-batches; a multiple of 2 from 2 on"):
        spread_stage(MeshTable(data=2), fixed, "p")
    with pytest.raises(MeshError, match="is 3 micro-batches; mesh.micro_batches = 2 for each of 1 would be 2"):
        spread_stage(MeshTable(pipeline=2, micro_batches=2), fixed, "p")
    with pytest.raises(RecipeError, match="unknown key `mesh.experts`; the nearest known key is `mesh.expert`"):
        parse_recipe(RECIPE.format(mesh="experts = 2", stage=""))
    with pytest.raises(RecipeError, match="mesh.data"):
        parse_recipe(RECIPE.format(mesh="data = 0", stage=""))
    assert override(recipe.mesh, "data=2") == MeshTable(data=2)
    assert override(MeshTable(data=8, timeout=5), "expert = 2, schedule=zbv") == MeshTable(expert=2, schedule="zbv", timeout=5)
    for text in ("data", "dat=2", "data=x"):
        with pytest.raises(MeshError, match="--mesh"):
            override(recipe.mesh, text)
