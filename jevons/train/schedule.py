"""The learning rate of a step: warm-up, then constant, linear, cosine, or the recipe's own phases."""

from __future__ import annotations

import math

from jevons.recipe import OptimizerTable
from jevons.recipe.schedule import Timeline, value_at


def lr_factor(step: int, steps: int, table: OptimizerTable, timeline: Timeline | None = None) -> float:
    """The schedule as a factor of the base rate for update `step` of `steps`, both counted from 0.

    Named shapes go by steps, phases by the tokens of `timeline`, or by steps where there is none. Warm-up multiplies phases.
    """
    warmup = (step + 1) / table.warmup_steps if step < table.warmup_steps else 1.0
    if isinstance(table.schedule, tuple):
        value = timeline.value(table.schedule, step) if timeline else value_at(table.schedule, step, steps)
        return warmup * value / table.lr
    if step < table.warmup_steps or table.schedule == "constant":
        return warmup
    progress = min(1.0, (step - table.warmup_steps) / max(1, steps - table.warmup_steps))
    shape = 1 - progress if table.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return table.final_lr_fraction + (1 - table.final_lr_fraction) * shape
