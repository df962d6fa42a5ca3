"""Which optimizer is the laptop's default: the recipe's pretraining with Muon and with AdamW, same tokens, same data.

    python benchmarks/muon_against_adamw.py --out runs/optimizers --tokens 2500000

Each arm is a run of its own with one thread, `--jobs` at a time. Prints loss, held-out accuracy (greedy) and seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from jevons.recipe import load_recipe

ARMS = {"muon 0.025": 'matrices = "muon"\nmatrix_lr = 0.025\nlr = 3e-3', "adamw 1e-3": 'matrices = "adamw"\nlr = 1e-3',
        "adamw 3e-3": 'matrices = "adamw"\nlr = 3e-3', "adamw 6e-3": 'matrices = "adamw"\nlr = 6e-3'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="countdown-laptop")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2_500_000)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    _, text = load_recipe(args.recipe)
    head, *stages = re.split(r"(?=\[\[stages\]\])", text)
    pretrain = re.sub(r"(?m)^tokens = .*$", f"tokens = {args.tokens}", next(s for s in stages if '"pretrain"' in s))
    pretrain = pretrain.split("[stages.optimizer]")[0]
    args.out.mkdir(parents=True, exist_ok=True)
    waiting, running = list(ARMS), []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            name = waiting.pop(0)
            path = args.out / f"{name.replace(' ', '-')}.toml"
            path.write_text(f'{head}{pretrain}[stages.optimizer]\n{ARMS[name]}\n\n[[stages]]\nkind = "eval"\nn = {args.n}\n')
            command = [sys.executable, "-m", "jevons.cli", "run", str(path), "--out", str(path.with_suffix(""))]
            running.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL))
        if running.pop(0).wait():
            sys.exit(f"{path} failed; run it by hand")
    for name in ARMS:
        lines = (args.out / name.replace(" ", "-") / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        steps, scores = ([r for r in records if r["kind"] == kind] for kind in ("step", "eval"))
        loss = sum(r["loss"] for r in steps[-50:]) / len(steps[-50:])
        score = scores[-1]
        print(f"{name:<12} loss {loss:.4f}  right {score['accuracy']:.1%} ({score['low']:.1%} to {score['high']:.1%})  "
              f"{steps[-1]['time.seconds']:.0f} s of pretraining on one thread", flush=True)


if __name__ == "__main__":
    main()
