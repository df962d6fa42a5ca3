"""Expert parallelism: each process of a group holds some experts whole; tokens travel to them (dispatch) and their outputs
back (combine), as many as the gate chose: none is dropped.

In FP8 training an expert's Wgrad tiles hold rows of one process only, so that they are the tiles of one process alone.

Dispatch in FP8, as in V3 (report section 3.2.2 and 3.3.3): tokens forward and gradients backward travel as E4M3
with one power-of-two scale for 128 numbers; what is combined, either way, stays BF16.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from jevons.model import CausalLM
from jevons.model.moe import ExpertBank, MoE, Routing
from jevons.numerics import fused
from jevons.numerics.fp8 import Quantised, dequantise, quantise_tiles

LEAST = 2.0**-110  # gradients of a large batch lie far below 1e-4, and a scale's exponent costs a byte whatever it is


def to_bytes(x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 x 128 tiles with power-of-two scales as what travels: E4M3 codes [N, D] and E8M0 exponents [N, ceil(D/128)], uint8."""
    tiles = quantise_tiles(x_ND, True, LEAST)
    return tiles.codes.view(torch.uint8), (tiles.scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def from_bytes(codes_ND: torch.Tensor, exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scale = (exponents.to(torch.int32) << 23).view(torch.float32)
    return dequantise(Quantised(codes_ND.view(torch.float8_e4m3fn), scale, 1), dtype)


def exchange(x_ND: torch.Tensor, arriving: list[int], leaving: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Rows to their processes, `leaving[r]` of them to r; what arrives lies in the order of its senders."""
    out = x_ND.new_empty(sum(arriving), *x_ND.shape[1:])
    dist.all_to_all_single(out, x_ND.contiguous(), arriving, leaving, group=group)
    return out


def carry(x_ND: torch.Tensor, arriving: list[int], leaving: list[int], group: dist.ProcessGroup, form: str) -> torch.Tensor:
    """`exchange` in a form: "same" as `x_ND` is, "bf16", "fp8"."""
    if form == "fp8":
        return from_bytes(*(exchange(part, arriving, leaving, group) for part in to_bytes(x_ND)), x_ND.dtype)
    if form == "bf16":
        return exchange(x_ND.bfloat16(), arriving, leaving, group).to(x_ND.dtype)
    return exchange(x_ND, arriving, leaving, group)


class _Travel(torch.autograd.Function):
    """`carry` one way in the forward pass and the other in the backward pass, each in its own form."""

    @staticmethod
    def forward(ctx, x_ND, arriving, leaving, group, there, back):
        ctx.way = leaving, arriving, group, back
        return carry(x_ND, arriving, leaving, group, there)

    @staticmethod
    def backward(ctx, grad_ND):
        return carry(grad_ND, *ctx.way), None, None, None, None, None


class SpreadBank(ExpertBank):
    """A bank of which this process holds the experts [rank * E/n, (rank + 1) * E/n); its parameters are DTensors over E."""

    group: dist.ProcessGroup
    ranks: int
    fp8: bool

    # FSDP puts the gathered weight in `_parameters` while the bank runs: a DTensor over the experts alone
    @property
    def gate_up_proj(self) -> torch.Tensor:
        return _usable(self._parameters["gate_up_proj"])

    @property
    def down_proj(self) -> torch.Tensor:
        return _usable(self._parameters["down_proj"])

    def forward(self, x_ND: torch.Tensor, routing: Routing) -> torch.Tensor:
        n, k = routing.experts_NK.shape
        sent_RE = routing.rows_E.view(self.ranks, -1)
        got_RE = torch.empty_like(sent_RE)
        dist.all_to_all_single(got_RE, sent_RE.contiguous(), group=self.group)
        leaving, arriving = sent_RE.sum(1).tolist(), got_RE.sum(1).tolist()
        order = routing.experts_NK.flatten().argsort(stable=True)  # by expert, so by the process that holds it
        cell_M = torch.empty_like(order).index_copy_(0, order, torch.arange(n * k, device=order.device))
        there, back = ("fp8", "bf16") if self.fp8 else ("same", "same")
        x_MD = fused.dispatch(x_ND, cell_M.view(n, k), n * k, x_ND.dtype)
        x_MD = _Travel.apply(x_MD, arriving, leaving, self.group, there, back)
        expert_M = torch.arange(got_RE.shape[1], device=order.device).repeat(self.ranks).repeat_interleave(got_RE.flatten())
        rows_E, rows_ES = got_RE.sum(0), got_RE.t()
        if not len(expert_M):  # a row of zeros: the weights must have a gradient, for others wait to add theirs
            x_MD, expert_M, rows_E = F.pad(x_MD, (0, 0, 0, 1)), expert_M.new_zeros(1), rows_E.clone()
            rows_E[0] = 1
        own = Routing(expert_M[:, None], x_MD.new_ones(len(expert_M), 1), rows_E, routing.load_E, routing.balance_loss, rows_ES)
        y_MD = super().forward(x_MD, own)[: sum(arriving)]
        y_MD = _Travel.apply(y_MD, leaving, arriving, self.group, back, there)
        return fused.combine(y_MD, cell_M.view(n, k), routing.weights_NK)


def _usable(weight: torch.Tensor) -> torch.Tensor:
    """The experts held here, while they are whole; otherwise the parameter as it is kept (its shape is everyone's)."""
    whole = isinstance(weight, DTensor) and weight.device_mesh.ndim == 1 and weight.placements == (Shard(0),)
    return weight.to_local() if whole else weight


def spread_experts(model: CausalLM, mesh: DeviceMesh, fp8: bool) -> None:
    """Keep this process's experts of every bank, in place."""
    for block in [*model.layers, *model.mtp]:
        if isinstance(block.mlp, MoE):
            bank = block.mlp.experts
            for name, weight in list(bank.named_parameters(recurse=False)):
                part = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
                bank._parameters[name] = nn.Parameter(part, requires_grad=weight.requires_grad)
            bank.__class__ = SpreadBank
            bank.group, bank.ranks, bank.fp8 = mesh.get_group(), mesh.size(), fp8
