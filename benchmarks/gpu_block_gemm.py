"""FP8 block GEMMs on a Hopper GPU: right first, then fast, at DeepSeek-V3's shapes. Under 5 minutes.

    python benchmarks/gpu_block_gemm.py [--quick] [--repeats 20]

Checks, on fresh inputs with outliers: what the Triton kernels quantise, to the bit against the reference; each product against
float64 of the quantised operands (bf16 within 5e-3 of the sum of magnitudes; float32 is printed: Hopper's tensor cores keep about
14 bits inside a block of 128, so 1e-5 is not to be had there); DeepGEMM's metric under 0.001 against what was not quantised. Then
medians of single calls, the L2 cache cleared before each, all sides of a shape in turns: TFLOP/s, and the ratio to the best of
`scaled_mm` (block-wise, row-wise, one scale) and to bf16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from jevons.numerics import fp8_gemm
from jevons.numerics.fp8 import Quantised, dequantise, quantise_columns, quantise_tiles, quantise_weight

# rows of a product and columns, and what is summed over: V3's dense projections, then its experts
DENSE = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
GROUPED = [(4, 8192, 4096, 7168), (4, 8192, 7168, 2048), (8, 4096, 4096, 7168), (8, 4096, 7168, 2048)]


def need_hopper() -> str:
    """The GPU's name; ends the program with a sentence where there is none that does this."""
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU of the Hopper generation (H100, H200, H800); torch finds no CUDA device here")
    if torch.cuda.get_device_capability()[0] != 9:
        sys.exit(f"this benchmark needs a Hopper GPU (compute capability 9.0); this is {torch.cuda.get_device_name()}, "
                 f"{'.'.join(map(str, torch.cuda.get_device_capability()))}")
    return torch.cuda.get_device_name()


def inputs(m: int, k: int) -> torch.Tensor:
    x = torch.randn(m, k, device="cuda") * torch.logspace(-1, 1, k, device="cuda")
    x[torch.randint(m, (4,)), torch.randint(k, (4,))] *= 1e4
    return x.bfloat16()


def worst(got: torch.Tensor, a: Quantised, b: Quantised) -> float:
    """Largest error as a part of the sum of the magnitudes an element is made of."""
    x, y = dequantise(a).double(), dequantise(b).double()
    return ((got.double() - x @ y.t()).abs() / (x.abs() @ y.abs().t() + 1e-30)).max().item()


def bits(q: Quantised) -> tuple[torch.Tensor, torch.Tensor]:
    return q.codes.contiguous().view(torch.uint8), q.scale.contiguous()


def check(matmuls: dict[str, fp8_gemm.Matmul]) -> None:
    from jevons.numerics import triton_fp8 as t

    offs = torch.tensor([100, 100, 333, 700], dtype=torch.int32, device="cuda")
    rows, ends = fp8_gemm.whole_tiles(offs, 700)
    for power in (False, True):
        x = inputs(700, 1000)
        pairs = {"1 x 128": (t.tiles(x, power), quantise_tiles(x, power)),
                 "128 x 1": (t.columns(x, power), quantise_columns(x, power)),
                 "128 x 1 by expert": (t.columns(x, power, rows), fp8_gemm.columns(x, power, rows)),
                 "128 x 1 again": (t.columns(t.tiles(x, power), power), fp8_gemm.columns(quantise_tiles(x, power), power)),
                 "128 x 128": (t.weight(x, power), quantise_weight(x, power))}
        for name, (got, want) in pairs.items():
            assert all(map(torch.equal, bits(got), bits(want))), f"{name} (power_of_two={power}): not the reference's codes"
    print("quantised tiles: codes and scales are the reference's, to the bit")
    x, w, grad, w_E = inputs(700, 1000), inputs(300, 1000), inputs(700, 300), torch.randn(4, 300, 1000, device="cuda")
    a = t.tiles(x)
    for name, matmul in matmuls.items():
        for kind, b in (("128 x 128", t.weight(w)), ("1 x 128", t.tiles(w)), ("transposed", t.weight(w.t().contiguous()).t())):
            errors = [worst(matmul(a, b, dtype), a, b) for dtype in (torch.float32, torch.bfloat16)]
            print(f"{name:<10} {kind:<10} float32 {errors[0]:.1e}  bf16 {errors[1]:.1e}")
            assert errors[1] < 5e-3 and errors[0] < 2e-3, f"{name} is wrong"
        y, z = torch.randn(512, 2048, device="cuda"), torch.randn(384, 2048, device="cuda")
        got, want = matmul(t.tiles(y), t.weight(z), torch.bfloat16).double(), y.double() @ z.double().t()
        metric = (1 - 2 * (got * want).sum() / (got * got + want * want).sum()).item()
        print(f"{name:<10} DeepGEMM's metric {metric:.5f}")
        assert metric < 0.001
    b, out, first = t.weight(w_E), t.grouped(a, t.weight(w_E), offs, torch.bfloat16), 0
    g, cols = t.columns(grad, False, rows), t.columns(a, False, rows)
    out_w, begin = t.grouped_wgrad(g, cols, ends, torch.float32), 0
    for e, (end, stop) in enumerate(zip(offs.tolist(), ends.tolist(), strict=True)):
        if end > first:
            own = Quantised(b.codes[e], b.scale[e], 128)
            assert worst(out[first:end], Quantised(a.codes[first:end], a.scale[first:end], 1), own) < 5e-3, "grouped is wrong"
            parts = (Quantised(q.codes[:, begin:stop], q.scale[:, begin // 128 : stop // 128], 1) for q in (g, cols))
            assert worst(out_w[e], *parts) < 2e-3, "grouped_wgrad is wrong"
        first, begin = end, stop
    print("by expert: right\n")


def milliseconds(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 3):
        for name, run in sides.items():
            flush.zero_()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            run()
            events[1].record()
            torch.cuda.synchronize()
            if turn >= 3:
                times[name].append(events[0].elapsed_time(events[1]))
    return {name: statistics.median(t) for name, t in times.items()}


def sides(m: int, n: int, k: int, matmuls: dict[str, fp8_gemm.Matmul]) -> dict[str, Callable[[], object]]:
    x, w = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    a, b, kinds = quantise_tiles(x), quantise_weight(w), F.ScalingType
    one = torch.ones((), device="cuda")
    per_row, per_column = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
    a = Quantised(a.codes, a.scale.t().contiguous().t(), 1)
    out = {name: (lambda f=f: f(a, b, torch.bfloat16)) for name, f in matmuls.items()}
    out["row-wise"] = lambda: F.scaled_mm(a.codes, b.codes.t(), per_row, kinds.RowWise, per_column, kinds.RowWise)
    out["one scale"] = lambda: F.scaled_mm(a.codes, b.codes.t(), one, kinds.TensorWise, one, kinds.TensorWise)
    out["bf16"] = lambda: x @ w.t()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes of each kind")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(f"{need_hopper()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    from jevons.numerics import triton_fp8 as t

    matmuls: dict[str, fp8_gemm.Matmul] = {"triton": t.matmul}
    try:
        a = t.tiles(torch.randn(128, 512, device="cuda"))
        fp8_gemm.scaled_mm(a, t.weight(torch.randn(128, 512, device="cuda")), torch.bfloat16)
        matmuls["scaled_mm"] = fp8_gemm.scaled_mm
    except (NotImplementedError, RuntimeError) as error:
        print(f"block-wise scaled_mm is not to be had here: {str(error).splitlines()[0]}")
    check(matmuls)
    names = [*matmuls, "row-wise", "one scale", "bf16"]
    print("TFLOP/s of single products, bf16 out; ours is the better of the block-wise ones\n")
    print("| M | N | K | " + " | ".join(names) + " | ours / best scaled_mm | ours / bf16 |\n" + "|---" * (len(names) + 5) + "|")
    ratios = []
    for m in (4096,) if args.quick else (4096, 64):
        for n, k in DENSE[:2] if args.quick else DENSE:
            times = milliseconds(sides(m, n, k, matmuls), args.repeats)
            ours = min(times[name] for name in matmuls)
            best = min(v for name, v in times.items() if name not in ("triton", "bf16"))
            ratios += [best / ours] if m > 64 else []
            print(f"| {m} | {n} | {k} | " + " | ".join(f"{2e-9 * m * n * k / times[name]:.0f}" for name in names)
                  + f" | {best / ours:.2f} | {times['bf16'] / ours:.2f} |", flush=True)
    print(f"\nmedian of ours / best scaled_mm at M = 4096: {statistics.median(ratios):.2f} (aim: 0.80)\n")
    print("| experts | rows each | N | K | triton, TFLOP/s | bf16 grouped_mm | ratio | Wgrad, TFLOP/s | bf16 | ratio |")
    print("|---" * 10 + "|")
    for experts, rows, n, k in GROUPED[:2] if args.quick else GROUPED:
        m = experts * rows
        x, w, grad = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (experts, n, k), (m, n)))
        offs = torch.arange(1, experts + 1, dtype=torch.int32, device="cuda") * rows
        a, b, g, cols = t.tiles(x), t.weight(w), t.columns(grad), t.columns(x)
        times = milliseconds({
            "fp8": lambda a=a, b=b, o=offs: t.grouped(a, b, o, torch.bfloat16),
            "bf16": lambda x=x, w=w, o=offs: F.grouped_mm(x, w.transpose(1, 2), offs=o),
            "wgrad": lambda g=g, c=cols, o=offs: t.grouped_wgrad(g, c, o, torch.float32),
            "wgrad bf16": lambda g=grad, x=x, o=offs: F.grouped_mm(g.t(), x, offs=o)}, args.repeats)
        rate = {name: f"{2e-9 * m * n * k / ms:.0f}" for name, ms in times.items()}
        print(f"| {experts} | {rows} | {n} | {k} | {rate['fp8']} | {rate['bf16']} | {times['bf16'] / times['fp8']:.2f} | "
              f"{rate['wgrad']} | {rate['wgrad bf16']} | {times['wgrad bf16'] / times['wgrad']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
