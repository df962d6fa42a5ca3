"""What this machine can do at most: the rates that measured figures are held against."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

GIB = 2**30


def read_rate(threads: Sequence[int], nbytes: int = GIB, rounds: int = 3) -> tuple[float, int]:
    """(GB/s, threads) of reading and summing `nbytes` of memory, at the best thread count."""
    data = torch.ones(nbytes // 8, dtype=torch.int64)
    return _best(threads, rounds, lambda: data.sum(), nbytes / 1e9)


def gemm_rate(threads: Sequence[int], size: int = 2048, dtype: torch.dtype = torch.bfloat16,
              rounds: int = 5) -> tuple[float, int]:
    """(GFLOP/s, threads) of a square matrix product, at the best thread count."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return _best(threads, rounds, lambda: a @ b, 2 * size**3 / 1e9)


def _best(threads: Sequence[int], rounds: int, run, amount: float) -> tuple[float, int]:
    before, found = torch.get_num_threads(), (0.0, 1)
    try:
        for count in threads:
            torch.set_num_threads(count)
            run()
            for _ in range(rounds):
                begin = time.perf_counter()
                run()
                found = max(found, (amount / (time.perf_counter() - begin), count))
    finally:
        torch.set_num_threads(before)
    return found
