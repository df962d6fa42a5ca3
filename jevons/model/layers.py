"""The small parts: linear, norm, SwiGLU MLP, rotary tables.

Shape suffixes in this room: N flat tokens, B rows, T row length, S sequences, D hidden, F intermediate, H heads,
R rotary width, C latent width (kv_lora_rank), E experts, K experts per token, V vocabulary, L cached length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from jevons.config import ModelConfig, yarn_mscale
from jevons.numerics import Fp8, Fp8Weight, Rows, Weight, dense, fused, kernels, linear, swiglu_linear, training

HFView = tuple[str, torch.Tensor]  # a Hugging Face name (local to its module), and a view of the parameter it lives in
Fetch = Callable[[str], Weight]  # a published name -> the tensor, or what stands for it


class Linear(nn.Module):
    """A projection [in -> out] whose rows may hold several published projections of the same input, fused.

    `parts` maps each Hugging Face name (without `.weight`) to its number of rows, in order; None: not fused.
    """

    def __init__(self, d_in: int, d_out: int, bias: bool = False, parts: dict[str, int] | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self.parts = parts
        self.fp8: Fp8 | None = None  # see model/precision.py
        self._dense: tuple[Weight, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, self.fp8)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as one tensor; a packed one is unpacked once and kept, for those who ask at every step."""
        if isinstance(self.weight, torch.Tensor):
            return self.weight.to(dtype)
        if self._dense is None or self._dense[0] is not self.weight or self._dense[1].dtype != dtype:
            self._dense = self.weight, dense(self.weight, dtype)
        return self._dense[1]

    def hf_views(self, name: str) -> Iterator[HFView]:
        """Published names beside `name`, this module's own local name, with views of the rows they own."""
        parts = self.parts or {name: self.weight.shape[0]}
        held = self.weight.parts if isinstance(self.weight, Rows) else [self.weight] * len(parts)
        row = 0
        for index, (part, rows) in enumerate(parts.items()):
            if isinstance(self.weight, nn.Parameter):
                yield f"{part}.weight", self.weight[row : row + rows]
            else:
                yield from packed_views(f"{part}.weight", held[index])
            if self.bias is not None:
                yield f"{part}.bias", self.bias[row : row + rows]
            row += rows

    def hold(self, prefix: str, fetch: Fetch) -> None:
        """Take the weights that `fetch` gives, each where it lies, in place of one's own parameters. For inference."""
        at = prefix.rfind(".") + 1
        names = [prefix[:at] + part for part in self.parts or (prefix[at:],)]
        weights = [fetch(f"{name}.weight") for name in names]
        del self.weight
        one = weights[0] if len(weights) == 1 else Rows(weights)
        self.weight = nn.Parameter(one, requires_grad=False) if isinstance(one, torch.Tensor) else one
        if self.bias is not None:
            self.bias = nn.Parameter(torch.cat([fetch(f"{name}.bias") for name in names]), requires_grad=False)


def packed_views(name: str, weight: Weight) -> Iterator[HFView]:
    """A weight that is no parameter under its published name, FP8 with its scales."""
    if isinstance(weight, Fp8Weight):
        yield name, weight.codes
        yield f"{name}_scale_inv", weight.scale_inv
    else:
        yield name, weight


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[..., dim] in the input's precision, or `dtype`; the mean of squares is taken in float32."""
        out = kernels.rms_norm(x, self.weight, self.eps) if dtype in (None, x.dtype) else None
        return fused.rms_norm(x, self.weight, self.eps, dtype) if out is None else out

    def again(self, x: torch.Tensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        """What gives `forward`'s output of a training pass once more."""
        return lambda: fused.rms_norm(x, self.weight, self.eps, dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x), gate and up fused."""

    def __init__(self, dim: int, inter: int):
        super().__init__()
        self.gate_up_proj = Linear(dim, 2 * inter, parts={"gate_proj": inter, "up_proj": inter})
        self.down_proj = Linear(inter, dim)
        self.table = kernels.ExpertTable()
        self.fp8: Fp8 | None = None  # of SwiGLU and down_proj
        self.recompute = False

    def ready(self, x_ND: torch.Tensor) -> bool:
        """Whether the native kernel may take this MLP and `x_ND`."""
        if training(self.fp8):
            return False
        return kernels.usable(x_ND) and self.table.ready(self.gate_up_proj.weight, self.down_proj.weight, x_ND.dtype)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        if self.ready(x_ND) and len(x_ND) <= (kernels.FEW_FP8 if self.table.compact else kernels.FEW[x_ND.dtype]):
            return kernels.experts(x_ND, None, None, None, self.table)
        return swiglu_linear(self.gate_up_proj(x_ND), self.down_proj.weight, fp8=self.fp8, recompute=self.recompute)


def rotary_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair [R/2] (float64), and what cos and sin are multiplied with."""
    dim = config.qk_rope_head_dim if config.is_deepseek else config.per_head_dim
    inv = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    s = config.rope_scaling
    if s is None:
        return inv, 1.0
    factor, original = s["factor"], s["original_max_position_embeddings"]
    if s["rope_type"] == "llama3":  # long waves are divided, short ones kept, those between blended by their turns
        turns = original * inv / (2 * math.pi)
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        return inv * (keep + (1 - keep) / factor), 1.0

    def pair(turns: float) -> float:
        """The (fractional) pair that makes so many turns over the original length."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = max(math.floor(pair(s.get("beta_fast", 32))), 0), min(math.ceil(pair(s.get("beta_slow", 1))), dim - 1)
    divide = ((torch.arange(dim // 2, dtype=torch.float64) - low) / ((high - low) or 0.001)).clamp(0, 1)
    m = yarn_mscale(factor, s.get("mscale", 1.0)) / (yarn_mscale(factor, s["mscale_all_dim"]) if "mscale_all_dim" in s else 1.0)
    return inv * (1 - divide + divide / factor), s.get("attention_factor", m)


def rotary_table(config: ModelConfig) -> torch.Tensor:
    """cos and sin of every position: [length, 2, R/2], float32 (angles in float64: position 1e5 loses digits else)."""
    inv, magnitude = rotary_frequencies(config)
    angle = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None] * inv
    return torch.stack([angle.cos(), angle.sin()], dim=1).mul_(magnitude).float()


def rotate(x1: torch.Tensor, x2: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (x1, x2) [N, ..., R/2] by `rope` [N, 2, R/2] -> [N, ..., R], first halves then second halves."""
    cos, sin = rope.unbind(1)
    if x1.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x1.dtype)


def rotate_interleaved(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """DeepSeek's pairs are adjacent dims. The result is de-interleaved: queries and keys alike, so scores are the same."""
    return rotate(x[..., 0::2], x[..., 1::2], rope)


def rotate_half(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Qwen2's and Llama's pairs are dim i and dim i + R/2."""
    x1, x2 = x.chunk(2, dim=-1)
    return rotate(x1, x2, rope)
