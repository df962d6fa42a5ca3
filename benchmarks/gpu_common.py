"""What the GPU benchmarks share: the device or a clear refusal, event timing, the card's two measured ceilings, a table, JSON."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from jevons.model import CausalLM
from jevons.model.moe import ExpertBank

NO_GPU = "no GPU: this benchmark needs a CUDA device that torch sees; --rehearse tries the script itself on the CPU, tiny"


def arguments(description: str, **more: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; its times mean nothing")
    parser.add_argument("--json", type=Path, help="write the rows there")
    for name, value in more.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()


def device_of(args: argparse.Namespace) -> torch.device:
    if args.rehearse:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    return torch.device("cuda")


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(calls: Sequence[Callable[[], object]], device: torch.device, seconds: float = 0.3) -> float:
    """Of one call; `calls` take turns (several input sets, so that a cache does not hold them). Five warm-ups."""
    for i in range(5 if device.type == "cuda" else 1):
        calls[i % len(calls)]()
    sync(device)
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 500):
        call = calls[len(times) % len(calls)]
        if device.type == "cuda":
            begin, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(begin.elapsed_time(stop) / 1e3)
        else:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def ceilings(device: torch.device) -> tuple[float, float]:
    """Measured bytes/s of a large copy (read and written), and FLOP/s of a large bf16 product on random numbers."""
    size, n = (2**30, 8192) if device.type == "cuda" else (2**22, 256)
    a = torch.empty(size, dtype=torch.uint8, device=device).random_()
    b = torch.empty_like(a)
    x, y = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    bandwidth = 2 * size / median_seconds([lambda: b.copy_(a)], device)
    peak = 2 * n**3 / median_seconds([lambda: x @ y], device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU (rehearsal: no number here means anything)"
    print(f"{name}, torch {torch.__version__}; measured: {bandwidth / 1e12:.2f} TB/s copy, {peak / 1e12:.0f} TFLOP/s bf16")
    return bandwidth, peak


@torch.no_grad()
def float64_hidden(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states of one sequence without a cache, all of it in float64 on the CPU. The model is left as it was."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, ExpertBank):  # torch's grouped product takes no float64; one product an expert does
            gate_up, down = list(module.gate_up_proj), list(module.down_proj)
            del module.gate_up_proj, module.down_proj
            module.gate_up_proj, module.down_proj = gate_up, down
    narrow, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double  # norms and gates ask for float32
    try:
        return model.forward_train(ids, torch.arange(len(ids)), [(1, len(ids))], mtp=False).hidden_ND
    finally:
        torch.Tensor.float = narrow


def error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """|out - ref| / |ref| in float64; NaN never passes a bound."""
    return float((out.double().cpu() - ref.double().cpu()).norm() / ref.double().cpu().norm())


def require(name: str, value: float, bound: float) -> None:
    if not value <= bound:
        raise SystemExit(f"{name}: relative error {value:.2e} against float64; {bound:.0e} would be right. Nothing is timed.")
    print(f"{name}: relative error {value:.1e} against float64 (bound {bound:.0e})")


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print rows under their keys, and write them."""
    if rows:
        shown = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
        widths = [max(map(len, column)) for column in zip(list(rows[0]), *shown, strict=True)]
        for line in [list(rows[0]), *shown]:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if args.json is not None:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() and not args.rehearse else "rehearsal"
        args.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=2) + "\n")
