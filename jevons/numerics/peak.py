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
    """FLOP/s of this machine's best matrix product in `dtype`: the fastest that any run here has measured, with this number of
    threads and this torch. Each call looks for a fraction of a second and keeps the better figure beside the built kernels, so
    that a neighbour who was busy the first time does not count for ever."""
    threads = torch.get_num_threads()
    key = f"{runtime.gpu or runtime.cpu}, {threads} threads, {dtype}, torch {torch.__version__}"
    path, known = cache_dir() / "gemm-peak.json", {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    before = known.get(key) if isinstance(known.get(key), float) else 0.0
    size, counts = (8192, [threads]) if runtime.device == "cuda" else (1024, sorted({1, threads}))
    rate = max(before, 1e9 * gemm_rate(counts, size, dtype, 4 if before else 12, runtime.device)[0])
    if rate > before:
        with contextlib.suppress(OSError):  # a read-only home: measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(f"{path}.tmp-{os.getpid()}")
            unfinished.write_text(json.dumps(known | {key: rate}, indent=1), encoding="utf-8")
            os.replace(unfinished, path)
    return rate
