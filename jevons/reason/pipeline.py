"""Runs a recipe: each stage reads one checkpoint and writes the next. Killed anywhere, the same call goes on from there.

A stage's directory holds `begin.json` (how long metrics.jsonl was when it began), its train state while it runs, and a
checkpoint with provenance.json once it is complete. What was logged after the last saved state is dropped on resume and
written again, the same but for `time.*`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from jevons import __version__
from jevons.config import ModelConfig
from jevons.data.tokenizer import Tokenizer
from jevons.model import CausalLM, build_model
from jevons.model.precision import fp8_settings, set_training_precision
from jevons.numerics.peak import peak_flops
from jevons.plan import count_parameters, dollars
from jevons.plan.counts import PlanError
from jevons.plan.fit import training_bytes
from jevons.plan.price import UTILISATION, Options, price_recipe
from jevons.reason import stages
from jevons.reason.evaluate import evaluate
from jevons.reason.report import write_report
from jevons.reason.teach import distil, new_student, sample_traces
from jevons.reason.tensorboard import write_tensorboard
from jevons.recipe import DistilStage, EvalStage, GRPOStage, PretrainStage, Recipe, SFTStage
from jevons.recipe.mesh import spread_stage
from jevons.recipe.stages import TrainedStage
from jevons.runtime import Runtime
from jevons.store.checkpoint import is_complete, load_checkpoint, read_provenance, save_checkpoint
from jevons.store.files import write_text
from jevons.store.run_dir import MetricsLog, RunDir
from jevons.tasks.base import Task
from jevons.tasks.registry import load_task, portable_name
from jevons.train.ema import Averaged
from jevons.train.loop import Interrupted, Loop, LoopSettings
from jevons.train.objective import Objective
from jevons.train.sft import SFT

if TYPE_CHECKING:
    from jevons.train.parallel.mesh import World

BEGIN = "begin.json"
EMA = "ema"  # the averaged weights' checkpoint, within the stage's directory


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
        self.task: Task | None = load_task(recipe.task.name, recipe.task.args) if recipe.task else None
        compute = recipe.precision.compute  # beside FP8 projections the machine's own precision
        self.dtype = {"float32": torch.float32, "bf16": torch.bfloat16}.get(compute, self.runtime.dtype)
        self._examples = stages.check(recipe, self.task, self.runtime)  # of every SFT stage
        self.model: CausalLM | None = None
        self.tokenizer: Tokenizer | None = None
        self._reading = ""
        self._peak: float | None = None  # measured when the first stage trains

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

    # -- stages -------------------------------------------------------------------------------------------------------

    def _stage(self, index: int) -> None:
        stage, name = self.recipe.stages[index], self.recipe.stage_name(index)
        directory = self.dir.stage(index, name)
        self._load_model(index)
        self._tell(index)
        self._begin(directory)
        if isinstance(stage, DistilStage):
            self._take_student(index, stage, directory)
        elif isinstance(stage, PretrainStage) and stage.context:
            self._take_context(self.model.config.with_context(stage.context, stage.yarn_factor))
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

    def _plan(self, index: int) -> dict[str, Any]:
        """What the plan says of a stage, before it runs. Its time is that of this machine, used as well as V3's report says."""
        stage = self.recipe.stages[index]
        try:
            priced = price_recipe(self.recipe, Options())["stages"][index]
        except PlanError as error:
            return {"kind": "note", "stage": self.recipe.stage_name(index), "text": f"there is no plan to compare with: {error}"}
        seconds = priced["flops"] / (self._peak * UTILISATION)
        return {"kind": "plan", "stage": self.recipe.stage_name(index), "tokens": priced["tokens"], "flops": priced["flops"],
                "memory": training_bytes(self.model.config, stage, threads=torch.get_num_threads(),
                                         recompute=self.recipe.precision.recompute),
                "utilisation": UTILISATION, "time.peak_flops": self._peak, "time.planned_seconds": seconds,
                "time.planned_dollars": dollars(seconds, self.recipe.cost.dollars_per_hour)}

    def _train(self, index: int, stage: TrainedStage, directory: Path) -> None:
        name, recipe = self.recipe.stage_name(index), self.recipe.precision
        parallel, should_stop = None, self.observer.should_stop
        if self.world is not None:
            from jevons.train.parallel.layouts import layout

            stage = spread_stage(self.world.table, stage, name)
            parallel = layout(self.world.table, self.world, stage.kind, self.dtype)
            should_stop = lambda: self.world.agree(self.observer.should_stop())
        fp8 = fp8_settings(recipe)
        set_training_precision(self.model, fp8)  # before a reference policy is copied from it
        objective = self._objective(index, stage, directory)
        self._peak = self._peak or peak_flops(self.runtime, self.dtype)
        settings = LoopSettings(
            stage=name, directory=directory, optimizer=stage.optimizer, save_every=stage.save_every, dtype=self.dtype,
            dollars_per_hour=self.recipe.cost.dollars_per_hour, guard=self.recipe.guard, moments=recipe.moments,
            fp8=fp8, recompute=recipe.recompute, should_stop=should_stop, may_abandon=parallel is None, peak_flops=self._peak,
            on_step=self.observer.on_step, parallel=parallel)
        loop = Loop(self.model, objective, settings, self.log)
        if stage.ema_decay:  # of the weights as they lie now
            loop.objective = objective = Averaged(objective, self.model, stage.ema_decay)
        done = loop.resume()
        if done == 0:
            self._from_the_start(directory, name)
            self.log.append(self._plan(index))
            for note in objective.opening():
                self.log.append({"kind": "note", "stage": name, "text": note})
        self.observer.on_stage(name, done, objective.steps)
        progress = loop.run()
        best = loop.states.restore_best() if self.recipe.guard.use_best else None
        provenance = self._provenance(index, {
            "steps": progress.step, "weights_of_step": best or progress.step, "tokens": progress.tokens,
            "time.seconds": progress.seconds,
            "time.dollars": dollars(progress.seconds, self.recipe.cost.dollars_per_hour)} | objective.scores())
        if isinstance(objective, Averaged):  # first: the stage is complete with its own checkpoint
            with objective.applied():
                stages.save(directory / EMA, self.model, self.tokenizer, provenance | {"ema_decay": objective.decay}, parallel)
        self.model = stages.save(directory, self.model, self.tokenizer, provenance, parallel)
        if self.leads:
            shutil.rmtree(directory / "train_state", ignore_errors=True)

    def _objective(self, index: int, stage: TrainedStage, directory: Path) -> Objective:
        seed = self.recipe.seed
        match stage:
            case PretrainStage():
                if self.world is not None and not self.leads:  # the leader makes the shards
                    self.world.meet()
                place = (self.world.replica, self.world.table.replicas) if self.world is not None else (0, 1)
                made = stages.pretrain(self.recipe, index, stage, self.model, self.tokenizer, self.task, self._data_dir(),
                                       self._read, place)
                if self.world is not None and self.leads:
                    self.world.meet()
                return made
            case SFTStage():
                return SFT.of(self.model, self.tokenizer, stage, seed)
            case DistilStage():
                return distil(self._teacher, self.model, self.tokenizer, directory, stage, seed)
        return stages.grpo(self.recipe, stage, self.model, self.tokenizer, self.task, self.dtype)

    def _read(self, which: str, read: int, total: int, rate: float) -> None:
        """Text is being tokenised."""
        self._check_stop(which)
        if which != self._reading:
            self._reading = which
            self.observer.on_stage(which, 0, total)
        self.observer.on_step({"stage": which, "step": read, "time.tokens_per_second": rate}, total)

    def _data_dir(self) -> Path:
        return Path(self.recipe.data and self.recipe.data.shards or self.dir.path / "data")

    def _evaluate(self, index: int, stage: EvalStage, directory: Path) -> None:
        """Greedy accuracy of every checkpoint so far, the recipe's own base included, on the same held-out problems."""
        name, records = self.recipe.stage_name(index), []
        self._from_the_start(directory, name)
        sources = {"base": Path(self.recipe.model.from_dir)} if self.recipe.model.from_dir else {}
        for i in self._trained(index):
            sources[self.recipe.stage_name(i)] = self._checkpoint(i)
            if self.recipe.stages[i].ema_decay:
                sources[f"{self.recipe.stage_name(i)}, averaged"] = self._checkpoint(i) / EMA
        self.observer.on_stage(name, 0, len(sources))
        for count, (which, source) in enumerate(sources.items()):
            began = time.monotonic()
            loaded = load_checkpoint(source, device=self.runtime.device)  # a student may have a tokenizer of its own
            result, _ = evaluate(loaded.model, loaded.tokenizer, self.task, stage.n, stage.seed, stage.max_tokens,
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

    def _check_stop(self, name: str, together: bool = False) -> None:
        """`together`: all processes ask at once, and stop where one is to."""
        asked = self.observer.should_stop()
        if self.world.agree(asked) if together and self.world else asked:
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
            self.model, self.tokenizer = loaded.model.to(self.runtime.device), loaded.tokenizer
            return
        if self.tokenizer is None:  # else the leader's: this process follows
            self.tokenizer = stages.first_tokenizer(self.recipe, self.task, self._data_dir(),
                                                    lambda: self._check_stop(self.recipe.stage_name(0)))
        self.model = build_model(stages.first_config(self.recipe), seed=self.recipe.seed).to(self.runtime.device)

    def _take_context(self, config: ModelConfig) -> None:
        """The same weights with another reach: rotary table and softmax scale follow from the config."""
        if config != self.model.config:
            model = build_model(config, device=self.model.embed_tokens.weight.device)
            model.load_state_dict(self.model.state_dict())
            self.model = model

    def _take_student(self, index: int, stage: DistilStage, directory: Path) -> None:
        """The model at hand teaches (or the stage's `teacher`); from here on the student is the model at hand."""
        name, teacher, tokenizer = self.recipe.stage_name(index), self.model, self.tokenizer
        if stage.teacher:
            earlier = {self.recipe.stage_name(i): i for i in self._trained(index)}
            source = self._checkpoint(earlier[stage.teacher]) if stage.teacher in earlier else stage.teacher
            loaded = load_checkpoint(source, dtype=torch.float32)
            teacher, tokenizer = loaded.model, loaded.tokenizer
        self.model, self.tokenizer = new_student(stage, teacher, tokenizer, self.recipe.seed)
        self._teacher = teacher
        self.observer.on_stage(f"{name}: answers", 0, 1)
        sample_traces(teacher, tokenizer, self.task, stage, self.recipe.seed, directory, lambda: self._check_stop(name, True),
                      lambda done, of: self.observer.on_step({"stage": name, "step": done / of}, 1), self.world)

    # -- records ------------------------------------------------------------------------------------------------------

    def _run_record(self) -> dict[str, Any]:
        parameters = count_parameters(self.model.config)
        listed = []
        for i, stage in enumerate(self.recipe.stages):
            match stage:
                case PretrainStage():
                    budget = stage.timeline.steps
                case SFTStage():
                    budget = stage.steps(self._examples[i])
                case DistilStage():
                    budget = stage.steps(stage.problems * stage.samples)  # fewer where answers are left out
                case GRPOStage():
                    budget = stage.steps
                case EvalStage():
                    budget = stage.n
            listed.append({"name": self.recipe.stage_name(i), "kind": stage.kind, "budget": budget,
                           "unit": "problems" if isinstance(stage, EvalStage) else "steps"})
        return {"kind": "run", "recipe": self.recipe.name, "description": self.recipe.description, "stages": listed,
                "parameters": parameters.total + parameters.mtp, "active_parameters": parameters.active,
                "dollars_per_hour": self.recipe.cost.dollars_per_hour, "taught": self.taught(),
                "task": self.recipe.task.name if self.recipe.task else None,
                "time.unix": time.time()}

    def taught(self) -> str:
        """One line for people: what the model learns here."""
        describe: Callable[[], str] | None = getattr(self.task, "describe", None)
        return describe() if describe else self.recipe.description or (f"the task {self.task.name}" if self.task else "text")

    def _provenance(self, index: int, numbers: dict[str, Any]) -> dict[str, Any]:
        task = self.recipe.task
        return {"jevons": __version__, "recipe": self.recipe.name, "recipe_text": self.text, "seed": self.recipe.seed,
                "task": {"name": portable_name(task.name), "args": task.args} if task else None, "taught": self.taught(),
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
