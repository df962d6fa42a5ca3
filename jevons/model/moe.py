"""DeepSeekMoE (V3 report, section 2.1.2): sigmoid gate, group-limited choice, shared expert, auxiliary-free balancing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from jevons.config import ModelConfig
from jevons.model.attention import Segments
from jevons.model.layers import MLP, HFView
from jevons.numerics import grouped_linear


@dataclass
class Routing:
    """A gate's choice, and what balancing needs of it."""

    experts_NK: torch.Tensor
    weights_NK: torch.Tensor
    load_E: torch.Tensor  # tokens per expert, float32
    balance_loss: torch.Tensor  # sequence-wise, before alpha


class Gate(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def hf_views(self, name: str) -> Iterator[HFView]:
        yield f"{name}.weight", self.weight
        yield f"{name}.e_score_correction_bias", self.e_score_correction_bias

    def forward(self, x_ND: torch.Tensor, segments: Segments | None = None) -> Routing:
        """Choose by s + b within the best groups; weigh by the unbiased s (facts: V3's own gate, in float32).

        With `segments` the tokens are training rows, and the balance loss of report eq. 17-20 is taken per row.
        """
        c = self.config
        with torch.autocast(x_ND.device.type, enabled=False):
            scores = F.linear(x_ND.float(), self.weight.float()).sigmoid()
        with torch.no_grad():
            choice = scores + self.e_score_correction_bias
            if c.n_group > 1:
                groups = choice.unflatten(-1, (c.n_group, -1))
                group_score = groups.topk(2, dim=-1).values.sum(-1)
                best = group_score.topk(c.topk_group, dim=-1).indices
                dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, best, False)
                choice = groups.masked_fill(dropped[..., None], float("-inf")).flatten(-2)
            experts = choice.topk(c.num_experts_per_tok, dim=-1).indices
            load = F.one_hot(experts, c.n_routed_experts).sum((0, 1)).float()
        weights = scores.gather(1, experts)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * c.routed_scaling_factor
        return Routing(experts, weights, load, self._balance(scores, segments) if segments else scores.new_zeros(()))

    def _balance(self, scores_NE: torch.Tensor, segments: Segments) -> torch.Tensor:
        """Sum over experts of f_i P_i, averaged over rows; f counts the unbiased top K."""
        c = self.config
        with torch.no_grad():
            top = scores_NE.topk(c.num_experts_per_tok, dim=-1).indices
            chosen_NE = torch.zeros_like(scores_NE).scatter_(1, top, c.n_routed_experts / c.num_experts_per_tok)
        share_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        sizes = [rows * length for rows, length in segments]
        total = scores_NE.new_zeros(())
        for (rows, _), chosen, share in zip(segments, chosen_NE.split(sizes), share_NE.split(sizes), strict=True):
            f, p = chosen.unflatten(0, (rows, -1)).mean(1), share.unflatten(0, (rows, -1)).mean(1)
            total = total + (f * p).sum()
        return total / sum(rows for rows, _ in segments)


class ExpertBank(nn.Module):
    """The routed experts, stacked [E, ...]. A bank over a memory-mapped checkpoint may hold one view per expert instead;
    callers only ever call `forward`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.inter = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.n_routed_experts, 2 * self.inter, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, self.inter))

    def hf_views(self, name: str) -> Iterator[HFView]:
        for e in range(self.gate_up_proj.shape[0]):
            yield f"{name}.{e}.gate_proj.weight", self.gate_up_proj[e, : self.inter]
            yield f"{name}.{e}.up_proj.weight", self.gate_up_proj[e, self.inter :]
            yield f"{name}.{e}.down_proj.weight", self.down_proj[e]

    def forward(self, x_ND: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Sum over a token's K experts of weight * expert(x): no token is ever dropped."""
        n, k = routing.experts_NK.shape
        flat = routing.experts_NK.flatten()
        order = flat.argsort(stable=True)
        offs = routing.load_E.cumsum(0).to(torch.int32)
        x_MD = _Dispatch.apply(x_ND, order, k)
        gate, up = grouped_linear(x_MD, self.gate_up_proj, offs).chunk(2, dim=-1)
        y_MD = grouped_linear(F.silu(gate) * up, self.down_proj, offs)
        y_NKD = _Permute.apply(y_MD, order).view(n, k, -1)
        return (y_NKD * routing.weights_NK[..., None].to(y_NKD.dtype)).sum(1)


class _Dispatch(torch.autograd.Function):
    """Rows of x, one per (token, expert), sorted by expert. Backward un-sorts and sums over K: no scatter-add, so it is
    deterministic whatever the thread count, which bit-exact resume needs."""

    @staticmethod
    def forward(ctx, x_ND, order_M, k):
        ctx.save_for_backward(order_M)
        ctx.k = k
        return x_ND.index_select(0, order_M // k)

    @staticmethod
    def backward(ctx, grad_MD):
        (order_M,) = ctx.saved_tensors
        flat = torch.empty_like(grad_MD).index_copy_(0, order_M, grad_MD)
        return flat.view(-1, ctx.k, grad_MD.shape[-1]).sum(1), None, None


class _Permute(torch.autograd.Function):
    """Undo the sort: out[order] = y. Backward is the sort again."""

    @staticmethod
    def forward(ctx, y_MD, order_M):
        ctx.save_for_backward(order_M)
        return torch.empty_like(y_MD).index_copy_(0, order_M, y_MD)

    @staticmethod
    def backward(ctx, grad_MD):
        (order_M,) = ctx.saved_tensors
        return grad_MD.index_select(0, order_M), None


class MoE(nn.Module):
    """Routed experts plus a shared MLP of width n_shared * moe_intermediate_size."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Gate(config)
        self.experts = ExpertBank(config)
        self.shared_experts = (MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
                               if config.n_shared_experts else None)

    def forward(self, x_ND: torch.Tensor, segments: Segments | None = None) -> tuple[torch.Tensor, Routing]:
        routing = self.gate(x_ND, segments)
        y = self.experts(x_ND, routing)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x_ND)
        return y, routing
