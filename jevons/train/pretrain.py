"""Pretraining: next-token and MTP loss on text, or on packed worked solutions of a task, generated as they are needed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch

from jevons.data.packing import Batch, Document, Prefetcher, pack, take_documents, weight_totals
from jevons.data.stream import Stream
from jevons.data.tokenizer import Tokenizer
from jevons.model import CausalLM
from jevons.numerics.memory import on_device
from jevons.recipe import PretrainStage
from jevons.train.objective import TokenObjective, micro_batches, token_losses

ROWS = 4  # documents a segment
VALIDATION_TOKENS = 8192  # computed at once


def trace_documents(task: Any, tokenizer: Tokenizer, seed: str, prompt_weight: float) -> Iterator[Document]:
    """Endless documents `prompt + worked solution + eos`; the prompt's ids weigh `prompt_weight` as targets."""
    rng = random.Random(seed)
    render = tokenizer.renderer()
    while True:
        problem = task.sample(rng)
        rendered = render.example(problem.prompt, task.trace(problem, rng))
        yield rendered.ids, [1.0 if own else prompt_weight for own in rendered.loss_mask]


class Pretrain(TokenObjective):
    """One update a step, of as many micro-batches as `batch_tokens` holds `micro_batch_tokens`: on the stream's rows, or
    without one on the task's traces. `validation` documents are scored every `validate_every` steps, and after the last.

    Of `ranks` processes each gets every `ranks`-th micro-batch; there are enough for all. Shares are those of the whole
    update, so that losses and gradients add up to one process's. Raises ValueError for a batch too small for that.
    """

    watch_loss = True

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, task: Any, stage: PretrainStage, seed: int,
                 stream: Stream | None = None, validation: Sequence[Document] = (), validate_every: int = 100,
                 rank: int = 0, ranks: int = 1):
        self.model, self.tokenizer, self.task, self.stage, self.seed = model, tokenizer, task, stage, seed
        self.stream, self.validate_every, self.rank, self.ranks = stream, validate_every, rank, ranks
        self.timeline = stage.timeline
        self.steps = self.timeline.steps
        if stream and (rows := min(self._span(step)[1] for step in (0, self.steps - 1))) < self._micros(0):
            raise ValueError(f"a batch of {rows} rows does not give {self._micros(0)} micro-batches on {ranks} processes a "
                             "row each; a larger batch_tokens, or a smaller data.seq_len, would be right")
        self.validated: dict[str, float] = {}
        self._validation = sorted(validation, key=lambda d: len(d[0]))
        self._step = 0
        self._prefetch = Prefetcher(self._make)

    def _micros(self, step: int) -> int:
        """Micro-batches of a step, all ranks' together."""
        size = self.timeline.batch(step)
        count = max(1, round(size / (self.stage.micro_batch_tokens or size)))
        return -(-count // self.ranks) * self.ranks

    def _span(self, step: int) -> tuple[int, int]:
        """A step's first sequence, counted from the stage's first, and how many it has."""
        return self.timeline.span(step, self.stream.parts[0].length)

    def _make(self, step: int) -> list[Batch]:
        parts, totals = self._from_stream(step) if self.stream else self._from_traces(step)
        even = self.stream is not None and not self.stream.mask  # rows of one length make one segment
        return micro_batches(parts, totals, self.tokenizer.pad_id, None if even else ROWS)

    def _from_stream(self, step: int) -> tuple[list[list[Document]], tuple[float, float, int]]:
        first, count = self._span(step)
        sequences = self.stream.sequences(first, count, self.rank, self.ranks)
        sizes, own = self.stream.sizes(first, count), self._micros(step) // self.ranks
        parts = [list(chain.from_iterable(sequences[i::own])) for i in range(own)]
        return parts, (sum(size - 1 for size in sizes), sum(size - 2 for size in sizes), len(sizes))

    def _from_traces(self, step: int) -> tuple[list[list[Document]], tuple[float, float, int]]:
        documents = trace_documents(self.task, self.tokenizer, f"pretrain {self.seed} {step}", self.stage.prompt_weight)
        chosen = take_documents(documents, self.timeline.batch(step))
        unit = self._micros(step) * ROWS  # full segments only: fewer distinct shapes
        count = round(len(chosen) / unit) * unit or len(chosen)
        chosen = [*chosen, *islice(documents, max(0, count - len(chosen)))][:count]
        longest = max(len(ids) for ids, _ in chosen)
        room = self.stage.context or self.model.config.max_position_embeddings
        if longest > room:
            raise ValueError(f"a worked solution of {longest} tokens does not fit the context of {room}; set "
                             "max_position_embeddings in the recipe's [model] set (or the stage's context), or shorten the "
                             "task's `trace`")
        if count < self.ranks:
            raise ValueError(f"a batch of {count} worked solutions does not give {self.ranks} processes one each; a larger "
                             "batch_tokens would be right")
        micros = min(self._micros(step), count // self.ranks * self.ranks)
        return [chosen[i::micros] for i in range(self.rank, micros, self.ranks)], weight_totals(chosen)

    def next_batch(self, step: int) -> list[list[Batch]]:
        self._step = step
        self.at_step(step, self.stage.mtp_weight, self.stage.bias_update_speed)
        return [self._prefetch.get(step)]

    def metrics(self, sums: dict[str, float]) -> dict[str, Any]:
        done = self._step + 1
        if self._validation and (done % self.validate_every == 0 or done == self.steps):
            self.validated = self.validate()
            return super().metrics(sums) | self.validated
        return super().metrics(sums)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses over the validation documents, in the parameters' own precision, and bits per byte of their text."""
        device, pad = self.model.embed_tokens.weight.device, self.tokenizer.pad_id
        main, second = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        at_once = max(1, VALIDATION_TOKENS // max(len(ids) for ids, _ in self._validation))
        for first in range(0, len(self._validation), at_once):
            batch = on_device(pack(self._validation[first : first + at_once], pad, at_once), device)
            out = self.model.forward_train(batch.tokens_N, batch.positions_N, batch.segments)
            main += token_losses(self.model, out.hidden_ND, batch.targets_N, batch.weights_N).double().cpu()
            if out.mtp_hidden_ND is not None:
                second += token_losses(self.model, out.mtp_hidden_ND, batch.mtp_targets_N, batch.mtp_weights_N).double().cpu()
        targets, mtp_targets, _ = weight_totals(self._validation)
        text = sum(len(self.tokenizer.decode(ids[1:], skip_special=True).encode()) for ids, _ in self._validation)
        values = {"val_loss": main.item() / targets, "val_bits_per_byte": main.item() / math.log(2) / max(1, text)}
        return values | ({"val_mtp_loss": second.item() / max(1, mtp_targets)} if self.model.mtp else {})

    def scores(self) -> dict[str, float]:
        return self.validated

    def state_dict(self) -> dict[str, Any]:
        return {"validated": self.validated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.validated = state.get("validated", {})
