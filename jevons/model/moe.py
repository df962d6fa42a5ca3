"""DeepSeekMoE (V3 report, section 2.1.2): sigmoid gate, group-limited choice, shared expert, auxiliary-free balancing.

V2's gate is a softmax without bias, its groups' score their best expert, its weights the scores as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from jevons.config import ModelConfig
from jevons.model.attention import Segments
from jevons.model.layers import MLP, Fetch, HFView, packed_views
from jevons.numerics import Fp8, Rows, fused, grouped_linear, kernels, swiglu_linear, training, upcast
from jevons.numerics.native import CChoice

ALIGN = 32
# Tokens times experts of each, and times the width of a token: up to here one native call is faster than sorting rows for grouped
# products, and what it keeps is small.
FEW_ROWS, FEW_NUMBERS = 4096, 2**22


@dataclass
class Routing:
    """A gate's choice, and what balancing needs of it."""

    experts_NK: torch.Tensor
    weights_NK: torch.Tensor
    rows_E: torch.Tensor  # tokens per expert, int64
    load_E: torch.Tensor  # the same without padding, float32
    balance_loss: torch.Tensor  # sequence-wise, before alpha
    rows_ES: torch.Tensor | None = None  # `rows_E` by where they come from, in their order: rows of two share no FP8 tile


class Gate(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        self.choice = CChoice(config.n_routed_experts, config.num_experts_per_tok, config.n_group, config.topk_group,
                              config.scoring_func == "softmax", config.norm_topk_prob, config.routed_scaling_factor)

    def hf_views(self, name: str) -> Iterator[HFView]:
        yield f"{name}.weight", self.weight
        if self.config.has_router_bias:
            yield f"{name}.e_score_correction_bias", self.e_score_correction_bias

    def hold(self, prefix: str, fetch: Fetch) -> None:
        self.weight = nn.Parameter(fetch(f"{prefix}.weight"), requires_grad=False)
        if self.config.has_router_bias:
            self.e_score_correction_bias = fetch(f"{prefix}.e_score_correction_bias").float()

    def forward(self, x_ND: torch.Tensor, segments: Segments | None = None, real_N: torch.Tensor | None = None) -> Routing:
        """Choose by s + b within the best groups; weigh by the unbiased s (facts: V3's own gate, in float32).

        With `segments` the tokens are training rows, and the balance loss of report eq. 17-20 is taken per row;
        `real_N` (float32) is 0 on padding.
        """
        c = self.config
        if segments is None and real_N is None:
            chosen = kernels.gate(x_ND, self.weight, self.e_score_correction_bias if c.has_router_bias else None, self.choice)
            if chosen is not None:
                return Routing(*chosen, chosen[1].new_zeros(()))
        with torch.autocast(x_ND.device.type, enabled=False):
            scores = F.linear(upcast(x_ND), upcast(self.weight))
            scores = scores.sigmoid() if c.scoring_func == "sigmoid" else scores.softmax(-1)
        with torch.no_grad():
            choice = scores + self.e_score_correction_bias if c.has_router_bias else scores
            if c.n_group > 1:
                groups = choice.unflatten(-1, (c.n_group, -1))
                group_score = groups.topk(2, dim=-1).values.sum(-1) if c.has_router_bias else groups.amax(-1)
                best = group_score.topk(c.topk_group, dim=-1).indices
                dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, best, False)
                choice = groups.masked_fill(dropped[..., None], float("-inf")).flatten(-2)
            experts = choice.topk(c.num_experts_per_tok, dim=-1).indices
            chosen_NE = torch.zeros_like(scores).scatter_(1, experts, 1.0)
            rows = chosen_NE.sum(0).long()
            # not a matmul: autocast would round the counts to bf16
            load = rows.float() if real_N is None else (chosen_NE * real_N[:, None]).sum(0)
        weights = scores.gather(1, experts)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * c.routed_scaling_factor
        balance = self._balance(scores, segments, real_N) if segments else scores.new_zeros(())
        return Routing(experts, weights, rows, load, balance)

    def _balance(self, scores_NE: torch.Tensor, segments: Segments, real_N: torch.Tensor | None) -> torch.Tensor:
        """Sum over experts of f_i P_i, averaged over rows; f counts the unbiased top K."""
        c = self.config
        real_N1 = torch.ones_like(scores_NE[:, :1]) if real_N is None else real_N[:, None]
        with torch.no_grad():
            top = scores_NE.topk(c.num_experts_per_tok, dim=-1).indices
            chosen_NE = torch.zeros_like(scores_NE).scatter_(1, top, c.n_routed_experts / c.num_experts_per_tok) * real_N1
        share_NE = scores_NE / scores_NE.sum(-1, keepdim=True) * real_N1
        sizes = [rows * length for rows, length in segments]
        sizes.append(scores_NE.shape[0] - sum(sizes))
        total = scores_NE.new_zeros(())
        for (rows, _), *parts in zip(segments, *(t.split(sizes) for t in (chosen_NE, share_NE, real_N1)), strict=False):
            f, p, count = (t.unflatten(0, (rows, -1)).sum(1) for t in parts)
            total = total + (f / count * p / count).sum()
        return total / sum(rows for rows, _ in segments)


class ExpertBank(nn.Module):
    """The routed experts, stacked [E, ...]. A bank over a memory-mapped checkpoint holds a list with one weight per expert
    instead (`hold`); callers only ever call `forward`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.inter = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.n_routed_experts, 2 * self.inter, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, self.inter))
        self.table = kernels.ExpertTable()
        self.fp8_up: Fp8 | None = None  # see model/precision.py
        self.fp8_down: Fp8 | None = None
        self.recompute = False
        self.watch: Callable[[ExpertBank, torch.Tensor], None] | None = None  # told what each call is about to read

    def hf_views(self, name: str) -> Iterator[HFView]:
        if isinstance(self.down_proj, list):
            for e, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
                for part, weight in zip(("gate", "up", "down"), (*gate_up.parts, down), strict=True):
                    yield from packed_views(f"{name}.{e}.{part}_proj.weight", weight)
            return
        for e in range(self.gate_up_proj.shape[0]):
            yield f"{name}.{e}.gate_proj.weight", self.gate_up_proj[e, : self.inter]
            yield f"{name}.{e}.up_proj.weight", self.gate_up_proj[e, self.inter :]
            yield f"{name}.{e}.down_proj.weight", self.down_proj[e]

    def hold(self, prefix: str, fetch: Fetch) -> None:
        """One weight per expert, as `fetch` gives it, without a stacking copy. For inference."""
        experts = range(self.gate_up_proj.shape[0])
        del self.gate_up_proj, self.down_proj
        self.gate_up_proj = [Rows([fetch(f"{prefix}.{e}.{part}_proj.weight") for part in ("gate", "up")]) for e in experts]
        self.down_proj = [fetch(f"{prefix}.{e}.down_proj.weight") for e in experts]

    def for_few(self, x_ND: torch.Tensor, routing: Routing, shared: MLP | None) -> torch.Tensor | None:
        """`forward` plus the shared MLP in one native call, for a few tokens without gradients; None where that cannot be."""
        if training(self.fp8_up):
            return None
        if not kernels.usable(x_ND) or not self.table.ready(self.gate_up_proj, self.down_proj, x_ND.dtype):
            return None
        rows = routing.experts_NK.numel()
        if (rows > FEW_ROWS or rows * x_ND.shape[1] > FEW_NUMBERS) and not self.table.compact:
            return None
        if shared is not None and not (shared.ready(x_ND) and shared.table.kinds == self.table.kinds):
            return None
        return kernels.experts(x_ND, self.table, routing.experts_NK, routing.weights_NK, shared and shared.table)

    def forward(self, x_ND: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Sum over a token's K experts of weight * expert(x): no token is ever dropped."""
        n, k = routing.experts_NK.shape
        rows_E, flat = routing.rows_E, routing.experts_NK.flatten()
        # Each expert's rows begin at a multiple of `align`, so that few distinct sizes occur (see data/packing.py).
        align = ALIGN if torch.is_autocast_enabled("cpu") and x_ND.device.type == "cpu" and n * k >= 8 * ALIGN else 1
        ends_E = (-(-rows_E // align) * align).cumsum(0)
        starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
        order = flat.argsort(stable=True)
        first_E = rows_E.cumsum(0) - rows_E
        ranked = flat[order]
        cell_M = torch.empty_like(order).index_copy_(0, order, torch.arange(n * k, device=order.device) - first_E[ranked]
                                                     + starts_E[ranked])
        size = n * k + (align - 1) * len(rows_E) if align > 1 else n * k
        cell_NK = cell_M.view(n, k)
        x_MD = fused.dispatch(x_ND, cell_NK, size, fused.autocast_dtype(x_ND))
        offs_E = ends_E.to(torch.int32)
        if routing.rows_ES is not None and training(self.fp8_up):
            offs_E = (starts_E[:, None] + routing.rows_ES.cumsum(1)).to(torch.int32)
            offs_E[:, -1] = ends_E
        gate_up = grouped_linear(x_MD, self.gate_up_proj, offs_E, self.fp8_up)
        y_MD = swiglu_linear(gate_up, self.down_proj, offs_E, self.fp8_down, self.recompute)
        return fused.combine(y_MD, cell_NK, routing.weights_NK)


class MoE(nn.Module):
    """Routed experts plus a shared MLP of width n_shared * moe_intermediate_size."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Gate(config)
        self.experts = ExpertBank(config)
        self.shared_experts = (MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
                               if config.n_shared_experts else None)

    def forward(self, x_ND: torch.Tensor, segments: Segments | None = None, real_N: torch.Tensor | None = None,
                ) -> tuple[torch.Tensor, Routing]:
        routing = self.gate(x_ND, segments, real_N)
        if self.experts.watch is not None:
            self.experts.watch(self.experts, routing.experts_NK)
        y = self.experts.for_few(x_ND, routing, self.shared_experts)
        if y is not None:
            return y, routing
        y = self.experts(x_ND, routing)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x_ND)
        return y, routing
