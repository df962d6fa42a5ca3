"""What the loop trains on: an objective hands out updates, and turns a micro-batch into a loss. Losses are pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from jevons.data.packing import Batch
from jevons.model import CausalLM, TrainOutput


@dataclass
class LossParts:
    """A micro-batch's loss, and sums of what is logged: `sums` are added over micro-batches, then divided by
    `sums["count"]`-like weights in `Objective.metrics`."""

    loss: torch.Tensor
    sums: dict[str, float] = field(default_factory=dict)
    load_RE: torch.Tensor | None = None


class Objective(Protocol):
    """One step is: `next_batch(step)` gives the updates of a step, each a list of micro-batches; every update is one
    optimizer step. All randomness comes from the seed and `step`, so `state_dict` is small (often empty)."""

    steps: int

    def next_batch(self, step: int) -> list[list[Any]]: ...

    def loss(self, micro: Any) -> LossParts: ...

    def after_update(self, load_RE: torch.Tensor | None) -> None:
        """Called after each optimizer step with the load of all its micro-batches (router bias update)."""

    def metrics(self, sums: dict[str, float]) -> dict[str, Any]:
        """What this step logs, from the sums over its micro-batches."""

    def samples(self) -> list[dict[str, Any]]:
        """Samples to show for this step; often none."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def token_losses(model: CausalLM, hidden_ND: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
    """Sum of weighted cross-entropies over tokens, in float32. Tokens of weight 0 are left out before the head."""
    keep = weights_N.nonzero().squeeze(1)
    logits = model.logits(hidden_ND.index_select(0, keep)).float()
    losses = F.cross_entropy(logits, targets_N[keep], reduction="none")
    return (losses * weights_N[keep]).sum()


def mtp_loss(model: CausalLM, out: TrainOutput, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the MTP module's second-next token (report eq. 24), over weighted tokens."""
    weights = batch.mtp_weights_N
    total = token_losses(model, out.mtp_hidden_ND, batch.mtp_targets_N, weights)
    return total / weights.sum().clamp(min=1e-8)


def update_router_bias(model: CausalLM, load_RE: torch.Tensor, speed: float) -> None:
    """b -= speed where an expert got more than the mean load, += where less: every router, the MTP one included."""
    if speed == 0:
        return
    for gate, load in zip(model.routers(), load_RE, strict=True):
        gate.e_score_correction_bias += speed * torch.sign(load.mean() - load)


def load_metrics(load_RE: torch.Tensor | None) -> dict[str, Any]:
    """Share per expert of each router, and the worst violation max(load) / mean(load) - 1."""
    if load_RE is None:
        return {}
    share = load_RE / load_RE.sum(-1, keepdim=True)
    violation = (load_RE.max(-1).values / load_RE.mean(-1) - 1).max()
    return {"expert_load": [[round(v, 4) for v in row] for row in share.tolist()], "max_violation": round(float(violation), 4)}
