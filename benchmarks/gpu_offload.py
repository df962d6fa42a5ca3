"""A mixture larger than the GPU: routed experts in RAM, the hot ones in slots on the GPU, one stream and a few.

    python benchmarks/gpu_offload.py [--quick] [--layers 12] [--skew 1.0] [--json FILE]

First a small network with offloaded experts is held to float64. Then a random bf16 mixture (V2-Lite's layers, 64 experts each)
whose routers prefer some experts (`--skew`, the std of their biases), with slots for 0 to 100 % of the experts. `hit rate` is
what the engine's own metrics say. A token's floor is what the GPU reads at its measured copy rate plus what the CPU reads of
missing experts at the measured rate of its RAM. Under five minutes.
"""

from __future__ import annotations

import statistics
import time

import torch
from gpu_common import arguments, ceilings, device_of, error, float64_hidden, require, sync, table
from gpu_engine import LITE

from jevons.config import ModelConfig, preset
from jevons.engine.engine import Engine
from jevons.engine.types import Request, SamplingParams
from jevons.model import KVCache, build_meta, build_model
from jevons.model.moe import MoE
from jevons.model.offload import expert_bytes, place
from jevons.numerics.kernels import read_rate
from jevons.plan import count_parameters


def check(device: torch.device) -> None:
    config = preset("v3-tiny", num_nextn_predict_layers=0, initializer_range=0.1)
    model = build_model(config, seed=1)
    ids = torch.randint(config.vocab_size, (50,))
    want = float64_hidden(model, ids)
    place(model, device, 4 * expert_bytes(model))
    for _ in range(2):  # with nothing in the slots, and with something
        cache, outs = KVCache(config, 2, 32, device=device), []
        for start, count in ((0, 46), (46, 4)):
            meta = build_meta(torch.arange(2, device=device)[None], [start], [count], 32)
            outs.append(model(ids[start : start + count].to(device), meta.positions_N, cache, meta))
        require("offloaded experts", error(torch.cat(outs), want), 1e-3)


def mixture(config: ModelConfig, skew: float, device: torch.device):
    """Experts in RAM; drawn on the device, which is faster."""
    model = build_model(config, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
                continue
            for part in parameter if parameter.dim() == 3 else [parameter]:
                part.copy_(torch.empty(part.shape, device=device, dtype=part.dtype).normal_(
                    std=1.0 if name == "embed_tokens.weight" else part.shape[-1] ** -0.5))
        for gate in model.routers():
            gate.e_score_correction_bias.normal_(std=0.1 * skew)
    return model.eval()


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__, layers=12, skew=1.0)
    device, small = device_of(args), args.rehearse
    bandwidth, _ = ceilings(device)
    check(device)
    # sigmoid scores with a bias, so that experts are as unevenly hot as in a trained router
    sizes = LITE | dict(architecture="DeepseekV3ForCausalLM", num_hidden_layers=args.layers, scoring_func="sigmoid",
                        topk_method="noaux_tc", norm_topk_prob=True)
    config = preset("v3-nano", num_nextn_predict_layers=0) if small else ModelConfig.build(sizes, "mixture")
    model = mixture(config, args.skew, device)
    ram, _ = read_rate(2**24 if small else 2**30)
    counts, each = count_parameters(config), expert_bytes(model)
    layers = config.num_hidden_layers - config.first_k_dense_replace
    print(f"{counts.total / 1e9:.2f} B parameters, experts of {each / 2**20:.1f} MiB; RAM {ram / 1e9:.1f} GB/s")
    place(model, device, 0)
    rows = []
    for share in [0.5] if small else [0.0, 0.25, 1.0] if args.quick else [0.0, 0.1, 0.25, 0.5, 1.0]:
        for block in model.layers:
            if isinstance(block.mlp, MoE):  # back to the bank, then with other slots
                block.mlp.experts = block.mlp.experts.bank
        place(model, device, int(share * layers * config.n_routed_experts * each))
        for batch in [1] if small or args.quick else [1, 8]:
            engine = Engine(model, -1, max_batch=batch, max_len=256)
            for i in range(batch):
                prompt = torch.randint(config.vocab_size, (32,)).tolist()
                engine.submit(Request(prompt, SamplingParams(8 if small else 160, 1.0, seed=i)))
            times, before = [], {}
            while engine.has_work:
                began = time.perf_counter()
                engine.step()
                sync(device)
                times.append(time.perf_counter() - began)
                if len(times) == (4 if small else 60):  # what comes before warms the slots
                    before = dict(model.expert_counts)
            now, steps = model.expert_counts, len(times) - (4 if small else 60)
            uses, hits = (now[k] - before[k] for k in ("expert_uses", "expert_hits"))
            seconds, missing = statistics.median(times[-steps:]), (uses - hits) / steps * each
            dense = (counts.active - counts.embedding) * 2 - layers * config.num_experts_per_tok * each
            floor = missing / ram + (dense + hits / steps * each) / bandwidth
            rows.append({"slots": f"{share:.0%}", "GiB": now["expert_slots"] * each / 2**30, "batch": batch, "ms": seconds * 1e3,
                         "tokens/s": batch / seconds, "hit rate": hits / max(1, uses), "copies": now["expert_copies"],
                         "RAM MB a step": missing / 1e6, "floor ms": floor * 1e3, "of floor": floor / seconds})
    table(rows, args)


if __name__ == "__main__":
    main()
