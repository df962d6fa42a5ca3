"""Numbers that change while a stage trains: piecewise, in tokens or in parts of the stage. No torch here.

`mtp_weight = 0.3` or `mtp_weight = [{ until = 10e12, to = 0.3 }, { to = 0.1 }]`: what a step uses is a function of the tokens
that the steps before it had, and those are known before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class Phase(BaseModel):
    """One piece: constant at `to`, or from the phase before's end (the first: from 0) to it."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    to: float = Field(ge=0, allow_inf_nan=False)
    until: float = Field(1.0, gt=0, allow_inf_nan=False, description="tokens where it ends; up to 1: a part of the stage")
    shape: Literal["constant", "linear", "cosine"] = "constant"
    start: float | None = Field(None, alias="from", ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _from_needs_a_slope(self) -> Phase:
        if self.start is not None and self.shape == "constant":
            raise ValueError("`from` does nothing in a constant phase; shape linear or cosine would be right")
        return self

    def end(self, total: float) -> float:
        return self.until * total if self.until <= 1 else self.until


Phases = tuple[Phase, ...]
SCHEDULED = ("schedule", "batch_tokens", "mtp_weight", "bias_update_speed")  # keys that may hold phases
TAGS = ("number", "phases")  # in pydantic's error locations; no part of a key's name


def _kind(value: Any) -> str:
    return "phases" if isinstance(value, (list, tuple)) else "number"


def scheduled(number: Any) -> Any:
    """The annotation of a key that holds `number`, or phases."""
    phases = Annotated[Phases, Field(min_length=1), Tag("phases")]
    return Annotated[Annotated[number, Tag("number")] | phases, Discriminator(_kind)]


def value_at(schedule: float | Phases, done: float, total: float) -> float:
    """The schedule's value when `done` of a stage's `total` tokens (or steps) are behind."""
    if not isinstance(schedule, tuple):
        return float(schedule)
    begin = before = 0.0
    for phase in schedule:
        end = phase.end(total)
        if done < end:
            part, first = (done - begin) / (end - begin), before if phase.start is None else phase.start
            match phase.shape:
                case "constant":
                    return phase.to
                case "linear":
                    return first + (phase.to - first) * part
                case "cosine":
                    return phase.to + (first - phase.to) * 0.5 * (1 + math.cos(math.pi * part))
        begin, before = end, phase.to
    return before


def highest(schedule: float | Phases) -> float:
    """The largest value it ever has; 0: never more than that."""
    return max(max(p.to, p.start or 0.0) for p in schedule) if isinstance(schedule, tuple) else float(schedule)


def check_phases(name: str, schedule: Any, total: float | None) -> None:
    """Raises ValueError for phases out of order, past the stage's end, or in tokens where the stage counts none (total None)."""
    if not isinstance(schedule, tuple) or not schedule or not isinstance(schedule[0], Phase):
        return
    begin = 0.0
    for index, phase in enumerate(schedule):
        if total is None and phase.until > 1:
            raise ValueError(f"{name}[{index}].until = {phase.until:g}: this stage's tokens are not known before it runs; a "
                             "part of it, from 0 to 1, would be right")
        end = phase.end(total or 1.0)
        if not begin < end <= (total or 1.0):
            raise ValueError(f"{name}[{index}].until = {phase.until:g} must be past the phase before it ({begin:g}) and within "
                             f"the stage ({total or 1.0:g})")
        begin = end


@dataclass(frozen=True)
class Timeline:
    """Which tokens each step has: step i those from `bounds[i]` to `bounds[i + 1]`, by count. A batch of whole documents only
    comes near it, so schedules go by these numbers and not by what was read."""

    bounds: Sequence[int]
    total: float

    @classmethod
    def of(cls, tokens: int, batch: int | Phases) -> Timeline:
        """As many steps as come nearest to `tokens`; under a growing batch the last step ends within half a batch of them."""
        if not isinstance(batch, tuple):
            return cls(range(0, (max(1, round(tokens / batch)) + 1) * batch, batch), tokens)
        bounds = [0]
        while True:
            size = max(1, round(value_at(batch, bounds[-1], tokens)))
            if len(bounds) > 1 and tokens - bounds[-1] < size / 2:
                return cls(bounds, tokens)
            bounds.append(bounds[-1] + size)

    @property
    def steps(self) -> int:
        return len(self.bounds) - 1

    def begin(self, step: int) -> int:
        """Tokens before `step`; past the end every step is like the last."""
        over = max(0, step - self.steps)
        return self.bounds[step - over] + over * (self.bounds[-1] - self.bounds[-2])

    def batch(self, step: int) -> int:
        return self.begin(step + 1) - self.begin(step)

    def span(self, step: int, length: int) -> tuple[int, int]:
        """(first, how many) rows of `length` tokens in `step`: every row in one step, none left out between."""
        first, end = (self.begin(i) // length for i in (step, step + 1))
        return first, end - first

    def value(self, schedule: float | Phases, step: int) -> float:
        """The schedule's value in `step`, counted from 0."""
        return value_at(schedule, self.begin(step), self.total)
