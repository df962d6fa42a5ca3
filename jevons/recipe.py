"""Recipes: TOML files that name a model, a task, stages and budgets. No torch here.

Budgets are tokens or steps, never a clock. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

RECIPE_DIR = Path(__file__).resolve().parent / "recipes"
SETTABLE = {"max_position_embeddings", "rope_theta", "rope_scaling", "aux_loss_alpha"}  # what changes no tensor's shape
DIRECTORY_NAME = r"^\w[\w.+ -]*$"  # names become directories


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the file, the key, the value and what would be right."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ModelTable(_Table):
    """`[model]`: a preset with changed fields, or a checkpoint directory to go on from."""

    preset: str | None = None
    from_dir: str | None = Field(None, alias="from")
    set: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one(self) -> ModelTable:
        if (self.preset is None) == (self.from_dir is None):
            raise ValueError("give exactly one of `preset` (train from scratch) and `from` (a checkpoint directory)")
        if self.from_dir and (fixed := sorted(set(self.set) - SETTABLE)):
            raise ValueError(f"set.{fixed[0]} is the checkpoint's own; beside `from`, {', '.join(sorted(SETTABLE))} can be set")
        return self


class TaskTable(_Table):
    """`[task]`: a task by name, or `path/to/file.py:Class` for one's own; `args` go to its constructor."""

    name: str = "countdown"
    args: dict[str, Any] = {}


class TokenizerTable(_Table):
    """`[tokenizer]`: byte-level BPE trained on `samples` texts of the task (only when training from scratch)."""

    vocab_size: int = Field(512, ge=288)
    samples: int = Field(20_000, ge=10)

    @model_validator(mode="after")
    def _whole_tiles(self) -> TokenizerTable:
        if self.vocab_size % 32:
            raise ValueError(f"vocab_size is {self.vocab_size}; a multiple of 32 would be right")
        return self


class CostTable(_Table):
    """`[cost]`: what an hour of this machine costs; every dollar shown follows from it."""

    dollars_per_hour: float = Field(0.10, ge=0)


class OptimizerTable(_Table):
    """AdamW with the V3 settings (report section 4.2), and Muon for matrices where `matrices = "muon"`."""

    matrices: Literal["muon", "adamw"] = "muon"
    lr: float = Field(3e-3, gt=0)
    matrix_lr: float = Field(0.02, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    final_lr_fraction: float = Field(0.0, ge=0, le=1)


class StageTable(_Table):
    name: str = Field("", pattern=DIRECTORY_NAME)
    save_every: int = Field(50, ge=1, description="steps between checkpoints")


class PretrainStage(StageTable):
    """Next-token and MTP loss on packed traces of the task."""

    kind: Literal["pretrain"]
    tokens: int = Field(gt=0)
    batch_tokens: int = Field(8192, gt=0)
    micro_batch_tokens: int | None = Field(None, gt=0, description="computed at once; on CPU each core takes one")
    prompt_weight: float = Field(0.1, ge=0, le=1)
    mtp_weight: float = Field(0.3, ge=0)
    bias_update_speed: float = Field(0.001, ge=0)
    optimizer: OptimizerTable = OptimizerTable()


class GRPOStage(StageTable):
    """Group relative policy optimisation on the task's verifier. `preset = "r1"` gives the published recipe."""

    kind: Literal["grpo"]
    steps: int = Field(gt=0)
    problems: int = Field(16, ge=1, description="problems per step")
    group_size: int = Field(12, ge=2)
    max_tokens: int = Field(256, ge=1, description="longest completion")
    temperature: float = Field(1.0, gt=0, le=2)
    preset: Literal["modern", "r1"] = "modern"
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.28, gt=0)
    kl_beta: float = Field(0.0, ge=0)
    std_normalise: bool = False
    loss_normaliser: Literal["constant", "sequence"] = "constant"
    minibatches: int = Field(1, ge=1)
    importance_cap: float = Field(2.0, gt=0)
    mask_truncated: bool = True
    resample_rounds: int = Field(1, ge=0, description="extra rounds of problems in place of groups without spread")
    format_weight: float = Field(0.0, ge=0, description="weight of the format part beside accuracy")
    random_reward: bool = Field(False, description="the control: rewards are coin flips")
    mtp_weight: float = Field(0.1, ge=0)
    first_seed: int = 1_000_000
    optimizer: OptimizerTable = OptimizerTable(matrices="adamw", lr=3e-4, weight_decay=0.0, schedule="constant")

    @model_validator(mode="before")
    @classmethod
    def _r1(cls, values: Any) -> Any:
        """R1's settings where the recipe does not say otherwise (R1 appendix B.4; KL and std of GRPO's eq. 1-3)."""
        if isinstance(values, dict) and values.get("preset") == "r1":
            published = dict(clip_low=10.0, clip_high=10.0, kl_beta=0.001, std_normalise=True, loss_normaliser="sequence",
                             minibatches=16, mask_truncated=False, resample_rounds=0, format_weight=1.0,
                             group_size=16, problems=32)
            return published | values
        return values


class EvalStage(StageTable):
    """Greedy accuracy on held-out problems: of every checkpoint the stages before left, and of `[model] from`."""

    kind: Literal["eval"]
    n: int = Field(1000, ge=1)
    seed: int = 0
    max_tokens: int = Field(256, ge=1)


Stage = Annotated[PretrainStage | GRPOStage | EvalStage, Field(discriminator="kind")]


class Recipe(_Table):
    name: str = Field(pattern=DIRECTORY_NAME)
    description: str = ""
    seed: int = 0
    model: ModelTable
    task: TaskTable = TaskTable()
    tokenizer: TokenizerTable = TokenizerTable()
    cost: CostTable = CostTable()
    stages: list[Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        names = [self.stage_name(i) for i in range(len(self.stages))]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names {names} are not distinct; give each stage its own `name`")
        if self.model.from_dir and self.stages[0].kind == "eval":
            return self
        if not self.model.from_dir and self.stages[0].kind != "pretrain":
            raise ValueError("a recipe from scratch begins with a pretrain stage; or give `[model] from = DIR`")
        return self

    def stage_name(self, index: int) -> str:
        return self.stages[index].name or self.stages[index].kind


_TABLES = {"model": ModelTable, "task": TaskTable, "tokenizer": TokenizerTable, "cost": CostTable, "optimizer": OptimizerTable}
_KINDS = {"pretrain": PretrainStage, "grpo": GRPOStage, "eval": EvalStage}


def _known_keys(table: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in table.model_fields.items()]


def _check_keys(raw: dict[str, Any], table: type[BaseModel], where: str, source: str) -> None:
    known = _known_keys(table)
    for key, value in raw.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise RecipeError(f"{source}: unknown key `{where}{key}`; the nearest known key is `{where}{near}`")
        if key in _TABLES and isinstance(value, dict):
            _check_keys(value, _TABLES[key], f"{where}{key}.", source)


def parse_recipe(text: str, source: str = "recipe") -> Recipe:
    """Parse recipe TOML. Raises RecipeError naming `source`, the key, the value and what would be right."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source} is not TOML: {error}") from None
    _check_keys(raw, Recipe, "", source)
    stages = raw.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise RecipeError(f"{source}: `stages` must be an array of tables, [[stages]]")
    for index, stage in enumerate(stages):
        kind = stage.get("kind")
        if kind not in _KINDS:
            raise RecipeError(f"{source}: stages[{index}].kind is {kind!r}; it must be one of {sorted(_KINDS)}")
        _check_keys(stage, _KINDS[kind], f"stages[{index}].", source)
    try:
        return Recipe(**raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in _KINDS)
        value = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
        raise RecipeError(f"{source}: `{where}`{value}: {first['msg']}") from None


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe given by name (of those that ship) or by path. Raises RecipeError naming the known ones."""
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise RecipeError(f"recipe file {path} does not exist")
        return path
    shipped = RECIPE_DIR / f"{name_or_path}.toml"
    if not shipped.is_file():
        known = sorted(p.stem for p in RECIPE_DIR.glob("*.toml"))
        raise RecipeError(f"no recipe {name_or_path!r}; there are {', '.join(known)}, or give the path of a .toml file")
    return shipped


def load_recipe(name_or_path: str) -> tuple[Recipe, str]:
    """A recipe by name or path, and its text (a run keeps the text, and refuses to resume under another one).

    A relative `[model] from` or `[task] name = "file.py:Class"` that is not found here is looked for beside the recipe.
    """
    path = find_recipe(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    recipe = parse_recipe(text, str(path))

    def beside(name: str) -> str:
        return name if Path(name).exists() or not (path.parent / name).exists() else str(path.parent / name)

    if recipe.model.from_dir:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"from_dir": beside(recipe.model.from_dir)})})
    file, colon, kind = recipe.task.name.rpartition(":")
    if file.endswith(".py"):
        recipe = recipe.model_copy(update={"task": recipe.task.model_copy(update={"name": beside(file) + colon + kind})})
    return recipe, text
