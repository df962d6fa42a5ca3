"""The one training loop. It owns optimizer, schedule, precision, checkpoints and the log; objectives come in as callables.

Resume is bit-exact: a step's data comes from (seed, step), and the state holds parameters, buffers and optimizer in
full precision, the objective's own state, and how long metrics.jsonl was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jevons.model import CausalLM
from jevons.numerics.memory import on_device
from jevons.plan import dollars
from jevons.recipe import OptimizerTable
from jevons.store.run_dir import MetricsLog
from jevons.store.train_state import load_latest, save_train_state
from jevons.train.objective import LossParts, Objective
from jevons.train.optim import build_optimizers, load_optimizer_tensors, lr_factor, optimizer_tensors

MAX_BAD_STEPS = 10  # consecutive updates without a finite gradient before the run stops


class TrainingDiverged(ValueError):
    """Too many updates in a row had no finite loss or gradient."""


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


@dataclass
class LoopSettings:
    """What the loop needs to know beside model and objective."""

    stage: str
    directory: Path  # the stage's directory; the train state goes below it
    optimizer: OptimizerTable
    save_every: int
    dtype: torch.dtype  # precision of matrix products; master weights stay float32
    dollars_per_hour: float
    should_stop: Callable[[], bool] = lambda: False
    on_step: Callable[[dict[str, Any], int], None] = lambda record, steps: None  # after every step: progress, chat


@dataclass
class Progress:
    """What a stage has done so far; saved with the state."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    seconds: float = 0.0

    def saved(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class StepResult:
    sums: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    lr: float = 0.0


class Loop:
    def __init__(self, model: CausalLM, objective: Objective, settings: LoopSettings, log: MetricsLog):
        self.model, self.objective, self.settings, self.log = model, objective, settings, log
        self.optimizers = build_optimizers(model, settings.optimizer)
        self._pool: ThreadPoolExecutor | None = None
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.progress = Progress()

    def run(self) -> Progress:
        """Train to the end of the budget. Raises Interrupted after saving when asked to stop."""
        self.model.train()
        began = time.monotonic() - self.progress.seconds
        while self.progress.step < self.objective.steps:
            started = time.monotonic()
            result = self._step()
            self.progress.step += 1
            now = time.monotonic()
            self.progress.seconds = now - began
            record = self._log(result, now - started)
            last = self.progress.step == self.objective.steps
            self.settings.on_step(record, self.objective.steps)
            stop = self.settings.should_stop() and not last
            if last or stop or self.progress.step % self.settings.save_every == 0:
                self.save()
            if stop:
                raise Interrupted(f"stopped after step {self.progress.step} of {self.objective.steps}; the state is saved")
        return self.progress

    def _step(self) -> StepResult:
        table = self.settings.optimizer
        result = StepResult(lr=table.lr * lr_factor(self.progress.step, self.objective.steps, table))
        for update in self.objective.next_batch(self.progress.step):
            load: torch.Tensor | None = None
            for parts, grads in self._gradients(update):
                for parameter, grad in zip(self._parameters, grads, strict=True):
                    if grad is not None:
                        parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
                for key, value in parts.sums.items():
                    result.sums[key] = result.sums.get(key, 0.0) + value
                if parts.load_RE is not None:
                    load = parts.load_RE if load is None else load + parts.load_RE
            if update:
                self._update(result, load)
        return result

    def _gradients(self, update: list[Any]) -> Iterator[tuple[LossParts, tuple[torch.Tensor | None, ...]]]:
        """Loss and gradients of each micro-batch, in order. On CPU cores take one each: two threads that share every small
        operation of one micro-batch spend a fourth of their time waiting for each other."""
        place = self.model.embed_tokens.weight.device
        device, dtype = place.type, self.settings.dtype

        def one(micro: Any) -> tuple[LossParts, tuple[torch.Tensor | None, ...]]:
            # autocast's cache of cast weights is one for all threads, and whoever ends first empties it: whether a weight's
            # gradients were summed in bf16 or float32 would be a race
            with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False):
                parts = self.objective.loss(on_device(micro, place))
            return parts, torch.autograd.grad(parts.loss, self._parameters, allow_unused=True)

        threads = min(len(update), torch.get_num_threads())
        if device != "cpu" or threads < 2:
            yield from map(one, update)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(torch.get_num_threads(), "micro", initializer=lambda: torch.set_num_threads(1))
        for first in range(0, len(update), threads):
            yield from self._pool.map(one, update[first : first + threads])

    def _update(self, result: StepResult, load: torch.Tensor | None) -> None:
        """One optimizer step; skipped, and counted, where the gradient is not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optimizer.grad_clip)
        result.grad_norm = norm.item()
        factor = lr_factor(self.progress.step, self.objective.steps, self.settings.optimizer)
        if torch.isfinite(norm):
            self.progress.bad_in_a_row = 0
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * factor
                optimizer.step()
            self.objective.after_update(load)
        else:
            self.progress.skipped += 1
            self.progress.bad_in_a_row += 1
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.progress.bad_in_a_row >= MAX_BAD_STEPS:
            raise TrainingDiverged(f"{MAX_BAD_STEPS} updates in a row had no finite gradient (stage {self.settings.stage}, step "
                                   f"{self.progress.step}); the last good state is kept. A lower learning rate would help")

    def _log(self, result: StepResult, seconds: float) -> dict[str, Any]:
        progress, stage = self.progress, self.settings.stage
        metrics = self.objective.metrics(result.sums)
        tokens = int(metrics["tokens"])
        progress.tokens += tokens
        record = {"kind": "step", "stage": stage, "step": progress.step} | metrics | {"tokens": progress.tokens}
        record |= {"grad_norm": result.grad_norm, "lr": result.lr, "skipped": progress.skipped}
        record |= {"time.seconds": round(progress.seconds, 3), "time.step_seconds": round(seconds, 4),
                   "time.tokens_per_second": round(tokens / seconds, 1),
                   "time.dollars": dollars(progress.seconds, self.settings.dollars_per_hour), "time.unix": time.time()}
        self.log.append(record)
        samples = self.objective.samples()
        if samples:
            self.log.append({"kind": "samples", "stage": stage, "step": progress.step, "samples": samples})
        return record

    # -- state --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        tensors = {f"model.{name}": t for name, t in _model_tensors(self.model).items()}
        tensors |= optimizer_tensors(self.model, self.optimizers)
        tensors |= {f"objective.{name}": t for name, t in self.objective.tensors().items()}
        meta = {"progress": self.progress.saved(), "objective": self.objective.state_dict(),
                "metrics_position": self.log.position(), "torch": torch.__version__, "threads": torch.get_num_threads(),
                "dtype": str(self.settings.dtype)}
        save_train_state(self.settings.directory, self.progress.step, tensors, meta)

    def resume(self) -> int:
        """Go back to the last saved state, if there is one; the step to go on from."""
        found = load_latest(self.settings.directory)
        if found is None:
            return 0
        _, tensors, meta = found
        now = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": str(self.settings.dtype)}
        self.log.truncate(meta["metrics_position"])
        changed = {key: (meta[key], value) for key, value in now.items() if meta[key] != value}
        if changed:
            what = ", ".join(f"{key} was {old} and is {new}" for key, (old, new) in changed.items())
            self.log.append({"kind": "note", "stage": self.settings.stage, "text": f"resumed, but not bit-exactly: {what}"})
        with torch.no_grad():
            for name, tensor in _model_tensors(self.model).items():
                tensor.copy_(tensors[f"model.{name}"])
        load_optimizer_tensors(self.model, self.optimizers, tensors)
        self.objective.load_tensors({n.removeprefix("objective."): t for n, t in tensors.items() if n.startswith("objective.")})
        self.objective.load_state_dict(meta["objective"])
        self.progress = Progress(**meta["progress"])
        return self.progress.step


def _model_tensors(model: CausalLM) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer once (tied weights under one name)."""
    tensors = dict(model.named_parameters())
    persistent = set(model.state_dict())
    return {n: t.detach() for n, t in tensors.items()} | {n: b for n, b in model.named_buffers() if n in persistent}
