"""`pack`: a loaded model's projections in fewer bits, for inference on a CPU.

What is packed: every `Linear`, the experts and the head. What is not: the embedding (a row of it is read per token), norms and
gates (float32: they are small, and a gate's rounding changes experts), and `kv_b_proj`, which absorbed attention multiplies
head by head. With 4 bits the head takes 8: it is where an error goes straight into the answer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from jevons.model.layers import Linear, RMSNorm
from jevons.model.moe import ExpertBank, Gate
from jevons.model.network import CausalLM
from jevons.numerics import Fp8Weight, IntWeight, Rows, Weight, dense
from jevons.numerics.fp8 import quantise_blocks
from jevons.numerics.memory import HugePages

INTEGERS = {"int8": (8, 128), "int4": (4, 32)}  # bits, and columns that share a scale
KINDS = ("bf16", "int8", "fp8", "int4")
Packer = Callable[[Weight, list[int]], Weight]  # a weight, and the rows of each published projection in it -> packed


def check_kind(kind: str) -> None:
    """Raises ValueError where `kind` is none of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"weights {kind!r}: {', '.join(KINDS[:-1])} or {KINDS[-1]} would be right")


@torch.no_grad()
def pack(model: CausalLM, kind: str, dtype: torch.dtype = torch.bfloat16) -> CausalLM:
    """Pack in place, one module at a time; activations, and what is not packed, become `dtype` (with "bf16" always bfloat16).
    Returns the model.

    No gradient reaches it afterwards. Raises ValueError for an unknown kind and for a weight that is not finite, by its name.
    """
    check_kind(kind)
    dtype = torch.bfloat16 if kind == "bf16" else dtype
    pages = HugePages()
    tied = model.lm_head.weight is model.embed_tokens.weight
    model.embed_tokens.weight = _frozen(pages.copy(model.embed_tokens.weight, dtype))
    if tied and kind == "bf16":
        model.lm_head.weight = model.embed_tokens.weight
    for name, module in model.named_modules():
        try:
            _pack_module(module, name, kind, dtype, pages, skip=tied and kind == "bf16" and module is model.lm_head)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return model


def _pack_module(module: nn.Module, name: str, kind: str, dtype: torch.dtype, pages: HugePages, skip: bool) -> None:
    if isinstance(module, Linear):
        if module.bias is not None:
            module.bias = _frozen(module.bias.to(dtype))
        if name.endswith("kv_b_proj"):
            module.weight = _frozen(pages.copy(module.dense(dtype)))
            module._dense = None
        elif not skip:
            parts = list((module.parts or {"": module.weight.shape[0]}).values())
            packer = _packer("int8" if kind == "int4" and name == "lm_head" else kind, dtype, pages)
            packed = packer(module.weight, parts)
            del module.weight
            module.weight = _frozen(packed) if isinstance(packed, torch.Tensor) else packed
    elif isinstance(module, ExpertBank):
        packer = _packer(kind, dtype, pages)
        inter = [module.inter, module.inter]
        both = [Rows([packer(p, [p.shape[0]]) for p in _split(w, inter)]) for w in module.gate_up_proj]
        down = [packer(w, [w.shape[0]]) for w in module.down_proj]
        del module.gate_up_proj, module.down_proj
        module.gate_up_proj, module.down_proj = both, down
    elif isinstance(module, RMSNorm | Gate):
        module.weight = _frozen(pages.copy(module.weight, torch.float32))


@torch.no_grad()
def settle(model: CausalLM, limit: int) -> bool:
    """Move the projections and experts of a loaded model, as they are, into huge pages, where every step reads them half as fast
    again. Whether it was done: not where they take more than `limit` bytes. For inference."""
    banks = [m for m in model.modules() if isinstance(m, ExpertBank)]
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    weights = [m.weight for m in linears] + [w for m in banks for side in (m.gate_up_proj, m.down_proj)
                                             for w in (side if isinstance(side, list) else [side])]
    if sum(map(_bytes, weights)) > limit:
        return False
    pages, tied = HugePages(), model.lm_head.weight is model.embed_tokens.weight
    for module in linears:
        moved = _moved(module.weight, pages)
        module.weight = _frozen(moved) if isinstance(moved, torch.Tensor) else moved
        module._dense = None
    for bank in banks:
        for name in ("gate_up_proj", "down_proj"):
            side = getattr(bank, name)
            setattr(bank, name, [_moved(w, pages) for w in side] if isinstance(side, list) else _frozen(_moved(side, pages)))
    if tied:
        model.embed_tokens.weight = model.lm_head.weight
    return True


def _bytes(weight: Weight) -> int:
    if isinstance(weight, Rows):
        return sum(map(_bytes, weight.parts))
    return (weight.codes if isinstance(weight, Fp8Weight) else weight).nbytes


def _moved(weight: Weight, pages: HugePages) -> Weight:
    if isinstance(weight, Rows):
        return Rows([_moved(part, pages) for part in weight.parts])
    if isinstance(weight, Fp8Weight):
        return Fp8Weight(pages.copy(weight.codes.view(torch.uint8)).view(weight.codes.dtype), weight.scale_inv)
    return pages.copy(weight)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _split(weight: Weight, rows: list[int]) -> list[Weight]:
    if isinstance(weight, Rows):
        return weight.parts
    return list(weight.split(rows)) if isinstance(weight, torch.Tensor) else [weight]


def _packer(kind: str, dtype: torch.dtype, pages: HugePages) -> Packer:
    def bf16(weight: Weight, rows: list[int]) -> Weight:
        return pages.copy(dense(weight, dtype))

    def integers(weight: Weight, rows: list[int]) -> Weight:
        packed = IntWeight.of(dense(weight, torch.float32), *INTEGERS[kind])
        return IntWeight(pages.copy(packed.codes), pages.copy(packed.scale), packed.shape, packed.bits, packed.group)

    def fp8(weight: Weight, rows: list[int]) -> Weight:
        parts = _split(weight, rows)
        if not all(isinstance(p, Fp8Weight) for p in parts):  # what a checkpoint holds as FP8 stays where it lies
            parts = [Fp8Weight(*(pages.copy(t) for t in quantise_blocks(_finite(dense(p, torch.float32))))) for p in parts]
        return parts[0] if len(parts) == 1 else Rows(parts)

    return {"bf16": bf16, "fp8": fp8}.get(kind, integers)


def _finite(weight: torch.Tensor) -> torch.Tensor:
    if not weight.isfinite().all():
        raise ValueError("a weight that is not finite cannot be packed")
    return weight
