"""How fast weights are read in each precision: kernels alone, and whole models decoding one stream through the engine.

The yardstick is this machine's own rate of reading 1 GiB (`jevons info`), taken in turns with what is measured. Kernels: the
matrices of R1-Distill-Qwen-1.5B's layer, as many copies as leave the caches behind. Models, random: L of that shape, M a small
DeepSeek-V3 of about 300 M parameters, 60 M of them active. Medians; a second is the median step's.

    python benchmarks/low_bit.py [--kinds bf16 int8 fp8 int4] [--what kernels L M] [--tokens 48] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the commands set it

import torch

from jevons.config import QWEN2, ModelConfig, preset
from jevons.engine.engine import Engine
from jevons.engine.types import Request, SamplingParams
from jevons.model import build_model
from jevons.model.pack import INTEGERS, KINDS, pack
from jevons.numerics import Fp8Weight, IntWeight, Rows, linear
from jevons.numerics.fp8 import quantise_blocks
from jevons.numerics.kernels import read_rate
from jevons.numerics.memory import HugePages
from jevons.numerics.native import state, why_not
from jevons.plan import count_parameters

LAYER = [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)]
BYTES = 400e6  # of weights that one pass reads


def model_l() -> ModelConfig:
    return ModelConfig(architecture=QWEN2, vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                       num_attention_heads=12, num_key_value_heads=2, attention_bias=True, max_position_embeddings=2048)


def model_m() -> ModelConfig:
    return preset("v3-nano", vocab_size=8192, hidden_size=640, num_hidden_layers=12, num_attention_heads=8, q_lora_rank=384,
                  kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=2560,
                  moe_intermediate_size=192, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=1, n_group=8,
                  topk_group=4, first_k_dense_replace=1, num_nextn_predict_layers=0, max_position_embeddings=2048)


def quantise(weight: torch.Tensor, kind: str) -> torch.Tensor | Fp8Weight | IntWeight:
    if kind == "bf16":
        return weight.bfloat16()
    return Fp8Weight(*quantise_blocks(weight)) if kind == "fp8" else IntWeight.of(weight, *INTEGERS[kind])


def tensors_of(weight: object) -> list[torch.Tensor]:
    """What lies in memory of a weight, packed or not."""
    if isinstance(weight, torch.Tensor):
        return [weight]
    if isinstance(weight, Rows | list):
        return [t for part in getattr(weight, "parts", weight) for t in tensors_of(part)]
    return [t for t in vars(weight).values() if isinstance(t, torch.Tensor)]


def copied(weight: torch.Tensor | Fp8Weight | IntWeight, pages: HugePages) -> torch.Tensor | Fp8Weight | IntWeight:
    if isinstance(weight, torch.Tensor):
        return pages.copy(weight)
    if isinstance(weight, Fp8Weight):
        return Fp8Weight(pages.copy(weight.codes), pages.copy(weight.scale_inv))
    return IntWeight(pages.copy(weight.codes), pages.copy(weight.scale), weight.shape, weight.bits, weight.group)


@torch.inference_mode()
def kernels(kind: str, rounds: int) -> dict[str, float]:
    """Bytes of weights a second for 1, 4 and 16 rows of activations, and the share of the read rate for one."""
    pages = HugePages()
    layer = [quantise(torch.randn(shape) * 0.02, kind) for shape in LAYER]
    size = sum(t.nbytes for w in layer for t in tensors_of(w))
    layers = [[copied(w, pages) for w in layer] for _ in range(max(2, round(BYTES / size)))]
    taken: dict[int, list[float]] = {1: [], 4: [], 16: []}
    shares = []
    for _ in range(rounds):
        rate = read_rate(2**28, rounds=2)[0]
        for rows, seconds in taken.items():
            inputs = [torch.randn(rows, columns, dtype=torch.bfloat16) for _, columns in LAYER]
            begin = time.perf_counter()
            for weights in layers:
                for x, w in zip(inputs, weights, strict=True):
                    linear(x, w)
            seconds.append((time.perf_counter() - begin) / len(layers))
        shares.append(size / taken[1][-1] / rate)
    result = {f"gb_s_{rows}_rows": round(size / statistics.median(s) / 1e9, 1) for rows, s in taken.items()}
    return result | {"of_read_rate": round(statistics.median(shares), 2)}


def read_per_token(model: torch.nn.Module, config: ModelConfig) -> int:
    """Bytes of weights that one token touches: all but the embedding, and of the experts those it chose."""
    total = 0
    for name, module in model.named_modules():
        for key in ("weight", "gate_up_proj", "down_proj"):
            weight = vars(module).get(key, module._parameters.get(key))
            if weight is None or name == "embed_tokens" or isinstance(weight, torch.nn.Module):
                continue
            size = sum(t.nbytes for t in tensors_of(weight))
            routed = name.endswith(".experts")
            total += size * config.num_experts_per_tok // config.n_routed_experts if routed else size
    return total


def decode(config: ModelConfig, base: dict[str, torch.Tensor], kind: str, tokens: int) -> dict[str, float]:
    """Single stream: the median step over `tokens`, and the bytes it touches; the prefill of 512 tokens before it."""
    model = build_model(config, device="meta")
    model.hold(base.__getitem__, "cpu")
    begin = time.perf_counter()
    pack(model, kind)
    packing = time.perf_counter() - begin
    engine = Engine(model.eval(), -1, max_batch=1, max_len=1024, cache_dtype=torch.bfloat16)
    prompt = torch.randint(config.vocab_size, (512,)).tolist()
    times, shares, size = [], [], read_per_token(model, config)
    engine.submit(Request(prompt, SamplingParams(tokens, 0.0)))
    begin = time.perf_counter()
    while not engine.step():  # a step that only computed a part of the prompt gives no token
        pass
    prefill = time.perf_counter() - begin
    while engine.has_work:
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
        if len(times) % 12 == 0:
            shares.append(size / statistics.median(times[-12:]) / read_rate(2**28, rounds=2)[0])
    step = statistics.median(times)
    return {"tokens_s": round(1 / step, 1), "best_tokens_s": round(1 / min(times), 1), "gb_s": round(size / step / 1e9, 1),
            "of_read_rate": round(statistics.median(shares), 2), "gb_a_token": round(size / 1e9, 3),
            "prefill_tokens_s": round(len(prompt) / prefill), "packing_s": round(packing, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--what", nargs="+", default=["kernels", "L", "M"], choices=["kernels", "L", "M"])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if why_not():
        print(f"no native kernels: {why_not()}")
    rate, threads = read_rate()
    print(json.dumps({"read_gb_s": round(rate / 1e9, 1), "read_threads": threads, "threads": torch.get_num_threads(),
                      "native": state()}), flush=True)
    torch.manual_seed(0)
    if "kernels" in args.what:
        for kind in args.kinds:
            print(json.dumps({"what": "kernels", "weights": kind} | kernels(kind, args.rounds)), flush=True)
    for name, make in (("L", model_l), ("M", model_m)):
        if name not in args.what:
            continue
        config = make()
        base = build_model(config, seed=0, dtype=torch.bfloat16).hf_state_dict()
        counts = count_parameters(config)
        for kind in args.kinds:
            print(json.dumps({"what": name, "parameters": counts.total, "active": counts.active, "weights": kind}
                             | decode(config, base, kind, args.tokens)), flush=True)


if __name__ == "__main__":
    main()
