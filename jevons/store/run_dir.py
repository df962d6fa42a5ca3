"""The run directory: recipe, lock, metrics, stages, final checkpoint. One run at a time writes to it.

    OUT/recipe.toml lock metrics.jsonl tensorboard/ report.html stages/00-pretrain/ ... final/
"""

from __future__ import annotations

import difflib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jevons.store.files import StoreError, write_text


class RunDirError(ValueError):
    """A run directory that cannot be used; the message says why and what to do."""


class RunDir:
    """Paths of one run, its lock and its recipe."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def stage(self, index: int, name: str) -> Path:
        return self.path / "stages" / f"{index:02d}-{name}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory, made if need be. Raises RunDirError naming the process that has it. The kernel lets go of
        the lock when the process ends, however it ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "a+", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                pid = file.read().strip() or "unknown"
                raise RunDirError(f"{self.path} is in use by process {pid}; end it, or give another --out") from None
            for leftover in [*self.path.glob("*.tmp-*"), *self.path.glob("stages/*/*.tmp-*")]:  # of a killed process
                leftover.unlink()
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)  # before the lock goes: a stale pid would name an innocent process

    def keep_recipe(self, text: str) -> bool:
        """Store the recipe's exact text, or check that a started run has the same one: True when it resumes.

        Raises RunDirError with the difference if it was edited, and for a directory that holds something else.
        """
        if not self.recipe.exists():
            own = ("lock", self.recipe.name)
            foreign = sorted(p.name for p in self.path.iterdir() if not p.name.startswith(own)) if self.path.is_dir() else []
            if foreign:
                raise RunDirError(f"{self.path} holds {foreign[0]!r} but no recipe.toml, so it is no run's; give another --out")
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.recipe, text)
            return False
        with open(self.recipe, encoding="utf-8", newline="") as file:
            before = file.read()
        if before == text:
            return True
        lines = [difflib.unified_diff(before.splitlines(), text.splitlines(), str(self.recipe), "this recipe", lineterm="", n=1)]
        changed = "\n".join(lines[0]) or "(only line endings differ)"
        raise RunDirError(f"{self.path} was begun with another recipe; undo the edit, or give another --out:\n{changed}")


class MetricsLog:
    """`metrics.jsonl`: one object a line, each written by one call. Opening it drops a line that a crash cut short."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115
        self._file.seek(0)
        data = self._file.read()
        if data and not data.endswith(b"\n"):
            self._file.truncate(data.rfind(b"\n") + 1)

    def append(self, record: dict[str, Any]) -> None:
        """Write one line. Numbers that JSON cannot hold become null. Raises StoreError when the disk refuses."""
        # ASCII: a model may write U+2028 or U+0085, which end a line for many readers
        line = json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):  # a full disk takes a part and raises only on the next write
                self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(size)
            raise StoreError(error.errno, f"{self.path} could not be written: {error.strerror}") from error

    def size(self) -> int:
        """Bytes so far, perhaps not all of them on the disk."""
        return os.fstat(self._file.fileno()).st_size

    def position(self) -> int:
        """Bytes so far, all of them on the disk: what a checkpoint notes."""
        os.fsync(self._file.fileno())
        return self.size()

    def truncate(self, position: int) -> None:
        """Go back to a noted position. Raises RunDirError if the file cannot be the one it was noted in."""
        size = os.fstat(self._file.fileno()).st_size
        self._file.seek(max(0, position - 1))
        if position > size or (position > 0 and self._file.read(1) != b"\n"):
            raise RunDirError(f"{self.path} has {size} bytes and no line that ends at byte {position}, where the checkpoint "
                              "expects one: it was edited; restore it, or give another --out")
        self._file.truncate(position)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """JSON's own types: tensors and numpy values by `tolist`, tuples as lists, NaN and infinities as None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
