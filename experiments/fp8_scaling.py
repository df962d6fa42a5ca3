"""What tile scaling and promoted accumulation are for, in two tables (seconds).

    python experiments/fp8_scaling.py [--seed 0] [--outlier 1e5] [--columns 4]

1. Activations with a few outlier channels, times a weight: the error outside of the outlier columns, of the elements and of
   their part of the product, with one scale for the tensor, one a row, and one for each 1 x 128.
2. Sums of K products that keep 14 bits, over all of K and promoted to float32 every 128 elements (V3 report, section 3.5.2:
   nearly 2 % at K = 4096 without promotion).
"""

from __future__ import annotations

import argparse

import torch

from jevons.numerics.fp8 import E4M3_MAX, dequantise, quantise_tiles, quantise_weight
from jevons.numerics.fp8_gemm import matmul_blockwise, matmul_limited

M, N, K = 256, 256, 4096


def scaled(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """x through E4M3 with the scale `largest` / 448, broadcast."""
    scale = largest / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def scaling(outlier: float, columns: int) -> None:
    x, w = torch.randn(M, K), torch.randn(N, K) * K**-0.5
    outliers = torch.randperm(K)[:columns]
    x[:, outliers] *= outlier
    rest = torch.ones(K, dtype=torch.bool)
    rest[outliers] = False
    apart = ~torch.isin(torch.arange(K) // 128, outliers // 128)
    w8 = dequantise(quantise_weight(w))
    ways = {"one for the tensor": scaled(x, x.abs().max()),
            "one a row": scaled(x, x.abs().amax(1, keepdim=True)), "1 x 128 tiles": dequantise(quantise_tiles(x)),
            "1 x 128, powers of two": dequantise(quantise_tiles(x, True))}
    print(f"{columns} of {K} channels are {outlier:g} times the rest; error (root mean square, relative) outside of them\n")
    print("| scales | elements | of them exactly 0 | their product | elements in tiles without an outlier |")
    print("|---|---|---|---|---|")

    def error(got: torch.Tensor, want: torch.Tensor) -> str:
        return f"{((got - want).norm() / want.norm()).item():.2%}"

    for name, got in ways.items():
        lost = (got[:, rest] == 0).float().mean().item()
        product = error(got[:, rest] @ w8[:, rest].t(), x[:, rest] @ w[:, rest].t())
        print(f"| {name} | {error(got[:, rest], x[:, rest])} | {lost:.1%} | {product} | {error(got[:, apart], x[:, apart])} |")


def accumulation() -> None:
    print("\nlargest error of any element, relative to it (uniform), or to the root mean square of all (normal)\n")
    print("| inputs | K | 14 bits over all of K | 14 bits, promoted every 128 | float32 |\n|---|---|---|---|---|")
    for name, draw in (("uniform in [0, 1)", torch.rand), ("normal", torch.randn)):
        for k in (512, 1024, 2048, 4096):
            a, b = quantise_tiles(draw(64, k)), quantise_weight(draw(64, k))
            want = dequantise(a).double() @ dequantise(b).double().t()
            size = want if draw is torch.rand else want.square().mean().sqrt()
            ways = (matmul_limited(a, b, torch.float32), matmul_limited(a, b, torch.float32, promote_every=128),
                    matmul_blockwise(a, b, torch.float32))
            print(f"| {name} | {k} | " + " | ".join(f"{((c - want) / size).abs().max().item():.5%}" for c in ways) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outlier", type=float, default=1e5)
    parser.add_argument("--columns", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    scaling(args.outlier, args.columns)
    accumulation()


if __name__ == "__main__":
    main()
