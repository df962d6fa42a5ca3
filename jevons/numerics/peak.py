"""What this machine multiplies at most: the rate that measured figures are held against."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from jevons.numerics.native import cache_dir
from jevons.runtime import Runtime


def gemm_rate(threads: Sequence[int], size: int = 2048, dtype: torch.dtype = torch.bfloat16, rounds: int = 5,
              device: str = "cpu") -> tuple[float, int]:
    """(GFLOP/s, threads) of a square matrix product, at the best thread count. The global random state stays as it is."""
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=rng).to(device, dtype) for _ in range(2))
    before, found = torch.get_num_threads(), (0.0, 1)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    try:
        for count in threads:
            torch.set_num_threads(count)
            a @ b
            wait()
            for _ in range(rounds):
                begin = time.perf_counter()
                a @ b
                wait()
                found = max(found, (2 * size**3 / 1e9 / max(1e-9, time.perf_counter() - begin), count))
    finally:
        torch.set_num_threads(before)
    return found


def peak_flops(runtime: Runtime, dtype: torch.dtype) -> float:
    """FLOP/s of this machine's best matrix product in `dtype`: measured in about a second, once per machine, thread count and
    torch, and kept beside the built kernels. Busy neighbours make it too small; delete the file to measure again."""
    threads = torch.get_num_threads()
    key = f"{runtime.gpu or runtime.cpu}, {threads} threads, {dtype}, torch {torch.__version__}"
    path, known = cache_dir() / "gemm-peak.json", {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(known, dict) and isinstance(known.get(key), float):
        return known[key]
    size, counts = (8192, [threads]) if runtime.device == "cuda" else (1024, sorted({1, threads}))
    rate = 1e9 * gemm_rate(counts, size, dtype, 12, runtime.device)[0]
    with contextlib.suppress(OSError):  # a read-only home: measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(f"{path}.tmp-{os.getpid()}")
        unfinished.write_text(json.dumps((known if isinstance(known, dict) else {}) | {key: rate}, indent=1), encoding="utf-8")
        os.replace(unfinished, path)
    return rate
