"""What the stages of a recipe train on, and what can be refused before any of them begins."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jevons.config import ModelConfig
from jevons.data.prepare import check_rows, check_sources, open_data, tokenizer_for
from jevons.data.tokenizer import Tokenizer, train_tokenizer
from jevons.engine.engine import Engine
from jevons.model import CausalLM
from jevons.plan.fit import check_fits, stage_configs, table_config
from jevons.plan.price import plan_line
from jevons.reason.grpo import GRPO
from jevons.recipe import DataTable, GRPOStage, PretrainStage, Recipe, SFTStage
from jevons.recipe.mesh import check_model, check_recipe
from jevons.runtime import Runtime
from jevons.store.checkpoint import save_checkpoint
from jevons.tasks.base import Task
from jevons.train.pretrain import Pretrain
from jevons.train.sft import answers, read_conversations

if TYPE_CHECKING:
    from jevons.train.parallel.base import Parallel

LEAST_PROMPT = 128  # tokens of room that rollouts leave for a prompt beside max_tokens; twice the longest of PROBED if more
PROBED = 64
APART = 1_000_003  # between the seeds of pretrain stages: a later one reads other data than the first
OnProgress = Callable[[str, int, int, float], None]  # of tokenising: which source, bytes read, of how many, tokens a second


def first_config(recipe: Recipe) -> ModelConfig:
    """The network that the recipe begins with; a preset's bos and eos are 0 and 1, which `first_tokenizer` gives them too."""
    return table_config(recipe.model, recipe.tokenizer.vocab_size)


def check(recipe: Recipe, task: Task | None, runtime: Runtime) -> dict[int, int]:
    """How many examples each SFT stage has. Raises ValueError for what could only fail later, with the directory begun."""
    config, examples = first_config(recipe), {}
    check_recipe(recipe.mesh, recipe)
    ranks, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))  # torchrun's
    memory = runtime.gpu_memory_gib if runtime.device == "cuda" else runtime.memory_gib
    if memory:  # a machine that does not say has enough
        devices = ranks if runtime.device == "cuda" else max(1, ranks // here)
        check_fits(recipe, memory * 2**30, devices, lambda: plan_line(recipe), runtime.threads)
    for index, (stage, (at, _)) in enumerate(zip(recipe.stages, stage_configs(recipe), strict=True)):
        where = f"stage {recipe.stage_name(index)}"
        if stage.kind not in ("grpo", "eval"):  # these keep the whole model on every process
            check_model(recipe.mesh, at)
        if isinstance(stage, SFTStage):
            examples[index] = sum(answers(read_conversations(path)) for path in stage.data)
            if stage.examples not in (None, examples[index]):
                raise ValueError(f"{where}: examples is {stage.examples}, and {', '.join(stage.data)} holds {examples[index]}")
        elif isinstance(stage, PretrainStage) and recipe.data:
            check_rows(stage, rows_of(recipe.data, stage), where, at.max_position_embeddings)
        elif isinstance(stage, PretrainStage) and not callable(getattr(task, "trace", None)):
            raise ValueError(f"{where} pretrains on worked solutions, but the task {recipe.task.name} has no method `trace`; "
                             "write one, or leave the stage out and start from a model with `[model] from = DIR`")
    if recipe.data:
        check_sources(recipe.data)
    if not recipe.model.from_dir and config.vocab_size < recipe.tokenizer.vocab_size:
        raise ValueError(f"model.set.vocab_size {config.vocab_size} is less than tokenizer.vocab_size "
                         f"{recipe.tokenizer.vocab_size}; the embedding needs a row for every id")
    return examples


def first_tokenizer(recipe: Recipe, task: Task | None, directory: Path, check_stop: Callable[[], None]) -> Tokenizer:
    """The tokenizer of a model from scratch: trained on the recipe's text (kept in `directory`), or on its task's."""
    table = recipe.tokenizer
    if recipe.data:
        return tokenizer_for(recipe.data, table.vocab_size, table.samples, directory)
    rng = random.Random(f"tokenizer {recipe.seed}")

    def texts():
        for _ in range(table.samples):
            check_stop()
            problem = task.sample(rng)
            yield problem.prompt
            yield task.trace(problem, rng)

    return train_tokenizer(texts(), table.vocab_size)


def rows_of(data: DataTable, stage: PretrainStage) -> DataTable:
    """The table with the rows of this stage: as long as the context it stretches to, where it does."""
    return data.model_copy(update={"seq_len": stage.context}) if stage.context else data


def pretrain(recipe: Recipe, index: int, stage: PretrainStage, model: CausalLM, tokenizer: Tokenizer, task: Task | None,
             directory: Path, on_progress: OnProgress, place: tuple[int, int] = (0, 1)) -> Pretrain:
    """On the recipe's text, tokenised below `directory` where it is not yet, or on the task's worked solutions. `place`: which
    part of every batch is read, of how many."""
    seed = recipe.seed + APART * sum(isinstance(s, PretrainStage) for s in recipe.stages[:index])
    if recipe.data is None:
        return Pretrain(model, tokenizer, task, stage, seed, rank=place[0], ranks=place[1])
    data, name, began, first = rows_of(recipe.data, stage), "", 0.0, 0

    def progress(which: str, read: int, total: int, tokens: int) -> None:
        nonlocal name, began, first
        if which != name:
            name, began, first = which, time.monotonic(), tokens
        on_progress(which, read, total, (tokens - first) / max(1e-3, time.monotonic() - began))

    stream, validation = open_data(data, tokenizer, directory, seed, progress)
    return Pretrain(model, tokenizer, task, stage, seed, stream, validation, data.validate_every, *place)


def grpo(recipe: Recipe, stage: GRPOStage, model: CausalLM, tokenizer: Tokenizer, task: Task, dtype: torch.dtype) -> GRPO:
    """With an engine on the live weights that holds a whole round, and room for the task's prompts."""
    sequences, rng, render = stage.problems * stage.group_size, random.Random("prompt lengths"), tokenizer.renderer()
    prompt = max(LEAST_PROMPT, *(2 * len(render.question(task.sample(rng).prompt)) for _ in range(PROBED)))
    engine = Engine(model, tokenizer.eos_id, max_batch=min(sequences, 256), max_waiting=sequences,
                    max_len=min(model.config.max_position_embeddings, stage.max_tokens + prompt))
    objective = GRPO(model, tokenizer, task, stage, recipe.seed, engine)
    objective.dtype = dtype
    return objective


def save(directory: Path, model: CausalLM, tokenizer: Tokenizer, provenance: dict[str, Any], parallel: Parallel | None,
         ) -> CausalLM | None:
    """The checkpoint of a model that lies as `parallel` has it. Returns it whole; None where this process does not lead."""
    whole = parallel.gather(model) if parallel else model
    if whole is not None:
        save_checkpoint(directory, whole, tokenizer, provenance)
    return whole
