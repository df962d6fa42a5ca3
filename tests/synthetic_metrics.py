"""A made-up run's metrics.jsonl in the documented shape: curves that look like a run, from a seed, without a model."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

EXPERTS, LAYERS = 16, 3
RIGHT = (
    "3 numbers: 3 7 19, target 40.\nNearest first.\n19 + 7 = 26, left 3 26: 26 + 3 = 29, 26 * 3 = 78, 26 - 3 = 23. No.\n"
    "3 * 7 = 21, left 19 21: 19 + 21 = 40. Yes.\n"
)
WRONG = (
    "4 8 25, target 17.\n25 - 8 = 17, left 4 17: 17 + 4 = 21, 17 - 4 = 13, 17 * 4 = 68.\n"
    "25 - 4 = 21, left 8 21: 21 - 8 = 13. Close.\n"
)


def _shares(rng: random.Random, spread: float) -> list[list[float]]:
    rows = []
    for _ in range(LAYERS + 1):
        weights = [math.exp(rng.gauss(0, spread)) for _ in range(EXPERTS)]
        rows.append([w / sum(weights) for w in weights])
    return rows


def _clock(step: int, step_seconds: float, tokens_per_second: float, rate: float) -> dict[str, float]:
    seconds = step * step_seconds
    return {
        "time.seconds": seconds,
        "time.step_seconds": step_seconds,
        "time.tokens_per_second": tokens_per_second,
        "time.dollars": seconds * rate / 3600,
        "time.unix": time.time() + seconds - 3600,
    }


def _pretrain(rng: random.Random, steps: int, total: int, rate: float) -> list[dict[str, Any]]:
    lines = []
    for i in range(1, steps + 1):
        loss = 0.62 + 5.3 * math.exp(-i / (0.07 * total)) + 0.5 * math.exp(-i / (0.4 * total)) + rng.gauss(0, 0.03)
        lines.append(
            {
                "kind": "step",
                "stage": "pretrain",
                "step": i,
                "tokens": i * 8192,
                "loss": loss,
                "mtp_loss": loss * 1.25 + 0.1,
                "balance_loss": 1e-4,
                "grad_norm": 0.4 + 2 * math.exp(-i / 20) + abs(rng.gauss(0, 0.05)),
                "lr": 0.02 * (1 - i / total),
                "expert_load": _shares(rng, 0.7 * math.exp(-i / 80) + 0.08),
                "max_violation": 0.1 + 2 * math.exp(-i / 50) + rng.random() * 0.1,
                "skipped": 0,
                "flops": 7.9e9 + rng.gauss(0, 2e8),
                "time.mfu": 0.2 + rng.gauss(0, 0.005),
                "time.peak_bytes": 900_000_000 + 1_000_003 * i,
                **_clock(i, 0.85, 9600 + rng.gauss(0, 250), rate),
            }
        )
    return lines


def _grpo(rng: random.Random, steps: int, rate: float) -> list[dict[str, Any]]:
    lines, tokens = [], 0
    for i in range(1, steps + 1):
        accuracy = min(1.0, max(0.0, 0.35 + 0.5 * (1 - math.exp(-i / 30)) + rng.gauss(0, 0.04)))
        tokens += 192 * 130
        lines.append(
            {
                "kind": "step",
                "stage": "grpo",
                "step": i,
                "tokens": tokens,
                "reward": accuracy,
                "reward_parts": {"correct": accuracy},
                "accuracy": accuracy,
                "zero_spread": 0.25 + 0.4 * accuracy * rng.random(),
                "clip_share": 0.002 * rng.random(),
                "entropy": 0.42 * math.exp(-i / 90) + rng.gauss(0, 0.01),
                "length": 130 + rng.gauss(0, 5),
                "length_right": 96 + 12 * i / steps + rng.gauss(0, 4),
                "length_wrong": 205 + rng.gauss(0, 8),
                "thinking_length": 118 + rng.gauss(0, 5),
                "truncated": 0.08 * math.exp(-i / 25),
                "logprob_gap": 0.0021 + abs(rng.gauss(0, 0.0003)),
                "loss": rng.gauss(0, 0.004),
                "mtp_loss": 0.9 + rng.gauss(0, 0.02),
                "kl": 0.0,
                "grad_norm": 0.3 + abs(rng.gauss(0, 0.05)),
                "expert_load": _shares(rng, 0.2),
                "flops": 3.1e10 + rng.gauss(0, 1e9),
                "time.mfu": 0.1 + rng.gauss(0, 0.005),
                "time.peak_bytes": 1_200_000_000 + 1_000_003 * i,
                **_clock(i, 2.9, 9100 + rng.gauss(0, 300), rate),
            }
        )
        if i % 5 == 0 or i == steps:
            lines.append({"kind": "samples", "stage": "grpo", "step": i, "samples": [_sample(rng) for _ in range(4)]})
    return lines


def _plan(stage: str, steps: int, held: dict[str, int], rate: float) -> dict[str, Any]:
    seconds = steps * 0.7
    return {
        "kind": "plan",
        "stage": stage,
        "tokens": steps * 9000,
        "flops": steps * 1.1e10,
        "memory": held | {"activations": 90_000_000},
        "utilisation": 0.39,
        "time.peak_flops": 180e9,
        "time.planned_seconds": seconds,
        "time.planned_dollars": seconds * rate / 3600,
    }


def _sample(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.6:
        return {
            "prompt": "Reach 40 with 3, 7 and 19, each used once.",
            "thought": RIGHT,
            "answer": "3*7+19 = 40",
            "correct": 1,
        }
    return {"prompt": "4 8 25 -> 17", "thought": WRONG, "answer": "25-8 = 17", "correct": 0}


def make_lines(
    seed: int = 0, pretrain: int = 480, grpo: int = 60, done: bool = True, until: int | None = None, rate: float = 0.10
) -> list[dict[str, Any]]:
    """The lines of a run; `until` keeps only the first so many step lines (a run at work)."""
    rng = random.Random(seed)
    run = {
        "kind": "run",
        "stage": "",
        "recipe": "countdown-laptop",
        "description": "A small mixture of experts learns Countdown, then to reason about it.",
        "stages": [
            {"name": "pretrain", "kind": "pretrain", "budget": pretrain, "unit": "steps"},
            {"name": "grpo", "kind": "grpo", "budget": grpo, "unit": "steps"},
            {"name": "eval", "kind": "eval", "budget": 1000, "unit": "problems"},
        ],
        "parameters": 2_410_000,
        "active_parameters": 910_000,
        "dollars_per_hour": rate,
        "task": "countdown",
        "taught": "Countdown: reach a target from three numbers with + - * /, each number used once.",
    }
    lines = [run]
    for name, steps in (("pretrain", _pretrain(rng, pretrain, pretrain, rate)), ("grpo", _grpo(rng, grpo, rate))):
        held = {"weights": 9_600_000, "gradients": 9_500_000, "optimizer": 12_000_000}
        lines += [
            {"kind": "stage", "stage": name, "event": "start"},
            _plan(name, len(steps), held, rate),
            steps[0],
            {"kind": "memory", "stage": name, **held},
            *steps[1:],
            {"kind": "stage", "stage": name, "event": "end"},
        ]
    evals = [("stages/00-pretrain", "pretrain", 0.412), ("stages/01-grpo", "grpo", 0.858)]
    lines.append({"kind": "stage", "stage": "eval", "event": "start"})
    for checkpoint, name, accuracy in evals:
        half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / 1000)
        lines.append(
            {
                "kind": "eval",
                "stage": "eval",
                "checkpoint": checkpoint,
                "name": name,
                "n": 1000,
                "accuracy": accuracy,
                "low": accuracy - half,
                "high": accuracy + half,
                "thinking_length": rng.uniform(90, 140),
                "mtp_acceptance": rng.uniform(0.6, 0.8),
                "time.seconds": 15.5,
                "time.dollars": 15.5 * rate / 3600,
            }
        )
    lines.append({"kind": "stage", "stage": "eval", "event": "end"})
    lines.append(
        {
            "kind": "done",
            "stage": "",
            "time.seconds": pretrain * 0.85 + grpo * 2.9 + 31,
            "time.dollars": (pretrain * 0.85 + grpo * 2.9 + 31) * rate / 3600,
        }
    )
    if until is not None:
        steps = [i for i, line in enumerate(lines) if line["kind"] == "step"]
        return lines[: steps[until - 1] + 1] if until else lines[:2]
    return lines if done else lines[:-1]


def write_metrics(path: Path, **options: Any) -> list[dict[str, Any]]:
    lines = make_lines(**options)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines
