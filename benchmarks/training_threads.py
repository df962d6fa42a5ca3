"""One micro-batch a core against all cores on one micro-batch: the laptop recipe's pretraining step, both in one run.

    python benchmarks/training_threads.py --steps 60

Both sides read the same documents and run the whole step (forward, backward, optimizer; the next documents are made beside
it, as in a run), in turns. Prints tokens per second (medians) and the ratio, also with one thread alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from jevons.config import preset
from jevons.data.tokenizer import train_tokenizer
from jevons.model import build_model
from jevons.recipe import load_recipe
from jevons.runtime import Runtime
from jevons.store.run_dir import MetricsLog
from jevons.tasks.registry import load_task
from jevons.train.loop import Loop, LoopSettings
from jevons.train.pretrain import Pretrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    runtime = Runtime.detect("cpu")
    recipe, _ = load_recipe("countdown-laptop")
    task, stage, rng = load_task("countdown", {}), recipe.stages[0], random.Random(0)
    problems = [task.sample(rng) for _ in range(3000)]
    texts = [text for p in problems for text in (p.prompt, task.trace(p, rng))]
    tokenizer = train_tokenizer(texts, recipe.tokenizer.vocab_size)
    sides = {"one micro-batch a core": (runtime.threads, stage),
             "all cores on one": (runtime.threads, stage.model_copy(update={"micro_batch_tokens": None})),
             "one thread": (1, stage.model_copy(update={"micro_batch_tokens": None}))}
    with tempfile.TemporaryDirectory() as directory, MetricsLog(Path(directory) / "metrics.jsonl") as log:
        loops = {}
        for name, (_, own) in sides.items():
            model = build_model(preset("v3-tiny"), seed=0)
            settings = LoopSettings("pretrain", Path(directory), own.optimizer, 10**9, runtime.dtype, 0.0)
            loops[name] = Loop(model, Pretrain(model, tokenizer, task, own, 0), settings, log)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for step in range(args.steps):
            for name, (threads, _) in sides.items():
                loop = loops[name]
                torch.set_num_threads(threads)
                started = time.perf_counter()
                result = loop._step()
                seconds = time.perf_counter() - started
                loop.progress.step += 1
                if step >= args.steps // 4:  # oneDNN compiles its kernels in the first ones
                    rates[name].append(result.sums["tokens"] / seconds)
    base = statistics.median(rates["all cores on one"])
    print(f"{runtime.cpu}, {runtime.threads} cores")
    for name, values in rates.items():
        print(f"{name:<24} {statistics.median(values):8.0f} tokens/s   {statistics.median(values) / base:.2f}")


if __name__ == "__main__":
    main()
