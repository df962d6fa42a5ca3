"""Does FP8 training cost loss? A V3-style model from the same seed on the same batches, in FP8 and in BF16, pair by pair.

    python experiments/fp8_against_bf16.py --data DIR --out fp8_pairs.json [--size 2M|10M] [--pairs 8] [--threads 1]

DIR holds tinyshakespeare/input.txt and gsm8k/{train,test}.jsonl. Pair i differs from the others in the initial weights and in
the order of the data. Everything but the projections is the same in both arms: AdamW with its moments in bf16, float32 master
weights, bf16 for the rest of the network. Reported is the relative gap of the EMA-0.9-smoothed validation loss at the end (the
V3 report's measure, appendix B.1), its mean over pairs and a 95 % t interval. Finished runs go into the JSON file at once: the
same command goes on from there.
`--arms bf16 float32` shows what a change of rounding alone does. Takes minutes a pair; `--quick` seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch

from jevons.config import ModelConfig, preset
from jevons.data.tokenizer import Tokenizer, train_tokenizer
from jevons.model import CausalLM, build_model
from jevons.model.precision import set_training_precision
from jevons.numerics import Fp8
from jevons.plan import count_parameters
from jevons.recipe import OptimizerTable
from jevons.train.objective import token_losses, update_router_bias
from jevons.train.optim import build_optimizers
from jevons.train.schedule import lr_factor

VOCAB, ROWS, LENGTH = 512, 8, 256
MTP_WEIGHT, BALANCE_SPEED = 0.3, 0.001
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
SIZES = {
    "2M": dict(hidden_size=256, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384, moe_intermediate_size=48),
    "10M": dict(hidden_size=384, num_hidden_layers=5, num_attention_heads=6, intermediate_size=1024, moe_intermediate_size=128,
                q_lora_rank=128, kv_lora_rank=128),
}


def config_of(size: str) -> ModelConfig:
    return preset("v3-tiny", vocab_size=VOCAB, max_position_embeddings=LENGTH, aux_loss_alpha=1e-4, **SIZES[size])


def texts(data: Path) -> tuple[list[str], list[str]]:
    """Training and held-out texts: nine tenths of Shakespeare and GSM8K's training problems; the rest, and its test problems."""
    play = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    cut = len(play) * 9 // 10

    def problems(name: str) -> list[str]:
        lines = (data / "gsm8k" / name).read_text(encoding="utf-8").splitlines()
        return ["{question}\n{answer}\n\n".format(**json.loads(line)) for line in lines]

    return [play[:cut], *problems("train.jsonl")], [play[cut:], *problems("test.jsonl")]


def streams(data: Path, validation_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids for training, flat, and validation rows [rows, LENGTH + 2] evenly spaced through the held-out texts."""
    train, held = texts(data)
    tokenizer: Tokenizer = train_tokenizer([train[0][:300_000], *train[1:1001]], VOCAB)
    ids, rest = (torch.tensor([i for row in tokenizer.encode_batch(part) for i in row]) for part in (train, held))
    starts = torch.linspace(0, len(rest) - LENGTH - 2, validation_rows).long()
    return ids, torch.stack([rest[s : s + LENGTH + 2] for s in starts.tolist()])


def losses(model: CausalLM, rows_BL: torch.Tensor, mtp: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Mean next-token loss, the training loss, load per expert."""
    tokens, first, second = (rows_BL[:, i : i + LENGTH].flatten() for i in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.autocast, cache_enabled=False):
        out = model.forward_train(tokens, torch.arange(LENGTH).repeat(len(rows_BL)), [(len(rows_BL), LENGTH)], mtp=mtp)
        one = torch.ones(len(tokens))
        main = token_losses(model, out.hidden_ND, first, one) / len(tokens)
        total = main + model.config.aux_loss_alpha * out.balance_loss
        if mtp:
            total = total + MTP_WEIGHT * token_losses(model, out.mtp_hidden_ND, second, one) / len(tokens)
    return main, total, out.load_RE


def train(args: argparse.Namespace, arm: str, pair: int, ids: torch.Tensor, held: torch.Tensor) -> dict:
    model = build_model(config_of(args.size), seed=pair)
    model.autocast = arm != "float32"
    fp8 = Fp8(power_of_two=args.scales == "power_of_two", accumulation=args.accumulation)
    set_training_precision(model, fp8 if arm == "fp8" else None)
    steps = args.tokens // (ROWS * LENGTH)
    table = OptimizerTable(matrices="adamw", lr=args.lr, warmup_steps=steps // 20, schedule="cosine", final_lr_fraction=0.1)
    optimizers = build_optimizers(model, table, "bf16")
    began, cpu, validation = time.time(), time.process_time(), []
    for step in range(steps):
        rng = torch.Generator().manual_seed(pair * 1_000_003 + step)
        starts = torch.randint(len(ids) - LENGTH - 2, (ROWS,), generator=rng).tolist()
        _, loss, load = losses(model, torch.stack([ids[s : s + LENGTH + 2] for s in starts]), True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), table.grad_clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_factor(step, steps, table)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_router_bias(model, load, BALANCE_SPEED)
        if (step + 1) % max(1, steps // args.evaluations) == 0:
            with torch.no_grad():
                validation.append(statistics.fmean(losses(model, part, False)[0].item() for part in held.split(ROWS)))
            print(f"pair {pair} {arm:<8} step {step + 1}/{steps}  validation {validation[-1]:.4f}", flush=True)
    if not all(map(math.isfinite, validation)):
        raise SystemExit(f"pair {pair} {arm} diverged")
    smooth = validation[0]
    for value in validation[1:]:
        smooth = 0.9 * smooth + 0.1 * value
    return {"ema": smooth, "last": validation[-1], "validation": validation, "seconds": round(time.time() - began, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1)}


def report(runs: dict[str, dict], arms: list[str], pairs: int) -> None:
    print(f"\npair   {arms[0]:>9} {arms[1]:>9}   relative gap of the smoothed validation loss at the end")
    gaps = []
    for pair in range(pairs):
        if all(f"{pair}/{arm}" in runs for arm in arms):
            a, b = (runs[f"{pair}/{arm}"]["ema"] for arm in arms)
            gaps.append(100 * (b - a) / a)
            print(f"{pair:>4}   {a:9.4f} {b:9.4f}   {gaps[-1]:+.3f} %")
    if len(gaps) > 1:
        half = T_95[min(len(gaps) - 2, len(T_95) - 1)] * statistics.stdev(gaps) / len(gaps) ** 0.5
        print(f"mean of {len(gaps)} pairs: {statistics.fmean(gaps):+.3f} %, 95 % interval "
              f"{statistics.fmean(gaps) - half:+.3f} to {statistics.fmean(gaps) + half:+.3f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="2M")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--first-pair", type=int, default=0)
    parser.add_argument("--arms", nargs=2, choices=("bf16", "fp8", "float32"), default=["bf16", "fp8"])
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--evaluations", type=int, default=30)
    parser.add_argument("--validation-rows", type=int, default=24)
    parser.add_argument("--scales", choices=("float", "power_of_two"), default="float")
    parser.add_argument("--accumulation", choices=("promoted", "limited"), default="promoted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.evaluations, args.validation_rows, args.pairs = 10 * ROWS * LENGTH, 2, 8, min(args.pairs, 2)
    torch.set_num_threads(args.threads)
    kept = ("size", "tokens", "lr", "evaluations", "validation_rows", "scales", "accumulation", "threads")
    settings = {key: getattr(args, key) for key in kept} | {"torch": torch.__version__}
    found = json.loads(args.out.read_text()) if args.out.exists() else {"settings": settings, "runs": {}}
    if found["settings"] != settings:
        raise SystemExit(f"{args.out} holds runs of {found['settings']}, and these are {settings}; give another --out")
    parameters = count_parameters(config_of(args.size))
    print(f"{args.size}: {(parameters.total + parameters.mtp) / 1e6:.2f} M parameters with the MTP module, "
          f"{parameters.active / 1e6:.2f} M active; {args.tokens} tokens a run", flush=True)
    ids, held = streams(args.data, args.validation_rows)
    print(f"{len(ids)} training tokens; {held.numel()} held-out tokens are evaluated", flush=True)
    for pair in range(args.first_pair, args.first_pair + args.pairs):
        for arm in args.arms:
            if f"{pair}/{arm}" not in found["runs"]:
                found["runs"][f"{pair}/{arm}"] = train(args, arm, pair, ids, held)
                beside = args.out.with_suffix(".tmp")
                beside.write_text(json.dumps(found, indent=1) + "\n")
                beside.replace(args.out)
    report(found["runs"], args.arms, args.first_pair + args.pairs)


if __name__ == "__main__":
    main()
