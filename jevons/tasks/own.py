"""A user's own task, watched: what its methods raise, or give where something else would be right, is said in one line."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from typing import Any

from jevons.tasks.base import Problem, Reward


class TaskError(ValueError):
    """A task that cannot be loaded or used; the message names the file, class or argument and what would be right."""


def _finite(value: Any) -> bool:
    return isinstance(value, Reward) and all(isinstance(p, (int, float)) and math.isfinite(p) for p in value.parts.values())


_RIGHT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sample": (lambda value: isinstance(value, Problem), "a Problem"),
    "sample_heldout": (lambda value: isinstance(value, Problem), "a Problem"),
    "score": (_finite, "a Reward of finite numbers"),
    "trace": (lambda value: isinstance(value, str), "a text"),
    "describe": (lambda value: isinstance(value, str), "a text"),
    "examples": (lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value), "a list of texts"),
}


class OwnTask:
    """The task, but what the methods of `_RIGHT` raise is a TaskError, and so is a wrong result."""

    def __init__(self, task: Any, source: str):
        self._task, self._source = task, source

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_task"], name)
        return self._watched(name, value) if name in _RIGHT and callable(value) else value

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        right, words = _RIGHT[name]

        def watched(*args: Any) -> Any:
            where = f"task {self._source!r}: {name}"
            if name == "score":
                where += f" of problem {args[0].key!r} and the answer {args[1][-80:]!r}"
            try:
                value = call(*args)
            except Exception as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                raise TaskError(f"{where} raised {type(error).__name__}: {error} ({at.filename}, line {at.lineno})") from error
            if not right(value):
                raise TaskError(f"{where} gave {value!r:.200}; {words} would be right")
            return value

        return watched
