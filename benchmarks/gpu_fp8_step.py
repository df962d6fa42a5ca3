"""A training step in FP8 beside the same in BF16, on a Hopper GPU, at a width where products dominate. Under 8 minutes.

    python benchmarks/gpu_fp8_step.py [--quick] [--width 4096] [--layers 4] [--steps 12]

A V3-style network (latent attention, 8 experts of which 2, a shared one) from one seed on the same random tokens, float32 master
weights, BF16 moments. First the losses of both arms, step by step (within 2 % over five steps, or it stops); then medians of a
step's parts, both arms in turns; model FLOPs beside this GPU's own measured peaks, and memory.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from gpu_block_gemm import need_hopper

from jevons.config import ModelConfig, preset
from jevons.model import CausalLM, build_model
from jevons.model.precision import set_training_precision
from jevons.numerics import Fp8
from jevons.numerics.fp8 import quantise_tiles, quantise_weight
from jevons.numerics.fp8_gemm import best_backend
from jevons.plan.counts import count_parameters, training_flops
from jevons.recipe import OptimizerTable
from jevons.train.objective import token_losses
from jevons.train.optim import build_optimizers


def config_of(width: int, layers: int, length: int) -> ModelConfig:
    return preset("v3-tiny", vocab_size=32768, hidden_size=width, intermediate_size=width * 11 // 4,
                  moe_intermediate_size=width // 2, num_hidden_layers=layers, num_attention_heads=width // 128,
                  q_lora_rank=width * 3 // 8, kv_lora_rank=width // 8, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                  num_nextn_predict_layers=0, max_position_embeddings=length)


def peak(fp8: bool) -> float:
    """TFLOP/s of one large product, the best of a few: what this GPU gives."""
    n = 8192
    x, w = torch.randn(n, n, device="cuda", dtype=torch.bfloat16), torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    back, a, b = best_backend("cuda"), quantise_tiles(x), quantise_weight(w)
    best = float("inf")
    for _ in range(12):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(4):
            _ = back.matmul(a, b, torch.bfloat16) if fp8 else x @ w.t()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / 4)
    return 2e-12 * n**3 / best


class Arm:
    def __init__(self, config: ModelConfig, fp8: Fp8 | None, device: str):
        self.model: CausalLM = build_model(config, seed=0, device=device)
        set_training_precision(self.model, fp8)
        table = OptimizerTable(matrices="adamw", lr=3e-4)
        self.optimizers = build_optimizers(self.model, table, "bf16")
        self.device, self.times, self.losses = device, {"forward": [], "backward": [], "update": []}, []

    def _mark(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self, tokens_BT: torch.Tensor) -> None:
        rows, length = tokens_BT.shape[0], tokens_BT.shape[1] - 1
        marks = [self._mark()]
        with torch.autocast(self.device, dtype=torch.bfloat16):
            positions = torch.arange(length, device=self.device).repeat(rows)
            out = self.model.forward_train(tokens_BT[:, :-1].flatten(), positions, [(rows, length)], mtp=False)
            ones = torch.ones(rows * length, device=self.device)
            loss = token_losses(self.model, out.hidden_ND, tokens_BT[:, 1:].flatten(), ones) / (rows * length)
        marks.append(self._mark())
        loss.backward()
        marks.append(self._mark())
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        marks.append(self._mark())
        self.losses.append(loss.item())
        for name, first, last in zip(self.times, marks, marks[1:], strict=False):
            self.times[name].append(last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens, 4 steps")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.steps = 1, 4
    print(f"{need_hopper()}, torch {torch.__version__}, CUDA {torch.version.cuda}, back end {best_backend('cuda').name}")
    config = config_of(args.width, args.layers, args.length)
    parameters, tokens = count_parameters(config), args.rows * args.length
    print(f"{parameters.total / 1e9:.2f} G parameters, {parameters.active / 1e9:.2f} G active, {tokens} tokens a step")
    arms = {"bf16": Arm(config, None, "cuda"), "fp8": Arm(config, Fp8(), "cuda")}
    batch = torch.randint(0, config.vocab_size, (args.rows, args.length + 1), device="cuda")
    memory, warm = {}, 3
    for turn in range(args.steps + warm):
        for name, arm in arms.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            arm.step(batch)
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
        if turn < 3 or turn == args.steps + warm - 1:
            print("step", turn + 1, {name: round(arm.losses[-1], 4) for name, arm in arms.items()}, flush=True)
    gap = max(abs(a - b) / a for a, b in zip(arms["bf16"].losses[:5], arms["fp8"].losses[:5], strict=True))
    assert gap < 0.02, f"the arms' losses are {gap:.1%} apart within five steps"
    peaks = {"bf16": peak(False), "fp8": peak(True)}
    flops = training_flops(config, tokens, args.length, mtp=False)
    print(f"\nmeasured peaks, TFLOP/s: bf16 {peaks['bf16']:.0f}, FP8 blocks {peaks['fp8']:.0f}")
    print(f"a step is {flops / 1e12:.1f} TFLOP\n")
    print("| arm | forward ms | backward | update | step | tokens/s | of the bf16 peak | of its own peak | GiB a step adds |")
    print("|---" * 9 + "|")
    step = {}
    for name, arm in arms.items():
        parts = {key: statistics.median(values[warm:]) for key, values in arm.times.items()}
        step[name] = statistics.median(map(sum, zip(*(v[warm:] for v in arm.times.values()), strict=True)))
        rate = flops / step[name] / 1e12
        print(f"| {name} | " + " | ".join(f"{1e3 * v:.1f}" for v in (*parts.values(), step[name]))
              + f" | {tokens / step[name]:.0f} | {rate / peaks['bf16']:.1%} | {rate / peaks[name]:.1%} | {memory[name]:.1f} |")
    print(f"\nFP8 is {step['bf16'] / step['fp8']:.2f} times as fast a step as BF16 (aim: 1.4)")


if __name__ == "__main__":
    main()
