"""Every process holds the whole model and reads its own part: reinforcement learning, whose engine needs live weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from jevons.model import CausalLM
from jevons.train.objective import LossParts, Objective
from jevons.train.parallel.base import Parallel


class Replicated(Parallel):
    """Gradients are summed over all processes once an update; the same optimizer step then happens everywhere."""

    @property
    def place(self) -> tuple[int, int]:
        return self.world.rank, self.world.size

    def lay_out(self, model: CausalLM, objective: Objective) -> None:
        if hasattr(objective, "spread"):
            objective.spread(self.place, self._everyone)
        self.world.meet()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, src=0)

    def _everyone(self, own: Any) -> list[Any]:
        """What every process made, in their order. Rollouts last differently long."""
        self.world.meet()
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, own, group=self.world.talk)
        return everyone

    def gradients(self, micros: list[Any], loss: Callable[[Any], LossParts]) -> Iterator[LossParts]:
        yield from super().gradients(micros, loss)
        for p in self._parameters:  # all have the same ones, whatever micro-batches they read
            if p.grad is not None:
                dist.all_reduce(p.grad)

    def _over_all(self, total: torch.Tensor) -> None:
        """Every process has the whole gradient already."""
