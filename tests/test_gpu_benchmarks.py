"""The GPU benchmarks without a GPU: each says so and ends; and each runs as a rehearsal, tiny, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks"
OURS = ["gpu_mla_decode.py", "gpu_engine.py", "gpu_offload.py", "gpu_all.py"]


def run(script, *flags):
    env = os.environ | {"PYTHONPATH": str(SCRIPTS.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(SCRIPTS / script), *flags], capture_output=True, text=True, env=env, timeout=280)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", OURS)
def test_without_a_gpu_each_says_so(script):
    done = run(script)
    assert done.returncode == 1 and "needs a CUDA device" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script,columns", [
    ("gpu_mla_decode.py", {"floor us", "of floor", "splits", "best"}),
    ("gpu_engine.py", {"eager ms", "floor ms", "same", "replays"}),
    ("gpu_offload.py", {"hit rate", "floor ms", "RAM MB a step"}),
])
def test_each_can_be_rehearsed(script, columns, tmp_path):
    done = run(script, "--rehearse", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads((tmp_path / "rows.json").read_text())
    assert said["device"] == "rehearsal" and said["rows"] and all(columns <= row.keys() for row in said["rows"])
    assert "against float64" in done.stdout
    assert all(row.get("same", 1.0) == 1.0 for row in said["rows"])  # static steps say what eager ones do
