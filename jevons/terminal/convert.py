"""`jevons convert`: the progress bar, and what is said when it is done."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


def convert_checkpoint(checkpoint: Path, to: str, out: Path | None, gguf_type: str | None, force: bool) -> None:
    from jevons.store.convert import convert

    bar = Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn(),
                   console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task(f"to {to}", total=None)
        done = convert(checkpoint, to, out, gguf_type, force,
                       lambda now, total: bar.update(task, completed=now, total=total))
    for note in done.notes:
        print(f"note: {note}")
    print(f"wrote {done.path}{os.sep if done.path.is_dir() else ''}: {done.tensors} tensors, {done.nbytes / 2**20:,.1f} MiB")
