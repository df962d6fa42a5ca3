"""The one training loop. It owns optimizer, schedule, precision, checkpoints and the log; objectives come in as callables.

Resume is bit-exact: a step's data comes from (seed, step), and `train/state.py` keeps everything else that a number depends on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jevons.model import CausalLM
from jevons.model.precision import set_training_precision
from jevons.numerics import Fp8
from jevons.numerics.memory import on_device
from jevons.plan import dollars
from jevons.recipe import GuardTable, OptimizerTable
from jevons.store.run_dir import MetricsLog
from jevons.train.cost import Meter
from jevons.train.guard import Guard, TrainingDiverged, describe_batch
from jevons.train.objective import LossParts, Objective
from jevons.train.optim import build_optimizers
from jevons.train.schedule import lr_factor
from jevons.train.state import Progress, States

if TYPE_CHECKING:  # what one process does without takes a second to import
    from jevons.train.parallel.base import Parallel

__all__ = ["Interrupted", "Loop", "LoopSettings", "Progress", "TrainingDiverged"]


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class _Abandoned(Exception):
    """The step was left before it changed anything."""


@dataclass
class LoopSettings:
    """What the loop needs to know beside model and objective."""

    stage: str
    directory: Path  # the stage's directory; the train state goes below it
    optimizer: OptimizerTable
    save_every: int
    dtype: torch.dtype  # precision of matrix products; master weights stay float32
    dollars_per_hour: float
    guard: GuardTable = GuardTable()
    moments: str = "float32"  # of AdamW: "float32" or "bf16"
    fp8: Fp8 | None = None  # how projections train in FP8; None: in `dtype`
    recompute: bool = False  # in the backward pass, instead of keeping
    should_stop: Callable[[], bool] = lambda: False
    may_abandon: bool = True  # ask it within steps too, and leave a step that has changed nothing yet
    peak_flops: float | None = None  # a second, of this machine's own matrix products in `dtype`
    on_step: Callable[[dict[str, Any], int], None] = lambda record, steps: None  # after every step: progress, chat
    parallel: Parallel | None = None  # the layout over many processes

    def precision(self) -> str:
        """What the numbers of a step depend on: the products' precision, in words."""
        scales = f" with FP8 projections ({self.fp8.accumulation}, power_of_two={self.fp8.power_of_two})" if self.fp8 else ""
        return f"{self.dtype}{scales}"


@dataclass
class StepResult:
    sums: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    lr: float = 0.0
    flops: float = 0.0
    bad: str | None = None  # why an update was not made
    changed: bool = False  # an update was made


class Loop:
    def __init__(self, model: CausalLM, objective: Objective, settings: LoopSettings, log: MetricsLog):
        self.model, self.objective, self.settings, self.log = model, objective, settings, log
        self.parallel = settings.parallel
        set_training_precision(model, settings.fp8, settings.recompute)
        if self.parallel:
            self.parallel.prepare(model, objective)
        self.optimizers = build_optimizers(model, settings.optimizer, settings.moments)
        self._pool: ThreadPoolExecutor | None = None
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.progress = Progress()
        self.guard = Guard(settings.guard, objective.watch_loss)
        self.meter = Meter(settings.peak_flops)
        self.states = self.parallel.states(self) if self.parallel else States(self)
        objective.interrupt = self._interrupt

    def run(self) -> Progress:
        """Train to the end of the budget. Raises Interrupted after saving when asked to stop, TrainingDiverged where rolling
        back does not help, StoreError where a state could not be written."""
        try:
            self._run()
        finally:
            self.states.close()
        return self.progress

    def _run(self) -> None:
        self.model.train()
        began = time.monotonic() - self.progress.seconds
        while self.progress.step < self.objective.steps:
            started = time.monotonic()
            try:
                result = self._step()
            except _Abandoned:
                self._clear_gradients()
                self._stop()
            self.progress.step += 1
            now = time.monotonic()
            self.progress.seconds = now - began
            record = self._log(result, now - started)
            self.settings.on_step(record, self.objective.steps)
            self.states.check()
            if self.progress.bad_in_a_row >= self.settings.guard.rollback_after:
                self.states.roll_back(result.bad or "")
            last = self.progress.step == self.objective.steps
            if self.settings.should_stop() and not last:
                self._stop()
            if last or self.progress.step % self.settings.save_every == 0 and self.states.saved_step != self.progress.step:
                self.states.save(wait=last)

    def _stop(self) -> None:
        step = self.progress.step
        if step and self.states.saved_step != step:
            self.states.save(wait=True)
        raise Interrupted(f"stopped after step {step} of {self.objective.steps}; the state is saved")

    def _lr_factor(self) -> float:
        return lr_factor(self.progress.step, self.objective.steps, self.settings.optimizer, self.objective.timeline)

    def _step(self) -> StepResult:
        data_step = self.progress.step + self.progress.passed_over
        result = StepResult(lr=self.settings.optimizer.lr * self._lr_factor())
        self._result = result
        for index, update in enumerate(self.objective.next_batch(data_step)):
            load: torch.Tensor | None = None
            update = self.parallel.own(update) if self.parallel else update
            loss, sums = 0.0, {}
            for place, (micro, (parts, grads)) in enumerate(zip(update, self._gradients(update), strict=True)):
                for parameter, grad in zip(self._parameters, grads, strict=True):
                    if grad is not None:
                        parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
                counts = not self.parallel or self.parallel.real(place)
                for key, value in (parts.sums | {"flops": self.objective.flops(micro) * counts}).items():
                    sums[key] = sums.get(key, 0.0) + value
                if parts.load_RE is not None:
                    load = parts.load_RE if load is None else load + parts.load_RE
                loss += parts.loss.item()
                self._interrupt()
            if update:
                if self.parallel:
                    load, loss = self.parallel.reduce(sums, load, loss)
                why = self._update(result, load, loss)
                if why is not None:
                    self._note_bad(data_step, index, update, why)
            result.flops += sums.pop("flops", 0.0)
            for key, value in sums.items():
                result.sums[key] = result.sums.get(key, 0.0) + value
        if result.changed:
            self.progress.bad_in_a_row = 0
        elif result.bad is not None:
            self.progress.bad_in_a_row += 1
        result.flops += self.objective.sampling_flops()
        return result

    def _interrupt(self) -> None:
        """Leaves a step when asked to stop, as long as the weights are those it began with."""
        if self.settings.may_abandon and not self._result.changed and self.settings.should_stop():
            raise _Abandoned

    def _gradients(self, update: list[Any]) -> Iterator[tuple[LossParts, tuple[torch.Tensor | None, ...]]]:
        """Loss and gradients of each micro-batch, in order. On CPU cores take one each: two threads that share every small
        operation of one micro-batch spend a fourth of their time waiting for each other."""
        place = self.model.embed_tokens.weight.device
        device, dtype = place.type, self.settings.dtype

        def loss(micro: Any) -> LossParts:
            # autocast's cache of cast weights is one for all threads, and whoever ends first empties it: whether a weight's
            # gradients were summed in bf16 or float32 would be a race
            with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False):
                return self.objective.loss(on_device(micro, place))

        if self.parallel:
            yield from ((parts, (None,) * len(self._parameters)) for parts in self.parallel.gradients(update, loss))
            return

        def one(micro: Any) -> tuple[LossParts, tuple[torch.Tensor | None, ...]]:
            parts = loss(micro)
            return parts, torch.autograd.grad(parts.loss, self._parameters, allow_unused=True)

        threads = min(len(update), torch.get_num_threads())
        if device != "cpu" or threads < 2:
            yield from map(one, update)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(torch.get_num_threads(), "micro", initializer=lambda: torch.set_num_threads(1))
        for first in range(0, len(update), threads):
            yield from self._pool.map(one, update[first : first + threads])

    def _update(self, result: StepResult, load: torch.Tensor | None, loss: float) -> str | None:
        """One optimizer step, or why none was made."""
        clip = self.parallel.clip if self.parallel else torch.nn.utils.clip_grad_norm_
        norm = clip(self.model.parameters(), self.settings.optimizer.grad_clip)
        result.grad_norm = norm.item()
        why = self.guard.judge(result.grad_norm, loss)
        if why is None:
            result.changed = True
            factor = self._lr_factor()
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * factor
                optimizer.step()
            self.objective.after_update(load)
        else:
            self.progress.skipped += 1
            result.bad = why
        self._clear_gradients()
        return why

    def _clear_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _note_bad(self, data_step: int, index: int, update: list[Any], why: str) -> None:
        """`next_batch(data_step)[index]` gives the batch again (GRPO: under the weights of then)."""
        self.log.append({"kind": "bad_batch", "stage": self.settings.stage, "step": self.progress.step + 1,
                         "data_step": data_step, "update": index, "why": why} | describe_batch(self.objective, update))

    def _log(self, result: StepResult, seconds: float) -> dict[str, Any]:
        progress, stage = self.progress, self.settings.stage
        metrics = self.objective.metrics(result.sums)
        tokens = int(metrics["tokens"])
        progress.tokens += tokens
        record = {"kind": "step", "stage": stage, "step": progress.step} | metrics | {"tokens": progress.tokens}
        record |= {"grad_norm": result.grad_norm, "lr": result.lr, "skipped": progress.skipped, "flops": result.flops}
        record |= {"time.seconds": round(progress.seconds, 3), "time.step_seconds": round(seconds, 4),
                   "time.tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
                   "time.dollars": dollars(progress.seconds, self.settings.dollars_per_hour), "time.unix": time.time()}
        record |= self.meter.read(result.flops, seconds, progress)
        progress.see(record, *self.objective.score)
        self.log.append(record)
        if result.changed and not progress.measured:
            self.log.append({"kind": "memory", "stage": stage} | self.meter.held(self.model, self.optimizers))
            progress.measured = True
        samples = self.objective.samples()
        if samples:
            self.log.append({"kind": "samples", "stage": stage, "step": progress.step, "samples": samples})
        return record

    def resume(self) -> int:
        """Go back to the last saved state, if there is one; the step to go on from."""
        return self.states.resume()
