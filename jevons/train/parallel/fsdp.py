"""FSDP2 for everything but the routed experts' own dimension, which `experts.py` splits: parameters, gradients and optimizer
states are sharded over `data x expert`, float32 masters, a block's weights gathered while it runs.

Gradients are summed, not averaged: a micro-batch's loss already holds its share of the batch.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils import _pytree

from jevons.model import CausalLM, TrainOutput
from jevons.model.moe import MoE
from jevons.train.objective import Objective
from jevons.train.parallel.base import Parallel
from jevons.train.parallel.experts import spread_experts


class Sharded(Parallel):
    """FSDP2, with the experts spread where the mesh says so."""

    def lay_out(self, model: CausalLM, objective: Objective) -> None:
        table, mesh = self.world.table, self.world.mesh
        if table.expert > 1:
            spread_experts(model, mesh["expert"], table.fp8_dispatch)
        if TrainOutput not in _pytree.SUPPORTED_NODES:  # FSDP looks for the output's tensors to hook the backward pass to
            _pytree.register_dataclass(TrainOutput)
        everyone, blocks = self.world.replicas, [*model.layers, *model.mtp]
        apart: set[nn.Parameter] = set()
        for bank in [block.mlp.experts for block in blocks if table.expert > 1 and isinstance(block.mlp, MoE)]:
            if table.data > 1:  # dim 1: the experts' own dimension is taken
                fully_shard(bank, mesh=mesh["data"], shard_placement_fn=lambda p: Shard(1))
            else:
                apart |= set(bank.parameters())
        for layer in model.mtp:  # these run outside the layer's own forward
            fully_shard([layer.enorm, layer.hnorm, layer.eh_proj], mesh=everyone)
            fully_shard(layer.shared_head["norm"], mesh=everyone)
        for block in [*blocks, model]:
            fully_shard(block, mesh=everyone, ignored_params=apart)
        register_fsdp_forward_method(model, "forward_train")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


def whole_matrices(update: DTensor) -> DTensor:
    """Gathered as far as needed for every process to hold whole matrices: all of them, or its own experts' (dimension 0 of 3)."""
    kept = [place if update.dim() == 3 and place == Shard(0) else Replicate() for place in update.placements]
    return update.redistribute(placements=kept)
