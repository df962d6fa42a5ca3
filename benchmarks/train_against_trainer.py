"""A training step of a V3-style model against `transformers`' DeepseekV3ForCausalLM with its Trainer: same weights, same batch,
same precision, AdamW on both sides, one run.

    python benchmarks/train_against_trainer.py [--experts 8 16] [--precision bf16 float32] [--steps 24]

Each side is a process of its own; they take turns, a block of steps each, so that both meet the same machine. The batch has rows
of one length and no padding. The Trainer neither evaluates, logs nor saves, has a loader that hands it ready rows, and runs with
the best of the settings that are tried first (experts, attention, threads); ours runs its loop as `jevons run` does. A step is
forward, backward, clipping and the optimizer. Neither side trains an MTP module (transformers has none), and ours takes no
balance loss and moves no router bias (transformers has neither). Losses of both sides are printed: they must agree.
Needs `accelerate` beside transformers (`pip install -e .[bench]`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from jevons.config import ModelConfig, preset
from jevons.data.packing import Batch
from jevons.data.tokenizer import train_tokenizer
from jevons.model import build_model
from jevons.plan import count_parameters, training_flops
from jevons.recipe import OptimizerTable
from jevons.runtime import Runtime
from jevons.store.checkpoint import load_checkpoint, save_checkpoint
from jevons.store.run_dir import MetricsLog
from jevons.train.loop import Loop, LoopSettings
from jevons.train.objective import LossParts, Objective, token_losses

LR, DECAY, BETAS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1.0
WARM = 4  # first steps that are not counted


def config_of(args: argparse.Namespace) -> ModelConfig:
    """V3's block at width 256; `--quick` takes a smaller one."""
    if args.quick:
        return preset("v3-nano", num_nextn_predict_layers=0, aux_loss_alpha=0.0)
    return ModelConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=768, moe_intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, n_routed_experts=args.side_experts, n_shared_experts=1, num_experts_per_tok=2, n_group=4,
        topk_group=2, first_k_dense_replace=1, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64, max_position_embeddings=512, initializer_range=0.02, aux_loss_alpha=0.0)


def rows_of(step: int, args: argparse.Namespace, vocab: int) -> torch.Tensor:
    """Ids of a step, [rows, length]: a walk that a model can learn, so that losses fall and differences would show."""
    rng = random.Random(step)
    rows = []
    for _ in range(args.rows):
        at, by = rng.randrange(vocab), rng.choice([1, 2, 3, 5])
        rows.append([(at + by * i) % vocab if rng.random() < 0.9 else rng.randrange(vocab) for i in range(args.length)])
    return torch.tensor(rows)


class Rows(Objective):
    """Next-token loss on given rows, a micro-batch a thread."""

    def __init__(self, model, args: argparse.Namespace, micros: int):
        self.model, self.args, self.micros, self.steps = model, args, micros, 10**9

    def next_batch(self, step: int) -> list[list[Batch]]:
        made = []
        for ids in rows_of(step, self.args, self.model.config.vocab_size).chunk(self.micros):
            weights = torch.ones(ids.shape)
            weights[:, -1] = 0
            flat, none = ids.flatten(), torch.zeros(ids.numel())
            made.append(Batch(flat, flat.roll(-1), flat, weights.flatten(), none, torch.arange(ids.shape[1]).repeat(len(ids)),
                              [tuple(ids.shape)], list(range(len(ids))), flat.numel(), len(ids) / self.args.rows))
        return [made]

    def loss(self, batch: Batch) -> LossParts:
        out = self.model.forward_train(batch.tokens_N, batch.positions_N, batch.segments, mtp=False)
        loss = token_losses(self.model, out.hidden_ND, batch.targets_N, batch.weights_N) / batch.weights_N.sum() * batch.share
        return LossParts(loss, {"loss": loss.item(), "tokens": batch.tokens}, out.load_RE)

    def metrics(self, sums: dict[str, float]) -> dict[str, Any]:
        return sums


Turn = Iterator[None]  # `next` waits for this side's next turn of one step


def ours(checkpoint: Path, args: argparse.Namespace, turn: Turn) -> None:
    model = load_checkpoint(checkpoint, dtype=torch.float32).model
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    torch.set_num_threads(args.threads)
    table = OptimizerTable(matrices="adamw", lr=LR, betas=BETAS, weight_decay=DECAY, grad_clip=CLIP, schedule="constant")
    dtype = torch.bfloat16 if args.side_precision == "bf16" else torch.float32
    with tempfile.TemporaryDirectory() as room, MetricsLog(Path(room) / "metrics.jsonl") as log:
        loop = Loop(model, Rows(model, args, args.threads), LoopSettings("bench", Path(room), table, 10**9, dtype, 0.0), log)
        model.train()
        say({"settings": {"micro-batches": args.threads, "threads": args.threads}})
        for _ in turn:
            began, cpu = time.perf_counter(), time.process_time()
            result = loop._step()
            loop.progress.step += 1
            say({"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "loss": result.sums["loss"]})


def theirs(checkpoint: Path, args: argparse.Namespace, turn: Turn) -> None:
    import transformers
    from transformers import DeepseekV3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    class Data(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return args.rows * 100_000

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            step, row = divmod(index, args.rows)
            if step not in kept:
                kept.clear()
                kept[step] = rows_of(step, args, vocab)
            return {"input_ids": kept[step][row], "labels": kept[step][row]}

    class Clock(TrainerCallback):
        """The step's seconds; between steps it waits for this side's turn."""

        def __init__(self, on_step: Any, wait: Any):
            self.on_step, self.wait = on_step, wait

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            self.on_step(time.perf_counter() - self.began, time.process_time() - self.cpu, losses[-1])
            control.should_training_stop = not self.wait()

    class Noted(Trainer):
        def compute_loss(self, *given: Any, **options: Any) -> Any:
            found = super().compute_loss(*given, **options)
            losses.append((found[0] if isinstance(found, tuple) else found).item())
            return found

    kept: dict[int, torch.Tensor] = {}
    losses: list[float] = []
    vocab = config_of(args).vocab_size

    def train(settings: dict[str, Any], on_step: Any, wait: Any) -> None:
        torch.set_num_threads(settings["threads"])
        model = DeepseekV3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation=settings["attention"])
        model.set_experts_implementation(settings["experts"])
        options = TrainingArguments(
            output_dir=room, per_device_train_batch_size=args.rows, max_steps=10**6, use_cpu=True,
            bf16=args.side_precision == "bf16", learning_rate=LR, weight_decay=DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
            max_grad_norm=CLIP, optim="adamw_torch_fused", lr_scheduler_type="constant", logging_strategy="no",
            save_strategy="no", eval_strategy="no", report_to=[], disable_tqdm=True, train_sampling_strategy="sequential",
            dataloader_num_workers=settings["workers"], dataloader_pin_memory=False, torch_compile=settings["compile"])
        Noted(model, options, train_dataset=Data(), callbacks=[Clock(on_step, wait)]).train()

    def cost(settings: dict[str, Any]) -> float:
        times: list[float] = []
        try:
            train(settings, lambda seconds, cpu, loss: times.append(seconds), lambda: len(times) < args.tries)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            print(f"    {settings}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
            return float("inf")
        return min(times[1:])

    with tempfile.TemporaryDirectory() as room:
        best = {"experts": "grouped_mm", "attention": "sdpa", "threads": args.threads, "workers": 0, "compile": False}
        tried: dict[str, list[Any]] = {"experts": ["grouped_mm", "batched_mm", "eager"], "attention": ["sdpa", "eager"],
                                       "threads": sorted({1, args.threads}), "workers": [0, 1]}
        if args.compile:
            tried["compile"] = [False, True]
        for key, values in tried.items() if args.tries > 1 else ():
            costs = {value: cost(best | {key: value}) for value in values}
            best[key] = min(costs, key=costs.__getitem__)
        say({"settings": best})
        next(turn, None)
        train(best, lambda seconds, cpu, loss: say({"seconds": seconds, "cpu": cpu, "loss": loss}),
              lambda: next(turn, False) is not False)


def say(record: dict[str, Any]) -> None:
    print("@" + json.dumps(record), flush=True)


def turns() -> Turn:
    """One `yield` a step that the other end asks for; ends when it hangs up."""
    for line in sys.stdin:
        for _ in range(int(line)):
            yield


class Side:
    """A side in a process of its own."""

    def __init__(self, name: str, checkpoint: Path, args: argparse.Namespace, experts: int, precision: str):
        command = [sys.executable, __file__, "--side", name, "--checkpoint", str(checkpoint), "--side-experts", str(experts),
                   "--side-precision", precision, *(["--quick"] if args.quick else []), *(["--compile"] if args.compile else [])]
        for key in ("rows", "length", "threads", "tries"):
            command += [f"--{key}", str(getattr(args, key))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=os.environ | {"GOMP_SPINCOUNT": "1000"})
        self.steps: list[dict[str, float]] = []
        self.settings = self._read()["settings"]

    def _read(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        sys.exit(f"the side {self.process.args[3]} ended with {self.process.wait()} before it was asked to")

    def go(self, steps: int) -> None:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.steps += [self._read() for _ in range(steps)]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(args: argparse.Namespace, experts: int, precision: str) -> dict[str, Any]:
    args.side_experts = experts
    config = config_of(args)
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "checkpoint"
        save_checkpoint(path, build_model(config, seed=0), train_tokenizer(["7"], config.vocab_size), {})
        sides = {}
        for name in ("ours", "theirs"):  # one after the other: while one tunes, the other does nothing
            sides[name] = Side(name, path, args, experts, precision)
        for _ in range(0, args.steps + WARM, args.block):
            for side in sides.values():
                side.go(args.block)
        for side in sides.values():
            side.close()
    tokens = args.rows * args.length
    found: dict[str, Any] = {"experts": experts, "precision": precision, "tokens": tokens, "config": config}
    for name, side in sides.items():
        counted = side.steps[WARM:]
        found[name] = {"settings": side.settings, "rate": tokens / statistics.median(s["seconds"] for s in counted),
                       "cpu_rate": tokens / statistics.median(s["cpu"] for s in counted),
                       "losses": [s["loss"] for s in side.steps]}
    return found


def show(found: list[dict[str, Any]], runtime: Runtime) -> str:
    first = found[0]
    counts = count_parameters(first["config"])
    lines = [f"{runtime.cpu}, {runtime.threads} cores; width {first['config'].hidden_size}, {first['tokens']} tokens a step, "
             f"{counts.total:,} parameters at {first['experts']} experts ({counts.active:,} active)", "",
             "| Experts | Precision | Trainer, tokens/s | Ours, tokens/s | Ratio | of processor time | Loss: first step | last |",
             "|---|---|---|---|---|---|---|---|"]
    for f in found:
        a, b = f["theirs"], f["ours"]
        ends = [" / ".join(f"{side['losses'][at]:.4f}" for side in (a, b)) for at in (0, -1)]
        lines.append(f"| {f['experts']} | {f['precision']} | {a['rate']:,.0f} | {b['rate']:,.0f} | {b['rate'] / a['rate']:.2f} "
                     f"| {b['cpu_rate'] / a['cpu_rate']:.2f} | {ends[0]} | {ends[1]} |")
    for f in found:
        worst = max(abs(x - y) for x, y in zip(f["theirs"]["losses"], f["ours"]["losses"], strict=True))
        flops = training_flops(f["config"], f["tokens"], f["length"], mtp=False) * f["ours"]["rate"] / f["tokens"] / 1e9
        lines.append(f"{f['experts']} experts, {f['precision']}: largest difference of losses at a step {worst:.5f}; ours at "
                     f"{flops:.0f} GFLOP/s; the Trainer's best settings {f['theirs']['settings']}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--precision", nargs="+", choices=("bf16", "float32"), default=["bf16", "float32"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--block", type=int, default=4, help="steps of one turn")
    parser.add_argument("--tries", type=int, default=4, help="steps of every setting tried for the Trainer; 1: the usual ones")
    parser.add_argument("--compile", action="store_true", help="the Trainer also tries torch.compile (minutes)")
    parser.add_argument("--threads", type=int, default=Runtime.detect("cpu").threads)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps: shows that it runs, nothing else")
    for hidden in ("side", "checkpoint", "side-experts", "side-precision"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.rows, args.length, args.steps, args.block, args.tries = 4, 32, 4, 4, 1
        args.experts, args.precision = args.experts[:1], args.precision[:1]
    if args.side:
        args.side_experts = int(args.side_experts)
        (ours if args.side == "ours" else theirs)(Path(args.checkpoint), args, turns())
        return []
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        parser.error(f"{error.name} is missing; pip install -e .[bench] would bring it")
    found = [measure(args, e, p) | {"length": args.length} for e, p in itertools.product(args.experts, args.precision)]
    print(show(found, Runtime.detect("cpu")), flush=True)
    return found


if __name__ == "__main__":
    main()
