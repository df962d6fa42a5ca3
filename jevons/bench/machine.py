"""What this machine multiplies at most: the rate that measured figures are held against."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch


def gemm_rate(threads: Sequence[int], size: int = 2048, dtype: torch.dtype = torch.bfloat16,
              rounds: int = 5) -> tuple[float, int]:
    """(GFLOP/s, threads) of a square matrix product, at the best thread count."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    before, found = torch.get_num_threads(), (0.0, 1)
    try:
        for count in threads:
            torch.set_num_threads(count)
            a @ b
            for _ in range(rounds):
                begin = time.perf_counter()
                a @ b
                found = max(found, (2 * size**3 / 1e9 / (time.perf_counter() - begin), count))
    finally:
        torch.set_num_threads(before)
    return found
