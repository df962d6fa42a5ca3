"""What the loop trains on: an objective hands out updates, and turns a micro-batch into a loss. Losses are pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from jevons.data.packing import Batch, Document, pack, weight_totals
from jevons.model import CausalLM, TrainOutput
from jevons.numerics import fused, linear
from jevons.plan import training_flops
from jevons.recipe.schedule import Phases, Timeline, value_at


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
    model: CausalLM
    watch_loss = False  # a loss far over its median marks a bad batch: for cross-entropies over much data
    score = ("loss", -1)  # what the best state is chosen by, and which sign makes more of it better
    interrupt: Callable[[], None] = staticmethod(lambda: None)  # the loop's; to be called within long work of `next_batch`
    timeline: Timeline | None = None  # the tokens of every step, where they are known beforehand

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

    def token_ids(self, micro: Any) -> torch.Tensor:
        """The ids that a micro-batch holds, for the log of a bad one."""
        return micro if isinstance(micro, torch.Tensor) else getattr(micro, "batch", micro).tokens_N

    def flops(self, micro: Any) -> float:
        """Model FLOPs of a micro-batch, forward and backward, by the plan's formula; what its padding costs is not counted."""
        positions_N = getattr(getattr(micro, "batch", micro), "positions_N", None)
        if positions_N is None or not bool((positions_N >= 0).any()):
            return 0.0
        context = (positions_N[positions_N >= 0] + 1).double()  # tokens that each token attends to
        weight = getattr(self, "_mtp_weight", None)  # of this step
        weight = getattr(getattr(self, "stage", None), "mtp_weight", 1.0) if weight is None else weight
        mtp = bool(self.model.mtp) and weight > 0
        return training_flops(self.model.config, context.numel(), 2 * float(context.mean()) - 1, mtp)

    def sampling_flops(self) -> float:
        """Model FLOPs of this step beside its micro-batches: of rollouts."""
        return 0.0

    def scores(self) -> dict[str, float]:
        """What the finished stage's provenance says of it beside its cost; often nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Plain values that resuming needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def opening(self) -> list[str]:
        """Notes for the log, once, when the stage begins."""
        return []

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that resuming needs (a reference policy)."""
        return {}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        pass


class TokenObjective(Objective):
    """Next-token, MTP and balance loss on packed rows: one update a step. `_mtp_weight` and `_bias_speed` are those of the step
    at hand, set by `at_step`."""

    model: CausalLM

    def at_step(self, step: int, mtp_weight: float | Phases, bias_update_speed: float | Phases) -> None:
        """Take both schedules' values for `step`; a skipped update leaves no load."""
        def value(schedule: float | Phases) -> float:
            return self.timeline.value(schedule, step) if self.timeline else value_at(schedule, step, self.steps)

        self._mtp_weight, self._bias_speed = value(mtp_weight), value(bias_update_speed)
        self._load: torch.Tensor | None = None

    def loss(self, batch: Batch) -> LossParts:
        out = self.model.forward_train(batch.tokens_N, batch.positions_N, batch.segments, mtp=self._mtp_weight > 0)
        main, sums = self.main_loss(batch, out)
        second = mtp_loss(self.model, out, batch) if out.mtp_hidden_ND is not None else main.new_zeros(())
        second, balance = second * batch.mtp_share, out.balance_loss * batch.row_share
        loss = main * batch.share + self._mtp_weight * second + self.model.config.aux_loss_alpha * balance
        sums = {key: value * batch.share for key, value in sums.items()}
        sums |= {"mtp_loss": second.item(), "balance_loss": balance.item(), "tokens": batch.tokens}
        return LossParts(loss, sums, out.load_RE)

    def main_loss(self, batch: Batch, out: TrainOutput) -> tuple[torch.Tensor, dict[str, float]]:
        """What the trunk learns from a micro-batch, and what is logged of it."""
        weights = batch.weights_N
        main = token_losses(self.model, out.hidden_ND, batch.targets_N, weights) / weights.sum()
        return main, {"loss": main.item()}

    def after_update(self, load_RE: torch.Tensor | None) -> None:
        self._load = load_RE
        if load_RE is not None:
            update_router_bias(self.model, load_RE, self._bias_speed)

    def metrics(self, sums: dict[str, float]) -> dict[str, Any]:
        hidden = {*(() if self.model.mtp else ("mtp_loss",)), *(() if self.model.routers() else ("balance_loss",))}
        return {key: value for key, value in sums.items() if key not in hidden} | load_metrics(self._load)


def micro_batches(parts: Sequence[Sequence[Document]], totals: tuple[float, float, int], pad_id: int,
                  rows: int | None) -> list[Batch]:
    """A packed micro-batch of each part, with its shares of the whole update's `totals` (`data.packing.weight_totals`), other
    processes' parts included. `rows` of them make a segment; None: all of one part."""
    batches = []
    for part in filter(None, parts):
        batch = pack(part, pad_id, rows or len(part))
        own = weight_totals(part)
        batch.share, batch.mtp_share, batch.row_share = (a / max(b, 1e-8) for a, b in zip(own, totals, strict=True))
        batches.append(batch)
    return batches


def token_losses(model: CausalLM, hidden_ND: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor,
                 detach_head: bool = False) -> torch.Tensor:
    """Sum of weighted cross-entropies over tokens, in float32. Tokens of weight 0 are left out before the head."""
    keep = weights_N.nonzero().squeeze(1)
    hidden = hidden_ND.index_select(0, keep)
    logits = linear(hidden, model.lm_head.weight.detach()) if detach_head else model.logits(hidden)
    losses = fused.cross_entropy(logits, targets_N[keep])
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
    """Share per expert of each router, its violation of balance max(load) / mean(load) - 1, and the worst of them."""
    if load_RE is None:
        return {}
    share = load_RE / load_RE.sum(-1, keepdim=True)
    violation = (load_RE.max(-1).values / load_RE.mean(-1) - 1).tolist()
    return {"expert_load": [[round(v, 4) for v in row] for row in share.tolist()],
            "violation": [round(v, 4) for v in violation], "max_violation": round(max(violation), 4)}
