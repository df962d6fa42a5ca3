"""Pretraining: next-token and MTP loss on packed worked solutions of a task, generated as they are needed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from jevons.data.packing import Batch, Document, Prefetcher, pack, take_documents
from jevons.data.tokenizer import Tokenizer
from jevons.model import CausalLM
from jevons.recipe import PretrainStage
from jevons.train.objective import LossParts, Objective, load_metrics, mtp_loss, token_losses, update_router_bias

ROWS = 4  # documents a segment


def trace_documents(task: Any, tokenizer: Tokenizer, seed: str, prompt_weight: float) -> Iterator[Document]:
    """Endless documents `prompt + worked solution + eos`; the prompt's ids weigh `prompt_weight` as targets."""
    rng = random.Random(seed)
    render = tokenizer.renderer()
    while True:
        problem = task.sample(rng)
        rendered = render.example(problem.prompt, task.trace(problem, rng))
        yield rendered.ids, [1.0 if own else prompt_weight for own in rendered.loss_mask]


class Pretrain(Objective):
    """One update a step, of as many micro-batches as `batch_tokens` holds `micro_batch_tokens`."""

    watch_loss = True

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, task: Any, stage: PretrainStage, seed: int):
        self.model, self.tokenizer, self.task, self.stage, self.seed = model, tokenizer, task, stage, seed
        self.steps = max(1, round(stage.tokens / stage.batch_tokens))
        self._load: torch.Tensor | None = None
        self._prefetch = Prefetcher(self._make)

    def _make(self, step: int) -> list[Batch]:
        documents = trace_documents(self.task, self.tokenizer, f"pretrain {self.seed} {step}", self.stage.prompt_weight)
        chosen = take_documents(documents, self.stage.batch_tokens)
        micros = max(1, round(self.stage.batch_tokens / (self.stage.micro_batch_tokens or self.stage.batch_tokens)))
        unit = micros * ROWS  # full segments only: fewer distinct shapes
        count = round(len(chosen) / unit) * unit or len(chosen)
        chosen = [*chosen, *islice(documents, max(0, count - len(chosen)))][:count]
        longest, room = max(len(ids) for ids, _ in chosen), self.model.config.max_position_embeddings
        if longest > room:
            raise ValueError(f"a worked solution of {longest} tokens does not fit the context of {room}; set "
                             "max_position_embeddings in the recipe's [model] set, or shorten the task's `trace`")
        parts = [chosen[i::micros] for i in range(min(micros, count))]
        batches = [pack(part, self.tokenizer.pad_id, ROWS) for part in parts]
        total = sum(float(batch.weights_N.sum()) for batch in batches)
        for batch in batches:
            batch.share = float(batch.weights_N.sum()) / total
        return batches

    def next_batch(self, step: int) -> list[list[Batch]]:
        self._load = None  # a skipped update leaves none
        return [self._prefetch.get(step)]

    def loss(self, batch: Batch) -> LossParts:
        out = self.model.forward_train(batch.tokens_N, batch.positions_N, batch.segments, mtp=self.stage.mtp_weight > 0)
        weights = batch.weights_N
        main = token_losses(self.model, out.hidden_ND, batch.targets_N, weights) / weights.sum()
        second = mtp_loss(self.model, out, batch) if out.mtp_hidden_ND is not None else main.new_zeros(())
        loss = main + self.stage.mtp_weight * second + self.model.config.aux_loss_alpha * out.balance_loss
        sums = {"loss": main.item(), "mtp_loss": second.item(), "balance_loss": out.balance_loss.item()}
        sums = {key: value * batch.share for key, value in sums.items()}
        return LossParts(loss * batch.share, sums | {"tokens": batch.tokens}, out.load_RE)

    def after_update(self, load_RE: torch.Tensor | None) -> None:
        self._load = load_RE
        if load_RE is not None:
            update_router_bias(self.model, load_RE, self.stage.bias_update_speed)

    def metrics(self, sums: dict[str, float]) -> dict[str, Any]:
        shown = ("tokens", "loss", "mtp_loss", "balance_loss") if self.model.mtp else ("tokens", "loss", "balance_loss")
        return {key: sums[key] for key in shown} | load_metrics(self._load)
