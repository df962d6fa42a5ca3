"""Absorbed-MLA and grouped-query attention over the paged cache on a GPU: the Triton kernel, split contexts, beside gathering.

    python benchmarks/gpu_mla_decode.py [--quick] [--json FILE]

First the kernel is held to float64 on the same bf16 numbers, with random page tables, ragged lengths and drafts. Then decode (and
the verification of three drafts) over contexts in random pages. The floor of a call is the larger of two times: every cached cell
read once at the measured copy rate, and 2 H q L (key + value) operations at the measured bf16 rate. `splits` is what was chosen;
`best` the fastest of all tried, so that the choice itself is checked. About two minutes.
"""

from __future__ import annotations

import random
from functools import partial

import torch
from gpu_common import arguments, ceilings, device_of, error, median_seconds, require, table

from jevons.config import QWEN2, ModelConfig, preset
from jevons.model import KVCache, build_meta
from jevons.model.attention import attend_gathered
from jevons.numerics import triton_mla
from jevons.numerics.paged import Heads, grouped_heads, latent_heads

PAGE = 32
MLA = {"V3, 128 heads": latent_heads(128, 512, 64, 0.135, 1e-6), "16 heads (V2-Lite)": latent_heads(16, 512, 64, 0.135, 1e-6)}
GQA = {"GQA 12/2 x 128": grouped_heads(12, 2, 128, 128**-0.5), "GQA 32/8 x 128": grouped_heads(32, 8, 128, 128**-0.5)}


def config_of(heads: Heads) -> ModelConfig:
    if heads.plain:
        return preset("v3-nano", kv_lora_rank=heads.plain, qk_rope_head_dim=heads.rotary, num_attention_heads=heads.heads)
    return ModelConfig(architecture=QWEN2, vocab_size=64, hidden_size=heads.heads * heads.rotary, intermediate_size=64,
                       num_hidden_layers=1, num_attention_heads=heads.heads, num_key_value_heads=heads.groups,
                       attention_bias=True)


def scene(heads: Heads, contexts: list[int], lens: list[int], device: torch.device):
    """Queries, a cache with scattered pages, and the call's meta."""
    per = -(-max(c + n for c, n in zip(contexts, lens, strict=True)) // PAGE)
    cache = KVCache(config_of(heads), len(contexts) * per, PAGE, layers=1, dtype=torch.bfloat16, device=device)
    cache.data.normal_()
    pages = torch.randperm(len(contexts) * per, device=device).view(len(contexts), per)
    q = torch.randn(sum(lens), heads.heads, heads.plain + heads.rotary, device=device, dtype=torch.bfloat16)
    return q, cache, build_meta(pages, contexts, lens, PAGE)


def kernel(heads: Heads, q: torch.Tensor, cache: KVCache, meta, splits: int | None = None) -> torch.Tensor:
    if not triton_mla.available(q):  # a rehearsal
        return attend_gathered(heads, q, cache, 0, meta)
    return triton_mla.attend(heads, q, cache.layers[0], meta.page_table_SP, *meta.on_device, meta.lengths_S, meta.max_query,
                             meta.max_context, splits)


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__)
    device, small = device_of(args), args.rehearse
    if not small and (why := triton_mla.why_not(device)):
        raise SystemExit(f"{why}; this benchmark is of a Triton kernel")
    bandwidth, peak = ceilings(device)
    for name, heads in (MLA | GQA).items():
        contexts, lens = [random.randrange(60 if small else 900) for _ in range(3)], [random.randint(1, 4) for _ in range(3)]
        q, cache, meta = scene(heads, contexts, lens, device)
        wide = KVCache(config_of(heads), 1, PAGE, layers=1, dtype=torch.float64, device=device)
        wide.data = cache.data.double()
        wide.layers = list(wide.data)
        want = attend_gathered(heads, q.double(), wide, 0, meta)
        require(name, max(error(kernel(heads, q, cache, meta, s), want) for s in (None, 1, 5)), 1e-2)
    shapes = [(1, 4096, 1), (1, 32768, 1), (32, 4096, 1), (32, 4096, 4), (128, 2048, 1), (128, 2048, 4)]
    shapes = [(2, 64, 1), (1, 100, 4)] if small else shapes[1:4] if args.quick else shapes
    rows = []
    for name, heads in (MLA | GQA).items():
        for batch, context, queries in shapes:
            sets = [scene(heads, [context - queries] * batch, [queries] * batch, device) for _ in range(2)]
            sms, memory = triton_mla.chip(device)
            row, cell, *_ = triton_mla.tiles(heads, queries, 2, memory)
            programs = batch * heads.groups * -(-queries * (heads.heads // heads.groups) // row)
            splits = triton_mla.choose_splits(programs, context, cell, sms)
            mine = median_seconds([partial(kernel, heads, *s) for s in sets], device)
            tried = {n: median_seconds([partial(kernel, heads, *s, n) for s in sets], device, 0.1)
                     for n in ([1] if small else [1, 2, 4, 8, 16, 32, 64])}
            gathered = median_seconds([partial(attend_gathered, heads, s[0], s[1], 0, s[2]) for s in sets], device, 0.2)
            moved = batch * context * sets[0][1].data.shape[-1] * 2 + sets[0][0].nbytes * 2
            done = 2 * batch * queries * heads.heads * context * (heads.plain + heads.rotary + heads.value)
            floor = max(moved / bandwidth, done / peak)
            best = min(tried, key=tried.get)
            rows.append({"heads": name, "batch": batch, "context": context, "queries": queries, "us": mine * 1e6,
                         "floor us": floor * 1e6, "bound": "bytes" if moved / bandwidth > done / peak else "FLOPs",
                         "of floor": floor / mine, "GB/s": moved / mine / 1e9, "TFLOP/s": done / mine / 1e12,
                         "gathered us": gathered * 1e6, "ratio": gathered / mine, "splits": splits, "best": best,
                         "best us": tried[best] * 1e6})
    table(rows, args)


if __name__ == "__main__":
    main()
