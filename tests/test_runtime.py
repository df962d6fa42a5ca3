"""What the machine is asked, and what it answers without a compiler or a GPU."""

import json
import os

import pytest
import torch

from jevons.runtime import Runtime, find_compiler, physical_cores


def test_describe_is_plain_and_true():
    runtime = Runtime.detect("cpu")
    values = json.loads(json.dumps(runtime.describe()))
    assert values["device"] == "cpu" and values["torch"] == torch.__version__
    assert 1 <= runtime.threads <= os.cpu_count()
    assert runtime.dtype in (torch.float32, torch.bfloat16)
    assert "gpu" not in values


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert find_compiler() is None
    assert "eagerly" in Runtime.detect("cpu").describe()["compiled"]
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert Runtime.detect("cpu").has_compiler


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_threads_follow_affinity():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="'tpu'"):
        Runtime.detect("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            Runtime.detect("cuda")
