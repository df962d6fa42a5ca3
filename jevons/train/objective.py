"""What the loop trains on: an objective hands out updates, and turns a micro-batch into a loss. Losses are pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from jevons.data.packing import Batch
from jevons.model import CausalLM, TrainOutput
from jevons.numerics import linear, upcast


@dataclass
class LossParts:
    """A micro-batch's loss, and what is logged of it: `sums` are added over a step's micro-batches."""

    loss: torch.Tensor
    sums: dict[str, float] = field(default_factory=dict)
    load_RE: torch.Tensor | None = None


class Objective:
    """One step is: `next_batch(step)` gives the updates of a step, each a list of micro-batches; every update is one
    optimizer step. All randomness comes from the seed and `step`, so the state is small (often empty)."""

    steps: int

    def next_batch(self, step: int) -> list[list[Any]]:
        raise NotImplementedError

    def loss(self, micro: Any) -> LossParts:
        raise NotImplementedError

    def after_update(self, load_RE: torch.Tensor | None) -> None:
        """Called after each optimizer step with the load of all its micro-batches (router bias update)."""

    def metrics(self, sums: dict[str, float]) -> dict[str, Any]:
        """What this step logs, from the sums over its micro-batches; "tokens" says how many it read or generated."""
        raise NotImplementedError

    def samples(self) -> list[dict[str, Any]]:
        """Samples to show for this step; often none."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Plain values that resuming needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that resuming needs (a reference policy)."""
        return {}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        pass


def token_losses(model: CausalLM, hidden_ND: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor,
                 detach_head: bool = False) -> torch.Tensor:
    """Sum of weighted cross-entropies over tokens, in float32. Tokens of weight 0 are left out before the head."""
    keep = weights_N.nonzero().squeeze(1)
    hidden = hidden_ND.index_select(0, keep)
    logits = linear(hidden, model.lm_head.weight.detach()) if detach_head else model.logits(hidden)
    losses = F.cross_entropy(upcast(logits), targets_N[keep], reduction="none")
    return (losses * weights_N[keep]).sum()


def mtp_loss(model: CausalLM, out: TrainOutput, batch: Batch, detach_head: bool = False) -> torch.Tensor:
    """Mean cross-entropy of the MTP module's second-next token (report eq. 24), over weighted tokens."""
    total = token_losses(model, out.mtp_hidden_ND, batch.mtp_targets_N, batch.mtp_weights_N, detach_head)
    return total / batch.mtp_weights_N.sum().clamp(min=1e-8)


def update_router_bias(model: CausalLM, load_RE: torch.Tensor, speed: float) -> None:
    """b -= speed where an expert got more than the mean load, += where less: every router, the MTP one included."""
    if speed == 0:
        return
    for gate, load in zip(model.routers(), load_RE, strict=False):  # the MTP router comes last, and may not have run
        gate.e_score_correction_bias += speed * torch.sign(load.mean() - load)


def load_metrics(load_RE: torch.Tensor | None) -> dict[str, Any]:
    """Share per expert of each router, and the worst violation max(load) / mean(load) - 1."""
    if load_RE is None:
        return {}
    share = load_RE / load_RE.sum(-1, keepdim=True)
    violation = (load_RE.max(-1).values / load_RE.mean(-1) - 1).max()
    return {"expert_load": [[round(v, 4) for v in row] for row in share.tolist()], "max_violation": round(float(violation), 4)}
