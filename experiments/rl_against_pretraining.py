"""Does reinforcement learning earn its wall time? Per seed, from one pretrained base:

    a. the recipe's GRPO stage
    b. further pretraining for the same wall time (tokens = GRPO's seconds x the base's measured tokens per second)
    c. the GRPO stage with random rewards, the control

Each is scored greedily on the same n held-out problems, and compared with the others problem by problem.

    python experiments/rl_against_pretraining.py --out runs/rl-against-pretraining --seeds 0 1 2 --n 2000

Each seed leaves its result in OUT/seedN/result.json, and all that are there are pooled: seeds may run as processes of
their own, with OMP_NUM_THREADS=1. OUT/seedN/rl is a run of the whole recipe, and `jevons up` may have made it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

import torch

from jevons.reason.evaluate import evaluate, paired_interval
from jevons.reason.pipeline import Run
from jevons.recipe import load_recipe, parse_recipe
from jevons.runtime import Runtime
from jevons.store.checkpoint import load_checkpoint
from jevons.tasks.registry import load_task


class Quiet:
    """An observer that prints a line now and then."""

    def on_model(self, model, tokenizer, name):
        print(f"-- {name}", flush=True)

    def on_stage(self, name, done, budget):
        self.every = max(1, budget // 4)

    def on_step(self, record, budget):
        if record["step"] % self.every == 0:
            shown = {k: record[k] for k in ("step", "loss", "accuracy", "time.seconds") if k in record}
            print("   ", shown, flush=True)

    def should_stop(self):
        return False


def run(text: str, out: Path, runtime: Runtime) -> Path:
    return Run(parse_recipe(text, str(out)), text, out, Quiet(), runtime).execute()


def stage_lines(out: Path, stage: str) -> list[dict]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["kind"] == "step" and r["stage"] == stage]


def without_stages(text: str) -> str:
    return text[: text.index("[[stages]]")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="countdown-laptop")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--lr-fraction", type=float, default=0.5, help="peak rate of the further pretraining, of the base's")
    args = parser.parse_args()
    runtime = Runtime.detect()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(runtime.threads)
    recipe, text = load_recipe(args.recipe)
    stages = [part for part in re.split(r"(?=\[\[stages\]\])", text)[1:]]
    pretrain = next(s for s in stages if 'kind = "pretrain"' in s)
    grpo = next(s for s in stages if 'kind = "grpo"' in s)
    task = load_task(recipe.task.name, recipe.task.args)
    for seed in args.seeds:
        head = re.sub(r"(?m)^seed = .*$", f"seed = {seed}", without_stages(text))
        first = args.out / f"seed{seed}"
        run(re.sub(r"(?m)^seed = .*$", f"seed = {seed}", text), first / "rl", runtime)
        base = first / "rl" / "stages" / "00-pretrain"
        on = re.sub(r"(?ms)^\[model\].*?(?=^\[)", f'[model]\nfrom = "{base}"\n\n', head)
        before, after = stage_lines(first / "rl", "pretrain"), stage_lines(first / "rl", "grpo")
        rate = before[-1]["tokens"] / before[-1]["time.seconds"]
        tokens = int(after[-1]["time.seconds"] * rate)
        table = next(s for s in recipe.stages if s.kind == "pretrain")
        more = re.sub(r"(?m)^tokens = .*$", f"tokens = {tokens}", pretrain.split("[stages.optimizer]")[0])
        more += (f"\n[stages.optimizer]\nlr = {table.optimizer.lr * args.lr_fraction}\n"
                 f"matrix_lr = {table.optimizer.matrix_lr * args.lr_fraction}\n")
        run(on.replace(f"seed = {seed}", f"seed = {seed + 1000}") + more, first / "more", runtime)
        control = grpo.replace('kind = "grpo"', 'kind = "grpo"\nrandom_reward = true')
        run(on + control, first / "random", runtime)
        shares = {}
        for name, where in {"base": base, "rl": first / "rl" / "final", "more": first / "more" / "final",
                            "random": first / "random" / "final"}.items():
            loaded = load_checkpoint(where)
            stage = next(s for s in recipe.stages if s.kind == "grpo")
            result, shares[name] = evaluate(loaded.model, loaded.tokenizer, task, args.n, 7, stage.max_tokens)
            print(seed, name, result.record(), flush=True)
        row = {"seed": seed, "accuracy": {k: sum(v) / len(v) for k, v in shares.items()}, "further_tokens": tokens,
               "seconds": {"pretrain": before[-1]["time.seconds"], "rl": after[-1]["time.seconds"],
                           "more": stage_lines(first / "more", "pretrain")[-1]["time.seconds"]},
               "rl - more": paired_interval(shares["more"], shares["rl"]),
               "random - base": paired_interval(shares["base"], shares["random"]), "shares": shares}
        (first / "result.json").write_text(json.dumps(row))
        print(json.dumps({k: v for k, v in row.items() if k != "shares"}), flush=True)
    results = [json.loads(path.read_text()) for path in sorted(args.out.glob("seed*/result.json"))]
    for name, (a, b) in {"rl - more": ("more", "rl"), "random - base": ("base", "random"), "rl - base": ("base", "rl")}.items():
        pooled = paired_interval([x for r in results for x in r["shares"][a]], [x for r in results for x in r["shares"][b]])
        print(f"{name}, {len(results)} seeds: {pooled[0]:+.2%} (95 % interval {pooled[1]:+.2%} to {pooled[2]:+.2%})")


if __name__ == "__main__":
    main()
