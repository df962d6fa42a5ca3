"""A checkpoint read one tensor at a time, whatever precision it is stored in: what every conversion starts from."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jevons.config import read_config
from jevons.numerics.fp8 import BLOCK
from jevons.store.checkpoint import FP8, HARMLESS, SCALE, check_finished, keeps_float32, read_fp8
from jevons.store.files import CheckpointError
from jevons.store.safetensors_io import TensorInfo, read_headers, read_tensor

Progress = Callable[[int, int], None]  # bytes of the source read so far, and in all
_DTYPES = ("F32", "F16", "BF16", "F64")
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
        """Reads config.json and the headers. Raises ConfigError, and CheckpointError naming file and tensor."""
        self.directory = Path(directory)
        check_finished(self.directory)
        self.config: dict[str, Any] = read_config(self.directory / "config.json")
        self._headers = read_headers(self.directory)
        self.tensors = {name: info for name, info in sorted(self._headers.items(), key=lambda i: (i[1].file, i[1].start))
                        if not name.endswith((SCALE, HARMLESS))}
        for name, info in self._headers.items():
            if name.endswith(SCALE):
                weight = self._headers.get(name.removesuffix(SCALE))
                if weight is None or weight.dtype != FP8:
                    raise CheckpointError(f"{info.file}: {name} scales {weight.dtype if weight else 'no tensor'}; a weight of "
                                          f"type {FP8} would be right")
            elif info.dtype == FP8:
                self._check_scale(name, info)
            elif info.dtype not in _DTYPES and name in self.tensors:
                raise CheckpointError(f"{info.file}: tensor {name} is {info.dtype}; one of {', '.join([*_DTYPES, FP8])} would "
                                      "be right")

    def _check_scale(self, name: str, info: TensorInfo) -> None:
        scale = self._headers.get(name + SCALE)
        if len(info.shape) != 2 or scale is None:
            raise CheckpointError(f"{info.file}: tensor {name} is {FP8}, which needs two dimensions and a {name}{SCALE}")
        right = tuple(-(-n // BLOCK) for n in info.shape)
        if scale.shape != right:
            raise CheckpointError(f"{scale.file}: {name}{SCALE} has shape {list(scale.shape)}; {list(right)} would be right, one "
                                  f"for each {BLOCK} x {BLOCK} block of {list(info.shape)}")

    @property
    def precision(self) -> str | None:
        """"fp8", "bf16" or "hf" (float32, as training keeps it); None for a mixture or another type."""
        kinds = {info.dtype for name, info in self.tensors.items() if not keeps_float32(name)}
        return "fp8" if FP8 in kinds else {"BF16": "bf16", "F32": "hf"}.get(*kinds) if len(kinds) == 1 else None

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One tensor as `dtype`, FP8 blocks dequantised. Raises CheckpointError for a scale that is none, and for values
        that are not finite, or are not in `dtype`."""
        info = self.tensors[name]
        tensor = read_fp8(self._headers, name) if info.dtype == FP8 else read_tensor(info)
        result = tensor.to(dtype)
        if not torch.isfinite(result).all():
            what = "is past the largest " + str(dtype).removeprefix("torch.") if torch.isfinite(tensor).all() else "is not finite"
            raise CheckpointError(f"{info.file}: tensor {name} holds a value that {what}")
        return result
