"""The GPU benchmarks without a GPU: each says so and ends; and each runs as a rehearsal, tiny, on the CPU."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from jevons.numerics import triton_mla

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks"
OURS = ["gpu_mla_decode.py", "gpu_engine.py", "gpu_offload.py", "gpu_all.py"]


@pytest.fixture
def run(monkeypatch):
    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        monkeypatch.syspath_prepend(str(SCRIPTS))
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")

    return call


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", OURS)
def test_without_a_gpu_each_says_so(script, run):
    with pytest.raises(SystemExit, match="needs a CUDA device"):  # a text ends the process with status 1
        run(script)


@pytest.mark.skipif(triton_mla.triton is None, reason="triton is not installed")
def test_the_attention_kernel_compiles_for_a_card_that_is_not_here(run, tmp_path):
    """Into its shared memory, without spilling, loads overlapped: what the interpreter cannot tell."""
    run("gpu_compile.py", "--only", "16 heads", "--target", "89", "--json", tmp_path / "rows.json")
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["shared"] <= row["limit"] and row["spilled"] == 0 and row["mma"] > 0 and row["cp.async"] > 0


@pytest.mark.parametrize("script,columns", [
    ("gpu_mla_decode.py", {"floor us", "of floor", "splits", "best"}),
    ("gpu_engine.py", {"eager ms", "floor ms", "same", "replays"}),
    ("gpu_offload.py", {"hit rate", "floor ms", "RAM MB a step"}),
])
def test_each_can_be_rehearsed(script, columns, run, tmp_path, capsys):
    """That static steps say what eager ones do, test_graphs.py holds, in float32: in bf16 near-ties fall either way."""
    run(script, "--rehearse", "--json", tmp_path / "rows.json")
    said = json.loads((tmp_path / "rows.json").read_text())
    assert said["device"] == "rehearsal" and said["rows"] and all(columns <= row.keys() for row in said["rows"])
    assert "against float64" in capsys.readouterr().out
