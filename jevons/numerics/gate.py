"""The native choice of experts (native/gate.cpp), seen from torch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from jevons.numerics import native


@functools.cache
def _function() -> Callable | None:
    library = native.library()
    if library is None:
        return None
    pointer, number, kind = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.gate_choose.argtypes = [pointer, pointer, *[number] * 4, kind, number, kind, ctypes.c_float, *[pointer] * 3]
    library.gate_choose.restype = None
    return library.gate_choose


def choose(scores_NE: torch.Tensor, bias_E: torch.Tensor | None, groups: int, kept: int, k: int, normalise: bool, factor: float,
           ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(experts [N, K], weights [N, K], tokens of each expert [E]) by float32 scores, without gradients; None where the kernel may
    not run. With a bias, groups score the sum of their two best, else their best one."""
    if scores_NE.device.type != "cpu" or scores_NE.requires_grad or _function() is None:
        return None
    tokens, experts = scores_NE.shape
    chosen, weights = torch.empty(tokens, k, dtype=torch.long), torch.empty(tokens, k)
    rows = torch.empty(experts, dtype=torch.long)
    bias = None if bias_E is None else bias_E.data_ptr()
    _function()(scores_NE.data_ptr(), bias, tokens, experts, groups, kept, bias is not None, k, normalise, factor,
                chosen.data_ptr(), weights.data_ptr(), rows.data_ptr())
    return chosen, weights, rows
