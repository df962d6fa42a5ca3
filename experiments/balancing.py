"""Auxiliary-loss-free balancing (report sections 2.1.2 and 4.5.3): 16 experts, one small model, paired seeds.

    python experiments/balancing.py --data input.txt --out runs/balancing --seeds 0 1 2

Arms differ in one thing each: how the router is kept balanced. `free` moves the biases and has no loss; `sequence` and
`batch` have the auxiliary loss over each row, or over the whole batch, and no bias; `none` has neither. Weights, data order and
everything else are the same for the arms of a seed. Prints validation loss, the load of the busiest expert over the mean (over
the validation text, and within a training step after warm-up; the worst router of all), and paired differences from `free`
with 95 % intervals over seeds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from text_runs import Characters, Text, arguments, build, interval, kept, mixture, settings_of, train, validate

from jevons.model import CausalLM
from jevons.plan import count_parameters
from jevons.recipe import OptimizerTable

ARMS = ("free", "sequence", "batch", "none")
WARM = 1 / 3  # of the steps; loads are counted after


@dataclass
class Settings:
    steps: int = 200
    rows: int = 16
    length: int = 128
    bias_speed: float = 0.01
    alpha: float = 0.01  # of the auxiliary losses
    inter: int = 80
    hidden: int = 128
    optimizer: str = "muon"


def over_the_batch(model: CausalLM) -> None:
    """The gates see all tokens as one row: the auxiliary loss is then batch-wise. Attention keeps the rows."""
    for gate in model.routers():
        gate.register_forward_pre_hook(lambda gate, args: (args[0], args[1] and [(1, len(args[0]))], args[2]))


def busiest(load_RE: torch.Tensor) -> float:
    """Most loaded expert over the mean, of the worst router."""
    return (load_RE.max(-1).values / load_RE.mean(-1)).max().item()


def run(arm: str, seed: int, text: Text, settings: Settings, most: int | None) -> dict[str, Any]:
    config = mixture(len(text.characters), settings.hidden, settings.inter,
                     aux_loss_alpha=settings.alpha if arm in ("sequence", "batch") else 0.0)
    model = build(config, seed)
    if arm == "batch":
        over_the_batch(model)
    objective = Characters(model, text, seed=seed, steps=settings.steps, rows=settings.rows, length=settings.length,
                           bias_speed=settings.bias_speed if arm == "free" else 0.0)
    table = OptimizerTable(matrices=settings.optimizer, lr=3e-3, matrix_lr=0.02, warmup_steps=settings.steps // 20)
    train(model, objective, table, torch.bfloat16)
    found = validate(model, text, settings.length, most=most)
    warm = objective.loads[int(settings.steps * WARM) :]
    counts = count_parameters(config)
    return {"arm": arm, "seed": seed, "valid_loss": found["valid_loss"], "valid_tokens": found["valid_tokens"],
            "tokens": settings.steps * settings.rows * settings.length, "parameters": counts.total, "active": counts.active,
            "busiest_valid": busiest(torch.tensor(found["load"])), "busiest_train": busiest(sum(warm)),
            "busiest_step": sum(map(busiest, warm)) / len(warm)}


def table(results: list[dict[str, Any]], arms: list[str]) -> str:
    seeds = sorted({r["seed"] for r in results})
    rows = {(r["arm"], r["seed"]): r for r in results}
    first = results[0]
    lines = [f"{first['parameters']:,} parameters ({first['active']:,} active), {first['tokens']:,} tokens, seeds {seeds}", "",
             "| Balancing | Validation loss | Minus `free` (95 % interval) | Busiest / mean: validation "
             "| training, after warm-up | a step's |", "|---|---|---|---|---|---|"]
    for arm in arms:
        own = [rows[arm, seed] for seed in seeds]
        mean = {key: sum(r[key] for r in own) / len(own) for key in own[0] if key.startswith(("valid_loss", "busiest"))}
        shown = "-"
        if arm != "free" and "free" in arms:
            shown = "{:+.4f} ({:+.4f} to {:+.4f})".format(*interval([rows[arm, s]["valid_loss"] - rows["free", s]["valid_loss"]
                                                                    for s in seeds]))
        lines.append(f"| {arm} | {mean['valid_loss']:.4f} | {shown} | {mean['busiest_valid']:.2f} | {mean['busiest_train']:.2f} "
                     f"| {mean['busiest_step']:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(__doc__, Settings)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args(argv)
    settings = settings_of(args, Settings, steps=6, rows=4, length=32, inter=16, hidden=32)
    text = Text.read(args.data)
    results = []
    for seed in args.seeds:
        for arm in args.arms:
            found = kept(args.out, f"{arm}-{seed}", asdict(settings), lambda arm=arm, seed=seed: run(
                arm, seed, text, settings, 8 if args.quick else None))
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items() if k != "settings"}, flush=True)
            results.append(found)
    print(table(results, args.arms), flush=True)
    return results


if __name__ == "__main__":
    main()
