"""The run directory: one run at a time, one recipe per run, and metrics that go back with the checkpoint."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys

import pytest
import torch

from jevons.store.files import StoreError
from jevons.store.run_dir import MetricsLog, RunDir, RunDirError


def test_paths(tmp_path):
    run = RunDir(tmp_path)
    assert run.stage(1, "grpo") == tmp_path / "stages" / "01-grpo"
    assert run.final == tmp_path / "final" and run.metrics.name == "metrics.jsonl"


HOLDER = """
import sys
from jevons.store.run_dir import RunDir
with RunDir(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["close", "kill"])
def test_second_run_is_refused_until_the_first_ends(tmp_path, end):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirError, match=f"in use by process {holder.pid}"), RunDir(tmp_path / "out").lock():
            pass
    finally:
        if end == "kill":
            holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with RunDir(tmp_path / "out").lock():
        assert (tmp_path / "out" / "lock").read_text() == str(os.getpid())
        with pytest.raises(RunDirError, match=str(os.getpid())), RunDir(tmp_path / "out").lock():
            pass
    assert (tmp_path / "out" / "lock").read_text() == ""


def test_recipe_is_kept_exactly_and_an_edit_is_shown(tmp_path):
    run = RunDir(tmp_path / "a" / "b")
    text = 'name = "x"\r\nseed = 1\n# naïve\n'
    assert run.keep_recipe(text) is False
    assert run.recipe.read_bytes() == text.encode()
    assert run.keep_recipe(text) is True
    with pytest.raises(RunDirError) as error:
        run.keep_recipe(text.replace("seed = 1", "seed = 2"))
    assert "-seed = 1" in str(error.value) and "+seed = 2" in str(error.value)
    with pytest.raises(RunDirError, match="line endings"):
        run.keep_recipe(text.replace("\r", ""))
    assert run.recipe.read_bytes() == text.encode()


def test_a_directory_of_something_else_is_refused(tmp_path):
    with RunDir(tmp_path).lock():
        assert RunDir(tmp_path).keep_recipe("a") is False  # only the lock was there
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(RunDirError, match=re.escape("thesis.tex")):
        RunDir(tmp_path / "other").keep_recipe("a")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_metrics_go_back_to_a_noted_position(tmp_path):
    path, rng = tmp_path / "metrics.jsonl", random.Random()
    records = [{"step": i, "loss": rng.random(), "text": "é\n\x85\u2028\u2029" * rng.randrange(3)} for i in range(20)]
    keep = rng.randrange(1, 20)
    with MetricsLog(path) as log:
        for record in records[:keep]:
            log.append(record)
        position = log.position()
        for record in records[keep:]:
            log.append(record)
    assert lines(path) == records and position < path.stat().st_size
    with MetricsLog(path) as log:
        log.truncate(position)
        assert lines(path) == records[:keep]
        log.append({"step": "next"})
        assert lines(path) == [*records[:keep], {"step": "next"}]
        log.truncate(0)
        assert path.read_bytes() == b""


def test_a_line_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    with MetricsLog(path) as log:
        log.append({"step": 3})
    assert lines(path) == [{"step": 1}, {"step": 3}]


def test_edited_metrics_are_noticed(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append({"step": 1})
        for position in (5, 1000):
            with pytest.raises(RunDirError, match=f"byte {position}"):
                log.truncate(position)
        assert lines(log.path) == [{"step": 1}]


def test_values_that_json_lacks(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append({"a": math.nan, "b": [math.inf, torch.tensor(2)], "c": torch.tensor([[0.5, 1.0]]), "d": (1, True)})
        assert lines(log.path) == [{"a": None, "b": [None, 2], "c": [[0.5, 1.0]], "d": [1, True]}]


FULL = """
import resource, signal, sys
from jevons.store.files import StoreError
from jevons.store.run_dir import MetricsLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
log = MetricsLog(sys.argv[1])
log.append({"step": 1})
try:
    log.append({"text": "x" * 100})
except StoreError as error:
    print(error)
log.append({"step": 2})
"""


def test_a_disk_that_refuses_leaves_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    assert "could not be written" in done.stdout and str(path) in done.stdout
    assert lines(path) == [{"step": 1}, {"step": 2}]


def test_a_recipe_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        RunDir(tmp_path / "x").keep_recipe("a")
    assert list((tmp_path / "x").iterdir()) == []
