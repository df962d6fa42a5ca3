"""One full-size DeepSeek-V3 layer on a small machine: 7168 wide, 256 experts in FP8 blocks, opened without a second copy.

Writes a one-layer checkpoint with random weights (about 11.6 GB), opens it by memory map, runs one 128-token prefill and one
decode step through it, and prints time and memory beside the bounds that reading its weights and multiplying them set here.

    python experiments/full_size_v3_layer.py [--experts 16] [--dir /tmp] [--out full_size_v3_layer.json]
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import tempfile
import time
from pathlib import Path

import torch

from jevons.config import ModelConfig
from jevons.model import KVCache, build_meta, build_model
from jevons.numerics.fp8 import BLOCK
from jevons.store.checkpoint import load_checkpoint

CONTEXT, PAGE = 128, 64


def v3_layer(experts: int) -> ModelConfig:
    """V3's own numbers (facts, section 1.1), one MoE layer of it and a small vocabulary."""
    return ModelConfig(
        vocab_size=1024, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=1,
        first_k_dense_replace=0, num_attention_heads=128, n_routed_experts=experts, n_shared_experts=1, num_experts_per_tok=8,
        n_group=8, topk_group=4, routed_scaling_factor=2.5, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=4096,
        rope_scaling={"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0,
                      "mscale_all_dim": 1.0})


def write_checkpoint(directory: Path, config: ModelConfig, seed: int) -> int:
    """DeepSeek's layout, a tensor at a time; the bytes written. Weights are slices of one normal draw, std about 0.02."""
    generator = torch.Generator().manual_seed(seed)
    pool = (torch.randn(2**26, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for name, view in build_model(config, device="meta").hf_state_dict().items():
        shape = tuple(view.shape)
        if re.search(r"_proj(_with_mqa)?\.weight$", name):
            entries += [(name, "F8_E4M3", shape), (f"{name}_scale_inv", "F32", tuple(-(-n // BLOCK) for n in shape))]
        else:
            entries.append((name, "F32" if name.endswith("bias") else "BF16", shape))
    header, at = {}, 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    if (free := shutil.disk_usage(directory).free) < at + 2**30:
        raise SystemExit(f"{directory} has {free / 1e9:.1f} GB free; {at / 1e9 + 1:.1f} GB are needed, see --dir")
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in entries:
            count = math.prod(shape)
            if dtype == "F8_E4M3":
                begin = int(torch.randint(0, 2**26 - count % 2**26, (1,), generator=generator))
                while count:
                    piece = pool[begin : begin + count]
                    file.write(piece.numpy())
                    count, begin = count - len(piece), 0
                continue
            if name.endswith("scale_inv"):
                values = torch.full((count,), 0.02 / 100)
            elif "norm" in name:
                values = torch.ones(count)
            else:
                values = torch.randn(count, generator=generator) * 0.02
            file.write(values.to(torch.float32 if dtype == "F32" else torch.bfloat16).view(torch.uint8).numpy())
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    (directory / "config.json").write_text(json.dumps(config.to_hf() | {"quantization_config": quantisation}))
    return at


def memory(key: str) -> float:
    """GB of this process, by Linux's counters."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def bandwidth(file: Path, count: int) -> float:
    """Bytes a second that one pass over weights in the page cache reaches here, summed as 64-bit integers."""
    words = torch.from_file(str(file), shared=False, size=count // 8, dtype=torch.int64)
    words.sum()
    begin = time.perf_counter()
    words.sum()
    return words.nbytes / (time.perf_counter() - begin)


def flops(dtype: torch.dtype) -> float:
    """FLOPs a second of a square matrix product here."""
    a = torch.randn(2048, 2048).to(dtype)
    a @ a
    begin = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * 2048**3 / (time.perf_counter() - begin)


@torch.inference_mode()
def measure(directory: Path, config: ModelConfig, size: int, dtype: torch.dtype) -> dict[str, float]:
    before = memory("RssAnon")
    begin = time.perf_counter()
    model = load_checkpoint(directory, need_tokenizer=False, frozen=True, dtype=dtype).model
    result = {"open_seconds": time.perf_counter() - begin, "memory_copied_gb": memory("RssAnon") - before}
    cache, table = KVCache(config, 8, PAGE, dtype=dtype), torch.arange(8)[None]
    ids = torch.randint(config.vocab_size, (CONTEXT + 8,))

    def step(context: int, count: int) -> tuple[float, int]:
        """(seconds, experts that were read)."""
        meta = build_meta(table, [context], [count], PAGE)
        begin = time.perf_counter()
        hidden = model(ids[context : context + count], meta.positions_N, cache, meta)
        seconds = time.perf_counter() - begin
        if not hidden.isfinite().all():
            raise SystemExit("the layer's output is not finite")
        x = model.embed_tokens(ids[context : context + count])
        block = model.layers[0]
        attended = x + block.self_attn.cached(block.input_layernorm(x), model.rope[meta.positions_N], 0, cache, meta)
        return seconds, int((block.mlp.gate(block.post_attention_layernorm(attended)).rows_E > 0).sum())

    expert = 3 * config.hidden_size * config.moe_intermediate_size
    rest = size - config.n_routed_experts * expert
    speed, peak = bandwidth(directory / "model.safetensors", min(size, 4 * 10**9)), flops(dtype)
    result |= {"bandwidth_gb_s": speed / 1e9, "gflops": peak / 1e9}
    for name, context, count in (("prefill_first_touch", 0, CONTEXT), ("prefill", 0, CONTEXT), ("decode_first", CONTEXT, 1),
                                 ("decode", CONTEXT, 1)):
        seconds, read = step(context, count)
        touched = rest + read * expert
        work = 2 * count * (rest + config.num_experts_per_tok * expert)
        bound = max(touched / speed, work / peak)
        result |= {f"{name}_seconds": seconds, f"{name}_experts_read": read, f"{name}_bytes_read_gb": touched / 1e9,
                   f"{name}_bound_seconds": bound, f"{name}_times_bound": seconds / bound}
    return result | {"memory_anonymous_gb": memory("RssAnon"), "memory_peak_gb": memory("VmHWM")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256, help="fewer for a trial; a multiple of 8, at least 16")
    parser.add_argument("--dir", type=Path, help="where to put the checkpoint (default: a temporary directory)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="activations, and what FP8 becomes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    config = v3_layer(args.experts)
    with tempfile.TemporaryDirectory(dir=args.dir) as place:
        begin = time.perf_counter()
        size = write_checkpoint(Path(place), config, args.seed)
        print(f"{size / 1e9:.2f} GB written in {time.perf_counter() - begin:.0f} s", flush=True)
        result = {"experts": args.experts, "gigabytes": size / 1e9, "threads": torch.get_num_threads(), "dtype": args.dtype,
                  **measure(Path(place), config, size, getattr(torch, args.dtype))}
    for key, value in result.items():
        print(f"{key:32} {value:.4g}" if isinstance(value, float) else f"{key:32} {value}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
