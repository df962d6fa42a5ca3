"""`jevons plan`: from a name, a file or a checkpoint to one record of everything that a model costs."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from jevons.config import PRESETS, preset, read_config
from jevons.plan.counts import PlanError, Shape, census, count_parameters, forward_flops, kv_beside, training_flops
from jevons.plan.fit import stage_configs, table_config
from jevons.plan.hardware import HARDWARE, WEIGHT_BYTES, serving, training_cost, weight_bytes
from jevons.plan.layout import BUBBLES, Layout, bubble, memory_by_device
from jevons.published import CONFIGS, TRAININGS
from jevons.recipe import RECIPE_DIR, DistilStage, EvalStage, GRPOStage, PretrainStage, Recipe, SFTStage, load_recipe

UTILISATION = 0.39  # what V3 reached of the bf16 peak (report: 2664K hours)
TOKENS_PER_PARAMETER = 20  # where nothing was published


@dataclass(frozen=True)
class Options:
    """What the command line says; None is the model's own default."""

    gpu: str | None = None
    gpus: int | None = None
    price: float | None = None
    utilisation: float | None = None  # UTILISATION
    tokens: float | None = None
    row: int | None = None
    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    ep: int | None = None
    schedule: str | None = None
    micro_batches: int | None = None
    zero: int | None = None
    recompute: str | None = None
    train_in: str | None = None
    serve_in: str | None = None
    context: int | None = None
    per_user: float = 20.0


def _nearest(name: str, known: list[str]) -> str:
    return difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]


def find_shape(model: str) -> tuple[str, Shape]:
    """(name, shape) of a published model, a preset, a `config.json`, or a directory that holds one.

    Raises ConfigError or PlanError naming the file and what is wrong, or the nearest known name."""
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.is_file():
        return path.parent.resolve().name, Shape.from_hf(read_config(path), str(path))
    name = model.lower()
    if name in CONFIGS:
        return name, Shape.from_hf(CONFIGS[name], name)
    if name in PRESETS:
        return name, Shape.from_hf(preset(name).to_hf(), name)
    known = [*CONFIGS, *PRESETS, *(p.stem for p in RECIPE_DIR.glob("*.toml"))]
    raise PlanError(f"no model {model!r}; the nearest known name is {_nearest(model, known)!r}. A config.json, a checkpoint "
                    "directory or a recipe would be right too")


def _hardware(name: str) -> str:
    if name.lower() not in HARDWARE:
        raise PlanError(f"no hardware {name!r}; the nearest known name is {_nearest(name, list(HARDWARE))!r} "
                        f"(there are {', '.join(HARDWARE)})")
    return name.lower()


def _layout(c: Shape, options: Options, defaults: dict[str, Any], gpu: str, row: int) -> Layout:
    """The options over the published layout; nothing published: 8 GPUs (or what the options multiply to), experts spread."""
    names = [f.name for f in fields(Layout) if f.name not in ("row", "precision")]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    published = {name: defaults[name] for name in names if name in defaults}
    if given.get("pp") == 1:
        published.pop("schedule", None)
    precision = options.train_in or ("fp8" if c.published_fp8 else "bf16")
    layout = Layout(**published | given, precision=precision, row=row)
    block = max(1, layout.tp * layout.devices)
    if options.dp is not None:
        if options.dp < 1 or options.gpus not in (None, block * options.dp):
            raise PlanError(f"dp {options.dp} with {block} GPUs a replica makes {block * options.dp} gpus, not {options.gpus}")
        layout = replace(layout, gpus=block * options.dp)
    elif "gpus" not in published | given:
        layout = replace(layout, gpus=1 if gpu in ("laptop", "desktop") and block == 1 else 8 if 8 % block == 0 else block)
    if c.is_moe and "ep" not in published | given:
        layout = replace(layout, ep=math.gcd(c.n_routed_experts, max(1, layout.gpus // max(1, layout.devices)), 64))
    return layout


def make_plan(model: str, options: Options = Options()) -> dict[str, Any]:
    """Everything `jevons plan` shows, as plain numbers: bytes, FLOPs, seconds, dollars. Raises PlanError."""
    if options.price is not None and not (options.price >= 0 and math.isfinite(options.price)):
        raise PlanError(f"price is {options.price}; 0 or more dollars an hour would be right")
    for name in ("tokens", "row", "context", "per_user", "gpus"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise PlanError(f"{name} is {value}; above 0 would be right")
    if options.serve_in is not None and options.serve_in not in WEIGHT_BYTES:
        raise PlanError(f"serve-in {options.serve_in!r} is not one of {', '.join(WEIGHT_BYTES)}")
    if Path(model).suffix == ".toml" or (RECIPE_DIR / f"{model}.toml").is_file():
        return price_recipe(load_recipe(model)[0], options)
    name, shape = find_shape(model)
    known = name in CONFIGS and shape == Shape.from_hf(CONFIGS[name], name)  # a directory may be called anything
    return _price_model(name, shape, options, TRAININGS.get(name, {}) if known else {})


def _price_model(name: str, c: Shape, options: Options, defaults: dict[str, Any]) -> dict[str, Any]:
    p = count_parameters(c)
    gpu = _hardware(options.gpu or defaults.get("gpu") or ("laptop" if name in PRESETS else "h100"))
    hardware = HARDWARE[gpu]
    price = hardware.dollars_per_hour if options.price is None else options.price
    utilisation = UTILISATION if options.utilisation is None else options.utilisation
    row = options.row or min(4096, c.max_position_embeddings)
    tokens = options.tokens or defaults.get("tokens") or float(TOKENS_PER_PARAMETER * p.active)
    flops = training_flops(c, 1, row, mtp=False)
    layout = _layout(c, options, defaults, gpu, row)
    held, gpus = max(memory_by_device(c, layout), key=lambda m: m.total), layout.gpus
    precision = options.serve_in or ("fp8" if c.published_fp8 else "bf16")
    context = options.context or min(5000, c.max_position_embeddings)
    pp = layout.pp if layout.pp > 1 else 16
    lost = {s: bubble(s, pp) for s in BUBBLES if pp % 2 == 0 or not s.startswith("dualpipe")}
    served = {key: serving(c, HARDWARE[key], context, precision, options.per_user, options.price if key == gpu else None)
              for key in HARDWARE if key != "laptop" or gpu == "laptop"}
    stored = {"fp8": census(c, True), "bf16": census(c, False)}
    return {
        "kind": "model", "name": name, "architecture": c.architecture,
        "parameters": asdict(p) | {"with_router_biases": p.total + p.router_biases},
        "checkpoint": {k: asdict(v) | {"elements": v.f8_e4m3 + v.bf16 + v.f32, "bytes": v.nbytes} for k, v in stored.items()},
        "published_in": "fp8" if c.published_fp8 else "bf16",
        "flops": {"row": row, "forward": forward_flops(c, (row + 1) / 2), "training": flops,
                  "training_with_mtp": training_flops(c, 1, row), "attention_share": 1 - 3 * forward_flops(c, 0) / flops},
        "kv_bytes_per_token": kv_beside(c),
        "layout": asdict(layout) | {"dp": layout.dp, "in_step": layout.in_step, "bubble_share": layout.bubble_share()},
        "memory_per_gpu": asdict(held) | {"total": held.total, "capacity": hardware.memory},
        "bubbles": {"pp": pp} | lost,
        "training": {"tokens": tokens, "gpu": gpu, "title": hardware.title, "gpus": gpus, "dollars_per_hour": price,
                     "utilisation": utilisation, "peak": hardware.bf16, "flops": flops * tokens}
        | asdict(training_cost(flops * tokens, gpus, hardware.bf16, utilisation, price)),
        "serving": {"context": context, "precision": precision, "per_user": options.per_user,
                    "weights": weight_bytes(c, precision),
                    "on": {k: {"title": HARDWARE[k].title, "decode": v.decode} | asdict(v) for k, v in served.items()}},
    }


def price_recipe(recipe: Recipe, options: Options) -> dict[str, Any]:
    """A recipe's budgets: tokens, FLOPs, hours and dollars by stage; on the machine of its `[plan]` where options name none.

    Upper bounds in tokens: every answer as long as its limit. Rows are counted as long as the longest answer, those of a stage
    with a `context` so long. A stage of reinforcement learning costs one forward pass to sample, three to learn, and one for the
    reference where there is a KL; distillation one of the teacher to sample, and by logits one more in every epoch."""
    options = replace(options, **{k: v for k, v in recipe.plan.model_dump().items() if getattr(options, k) is None})

    def load(directory: str) -> Shape:
        return find_shape(directory)[1]

    c = table_config(recipe.model, recipe.tokenizer.vocab_size, load)
    c, configs = (Shape.from_hf(c.to_hf()) if recipe.model.preset else c), stage_configs(recipe, load)
    name = str(recipe.model.preset) if recipe.model.preset else find_shape(recipe.model.from_dir)[0]
    gpu = _hardware(options.gpu or ("laptop" if recipe.model.preset in PRESETS else "h100"))
    gpus = options.gpus or 1
    price = options.price if options.price is not None else (
        HARDWARE[gpu].dollars_per_hour if options.gpu else recipe.cost.dollars_per_hour)
    utilisation = UTILISATION if options.utilisation is None else options.utilisation
    longest = max([stage.max_tokens for stage in recipe.stages if hasattr(stage, "max_tokens")] or [c.max_position_embeddings])
    row = options.row or min(longest, c.max_position_embeddings)
    checkpoints, stages = 1 if recipe.model.from_dir else 0, []
    for index, (stage, (now, teacher)) in enumerate(zip(recipe.stages, configs, strict=True)):
        forward = forward_flops(now, (row + 1) / 2)
        if isinstance(stage, PretrainStage):
            tokens = stage.tokens
            length = options.row or stage.context or (recipe.data.seq_len if recipe.data else row)
            flops = training_flops(now, tokens, length, mtp=stage.has_mtp)
        elif isinstance(stage, GRPOStage):
            tokens = stage.steps * stage.problems * stage.group_size * stage.max_tokens
            flops = tokens * forward * (2 if stage.kl_beta else 1) + training_flops(now, tokens, row, mtp=stage.mtp_weight > 0)
        elif isinstance(stage, SFTStage):
            length = stage.mean_tokens or min(row, now.max_position_embeddings)
            tokens = stage.epochs * length * (stage.examples or _answers(stage))
            flops = training_flops(now, tokens, length)
        elif isinstance(stage, DistilStage):
            sampled = stage.problems * stage.samples * stage.max_tokens
            tokens = stage.epochs * sampled
            flops = training_flops(now, tokens, row) + forward_flops(teacher, (row + 1) / 2) * (
                sampled + (tokens if stage.mode == "logits" else 0))
        else:
            tokens = stage.n * stage.max_tokens * checkpoints
            flops = tokens * forward
        checkpoints += 0 if isinstance(stage, EvalStage) else 2 if stage.ema_decay else 1
        cost = training_cost(flops, gpus, HARDWARE[gpu].bf16, utilisation, price)
        stages.append({"stage": recipe.stage_name(index), "kind": stage.kind, "tokens": tokens, "flops": flops,
                       "gpu_hours": cost.gpu_hours, "seconds": cost.days * 86400, "dollars": cost.dollars})
    total = {key: sum(s[key] for s in stages) for key in ("tokens", "flops", "gpu_hours", "seconds", "dollars")}
    model = _price_model(name, c, replace(options, tokens=float(max(1, total["tokens"])), gpu=gpu, gpus=gpus, row=row,
                                          price=price, context=options.context or row), {})
    training = {k: total[k] for k in ("flops", "gpu_hours", "dollars")} | {"days": total["seconds"] / 86400}
    return model | {"kind": "recipe", "recipe": recipe.name, "stages": stages, "total": total,
                    "training": model["training"] | training}


def _answers(stage: SFTStage) -> int:
    """About how many examples the stage's files hold: their rows. Raises PlanError where one is not there."""
    missing = [path for path in stage.data if not Path(path).is_file()]
    if missing:
        raise PlanError(f"{missing[0]} does not exist, so its examples cannot be counted; `examples` in the recipe would say how "
                        "many there are")
    return sum(bool(line.strip()) for path in stage.data for line in Path(path).read_bytes().split(b"\n"))


def plan_line(recipe: Recipe) -> str:
    """A recipe's plan in one line: where it fits, and what it costs there."""
    plan = price_recipe(recipe, Options())
    lay, m, t = plan["layout"], plan["memory_per_gpu"], plan["training"]
    return (f"`jevons plan {recipe.name}` says {m['total'] / 1e9:,.1f} of {m['capacity'] / 1e9:,.0f} GB on each of "
            f"{t['gpus']:,} x {t['title']} (TP {lay['tp']} x PP {lay['pp']} x DP {lay['dp']}, EP {lay['ep']}), "
            f"{t['gpu_hours']:,.0f} GPU hours, ${t['dollars']:,.0f}")
