"""Whether a recipe's training fits the machine: the plan's memory beside what there is."""

from __future__ import annotations

from typing import Any

from jevons.config import ModelConfig
from jevons.plan.counts import PlanError, count_parameters, kv_bytes_per_token
from jevons.plan.layout import Memory, activation_bytes
from jevons.recipe import GRPOStage, Recipe

MICRO_TOKENS = 4096  # of a stage that does not say
FLOAT = 4  # bytes of master weights, gradients and each moment


def training_memory(c: ModelConfig, stage: Any, threads: int = 1) -> Memory:
    """Bytes that a training stage holds on one machine: float32 weights, gradients and moments (Muon keeps one of matrices,
    AdamW two), and activations of as many micro-batches as cores compute at once. A reference policy counts as weights, the
    rollouts' cache as activations."""
    p = count_parameters(c)
    everything = p.total + p.mtp
    vectors = p.embedding + p.head + p.norms
    moments = 2 * everything - (everything - vectors if stage.optimizer.matrices == "muon" else 0)
    whole = getattr(stage, "batch_tokens", None) or MICRO_TOKENS
    micro = getattr(stage, "micro_batch_tokens", None) or whole
    tokens = micro * max(1, min(threads, round(whole / micro)))
    modules = c.num_nextn_predict_layers
    kept = sum(activation_bytes(c, i, "none", "bf16") for i in range(c.num_hidden_layers + modules))
    activations = tokens * (kept + 2 * FLOAT * c.vocab_size)  # logits and their gradient; the MTP module's come later
    copies = 1
    if isinstance(stage, GRPOStage):
        copies += stage.kl_beta > 0
        activations += (min(256, stage.problems * stage.group_size) * stage.max_tokens * kv_bytes_per_token(c, FLOAT))
    return Memory(copies * FLOAT * everything, FLOAT * everything, FLOAT * moments, activations)


def check_fits(recipe: Recipe, c: ModelConfig, memory_gib: float, threads: int = 1, machines: int = 1) -> None:
    """Raises PlanError with the plan that shows why where a training stage needs more than `machines` times `memory_gib`
    (0: unknown), however it were spread."""
    for index, stage in enumerate(recipe.stages):
        if not hasattr(stage, "optimizer") or not memory_gib:
            continue
        need = training_memory(c, stage, threads)
        if need.total <= machines * memory_gib * 2**30:
            continue
        rows = [(name, getattr(need, name)) for name in ("weights", "gradients", "optimizer", "activations")]
        table = "\n".join(f"  {name:<12}{size / 2**30:>12,.1f} GiB" for name, size in [*rows, ("all", need.total)])
        there = f"{memory_gib:,.1f} GiB" if machines == 1 else f"{machines} x {memory_gib:,.1f} GiB"
        raise PlanError(f"recipe {recipe.name} does not fit: stage {recipe.stage_name(index)} needs about "
                        f"{need.total / 2**30:,.1f} GiB, and there are {there} here\n{table}\n"
                        f"`jevons plan` with this recipe says which machines hold it; a smaller model, or a smaller "
                        "micro_batch_tokens where activations are the most, would fit")
