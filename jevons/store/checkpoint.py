"""The checkpoint directory in Hugging Face layout: what one stage leaves, the next reads, and other programs open.

    config.json model*.safetensors tokenizer.json tokenizer_config.json generation_config.json provenance.json
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jevons.config import ModelConfig
from jevons.data.tokenizer import Tokenizer
from jevons.model import CausalLM, build_model
from jevons.store.files import CheckpointError, StoreError, fsync
from jevons.store.safetensors_io import read_headers, read_tensors, write_tensors

PROVENANCE = "provenance.json"
_UNFINISHED = ".unfinished"  # holds a new version until all of it is on the disk
_FLOAT32_ALWAYS = ".e_score_correction_bias"  # V3's released checkpoints keep it so; bf16 would undo balancing
_EMBED = "model.embed_tokens.weight"
_HARMLESS = ".rotary_emb.inv_freq"  # a buffer that old Llama checkpoints carry


@dataclass
class LoadedCheckpoint:
    model: CausalLM
    config: ModelConfig
    tokenizer: Tokenizer | None
    provenance: dict[str, Any]


def save_checkpoint(directory: str | Path, model: CausalLM, tokenizer: Tokenizer | None, provenance: dict[str, Any],
                    dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a checkpoint that `transformers` opens, floating tensors as `dtype` (None: as they are).

    Everything is written aside first and moved into place when it is whole; provenance.json comes last, and its presence
    says that the directory is complete. Raises StoreError, a checkpoint that was there before intact.
    """
    directory = Path(directory)
    aside = directory / _UNFINISHED
    config = model.config
    tensors = {name: _cast(name, tensor, dtype) for name, tensor in model.hf_state_dict().items()}
    stored = next(iter(tensors.values())).dtype
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    if tokenizer:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    moving = False
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write_json(aside / "config.json", config.to_hf() | {"torch_dtype": str(stored).removeprefix("torch.")})
        _write_json(aside / "generation_config.json", ids)
        _write_json(aside / PROVENANCE, provenance)
        if tokenizer:
            tokenizer.save(aside)
        write_tensors(aside, tensors, max_shard_bytes)
        for path in aside.iterdir():
            fsync(path)
        moving = True  # from here on an interruption leaves a mixture, and `aside` to tell of it
        (directory / PROVENANCE).unlink(missing_ok=True)
        for path in [*directory.glob("model*.safetensors"), *directory.glob("model*.index.json")]:
            path.unlink()  # a single file and shards must not lie side by side
        for path in sorted(aside.iterdir(), key=lambda p: p.name == PROVENANCE):
            os.replace(path, directory / path.name)
        aside.rmdir()
        fsync(directory)
    except OSError as error:
        raise StoreError(error.errno, f"checkpoint {directory} could not be written: {error.strerror}") from error
    finally:
        if not moving:
            shutil.rmtree(aside, ignore_errors=True)


def load_checkpoint(directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
                    need_tokenizer: bool = True) -> LoadedCheckpoint:
    """Read a checkpoint directory, Jevons' own or a foreign one; parameters as `dtype` (None: float32).

    Strict: a missing, surplus or mis-shaped tensor is a CheckpointError that names it and its file; ConfigError and
    TokenizerError come through. `need_tokenizer=False` gives tokenizer None where there is no tokenizer.json.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give one that holds config.json and model.safetensors")
    if (directory / _UNFINISHED).exists() and not is_complete(directory):
        raise CheckpointError(f"{directory} is incomplete: writing it was interrupted; run the stage that writes it again")
    config = ModelConfig.load(directory)
    tokenizer = None
    if need_tokenizer or (directory / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(directory)
        if tokenizer.vocab_size > config.vocab_size:
            raise CheckpointError(f"{directory}: tokenizer.json has {tokenizer.vocab_size} ids, config.json's vocab_size is "
                                  f"{config.vocab_size}; the embedding needs a row for every id")
    headers = {n: info for n, info in read_headers(directory).items() if not n.endswith(_HARMLESS)}
    model = build_model(config, device=device)
    _check(directory, model, headers)
    tensors = read_tensors(directory, headers)
    if config.tie_word_embeddings and not torch.equal(tensors.get("lm_head.weight", tensors[_EMBED]), tensors[_EMBED]):
        raise CheckpointError(f"{headers['lm_head.weight'].file}: lm_head.weight differs from {_EMBED}, but config.json has "
                              "tie_word_embeddings true; false would be right")
    try:
        model.load_hf_state_dict({name: tensors[name] for name in headers})
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{directory}: {error.args[0]}") from None
    if dtype is not None:
        for parameter in model.parameters():  # buffers (router bias, rotary table) stay float32
            parameter.data = parameter.data.to(dtype)
    return LoadedCheckpoint(model.eval(), config, tokenizer, read_provenance(directory))


def is_complete(directory: str | Path) -> bool:
    """Whether `save_checkpoint` finished here."""
    return (Path(directory) / PROVENANCE).is_file()


def read_provenance(directory: str | Path) -> dict[str, Any]:
    """What a directory says of its making; empty for foreign ones. Raises CheckpointError."""
    path = Path(directory) / PROVENANCE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a JSON object: {error}") from None


def _check(directory: Path, model: CausalLM, headers: dict) -> None:
    """Names and shapes against the network's, before any byte is read. Copies under the MTP layer may be absent."""
    views, config = model.hf_state_dict(), model.config
    hint = "; the fields of config.json and the tensors do not belong together"
    mtp = tuple(f"model.layers.{config.num_hidden_layers + i}." for i in range(config.num_nextn_predict_layers))
    optional = {n for n in views if n.startswith(mtp) and n.endswith((".embed_tokens.weight", ".shared_head.head.weight"))}
    surplus_allowed = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, info in headers.items():
        if name not in views and name not in surplus_allowed:
            raise CheckpointError(f"{info.file}: tensor {name} has no place in this {config.architecture}{hint}")
        if name in views and info.shape != tuple(views[name].shape):
            raise CheckpointError(f"{info.file}: tensor {name} has shape {list(info.shape)}; "
                                  f"{list(views[name].shape)} would be right by config.json")
    missing = [name for name in views if name not in headers and name not in optional]
    if missing:
        where = ", ".join(sorted({info.file.name for info in headers.values()})[:3])
        if all(name.startswith(mtp) for name in missing):
            hint = "; num_nextn_predict_layers 0 in config.json would be right for a checkpoint without its MTP layer"
        raise CheckpointError(f"{directory}: tensor {missing[0]} ({len(missing)} in all) is missing from {where}{hint}")


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or not tensor.is_floating_point() or name.endswith(_FLOAT32_ALWAYS):
        return tensor
    return tensor.to(dtype)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
