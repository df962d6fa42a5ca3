"""Tasks by name: the built-in ones, and a user's own class as `path/to/file.py:ClassName`. No torch here."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from jevons.tasks.base import Task
from jevons.tasks.own import OwnTask, TaskError

BUILT_IN = {"countdown": ("jevons.tasks.countdown", "Countdown")}


def load_task(name: str, args: dict[str, Any] | None = None) -> Task:
    """The task called `name`, made with `args`: a built-in name, or `path/to/file.py:ClassName` (the file is run).

    Raises TaskError for an unknown name, a missing file or class, arguments that the class refuses, and a class
    without `sample` or `score`.
    """
    if name.endswith(".py") or ".py:" in name:
        kind = _class_of_file(name)
    elif name in BUILT_IN:
        module, attribute = BUILT_IN[name]
        kind = getattr(importlib.import_module(module), attribute)
    else:
        near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(BUILT_IN)}."
        raise TaskError(f"task {name!r} is unknown; {hint} A task of your own is written path/to/file.py:ClassName")
    lacking = [method for method in ("sample", "score") if not callable(getattr(kind, method, None))]
    if lacking:
        missing = " and no method ".join(lacking)
        raise TaskError(f"task {name!r}: the class has no method {missing}; see jevons.tasks.base.Task")
    args = args or {}
    try:
        inspect.signature(kind).bind(**args)
    except TypeError as error:
        raise TaskError(f"task {name!r}: {error}; it takes {inspect.signature(kind)}") from None
    try:
        task = kind(**args)
    except Exception as error:
        kind_of = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise TaskError(f"task {name!r}: {kind_of}{error}") from error
    if not isinstance(getattr(task, "name", None), str):
        raise TaskError(f"task {name!r}: the class has no `name`; write name = {kind.__name__.lower()!r} in it")
    return OwnTask(task, name) if ".py:" in name else task


def portable_name(name: str) -> str:
    """A task's name with the path of its file made absolute, so that it is found from everywhere."""
    file, colon, kind = name.rpartition(":")
    return f"{Path(file).resolve()}{colon}{kind}" if file.endswith(".py") else name


def _class_of_file(name: str) -> type:
    file, _, attribute = name.rpartition(":")
    if not file.endswith(".py") or not attribute.isidentifier():
        raise TaskError(f"task {name!r}: write the file and the class in it, as in path/to/file.py:ClassName")
    path = Path(file)
    if not path.is_file():
        raise TaskError(f"task {name!r}: there is no file {path}")
    module_name = f"jevons_user_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise TaskError(f"task {name!r}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    kind = getattr(module, attribute, None)
    if not inspect.isclass(kind):
        classes = [k for k, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module_name]
        raise TaskError(f"task {name!r}: {path} has no class {attribute}; it has {', '.join(classes) or 'none'}")
    return kind
