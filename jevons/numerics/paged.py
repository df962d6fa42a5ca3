"""The native attention over a paged cache (native/attention.cpp), seen from torch.

`heads` and `batch` describe once what every call of a layer, or of a step, has in common. Queries come in two parts, one
plain and one still to be rotated; either may have width 0.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from jevons.numerics import native

TYPES = {torch.float32: 0, torch.bfloat16: 1}


class Heads(ctypes.Structure):
    """What one layer's heads read of a cell; fields as in attention.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("heads", "groups", "plain", "rotary", "value", "cell", "key_at", "key_step",
                                                    "value_at", "value_step", "adjacent")]
    _fields_ += [("scale", ctypes.c_float), ("epsilon", ctypes.c_float)]


class Batch(ctypes.Structure):
    """Where a call's tokens belong. Holds on to the tensors that its pointers lead to."""

    _fields_ = [(name, ctypes.c_int64) for name in ("sequences", "page_size", "table_width", "table_stride")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("table", "starts", "contexts")]

    def __init__(self, table_SP: torch.Tensor, starts: torch.Tensor, contexts_S: torch.Tensor, page_size: int):
        """`starts` [S + 1] and `contexts_S` are int64 on the CPU, as the table is; its rows are dense."""
        self.kept = table_SP, starts, contexts_S
        super().__init__(len(contexts_S), page_size, table_SP.shape[1], table_SP.stride(0), table_SP.data_ptr(),
                         starts.data_ptr(), contexts_S.data_ptr())


def latent_heads(heads: int, latent: int, rotary: int, scale: float, epsilon: float) -> Heads:
    """MLA, absorbed: all heads share one key, [latent | rotated], whose first part is the value too."""
    return Heads(heads, 1, latent, rotary, latent, latent + rotary, 0, 0, 0, 0, True, scale, epsilon)


def grouped_heads(heads: int, groups: int, width: int, scale: float) -> Heads:
    """GQA: a cell is the keys of all groups, then their values; the whole key is rotated."""
    return Heads(heads, groups, 0, width, width, 2 * groups * width, 0, width, groups * width, width, False, scale, 0.0)


def expanded_heads(heads: int, plain: int, rotary: int, value: int, scale: float) -> Heads:
    """MLA with keys and values per head: a cell is [plain | rotated | value] of the first head, then of the next."""
    width = plain + rotary + value
    return Heads(heads, heads, plain, rotary, value, heads * width, 0, width, plain + rotary, width, True, scale, 0.0)


@functools.cache
def _functions() -> tuple[Callable, Callable] | None:
    library = native.library()
    if library is None:
        return None
    pointer, number, kind = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    view = [pointer, number, number]
    library.paged_store.argtypes = [pointer, pointer, kind, pointer, number, *view, kind, pointer, pointer, kind, pointer, number]
    library.paged_attention.argtypes = [pointer, pointer, kind, *view, *view, pointer, kind, pointer, number, *view]
    for function in (library.paged_store, library.paged_attention):
        function.restype = kind
    return library.paged_store, library.paged_attention


def available(x: torch.Tensor, cache: torch.Tensor) -> bool:
    """Whether the kernel takes activations like `x` and this cache: on the CPU, float32 or bf16, no gradient asked for."""
    return (x.device.type == "cpu" and cache.device.type == "cpu" and x.dtype in TYPES and cache.dtype in TYPES
            and not (torch.is_grad_enabled() and x.requires_grad) and _functions() is not None)


def _check(failed: int, batch: Batch) -> None:
    if failed:
        raise IndexError(f"the page table of a call of {batch.sequences} sequences leads outside the cache, or is too short")


def store(heads: Heads, batch: Batch, values_NV: torch.Tensor, rotary_NGR: torch.Tensor, rope_NR: torch.Tensor,
          layer_PSW: torch.Tensor, norm: torch.Tensor | None = None) -> None:
    """Write the cells of a call's tokens: rotated keys [N, G, R] and values [N, G * V] (under RMSNorm with weight `norm`).
    Raises IndexError where the table has no page for one."""
    kind, weight = (0, None) if norm is None else (TYPES[norm.dtype], norm.data_ptr())
    _check(_functions()[0](
        ctypes.byref(heads), ctypes.byref(batch), TYPES[values_NV.dtype], values_NV.data_ptr(), values_NV.stride(0),
        rotary_NGR.data_ptr(), *rotary_NGR.stride()[:2], kind, weight, rope_NR.data_ptr(), TYPES[layer_PSW.dtype],
        layer_PSW.data_ptr(), len(layer_PSW)), batch)


def attend(heads: Heads, batch: Batch, plain_NHC: torch.Tensor, rotary_NHR: torch.Tensor, rope_NR: torch.Tensor,
           layer_PSW: torch.Tensor, out_NHV: torch.Tensor) -> torch.Tensor:
    """softmax(scale q k^T) v for every token over its sequence's cells up to itself, into `out_NHV`; q is plain, then
    rotated rotary. All strides but the last are free. Raises IndexError as `store`."""
    _check(_functions()[1](
        ctypes.byref(heads), ctypes.byref(batch), TYPES[plain_NHC.dtype], plain_NHC.data_ptr(), *plain_NHC.stride()[:2],
        rotary_NHR.data_ptr(), *rotary_NHR.stride()[:2], rope_NR.data_ptr(), TYPES[layer_PSW.dtype], layer_PSW.data_ptr(),
        len(layer_PSW), out_NHV.data_ptr(), *out_NHV.stride()[:2]), batch)
    return out_NHV
