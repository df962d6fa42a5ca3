"""The engine on a GPU: decode with and without captured steps at several batch sizes, prompts, and FP8 weights.

    python benchmarks/gpu_engine.py [--quick] [--model M|L|lite] [--json FILE]

First a small network's hidden states on the GPU, through prompt and decode over the paged cache, are held to float64 on the CPU.
Then random bf16 networks: M (300 M parameters, 65 M active), L (R1-Distill-Qwen-1.5B's shape), lite (V2-Lite's, 16 B). A decode
step's floor is the larger of the bytes that it must read (weights once, of the experts only those that the batch is expected to
choose, and its cache) over the measured copy rate, and its operations over the measured bf16 rate. `same` is the share of
requests whose greedy tokens are those of the eager steps (near-ties differ). Under eight minutes.
"""

from __future__ import annotations

import statistics
import time

import torch
from gpu_common import arguments, ceilings, device_of, error, float64_hidden, require, sync, table

from jevons.bench.models import BUILT_IN
from jevons.config import DEEPSEEK_V2, ModelConfig, preset
from jevons.engine.engine import Engine
from jevons.engine.graphs import obstacle
from jevons.engine.types import Request, SamplingParams
from jevons.model import KVCache, build_meta, build_model
from jevons.model.offload import place
from jevons.model.pack import pack
from jevons.plan import count_parameters, kv_bytes_per_token

LITE = dict(architecture=DEEPSEEK_V2, vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
            num_hidden_layers=27, num_attention_heads=16, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
            n_group=1, topk_group=1, routed_scaling_factor=1.0, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=512,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=4096, scoring_func="softmax",
            topk_method="greedy", norm_topk_prob=False)


def config_of(name: str, small: bool) -> ModelConfig:
    if small:
        return preset("v3-nano", num_nextn_predict_layers=0)
    return ModelConfig.build(LITE, "V2-Lite") if name == "lite" else BUILT_IN[name]()


def random_model(config: ModelConfig, device: torch.device):
    """Weights of std width^-0.5, made on the device."""
    model = build_model(config, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(std=1.0 if name == "embed_tokens.weight" else parameter.shape[-1] ** -0.5)
    return model.eval()


def check(device: torch.device) -> None:
    config = preset("v3-tiny", num_nextn_predict_layers=0, initializer_range=0.1)
    model = build_model(config, seed=1)
    ids = torch.randint(config.vocab_size, (70,))
    want = float64_hidden(model, ids)
    model.to(device)
    cache, outs = KVCache(config, 4, 32, device=device), []
    for start, count in ((0, 40), (40, 26), (66, 3), (69, 1)):  # a prompt, its next chunk, drafts, decode
        meta = build_meta(torch.arange(4, device=device)[None], [start], [count], 32)
        outs.append(model(ids[start : start + count].to(device), meta.positions_N, cache, meta))
    require("prompt, chunk, drafts and decode", error(torch.cat(outs), want), 1e-3)


def step_floor(config: ModelConfig, batch: int, context: int, size: int, bandwidth: float, peak: float) -> float:
    """Seconds that a decode step cannot beat."""
    counts = count_parameters(config)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    layers = config.num_hidden_layers - config.first_k_dense_replace if config.is_moe else 0
    chosen = config.n_routed_experts * (1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch) if layers else 0
    active = counts.active - counts.embedding * (not config.tie_word_embeddings)
    read = (active - layers * config.num_experts_per_tok * expert) * size if layers else active * size
    read += layers * chosen * expert * size + batch * context * kv_bytes_per_token(config, 2)
    return max(read / bandwidth, 2 * active * batch / peak)


def decode(model, batch: int, prompt: int, tokens: int, graphs: bool | None, device: torch.device):
    """Median seconds of a step with all rows running, and the tokens of every request."""
    engine = Engine(model, -1, max_batch=batch, max_len=prompt + tokens + 64, graphs=graphs)
    generator = torch.Generator().manual_seed(0)
    asked = [Request(torch.randint(model.config.vocab_size, (prompt,), generator=generator).tolist(),
                     SamplingParams(tokens, 0.0)) for _ in range(batch)]
    texts, times = {r.request_id: [] for r in asked}, []
    for r in asked:
        engine.submit(r)
    while engine.has_work:
        began = time.perf_counter()
        events = engine.step()
        sync(device)
        if len(events) == batch and not engine.scheduler.prefilling:
            times.append(time.perf_counter() - began)
        for event in events:
            texts[event.request_id].append(event.token_id)
    return statistics.median(times[3:] or times), list(texts.values()), engine


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__, model="")
    device, small = device_of(args), args.rehearse
    bandwidth, peak = ceilings(device)
    check(device)
    rows = []
    for name in [args.model] if args.model else ["M"] if args.quick or small else ["M", "L", "lite"]:
        config = config_of(name, small)
        model = random_model(config, device)
        print(f"{name}: {count_parameters(config).total / 1e6:.0f} M parameters; captured: {obstacle(model, device) or 'yes'}")
        kinds = ["bf16", "fp8"] if name == "M" else ["bf16"]
        for kind in kinds:
            if kind == "fp8":
                place(pack(place(model, "cpu"), "fp8", torch.bfloat16), device)
            for batch in [2] if small else [1, 32] if args.quick else [1, 8, 32, 128]:
                prompt, tokens = (8, 8) if small else (512, 64)
                eager, plain, _ = decode(model, batch, prompt, tokens, False, device)
                captured, static, engine = decode(model, batch, prompt, tokens, True if small else None, device)
                floor = step_floor(config, batch, prompt + tokens // 2, 1 if kind == "fp8" else 2, bandwidth, peak)
                rows.append({"model": name, "weights": kind, "what": f"decode, batch {batch}", "ms": captured * 1e3,
                             "eager ms": eager * 1e3, "ratio": eager / captured, "floor ms": floor * 1e3,
                             "of floor": floor / captured, "tokens/s": batch / captured,
                             "replays": engine.graphs.replays if engine.graphs else 0,
                             "same": sum(a == b for a, b in zip(plain, static, strict=True)) / batch})
            length = 16 if small else 2048
            engine = Engine(model, -1, max_batch=1, max_len=length + 2)
            times = []
            for _ in range(4):
                engine.submit(Request(torch.randint(config.vocab_size, (length,)).tolist(), SamplingParams(1, 0.0)))
                began = time.perf_counter()
                while engine.has_work:
                    engine.step()
                sync(device)
                times.append(time.perf_counter() - began)
            seconds, active = statistics.median(times[1:]), count_parameters(config).active
            floor = 2 * active * length / peak
            rows.append({"model": name, "weights": kind, "what": f"prompt of {length}", "ms": seconds * 1e3, "eager ms": 0.0,
                         "ratio": 0.0, "floor ms": floor * 1e3, "of floor": floor / seconds, "tokens/s": length / seconds,
                         "replays": 0, "same": 1.0})
        del model
    table(rows, args)


if __name__ == "__main__":
    main()
