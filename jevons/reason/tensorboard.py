"""metrics.jsonl as TensorBoard scalars, written anew after each stage: a resumed run leaves no doubled points."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def write_tensorboard(metrics: Path, directory: Path) -> None:
    """Every number of every step line as `stage/key`."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    shutil.rmtree(directory, ignore_errors=True)
    with SummaryWriter(str(directory)) as writer:
        for line in metrics.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["kind"] != "step":
                continue
            for key, value in record.items():
                if isinstance(value, int | float) and key not in ("step", "time.unix"):
                    writer.add_scalar(f"{record['stage']}/{key}", value, record["step"], walltime=record["time.unix"])
