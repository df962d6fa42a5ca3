"""Memory in huge pages for what every step reads whole: with pages of 4 KiB, looking their addresses up takes as long as reading
them (18 against 31 GB/s on a virtual machine). And what of a memory-mapped file lies in memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
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


@functools.cache
def _libc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _pages(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and number of the pages that a contiguous tensor lies in."""
    first = tensor.data_ptr() // mmap.PAGESIZE
    return first * mmap.PAGESIZE, -(-(tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE) - first


def resident(tensor: torch.Tensor) -> float | None:
    """The share of a mapped tensor's pages that lie in memory; None where the system does not tell."""
    libc, (address, count) = _libc(), _pages(tensor)
    if libc is None or not count:
        return None
    seen = np.empty(count, dtype=np.uint8)
    if libc.mincore(address, count * mmap.PAGESIZE, seen.ctypes.data):
        return None
    return float((seen & 1).mean())


def prefetch(tensor: torch.Tensor) -> None:
    """Ask for a mapped tensor's pages to be read, all at once and without waiting; a fault reads few, one after the other."""
    if (libc := _libc()) is not None:
        address, count = _pages(tensor)
        libc.madvise(address, count * mmap.PAGESIZE, mmap.MADV_WILLNEED)


def on_device(value: Any, device: torch.device) -> Any:
    """A batch, or any dataclass of tensors, with its tensors on `device`; itself where that is the CPU, on which it was made."""
    if device.type == "cpu":
        return value
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if is_dataclass(value):
        return replace(value, **{f.name: on_device(getattr(value, f.name), device) for f in fields(value)})
    return value
