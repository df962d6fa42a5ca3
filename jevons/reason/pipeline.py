"""Runs a recipe: each stage reads one checkpoint and writes the next. Killed anywhere, the same call goes on from there.

A stage's directory holds `begin.json` (how long metrics.jsonl was when it began), its train state while it runs, and a
checkpoint with provenance.json once it is complete. What was logged after the last saved state is dropped on resume and
written again, the same but for `time.*`.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from jevons import __version__
from jevons.config import ModelConfig, preset
from jevons.data.tokenizer import Tokenizer, train_tokenizer
from jevons.engine.engine import Engine
from jevons.model import CausalLM, build_model
from jevons.plan import count_parameters, dollars
from jevons.reason.evaluate import evaluate
from jevons.reason.grpo import GRPO
from jevons.reason.report import write_report
from jevons.reason.tensorboard import write_tensorboard
from jevons.recipe import EvalStage, GRPOStage, PretrainStage, Recipe
from jevons.recipe.mesh import check_model, spread_stage
from jevons.runtime import Runtime
from jevons.store.checkpoint import is_complete, load_checkpoint, read_provenance, save_checkpoint
from jevons.store.files import write_text
from jevons.store.run_dir import MetricsLog, RunDir
from jevons.tasks.base import Task
from jevons.tasks.registry import load_task, portable_name
from jevons.train.loop import Interrupted, Loop, LoopSettings
from jevons.train.objective import Objective
from jevons.train.pretrain import Pretrain

if TYPE_CHECKING:
    from jevons.train.parallel.mesh import World

BEGIN = "begin.json"
LEAST_PROMPT = 128  # tokens of room that rollouts leave for a prompt beside max_tokens; twice the longest of PROBED if more
PROBED = 64


class Observer(Protocol):
    """Who watches a run: the terminal, and the server's host where there is one. All calls come from the run's thread."""

    def on_model(self, model: CausalLM, tokenizer: Tokenizer, name: str) -> None:
        """A stage is about to train this model (its weights change in place)."""

    def on_stage(self, name: str, done: int, budget: int) -> None: ...

    def on_step(self, record: dict[str, Any], budget: int) -> None: ...

    def should_stop(self) -> bool: ...


class Run:
    """One recipe in one directory. `execute` runs what is left of it."""

    def __init__(self, recipe: Recipe, text: str, out: Path, observer: Observer, runtime: Runtime | None = None,
                 world: World | None = None):
        self.recipe, self.text, self.observer, self.world = recipe, text, observer, world
        self.dir = RunDir(out)
        self.runtime = runtime or Runtime.detect("cpu")
        self.task: Task = load_task(recipe.task.name, recipe.task.args)
        self._check()
        self.model: CausalLM | None = None
        self.tokenizer: Tokenizer | None = None

    def execute(self, only_stage: str | None = None) -> Path:
        """Run every stage that is not complete (or just `only_stage`); returns the directory of the last checkpoint.

        Raises Interrupted when the observer asked to stop, RunDirError for a busy or foreign directory or an edited
        recipe, ValueError for an unknown stage.
        """
        names = [self.recipe.stage_name(i) for i in range(len(self.recipe.stages))]
        if only_stage is not None and only_stage not in names:
            raise ValueError(f"stage {only_stage!r} is not one of {', '.join(names)}")
        with self.dir.lock():
            self.dir.keep_recipe(self.text)
            with MetricsLog(self.dir.metrics) as log:
                self.log = log
                for index, name in enumerate(names):
                    if self._is_done(index):  # perhaps killed right after that
                        self._log_once({"kind": "stage", "stage": name, "event": "end"})
                        shutil.rmtree(self.dir.stage(index, name) / "train_state", ignore_errors=True)
                    elif only_stage in (None, name):
                        self._check_stop(name)
                        self._stage(index)
                    if name == only_stage:
                        if self.world is not None:
                            self.world.tell(None)
                        return self.dir.stage(index, name)
                final = self._finish()
                if self.world is not None:
                    self.world.tell(None)
                return final

    def _check(self) -> None:
        """Raises ValueError for what could only fail later, with the directory already begun."""
        recipe = self.recipe
        for index, stage in enumerate(recipe.stages):
            if isinstance(stage, PretrainStage) and not callable(getattr(self.task, "trace", None)):
                raise ValueError(f"stage {recipe.stage_name(index)} pretrains on worked solutions, but the task "
                                 f"{recipe.task.name} has no method `trace`; write one, or leave the stage out and start "
                                 "from a model with `[model] from = DIR`")
        if self.world is not None:
            table = self.world.table
            check_model(table, ModelConfig.load(recipe.model.from_dir) if recipe.model.from_dir else self._config())
            for index, stage in enumerate(recipe.stages):
                spread_stage(table, stage, recipe.stage_name(index))
        if recipe.model.from_dir:
            ModelConfig.load(recipe.model.from_dir)
        elif (config := self._config()).vocab_size < recipe.tokenizer.vocab_size:
            raise ValueError(f"model.set.vocab_size {config.vocab_size} is less than tokenizer.vocab_size "
                             f"{recipe.tokenizer.vocab_size}; the embedding needs a row for every id")

    # -- stages -------------------------------------------------------------------------------------------------------

    def _stage(self, index: int) -> None:
        stage, name = self.recipe.stages[index], self.recipe.stage_name(index)
        directory = self.dir.stage(index, name)
        self._load_model(index)
        self._tell(index)
        self._begin(directory)
        self.observer.on_model(self.model, self.tokenizer, f"{self.recipe.name}-{name}")
        if isinstance(stage, EvalStage):
            self._evaluate(index, stage, directory)
        else:
            self._train(index, stage, directory)
        self._log_once({"kind": "stage", "stage": name, "event": "end"})
        if self.leads:
            write_tensorboard(self.dir.metrics, self.dir.tensorboard)

    @property
    def leads(self) -> bool:
        """Whether this process writes the run directory: the only one, or the first of many."""
        return self.world is None or self.world.leads

    def _tell(self, index: int) -> None:
        """The other processes, which wait for a stage to train."""
        if self.world is not None and self.leads and not isinstance(self.recipe.stages[index], EvalStage):
            self.world.tell((index, self.tokenizer))

    def _begin(self, directory: Path) -> None:
        """On first entry, note where the log stands."""
        if not (directory / BEGIN).exists():
            self._log_once(self._run_record())
            directory.mkdir(parents=True, exist_ok=True)
            write_text(directory / BEGIN, json.dumps({"metrics_position": self.log.position()}))

    def _from_the_start(self, directory: Path, name: str) -> None:
        """Drop what a try that left no state logged, and begin the stage."""
        self.log.truncate(json.loads((directory / BEGIN).read_text())["metrics_position"])
        self.log.append({"kind": "stage", "stage": name, "event": "start"})

    def _train(self, index: int, stage: PretrainStage | GRPOStage, directory: Path) -> None:
        name = self.recipe.stage_name(index)
        parallel, should_stop = None, self.observer.should_stop
        if self.world is not None:
            from jevons.train.parallel.layouts import layout

            stage = spread_stage(self.world.table, stage, name)
            parallel = layout(self.world.table, self.world, stage.kind, self.runtime.dtype)
            should_stop = lambda: self.world.agree(self.observer.should_stop())
        objective = self._objective(stage)
        settings = LoopSettings(
            stage=name, directory=directory, optimizer=stage.optimizer, save_every=stage.save_every, dtype=self.runtime.dtype,
            dollars_per_hour=self.recipe.cost.dollars_per_hour, should_stop=should_stop,
            on_step=self.observer.on_step, parallel=parallel)
        loop = Loop(self.model, objective, settings, self.log)
        done = loop.resume()
        if done == 0:
            self._from_the_start(directory, name)
        self.observer.on_stage(name, done, objective.steps)
        progress = loop.run()
        if parallel is not None:
            parallel.finish()
            self.model = parallel.gather(self.model)
            if not self.leads:
                return
        save_checkpoint(directory, self.model, self.tokenizer, self._provenance(index, {
            "steps": progress.step, "tokens": progress.tokens, "time.seconds": progress.seconds,
            "time.dollars": dollars(progress.seconds, self.recipe.cost.dollars_per_hour)}))
        shutil.rmtree(directory / "train_state", ignore_errors=True)

    def _objective(self, stage: PretrainStage | GRPOStage) -> Objective:
        if isinstance(stage, PretrainStage):
            return Pretrain(self.model, self.tokenizer, self.task, stage, self.recipe.seed)
        sequences, rng, render = stage.problems * stage.group_size, random.Random("prompt lengths"), self.tokenizer.renderer()
        prompt = max(LEAST_PROMPT, *(2 * len(render.question(self.task.sample(rng).prompt)) for _ in range(PROBED)))
        engine = Engine(self.model, self.tokenizer.eos_id, max_batch=min(sequences, 256), max_waiting=sequences,
                        max_len=min(self.model.config.max_position_embeddings, stage.max_tokens + prompt))
        objective = GRPO(self.model, self.tokenizer, self.task, stage, self.recipe.seed, engine)
        objective.dtype = self.runtime.dtype
        return objective

    def _evaluate(self, index: int, stage: EvalStage, directory: Path) -> None:
        """Greedy accuracy of every checkpoint so far, the recipe's own base included, on the same held-out problems."""
        name, records = self.recipe.stage_name(index), []
        self._from_the_start(directory, name)
        sources = {"base": Path(self.recipe.model.from_dir)} if self.recipe.model.from_dir else {}
        sources |= {self.recipe.stage_name(i): self._checkpoint(i) for i in self._trained(index)}
        self.observer.on_stage(name, 0, len(sources))
        for count, (which, source) in enumerate(sources.items()):
            began = time.monotonic()
            model = load_checkpoint(source).model
            result, _ = evaluate(model, self.tokenizer, self.task, stage.n, stage.seed, stage.max_tokens,
                                 on_step=lambda: self._check_stop(name))
            seconds = time.monotonic() - began
            records.append({"kind": "eval", "stage": name, "name": which,
                            "checkpoint": str(source.relative_to(self.dir.path) if which != "base" else source)}
                           | result.record() | {"time.seconds": seconds,
                                                "time.dollars": dollars(seconds, self.recipe.cost.dollars_per_hour)})
            self.observer.on_step(records[-1] | {"step": count + 1}, len(sources))
        for record in records:
            self.log.append(record)
        self.log.position()  # on the disk before the file that says so
        write_text(directory / "results.json", json.dumps(records, indent=2) + "\n")

    def _check_stop(self, name: str) -> None:
        if self.observer.should_stop():
            raise Interrupted(f"stopped in stage {name}; what it has saved is kept")

    # -- what stages stand on -----------------------------------------------------------------------------------------

    def _trained(self, before: int) -> list[int]:
        """The stages under `before` that leave a checkpoint."""
        return [i for i in range(before) if not isinstance(self.recipe.stages[i], EvalStage)]

    def _checkpoint(self, index: int) -> Path:
        """Where stage `index` left its checkpoint. Raises ValueError if it has not yet."""
        name = self.recipe.stage_name(index)
        directory = self.dir.stage(index, name)
        if not is_complete(directory):
            raise ValueError(f"{directory} holds no checkpoint yet; run stage {name} first")
        return directory

    def _is_done(self, index: int) -> bool:
        directory = self.dir.stage(index, self.recipe.stage_name(index))
        if isinstance(self.recipe.stages[index], EvalStage):
            return (directory / "results.json").exists()
        return is_complete(directory)

    def _load_model(self, index: int) -> None:
        """The model that stage `index` starts from: already in memory, the stage before's checkpoint, or the recipe's."""
        if self.model is not None:
            return
        before = self._trained(index)
        source = self._checkpoint(before[-1]) if before else self.recipe.model.from_dir
        if source is not None:
            loaded = load_checkpoint(source, dtype=torch.float32, changes=None if before else self.recipe.model.set)
            self.model, self.tokenizer = loaded.model, loaded.tokenizer
            return
        self.tokenizer = self.tokenizer or self._train_tokenizer()  # the leader's, where this process follows
        self.model = build_model(self._config(), seed=self.recipe.seed)

    def _config(self) -> ModelConfig:
        """Of the preset; its bos and eos are 0 and 1, which `train_tokenizer` gives them too."""
        return preset(self.recipe.model.preset, **({"vocab_size": self.recipe.tokenizer.vocab_size} | self.recipe.model.set))

    def _train_tokenizer(self) -> Tokenizer:
        rng = random.Random(f"tokenizer {self.recipe.seed}")

        def texts():
            for _ in range(self.recipe.tokenizer.samples):
                self._check_stop(self.recipe.stage_name(0))
                problem = self.task.sample(rng)
                yield problem.prompt
                yield self.task.trace(problem, rng)

        return train_tokenizer(texts(), self.recipe.tokenizer.vocab_size)

    # -- records ------------------------------------------------------------------------------------------------------

    def _run_record(self) -> dict[str, Any]:
        parameters = count_parameters(self.model.config)
        stages = []
        for i, stage in enumerate(self.recipe.stages):
            budget = {"pretrain": lambda s: max(1, round(s.tokens / s.batch_tokens)), "grpo": lambda s: s.steps}.get(stage.kind)
            stages.append({"name": self.recipe.stage_name(i), "kind": stage.kind, "unit": "steps" if budget else "problems",
                           "budget": budget(stage) if budget else stage.n})
        return {"kind": "run", "recipe": self.recipe.name, "description": self.recipe.description, "stages": stages,
                "parameters": parameters.total + parameters.mtp, "active_parameters": parameters.active,
                "dollars_per_hour": self.recipe.cost.dollars_per_hour, "task": self.recipe.task.name, "taught": self.taught(),
                "time.unix": time.time()}

    def taught(self) -> str:
        """One line for people: what the model learns here."""
        describe: Callable[[], str] | None = getattr(self.task, "describe", None)
        return describe() if describe else self.recipe.description or f"the task {self.task.name}"

    def _provenance(self, index: int, numbers: dict[str, Any]) -> dict[str, Any]:
        return {"jevons": __version__, "recipe": self.recipe.name, "recipe_text": self.text, "seed": self.recipe.seed,
                "task": {"name": portable_name(self.recipe.task.name), "args": self.recipe.task.args}, "taught": self.taught(),
                "stage": self.recipe.stage_name(index), "torch": torch.__version__, "cpu": self.runtime.cpu} | numbers

    def _log_once(self, record: dict[str, Any]) -> None:
        """Append a line that the log must hold exactly once (it may have been written before a kill)."""
        same = ("kind", "stage", "event")
        for line in self.dir.metrics.read_text(encoding="utf-8").splitlines():
            if all(json.loads(line).get(key) == record.get(key) for key in same):
                return
        self.log.append(record)

    def _finish(self) -> Path:
        """`final/`: the last trained checkpoint with all scores in its provenance; the report beside it."""
        trained = self._trained(len(self.recipe.stages))
        final = self.dir.final
        if not is_complete(final):
            source = self._checkpoint(trained[-1]) if trained else Path(self.recipe.model.from_dir)
            loaded = load_checkpoint(source)
            scores = [json.loads(line) for line in self.dir.metrics.read_text(encoding="utf-8").splitlines()]
            provenance = read_provenance(source) if trained else {"recipe": self.recipe.name, "taught": self.taught()}
            save_checkpoint(final, loaded.model, loaded.tokenizer,
                            provenance | {"scores": [s for s in scores if s["kind"] == "eval"]})
        seconds = self._total_seconds()
        self._log_once({"kind": "done", "time.seconds": seconds,
                        "time.dollars": dollars(seconds, self.recipe.cost.dollars_per_hour)})
        write_report(self.dir.metrics, self.dir.report)
        return final

    def _total_seconds(self) -> float:
        """Seconds of all stages: the last step's clock of each, and every evaluation's."""
        last: dict[str, float] = {}
        for line in self.dir.metrics.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["kind"] == "step":
                last[record["stage"]] = record["time.seconds"]
            elif record["kind"] == "eval":
                last[record["stage"]] = last.get(record["stage"], 0.0) + record["time.seconds"]
        return sum(last.values())
