"""Pretraining: next-token and MTP loss on packed worked solutions of a task, generated as they are needed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from jevons.data.packing import Batch, Document, Prefetcher, take_documents
from jevons.data.tokenizer import Tokenizer
from jevons.model import CausalLM
from jevons.recipe import PretrainStage
from jevons.train.objective import TokenObjective, micro_batches

ROWS = 4  # documents a segment


def trace_documents(task: Any, tokenizer: Tokenizer, seed: str, prompt_weight: float) -> Iterator[Document]:
    """Endless documents `prompt + worked solution + eos`; the prompt's ids weigh `prompt_weight` as targets."""
    rng = random.Random(seed)
    render = tokenizer.renderer()
    while True:
        problem = task.sample(rng)
        rendered = render.example(problem.prompt, task.trace(problem, rng))
        yield rendered.ids, [1.0 if own else prompt_weight for own in rendered.loss_mask]


class Pretrain(TokenObjective):
    """One update a step, of as many micro-batches as `batch_tokens` holds `micro_batch_tokens`."""

    watch_loss = True

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, task: Any, stage: PretrainStage, seed: int):
        self.model, self.tokenizer, self.task, self.stage, self.seed = model, tokenizer, task, stage, seed
        self.timeline = stage.timeline
        self.steps = self.timeline.steps
        self._prefetch = Prefetcher(self._make)

    def _make(self, step: int) -> list[Batch]:
        documents = trace_documents(self.task, self.tokenizer, f"pretrain {self.seed} {step}", self.stage.prompt_weight)
        size = self.timeline.batch(step)
        chosen = take_documents(documents, size)
        micros = max(1, round(size / (self.stage.micro_batch_tokens or size)))
        unit = micros * ROWS  # full segments only: fewer distinct shapes
        count = round(len(chosen) / unit) * unit or len(chosen)
        chosen = [*chosen, *islice(documents, max(0, count - len(chosen)))][:count]
        longest = max(len(ids) for ids, _ in chosen)
        room = self.stage.context or self.model.config.max_position_embeddings
        if longest > room:
            raise ValueError(f"a worked solution of {longest} tokens does not fit the context of {room}; set "
                             "max_position_embeddings in the recipe's [model] set (or the stage's context), or shorten the "
                             "task's `trace`")
        return micro_batches(chosen, micros, self.tokenizer.pad_id, ROWS)

    def next_batch(self, step: int) -> list[list[Batch]]:
        self.at_step(step, self.stage.mtp_weight, self.stage.bias_update_speed)
        return [self._prefetch.get(step)]
