"""A recipe's network at each stage, and whether a machine can hold it while it trains. Nothing is built for it."""

from __future__ import annotations

from collections.abc import Callable

from jevons.config import PRESETS, ConfigError, ModelConfig, preset
from jevons.plan.counts import PlanError, count_parameters, kv_bytes_per_token
from jevons.plan.layout import activation_bytes
from jevons.published import CONFIGS
from jevons.recipe import DistilStage, EvalStage, FinetuneStage, GRPOStage, PretrainStage, Recipe
from jevons.recipe.tables import ModelTable

_CONTEXT = 4096  # what published shapes are trained on first, before YaRN stretches it
MICRO_TOKENS = 4096  # of a stage that does not say
FLOAT = 4  # bytes of master weights, gradients and each moment


def table_config(table: ModelTable, vocab_size: int, load: Callable[[str], ModelConfig] = ModelConfig.load) -> ModelConfig:
    """The network that a `[model]` or `[stages.student]` names: a preset (of `vocab_size`, where `set` gives none), a published
    shape by name, or a directory that `load` reads. Raises ConfigError naming the known ones."""
    if table.from_dir:
        config = load(table.from_dir)
        return type(config).build(config.model_dump() | table.set, table.from_dir)
    if table.preset in CONFIGS:
        config = ModelConfig.from_hf(CONFIGS[table.preset], table.preset)
        values = config.model_dump() | {"max_position_embeddings": _CONTEXT} | table.set
        return ModelConfig.build(values, f"preset {table.preset}")
    if table.preset not in PRESETS:
        raise ConfigError(f"preset {table.preset!r} is not one of {sorted(PRESETS)}, nor a published shape "
                          f"({', '.join(CONFIGS)})")
    return preset(table.preset, **({"vocab_size": vocab_size} | table.set))


def student_config(stage: DistilStage, teacher: ModelConfig) -> ModelConfig:
    """The student's network: a preset takes the teacher's vocabulary and context."""
    table, own = stage.student, {"vocab_size": teacher.vocab_size, "max_position_embeddings": teacher.max_position_embeddings,
                                 "bos_token_id": teacher.bos_token_id, "eos_token_id": teacher.eos_token_id}
    if table.preset:
        table = table.model_copy(update={"set": own | table.set})
    return table_config(table, teacher.vocab_size)


def stage_configs(recipe: Recipe, load: Callable[[str], ModelConfig] = ModelConfig.load,
                  ) -> list[tuple[ModelConfig, ModelConfig | None]]:
    """(network, teacher's) of every stage: what it trains or evaluates last, and what a student learns from."""
    config, out = table_config(recipe.model, recipe.tokenizer.vocab_size, load), []
    for stage in recipe.stages:
        teacher = None
        if isinstance(stage, DistilStage):
            names = [recipe.stage_name(i) for i in range(len(out))]
            teacher = config
            if stage.teacher:
                teacher = out[names.index(stage.teacher)][0] if stage.teacher in names else load(stage.teacher)
            config = student_config(stage, teacher)
        elif isinstance(stage, PretrainStage) and stage.context:
            config = config.with_context(stage.context, stage.yarn_factor)
        out.append((config, teacher))
    return out


def training_bytes(c: ModelConfig, stage: PretrainStage | FinetuneStage | GRPOStage, teacher: ModelConfig | None = None,
                   threads: int = 1, recompute: bool = False) -> dict[str, float]:
    """Bytes that a stage holds on one device: float32 weights, gradients and moments (Muon keeps one of matrices, AdamW two),
    and the activations of as many micro-batches as cores compute at once; rollouts' cache counts as activations."""
    p = count_parameters(c)
    parameters, vectors = p.total + p.mtp, p.embedding + p.head + p.norms
    moments = 2 * parameters - (parameters - vectors if stage.optimizer.matrices == "muon" else 0)
    micro = getattr(stage, "micro_batch_tokens", None)
    if isinstance(stage, PretrainStage):
        whole = stage.timeline.batch(stage.timeline.steps)
        micro = micro or whole
        threads = max(1, min(threads, round(whole / micro)))
    tokens = (micro or MICRO_TOKENS) * threads
    layers = range(c.num_hidden_layers + c.num_nextn_predict_layers)
    kept = sum(activation_bytes(c, i, "selective" if recompute else "none", "bf16") for i in layers)
    activations = tokens * (kept + 2 * FLOAT * c.vocab_size)  # logits and their gradient; the MTP module's come later
    if isinstance(stage, GRPOStage):
        activations += min(256, stage.problems * stage.group_size) * stage.max_tokens * kv_bytes_per_token(c, FLOAT)
    out = {"weights": FLOAT * parameters, "gradients": FLOAT * parameters, "optimizer": FLOAT * moments}
    if stage.ema_decay:
        out["average of the weights"] = FLOAT * parameters
    if teacher is not None or (isinstance(stage, GRPOStage) and stage.kl_beta):
        held = count_parameters(teacher or c)
        out["teacher" if teacher else "reference"] = FLOAT * (held.total + held.mtp)
    return {name: float(size) for name, size in (out | {"activations": activations}).items()}


def check_fits(recipe: Recipe, capacity: float, ranks: int, plan: Callable[[], str], threads: int = 1) -> None:
    """Raises PlanError, with the table of what is needed and what `plan` says, for a stage that cannot be held by `ranks`
    devices of `capacity` bytes that share everything but activations."""
    for index, (stage, (config, teacher)) in enumerate(zip(recipe.stages, stage_configs(recipe), strict=True)):
        if not isinstance(stage, EvalStage):
            parts = training_bytes(config, stage, teacher if getattr(stage, "mode", "") == "logits" else None, threads,
                                   recipe.precision.recompute)
            parts = {k: v / (1 if k == "activations" else ranks) for k, v in parts.items()}
            if (total := sum(parts.values())) > capacity:
                rows = "\n".join(f"  {name:<24}{value / 1e9:>14,.1f} GB" for name, value in [*parts.items(), ("in all", total)])
                where = f"this machine has {capacity / 1e9:,.1f} GB" + (f" a device, {ranks} of them" if ranks > 1 else "")
                raise PlanError(f"recipe {recipe.name}, stage {recipe.stage_name(index)} does not fit in memory; {where}, and it "
                                f"needs\n{rows}\n{plan()}")
