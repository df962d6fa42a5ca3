"""Routed experts that the GPU, or even the RAM, does not hold: the layout of a consumer's GPU, and mapped experts watched.

`place` moves a model to a device. With a budget for experts, attention, shared experts, head and norms go there, and the routed
experts stay in RAM as they are held (mapped, bf16, FP8, int8, int4): those used most lie in slots on the device too, others are
computed where they lie by the CPU's kernels, or, for many tokens, brought over for the one call.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from jevons.model.moe import ExpertBank, MoE, Routing
from jevons.model.network import CausalLM
from jevons.numerics import Fp8Weight, IntWeight, Rows, Weight, dense, grouped_linear, kernels, swiglu_linear
from jevons.numerics.memory import prefetch, resident

HALF_LIFE = 256  # calls of a layer after which a use counts half
MANY = 64  # rows of one expert that are worth bringing it over: multiplying them on the CPU takes longer than the copy
SAMPLE = 17  # one call in so many is looked at, while what is read lies in memory
Key = tuple[int, int]  # layer, expert


class HotExperts:
    """Which experts lie in which of `slots`: those used most, older uses counting less. Knows no torch."""

    def __init__(self, slots: int, counts: dict[str, float]):
        self.slots, self.counts = slots, counts
        self.slot_of: dict[Key, int] = {}
        self._heat: dict[Key, tuple[float, int]] = {}  # uses, and the layer's call they are as of
        self._calls: dict[int, int] = {}
        counts |= {"expert_slots": slots, "expert_uses": 0, "expert_hits": 0, "expert_copies": 0, "expert_hit_rate": 0.0}

    def heat(self, key: Key) -> float:
        uses, at = self._heat.get(key, (0.0, 0))
        return uses * 0.5 ** ((self._calls.get(key[0], 0) - at) / HALF_LIFE)

    def use(self, layer: int, experts: Iterable[int]) -> dict[int, int]:
        """A call of a layer needs these experts: the slots of those that have one."""
        experts, counts = list(experts), self.counts
        self._calls[layer] = self._calls.get(layer, 0) + 1
        for expert in experts:
            self._heat[layer, expert] = self.heat((layer, expert)) + 1, self._calls[layer]
        found = {e: self.slot_of[layer, e] for e in experts if (layer, e) in self.slot_of}
        counts["expert_uses"] += len(experts)
        counts["expert_hits"] += len(found)
        counts["expert_hit_rate"] = counts["expert_hits"] / counts["expert_uses"]
        return found

    def promote(self, layer: int, missing: Iterable[int]) -> tuple[int, int] | None:
        """The (expert, slot) to copy now, after the call: the hottest of `missing`, where a slot is free or holds a colder one.
        One a call, so that copies never hold a step up for long."""
        best = max(missing, key=lambda e: self.heat((layer, e)), default=None)
        if best is None or not self.slots:
            return None
        slot = len(self.slot_of)
        if slot == self.slots:
            coldest = min(self.slot_of, key=self.heat)
            if self.heat(coldest) >= self.heat((layer, best)):
                return None
            slot = self.slot_of.pop(coldest)
        self.slot_of[layer, best] = slot
        self.counts["expert_copies"] += 1
        return best, slot


class OffloadedExperts(nn.Module):
    """A layer's routed experts in RAM, behind `ExpertBank`'s interface; tokens come and go on the device."""

    watch = None

    def __init__(self, bank: ExpertBank, layer: int, hot: HotExperts, gate_up_SFD: torch.Tensor, down_SDF: torch.Tensor):
        super().__init__()
        self.bank, self.layer, self.hot, self.slots = bank, layer, hot, (gate_up_SFD, down_SDF)

    def for_few(self, x_ND: torch.Tensor, routing: Routing, shared: nn.Module | None) -> None:
        return None

    def forward(self, x_ND: torch.Tensor, routing: Routing) -> torch.Tensor:
        (n, k), device = routing.experts_NK.shape, x_ND.device
        chosen_M = routing.experts_NK.flatten().cpu()
        order = chosen_M.argsort(stable=True)
        experts, rows = (t.tolist() for t in chosen_M[order].unique_consecutive(return_counts=True))
        pairs = dict(zip(experts, order.split(rows), strict=True))  # a pair is (token, one of its k), as a row of [N * K]
        slots = self.hot.use(self.layer, experts)
        y_MD = torch.zeros(n * k, x_ND.shape[1], dtype=x_ND.dtype, device=device)

        def compute(own: list[int], gate_up: list[Weight], down: list[Weight]) -> None:
            at, ends = torch.cat([pairs[e] for e in own]), torch.tensor([len(pairs[e]) for e in own]).cumsum(0)
            at = at.to(device)
            y_MD[at] = _swiglu(x_ND[at // k], gate_up, down, ends)

        hits = [e for e in experts if e in slots]
        if hits:  # first: a GPU works on them while the CPU computes the others
            compute(hits, *([weights[slots[e]] for e in hits] for weights in self.slots))
        missing = [e for e in experts if e not in slots]
        for e in [e for e in missing if len(pairs[e]) >= MANY and device.type != "cpu"]:
            compute([e], *([dense(w, x_ND.dtype).to(device)] for w in self._weights(e)))
        here = [e for e in missing if len(pairs[e]) < MANY or device.type == "cpu"]
        if here:
            at = torch.cat([pairs[e] for e in here])
            x_MD = x_ND[(at // k).to(device)].cpu()
            y_MD[at.to(device)] = self._on_cpu(x_MD, here, chosen_M[at], [len(pairs[e]) for e in here]).to(device)
        if (moved := self.hot.promote(self.layer, missing)) is not None:
            for slot, weight in zip(self.slots, self._weights(moved[0]), strict=True):
                slot[moved[1]].copy_(dense(weight, slot.dtype))
        return (y_MD.view(n, k, -1) * routing.weights_NK[..., None].to(y_MD.dtype)).sum(1)

    def _weights(self, expert: int) -> tuple[Weight, Weight]:
        return self.bank.gate_up_proj[expert], self.bank.down_proj[expert]

    def _on_cpu(self, x_MD: torch.Tensor, experts: list[int], chosen_M: torch.Tensor, rows: list[int]) -> torch.Tensor:
        bank = self.bank
        if kernels.usable(x_MD) and bank.table.ready(bank.gate_up_proj, bank.down_proj, x_MD.dtype):
            return kernels.experts(x_MD, bank.table, chosen_M[:, None], torch.ones(len(x_MD), 1), None)
        return _swiglu(x_MD, *map(list, zip(*map(self._weights, experts), strict=True)), torch.tensor(rows).cumsum(0))


def _swiglu(x_MD: torch.Tensor, gate_up: list[Weight], down: list[Weight], ends: torch.Tensor) -> torch.Tensor:
    """Rows sorted by expert through each one's own MLP; `ends` lies on the CPU."""
    return swiglu_linear(grouped_linear(x_MD, gate_up, ends), down, ends)


def expert_bytes(model: CausalLM) -> int:
    """What one expert takes on the device, in the type of activations."""
    c = model.config
    return 3 * c.hidden_size * c.moe_intermediate_size * model.embed_tokens.weight.itemsize


@torch.no_grad()
def place(model: CausalLM, device: torch.device | str, expert_budget: int | None = None) -> CausalLM:
    """Move a model that is held for inference, packed or not, to `device`; returns it. With `expert_budget`, routed experts stay
    where they are, and so many bytes on the device hold the hot ones. Raises ValueError where there are no experts."""
    device, banks = torch.device(device), [m for m in model.modules() if isinstance(m, ExpertBank)]
    if expert_budget is not None and not banks:
        raise ValueError(f"a budget for experts ({expert_budget} bytes): {model.config.architecture} has none; leave it out")
    stay = set(banks if expert_budget is not None else ())
    moved: dict[int, object] = {}

    def move(weight: Weight) -> Weight:
        if id(weight) not in moved:
            moved[id(weight)] = weight, _moved(weight, device)  # the old one is kept: its id must not come again
        return moved[id(weight)][1]

    for module in model.modules():
        if module in stay:
            continue
        for name, value in list(module.named_parameters(recurse=False)) + list(module.named_buffers(recurse=False)):
            new = move(value)
            setattr(module, name, nn.Parameter(new, requires_grad=False) if isinstance(value, nn.Parameter) else new)
        for name, value in vars(module).items():
            if isinstance(value, Rows | Fp8Weight | IntWeight):
                setattr(module, name, move(value))
            elif isinstance(module, ExpertBank) and name in ("gate_up_proj", "down_proj"):
                setattr(module, name, [move(w) for w in value])
        if hasattr(module, "_dense"):
            module._dense = None
    if model.config.tie_word_embeddings and isinstance(model.lm_head.weight, torch.Tensor):
        model.lm_head.weight = model.embed_tokens.weight
    if expert_budget is not None:
        _offload(model, device, expert_budget)
    return model


def _moved(weight: Weight, device: torch.device) -> Weight:
    if isinstance(weight, torch.Tensor):
        return weight.detach().to(device)
    if isinstance(weight, Rows):
        return Rows([_moved(part, device) for part in weight.parts])
    if isinstance(weight, Fp8Weight):
        return Fp8Weight(weight.codes.to(device), weight.scale_inv.to(device))
    if device.type != "cpu":  # integers are laid out for CPUs
        return weight.dense(torch.bfloat16).to(device)
    return IntWeight(weight.codes.to(device), weight.scale.to(device), weight.shape, weight.bits, weight.group)


def _offload(model: CausalLM, device: torch.device, budget: int) -> None:
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    c, dtype = model.config, model.embed_tokens.weight.dtype
    slots = min(budget // expert_bytes(model), len(layers) * c.n_routed_experts)
    hot = HotExperts(slots, model.expert_counts)
    gate_up = torch.empty(slots, 2 * c.moe_intermediate_size, c.hidden_size, dtype=dtype, device=device)
    down = torch.empty(slots, c.hidden_size, c.moe_intermediate_size, dtype=dtype, device=device)
    for layer, module in enumerate(layers):
        module.experts = OffloadedExperts(module.experts, layer, hot, gate_up, down)


class Residency:
    """How much of what is read of mapped experts lies in memory already. Every SAMPLE-th call is looked at, and while reads
    miss, every one, to have all of its experts read ahead at once."""

    def __init__(self, counts: dict[str, float]):
        self.counts, self._calls, self._missed = counts, 0, True
        counts |= {"expert_bytes_seen": 0, "expert_bytes_resident": 0, "expert_hit_rate": 1.0, "major_faults": 0}

    def due(self, calls: int) -> bool:
        """Whether one of the next `calls` would be looked at; asked by who can spare them."""
        self._missed |= self._calls % SAMPLE + calls >= SAMPLE
        self._calls += 0 if self._missed else calls
        return self._missed

    def __call__(self, bank: ExpertBank, experts_NK: torch.Tensor) -> None:
        self._calls += 1
        if not self._missed and self._calls % SAMPLE:
            return
        seen = found = 0
        for expert in experts_NK.unique().tolist():
            for tensor in _tensors((bank.gate_up_proj[expert], bank.down_proj[expert])):
                share = resident(tensor)
                if share is None:
                    bank.watch = None  # the system does not tell
                    return
                seen, found = seen + tensor.nbytes, found + share * tensor.nbytes
                if share < 1:
                    prefetch(tensor)
        self._missed = found < 0.99 * seen
        counts = self.counts
        counts["expert_bytes_seen"] += seen
        counts["expert_bytes_resident"] += found
        counts["expert_hit_rate"] = counts["expert_bytes_resident"] / max(1, counts["expert_bytes_seen"])
        counts["major_faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _tensors(weights: Iterable[Weight]) -> Iterator[torch.Tensor]:
    for weight in weights:
        if isinstance(weight, Rows):
            yield from _tensors(weight.parts)
        else:
            yield weight if isinstance(weight, torch.Tensor) else weight.codes


def watch_mapped(model: CausalLM) -> CausalLM:
    """Show, for experts that lie in their files' memory map, what share of each call's bytes is in memory: `expert_hit_rate`."""
    banks = [m for m in model.modules() if isinstance(m, ExpertBank) and isinstance(m.down_proj, list)]
    watch = Residency(model.expert_counts) if banks else None
    for bank in banks:
        bank.watch = watch
    return model
