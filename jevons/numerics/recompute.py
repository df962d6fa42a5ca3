"""What the backward pass computes again instead of keeping (V3 report, section 3.2.3): the same operations on the same numbers,
so the same bits."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
_ATTENTION = [_aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default,
              _aten._scaled_dot_product_cudnn_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default]


def again(on: bool, f: Callable[..., torch.Tensor], *inputs: Any, keep_attention: bool = False) -> torch.Tensor:
    """f(*inputs), of which, where `on`, only the inputs wait for the backward pass; with `keep_attention` also what torch's own
    attention gives, which is dear over long rows (to look for it takes a microsecond or more of every operation)."""
    if not (on and torch.is_grad_enabled()):
        return f(*inputs)
    how = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _ATTENTION)} if keep_attention else {}
    return checkpoint(f, *inputs, use_reentrant=False, preserve_rng_state=False, **how)


@contextlib.contextmanager
def remade(on: bool, out: torch.Tensor, make: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Operations inside that save `out` keep `make` instead, which gives the same numbers, where `on`."""
    if not (on and torch.is_grad_enabled()):
        yield
        return
    same = out.data_ptr(), out.shape, out.dtype

    def pack(saved: torch.Tensor) -> Any:
        return make if (saved.data_ptr(), saved.shape, saved.dtype) == same else saved

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        with torch.no_grad():
            return kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
