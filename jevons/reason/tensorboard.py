"""metrics.jsonl as TensorBoard scalars, written anew after each stage: a resumed or rolled-back run leaves no doubled points."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from jevons.reason.against_plan import kept_steps


def write_tensorboard(metrics: Path, directory: Path) -> None:
    """Every number of every step line as `stage/key`."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    shutil.rmtree(directory, ignore_errors=True)
    with SummaryWriter(str(directory)) as writer:
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        for stage in dict.fromkeys(line["stage"] for line in lines if line["kind"] == "step"):
            for record in kept_steps(lines, stage):
                for key, value in record.items():
                    if isinstance(value, int | float) and key not in ("step", "time.unix"):
                        writer.add_scalar(f"{stage}/{key}", value, record["step"], walltime=record["time.unix"])
