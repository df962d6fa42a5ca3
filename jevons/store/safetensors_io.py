"""A checkpoint directory's `model*.safetensors`: read strictly, written whole. Headers are checked here before the
library maps a file, so that an error names the file and the tensor."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from jevons.store.files import CheckpointError, StoreError, fsync, temporary, write_text

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the format's own bound
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
          "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32,
          "I32": torch.int32, "F32": torch.float32, "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, by the header alone."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes, counted from `base`
    end: int
    base: int  # where the file's data begins

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Raises CheckpointError naming the file, and the tensor that is wrong."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{path} is truncated or no safetensors file: its header claims {length} bytes, "
                                      f"the file has {size}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_repeats)
        if not isinstance(header, dict):
            raise ValueError(f"it holds {type(header).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not a safetensors header: {error}") from None
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    at, data = 0, size - 8 - length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            problem = "overlaps the tensor before it" if info.start < at else f"leaves {info.start - at} bytes unused before it"
            raise CheckpointError(f"{path}: tensor {name} at bytes {info.start}..{info.end} {problem}")
        if info.end > data:
            raise CheckpointError(f"{path} is truncated: tensor {name} ends at byte {info.end} of the data, the file has {data}")
        at = info.end
    if at != data:
        raise CheckpointError(f"{path}: {data - at} bytes follow the last tensor")
    return tensors


def _entry(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        if not whole or end - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: tensor {name} is described by {entry!r:.200}, where dtype, shape and data_offsets "
                              "do not agree or are not known") from None
    return TensorInfo(path, dtype, tuple(shape), start, end, base)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} appears twice")
    return result


def read_headers(directory: str | Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint directory, one file or sharded. Raises CheckpointError."""
    directory = Path(directory)
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_no_repeats)["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("weight_map is not an object of file names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({type(error).__name__}: {error})") from None
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        example = next(name for name, f in weight_map.items() if f == file)
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} places {example} in {file!r}; a file name in the same directory would be right")
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory / file} is missing; {index.name} places {example} in it")
        for name, info in read_header(directory / file).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is in two files, {tensors[name].file} and {info.file}")
            if name not in weight_map:
                raise CheckpointError(f"{info.file} holds {name}, which {index.name} does not know")
            tensors[name] = info
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{directory / file} lacks tensor {name}, which {index.name} places in it")
    return tensors


def read_tensors(directory: str | Path, headers: dict[str, TensorInfo] | None = None) -> dict[str, torch.Tensor]:
    """Tensors by name, mapped from the files: reading one touches only its own bytes. Raises CheckpointError."""
    headers = read_headers(directory) if headers is None else headers
    files: dict[Path, torch.Tensor] = {}
    return {name: map_tensor(info, files) for name, info in headers.items()}


def map_tensor(info: TensorInfo, files: dict[Path, torch.Tensor]) -> torch.Tensor:
    """A view of the file's memory map (private: what is written to it stays here). `files` keeps the maps of all calls."""
    try:
        if info.file not in files:
            size = info.file.stat().st_size
            files[info.file] = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage.from_file(str(info.file), False, size))
        raw = files[info.file][info.base + info.start : info.base + info.end]
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{info.file} cannot be mapped: {error}") from error
    if raw.nbytes != info.end - info.start:
        raise CheckpointError(f"{info.file} became shorter while it was being read")
    if (info.base + info.start) % info.torch_dtype.itemsize:  # a foreign writer that aligns nothing
        raw = raw.clone()
    return raw.view(info.torch_dtype).view(info.shape)


def read_tensor(info: TensorInfo, out: torch.Tensor | None = None) -> torch.Tensor:
    """A tensor read into memory of its own, or into `out` (contiguous, on the CPU, of its type). Raises CheckpointError."""
    out = torch.empty(info.shape, dtype=info.torch_dtype) if out is None else out
    room = memoryview(out.flatten().view(torch.uint8).numpy())
    try:
        with open(info.file, "rb", buffering=0) as file:
            file.seek(info.base + info.start)
            while len(room):
                if not (count := file.readinto(room)):  # Linux reads at most 2 GiB at a time
                    raise CheckpointError(f"{info.file} became shorter while it was being read")
                room = room[count:]
    except OSError as error:
        raise CheckpointError(f"{info.file} cannot be read: {error.strerror}") from error
    return out


def write_tensors(directory: str | Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 5 * 10**9) -> list[str]:
    """Write model.safetensors, or shards and their index over the limit; the names of the files. Raises StoreError."""
    directory = Path(directory)
    files = shards({name: tensor.nbytes for name, tensor in tensors.items()}, max_shard_bytes)
    for file, names in files.items():
        unfinished = temporary(directory / file)
        try:
            # clone: the format holds no views of one storage, and published names often are views of fused parameters
            save_file({name: tensors[name].detach().to("cpu", copy=True).contiguous() for name in names}, unfinished,
                      metadata={"format": "pt"})
            fsync(unfinished)
            os.replace(unfinished, directory / file)
        except (OSError, SafetensorError) as error:
            unfinished.unlink(missing_ok=True)
            raise StoreError(getattr(error, "errno", None), f"{directory / file} could not be written: {error}") from error
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                 "weight_map": {name: file for file, names in files.items() for name in names}}
        write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")
    fsync(directory)
    return [*files, INDEX] if len(files) > 1 else list(files)


def shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> the names in it, in order: a new file before `limit` bytes are passed; what is larger has one of its own."""
    parts: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if parts[-1] and size > room:
            parts.append([])
            room = limit
        parts[-1].append(name)
        room -= size
    count = len(parts)
    return {SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(parts)}
