"""What is measured: a checkpoint of the user's, or a random one made here in the published format; and its GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jevons.bench.workload import BenchError
from jevons.config import QWEN2, ModelConfig, preset
from jevons.model.pack import INTEGERS
from jevons.numerics.fp8 import BLOCK
from jevons.plan import count_parameters

# V3's block throughout, every matrix dimension a multiple of 64: 304 M parameters, 65 M active, 55 M without the embedding.
_M: dict[str, Any] = dict(
    vocab_size=16384, hidden_size=640, intermediate_size=1792, moe_intermediate_size=256, num_hidden_layers=12,
    num_attention_heads=8, n_routed_experts=48, n_shared_experts=1, num_experts_per_tok=4, n_group=8, topk_group=4,
    routed_scaling_factor=1.0, first_k_dense_replace=1, q_lora_rank=384, kv_lora_rank=128, qk_nope_head_dim=64,
    qk_rope_head_dim=32, v_head_dim=64, max_position_embeddings=4096)
# DeepSeek-R1-Distill-Qwen-1.5B's config.json
_L: dict[str, Any] = dict(
    architecture=QWEN2, attention_bias=True, vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
    num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=131072, rope_theta=10000.0)
BUILT_IN: dict[str, Callable[[], ModelConfig]] = {
    "small": lambda: preset("v3-tiny"),
    "M": lambda: ModelConfig.build(_M, "model M"),
    "L": lambda: ModelConfig.build(_L, "model L"),
}
WEIGHTS = {"float32": "f16", "bf16": "f16", "int8": "q8_0", "fp8": "q8_0", "int4": "q4_0"}  # ours -> the GGUF type beside it


def find_model(name: str, directory: Path, say: Callable[[str], None]) -> tuple[Path, ModelConfig]:
    """(checkpoint directory, its config). A built-in one is made in `directory`, or taken from there.
    Raises BenchError, ConfigError."""
    if name not in BUILT_IN:
        if not Path(name).is_dir():
            raise BenchError(f"{name} is neither a checkpoint directory nor one of the built-in models {', '.join(BUILT_IN)}")
        return Path(name), ModelConfig.load(name)
    config, path = BUILT_IN[name](), directory / f"random-{name}"
    if (path / "provenance.json").is_file() and json.loads((path / "provenance.json").read_text()).get("bench") == _mark(config):
        return path, config
    say(f"making a random model of {count_parameters(config).total / 1e6:,.1f} M parameters in {path}")
    make_random(path, config)
    return path, config


def make_random(path: Path, config: ModelConfig, seed: int = 0) -> None:
    """A checkpoint in bfloat16 with random weights, so wide that attention, gates and logits are far from uniform: two programs
    then choose the same tokens, and experts are chosen about evenly. Its tokenizer knows hardly more than bytes."""
    import torch

    from jevons.data.tokenizer import train_tokenizer
    from jevons.model import build_model
    from jevons.store.checkpoint import save_checkpoint

    model = build_model(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            for rows in parameter.split(max(1, 2**24 // parameter[0].numel())):  # float32 copies stay small
                rows.copy_(torch.empty(rows.shape).normal_(generator=generator))
            if name != "embed_tokens.weight":
                parameter.mul_(parameter.shape[-1] ** -0.5)
    tokenizer = train_tokenizer(["the answer is 40\n"] * 2, 288)  # llama.cpp wants at least one merge
    save_checkpoint(path, model, tokenizer, {"bench": _mark(config, seed)})


def _mark(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """By which a model made here is known again."""
    return {"config": config.to_hf(), "seed": seed}


def find_gguf(checkpoint: Path, weights: str, directory: Path, say: Callable[[str], None]) -> tuple[Path, list[str]]:
    """The checkpoint as llama.cpp reads it, in the precision that goes with `weights`: (file in `directory`, what it leaves
    out). One made before of a model made here is taken as it is. Raises ConvertError, CheckpointError."""
    from jevons.store.checkpoint import read_provenance
    from jevons.store.convert import convert

    kind = WEIGHTS[weights]
    path = directory / f"{checkpoint.resolve().name}-{kind}.gguf"
    made = "bench" in read_provenance(checkpoint)
    if made and path.is_file() and path.stat().st_mtime > (checkpoint / "provenance.json").stat().st_mtime:
        return path, []
    say(f"converting to {path}")
    return path, convert(checkpoint, "gguf", path, kind, force=True).notes


def weight_bytes(config: ModelConfig, weights: str) -> float:
    """Bytes of weights that one token's decode step reads: all that are active but the embedding, of which it reads a row. With
    the scales of packed kinds; the few matrices that `pack` leaves alone are counted as if they were packed."""
    counts, head = count_parameters(config), config.vocab_size * config.hidden_size
    touched = counts.active - (0 if config.tie_word_embeddings else counts.embedding) - head
    bits = {"float32": 32.0, "bf16": 16.0, "fp8": 8 + 32 / BLOCK**2} | {
        kind: bits + 16 / group for kind, (bits, group) in INTEGERS.items()}
    return (touched * bits[weights] + head * bits["int8" if weights == "int4" else weights]) / 8
