"""Between the precisions of a Hugging Face checkpoint, and out to GGUF, tensor by tensor.

    hf    float32: what training reads and writes
    bf16  what most programs load
    fp8   DeepSeek's layout: E4M3 projections, a float32 `weight_scale_inv` per 128 x 128 block, all else bf16
    gguf  one file for llama.cpp (store/gguf.py)

Memory: one tensor in, its converted form out. What is written lies under a temporary name until all of it is on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from jevons.config import ConfigError, ModelConfig
from jevons.numerics.fp8 import BLOCK, quantise_blocks
from jevons.store.checkpoint import PROVENANCE, QUANTISATION, SCALE, check_tensors, keeps_float32, read_provenance
from jevons.store.files import StoreError, fsync, temporary, write_json
from jevons.store.safetensors_io import INDEX, shards
from jevons.store.stream import ConvertError, Progress, Source, in_fp8

FORMATS = ("hf", "fp8", "bf16", "gguf")
GGUF_TYPES = ("f16", "bf16", "q8_0", "q4_0")
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
_CARRIED = (".json", ".jinja", ".txt", ".model", ".md")  # tokenizer, template, generation settings, model card
Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass
class Converted:
    path: Path
    nbytes: int
    tensors: int
    notes: list[str] = field(default_factory=list)  # what the target cannot hold, a line each


def convert(checkpoint: str | Path, to: str, out: str | Path | None = None, gguf_type: str | None = None, force: bool = False,
            progress: Progress = lambda done, total: None, max_shard_bytes: int = 5 * 10**9) -> Converted:
    """Write `checkpoint` as `to` (FORMATS) at `out`, or beside it under a name that says what it is.

    `gguf_type` (GGUF_TYPES, default f16) is GGUF's. What is at `out` stays until its successor is complete, and is replaced
    only with `force`. Raises ConvertError, CheckpointError (also for values and scales that are not finite), StoreError.
    """
    if to not in FORMATS:
        raise ConvertError(f"--to {to} is not a format; {', '.join(FORMATS)} are")
    if gguf_type is not None and to != "gguf":
        raise ConvertError(f"--type {gguf_type} is GGUF's; --to {to} has no types")
    if gguf_type not in (None, *GGUF_TYPES):
        raise ConvertError(f"--type {gguf_type} is not a GGUF type written here; {', '.join(GGUF_TYPES)} are")
    gguf_type = gguf_type or "f16"
    checkpoint = Path(checkpoint)
    source = Source(checkpoint)
    if to != "gguf":  # which has a check of its own: it leaves the MTP layer out
        with suppress(ConfigError):  # a network that is not run here is converted by its tensors' names alone
            check_tensors(checkpoint, ModelConfig.load(checkpoint))
    if to == source.precision:
        kind = {"hf": "float32"}.get(to, to)
        raise ConvertError(f"{checkpoint} is {kind} already; --to {', '.join(f for f in FORMATS if f != to)} would change it")
    real = checkpoint.resolve()
    out = Path(out) if out else real.with_name(f"{real.name}-{gguf_type}.gguf" if to == "gguf" else f"{real.name}-{to}")
    _check_out(out, real, to == "gguf", force)
    unfinished = temporary(out)
    try:
        _remove(unfinished)
        if to == "gguf":
            from jevons.store.gguf import write_gguf

            count, notes = write_gguf(source, unfinished, gguf_type, progress)
        else:
            notes, count = [], _write_directory(source, unfinished, to, progress, max_shard_bytes)
        nbytes = sum(p.stat().st_size for p in ([unfinished] if to == "gguf" else unfinished.iterdir()))
        _swap(unfinished, out)
    except OSError as error:
        raise StoreError(error.errno, f"{out} could not be written: {error.strerror}") from error
    finally:
        _remove(unfinished)
    return Converted(out, nbytes, count, notes)


def _check_out(out: Path, source: Path, is_file: bool, force: bool) -> None:
    if not out.resolve().parent.is_dir():
        raise ConvertError(f"--out {out}: there is no directory {out.resolve().parent}")
    if out.resolve() in (source, *source.parents) or (not is_file and source in out.resolve().parents):
        raise ConvertError(f"--out {out} and the checkpoint {source} lie in each other; another place would be right")
    if not out.exists() or (not is_file and out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise ConvertError(f"{out} exists; --force would replace it")
    if is_file != out.is_file() or not (is_file or (out / "config.json").is_file()):
        raise ConvertError(f"{out} exists and is no {'file' if is_file else 'checkpoint directory'}; --force replaces only such")


def _write_directory(source: Source, directory: Path, to: str, progress: Progress, max_shard_bytes: int) -> int:
    """A complete checkpoint directory; how many tensors."""
    directory.mkdir()
    dtype = torch.float32 if to == "hf" else torch.bfloat16
    units: dict[str, Entries] = {}  # source tensor -> what it becomes
    for name, info in source.tensors.items():
        if to == "fp8" and in_fp8(name, info.shape):
            blocks = tuple(-(-n // BLOCK) for n in info.shape)
            units[name] = {name: (torch.float8_e4m3fn, info.shape), name + SCALE: (torch.float32, blocks)}
        else:
            units[name] = {name: (torch.float32 if keeps_float32(name) else dtype, info.shape)}
    files = shards({name: sum(map(_size, unit.values())) for name, unit in units.items()}, max_shard_bytes)
    total, done = sum(info.end - info.start for info in source.tensors.values()), 0

    def produce(names: list[str]) -> Iterable[tuple[str, torch.Tensor]]:
        nonlocal done
        for name in names:
            if len(units[name]) == 2:
                codes, scale = quantise_blocks(source.read(name))
                yield name, codes
                yield name + SCALE, scale
            else:
                yield name, source.read(name, units[name][name][0])
            done += source.tensors[name].end - source.tensors[name].start
            progress(done, total)

    for file, names in files.items():
        write_stream(directory / file, {n: e for name in names for n, e in units[name].items()}, produce(names))
    if to == "fp8" or len(files) > 1:  # torch's own FP8 reader wants an index even for one file
        size = sum(_size(e) for unit in units.values() for e in unit.values())
        weight_map = {n: file for file, names in files.items() for name in names for n in units[name]}
        write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(directory / "config.json", config | ({"quantization_config": QUANTISATION} if to == "fp8" else {}))
    for path in source.directory.iterdir():
        if path.is_file() and (path.suffix in _CARRIED or path.name.startswith("LICENSE")) \
                and path.name not in ("config.json", INDEX, PROVENANCE):
            shutil.copyfile(path, directory / path.name)
    history = read_provenance(source.directory)
    steps = [*history.get("converted", [source.precision or "mixed"]), to]  # ["hf", "bf16", "fp8"]
    write_json(directory / PROVENANCE, history | {"converted": steps})
    for path in [*directory.iterdir(), directory]:
        fsync(path)
    return sum(map(len, units.values()))


def write_stream(path: Path, entries: Entries, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """A safetensors file whose tensors come one by one, in any order, and match `entries`. Raises OSError."""
    at, header = 0, {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape) in sorted(entries.items(), key=lambda item: -item[1][0].itemsize):  # wide first: all are aligned
        end = at + _size((dtype, shape))
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _size(entry: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return entry[0].itemsize * torch.Size(entry[1]).numel()


def _swap(new: Path, out: Path) -> None:
    """`new` takes the place of `out`. A directory there steps aside first and is put back when the move fails."""
    if not out.is_dir():
        os.replace(new, out)
    else:
        old = out.with_name(f"{out.name}.old-{os.getpid()}")
        os.rename(out, old)
        try:
            os.rename(new, out)
        except BaseException:
            os.rename(old, out)
            raise
        _remove(old)
    fsync(out.resolve().parent)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()
