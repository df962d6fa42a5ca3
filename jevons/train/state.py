"""What a stage saves of itself, and how it comes back: after a kill to the newest state, after bad batches to the last good one.

A state holds parameters, buffers and optimizer in full precision, the objective's own state, the guard's medians, and how long
metrics.jsonl was. Everything that follows is a function of it, so a replay gives the same numbers.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from jevons import __version__
from jevons.model import CausalLM
from jevons.numerics.native import state as native_state
from jevons.runtime import Runtime
from jevons.store.files import CheckpointError
from jevons.store.train_state import Writer, drop_after, load_latest, load_step, mark_best, snapshot, write_train_state
from jevons.train.guard import TrainingDiverged
from jevons.train.optim import load_optimizer_tensors, optimizer_tensors

if TYPE_CHECKING:
    from jevons.train.loop import Loop

SMOOTHING = 0.9  # of the score by which the best state is chosen


@dataclass
class Progress:
    """What a stage has done so far; saved with the state."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0  # updates, those of steps that were rolled back included
    bad_in_a_row: int = 0  # steps
    seconds: float = 0.0
    joules: float = 0.0
    passed_over: int = 0  # steps' data left behind by rollbacks: step n reads the data of step n + passed_over
    rollbacks: int = 0
    good_step: int | None = None  # the newest state that was saved after a good step
    best_step: int | None = None
    best_score: float | None = None
    score: float | None = None
    validated: bool = False
    measured: bool = False  # the memory line is written

    def saved(self) -> dict[str, Any]:
        return dict(vars(self))

    def see(self, record: dict[str, Any], key: str, sign: int) -> None:
        """Take a step's line into the score, of which more is better: `sign` times the smoothed `key`; once there is a
        `val_loss`, the last of these instead."""
        validation, value = record.get("val_loss"), record.get(key)
        if validation is not None:
            if not self.validated:
                self.validated, self.best_step, self.best_score = True, None, None
            self.score = -validation
        elif not self.validated and value is not None and math.isfinite(value):
            before = sign * value if self.score is None else self.score
            self.score = SMOOTHING * before + (1 - SMOOTHING) * sign * value


class States:
    """Saves and restores a loop. What touches the disk are `_write`, `_newest`, `_load` and `_drop_after`."""

    def __init__(self, loop: Loop):
        self._loop, self._writer, self._machine = loop, Writer(), _machine(loop.settings.precision())
        self.saved_step: int | None = None

    def save(self, wait: bool = False) -> None:
        """Copy everything, and let a thread write it. Raises StoreError where the write before failed; with `wait`, or where
        the recipe wants no thread, also where this one does."""
        loop, progress = self._loop, self._loop.progress
        self._writer.wait()
        if progress.bad_in_a_row == 0:
            progress.good_step = progress.step
            if progress.score is not None and (progress.best_score is None or progress.score > progress.best_score):
                progress.best_step, progress.best_score = progress.step, progress.score
        tensors = {f"model.{name}": t for name, t in _model_tensors(loop.model).items()}
        tensors |= optimizer_tensors(loop.model, loop.optimizers)
        tensors |= {f"objective.{name}": t for name, t in loop.objective.tensors().items()}
        meta = copy.deepcopy({"progress": progress.saved(), "objective": loop.objective.state_dict(),
                              "guard": loop.guard.state_dict(), "metrics_position": loop.log.size(), "machine": self._machine})
        self._write(tensors, meta)
        self.saved_step = progress.step
        if wait or not loop.settings.guard.async_save:
            self._writer.wait()

    def _write(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        loop, progress, copies = self._loop, self._loop.progress, snapshot(tensors)
        directory, keep, step, best = loop.settings.directory, loop.settings.guard.keep, progress.step, progress.best_step
        spared = {s for s in (progress.good_step, best) if s is not None}

        def write() -> None:
            loop.log.position()  # what the state counts on is on the disk before it
            write_train_state(directory, step, copies, meta, keep, spared)
            if best is not None:
                mark_best(directory, best)

        self._writer.submit(write)

    def _newest(self, step: int | None = None) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        directory = self._loop.settings.directory
        if any(directory.glob("train_state/dcp-*")):  # many processes left it
            from jevons.train.parallel.dcp import load_any

            return load_any(directory, step)
        return load_latest(directory) if step is None else load_step(directory, step)

    def _load(self, step: int) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]]:
        return self._newest(step)

    def _drop_after(self, step: int) -> None:
        drop_after(self._loop.settings.directory, step)

    def check(self) -> None:
        """Raises StoreError where a save has failed meanwhile."""
        self._writer.check()

    def close(self) -> None:
        """Let what is being written end."""
        self._writer.close()

    def resume(self) -> int:
        """Go back to the last saved state, if there is one; the step to go on from."""
        loop = self._loop
        found = self._newest()
        if found is None:
            return 0
        _, tensors, meta = found
        loop.log.truncate(meta["metrics_position"])
        before, now = meta.get("machine", {}), self._machine
        changed = [f"{key} was {before[key]} and is {value}" for key, value in now.items() if before.get(key, value) != value]
        if changed:
            loop.log.append({"kind": "note", "stage": loop.settings.stage,
                             "text": f"resumed, but not bit-exactly: {'; '.join(changed)}"})
        self._restore(tensors, meta)
        self.saved_step = loop.progress.step
        return loop.progress.step

    def roll_back(self, why: str) -> None:
        """Back to the last good state, and on past all data met since. Raises TrainingDiverged where that has been tried often
        enough, or where there is none."""
        loop, left, table = self._loop, self._loop.progress, self._loop.settings.guard
        where = f"stage {loop.settings.stage}, step {left.step}; the last: {why}"
        words = f"{table.rollback_after} steps in a row were bad ({where})"
        if left.good_step is None:
            raise TrainingDiverged(f"{words}, and no good state was saved before. A lower learning rate would help")
        if left.rollbacks >= table.max_rollbacks:
            raise TrainingDiverged(f"{words} after {left.rollbacks} of {table.max_rollbacks} rollbacks; the last good state, "
                                   f"step {left.good_step}, is kept. A lower learning rate would help")
        self._writer.wait()
        _, tensors, meta = self._load(left.good_step)
        self._drop_after(left.good_step)  # before anything of the new line is saved: a resume takes the highest step
        self._restore(tensors, meta)
        back = loop.progress
        met = left.step + left.passed_over
        loop.log.append({"kind": "rollback", "stage": loop.settings.stage, "step": left.step, "to_step": back.step,
                         "data_from": back.step + left.passed_over, "data_to": met, "rollbacks": left.rollbacks + 1, "why": why})
        back.passed_over, back.rollbacks, back.bad_in_a_row = met - back.step, left.rollbacks + 1, 0
        back.skipped, back.seconds, back.joules = left.skipped, left.seconds, left.joules
        self.save(wait=True)

    def restore_best(self) -> int | None:
        """The best state's weights into the model; its step, or None where there is no readable one."""
        self._writer.wait()
        step = self._loop.progress.best_step
        try:
            tensors = self._load(step)[1] if step is not None else None
        except CheckpointError:
            tensors = None
        if tensors is None:
            return None
        _load_model(self._loop.model, tensors)
        return step

    def _restore(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        loop = self._loop
        _load_model(loop.model, tensors)
        for optimizer in loop.optimizers:
            optimizer.state.clear()
        load_optimizer_tensors(loop.model, loop.optimizers, tensors)
        loop.objective.load_tensors({n.removeprefix("objective."): t for n, t in tensors.items() if n.startswith("objective.")})
        loop.objective.load_state_dict(meta["objective"])
        loop.guard.load_state_dict(meta.get("guard", {}))
        loop.progress = Progress(**meta["progress"])


def _machine(precision: str) -> dict[str, Any]:
    """What the last bits of every number depend on beside the state."""
    runtime = Runtime.detect("cpu")
    return {"jevons": __version__, "torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": precision,
            "cpu features": ", ".join(runtime.cpu_features) or "none of those that matter",
            "torch's cpu kernels": torch.backends.cpu.get_cpu_capability(),
            "native kernels": "none" if native_state().startswith("none") else "on"}


def _load_model(model: CausalLM, tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _model_tensors(model).items():
            tensor.copy_(tensors[f"model.{name}"])


def _model_tensors(model: CausalLM) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer once (tied weights under one name)."""
    tensors = dict(model.named_parameters())
    persistent = set(model.state_dict())
    return {n: t.detach() for n, t in tensors.items()} | {n: b for n, b in model.named_buffers() if n in persistent}
