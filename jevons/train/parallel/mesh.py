"""The processes of a run and the grid they stand in. One process needs none of this: the loop then runs without a `Parallel`.

    pipeline x data x expert      every (data, expert) place reads its own micro-batches; `replica` is both of them, flattened
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from jevons.recipe import MeshTable
from jevons.recipe.mesh import check_processes, processes
from jevons.store.run_dir import MetricsLog

_LOST = ("gloo", "NCCL", "onnection", "timed out", "Timed out", "timeout", "Broken pipe", "TCPStore", "Socket")


class RankLost(OSError):
    """Another process of the run died, or did not answer in time."""


class Silent(MetricsLog):
    """The log of a process that does not lead: the leader's holds everyone's numbers."""

    def __init__(self) -> None:
        pass

    def append(self, record: dict[str, Any]) -> None:
        pass

    def position(self) -> int:
        return 0

    def size(self) -> int:
        return 0

    def truncate(self, position: int) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class World:
    """Where this process stands. `talk` carries objects between CPUs; only the thread that writes states uses `saves`, for two
    threads' messages in one group would be taken for each other's."""

    table: MeshTable
    mesh: DeviceMesh
    replicas: DeviceMesh  # data x expert, flattened
    talk: dist.ProcessGroup
    saves: dist.ProcessGroup
    device: torch.device

    @classmethod
    def open(cls, table: MeshTable, kind: str = "cpu") -> World:
        """Join the others (torchrun's environment says where), on devices of this kind. Raises MeshError where the mesh has not
        as many places as there are processes."""
        check_processes(table, processes())
        cuda = kind == "cuda"
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        limit = timedelta(seconds=table.timeout)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit)
        return cls(table, *grid(table, device.type), *(dist.new_group(backend="gloo", timeout=limit) for _ in range(2)), device)

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once: log, checkpoints, provenance."""
        return self.rank == 0

    @property
    def replica(self) -> int:
        """Which part of the batch is this process's."""
        return self.replicas.get_local_rank()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def agree(self, asked: bool) -> bool:
        """True everywhere as soon as it is true somewhere."""
        flag = torch.tensor([float(asked)], device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def meet(self) -> None:
        """Wait for all, without a limit: before messages that have one, where some may have come a longer way."""
        store = dist.distributed_c10d._get_default_store()
        self._met = getattr(self, "_met", 0) + 1
        name = f"{self.talk.group_name} met {self._met}"
        if store.add(name, 1) == self.size:
            store.set(f"{name}-all", "1")
        while not store.check([f"{name}-all"]):
            time.sleep(0.02)

    def tell(self, value: Any = None) -> Any:
        """The leader's value, everywhere. Those who wait do so at the store, where no time limit runs: the leader may be at work
        on something of its own for long (an evaluation). If it dies, torchrun ends them; if the store goes, this raises."""
        store = dist.distributed_c10d._get_default_store()
        self._told = getattr(self, "_told", 0) + 1
        name = f"{self.talk.group_name} told {self._told}"
        if self.leads:
            store.set(name, "1")
        else:
            while not store.check([name]):
                time.sleep(0.05)
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"), group=self.talk)
        return box[0]

    @contextlib.contextmanager
    def lost(self) -> Iterator[None]:
        """Turns what torch says when a peer is gone into one clear sentence."""
        try:
            yield
        except RuntimeError as error:
            chain, seen = error, []
            while chain is not None:
                seen.append(chain)
                chain = chain.__cause__
            if not any(isinstance(e, dist.DistError) or any(word in str(e) for word in _LOST) for e in seen):
                raise
            cause = str(seen[-1]).splitlines()[0]
            raise RankLost(f"another of the run's {self.size} processes died, or did not answer for {self.table.timeout:g} s; "
                           f"this one (rank {self.rank}) ends too. What was saved is kept: the same command goes on from there, "
                           f"on fewer processes with `--mesh data=N` (torch said: {cause})") from error


def grid(table: MeshTable, device: str) -> tuple[DeviceMesh, DeviceMesh]:
    """The mesh, and its `data` and `expert` as one dimension."""
    mesh = init_device_mesh(device, (table.pipeline, table.data, table.expert), mesh_dim_names=("pipeline", "data", "expert"))
    return mesh, mesh["data", "expert"]._flatten("replica")


def share_out(items: Sequence[Any], place: int, places: int) -> list[tuple[Any, bool]]:
    """Every `places`-th item from `place` on. All get as many: who would run short gets an item again, marked False, which is
    computed (others wait for its messages) and counts nowhere."""
    rounds = -(-len(items) // places)
    at = [place + i * places for i in range(rounds)]
    return [(items[i], True) if i < len(items) else (items[i % len(items)], False) for i in at]

