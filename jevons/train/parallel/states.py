"""A loop's states on many processes: every one writes and reads its part, and all do so together."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from jevons.store.files import CheckpointError
from jevons.train.parallel import dcp
from jevons.train.state import States


class SpreadStates(States):
    """`States` through DCP. The same states are kept."""

    def save(self, wait: bool = False) -> None:
        super().save(wait)
        if wait or not self._loop.settings.guard.async_save:
            self._loop.parallel.finish()

    def close(self) -> None:
        """What is being written ends by itself, or with the process: whoever comes here in trouble may be alone."""

    def _write(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        loop, progress = self._loop, self._loop.progress
        loop.log.position()  # what the state counts on is on the disk before it
        spared = {s for s in (progress.good_step, progress.best_step) if s is not None}
        loop.parallel.save(loop.settings.directory, progress.step, tensors, meta, keep=loop.settings.guard.keep, spared=spared)

    def _newest(self, step: int | None = None) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        loop = self._loop
        others = {f"objective.{name}": t for name, t in loop.objective.tensors().items()}
        return loop.parallel.load(loop.settings.directory, loop.model, others, step)

    def _load(self, step: int) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]]:
        self._loop.parallel.finish()
        found = self._newest(step)
        if found is None:
            raise CheckpointError(f"{self._loop.settings.directory}: the state of step {step} is gone")
        return found

    def _drop_after(self, step: int) -> None:
        world, root = self._loop.parallel.world, self._loop.settings.directory / "train_state"
        world.meet()  # all have read
        if world.leads:
            for path in dcp.steps(root):
                if dcp.number(path) > step:
                    shutil.rmtree(path)
            super()._drop_after(step)
        world.meet()
