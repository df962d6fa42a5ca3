"""Which layout a stage gets."""

from __future__ import annotations

import torch

from jevons.recipe import MeshTable
from jevons.train.parallel.base import Parallel
from jevons.train.parallel.fsdp import Sharded
from jevons.train.parallel.mesh import World
from jevons.train.parallel.pipeline import Pipelined
from jevons.train.parallel.replicas import Replicated


def layout(table: MeshTable, world: World, kind: str, dtype: torch.dtype = torch.float32) -> Parallel:
    """Reinforcement learning keeps the whole model on every process; a pipeline comes before sharding."""
    if kind == "grpo":
        return Replicated(world, dtype)
    return Pipelined(world, dtype) if table.pipeline > 1 else Sharded(world, dtype)
