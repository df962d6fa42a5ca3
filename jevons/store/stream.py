"""A checkpoint read one tensor at a time, whatever precision it is stored in: what every conversion starts from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from jevons.numerics.fp8 import BLOCK, dequantise_blocks
from jevons.store.checkpoint import is_complete
from jevons.store.files import CheckpointError
from jevons.store.safetensors_io import TensorInfo, read_headers

Progress = Callable[[int, int], None]  # bytes of the source read so far, and in all
SCALE = "_scale_inv"  # X.weight_scale_inv: one float32 per 128 x 128 block of X.weight, a multiplier despite its name
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_FP8 = "F8_E4M3"
_BUFFER = ".rotary_emb.inv_freq"  # old Llama checkpoints carry it; every reader computes its own
# what DeepSeek stores in FP8: the projections of attention, dense MLPs and experts; `eh_proj` is named like one and is none
_PROJECTION = re.compile(r"\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")


class ConvertError(ValueError):
    """A conversion that is not possible; the message says what would be."""


def in_fp8(name: str, shape: tuple[int, ...]) -> bool:
    """Whether DeepSeek's layout stores this tensor as FP8 blocks; embeddings, heads, gates, norms, eh_proj stay bf16."""
    return len(shape) == 2 and _PROJECTION.search(name) is not None


class Source:
    """A checkpoint directory's config and tensors. `tensors` leaves out scales; they belong to their weights."""

    def __init__(self, directory: str | Path):
        """Reads config.json and the headers. Raises CheckpointError naming the file, and the tensor that is wrong."""
        self.directory = Path(directory)
        path = self.directory / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; a checkpoint directory holds config.json beside its safetensors")
        if (self.directory / ".unfinished").exists() and not is_complete(self.directory):
            raise CheckpointError(f"{self.directory} is incomplete: writing it was interrupted; write it again first")
        try:
            self.config: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is not a JSON object: {error}") from None
        self._headers = read_headers(self.directory)
        self._open: dict[Path, Any] = {}
        self.tensors = {name: info for name, info in sorted(self._headers.items(), key=lambda i: (i[1].file, i[1].start))
                        if not name.endswith((SCALE, _BUFFER))}
        for name, info in self._headers.items():
            if name.endswith(SCALE):
                weight = self._headers.get(name.removesuffix(SCALE))
                if weight is None or weight.dtype != _FP8:
                    raise CheckpointError(f"{info.file}: {name} scales {weight.dtype if weight else 'no tensor'}; a weight of "
                                          f"type {_FP8} would be right")
            elif info.dtype == _FP8:
                self._check_scale(name, info)
            elif info.dtype not in _DTYPES and name in self.tensors:
                raise CheckpointError(f"{info.file}: tensor {name} is {info.dtype}; one of {', '.join([*_DTYPES, _FP8])} would "
                                      "be right")

    def _check_scale(self, name: str, info: TensorInfo) -> None:
        scale = self._headers.get(name + SCALE)
        if len(info.shape) != 2 or scale is None:
            raise CheckpointError(f"{info.file}: tensor {name} is {_FP8}, which needs two dimensions and a {name}{SCALE}")
        right = tuple(-(-n // BLOCK) for n in info.shape)
        if scale.shape != right:
            raise CheckpointError(f"{scale.file}: {name}{SCALE} has shape {list(scale.shape)}; {list(right)} would be right, one "
                                  f"for each {BLOCK} x {BLOCK} block of {list(info.shape)}")

    @property
    def precision(self) -> str | None:
        """"fp8", "bf16" or "hf" (float32, as training keeps it); None for a mixture or another type."""
        kinds = {info.dtype for name, info in self.tensors.items() if not keeps_float32(name)}
        return "fp8" if _FP8 in kinds else {"BF16": "bf16", "F32": "hf"}.get(*kinds) if len(kinds) == 1 else None

    def stored(self, name: str) -> torch.Tensor:
        """As it lies in the file."""
        path = self._headers[name].file
        try:
            if path not in self._open:
                if len(self._open) > 1:  # a scale may lie in another file than its weight
                    self._open.clear()
                self._open[path] = safe_open(path, framework="pt")
            return self._open[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from error

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One tensor as `dtype`, FP8 blocks dequantised. Raises CheckpointError for a scale that is none, and for values
        that are not finite, or are not in `dtype`."""
        info, tensor = self.tensors[name], self.stored(name)
        if info.dtype == _FP8:
            scale = self.stored(name + SCALE).float()
            bad = ~(torch.isfinite(scale) & (scale >= 0))
            if bad.any():
                raise CheckpointError(f"{self._headers[name + SCALE].file}: {name}{SCALE} has {scale[bad][0].item()}; scales are "
                                      "finite and not negative")
            tensor = dequantise_blocks(tensor, scale, torch.float32)
        result = tensor.to(dtype)
        if not torch.isfinite(result).all():
            what = "is past the largest " + str(dtype).removeprefix("torch.") if torch.isfinite(tensor).all() else "is not finite"
            raise CheckpointError(f"{info.file}: tensor {name} holds a value that {what}")
        return result


def keeps_float32(name: str) -> bool:
    """The router's bias stays float32 in every precision: bf16 would undo balancing."""
    return name.endswith(".e_score_correction_bias")
