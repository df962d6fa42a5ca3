"""The checkpoint directory in Hugging Face layout: what one stage leaves, the next reads, and other programs open.

    config.json model*.safetensors tokenizer.json tokenizer_config.json generation_config.json provenance.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jevons import __version__
from jevons.config import ModelConfig
from jevons.data.tokenizer import Tokenizer
from jevons.model import CausalLM, build_model
from jevons.numerics import Fp8Weight, Weight
from jevons.numerics.fp8 import BLOCK
from jevons.store.files import CheckpointError, StoreError, fsync, write_json
from jevons.store.safetensors_io import TensorInfo, map_tensor, read_headers, read_tensor, write_tensors

PROVENANCE = "provenance.json"
_UNFINISHED = ".unfinished"  # holds a new version until all of it is on the disk
_EMBED = "model.embed_tokens.weight"
HARMLESS = ".rotary_emb.inv_freq"  # a buffer that old Llama checkpoints carry
SCALE = "_scale_inv"  # X.weight_scale_inv: one float per 128 x 128 block of an FP8 X.weight
FP8 = "F8_E4M3"
_FLOATS = ("F32", "BF16", "F16")
QUANTISATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


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
        fp8 = {"quantization_config": QUANTISATION} if any(name.endswith(SCALE) for name in tensors) else {}
        write_json(aside / "config.json", config.to_hf() | {"torch_dtype": str(stored).removeprefix("torch.")} | fp8)
        write_json(aside / "generation_config.json", ids)
        write_json(aside / PROVENANCE, provenance)
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
                    need_tokenizer: bool = True, frozen: bool = False, changes: dict[str, Any] | None = None) -> LoadedCheckpoint:
    """Read a checkpoint directory, Jevons' own or a foreign one; parameters as `dtype` (None: float32), FP8 dequantised.

    `frozen` is for inference: what is stored as `dtype` (None: as the embedding is stored) stays in the files' memory map,
    FP8 weights stay FP8 blocks, their codes unread. Either way tensors come one by one: the peak is the model and one more.
    Strict: a missing, surplus, mis-shaped or mis-typed tensor is a CheckpointError that names it and its file; ConfigError
    and TokenizerError come through. `need_tokenizer=False` gives tokenizer None where there is no tokenizer.json. `changes`
    are config fields that differ from the stored ones.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give one that holds config.json and model.safetensors")
    check_finished(directory)
    config = ModelConfig.load(directory)
    if changes:
        config = ModelConfig.build(config.model_dump() | changes, f"{directory}/config.json, changed")
    tokenizer = None
    if need_tokenizer or (directory / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(directory)
        if tokenizer.vocab_size > config.vocab_size:
            raise CheckpointError(f"{directory}: tokenizer.json has {tokenizer.vocab_size} ids, config.json's vocab_size is "
                                  f"{config.vocab_size}; the embedding needs a row for every id")
    model, headers, copies = check_tensors(directory, config)
    files: dict[Path, torch.Tensor] = {}
    for copy, name in copies.items():
        pair = [map_tensor(headers[n], files) for n in (copy, name)]
        if not torch.equal(*(pair if pair[0].dtype == pair[1].dtype else [t.float() for t in pair])):
            hint = (", but config.json has tie_word_embeddings true; false would be right" if copy == "lm_head.weight"
                    else ", which it is a copy of")
            raise CheckpointError(f"{headers[copy].file}: {copy} differs from {name}{hint}")

    if frozen:
        dtype = dtype or headers[_EMBED].torch_dtype

        def fetch(name: str) -> Weight:
            info = headers[name]
            if info.dtype == FP8:
                return Fp8Weight(map_tensor(info, files).to(device), _read_scales(headers, name).to(device))
            wanted = torch.float32 if keeps_float32(name) else dtype
            mapped = info.torch_dtype == wanted and torch.device(device).type == "cpu"
            return map_tensor(info, files) if mapped else read_tensor(info).to(device, wanted)

        model.hold(fetch, device)
    else:
        model.allocate(device, dtype or torch.float32)
        for name, view in model.hf_state_dict().items():
            info = headers.get(name)
            if info is None or name in copies:
                continue
            if info.dtype == FP8:
                view.copy_(read_fp8(headers, name))
            elif info.torch_dtype == view.dtype and view.device.type == "cpu":
                read_tensor(info, view)
            else:
                view.copy_(read_tensor(info))
    return LoadedCheckpoint(model.eval(), config, tokenizer, read_provenance(directory))


def check_finished(directory: Path) -> None:
    """Raises CheckpointError where `save_checkpoint` was interrupted while it moved files into place."""
    if (directory / _UNFINISHED).exists() and not is_complete(directory):
        raise CheckpointError(f"{directory} is incomplete: writing it was interrupted; run the stage that writes it again")


def keeps_float32(name: str) -> bool:
    """V3's released checkpoints keep the router's bias so in every precision; bf16 would undo balancing."""
    return name.endswith(".e_score_correction_bias")


def is_complete(directory: str | Path) -> bool:
    """Whether `save_checkpoint` finished here."""
    return (Path(directory) / PROVENANCE).is_file()


def read_provenance(directory: str | Path) -> dict[str, Any]:
    """What a directory says of its making; empty for foreign ones. Raises CheckpointError."""
    path = Path(directory) / PROVENANCE
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds {type(raw).__name__}; an object would be right")
    task, scores = raw.get("task"), raw.get("scores", [])
    if task is not None and not (isinstance(task, dict) and isinstance(task.get("name"), str)
                                 and isinstance(task.get("args", {}), dict)):
        raise CheckpointError(f"{path}: task is {task!r:.80}; an object with name and args would be right")
    keys = {"name", "accuracy", "n"}
    if not isinstance(scores, list) or not all(isinstance(score, dict) and keys <= score.keys() for score in scores):
        raise CheckpointError(f"{path}: scores is {scores!r:.80}; a list of objects with name, accuracy and n would be right")
    return raw


def fingerprint(directory: str | Path, *more: str) -> bytes:
    """What tells this checkpoint's weights from others' (16 bytes): config, sizes and times of the shards, and a sample of their
    bytes. `more` is whatever else a cache of its activations depends on."""
    directory, digest = Path(directory), hashlib.blake2b(digest_size=16)
    digest.update("|".join((__version__, *more)).encode() + (directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        with path.open("rb") as file:
            for part in range(64):
                file.seek(part * stat.st_size // 64)
                digest.update(file.read(1024))
    return digest.digest()


def check_tensors(directory: Path, config: ModelConfig) -> tuple[CausalLM, dict[str, TensorInfo], dict[str, str]]:
    """Names, shapes and types against the network's, before any byte is read: the network on "meta", the tensors' headers, and
    which tensors must equal which others. Raises CheckpointError.

    Copies of embedding and head, under the MTP layer and of a tied head, may be absent."""
    headers = {n: info for n, info in read_headers(directory).items() if not n.endswith(HARMLESS)}
    model = build_model(config, device="meta")
    views = model.hf_state_dict()
    hint = "; the fields of config.json and the tensors do not belong together"
    mtp = tuple(f"model.layers.{config.num_hidden_layers + i}." for i in range(config.num_nextn_predict_layers))
    head = _EMBED if config.tie_word_embeddings else "lm_head.weight"
    copies = {n: _EMBED for n in views if n.startswith(mtp) and n.endswith(".embed_tokens.weight")}
    copies |= {n: head for n in views if n.startswith(mtp) and n.endswith(".shared_head.head.weight")}
    if config.tie_word_embeddings:
        copies["lm_head.weight"] = _EMBED
    shapes = {name: tuple(view.shape) for name, view in views.items()} | {n: tuple(views[_EMBED].shape) for n in copies}
    for name, info in headers.items():
        where, weight = f"{info.file}: tensor {name}", headers.get(name.removesuffix(SCALE))
        if name.endswith(SCALE) and weight is not None and name.removesuffix(SCALE) in shapes:
            if weight.dtype != FP8:
                raise CheckpointError(f"{where} scales a tensor that is stored as {weight.dtype}; {FP8} would need it")
            right, types = tuple(-(-n // BLOCK) for n in weight.shape), ("F32", "BF16")
        elif name in shapes:
            scaled = name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and name + SCALE in headers
            right, types = shapes[name], (*_FLOATS, FP8) if scaled else _FLOATS
        else:
            raise CheckpointError(f"{where} has no place in this {config.architecture}{hint}")
        if info.shape != right:
            raise CheckpointError(f"{where} has shape {list(info.shape)}; {list(right)} would be right by config.json")
        if info.dtype not in types:
            hint = f" ({FP8} needs a projection with its {name}{SCALE})" if info.dtype == FP8 else ""
            raise CheckpointError(f"{where} is stored as {info.dtype}; {' or '.join(types)} would be right{hint}")
    missing = [name for name in views if name not in headers and name not in copies]
    if missing:
        where = ", ".join(sorted({info.file.name for info in headers.values()})[:3])
        if all(name.startswith(mtp) for name in missing):
            hint = "; num_nextn_predict_layers 0 in config.json would be right for a checkpoint without its MTP layer"
        raise CheckpointError(f"{directory}: tensor {missing[0]} ({len(missing)} in all) is missing from {where}{hint}")
    return model, headers, {copy: name for copy, name in copies.items() if copy in headers}


def read_fp8(headers: dict[str, TensorInfo], name: str) -> torch.Tensor:
    """An FP8 weight dequantised to float32. Raises CheckpointError where a code or a scale is no finite number."""
    codes = read_tensor(headers[name])
    if (codes.view(torch.uint8) & 0x7F == 0x7F).any():  # E4M3's NaN, the only value that it has besides finite ones
        raise CheckpointError(f"{headers[name].file}: tensor {name} holds a value that is not finite")
    return Fp8Weight(codes, _read_scales(headers, name)).dense(torch.float32)


def _read_scales(headers: dict[str, TensorInfo], name: str) -> torch.Tensor:
    """The scales of an FP8 weight, float32. Raises CheckpointError where one is not a scale."""
    info = headers[name + SCALE]
    scales = read_tensor(info).float()
    if (bad := scales[~((scales >= 0) & scales.isfinite())]).numel():
        raise CheckpointError(f"{info.file}: tensor {name}{SCALE} holds {bad[0].item()}; "
                              "finite numbers from 0 on would be right")
    return scales


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or not tensor.is_floating_point() or keeps_float32(name) or name.endswith(SCALE) or tensor.itemsize == 1:
        return tensor
    return tensor.to(dtype)
