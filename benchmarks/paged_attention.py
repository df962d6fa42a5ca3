"""Attention over the paged cache: the native kernel against gathering the cells and torch's matmul and softmax, in turns.

    python benchmarks/paged_attention.py [--rounds 7] [--threads 1] [--dtype bfloat16] [--cpu-time]

Situations: many short contexts of a small model, one context of 4,000 tokens (alone, and with four drafts to verify), and a
prompt's chunk of 512 tokens after 1,488. Pages lie in random order. Medians, and the ratio of both sides in one run: first of
the attention alone, then of the whole layer with its projections, which natively takes per-head keys and values for the chunk.
The rate of a plain matmul, in the same run, says how near the kernel comes to the machine. `--cpu-time` counts the process's
own seconds on one thread, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from jevons.config import QWEN2, ModelConfig, preset
from jevons.model import KVCache, build_meta, build_model
from jevons.model.attention import GQA, attend_gathered
from jevons.numerics import native, paged
from jevons.runtime import Runtime

PAGE = 32
Sides = list[Callable[[], object]]
ONE = dict(num_hidden_layers=1, intermediate_size=64, max_position_embeddings=8192)
MLA = ONE | dict(hidden_size=1024, num_attention_heads=16, q_lora_rank=384, first_k_dense_replace=1, num_nextn_predict_layers=0)
SHAPES = {
    "tiny MLA": preset("v3-tiny"),
    "MLA 16 x 96, latent 256": preset("v3-tiny", **MLA, kv_lora_rank=256, qk_nope_head_dim=64, v_head_dim=64),
    "V3's MLA, 16 heads": preset("v3-tiny", **MLA, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
    "GQA 12/2 x 128": ModelConfig(architecture=QWEN2, **ONE, vocab_size=512, hidden_size=1536, num_attention_heads=12,
                                  num_key_value_heads=2, attention_bias=True),
}
LONG = [name for name in SHAPES if name != "tiny MLA"]
SITUATIONS = [  # name, shapes, contexts, new tokens of each sequence
    ("192 sequences, 100 tokens", ["tiny MLA"], [100] * 192, 1),
    ("1 sequence, 4000 tokens", LONG, [4000], 1),
    ("the same, 4 drafts", LONG, [4000], 5),
    ("512 tokens after 1488", ["tiny MLA", *LONG], [1488], 512),
]


@contextmanager
def gathering() -> Iterator[None]:
    real, paged.available = paged.available, lambda *_: False
    try:
        yield
    finally:
        paged.available = real


def medians(sides: Sides, rounds: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of each, taken in turns."""
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 1):
        for side, kept in zip(sides, times, strict=True):
            begin = clock()
            side()
            if turn:
                kept.append(clock() - begin)
    return [statistics.median(t) for t in times]


def sides_of(config: ModelConfig, contexts: list[int], count: int, dtype: torch.dtype) -> tuple[Sides, float]:
    """Native and gathered attention, native and gathered layer; and the operations of the attention."""
    attn = build_model(config, seed=0, dtype=dtype).layers[0].self_attn
    per_seq = -(-(max(contexts) + count) // PAGE)
    cache = KVCache(config, len(contexts) * per_seq, PAGE, layers=1, dtype=dtype)
    cache.data.normal_()
    table = torch.randperm(cache.data.shape[1]).view(len(contexts), per_seq)
    meta, heads = build_meta(table, contexts, [count] * len(contexts), PAGE), attn.paged
    n = len(contexts) * count
    q = torch.randn(n, heads.heads, heads.plain + heads.rotary, dtype=dtype)
    rope = torch.stack([torch.ones(n, heads.rotary // 2), torch.zeros(n, heads.rotary // 2)], dim=1)
    x, out = torch.randn(n, config.hidden_size, dtype=dtype), torch.empty(n, heads.heads, heads.value, dtype=dtype)
    plain, rotary = q.split([heads.plain, heads.rotary], dim=-1)

    def gathered_layer() -> None:
        with gathering():
            attn.cached(x, rope, 0, cache, meta)

    sides = [lambda: paged.attend(heads, meta.batch, plain, rotary, rope, cache.layers[0], out),
             lambda: attend_gathered(heads, q, cache, 0, meta),
             lambda: attn.cached(x, rope, 0, cache, meta), gathered_layer]
    width = heads.rotary + heads.value if isinstance(attn, GQA) else heads.plain + heads.rotary + heads.value
    return sides, 2.0 * heads.heads * width * sum(count * c + count * (count + 1) / 2 for c in contexts)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: both")
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    runtime, clock = Runtime.detect("cpu"), time.thread_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(1 if args.cpu_time else args.threads or runtime.threads)
    if native.library() is None:
        raise SystemExit(f"no native kernels here: {native.why_not()}")
    print(f"{runtime.cpu}, {torch.get_num_threads()} threads; milliseconds, GFLOP/s of the attention, gathered / native")
    for dtype in (torch.float32, torch.bfloat16):
        if args.dtype not in (None, str(dtype).removeprefix("torch.")):
            continue
        a = torch.randn(1024, 1024, dtype=dtype)
        (square,) = medians([lambda a=a: a @ a], args.rounds, clock)
        print(f"\n{dtype}: a plain matmul of 1024 x 1024 runs at {2 * 1024**3 / square / 1e9:.0f} GFLOP/s")
        print(f"{'':27}{'':25}{'native':>9}{'GFLOP/s':>9}{'gathered':>10}{'ratio':>7}   {'layer':>8}{'gathered':>10}{'ratio':>7}")
        for name, shapes, contexts, count in SITUATIONS:
            for shape in shapes:
                sides, operations = sides_of(SHAPES[shape], contexts, count, dtype)
                one, other, layer, other_layer = medians(sides, args.rounds, clock)
                print(f"{name:27}{shape:25}{one * 1e3:9.3f}{operations / one / 1e9:9.0f}{other * 1e3:10.3f}{other / one:7.1f}   "
                      f"{layer * 1e3:8.3f}{other_layer * 1e3:10.3f}{other_layer / layer:7.1f}")


if __name__ == "__main__":
    main()
