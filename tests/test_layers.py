"""The house rules: imports go down only, the ground floor knows no torch, and the package stays small."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jevons"
# Top to bottom. Rooms in one row may not import each other.
ROWS = [{"cli"}, {"terminal"}, {"reason", "serve", "bench"}, {"train", "engine"}, {"store"}, {"model"}, {"numerics"},
        {"data", "tasks"}, {"plan"}, {"config", "recipe", "chat", "runtime", "published"}]
LEVEL = {room: len(ROWS) - row for row, rooms in enumerate(ROWS) for room in rooms}
NO_TORCH = ["config.py", "recipe", "plan", "published.py", "chat.py", "tasks", "engine/types.py", "engine/scheduler.py"]
FREE = {"__init__", "__main__", "__version__"}  # jevons/__init__.py, what it holds, and __main__.py stand outside the rows


def files():
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def room_of(parts):
    """`("jevons", "model", "moe")` -> "model"."""
    return parts[1] if len(parts) > 1 else "__init__"


def imports(source: str, module: tuple[str, ...]):
    """(line, dotted name) of every import, those inside functions too; relative ones resolved against `module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module[: len(module) - node.level]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            # `from jevons import model` names a room by its alias
            yield from ((node.lineno, f"{name}.{alias.name}" if name == "jevons" else name) for alias in node.names)


def module_of(path: Path) -> tuple[str, ...]:
    """Dotted parts as relative imports count them: a package's __init__ has one more."""
    return ("jevons", *path.relative_to(PACKAGE).with_suffix("").parts)


def violations(source: str, module: tuple[str, ...]):
    room = room_of(module)
    for line, name in imports(source, module):
        parts = name.split(".")
        if parts[0] != "jevons" or room in FREE:
            continue
        target = room_of(parts)
        if target in FREE or target == room:
            continue
        if target not in LEVEL:
            yield f"line {line}: {name} is in no room"
        elif LEVEL[target] >= LEVEL[room]:
            yield f"line {line}: {room} imports {target}, which is not below it"


def names_torch(source: str, module: tuple[str, ...]):
    return [line for line, name in imports(source, module) if name.split(".")[0] == "torch"]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    module = module_of(path)
    assert room_of(module) in LEVEL or room_of(module) in FREE, f"{path} belongs to no room of the design"
    assert list(violations(path.read_text(encoding="utf-8"), module)) == []


@pytest.mark.parametrize("name", NO_TORCH)
def test_no_torch_on_the_ground_floor(name):
    path = PACKAGE / name
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.is_file():
        assert names_torch(file.read_text(encoding="utf-8"), module_of(file)) == [], file


@pytest.mark.parametrize("source,module,bad", [
    ("from jevons.store import files", "model.moe", True),
    ("import jevons.train.loop", "engine.engine", True),
    ("def f():\n    from jevons.serve import api", "store.files", True),
    ("from ..train import loop", "engine.engine", True),
    ("from . import types", "engine.engine", False),
    ("from .types import Request", "engine.engine", False),
    ("from jevons import reason", "serve.api", True),
    ("from jevons import __version__", "serve.api", False),
    ("from jevons.config import ModelConfig\nimport torch", "model.moe", False),
    ("from jevons.recipe import Recipe", "chat", True),
    ("from jevons.attic import x", "cli", True),
])
def test_the_rule_itself(source, module, bad):
    assert bool(list(violations(source, ("jevons", *module.split("."))))) == bad


def test_torch_is_found_wherever_it_hides():
    for source in ("import torch", "import torch.nn as nn", "from torch import nn", "def f():\n    from torch.nn import Module"):
        assert names_torch(source, ("jevons", "chat"))
    assert not names_torch("import torchlike\nfrom jevons.torch import x", ("jevons", "chat"))


def test_the_package_stays_small():
    sizes = {p: sum(1 for line in p.read_text(encoding="utf-8").splitlines() if line.strip()) for p in files()}
    longest = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in files()}
    assert sum(sizes.values()) < 18_000
    assert {name: n for name, n in longest.items() if n > 400} == {}


@pytest.mark.parametrize("path", sorted([*ROOT.glob("experiments/*.py"), *ROOT.glob("benchmarks/*.py")]), ids=lambda p: p.name)
def test_scripts_name_what_exists(path):
    """A name that moved within the package would show in no other test of a script that takes minutes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jevons":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), (
                    f"line {node.lineno}: {node.module} has no {alias.name}")
