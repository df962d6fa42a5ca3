"""What resuming needs, in full precision and without pickle: tensors by name and a JSON object.

    STAGE/train_state/step-00000050/{state.safetensors, meta.json}

A step's directory appears by one rename after everything in it is on the disk; the last two are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from jevons.store.files import CheckpointError, StoreError, fsync, temporary

KEEP = 2
_STEP = re.compile(r"step-(\d{8,})")
_log = logging.getLogger(__name__)


def save_train_state(stage_dir: str | Path, step: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> Path:
    """Store one step and drop all but the last two. Raises StoreError, the steps before intact, when the disk refuses."""
    root = Path(stage_dir) / "train_state"
    final = root / f"step-{step:08d}"
    unfinished = temporary(final)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        # clone: the format holds no views of one storage, and parameters often are
        save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()},
                  unfinished / "state.safetensors")
        fsync(unfinished / "state.safetensors")
        record = {"step": step, "sha256": _sha256(unfinished / "state.safetensors"), "meta": meta}
        with open(unfinished / "meta.json", "w", encoding="utf-8") as file:
            json.dump(record, file, ensure_ascii=False, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        fsync(unfinished)
        replaced = None
        if final.exists():  # a step saved twice: a directory cannot be renamed over another
            replaced = final.with_name(f"{final.name}.old-{os.getpid()}")
            os.rename(final, replaced)
        os.rename(unfinished, final)
        fsync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise StoreError(getattr(error, "errno", None), f"{final} could not be written: {error}") from error
    except BaseException:  # a value JSON cannot hold, or Ctrl-C
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)
    for old in _steps(root)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_latest(stage_dir: str | Path) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
    """(step, tensors on the CPU, meta) of the newest whole step, or None. Damaged ones are passed over with a warning,
    what a killed process left half done is cleared away. Call it with the run directory locked."""
    root = Path(stage_dir) / "train_state"
    if not root.is_dir():
        return None
    for leftover in sorted(root.glob("step-*.old-*")):  # killed between the two renames of a step saved twice
        if not (final := leftover.with_name(leftover.name.partition(".")[0])).exists():
            os.rename(leftover, final)
    for leftover in root.glob("step-*.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in reversed(_steps(root)):
        try:
            return _load(path)
        except CheckpointError as error:
            _log.warning("%s; going back to the step before", error)
    return None


def _load(path: Path) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]]:
    tensors_file, meta_file = path / "state.safetensors", path / "meta.json"
    try:
        record = json.loads(meta_file.read_text(encoding="utf-8"))
        step, expected, meta = record["step"], record["sha256"], record["meta"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{meta_file} cannot be read ({type(error).__name__}: {error})") from error
    try:
        if _sha256(tensors_file) != expected:
            raise CheckpointError(f"{tensors_file} does not have the checksum that meta.json gives")
        return step, load_file(tensors_file), meta
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{tensors_file} cannot be read ({error})") from error


def _steps(root: Path) -> list[Path]:
    """Whole steps, oldest first."""
    return sorted((p for p in root.iterdir() if _STEP.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
