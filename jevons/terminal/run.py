"""`jevons run` and `jevons up`: progress bars, and the server that watches and chats beside them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jevons.terminal.beside import Beside, StopSignal, use_threads

CHAT_STEPS = 64  # engine steps that chat may take between two training steps


class Watch:
    """A run's observer (`reason.pipeline.Observer`): the progress bar and, with a server beside it, the chat."""

    def __init__(self, console: Console, stop: StopSignal, beside: Beside | None = None):
        self.stop, self.beside = stop, beside
        self.bar = Progress(TextColumn("[bold]{task.description:<9}"), BarColumn(bar_width=24), TaskProgressColumn(),
                            TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn(), TextColumn("left"),
                            TimeRemainingColumn(elapsed_when_finished=False), TextColumn("[dim]{task.fields[numbers]}"),
                            console=console, refresh_per_second=4)
        self._task: Any = None
        self._name = ""

    def on_model(self, model: Any, tokenizer: Any, name: str) -> None:
        if self.beside is not None:
            self.beside.show(model, tokenizer, name, final=False)

    def on_stage(self, name: str, done: int, budget: int) -> None:
        self._name = name
        self.bar.start()
        self._task = self.bar.add_task(name, total=budget, completed=done, numbers="")
        self._say(done, budget)

    def on_step(self, record: dict[str, Any], budget: int) -> None:
        self.bar.update(self._task, completed=record["step"], numbers=_numbers(record))
        self._say(record["step"], budget)
        if self.beside is not None:
            self.beside.host.pump(CHAT_STEPS)

    def should_stop(self) -> bool:
        return self.stop.asked

    def _say(self, step: int, budget: int) -> None:
        if self.beside is not None:
            self.beside.training = f"{self._name}, step {step} of {budget}" if step < budget else None


def _numbers(record: dict[str, Any]) -> str:
    """The few figures that fit behind a progress bar."""
    shown = []
    if record.get("accuracy") is not None:
        shown.append(f"right {record['accuracy']:.0%}")
    elif record.get("loss") is not None:
        shown.append(f"loss {record['loss']:.3f}")
    if "time.tokens_per_second" in record:
        shown.append(f"{record['time.tokens_per_second'] / 1000:.1f}k tok/s")
    if "time.dollars" in record:
        shown.append(f"${record['time.dollars']:.4f}")
    return "  ".join(shown)


def run_recipe(name: str, out: Path | None, only_stage: str | None = None, address: tuple[str, int] | None = None,
               serve_after: bool = False, device: str = "cpu", sets: list[str] | None = None, mesh: str | None = None) -> None:
    """`jevons run`, and with an `address` `jevons up`. `mesh` takes the place of the recipe's."""
    from jevons.recipe import load_recipe
    from jevons.recipe.mesh import check_processes, override, processes
    from jevons.tasks.registry import load_task

    console, runtime = Console(stderr=True), use_threads(device)
    recipe, text = load_recipe(name, sets)
    out = out or Path("runs") / recipe.name
    if mesh is not None:
        recipe = recipe.model_copy(update={"mesh": override(recipe.mesh, mesh)})
    check_processes(recipe.mesh, processes())
    if processes() > 1 and address is not None:
        raise ValueError("`jevons up` trains and serves in one process; `jevons run` under torchrun, then `jevons serve`, would "
                         "be right")
    task = load_task(recipe.task.name, recipe.task.args) if recipe.task else None
    describe = getattr(task, "describe", None)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        beside = None
        if address is not None:
            beside = Beside(address, recipe.cost.dollars_per_hour, task, describe() if describe else recipe.description,
                            out / "metrics.jsonl")
            stack.callback(beside.server.stop)
            console.print(f"[bold]watch it learn[/]  {beside.server.url}/runs\n[bold]talk to it[/]      {beside.server.url}/")
            _open_page(f"{beside.server.url}/runs")
        final = _run(recipe, text, out, console, stop, beside, only_stage, runtime)
        if final is None:
            raise SystemExit(stop.code)
        if int(os.environ.get("RANK", "0")) > 0:
            return
        _summary(out, console)
        if beside is not None and serve_after and only_stage is None:
            from jevons.store.checkpoint import load_checkpoint

            loaded = load_checkpoint(final, device=runtime.device)
            beside.training = None
            beside.show(loaded.model, loaded.tokenizer, recipe.name)
            console.print(f"[bold]served[/] at {beside.server.url}/  (Ctrl-C ends it)")
            beside.run_forever(stop)


def _run(recipe: Any, text: str, out: Path, console: Console, stop: StopSignal, beside: Beside | None,
         only_stage: str | None, runtime: Any) -> Path | None:
    """The stages; None when asked to stop."""
    from jevons.reason.pipeline import Run
    from jevons.train.loop import Interrupted

    if recipe.mesh.size > 1:
        from jevons.train.parallel.mesh import World

        world = World.open(recipe.mesh, runtime.device)
        if not world.leads:
            return _follow(recipe, text, out, stop, world, runtime)
    else:
        world = None
    watch = Watch(console, stop, beside)
    job = Run(recipe, text, out, watch, runtime, world)
    try:
        try:
            if world is None:
                return job.execute(only_stage)
            with world.lost():
                final = job.execute(only_stage)
            world.close()
            return final
        finally:
            if watch.bar.tasks:  # begun by the first stage: a run that is refused leaves no blank line
                watch.bar.stop()
    except Interrupted as reason:
        console.print(f"{reason}. The same command goes on from there.", soft_wrap=True, markup=False)
        return None


def _follow(recipe: Any, text: str, out: Path, stop: StopSignal, world: Any, runtime: Any) -> Path | None:
    """The run on a process that does not lead."""
    from jevons.reason.follow import Follower, Quiet
    from jevons.train.loop import Interrupted

    stop.notice = ""
    try:
        with world.lost():
            Follower(recipe, text, out, Quiet(stop), runtime, world).execute()
        world.close()
        return out
    except Interrupted:
        return None


def _open_page(url: str) -> None:
    """Open the browser where there is a desktop to open it on."""
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        import webbrowser

        webbrowser.open(url)


def _summary(out: Path, console: Console) -> None:
    """The scores of a finished run."""
    from rich.table import Table

    table = Table("checkpoint", "right", "95 % interval", "problems", "thinking tokens", "MTP accepted", box=None,
                  header_style="dim")
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        r = json.loads(line)
        if r["kind"] == "eval":
            mtp = f"{r['mtp_acceptance']:.1%}" if "mtp_acceptance" in r else "-"
            table.add_row(r["name"], f"{r['accuracy']:.1%}", f"{r['low']:.1%} to {r['high']:.1%}", str(r["n"]),
                          f"{r['thinking_length']:.0f}", mtp)
    if table.rows:
        console.print(table)
    if (out / "report.html").exists():
        console.print(f"report: {out / 'report.html'}", soft_wrap=True)
