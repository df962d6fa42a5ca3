"""`Parallel`: what the loop asks of a run on many processes. One class a layout: `Sharded`, `Pipelined`, `Replicated`.

Every layout makes the gradient that one process makes of the same micro-batches, in another order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from jevons.model import CausalLM, build_model
from jevons.train.objective import LossParts, Objective
from jevons.train.parallel import dcp
from jevons.train.parallel.mesh import World, share_out
from jevons.train.state import States


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Parallel:
    def __init__(self, world: World, dtype: torch.dtype = torch.float32):
        self.world, self.dtype = world, dtype  # of matrix products
        self.copies: dict[nn.Parameter, int] = {}  # on how many processes the same elements lie; 1 where not named
        self._writer = dcp.Writer(world)
        self._real: list[bool] = []
        self._reads_own = False  # the objective hands out this process's micro-batches only

    @property
    def place(self) -> tuple[int, int]:
        """Which part of an update's micro-batches is this process's, of how many."""
        return self.world.replica, self.world.table.replicas

    def prepare(self, model: CausalLM, objective: Objective) -> None:
        """Lay the model out, in place, before the optimizers are built. An objective with `ranks` above 1 reads its own part of
        the batch, as many micro-batches on every process; any other one's are shared out here."""
        self._reads_own = getattr(objective, "ranks", 1) > 1
        self.lay_out(model, objective)

    def lay_out(self, model: CausalLM, objective: Objective) -> None:
        raise NotImplementedError

    def own(self, update: list[Any]) -> list[Any]:
        """The micro-batches that this process computes, as many as every other; see `share_out`."""
        shared = [(micro, True) for micro in update] if self._reads_own else share_out(update, *self.place)
        self._real = [real for _, real in shared]
        return [micro for micro, _ in shared]

    def real(self, i: int) -> bool:
        """Whether own micro-batch `i` counts."""
        return self._real[i]

    def gradients(self, micros: list[Any], loss: Callable[[Any], LossParts]) -> Iterator[LossParts]:
        """Loss of each of `own`'s micro-batches; afterwards every parameter's `grad` is that of the whole update."""
        for i, micro in enumerate(micros):
            parts = loss(micro)
            (parts.loss if self.real(i) else parts.loss * 0).backward()
            yield parts if self.real(i) else nothing(parts)

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> torch.Tensor:
        """The gradient's norm over all processes; it is scaled down to `most` where it is larger."""
        held = [p for p in parameters if p.grad is not None]
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for p in held:
            total += torch.linalg.vector_norm(local(p.grad), dtype=torch.float64) ** 2 / self.copies.get(p, 1)
        self._over_all(total)
        norm = total.sqrt()
        scale = (most / (norm + 1e-6)).clamp(max=1.0)
        for p in held:
            local(p.grad).mul_(scale)
        return norm

    def _over_all(self, total: torch.Tensor) -> None:
        dist.all_reduce(total)

    def reduce(self, sums: dict[str, float], load_RE: torch.Tensor | None, loss: float = 0.0,
               ) -> tuple[torch.Tensor | None, float]:
        """What is logged (`sums`, in place), the routers' load and the loss, over all processes."""
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, (sums, loss), group=self.world.talk)
        totals: dict[str, float] = {}
        for own, _ in everyone:
            for key, value in own.items():
                totals[key] = totals.get(key, 0.0) + value
        sums.update(totals)
        if load_RE is not None:
            load_RE = load_RE.clone()
            dist.all_reduce(load_RE)
        return load_RE, sum(value for _, value in everyone)

    def states(self, loop: Any) -> States:
        """What saves and restores `loop`."""
        from jevons.train.parallel.states import SpreadStates

        return SpreadStates(loop)

    # -- what is saved ------------------------------------------------------------------------------------------------

    def save(self, directory: Path, step: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any], **kept: Any) -> None:
        """The train state, sharded, written while training goes on. `kept`: see `dcp.Writer`."""
        self._writer.save(directory, step, tensors, meta, **kept)

    def finish(self) -> None:
        """Wait until what was saved is whole. Raises StoreError where it could not be written."""
        self._writer.finish()

    def load(self, directory: Path, model: CausalLM, others: dict[str, torch.Tensor], step: int | None = None,
             ) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest whole state that any layout left (or that of `step`), laid out as this one; only what this process needs."""
        self.world.meet()
        found = self.world.tell(dcp.newest(directory, step) if self.world.leads else None)
        if found is None:
            return None
        meta = dcp.read_meta(found)
        return meta["step"], dcp.read(found, dcp.templates(model, others), self.world.talk), meta["meta"]

    def gather(self, model: CausalLM) -> CausalLM | None:
        """The whole model on the leader's CPU, tensor by tensor; None elsewhere."""
        self.world.meet()  # the leader may have written a checkpoint meanwhile
        own = dict(model.named_parameters())
        names: list[Any] = [None] * self.world.size
        dist.all_gather_object(names, sorted(own), group=self.world.talk)
        whole = build_model(model.config, dtype=next(iter(own.values())).dtype) if self.world.leads else None
        wanted = dict(whole.named_parameters()) if whole is not None else {}
        for name in dict.fromkeys(n for some in names for n in some):
            first = next(rank for rank, some in enumerate(names) if name in some)
            value = None
            if name in own:
                value = own[name].detach()
                value = (value.full_tensor() if isinstance(value, DTensor) else value).cpu().contiguous()
            if whole is not None:
                if value is None:
                    dist.recv(wanted[name].data, src=first, group=self.world.talk)
                else:
                    wanted[name].data.copy_(value)
            elif self.world.rank == first:
                dist.send(value, dst=0, group=self.world.talk)
        if whole is not None:
            for gate, held in zip(whole.routers(), model.routers(), strict=True):
                gate.e_score_correction_bias.copy_(held.e_score_correction_bias)
        return whole


def nothing(parts: LossParts) -> LossParts:
    """A micro-batch that was computed only because others waited for it: the same keys, all zero."""
    load = None if parts.load_RE is None else torch.zeros_like(parts.load_RE)
    return LossParts(parts.loss.detach() * 0, dict.fromkeys(parts.sums, 0.0), load)
