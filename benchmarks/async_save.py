"""What a step pays for a save: the copy of the state, or the whole write. Both sides in turns, on the same state.

    python benchmarks/async_save.py            # v3-tiny, and one about ten times as large
    python benchmarks/async_save.py --quick
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from jevons.config import preset
from jevons.model import build_model
from jevons.recipe import OptimizerTable
from jevons.store.train_state import Writer, snapshot, write_train_state
from jevons.train.optim import build_optimizers, optimizer_tensors


def state(**changes: int) -> dict[str, torch.Tensor]:
    model = build_model(preset("v3-tiny", **changes), seed=0)
    optimizers = build_optimizers(model, OptimizerTable(matrices="adamw"))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    return {f"model.{n}": p for n, p in model.named_parameters()} | optimizer_tensors(model, optimizers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    rounds = 3 if args.quick else args.rounds
    shapes = [{}] if args.quick else [{}, dict(hidden_size=512, moe_intermediate_size=512, intermediate_size=1536)]
    print(f"medians of {rounds}, {torch.get_num_threads()} threads\n"
          f"{'state':>10} {'the copy':>11} {'whole write':>12} {'a step pays':>12}")
    for changes in shapes:
        tensors = state(**changes)
        size = sum(t.nbytes for t in tensors.values())
        copies, writes, writer = [], [], Writer()
        with tempfile.TemporaryDirectory() as directory:
            for step in range(1, 2 * rounds, 2):
                writer.wait()
                begin = time.perf_counter()
                copied = snapshot(tensors)
                writer.submit(lambda step=step, copied=copied: write_train_state(Path(directory), step, copied, {}) and None)
                copies.append(time.perf_counter() - begin)
                writer.wait()
                begin = time.perf_counter()
                write_train_state(Path(directory), step + 1, snapshot(tensors), {})
                writes.append(time.perf_counter() - begin)
        writer.close()
        copy, write = statistics.median(copies), statistics.median(writes)
        print(f"{size / 1e6:>7.1f} MB {1e3 * copy:>8.1f} ms {1e3 * write:>9.1f} ms {copy / write:>11.1%}")


if __name__ == "__main__":
    main()
