"""Which projections of a network train in FP8, and how each: the V3 report's list (section 3.3.1), attached to the modules; and
what its backward pass computes again (section 3.2.3).

Embedding, head, gates, norms, the attention operator, and the MTP module's eh_proj (published checkpoints keep it in BF16) stay
as they are.
"""

from __future__ import annotations

from dataclasses import replace

from jevons.model.attention import GQA, MLA
from jevons.model.layers import MLP, Linear
from jevons.model.moe import ExpertBank
from jevons.model.network import Block, CausalLM
from jevons.numerics import Fp8
from jevons.recipe import PrecisionTable


def fp8_settings(table: PrecisionTable) -> Fp8 | None:
    """What `[precision]` says of a projection where nothing special holds; None where training is not in FP8."""
    if table.compute != "fp8":
        return None
    return Fp8(power_of_two=table.scales == "power_of_two", accumulation=table.accumulation)


def set_training_precision(model: CausalLM, fp8: Fp8 | None, recompute: bool = False) -> list[str]:
    """Attach `fp8` to every projection that the report trains in FP8, or take it off again (None). With `recompute`, norms,
    SwiGLU and MLA from its up-projections on are computed again in the backward pass. The engine's passes are not touched by
    either. Returns the names of the modules that have `fp8`."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module is not model.lm_head and not name.endswith("eh_proj"):
            module.fp8 = fp8
        elif isinstance(module, MLP):
            module.fp8 = fp8 and replace(fp8, cache="swiglu")
        elif isinstance(module, ExpertBank):
            # dispatched in FP8: the inputs of the up-projections and the gradients of the down-projections' outputs
            module.fp8_up = fp8 and replace(fp8, x_power_of_two=True)
            module.fp8_down = fp8 and replace(fp8, cache="swiglu", grad_power_of_two=True)
        else:
            continue
        names.append(name)
    for module in model.modules():
        if isinstance(module, Block | MLA | MLP | ExpertBank):
            module.recompute = recompute
        if isinstance(module, MLA | GQA):
            module.o_proj.fp8 = fp8 and replace(fp8, cache="e5m6")
    return names
