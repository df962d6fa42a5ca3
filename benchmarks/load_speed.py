"""Opening a checkpoint until every page is touched and summed, against plainly reading its file. Target: 80 %.

Both sum all bytes as 64-bit integers in pieces of the same size, one after the other, page cache warm, best of several
alternating rounds. `mapped` is what serving uses; `copied` makes parameters of its own (fused, stacked) and sums those.

    python benchmarks/load_speed.py [--gigabytes 2] [--rounds 5] [--dir /tmp]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from jevons.config import LLAMA, ModelConfig
from jevons.model import build_model
from jevons.store.checkpoint import load_checkpoint, save_checkpoint

PIECE = 2**24  # bytes


def dense(gigabytes: float) -> ModelConfig:
    """A Llama in the 1B students' shape, with as many layers as fill the size in bf16."""
    hidden, inter = 2048, 8192
    layers = max(1, round((gigabytes * 1e9 - 4 * 32000 * hidden) / (2 * (4 * hidden**2 + 3 * hidden * inter))))
    return ModelConfig(architecture=LLAMA, vocab_size=32000, hidden_size=hidden, intermediate_size=inter,
                       num_hidden_layers=layers, num_attention_heads=16)


def total(raw: torch.Tensor) -> int:
    """All of a flat uint8 tensor, read once."""
    return sum(int(raw[at : at + PIECE].view(torch.int64).sum()) for at in range(0, raw.numel(), PIECE))


def plain(file: Path) -> tuple[int, float]:
    buffer = torch.empty(PIECE, dtype=torch.uint8)
    view, result, begin = memoryview(buffer.numpy()), 0, time.perf_counter()
    with open(file, "rb", buffering=0) as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        while count := stream.readinto(view):
            result += total(buffer[:count])
    return result, time.perf_counter() - begin


def loaded(directory: Path, frozen: bool) -> tuple[int, float]:
    begin = time.perf_counter()
    model = load_checkpoint(directory, need_tokenizer=False, dtype=torch.bfloat16, frozen=frozen).model
    result = sum(total(tensor.flatten().view(torch.uint8)) for tensor in model.hf_state_dict().values())
    return result, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to put the checkpoint (default: a temporary directory)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as place:
        directory = Path(place)
        model = build_model(dense(args.gigabytes), seed=0, dtype=torch.bfloat16)
        save_checkpoint(directory, model, None, {})
        del model
        file = directory / "model.safetensors"
        best = {"plain": float("inf"), "mapped": float("inf"), "copied": float("inf")}
        for _ in range(args.rounds):
            sums = {}
            for name, run in (("plain", lambda: plain(file)), ("mapped", lambda: loaded(directory, True)),
                              ("copied", lambda: loaded(directory, False))):
                sums[name], seconds = run()
                best[name] = min(best[name], seconds)
            wrapped = {name: value % 2**64 for name, value in sums.items()}
            if len(set(wrapped.values())) != 1:
                raise SystemExit(f"the sums differ: {wrapped}")
        size = file.stat().st_size
        print(json.dumps({"gigabytes": size / 1e9, "threads": torch.get_num_threads()}
                         | {f"{name}_gb_s": round(size / seconds / 1e9, 2) for name, seconds in best.items()}
                         | {f"{name}_of_plain": round(best["plain"] / best[name], 3) for name in ("mapped", "copied")}))


if __name__ == "__main__":
    main()
