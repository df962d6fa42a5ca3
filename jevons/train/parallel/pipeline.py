"""Pipelines through torch.distributed.pipelining: 1F1B, and the V-shaped ZBV and DualPipeV, which fold two stages onto each
process so that embedding, head and MTP module share the first (as DeepSeek places them).

A stage hands on hidden states and the balance losses so far; the last one runs the objective on what arrives, so that every
objective on packed batches is trained by the same code. Under 1F1B the MTP module's embedding is a second copy, kept equal by
adding up both gradients. Processes that hold the same stage add up theirs; experts may be spread within a stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV, ScheduleZBVZeroBubble
from torch.distributed.tensor import DTensor

from jevons.data.packing import Batch
from jevons.model import CausalLM, TrainOutput
from jevons.model.network import Block
from jevons.recipe import MeshError
from jevons.train.objective import LossParts, Objective
from jevons.train.parallel.base import Parallel, local
from jevons.train.parallel.experts import spread_experts

SCHEDULES = {"1f1b": Schedule1F1B, "zbv": ScheduleZBVZeroBubble, "dualpipev": ScheduleDualPipeV}


class Elsewhere(nn.Module):
    """In the place of a block that another process holds. The router's bias stays: all update it alike."""

    def __init__(self, block: Block):
        super().__init__()
        self.mlp = nn.Module()
        if hasattr(block.mlp, "gate"):
            self.mlp.gate = nn.Module()
            self.mlp.gate.register_buffer("e_score_correction_bias", block.mlp.gate.e_score_correction_bias)


class Stage(nn.Module):
    """Blocks [begin, end) of the trunk, and what comes before the first and after the last."""

    def __init__(self, owner: Pipelined, model: CausalLM, begin: int, end: int, first: bool, last: bool):
        super().__init__()
        self.blocks, self.begin, self.first, self.last = model.layers[begin:end], begin, first, last
        embeds = first or last and bool(model.mtp)  # a schedule makes the gradients of a stage's own parameters only
        self.ends = nn.ModuleList([m for m, here in ((model.embed_tokens, embeds), (model.norm, last), (model.lm_head, last),
                                                     (model.mtp, last)) if here])
        object.__setattr__(self, "work", owner)  # no submodule

    def forward(self, *arrived: torch.Tensor, index: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self.work.run(self, arrived, int(index))


class Pipelined(Parallel):
    def lay_out(self, model: CausalLM, objective: Objective) -> None:
        table, mesh = self.world.table, self.world.mesh
        self.model, self.stages = model, table.stages
        self.rank = mesh["pipeline"].get_local_rank()
        if table.expert > 1:
            spread_experts(model, mesh["expert"], table.fp8_dispatch)
        mine = [self.rank] if table.schedule == "1f1b" else [self.rank, self.stages - 1 - self.rank]
        count = len(model.layers)
        bounds = [(count * i // self.stages, count * (i + 1) // self.stages) for i in range(self.stages)]
        self.has_last = self.stages - 1 in mine
        self.parts = {i: Stage(self, model, *bounds[i], i == 0, i == self.stages - 1) for i in mine}
        self.trunk_routers = sum(hasattr(block.mlp, "gate") for block in model.layers)
        self.load_RE = torch.zeros(len(model.routers()), model.config.n_routed_experts or 0)
        held = {j for i in mine for j in range(*bounds[i])}
        for j, block in enumerate(model.layers):
            if j not in held:
                model.layers[j] = Elsewhere(block)
        copied = table.schedule == "1f1b" and bool(model.mtp)  # the embedding, on the last process too
        self._pair = self._first_and_last() if copied else None
        if not self.has_last:
            model.norm = model.lm_head = None
            for j, block in enumerate(model.mtp):
                model.mtp[j] = Elsewhere(block)
        if 0 not in mine and not (copied and self.has_last):
            device = model.embed_tokens.weight.device
            del model.embed_tokens
            model.embed_tokens = SimpleNamespace(weight=torch.empty(0, device=device))
        self.dtype_of_rows = next(model.parameters()).dtype
        model.forward_train = self._finish
        self._schedules: dict[tuple[int, int], Any] = {}
        self._arrived: tuple[Stage, tuple[torch.Tensor, ...], int] | None = None
        for p in model.parameters():
            self.copies[p] = table.data if isinstance(p, DTensor) else table.replicas
        if copied and (0 in mine or self.has_last):
            self.copies[model.embed_tokens.weight] *= 2

    def _first_and_last(self) -> dist.ProcessGroup | None:
        """The group of this pipeline's two ends; every process has to take part in making each."""
        own = None
        for ranks in self.world.mesh.mesh.flatten(1).T.tolist():
            group = dist.new_group([ranks[0], ranks[-1]])
            if self.world.rank in (ranks[0], ranks[-1]):
                own = group
        return own

    # -- one update ---------------------------------------------------------------------------------------------------

    def gradients(self, micros: Sequence[Batch], loss: Callable[[Any], LossParts]) -> Iterator[LossParts]:
        """The schedule runs all micro-batches; what each gave is handed out afterwards."""
        size = max(len(micro.tokens_N) for micro in micros)
        self._micros, self._loss = [padded(micro, size) for micro in micros], loss
        self._given: dict[int, LossParts] = {}
        self.load_RE = torch.zeros_like(self.load_RE)
        schedule = self._schedule(len(micros), size)
        index = torch.arange(len(micros))
        schedule.step(*((index,) if 0 in self.parts else ()), target=index if self.has_last else None, return_outputs=False,
                      index=index)
        self._add_up()
        nothing = torch.zeros(())
        for i in range(len(micros)):
            parts = self._given.get(i) or LossParts(nothing)
            yield LossParts(parts.loss.detach(), parts.sums, self.load_RE if i == 0 and self.load_RE.numel() else None)

    def run(self, stage: Stage, arrived: tuple[torch.Tensor, ...], i: int) -> Any:
        """One stage's forward of micro-batch `i`."""
        micro = self._micros[i]
        if stage.last:
            self._arrived = stage, arrived, i
            parts = self._loss(micro)
            self._arrived = None
            self._given[i] = parts
            if not self.real(i):
                self._given[i] = LossParts(parts.loss, dict.fromkeys(parts.sums, 0.0))
                return (parts.loss * 0 + arrived[1].sum() * 0).reshape(1)
            return (parts.loss + arrived[1].sum() * 0).reshape(1)  # the balance loss is sent a gradient even where it is unused
        x, balance = (self.model.embed_tokens(micro.tokens_N), self.model.rope.new_zeros(1)) if stage.first else arrived
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            x, routings = self.model.run_blocks(stage.blocks, x, micro.positions_N, micro.segments)
        self._count(stage, i, [r.load_E for r in routings])
        return x, balance.to(x.dtype) + sum(r.balance_loss for r in routings)

    def _finish(self, tokens_N, positions_N, segments, mtp: bool = True, detach_trunk: bool = False) -> TrainOutput:
        """`forward_train` of the last stage: it goes on from what arrived."""
        if self._arrived is None:
            raise MeshError("a pipeline computes losses within its schedule only; mesh.pipeline = 1 would be right for a stage "
                            "that validates while it trains")
        stage, (x, balance), i = self._arrived
        x, routings = self.model.run_blocks(stage.blocks, x, positions_N, segments)
        out = self.model.finish_train(x, routings, tokens_N, positions_N, segments, mtp, detach_trunk)
        own = 0 if out.load_RE is None else len(out.load_RE)
        self._count(stage, i, [] if own == 0 else list(out.load_RE))
        ran = self.trunk_routers + own - len(routings)  # the MTP module's router counts where it runs
        out.balance_loss = (balance.sum() + out.balance_loss * own) / max(1, ran)
        return out

    def _count(self, stage: Stage, i: int, loads: list[torch.Tensor]) -> None:
        """Into the rows of the routers that stand there, in the order of `routers()`."""
        if self.real(i) and loads:
            begin = sum(hasattr(block.mlp, "gate") for block in self.model.layers[: stage.begin])
            self.load_RE[begin : begin + len(loads)] += torch.stack(loads)

    def _schedule(self, micros: int, rows: int) -> Any:
        """A schedule for so many micro-batches of so many tokens; kept, for few sizes occur."""
        if (micros, rows) in self._schedules:
            return self._schedules[micros, rows]
        if micros < self.stages:
            raise MeshError(f"{micros} micro-batches do not fill {self.stages} stages ({self.world.table.schedule}); a"
                            f" smaller micro_batch_tokens or mesh.micro_batches = {self.stages} would be right")
        width, device, group = self.model.config.hidden_size, self.world.device, self.world.mesh["pipeline"].get_group()
        between = (torch.empty(rows, width, dtype=self.dtype_of_rows, requires_grad=True),
                   torch.empty(1, dtype=self.dtype_of_rows, requires_grad=True))
        made = []
        for i, part in self.parts.items():
            made.append(PipelineStage(part, i, self.stages, device, group=group,
                                      input_args=torch.zeros(1, dtype=torch.int64) if part.first else between,
                                      output_args=torch.empty(1, dtype=self.dtype_of_rows) if part.last else between))
        kind = SCHEDULES[self.world.table.schedule]
        schedule = kind(made[0] if kind is Schedule1F1B else made, micros, loss_fn=lambda out, _: out.sum(), scale_grads=False)
        self._schedules[micros, rows] = schedule
        return schedule

    def _add_up(self) -> None:
        """Every gradient over those who hold the same parameters."""
        mesh = self.world.mesh
        if self._pair is not None:
            dist.all_reduce(self.model.embed_tokens.weight.grad, group=self._pair)
        for p in self.model.parameters():
            over = mesh["data"] if isinstance(p, DTensor) else self.world.replicas
            if p.grad is not None and over.size() > 1:
                dist.all_reduce(local(p.grad), group=over.get_group())

    def reduce(self, sums: dict[str, float], load_RE: torch.Tensor | None, loss: float = 0.0,
               ) -> tuple[torch.Tensor | None, float]:
        load_RE, loss = super().reduce(sums, load_RE, loss)
        if load_RE is not None:  # the MTP module comes last, and may not have run
            load_RE = load_RE[: int(load_RE.sum(1).nonzero().max()) + 1]
        return load_RE, loss


def padded(batch: Batch, size: int) -> Batch:
    """With padding behind, which counts nowhere: stages exchange tensors of one size."""
    if not isinstance(batch, Batch):
        raise MeshError(f"a pipeline takes packed batches, and this stage trains on {type(batch).__name__}; mesh.pipeline = 1 "
                        "would be right")
    short = size - len(batch.tokens_N)
    fields = {f.name: F.pad(value, (0, short), value=-1 if f.name == "positions_N" else 0) for f in dataclasses.fields(batch)
              if f.name.endswith("_N") and isinstance(value := getattr(batch, f.name), torch.Tensor)}
    return dataclasses.replace(batch, **fields) if short else batch
