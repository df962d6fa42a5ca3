"""Multi-token prediction on and off (report sections 2.2 and 4.5.4): the main head's validation loss at equal tokens.

    python experiments/mtp.py --data input.txt --out runs/mtp --seeds 0 1 2

The two arms of a seed have the same weights at the start (the module's come last from the generator) and the same windows.
The MTP loss weighs 0.3 for the first two thirds of the steps and 0.1 after, as 10 of 14.8 trillion tokens did in the report;
the router's biases balance the experts in both. Prints losses, the paired difference with its 95 % interval over seeds, and how
often the module's best second-next token is accepted: on validation text, and on text continued greedily.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from text_runs import (
    Characters,
    Text,
    arguments,
    build,
    generated_acceptance,
    interval,
    kept,
    mixture,
    settings_of,
    train,
    validate,
)

from jevons.plan import count_parameters
from jevons.recipe import OptimizerTable

ARMS = ("off", "on")


@dataclass
class Settings:
    steps: int = 200
    rows: int = 16
    length: int = 128
    bias_speed: float = 0.01
    inter: int = 80
    hidden: int = 128
    layers: int = 4
    weight: float = 0.3  # of the MTP loss, then `late_weight`
    late_weight: float = 0.1


def run(arm: str, seed: int, text: Text, settings: Settings, most: int | None) -> dict[str, Any]:
    on = arm == "on"
    config = mixture(len(text.characters), settings.hidden, settings.inter, settings.layers, num_nextn_predict_layers=int(on))
    model = build(config, seed)

    def weight(done: float) -> float:
        return (settings.weight if done < 2 / 3 else settings.late_weight) if on else 0.0

    objective = Characters(model, text, seed=seed, steps=settings.steps, rows=settings.rows, length=settings.length,
                           bias_speed=settings.bias_speed, mtp_weight=weight)
    table = OptimizerTable(lr=3e-3, matrix_lr=0.02, warmup_steps=settings.steps // 20)
    train(model, objective, table, torch.bfloat16)
    found = validate(model, text, settings.length, most=most)
    found.pop("load")
    if on:
        found["acceptance_generated"] = generated_acceptance(model, text, *((4, 8, 8) if most else ()))
    counts = count_parameters(config)
    return {"arm": arm, "seed": seed, "tokens": settings.steps * settings.rows * settings.length, "parameters": counts.total,
            "active": counts.active, "mtp_parameters": counts.mtp} | found


def table(results: list[dict[str, Any]]) -> str:
    seeds = sorted({r["seed"] for r in results})
    rows = {(r["arm"], r["seed"]): r for r in results}
    on = [rows["on", s] for s in seeds]
    first = on[0]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    difference = interval([rows["on", s]["valid_loss"] - rows["off", s]["valid_loss"] for s in seeds])
    lines = [f"{first['parameters']:,} parameters ({first['active']:,} active), module {first['mtp_parameters']:,}; "
             f"{first['tokens']:,} tokens, seeds {seeds}", "",
             "| MTP | Main head's validation loss | On minus off (95 % interval) | MTP loss | Accepted: on text | generated |",
             "|---|---|---|---|---|---|",
             f"| off | {mean([rows['off', s]['valid_loss'] for s in seeds]):.4f} | - | - | - | - |",
             f"| on | {mean([r['valid_loss'] for r in on]):.4f} "
             f"| {difference[0]:+.4f} ({difference[1]:+.4f} to {difference[2]:+.4f}) "
             f"| {mean([r['mtp_loss'] for r in on]):.4f} | {mean([r['acceptance_on_text'] for r in on]):.1%} "
             f"| {mean([r['acceptance_generated'] for r in on]):.1%} |"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(__doc__, Settings)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    settings = settings_of(args, Settings, steps=6, rows=4, length=32, inter=16, hidden=32, layers=2)
    text = Text.read(args.data)
    results = []
    for seed in args.seeds:
        for arm in ARMS:
            found = kept(args.out, f"{arm}-{seed}", asdict(settings), lambda arm=arm, seed=seed: run(
                arm, seed, text, settings, 8 if args.quick else None))
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items() if k != "settings"}, flush=True)
            results.append(found)
    print(table(results), flush=True)
    return results


if __name__ == "__main__":
    main()
