"""What packed weights cost in accuracy: greedy answers to the same held-out problems, each kind paired with bf16.

    python benchmarks/low_bit_accuracy.py CHECKPOINT [--n 10000] [--weights int8,int4] [--seed 0]

CHECKPOINT is one whose task is known, such as `jevons up` leaves in `OUT/final`. Prints one line a kind: share right, and the
difference to bf16 over the same problems with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from jevons.model.pack import KINDS, pack
from jevons.reason.evaluate import evaluate, paired_interval
from jevons.runtime import Runtime
from jevons.store.checkpoint import load_checkpoint
from jevons.tasks.registry import load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--weights", default="int8,int4")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--max-batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    kinds = ["bf16", *args.weights.split(",")]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise SystemExit(f"--weights {unknown[0]} is not a kind of weights; {', '.join(KINDS)} are")
    torch.set_num_threads(Runtime.detect("cpu").threads)
    right: dict[str, list[float]] = {}
    records = []
    for kind in kinds:
        begin, loaded = time.perf_counter(), load_checkpoint(args.checkpoint, frozen=True)
        if not loaded.provenance.get("task"):
            raise SystemExit(f"{args.checkpoint} does not say which task it was trained on; one that `jevons up` left would")
        task = load_task(loaded.provenance["task"]["name"], loaded.provenance["task"]["args"])
        model = pack(loaded.model, kind, Runtime.detect("cpu").dtype)  # as `jevons serve --weights` does
        result, right[kind] = evaluate(model, loaded.tokenizer, task, args.n, args.seed, args.max_tokens,
                                       max_batch=args.max_batch)
        mean, low, high = paired_interval(right["bf16"], right[kind])
        records.append({"weights": kind, "n": args.n, "accuracy": result.accuracy, "difference": mean, "low": low, "high": high,
                        "seconds": time.perf_counter() - begin})
        if not args.json:
            print(f"{kind:<8} {result.accuracy:7.2%} right of {args.n:,}; against bf16 {100 * mean:+.2f} points "
                  f"({100 * low:+.2f} to {100 * high:+.2f}); {records[-1]['seconds']:.0f} s", flush=True)
    if args.json:
        print(json.dumps(records, indent=2))


if __name__ == "__main__":
    main()
