"""What the plan said of each stage beside what was measured: plain numbers, from the lines of metrics.jsonl alone."""

from __future__ import annotations

import math
from typing import Any

Line = dict[str, Any]
Row = tuple[str, str, float | None, float | None]  # what, its unit, planned, measured
HELD = ("weights", "gradients", "optimizer")


def number_of(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def kept_steps(lines: list[Line], stage: Any) -> list[Line]:
    """A stage's steps, without those that a rollback left behind."""
    steps: list[Line] = []
    for line in lines:
        if line.get("stage") != stage:
            continue
        if line.get("kind") == "rollback":
            steps = [s for s in steps if (number_of(s.get("step")) or 0) <= (number_of(line.get("to_step")) or 0)]
        elif line.get("kind") == "step":
            steps.append(line)
    return steps


def against_plan(lines: list[Line]) -> dict[str, list[Row]]:
    """Rows by stage, of stages that have a plan and a step. FLOPs, time, dollars and energy are those of all steps, of the ones
    that a rollback left behind too; tokens are those of the steps that count."""
    plans = {line.get("stage"): line for line in lines if line.get("kind") == "plan"}
    held = {line.get("stage"): line for line in lines if line.get("kind") == "memory"}
    steps: dict[Any, list[Line]] = {name: [] for name in plans}
    for line in lines:
        if line.get("kind") == "step" and line.get("stage") in steps:
            steps[line["stage"]].append(line)
    return {str(name): _rows(plans[name], of, held.get(name, {})) for name, of in steps.items() if of}


def _rows(plan: Line, steps: list[Line], held: Line) -> list[Row]:
    last, memory = steps[-1], plan["memory"] if isinstance(plan.get("memory"), dict) else {}
    seconds, planned_seconds = number_of(last.get("time.seconds")), number_of(plan.get("time.planned_seconds"))
    tokens, planned_tokens = number_of(last.get("tokens")), number_of(plan.get("tokens"))
    flops = sum(number_of(step.get("flops")) or 0.0 for step in steps) or None
    peak = max((v for step in steps if (v := number_of(step.get("time.peak_bytes"))) is not None), default=None)
    known = [number_of(held.get(key)) for key in HELD]
    parts = [number_of(memory.get(key)) for key in (*HELD, "activations")]
    rows: list[Row] = [
        ("tokens", "", planned_tokens, tokens),
        ("model FLOPs", "FLOP", number_of(plan.get("flops")), flops),
        ("utilisation", "%", number_of(plan.get("utilisation")),
         _ratio(_ratio(flops, seconds), number_of(plan.get("time.peak_flops")))),
        ("tokens a second", "", _ratio(planned_tokens, planned_seconds), _ratio(tokens, seconds)),
        ("time", "s", planned_seconds, seconds),
        ("dollars", "$", number_of(plan.get("time.planned_dollars")), number_of(last.get("time.dollars"))),
        *[(key, "B", parts[i], known[i]) for i, key in enumerate(HELD)],
        ("activations and the rest", "B", parts[-1], None if peak is None or None in known else peak - sum(known)),
        ("memory in all", "B", sum(v for value in memory.values() if (v := number_of(value)) is not None) or None, peak)]
    joules = number_of(last.get("time.joules"))
    return [*rows, ("energy", "J", None, joules)] if joules is not None else rows


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
