"""Every layout against one process: the largest relative difference of losses, gradient norms and weights after 20 steps.

    python benchmarks/parallel_parity.py [--quick] [--steps 20] [--columns float64-muon,float32-muon]

Processes talk over gloo on this machine. In float64 a layout must agree to 1e-9, for a routing that flipped would hide behind a
looser bound; in float32 the gap is what another order of summation makes of the same recipe, flips included. The two matrix
optimizers are AdamW and Muon; Muon orthogonalises in bf16 where weights are float32, so its float32 gap is the larger.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import parallel_worker as worker  # noqa: E402

LAYOUTS = {
    2: {"FSDP 2": dict(data=2), "EP 2": dict(expert=2), "PP 2, 1F1B": dict(pipeline=2),
        "PP 2, ZBV": dict(pipeline=2, schedule="zbv"), "PP 2, DualPipeV": dict(pipeline=2, schedule="dualpipev")},
    4: {"FSDP 4": dict(data=4), "EP 4": dict(expert=4), "FSDP 2 x EP 2": dict(data=2, expert=2),
        "PP 2 x data 2, 1F1B": dict(pipeline=2, data=2),
        "PP 2 x EP 2, 1F1B": dict(pipeline=2, expert=2)},
}


def gaps(steps: int, dtype: torch.dtype, matrices: str, which: dict[int, dict[str, dict]]) -> dict[str, float]:
    """Layout -> largest relative difference."""
    options = dict(steps=steps, dtype=dtype, matrices=matrices, micros=4)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        alone = worker.train(f"{directory}/alone", **options)
        for ranks, tables in which.items():
            results = worker.run(ranks, worker.layouts, (tables, directory, options), directory, timeout=3600)
            found |= {name: worker.difference(result, alone) for name, result in results.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--columns", default="float64-muon,float64-adamw,float32-muon,float32-adamw",
                        help="precision and matrix optimizer of each column")
    parser.add_argument("--quick", action="store_true", help="3 steps of two processes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps, which = (3, {2: LAYOUTS[2]}) if args.quick else (args.steps, LAYOUTS)
    chosen = [tuple(column.split("-")) for column in args.columns.split(",")]
    columns = {column: gaps(steps, getattr(torch, column[0]), column[1], which) for column in chosen}
    print(f"largest relative difference to one process after {steps} steps\n")
    print("| Layout | " + " | ".join(", ".join(column) for column in chosen) + " |\n|" + "---|" * (len(chosen) + 1))
    for name in (name for tables in which.values() for name in tables):
        print(f"| {name} | " + " | ".join(f"{columns[column][name]:.1e}" for column in chosen) + " |")
    worst = max((gap for (dtype, _), found in columns.items() if dtype == "float64" for gap in found.values()), default=0.0)
    print(f"\nfloat64 {'holds' if worst < 1e-9 else 'DOES NOT HOLD'} to 1e-9: {worst:.1e}")


if __name__ == "__main__":
    main()
