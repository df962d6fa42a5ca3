"""Train states: exact, checked, atomic; a full disk or a kill at any instant leaves a whole one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from jevons.store import train_state
from jevons.store.files import StoreError
from jevons.store.train_state import load_latest, save_train_state


def state():
    fused = torch.randn(6, 8)
    return {
        "fused": fused, "view": fused[2:4], "column": fused[:, 1], "scalar": torch.tensor(3.25, dtype=torch.float64),
        "bf16": torch.randn(5, dtype=torch.bfloat16), "rng": torch.get_rng_state(), "ids": torch.randint(0, 2**60, (4,)),
        "mask": torch.rand(7) > 0.5, "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(torch.randn(3)),
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def names(tmp_path):
    return sorted(p.name for p in (tmp_path / "train_state").iterdir())


def test_nothing_there(tmp_path):
    assert load_latest(tmp_path) is None
    (tmp_path / "train_state").mkdir()
    assert load_latest(tmp_path) is None


def test_round_trip_is_exact_and_two_are_kept(tmp_path):
    states = {step: state() for step in (5, 10, 99_999_999, 100_000_000)}
    for step, tensors in states.items():
        meta = {"metrics": step * 7, "loss": 0.1 + step, "nested": {"a": [1, None, "é"]}}
        save_train_state(tmp_path, step, tensors, meta)
        loaded_step, loaded, loaded_meta = load_latest(tmp_path)
        assert loaded_step == step and loaded_meta == meta and same(loaded, tensors)
    assert names(tmp_path) == ["step-100000000", "step-99999999"]


def test_no_pickle(tmp_path):
    path = save_train_state(tmp_path, 1, state(), {})
    assert sorted(p.name for p in path.iterdir()) == ["meta.json", "state.safetensors"]
    json.loads((path / "meta.json").read_text())


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "meta", "no meta", "foreign meta"])
def test_a_damaged_one_is_passed_over(tmp_path, damage, caplog):
    first = state()
    save_train_state(tmp_path, 1, first, {"step": "one"})
    path = save_train_state(tmp_path, 2, state(), {})
    file, meta = path / "state.safetensors", path / "meta.json"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[: random.randrange(len(data))])
    elif damage == "gone":
        file.unlink()
    elif damage == "no meta":
        meta.unlink()
    else:
        meta.write_text('{"step": 2' if damage == "meta" else '["step"]')
    step, tensors, loaded_meta = load_latest(tmp_path)
    assert step == 1 and same(tensors, first) and loaded_meta == {"step": "one"}
    assert "step-00000002" in caplog.text
    again = state()
    save_train_state(tmp_path, 2, again, {})  # reached again: the damaged one gives way
    assert load_latest(tmp_path)[0] == 2 and same(load_latest(tmp_path)[1], again)


def test_same_step_twice(tmp_path):
    save_train_state(tmp_path, 3, state(), {"n": 1})
    second = state()
    save_train_state(tmp_path, 3, second, {"n": 2})
    step, tensors, meta = load_latest(tmp_path)
    assert (step, meta) == (3, {"n": 2}) and same(tensors, second)
    assert names(tmp_path) == ["step-00000003"]


def test_leftovers_of_a_killed_process(tmp_path):
    first = state()
    path = save_train_state(tmp_path, 3, first, {})
    shutil.copytree(path, path.with_name("step-00000004.tmp-77"))
    os.rename(path, path.with_name("step-00000003.old-77"))  # killed between the two renames
    step, tensors, _ = load_latest(tmp_path)
    assert step == 3 and same(tensors, first)
    assert names(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("where", ["save_file", "fsync", "rename"])
def test_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch, where):
    first = state()
    save_train_state(tmp_path, 1, first, {})

    def full(*args):
        if where == "save_file":
            args[1].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os if where == "rename" else train_state, where, full)
        with pytest.raises(StoreError, match="step-00000002.*No space left"):
            save_train_state(tmp_path, 2, state(), {})
    assert names(tmp_path) == ["step-00000001"]
    assert load_latest(tmp_path)[0] == 1 and same(load_latest(tmp_path)[1], first)


def test_meta_that_json_cannot_hold(tmp_path):
    for bad in ({"x": object()}, {"x": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            save_train_state(tmp_path, 1, state(), bad)
    assert names(tmp_path) == []


LIMITED = """
import resource, signal, sys, torch
from jevons.store.files import StoreError
from jevons.store.train_state import load_latest, save_train_state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save_train_state(sys.argv[1], 1, {"a": torch.arange(100)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_train_state(sys.argv[1], 2, {"a": torch.zeros(1_000_000)}, {})
except StoreError as error:
    print(error)
"""


def test_a_real_refusal_of_the_file_system(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "step-00000002 could not be written" in done.stdout
    assert names(tmp_path) == ["step-00000001"]
    assert torch.equal(load_latest(tmp_path)[1]["a"], torch.arange(100))


SAVING = """
import sys, torch
from jevons.store.train_state import load_latest, save_train_state
torch.set_num_threads(1)
found = load_latest(sys.argv[1])
step = found[0] if found else 0
while True:
    step += 1
    save_train_state(sys.argv[1], step, {f"t{i}": torch.full((20_000,), step + i) for i in range(8)}, {"n": step})
    print(step, flush=True)
"""


def test_kill_at_any_instant(tmp_path):
    """What was reported as saved is there after kill -9, whole, and the next process goes on from it."""
    reported = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", SAVING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(random.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        reported = max([reported, *map(int, output.split())])
        step, tensors, meta = load_latest(tmp_path)
        assert step >= reported and meta == {"n": step}
        assert all(torch.equal(tensors[f"t{i}"], torch.full((20_000,), step + i)) for i in range(8))
        assert len(names(tmp_path)) <= 3  # the kill may fall between the rename and the removal of the oldest
