"""Recipes: TOML files that name a model, a task, stages and budgets. No torch here.

Budgets are tokens or steps, never a clock. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from jevons.recipe.data import DataTable, SourceTable
from jevons.recipe.finetune import DistilStage, FinetuneStage, SFTStage
from jevons.recipe.guard import GuardTable
from jevons.recipe.mesh import MeshError, MeshTable
from jevons.recipe.precision import PrecisionTable
from jevons.recipe.schedule import SCHEDULED, TAGS, Phase
from jevons.recipe.stages import DIRECTORY_NAME, EvalStage, GRPOStage, PretrainStage
from jevons.recipe.tables import CostTable, ModelTable, OptimizerTable, PlanTable, Table, TaskTable, TokenizerTable

__all__ = [
    "CostTable", "DataTable", "DistilStage", "EvalStage", "FinetuneStage", "GRPOStage", "GuardTable", "MeshError",
    "MeshTable", "ModelTable", "OptimizerTable", "Phase", "PlanTable", "PrecisionTable", "PretrainStage", "RECIPE_DIR",
    "Recipe", "RecipeError", "SFTStage", "SourceTable", "Stage", "TaskTable", "TokenizerTable", "find_recipe", "load_recipe",
    "parse_recipe", "with_overrides",
]
RECIPE_DIR = Path(__file__).resolve().parent.parent / "recipes"
Stage = Annotated[PretrainStage | SFTStage | DistilStage | GRPOStage | EvalStage, Field(discriminator="kind")]


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the file, the key, the value and what would be right."""


class Recipe(Table):
    name: str = Field(pattern=DIRECTORY_NAME)
    description: str = ""
    seed: int = Field(0, ge=-(2**62), lt=2**62)
    model: ModelTable
    task: TaskTable | None = None
    data: DataTable | None = None
    tokenizer: TokenizerTable = TokenizerTable()
    cost: CostTable = CostTable()
    guard: GuardTable = GuardTable()
    mesh: MeshTable = MeshTable()
    precision: PrecisionTable = PrecisionTable()
    plan: PlanTable = PlanTable()
    stages: list[Stage] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _task(cls, values: Any) -> Any:
        """The task is Countdown where the recipe says nothing; one that pretrains on text alone has none."""
        if isinstance(values, dict) and "data" not in values:
            return {"task": {}} | values
        return values

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        for index, stage in enumerate(self.stages):
            if hasattr(stage, "optimizer"):
                self.precision.check_betas(stage.optimizer.betas, f"stages[{index}].optimizer")
        names = [self.stage_name(i) for i in range(len(self.stages))]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names {names} are not distinct; give each stage its own `name`")
        if self.task is None and (needing := [s.kind for s in self.stages if s.kind in ("grpo", "eval", "distil")]):
            raise ValueError(f"the {needing[0]} stage needs a [task]; [data] is read by pretrain stages only")
        if self.data and not any(stage.kind == "pretrain" for stage in self.stages):
            raise ValueError("[data] is read by pretrain stages, and there is none; leave it out")
        if self.model.from_dir and self.stages[0].kind == "eval":
            return self
        if not self.model.from_dir and self.stages[0].kind != "pretrain":
            raise ValueError("a recipe from scratch begins with a pretrain stage; or give `[model] from = DIR`")
        return self

    def stage_name(self, index: int) -> str:
        return self.stages[index].name or self.stages[index].kind


_TABLES = {"model": ModelTable, "task": TaskTable, "tokenizer": TokenizerTable, "cost": CostTable, "optimizer": OptimizerTable,
           "data": DataTable, "guard": GuardTable, "mesh": MeshTable, "plan": PlanTable, "precision": PrecisionTable,
           "sources": SourceTable, "student": ModelTable, "validation": SourceTable} | dict.fromkeys(SCHEDULED, Phase)
_KINDS = {"pretrain": PretrainStage, "sft": SFTStage, "distil": DistilStage, "grpo": GRPOStage, "eval": EvalStage}


def _known_keys(table: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in table.model_fields.items()]


def _check_keys(raw: dict[str, Any], table: type[BaseModel], where: str, source: str) -> None:
    known = _known_keys(table)
    for key, value in raw.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise RecipeError(f"{source}: unknown key `{where}{key}`; the nearest known key is `{where}{near}`")
        inner = {f"{key}.": value} if isinstance(value, dict) else {}
        if isinstance(value, list):
            inner = {f"{key}[{i}].": item for i, item in enumerate(value) if isinstance(item, dict)}
        for name, item in inner.items():
            if key in _TABLES:
                _check_keys(item, _TABLES[key], f"{where}{name}", source)


def _override(raw: dict[str, Any], source: str) -> None:
    """Apply the table `[overrides]`: "data.sources.0.path" = "other.txt" sets that key, which need not be there yet."""
    for path, value in raw.pop("overrides", {}).items():
        *above, last = path.split(".")
        place: Any = raw
        try:
            for part in above:
                place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
            place[int(last) if isinstance(place, list) else last] = value
        except (ValueError, IndexError, TypeError, AttributeError):
            raise RecipeError(f"{source}: override {path!r} leads nowhere; keys and positions from 0, joined by dots, would be "
                              "right, such as stages.0.tokens") from None


def with_overrides(text: str, sets: list[str]) -> str:
    """Recipe text that says `KEY=VALUE` of each too, in a last table `[overrides]`; a value that is not TOML is a string."""
    lines = []
    for item in sets:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {item!r}: KEY=VALUE would be right, such as stages.0.tokens=1000")
        try:
            if list(tomllib.loads(f"v = {value}")) != ["v"]:
                raise ValueError
        except ValueError:  # TOML's own error is one
            value = json.dumps(value, ensure_ascii=False)
        lines.append(f"{json.dumps(key.strip(), ensure_ascii=False)} = {value}\n")
    return "".join([text.rstrip("\n"), "\n\n[overrides]\n", *lines]) if lines else text


def parse_recipe(text: str, source: str = "recipe") -> Recipe:
    """Parse recipe TOML. Raises RecipeError naming `source`, the key, the value and what would be right."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source} is not TOML: {error}") from None
    _override(raw, source)
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
        where = ".".join(str(part) for part in first["loc"] if part not in (*_KINDS, *TAGS))
        value = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
        said = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{source}: `{where}`{value}: {said}" if where else f"{source}: {said}") from None


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe given by name (of those that ship) or by path. Raises RecipeError naming the known ones."""
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        if path.is_file():
            return path
        if path.parent == Path("recipes") and (RECIPE_DIR / path.name).is_file():  # as it is called within this repository
            return RECIPE_DIR / path.name
        raise RecipeError(f"recipe file {path} does not exist")
    shipped = RECIPE_DIR / f"{name_or_path}.toml"
    if not shipped.is_file():
        known = sorted(p.stem for p in RECIPE_DIR.glob("*.toml"))
        raise RecipeError(f"no recipe {name_or_path!r}; there are {', '.join(known)}, or give the path of a .toml file")
    return shipped


def load_recipe(name_or_path: str, sets: list[str] | None = None) -> tuple[Recipe, str]:
    """A recipe by name or path with `sets` ("KEY=VALUE") in place of its own values, and its text (a run keeps the text, and
    refuses to resume under another one).

    A relative `[model] from`, `[task] name = "file.py:Class"` or `[data]` path that is not found here is looked for beside
    the recipe.
    """
    path = find_recipe(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    text = with_overrides(text, sets or [])
    recipe = parse_recipe(text, str(path))

    def beside(name: str) -> str:
        return name if Path(name).exists() or not (path.parent / name).exists() else str(path.parent / name)

    if recipe.model.from_dir:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"from_dir": beside(recipe.model.from_dir)})})
    if recipe.data:
        places = recipe.data.model_dump()
        for source in [*places["sources"], *(places["validation"] if isinstance(places["validation"], list) else [])]:
            source["path"] = beside(source["path"])
        recipe = recipe.model_copy(update={"data": DataTable(**places)})
    file, colon, kind = recipe.task.name.rpartition(":") if recipe.task else ("", "", "")
    if file.endswith(".py"):
        recipe = recipe.model_copy(update={"task": recipe.task.model_copy(update={"name": beside(file) + colon + kind})})
    return recipe.model_copy(update={"stages": [stage.beside(beside) for stage in recipe.stages]}), text
