"""The train state of many processes, through torch's DCP: sharded, saved while training goes on, read into any layout.

    STAGE/train_state/dcp-00000050/{.metadata, __0_0.distcp, ..., meta.json}

A directory gets its name by one rename after every file in it is whole, meta.json with their sizes last; the last two are kept.
DCP's metadata is pickled: only a run's own train_state is ever read. One process's states (`store/train_state.py`) lie beside
them; whichever is newer counts, so a run goes on from four processes to one and back.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Collection
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from jevons.model import CausalLM
from jevons.store.files import CheckpointError, StoreError, fsync, write_text
from jevons.store.train_state import load_latest, load_step

if TYPE_CHECKING:
    from jevons.train.parallel.mesh import World

KEEP = 2
META = "meta.json"
_STEP = re.compile(r"dcp-(\d{8,})")
_log = logging.getLogger(__name__)
Template = Callable[[str, torch.Size, torch.dtype], torch.Tensor | None]


class Writer:
    """Saves one step at a time; a save begun is whole before the next begins."""

    def __init__(self, world: World):
        self.world = world
        self._saved: Future | None = None  # done once the state has its name (on the leader) or its parts (elsewhere)

    def save(self, stage_dir: Path, step: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any], keep: int = KEEP,
             spared: Collection[int] = ()) -> None:
        """`keep` states stay, and the `spared` steps'. Raises StoreError, the steps before intact, where the disk refused the
        save before; `finish` raises it of this one."""
        self.finish()
        final = Path(stage_dir) / "train_state" / f"dcp-{step:08d}"
        aside = final.with_name(final.name + ".tmp")
        if self.world.leads:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier(group=self.world.talk)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = dcp.async_save({name: t.detach() for name, t in tensors.items()}, checkpoint_id=aside,
                                     process_group=self.world.saves)
        self._saved = written
        if self.world.leads:  # DCP's metadata comes last, after every process's files
            saved = self._saved = Future()

            def name_it(done: Future) -> None:
                try:
                    done.result()
                    saved.set_result(commit(aside, final, step, meta, keep, spared))
                except Exception as error:  # whatever it is, `finish` raises it
                    saved.set_exception(error)

            written.add_done_callback(name_it)

    def finish(self) -> None:
        """Wait for the save under way, on every process."""
        if self._saved is None:
            return
        saved, self._saved = self._saved, None
        try:
            saved.result()
        except Exception as error:  # DCP wraps what each process raised
            raise StoreError(None, f"the train state could not be written: {error}") from error
        dist.barrier(group=self.world.talk)


def commit(aside: Path, final: Path, step: int, meta: dict[str, Any], keep: int, spared: Collection[int]) -> None:
    """Name what is whole, and drop all but the last."""
    sizes = {p.name: p.stat().st_size for p in sorted(aside.iterdir())}
    for name in sizes:
        fsync(aside / name)
    write_text(aside / META, json.dumps({"step": step, "sizes": sizes, "meta": meta}, allow_nan=False))
    if final.exists():  # a step saved twice, with the same numbers
        shutil.rmtree(final)
    aside.rename(final)
    fsync(final.parent)
    for old in steps(final.parent)[:-keep]:
        if number(old) not in spared:
            shutil.rmtree(old, ignore_errors=True)


def newest(stage_dir: Path, step: int | None = None) -> Path | None:
    """The newest whole state under a stage's directory (or that of `step`), of many processes or of one; damaged ones are passed
    over with a warning, what a killed run left half done is cleared away."""
    root = Path(stage_dir) / "train_state"
    if step is not None:
        return next((p for p in (root / f"dcp-{step:08d}", root / f"step-{step:08d}") if p.is_dir()), None)
    if not root.is_dir():
        return None
    for leftover in root.glob("dcp-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    best: Path | None = None
    for path in reversed(steps(root)):
        try:
            read_meta(path)
            best = path
            break
        except CheckpointError as error:
            _log.warning("%s; going back to the step before", error)
    alone = load_latest(stage_dir)
    if alone is not None and (best is None or alone[0] > number(best)):
        return root / f"step-{alone[0]:08d}"
    return best


def read_meta(path: Path) -> dict[str, Any]:
    """{"step", "meta"} of a state. Raises CheckpointError where a file is missing or short."""
    try:
        record = json.loads((path / META).read_text(encoding="utf-8"))
        for name, size in record.get("sizes", {}).items():
            if (path / name).stat().st_size != size:
                raise CheckpointError(f"{path / name} has {(path / name).stat().st_size} bytes; meta.json says {size}")
        return {"step": record["step"], "meta": record["meta"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path / META} cannot be read ({type(error).__name__}: {error})") from error


def read(path: Path, template: Template, group: dist.ProcessGroup | None = None) -> dict[str, torch.Tensor]:
    """The tensors that `template` has a place for, each laid out as that place."""
    if path.name.startswith("step-"):
        _, tensors, _ = load_step(path.parent.parent, number(path))
        places = {name: template(name, t.shape, t.dtype) for name, t in tensors.items()}
        return {name: distribute_tensor(tensors[name], place.device_mesh, place.placements, src_data_rank=None)
                if isinstance(place, DTensor) else tensors[name] for name, place in places.items() if place is not None}
    reader = dcp.FileSystemReader(path)
    known = reader.read_metadata().state_dict_metadata
    places = {name: template(name, m.size, m.properties.dtype) for name, m in known.items() if hasattr(m, "properties")}
    wanted = {name: place for name, place in places.items() if place is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)
    return wanted


def whole(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The template of one process."""
    return torch.empty(shape, dtype=dtype)


def templates(model: CausalLM, others: dict[str, torch.Tensor]) -> Template:
    """Places as the model's own tensors have them; an optimizer's state lies as its parameter does."""
    parameters: dict[str, nn.Parameter | torch.Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())

    def template(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
        kind, _, rest = name.partition(".")
        if kind == "objective":
            return torch.empty_like(others[name], dtype=dtype) if name in others else None
        path = rest if kind == "model" else rest.partition(".")[2].rpartition(".")[0]
        like = parameters.get(path)
        if like is None:  # another stage's
            return None
        return torch.empty_like(like.detach(), dtype=dtype) if like.shape == shape else torch.empty(shape, dtype=dtype)

    return template


def load_any(stage_dir: Path, step: int | None = None) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
    """For one process: (step, whole tensors, meta) of the newest state that any layout left (or that of `step`)."""
    path = newest(stage_dir, step)
    if path is None or path.name.startswith("step-"):
        return load_latest(stage_dir) if step is None else load_step(stage_dir, step)
    record = read_meta(path)
    return record["step"], read(path, whole), record["meta"]


def number(path: Path) -> int:
    return int(path.name.partition("-")[2])


def steps(root: Path) -> list[Path]:
    """Whole steps, oldest first."""
    return sorted((p for p in root.iterdir() if _STEP.fullmatch(p.name)), key=number)
