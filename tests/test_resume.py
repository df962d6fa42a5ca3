"""Killed, interrupted or out of disk at any moment: the same command goes on, and ends with the same numbers."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from whole_runs import RECIPE, SAVE_EVERY, TESTS, Command, digest, jevons, last_step, metrics, timeless, write_recipe

WEIGHTS = "final/model.safetensors"
STAGES = {"pretrain": "stages/00-pretrain", "grpo": "stages/01-grpo", "eval": "stages/02-eval"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(recipe, run directory) of a run that nothing disturbed."""
    home = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(home)
    code, text = jevons("run", recipe, "--out", home / "out", log=home / "log")
    assert code == 0, text
    lines = metrics(home / "out")
    assert [x["kind"] for x in lines if x["kind"] not in ("step", "samples")] == [
        "run", "stage", "plan", "memory", "stage", "stage", "plan", "memory", "stage", "stage", "eval", "eval", "stage", "done"]
    assert last_step(home / "out", "pretrain") == 9 and last_step(home / "out", "grpo") == 5
    assert any("loss" in x for x in lines if x.get("stage") == "grpo"), "no group had spread: this run would test little"
    return recipe, home / "out"


def assert_same(out: Path, whole: Path) -> None:
    assert timeless(metrics(out)) == timeless(metrics(whole))
    assert digest(out / WEIGHTS) == digest(whole / WEIGHTS)
    for stage in ("pretrain", "grpo"):
        assert digest(out / STAGES[stage] / "model.safetensors") == digest(whole / STAGES[stage] / "model.safetensors")


def slow_disk() -> None:
    """Every flush takes a while, so that kills land within saves."""
    flush = os.fsync
    os.fsync = lambda handle: (time.sleep(0.004), flush(handle))[1]


def slow_disk_and_engine() -> None:
    """Evaluation lasts long enough to be stopped in."""
    from jevons.engine.engine import Engine

    slow_disk()
    step = Engine.step
    Engine.step = lambda self: (time.sleep(0.02), step(self))[1]


def saved_step(directory: Path) -> int:
    """The newest whole state, by the names alone."""
    names = [p.name for p in directory.glob("train_state/step-*")]
    return max((int(n[5:]) for n in names if n[5:].isdigit()), default=0)


def assert_little_lost(out: Path) -> None:
    """What was logged since the last saved state, and so has to be done again, is at most one interval, and one more while a
    thread still writes."""
    for stage in ("pretrain", "grpo"):
        directory = out / STAGES[stage]
        if not (directory / "provenance.json").exists():
            assert last_step(out, stage) - saved_step(directory) <= 2 * SAVE_EVERY


def test_killed_anywhere_it_ends_with_the_same_numbers(tmp_path, whole):
    recipe, reference = whole
    out = tmp_path / "out"

    def exists(pattern):
        return lambda: any(out.glob(pattern))

    def reached(stage, step):
        return lambda: last_step(out, stage) >= step

    moments = {
        "before anything": lambda: True,
        "tokenizer": exists("recipe.toml"),
        "stage begun": exists("stages/00-pretrain/begin.json"),
        "first state, unfinished": exists("stages/00-pretrain/train_state/step-00000002.tmp-*"),
        "first state": exists("stages/00-pretrain/train_state/step-00000002"),
        "a step": reached("pretrain", random.randint(3, 8)),
        "last state": exists("stages/00-pretrain/train_state/step-00000009"),
        "checkpoint, unfinished": exists("stages/00-pretrain/.unfinished/model.safetensors"),
        "checkpoint": exists("stages/00-pretrain/provenance.json"),
        "rollouts": exists("stages/01-grpo/begin.json"),
        "second stage's state, unfinished": exists("stages/01-grpo/train_state/step-*.tmp-*/state.safetensors"),
        "second stage's step": reached("grpo", random.randint(2, 5)),
        "second stage's checkpoint, unfinished": exists("stages/01-grpo/.unfinished"),
        "evaluation": exists("stages/02-eval/begin.json"),
        "evaluation done": exists("stages/02-eval/results.json"),
        "final, unfinished": exists("final/.unfinished"),
        "final": exists("final/provenance.json"),
    }
    chosen = sorted(random.sample(range(len(moments)), 14))
    for name in [list(moments)[i] for i in chosen]:
        command = Command("run", recipe, "--out", out, log=tmp_path / "log", patch=slow_disk)
        command.wait_for(moments[name])
        time.sleep(random.choice((0, 0.005, 0.02, 0.05)))
        command.send(signal.SIGKILL) if command.process.is_alive() else None
        assert command.end() in (-signal.SIGKILL, 0), f"killed at {name!r}: {command.text}"
        assert_little_lost(out)
    code, text = jevons("run", recipe, "--out", out, log=tmp_path / "log")
    assert code == 0, text
    assert_same(out, reference)
    assert not list(out.glob("stages/*/train_state")) and not list(out.rglob("*.tmp-*")) and not list(out.rglob(".unfinished"))


def test_stopped_once_in_every_stage_it_saves_and_goes_on(tmp_path, whole):
    recipe, reference = whole
    out = tmp_path / "out"
    begun = {"tokenizer": out / "recipe.toml", "eval": out / STAGES["eval"] / "begin.json"}
    for stage in ("tokenizer", "pretrain", "grpo", "eval"):
        command = Command("run", recipe, "--out", out, log=tmp_path / "log", patch=slow_disk_and_engine)
        at = random.randint(1, 3)
        condition = begun[stage].exists if stage in begun else lambda stage=stage, at=at: last_step(out, stage) >= at
        assert command.wait_for(condition), command.text
        number = random.choice((signal.SIGINT, signal.SIGTERM))
        command.send(number)
        assert command.end() == 128 + number, command.text
        assert "The same command goes on from there" in command.text and "Traceback" not in command.text
        if stage in ("pretrain", "grpo"):
            assert last_step(out, stage) == saved_step(out / STAGES[stage]) >= at, "a stop loses nothing"
    code, text = jevons("run", recipe, "--out", out, log=tmp_path / "log")
    assert code == 0, text
    assert_same(out, reference)


def test_the_experiment_that_kills_and_compares(tmp_path):
    script = TESTS.parent / "experiments" / "kill_and_resume.py"
    arguments = ["--kills", "1", "--tokens", "6000", "--steps", "1", "--dir", str(tmp_path)]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, env=os.environ | {
        "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "metrics but time.*   the same" in done.stdout and "final weights        the same" in done.stdout


def slow_rollouts() -> None:
    """Each step of the engine takes a while and says so."""
    from jevons.engine.engine import Engine

    step = Engine.step
    Engine.step = lambda self: (time.sleep(0.1), os.write(2, b"<engine>"), step(self))[2]


def test_a_machine_that_is_taken_away_during_rollouts(tmp_path, whole):
    """The state is saved within an engine step, not after the training step, and nothing differs afterwards."""
    recipe, reference = whole
    out = tmp_path / "out"
    command = Command("run", recipe, "--out", out, log=tmp_path / "log", patch=slow_rollouts)
    assert command.wait_for(lambda: last_step(out, "grpo") >= 1), command.text
    begun = command.text.count("<engine>")
    assert command.wait_for(lambda: command.text.count("<engine>") > begun + 1), command.text
    at = last_step(out, "grpo")
    command.send(signal.SIGTERM)
    assert command.end() == 143, command.text
    after = command.text.partition("once more to stop at once")[2]
    assert after.count("<engine>") <= 1 and "The same command goes on from there" in after
    assert last_step(out, "grpo") == saved_step(out / STAGES["grpo"]) == at
    code, text = jevons("run", recipe, "--out", out, log=tmp_path / "log")
    assert code == 0, text
    assert_same(out, reference)


def _stuck(*_, **__):
    while True:  # a signal that comes right before a sleep is handled only after it
        time.sleep(0.01)


def stuck_tokenizer() -> None:
    from jevons.reason import pipeline

    pipeline.train_tokenizer = _stuck


def stuck_pretrain() -> None:
    from jevons.train.pretrain import Pretrain

    Pretrain.after_update = _stuck


def stuck_grpo() -> None:
    from jevons.reason.grpo import GRPO

    GRPO.loss = _stuck


def stuck_eval() -> None:
    from jevons.reason import pipeline

    pipeline.evaluate = _stuck


def test_stopped_twice_it_ends_at_once(tmp_path, whole):
    recipe, reference = whole
    out = tmp_path / "out"
    begun = {"tokenizer": out / "recipe.toml"} | {s: out / d / "begin.json" for s, d in STAGES.items()}
    patches = {"tokenizer": stuck_tokenizer, "pretrain": stuck_pretrain, "grpo": stuck_grpo, "eval": stuck_eval}
    for stage, patch in patches.items():
        command = Command("run", recipe, "--out", out, log=tmp_path / "log", patch=patch)
        assert command.wait_for(begun[stage].exists), command.text
        number = random.choice((signal.SIGINT, signal.SIGTERM))
        command.send(number)
        assert command.wait_for(lambda c=command: "once more to stop at once" in c.text), command.text
        assert command.process.is_alive()
        command.send(number)
        assert command.end() == 128 + number, command.text
    code, text = jevons("run", recipe, "--out", out, log=tmp_path / "log")
    assert code == 0, text
    assert_same(out, reference)


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))


def test_a_full_disk_is_said_and_the_last_state_stays(tmp_path, whole):
    recipe, reference = whole
    out = tmp_path / "out"
    command = Command("run", recipe, "--out", out, log=tmp_path / "log", patch=slow_disk)
    assert command.wait_for(lambda: last_step(out, "pretrain") >= 3), command.text
    command.send(signal.SIGINT)
    assert command.end() == 130
    kept = saved_step(out / STAGES["pretrain"])
    code, text = jevons("run", recipe, "--out", out, log=tmp_path / "log", patch=small_files)
    assert code == 1 and text.splitlines()[-1].startswith(f"error: {out}") and "Traceback" not in text
    assert "train_state/step-" in text and "could not be written" in text
    assert saved_step(out / STAGES["pretrain"]) == kept >= 3
    code, text = jevons("run", recipe, "--out", out, log=tmp_path / "log")
    assert code == 0, text
    assert_same(out, reference)


def test_a_run_in_use_and_an_edited_recipe_are_refused(tmp_path):
    recipe = write_recipe(tmp_path)
    out = tmp_path / "out"
    first = Command("run", recipe, "--out", out, log=tmp_path / "first", patch=stuck_pretrain)
    assert first.wait_for((out / STAGES["pretrain"] / "begin.json").exists)
    code, text = jevons("run", recipe, "--out", out, log=tmp_path / "log")
    assert code == 1 and text == f"error: {out} is in use by process {first.process.pid}; end it, or give another --out\n"
    first.send(signal.SIGKILL)
    first.end()
    recipe.write_text(RECIPE.replace("steps = 5", "steps = 50"))
    code, text = jevons("run", recipe, "--out", out, log=tmp_path / "log")
    assert code == 1 and "Traceback" not in text
    assert "-steps = 5\n" in text and "+steps = 50\n" in text and "give another --out" in text


def nan_losses() -> None:
    from jevons.train.pretrain import Pretrain

    loss = Pretrain.loss

    def spoilt(self, batch):
        parts = loss(self, batch)
        parts.loss = parts.loss * float("nan")
        return parts

    Pretrain.loss = spoilt


def test_a_run_that_diverged_says_so_in_one_line(tmp_path):
    recipe = write_recipe(tmp_path, RECIPE.replace("tokens = 4_500", "tokens = 10_000"))
    out = tmp_path / "out"
    code, text = jevons("run", recipe, "--out", out, log=tmp_path / "log", patch=nan_losses)
    assert code == 1 and "Traceback" not in text
    assert "error: 10 steps in a row were bad (stage pretrain, step 10; the last: the gradient norm is nan)" in text
    assert [x["skipped"] for x in metrics(out) if x["kind"] == "step"] == list(range(1, 11))
    assert all(x["loss"] is not None for x in metrics(out) if x["kind"] == "step"), "the loss itself was finite"
    bad = [x for x in metrics(out) if x["kind"] == "bad_batch"]
    assert [x["step"] for x in bad] == list(range(1, 11)) and len({x["ids_sha256"] for x in bad}) == 10
    assert all(x["why"] == "the gradient norm is nan" and x["first_text"] for x in bad)
