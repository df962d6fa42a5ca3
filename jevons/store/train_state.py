"""What resuming needs, in full precision and without pickle: tensors by name and a JSON object.

    STAGE/train_state/step-00000050/{state.safetensors, meta.json}

A step's directory appears by one rename after everything in it is on the disk. The last `keep` stay, and what is `spared`;
`best` is a link to the best of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from jevons.store.files import CheckpointError, StoreError, fsync, temporary

KEEP = 2
_STEP = re.compile(r"step-(\d{8,})")
_log = logging.getLogger(__name__)


def snapshot(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, each with storage of its own: the format holds no views, and training goes on meanwhile."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def save_train_state(stage_dir: str | Path, step: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any],
                     keep: int = KEEP, spared: Collection[int] = ()) -> Path:
    """Store one step and drop all but the last `keep` and those `spared`. Raises StoreError, the steps before intact, when the
    disk refuses."""
    return write_train_state(stage_dir, step, snapshot(tensors), meta, keep, spared)


def write_train_state(stage_dir: str | Path, step: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any],
                      keep: int = KEEP, spared: Collection[int] = ()) -> Path:
    """The same for tensors that are a snapshot already."""
    root = Path(stage_dir) / "train_state"
    final = root / f"step-{step:08d}"
    unfinished = temporary(final)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_file(tensors, unfinished / "state.safetensors")
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
    for old in _steps(root)[:-keep]:
        if int(old.name[5:]) not in spared:
            shutil.rmtree(old, ignore_errors=True)
    return final


def mark_best(stage_dir: str | Path, step: int) -> None:
    """Let the link `best` name this step, in one rename. Raises StoreError when the disk refuses."""
    link = Path(stage_dir) / "train_state" / "best"
    unfinished = temporary(link)
    try:
        unfinished.unlink(missing_ok=True)
        unfinished.symlink_to(f"step-{step:08d}")
        os.replace(unfinished, link)
    except OSError as error:
        raise StoreError(error.errno, f"{link} could not be written: {error.strerror}") from error


def load_step(stage_dir: str | Path, step: int) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]]:
    """One step, as `load_latest` gives it. Raises CheckpointError where it is damaged or not there."""
    return _load(Path(stage_dir) / "train_state" / f"step-{step:08d}")


def drop_after(stage_dir: str | Path, step: int) -> None:
    """Remove the steps after `step`, newest first."""
    for path in reversed(_steps(Path(stage_dir) / "train_state")):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


class Writer:
    """One thread that writes states while training goes on; never two at once."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "states")
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Begin to write, after what is being written is done. Raises what that raised."""
        self.wait()
        self._pending = self._pool.submit(write)

    def check(self) -> None:
        """Raises what the last write raised, once it has ended."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises StoreError, the steps before intact, where the disk refused."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        self._pool.shutdown()


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
    for leftover in root.glob("best.tmp-*"):
        leftover.unlink()
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
