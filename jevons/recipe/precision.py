"""`[precision]`: what a recipe's stages multiply in, and what AdamW keeps its moments in."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from jevons.recipe.tables import Table

SLOWEST_BF16_BETA = 0.99  # from about 1 - 2^-8 on, a moment in bf16 no longer moves by what it is fed


class PrecisionTable(Table):
    """Master weights and gradients are float32 whatever stands here."""

    compute: Literal["auto", "float32", "bf16", "fp8"] = Field("auto", description="auto: bf16 where the machine multiplies it")
    scales: Literal["float", "power_of_two"] = Field("float", description="of FP8 tiles; some are powers of two in any case")
    accumulation: Literal["promoted", "limited"] = Field("promoted", description="limited: 14 bits, to see what is lost")
    moments: Literal["float32", "bf16"] = Field("float32", description="AdamW's first and second")
    recompute: bool = Field(False, description="norms, MLA's up-projections and SwiGLU again in the backward pass: less memory")

    @model_validator(mode="after")
    def _has_effect(self) -> PrecisionTable:
        if self.compute != "fp8":
            for key, default in (("scales", "float"), ("accumulation", "promoted")):
                if (value := getattr(self, key)) != default:
                    raise ValueError(f"{key} = {value!r} says how FP8 products are made, but compute is {self.compute!r}; "
                                     "compute = 'fp8' would be right")
        return self

    def check_betas(self, betas: tuple[float, float], where: str) -> None:
        """Raises ValueError for moments too slow for bf16, naming `where`."""
        if self.moments == "bf16" and max(betas) > SLOWEST_BF16_BETA:
            raise ValueError(f"{where}.betas {list(betas)}: moments in bf16 stand still above {SLOWEST_BF16_BETA}; lower betas "
                             "(V3's are [0.9, 0.95]) or precision.moments = 'float32' would be right")
