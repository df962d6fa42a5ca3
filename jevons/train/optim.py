"""AdamW with the V3 settings, and Muon for matrices: batched over experts, fused projections part by part.

torch's own Muon takes 2-D tensors only; this one orthogonalises all matrices of one shape in one batched call, and is
held to torch's by a test.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from jevons.numerics import upcast
from jevons.recipe import OptimizerTable

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5


def orthogonalise(g_BMN: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz: each matrix's singular values pushed to about 1 (quintic iteration, bf16 as torch's Muon; float64 stays)."""
    a, b, c = NS_COEFFICIENTS
    x = g_BMN if g_BMN.dtype == torch.float64 else g_BMN.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(NS_STEPS):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then the orthogonalised update times lr * sqrt(max(1, rows / columns)), per published matrix.

    `params`: 2-D [out, in] or stacked 3-D [E, out, in] parameters; `parts[i]`: the rows of each matrix in params[i].
    """

    def __init__(self, params: list[nn.Parameter], parts: list[list[int]], lr: float = 0.02, momentum: float = 0.95,
                 weight_decay: float = 0.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.parts = dict(zip(params, parts, strict=True))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
            sharded: list[tuple[nn.Parameter, Any, torch.Tensor]] = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])  # Nesterov
                p.mul_(1 - group["lr"] * group["weight_decay"])
                rows, target = self.parts[p], p
                if hasattr(p, "full_tensor"):  # sharded: whole matrices are gathered, and the change goes back in parts
                    from jevons.train.parallel.fsdp import whole_matrices

                    gathered = whole_matrices(update)
                    update = gathered.to_local()
                    target = torch.zeros_like(update)
                    sharded.append((p, gathered, target))
                for weight, u in zip(target.split(rows, dim=-2), update.split(rows, dim=-2), strict=True):
                    by_shape.setdefault(tuple(u.shape[-2:]), []).append((weight, u))
            for (rows, columns), pairs in by_shape.items():
                stacked = torch.cat([u.reshape(-1, rows, columns) for _, u in pairs])
                ortho = upcast(orthogonalise(stacked))
                scale = -group["lr"] * math.sqrt(max(1.0, rows / columns))
                for (weight, u), o in zip(pairs, ortho.split([u.numel() // (rows * columns) for _, u in pairs]), strict=True):
                    weight.add_(o.reshape(u.shape), alpha=scale)
            for p, gathered, change in sharded:
                whole = type(gathered).from_local(change, p.device_mesh, gathered.placements)
                p.add_(whole.redistribute(placements=p.placements))


class AdamWBF16(torch.optim.AdamW):
    """AdamW whose first and second moments rest in bfloat16 (V3 report, section 3.3.3). The arithmetic is torch's own, in
    float32, a parameter at a time; weights and gradients stay float32."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state |= {key: torch.zeros_like(p, dtype=torch.bfloat16) for key in ("exp_avg", "exp_avg_sq")}
                first, second = state["exp_avg"].float(), state["exp_avg_sq"].float()
                adamw([p], [p.grad], [first], [second], [], [state["step"]], fused=True, amsgrad=False, maximize=False,
                      beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
                      eps=group["eps"])
                state["exp_avg"].copy_(first)
                state["exp_avg_sq"].copy_(second)


def build_optimizers(model: nn.Module, table: OptimizerTable, moments: str = "float32") -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for hidden matrices and AdamW for the rest. Norms and biases are not decayed. `moments` ("float32",
    "bf16") is what AdamW keeps its own in; Muon's momentum is float32."""
    adam = AdamWBF16 if moments == "bf16" else torch.optim.AdamW
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {n: rows for n, rows in model.matrix_parts().items() if n in parameters} if table.matrices == "muon" else {}
    rest = [p for name, p in parameters.items() if name not in matrices]
    by_mesh: dict[Any, list[nn.Parameter]] = {}  # one fused update takes parameters of one mesh
    for p in rest:
        by_mesh.setdefault(getattr(p, "device_mesh", None), []).append(p)
    groups = [{"params": [p for p in own if (p.dim() >= 2) == decayed], "weight_decay": table.weight_decay if decayed else 0.0}
              for own in by_mesh.values() for decayed in (True, False)]
    optimizers: list[torch.optim.Optimizer] = [
        adam([g for g in groups if g["params"]], lr=table.lr, betas=table.betas, fused=True)]
    if matrices:
        optimizers.append(Muon([parameters[n] for n in matrices], list(matrices.values()), lr=table.matrix_lr,
                               weight_decay=table.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Every optimizer's state by parameter name, for the train state: `optimizer.0.lm_head.weight.exp_avg`, ..."""
    names = {p: name for name, p in model.named_parameters()}
    return {f"optimizer.{i}.{names[p]}.{key}": value for i, optimizer in enumerate(optimizers)
            for p, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]) -> None:
    """The reverse. Raises ValueError for a tensor of a parameter that the model or its optimizer has not, and for
    moments in another precision."""
    moments = [torch.bfloat16 if isinstance(o, AdamWBF16) else torch.float32 for o in optimizers]
    owned = [{p for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, rest = name.split(".", 2)
            path, _, key = rest.rpartition(".")
            parameter = parameters.get(path)
            if parameter is None or int(index) >= len(owned) or parameter not in owned[int(index)]:
                raise ValueError(f"train state: {name} belongs to no parameter that optimizer {index} trains; it is another "
                                 "model's or another optimizer's state")
            if value.dim() and torch.bfloat16 in (value.dtype, moments[int(index)]) and value.dtype != moments[int(index)]:
                raise ValueError(f"train state: {name} is {value.dtype}, and this run's optimizer keeps {moments[int(index)]}; "
                                 "precision.moments is not what the state was saved with")
            # AdamW's step count stays where it is
            optimizers[int(index)].state[parameter][key] = value if value.dim() == 0 else value.to(parameter.device)
