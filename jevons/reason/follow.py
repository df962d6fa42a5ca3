"""The run on the processes that do not lead: they train along, and write nothing but their part of the train state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jevons.data.tokenizer import Tokenizer
from jevons.model import CausalLM
from jevons.reason.pipeline import Run
from jevons.train.parallel.mesh import Silent


class Quiet:
    """The observer of a process that does not lead; a signal reaches every process, so each may ask to stop."""

    def __init__(self, stop: Any):
        self.stop = stop

    def on_model(self, model: CausalLM, tokenizer: Tokenizer, name: str) -> None:
        pass

    def on_stage(self, name: str, done: int, budget: int) -> None:
        pass

    def on_step(self, record: dict[str, Any], budget: int) -> None:
        pass

    def should_stop(self) -> bool:
        return self.stop.asked


class Follower(Run):
    """Takes each stage as the leader tells it."""

    def execute(self, only_stage: str | None = None) -> None:
        self.log = Silent()
        while (told := self.world.tell()) is not None:
            index, self.tokenizer = told
            self._stage(index)
            self.model = None  # the leader's checkpoint is what the next stage begins with

    def _begin(self, directory: Path) -> None:
        pass

    def _from_the_start(self, directory: Path, name: str) -> None:
        pass

    def _log_once(self, record: dict[str, Any]) -> None:
        pass
