"""nanoGPT's published run for a CPU (its README, "I only have a macbook") and a V3-style model beside it: tiny-shakespeare by
characters, baby GPT (4 layers, 4 heads, width 128, 0.8 M parameters), context 64, batch 12, 2,000 steps, loss 1.88.

    git clone https://github.com/karpathy/nanoGPT DIR
    python experiments/nanogpt.py --nanogpt DIR --data input.txt --threads 2

nanoGPT runs as it is, in a copy of DIR, with its published command; only how often and how long it evaluates is changed, so that
the step at which it passes 1.88 is seen. Ours sees as many characters, in batches of as many windows of the same length, and has
at most as many active parameters. Both counts hold the embedding once, tied to the head, and no table of positions (nanoGPT's own
way of counting); in ours a token's own experts are counted, not all. Both losses are means over `--eval-iters` random batches
of validation windows, each with its whole context of 64. Seconds are those of training steps alone, evaluations left out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from text_runs import Characters, Text, arguments, build, kept, settings_of, train, windows

from jevons.config import ModelConfig
from jevons.model import CausalLM
from jevons.plan import count_parameters
from jevons.recipe import OptimizerTable

ROWS, LENGTH, TARGET = 12, 64, 1.88
PUBLISHED = ["config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--log_interval=1", f"--block_size={LENGTH}",
             f"--batch_size={ROWS}", "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0"]


@dataclass
class Settings:
    """Ours. `inter` is chosen so that active parameters come just under nanoGPT's."""

    steps: int = 2000
    every: int = 100  # steps between evaluations
    eval_iters: int = 100
    experts: int = 8
    chosen: int = 2
    inter: int = 120
    lr: float = 4e-3
    matrix_lr: float = 0.02
    weight_decay: float = 0.1
    bias_speed: float = 0.003
    mtp: float = 0.0
    dtype: str = "float32"
    seed: int = 0


def config_of(settings: Settings, vocab: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab, hidden_size=128, intermediate_size=368, moe_intermediate_size=settings.inter, num_hidden_layers=4,
        num_attention_heads=4, n_routed_experts=settings.experts, n_shared_experts=1, num_experts_per_tok=settings.chosen,
        first_k_dense_replace=1, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32,
        max_position_embeddings=LENGTH, initializer_range=0.02, aux_loss_alpha=0.0, tie_word_embeddings=True,
        num_nextn_predict_layers=int(settings.mtp > 0))


@torch.no_grad()
def estimate(model: CausalLM, text: Text, iters: int, seed: int) -> float:
    """nanoGPT's `estimate_loss` of the validation text: the mean over random batches of windows."""
    draw = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(iters):
        batch = windows(text.valid, torch.randint(len(text.valid) - LENGTH, (ROWS,), generator=draw), LENGTH)
        hidden = model.forward_train(batch.tokens_N, batch.positions_N, batch.segments, mtp=False).hidden_ND
        total += F.cross_entropy(model.logits(hidden).float(), batch.targets_N).item()
    return total / iters


def ours(text: Text, settings: Settings, threads: int) -> dict[str, Any]:
    config = config_of(settings, len(text.characters))
    model = build(config, settings.seed)
    objective = Characters(model, text, seed=settings.seed, steps=settings.steps, rows=ROWS, length=LENGTH, micros=threads,
                           bias_speed=settings.bias_speed, mtp_weight=lambda done: settings.mtp * (1 if done < 2 / 3 else 1 / 3))
    table = OptimizerTable(lr=settings.lr, matrix_lr=settings.matrix_lr, weight_decay=settings.weight_decay, warmup_steps=20)
    curve, seconds = [], []

    def on_step(loop, record):
        seconds.append(record["time.step_seconds"])
        if record["step"] % settings.every == 0 or record["step"] == settings.steps:
            loss = estimate(model, text, settings.eval_iters, record["step"])
            curve.append((record["step"], loss, sum(seconds)))
            print(f"    ours   step {record['step']:>5}: loss {loss:.4f}, {sum(seconds):.1f} s", flush=True)

    train(model, objective, table, getattr(torch, settings.dtype), on_step)
    counts = count_parameters(config)
    return {"active": counts.active, "parameters": counts.total, "characters": settings.steps * ROWS * LENGTH, "curve": curve,
            "vocabulary": len(text.characters)}


def nanogpt(directory: Path, data: Path, settings: Settings, threads: int) -> dict[str, Any]:
    """nanoGPT in a copy of its directory. Its printed lines are all that is read of it."""
    with tempfile.TemporaryDirectory() as room:
        copy = Path(room) / "nanoGPT"
        shutil.copytree(directory, copy, ignore=shutil.ignore_patterns(".git", "*.ipynb", "assets"))
        prepared = copy / "data" / "shakespeare_char"
        shutil.copy(data, prepared / "input.txt")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, "prepare.py"], cwd=prepared, check=True, stdout=subprocess.DEVNULL)
        command = [sys.executable, "-u", "train.py", *PUBLISHED, f"--max_iters={settings.steps}",
                   f"--lr_decay_iters={settings.steps}", f"--eval_iters={settings.eval_iters}",
                   f"--eval_interval={settings.every}"]
        process = subprocess.Popen(command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True)
        found = read_log(process.stdout, settings.every)
        if process.wait():
            sys.exit(f"nanoGPT's train.py failed with {process.returncode}; try it in {directory}: {' '.join(command[2:])}")
    return found | {"characters": settings.steps * ROWS * LENGTH}


def read_log(lines, every: int) -> dict[str, Any]:
    """Its curve of (step, validation loss, seconds of the training steps before), and its parameters."""
    losses: list[tuple[int, float]] = []
    seconds: dict[int, float] = {}
    found: dict[str, Any] = {}
    for line in lines:
        if match := re.match(r"step (\d+): train loss \S+, val loss (\S+)", line):
            losses.append((int(match[1]), float(match[2])))
            print(f"    nanoGPT step {match[1]:>4}: loss {match[2]}", flush=True)
        elif match := re.match(r"iter (\d+): loss \S+, time (\S+)ms", line):
            seconds[int(match[1])] = float(match[2]) / 1000
        elif match := re.search(r"num (?:non-)?decayed parameter tensors: \d+, with ([\d,]+) parameters", line):
            found["parameters"] = found.get("parameters", 0) + int(match[1].replace(",", ""))
        elif match := re.search(r"vocab_size = (\d+)", line):
            found["vocabulary"] = int(match[1])
    # an iteration that evaluates says so in its time: it counts as the median of the others
    usual = statistics.median(s for i, s in seconds.items() if i % every)
    steps = [usual if i % every == 0 else seconds[i] for i in sorted(seconds)]
    found["curve"] = [(step, loss, sum(steps[:step])) for step, loss in losses if step]
    found["active"] = found["parameters"] = found["parameters"] - LENGTH * 128  # its count, too, leaves the positions out
    return found


def reached(curve: list[tuple[int, float, float]]) -> tuple[int, float] | None:
    """Step and seconds of the first evaluation at or under the published loss."""
    return next(((step, seconds) for step, loss, seconds in curve if loss <= TARGET), None)


def table(sides: dict[str, dict[str, Any]]) -> str:
    lines = ["| | Active parameters | All | Characters | Validation loss | Steps to 1.88 | Seconds to 1.88 | Seconds |",
             "|---|---|---|---|---|---|---|---|"]
    for name, side in sides.items():
        hit, last = reached(side["curve"]), side["curve"][-1]
        lines.append(f"| {name} | {side['active']:,} | {side['parameters']:,} | {side['characters']:,} | {last[1]:.3f} "
                     f"| {hit[0] if hit else 'not reached'} | {f'{hit[1]:.1f}' if hit else '-'} | {last[2]:.1f} |")
    if len(sides) == 2:
        a, b = sides["nanoGPT"], sides["ours"]
        lines.append("")
        lines.append(f"loss lower by {a['curve'][-1][1] - b['curve'][-1][1]:+.3f}")
        if (hits := [reached(s["curve"]) for s in (a, b)]) and all(hits):
            lines[-1] += f"; time to {TARGET}: {hits[1][1] / hits[0][1]:.2f} of nanoGPT's"
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = arguments(__doc__, Settings)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT; without it ours runs alone")
    args = parser.parse_args(argv)
    settings = settings_of(args, Settings, steps=6, every=3, eval_iters=2)
    text = Text.read(args.data)
    sides = {}
    if args.nanogpt:
        if not (args.nanogpt / "train.py").is_file():
            parser.error(f"--nanogpt {args.nanogpt}: no train.py there; a checkout of github.com/karpathy/nanoGPT would be right")
        sides["nanoGPT"] = kept(args.out, "nanogpt", asdict(settings),
                                lambda: nanogpt(args.nanogpt, args.data, settings, args.threads))
    sides["ours"] = kept(args.out, "ours", asdict(settings), lambda: ours(text, settings, args.threads))
    if args.out is None:
        print(json.dumps({name: side["settings"] for name, side in sides.items()}["ours"]))
    print(table(sides), flush=True)
    return sides


if __name__ == "__main__":
    main()
