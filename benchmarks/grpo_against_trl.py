"""One GRPO step, rollouts and update, against TRL's GRPOTrainer: same checkpoint, task, batch and token limit, parts shown.

    python benchmarks/grpo_against_trl.py CHECKPOINT [--problems 16] [--group-size 12] [--max-tokens 224] [--steps 3] [--rounds 2]

CHECKPOINT is one whose task is known: `OUT/stages/00-pretrain` of `jevons up` is where its GRPO begins, and most groups there
have both right and wrong answers. Needs `trl` beside jevons (`pip install trl`); without it, or with --peer none, ours is
measured alone. Each side is a process of its own, in turns, `rounds` of them; the first step of each is not counted. TRL runs
with the best of the settings that are tried first (printed), on answers a quarter as long. Neither side trains an MTP module
(transformers has none) nor draws further problems in place of groups without spread; ours leaves such groups out of the
update, where they would carry no gradient, so the update is also compared by the sequence trained on. Last, our rollouts'
tokens per second and which share of this machine's bf16 matrix-product rate that is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jevons.bench.sides import counts
from jevons.bench.workload import tune
from jevons.data.tokenizer import Tokenizer
from jevons.numerics.peak import gemm_rate
from jevons.plan import count_parameters
from jevons.reason.grpo import GRPO
from jevons.reason.stages import LEAST_PROMPT
from jevons.recipe import GRPOStage
from jevons.runtime import Runtime
from jevons.store.checkpoint import load_checkpoint, read_provenance
from jevons.store.run_dir import MetricsLog
from jevons.tasks.registry import load_task
from jevons.train.loop import Loop, LoopSettings


class Stopwatch:
    """Seconds spent in functions, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin

        return timed

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


def task_of(checkpoint: Path) -> Any:
    task = read_provenance(checkpoint).get("task")
    if not task:
        raise SystemExit(f"{checkpoint} does not say which task it was trained on; one that `jevons up` left would")
    return load_task(task["name"], task["args"])


def ours(checkpoint: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    from jevons.engine.engine import Engine

    loaded, task, runtime = load_checkpoint(checkpoint), task_of(checkpoint), Runtime.detect("cpu")
    torch.set_num_threads(args.threads)
    stage = GRPOStage(kind="grpo", steps=args.steps + 1, problems=args.problems, group_size=args.group_size,
                      max_tokens=args.max_tokens, mask_truncated=False, resample_rounds=0, mtp_weight=0.0)
    sequences = args.problems * args.group_size
    engine = Engine(loaded.model, loaded.tokenizer.eos_id, max_batch=min(sequences, 256), max_waiting=sequences,
                    max_len=min(loaded.config.max_position_embeddings, args.max_tokens + LEAST_PROMPT))
    objective, watch, steps = GRPO(loaded.model, loaded.tokenizer, task, stage, args.seed, engine), Stopwatch(), []
    objective.dtype = runtime.dtype
    objective.roller.roll = watch.around("rollouts", objective.roller.roll)
    loaded.model.train()
    with tempfile.TemporaryDirectory() as directory, MetricsLog(Path(directory) / "metrics.jsonl") as log:
        settings = LoopSettings("grpo", Path(directory), stage.optimizer, 10**9, runtime.dtype, 0.0)
        loop = Loop(loaded.model, objective, settings, log)
        for _ in range(args.steps + 1):
            begin = time.perf_counter()
            loop._step()
            loop.progress.step += 1
            seconds, parts = time.perf_counter() - begin, watch.take()
            rollouts = objective._rollouts
            steps.append({"step": seconds, **parts, "update": seconds - parts["rollouts"],
                          "tokens": sum(e.tokens for e in rollouts.all), "trained_on": sum(map(len, rollouts.groups)),
                          "right": statistics.mean(e.reward.correct == 1.0 for e in rollouts.all)})
    return steps[1:]


def theirs(checkpoint: Path, args: argparse.Namespace, settings: dict[str, Any], steps: int) -> list[dict[str, float]]:
    """Steps of TRL with `settings`; the first is left out."""
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(settings["threads"])
    task, tokenizer = task_of(checkpoint), Tokenizer.load(checkpoint)
    rng, render = random.Random(f"trl {args.seed}"), tokenizer.renderer()
    problems = [task.sample(rng) for _ in range(args.problems * (steps + 1))]
    prompts = [tokenizer.decode(render.question(p.prompt)) for p in problems]
    text = transformers.AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    if text(prompts[0])["input_ids"] != render.question(problems[0].prompt):
        raise SystemExit("the two sides would not read the same prompt")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if "experts" in settings:
        model.set_experts_implementation(settings["experts"])
    lengths: list[int] = []
    rewards: list[float] = []

    def reward(completions: list[str], index: list[int], completion_ids: list[list[int]], **_: Any) -> list[float]:
        scores = [float(task.score(problems[i], c).correct == 1.0) for i, c in zip(index, completions, strict=True)]
        lengths.append(sum(map(len, completion_ids)))
        rewards.append(sum(scores) / len(scores))
        return scores

    sequences, watch, ends = args.problems * args.group_size, Stopwatch(), []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds, parts = time.perf_counter() - self.begin, watch.take()
            ends.append({"step": seconds, **parts, "update": seconds - parts["rollouts"], "tokens": lengths[-1],
                         "trained_on": sequences, "right": rewards[-1]})

    with tempfile.TemporaryDirectory() as directory:
        config = GRPOConfig(output_dir=directory, use_cpu=True, bf16=settings["bf16"], num_generations=args.group_size,
                            per_device_train_batch_size=settings["batch"],
                            gradient_accumulation_steps=sequences // settings["batch"],
                            max_completion_length=args.max_tokens, temperature=1.0, max_steps=steps + 1, learning_rate=3e-4,
                            lr_scheduler_type="constant", epsilon_high=0.28, report_to=[], save_strategy="no",
                            logging_strategy="no", shuffle_dataset=False, remove_unused_columns=False, disable_tqdm=True,
                            seed=args.seed, gradient_checkpointing=False)
        data = Dataset.from_list([{"prompt": p, "index": i} for i, p in enumerate(prompts)])
        trainer = GRPOTrainer(model, reward, config, train_dataset=data, processing_class=text, callbacks=[Clock()])
        trainer._generate_and_score_completions = watch.around("rollouts", trainer._generate_and_score_completions)
        trainer._generate_single_turn = watch.around("of these, generate", trainer._generate_single_turn)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return ends[1:]


def best_settings(checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """TRL's best settings, by a step with each."""
    sequences = args.problems * args.group_size
    options: dict[str, list[Any]] = {"bf16": [True, False], "threads": counts(args.threads)}
    if json.loads((checkpoint / "config.json").read_text()).get("n_routed_experts"):
        options["experts"] = ["grouped_mm", "batched_mm", "eager"]
    options["batch"] = [n for n in (sequences // 4, sequences, sequences // 2) if n and n % args.group_size == 0] or [sequences]
    args.max_tokens = max(2, args.max_tokens // 4)
    best, tried = tune(options, lambda s: 1 / theirs(checkpoint, args, s, 1)[0]["step"])
    for one in tried:
        print(f"  tried {', '.join(f'{k} {v}' for k, v in one.items() if k != 'rate')}: {1 / one['rate']:.1f} s", file=sys.stderr)
    return best


def child(side: str, args: argparse.Namespace, settings: dict[str, Any] | None = None) -> Any:
    """What a side measured, in a process of its own."""
    own = [sys.executable, __file__, str(args.checkpoint), "--side", side, "--settings", json.dumps(settings)]
    for name in ("problems", "group_size", "max_tokens", "steps", "seed", "threads"):
        own += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = os.environ | ({"GOMP_SPINCOUNT": "1000"} if side == "ours" else {})  # as jevons' own commands run
    done = subprocess.run(own, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{side} failed with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, steps: list[dict[str, float]]) -> dict[str, float]:
    middle = {key: statistics.median(s[key] for s in steps) for key in steps[0]}
    parts = ", ".join(f"{key} {middle[key]:.2f}" for key in middle if key not in ("step", "tokens", "trained_on", "right"))
    spread = f"{min(s['step'] for s in steps):.2f} to {max(s['step'] for s in steps):.2f}"
    print(f"{name:<8} step {middle['step']:.2f} s ({spread}): {parts}; {middle['tokens']:.0f} tokens written, "
          f"{middle['right']:.0%} of answers right, {middle['trained_on']:.0f} sequences trained on")
    return middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=224)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=Runtime.detect("cpu").threads)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", choices=["auto", "none"], default="auto")
    parser.add_argument("--side", choices=["ours", "trl", "tune"], help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        sys.stdout, out = sys.stderr, sys.stdout  # what libraries print is no result
        settings = json.loads(args.settings)
        found = {"ours": lambda: ours(args.checkpoint, args), "tune": lambda: best_settings(args.checkpoint, args),
                 "trl": lambda: theirs(args.checkpoint, args, settings, args.steps)}[args.side]()
        print(json.dumps(found), file=out)
        return
    peer = args.peer == "auto" and importlib.util.find_spec("trl") is not None
    if not peer:
        print("TRL is not measured: " + ("--peer none" if args.peer == "none" else "it is not here; `pip install trl`"))
    settings = child("tune", args) if peer else None
    if peer:
        from importlib.metadata import version

        print(f"trl {version('trl')}, transformers {version('transformers')}: {settings}")
    steps: dict[str, list[dict[str, float]]] = {"jevons": []} | ({"trl": []} if peer else {})
    for _ in range(args.rounds):
        for name in steps:
            steps[name] += child("ours" if name == "jevons" else "trl", args, settings)
    print(f"{args.problems} problems x {args.group_size}, at most {args.max_tokens} tokens, {args.threads} threads, medians")
    middle = {name: show(name, found) for name, found in steps.items()}
    rate = middle["jevons"]["tokens"] / middle["jevons"]["rollouts"]
    count = count_parameters(load_checkpoint(args.checkpoint).config)
    flops = 2 * (count.active - count.embedding)
    gemm, threads = gemm_rate(counts(args.threads))
    print(f"rollouts of ours: {rate:,.0f} tokens/s, {rate * flops / 1e9:.1f} GFLOP/s by the weights, "
          f"{rate * flops / 1e9 / gemm:.1%} of {gemm:.0f} GFLOP/s (bf16 product of 2048 x 2048, {threads} threads)")
    if peer:
        theirs_rate = middle["trl"]["tokens"] / middle["trl"]["rollouts"]
        per = {name: m["update"] / max(1, m["trained_on"]) for name, m in middle.items()}
        print(f"ours is {middle['trl']['step'] / middle['jevons']['step']:.2f} times as fast a step: rollouts "
              f"{rate / theirs_rate:.2f} times a token, the update {per['trl'] / per['jevons']:.2f} times a sequence")


if __name__ == "__main__":
    main()
