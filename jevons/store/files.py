"""Files that are either whole or not there: temporary name, fsync, rename."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint or train state that cannot be read; the message names the file and, where there is one, the tensor."""


class StoreError(OSError):
    """Something that could not be written; what was there before is intact."""


def fsync(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary(path: Path) -> Path:
    """A name beside `path` for its unfinished version."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step. Raises StoreError, the old file kept, when the disk refuses."""
    unfinished = temporary(path)
    try:
        with open(unfinished, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        fsync(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise StoreError(error.errno, f"{path} could not be written: {error.strerror}") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Plainly, into a directory that is not in its place yet. Raises OSError."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
