"""Recipes: TOML files that name a model, a task, stages and budgets. No torch here.

Budgets are tokens or steps, never a clock. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from jevons.recipe.mesh import MeshError, MeshTable
from jevons.recipe.stages import DIRECTORY_NAME, EvalStage, GRPOStage, PretrainStage, Stage
from jevons.recipe.tables import CostTable, ModelTable, OptimizerTable, Table, TaskTable, TokenizerTable

__all__ = ["RECIPE_DIR", "CostTable", "EvalStage", "GRPOStage", "MeshError", "MeshTable", "ModelTable", "OptimizerTable",
           "PretrainStage", "Recipe", "RecipeError", "Stage", "TaskTable", "TokenizerTable", "find_recipe", "load_recipe",
           "parse_recipe"]
RECIPE_DIR = Path(__file__).resolve().parent.parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the file, the key, the value and what would be right."""


class Recipe(Table):
    name: str = Field(pattern=DIRECTORY_NAME)
    description: str = ""
    seed: int = 0
    model: ModelTable
    task: TaskTable = TaskTable()
    tokenizer: TokenizerTable = TokenizerTable()
    cost: CostTable = CostTable()
    mesh: MeshTable = MeshTable()
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


_TABLES = {"model": ModelTable, "task": TaskTable, "tokenizer": TokenizerTable, "cost": CostTable, "optimizer": OptimizerTable,
           "mesh": MeshTable}
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
