"""A loop's states on many processes: every one writes and reads its part, and all do so together."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from jevons.store.files import CheckpointError
from jevons.train.parallel import state
from jevons.train.state import States


class SpreadStates(States):
    """`States` through DCP. The last two states and the last good one are kept."""

    def save(self, wait: bool = False) -> None:
        super().save(wait)
        if wait:
            self._loop.parallel.finish()

    def close(self) -> None:
        """What is being written ends by itself, or with the process: whoever comes here in trouble may be alone."""

    def _write(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        loop = self._loop
        loop.log.position()  # what the state counts on is on the disk before it
        loop.parallel.save(loop.settings.directory, loop.progress.step, tensors, meta)

    def _newest(self) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        loop = self._loop
        others = {f"objective.{name}": t for name, t in loop.objective.tensors().items()}
        return loop.parallel.load(loop.settings.directory, loop.model, others)

    def _load(self, step: int) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]]:
        self._loop.parallel.finish()
        self._drop_after(step)
        found = self._newest()
        if found is None or found[0] != step:
            raise CheckpointError(f"{self._loop.settings.directory}: the state of step {step} is gone")
        return found

    def _drop_after(self, step: int) -> None:
        if self._loop.parallel.world.leads:
            for path in state.steps(self._loop.settings.directory / "train_state"):
                if state.number(path) > step:
                    shutil.rmtree(path)
            super()._drop_after(step)
