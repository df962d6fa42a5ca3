"""Which layout a stage gets."""

from __future__ import annotations

from jevons.recipe import MeshTable
from jevons.train.parallel.base import Parallel
from jevons.train.parallel.fsdp import Sharded
from jevons.train.parallel.mesh import World
from jevons.train.parallel.replicas import Replicated


def layout(table: MeshTable, world: World, kind: str) -> Parallel:
    """Reinforcement learning keeps the whole model on every process; a pipeline comes before sharding."""
    if kind == "grpo":
        return Replicated(world)
    return Sharded(world)
