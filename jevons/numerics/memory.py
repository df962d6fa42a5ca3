"""Memory in huge pages for what every step reads whole: with pages of 4 KiB, looking their addresses up takes as long as reading
them (18 against 31 GB/s on a virtual machine)."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

HUGE = 2**21
SLAB = 2**26  # many small tensors share one, else most of each would lie in the ends that fill no huge page


class HugePages:
    """Tensors cut from slabs that live as long as one of their tensors does. Plain memory where the system has no huge pages."""

    def __init__(self) -> None:
        self.left = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, contiguous, its address a multiple of 64."""
        size = math.prod(shape) * dtype.itemsize
        room = -(-size // 64) * 64
        if self.left.numel() < room:
            self.left = _slab(max(SLAB, -(-room // HUGE) * HUGE))
        taken, self.left = self.left[:size], self.left[room:]
        return taken.view(dtype).view(shape)

    def copy(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.empty(tensor.shape, dtype or tensor.dtype).copy_(tensor)


def _slab(size: int) -> torch.Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory would have small pages
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(pages, dtype=torch.uint8)
    start = -raw.data_ptr() % HUGE
    return raw[start : start + size]
