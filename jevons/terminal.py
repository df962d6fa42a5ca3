"""What the commands do, for a person at a terminal: progress bars, the server beside a run, the chat."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

CHAT_STEPS = 64  # engine steps that chat may take between two training steps
CHAT_BATCH = 16


class StopSignal:
    """Ctrl-C (or SIGTERM) once: stop at the next step, with the state saved. Twice: stop at once; the last save stays."""

    def __init__(self, console: Console):
        self.console, self.asked = console, False
        self.on_stop = lambda: None

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            os._exit(130)  # saves are atomic: whatever was being written is as if it had never begun
        self.asked = True
        self.on_stop()
        os.write(2, b"\nstopping after this step; once more to stop at once\n")


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
            self.beside.show(model, tokenizer, name)

    def on_stage(self, name: str, done: int, budget: int) -> None:
        self._name = name
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


class Beside:
    """The HTTP server beside a run, or after it. The thread that made it owns the engine."""

    def __init__(self, address: tuple[str, int], dollars_per_hour: float, task: Any, taught: str, metrics: Path | None,
                 max_waiting: int = 128, allow_hosts: list[str] | None = None, api_key: str | None = None):
        from jevons.serve.app import ServeSettings, Server, create_app
        from jevons.serve.host import EngineHost
        from jevons.serve.pages import PageInfo

        self.tokenizer: Any = None
        self.training: str | None = None
        self.host = EngineHost(max_waiting=max_waiting)
        examples = getattr(task, "examples", None)
        questions = examples() if examples else []
        hashes = (hashlib.sha256(api_key.encode()).hexdigest(),) if api_key else ()
        settings = ServeSettings(host=address[0], port=address[1], dollars_per_hour=dollars_per_hour,
                                 allow_hosts=tuple(allow_hosts or ()), api_key_hashes=hashes)
        page = PageInfo(model=lambda: self.host.model_name, taught=lambda: taught, examples=lambda: questions,
                        dollars_per_hour=dollars_per_hour, training=lambda: self.training)
        self.server = Server(create_app(self.host, lambda: self.tokenizer, settings, page, metrics), settings)
        self.server.start()

    def show(self, model: Any, tokenizer: Any, name: str, max_batch: int = CHAT_BATCH) -> None:
        """Answer with this model from now on."""
        from jevons.engine.engine import Engine

        self.host.set_engine(None)
        self.tokenizer = tokenizer
        self.host.set_engine(Engine(model, tokenizer.eos_id, max_batch=max_batch, max_waiting=4 * max_batch,
                                    max_len=model.config.max_position_embeddings, tokenizer=tokenizer), name)

    def run_forever(self, stop: StopSignal) -> None:
        """Serve until Ctrl-C."""
        stop.on_stop = self.host.stop
        try:
            if not stop.asked:
                self.host.run_forever()
        finally:
            self.server.stop()


def _use_threads() -> Any:
    """The runtime, with torch set to its threads (OMP_NUM_THREADS wins)."""
    import torch

    from jevons.runtime import Runtime

    runtime = Runtime.detect()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(runtime.threads)
    return runtime


def run_recipe(name: str, out: Path | None, only_stage: str | None = None, address: tuple[str, int] | None = None,
               serve_after: bool = False) -> None:
    """`jevons run`, and with an `address` `jevons up`."""
    from jevons.recipe import load_recipe
    from jevons.tasks.registry import load_task

    console = Console(stderr=True)
    recipe, text = load_recipe(name)
    out = out or Path("runs") / recipe.name
    task = load_task(recipe.task.name, recipe.task.args)
    describe = getattr(task, "describe", None)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal(console))
        beside = None
        if address is not None:
            beside = Beside(address, recipe.cost.dollars_per_hour, task, describe() if describe else recipe.description,
                            out / "metrics.jsonl")
            stack.callback(beside.server.stop)
            console.print(f"[bold]watch it learn[/]  {beside.server.url}/runs\n[bold]talk to it[/]      {beside.server.url}/")
            _open_page(f"{beside.server.url}/runs")
        final = _run(recipe, text, out, console, stop, beside, only_stage)
        if final is None:
            raise SystemExit(130)
        _summary(out, console)
        if beside is not None and serve_after and only_stage is None:
            from jevons.store.checkpoint import load_checkpoint

            loaded = load_checkpoint(final)
            beside.training = None
            beside.show(loaded.model, loaded.tokenizer, recipe.name)
            console.print(f"[bold]served[/] at {beside.server.url}/  (Ctrl-C ends it)")
            beside.run_forever(stop)


def _run(recipe: Any, text: str, out: Path, console: Console, stop: StopSignal, beside: Beside | None,
         only_stage: str | None) -> Path | None:
    """The stages; None when asked to stop."""
    from jevons.reason.pipeline import Run
    from jevons.train.loop import Interrupted

    runtime = _use_threads()
    watch = Watch(console, stop, beside)
    job = Run(recipe, text, out, watch, runtime)
    try:
        with watch.bar:
            return job.execute(only_stage)
    except Interrupted as reason:
        console.print(f"{reason}. The same command goes on from there.")
        return None


def _open_page(url: str) -> None:
    """Open the browser where there is a desktop to open it on."""
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        import webbrowser

        webbrowser.open(url)


def _summary(out: Path, console: Console) -> None:
    """The scores of a finished run."""
    import json

    from rich.table import Table

    table = Table("checkpoint", "right", "95 % interval", "problems", "thinking tokens", "MTP accepted", box=None, header_style="dim")
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        r = json.loads(line)
        if r["kind"] == "eval":
            mtp = f"{r['mtp_acceptance']:.1%}" if "mtp_acceptance" in r else "-"
            table.add_row(r["name"], f"{r['accuracy']:.1%}", f"{r['low']:.1%} to {r['high']:.1%}", str(r["n"]),
                          f"{r['thinking_length']:.0f}", mtp)
    if table.rows:
        console.print(table)
    if (out / "report.html").exists():
        console.print(f"report: {out / 'report.html'}")


def _trained_task(provenance: dict[str, Any], name: str | None = None, args: dict[str, Any] | None = None) -> Any:
    """The task named, or the one the checkpoint was trained on. Raises ValueError where there is neither."""
    from jevons.tasks.registry import load_task, portable_name

    trained = provenance.get("task") or {}
    name = portable_name(name) if name else trained.get("name")
    if name is None:
        raise ValueError("the checkpoint does not say which task it was trained on; give --task")
    own = trained.get("args", {}) if trained.get("name") == name else {}
    return load_task(name, own | (args or {}))


def evaluate_checkpoint(checkpoint: Path, task: str | None, numbers: int | None, n: int, seed: int, samples: int,
                        temperature: float, max_tokens: int, as_json: bool, dump: Path | None) -> None:
    import json

    from jevons.store.checkpoint import load_checkpoint

    _use_threads()
    loaded = load_checkpoint(checkpoint)
    the_task = _trained_task(loaded.provenance, task, {"numbers": numbers} if numbers is not None else None)
    from jevons.reason.evaluate import evaluate

    console = Console(stderr=True)
    with console.status(f"{n} problems"):
        result, _ = evaluate(loaded.model, loaded.tokenizer, the_task, n, seed, max_tokens, samples, temperature, dump=dump)
    if as_json:
        print(json.dumps({"checkpoint": str(checkpoint), "task": the_task.name, "seed": seed} | result.record()))
        return
    print(f"pass@1           {result.accuracy:.1%}  (95 % interval {result.low:.1%} to {result.high:.1%}, {n} problems)")
    if result.pass_at_k is not None:
        print(f"pass@{samples:<11} {result.pass_at_k:.1%}")
    print(f"thinking tokens  {result.thinking_length:.1f}\ntruncated        {result.truncated:.1%}")
    if result.mtp_acceptance is not None:
        print(f"MTP accepted     {result.mtp_acceptance:.1%}")


def serve_checkpoint(checkpoint: Path, host: str, port: int, max_batch: int, max_waiting: int, dollars_per_hour: float,
                     allow_hosts: list[str], api_key: str | None) -> None:
    from jevons.store.checkpoint import load_checkpoint

    _use_threads()
    loaded = load_checkpoint(checkpoint)
    task = None
    with contextlib.suppress(ValueError):  # a foreign checkpoint was taught something we do not know
        task = _trained_task(loaded.provenance)
    console = Console(stderr=True)
    with StopSignal(console) as stop:
        taught = loaded.provenance.get("taught") or loaded.config.architecture
        beside = Beside((host, port), dollars_per_hour, task, taught, None, max_waiting, allow_hosts, api_key)
        beside.show(loaded.model, loaded.tokenizer, loaded.provenance.get("recipe") or checkpoint.resolve().name, max_batch)
        console.print(f"[bold]serving[/] {checkpoint} at {beside.server.url}/  (API: {beside.server.url}/v1, Ctrl-C ends it)")
        beside.run_forever(stop)


def chat_with(checkpoint: Path, temperature: float, max_tokens: int) -> None:
    """A loop of questions; Ctrl-C ends an answer, Ctrl-D the chat."""
    from jevons.engine.engine import Engine
    from jevons.store.checkpoint import load_checkpoint

    _use_threads()
    loaded = load_checkpoint(checkpoint)
    console = Console(highlight=False)
    engine = Engine(loaded.model, loaded.tokenizer.eos_id, max_batch=1, tokenizer=loaded.tokenizer,
                    max_len=loaded.config.max_position_embeddings)
    console.print(f"[dim]{loaded.provenance.get('taught') or loaded.config.architecture}. Ctrl-D ends the chat.[/]")
    seed = 0
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not question:
            continue
        seed += 1
        try:
            for thought, answer in _answer(engine, loaded.tokenizer, question, temperature, max_tokens, seed):
                console.print(thought, style="dim", end="", markup=False)
                console.print(answer, style="bold", end="", markup=False)
        except KeyboardInterrupt:
            for sequence in list(engine.scheduler.running):
                engine.cancel(sequence.request.request_id)
        except ValueError as error:  # a question longer than the context
            console.print(str(error), style="red", markup=False)
        console.print()


def _answer(engine: Any, tokenizer: Any, question: str, temperature: float, max_tokens: int, seed: int) -> Iterator[tuple[str, str]]:
    """(thought, answer) pieces as they come."""
    from jevons.chat import ReasoningParser
    from jevons.engine.types import Request, SamplingParams

    parser, stream = ReasoningParser(), tokenizer.decode_stream()
    engine.submit(Request(tokenizer.renderer().question(question), SamplingParams(max_tokens, temperature, seed=seed)))
    while engine.has_work:
        for event in engine.step():
            if event.error:
                raise ValueError(event.error)
            text = stream.step(event.token_id) if event.token_id is not None else None
            if text:
                yield parser.feed(text)
    yield parser.finish()


def describe(checkpoint: Path | None) -> dict[str, Any]:
    """`jevons info`: the machine, or a checkpoint."""
    from jevons.runtime import Runtime

    if checkpoint is None:
        return Runtime.detect().describe()
    from jevons.config import ModelConfig
    from jevons.plan import count_parameters, kv_bytes_per_token
    from jevons.store.checkpoint import read_provenance

    config = ModelConfig.load(checkpoint)
    counts = asdict(count_parameters(config))
    values: dict[str, Any] = {"architecture": config.architecture, "layers": config.num_hidden_layers, "hidden size": config.hidden_size,
                              "vocabulary": config.vocab_size, "context": config.max_position_embeddings,
                              "parameters": f"{counts['total']:,}", "of these active": f"{counts['active']:,}"}
    if config.is_moe:
        values["experts"] = f"{config.n_routed_experts} routed, {config.num_experts_per_tok} a token, {config.n_shared_experts} shared"
    if counts["mtp"]:
        values["MTP module"] = f"{counts['mtp']:,}"
    values["cache bytes a token (bf16)"] = kv_bytes_per_token(config)
    provenance = read_provenance(checkpoint)
    values |= {k: v for k, v in provenance.items() if k not in ("recipe_text", "scores", "task")}
    for score in provenance.get("scores", []):
        values[f"score of {score['name']}"] = f"{score['accuracy']:.1%} right of {score['n']} held-out problems"
    return values
