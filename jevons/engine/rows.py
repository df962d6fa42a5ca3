"""One row for every running sequence, kept as tensors so that a decode step builds nothing from Python lists."""

from __future__ import annotations

import numpy as np
import torch

from jevons.engine.sampler import sample, uniform
from jevons.engine.scheduler import Sequence
from jevons.model import CausalLM, KVCache, build_meta
from jevons.model.native_pass import Ahead, CRows
from jevons.numerics import kernels

COLDEST = 1e-5  # below it sampling is greedy: logits divided by less would not be finite


class Rows:
    """`table` [rows, pages] lies on the model's device, the rest on the CPU."""

    def __init__(self, count: int, pages: int, device: torch.device):
        self.table = torch.zeros(count, pages, dtype=torch.long, device=device)
        self.length = torch.zeros(count, dtype=torch.long)  # tokens in the cache
        self.last = torch.zeros(count, dtype=torch.long)  # the token that comes next into it
        self.temperature = torch.ones(count)
        self.top_p = torch.ones(count)
        self.seed = np.zeros(count, dtype=np.uint64)
        self._length, self._last = self.length.numpy(), self.last.numpy()  # the same memory; a step's small calls cost less
        self.native = CRows(self.table, self.temperature, self.top_p, self.seed) if device.type == "cpu" else None

    def set(self, sequence: Sequence) -> None:
        """Fill the row of a sequence that begins to run."""
        self.lend(sequence, sequence.row)
        self.follow(sequence)

    def lend(self, sequence: Sequence, row: int) -> None:
        """Its pages, and how it is drawn, to `row`: for a sequence without one, a row past those in use, until it is taken."""
        params = sequence.request.params
        self.temperature[row] = params.temperature if params.temperature > COLDEST else 0.0
        self.top_p[row] = params.top_p
        self.seed[row] = params.seed % 2**64
        self.table[row, : len(sequence.pages)] = torch.tensor(sequence.pages, device=self.table.device)

    def follow(self, sequence: Sequence) -> None:
        """Length and last token are the sequence's."""
        self._length[sequence.row], self._last[sequence.row] = sequence.computed, sequence.tokens[-1]

    def grow(self, sequence: Sequence, held: int) -> None:
        """Its pages from number `held` on are new."""
        self.table[sequence.row, held : len(sequence.pages)] = torch.tensor(sequence.pages[held:], device=self.table.device)

    def move(self, source: int, row: int) -> None:
        for rows in (self.length, self.last, self.temperature, self.top_p, self.seed, self.table):
            rows[row] = rows[source]

    def choose(self, logits: torch.Tensor, rows: torch.Tensor | slice, positions: torch.Tensor | None = None,
               ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and log-probs by the parameters of `rows`; `positions` are the tokens' own, by default the next ones."""
        positions = self.length[rows] if positions is None else positions
        seeds = self.seed[rows] if isinstance(rows, slice) else self.seed[rows.numpy()]
        temperature, top_p = self.temperature[rows], self.top_p[rows]
        if drawn := kernels.draw(logits, temperature, top_p, seeds, positions):
            return drawn
        narrow = bool(((top_p < 1) & (temperature > 0)).any())
        noise = torch.from_numpy(uniform(seeds, positions.numpy().astype(np.uint64)))
        if logits.device.type == "cpu":
            return sample(logits, temperature, top_p, noise, narrow)
        heat, top_p, noise = torch.stack([t.double() for t in (temperature, top_p, noise)]).to(logits.device)
        tokens, logprobs = sample(logits, heat.float(), top_p.float(), noise, narrow)
        return tokens.cpu(), logprobs.cpu()

    def advance(self, model: CausalLM, cache: KVCache, first: int, end: int) -> tuple[torch.Tensor, list[int], list[float]]:
        """`step` of one token for each of the rows, which are moved on: logits, tokens and log-probs."""
        length, last = self._length[first:end], self._last[first:end]
        _, *done = self.step(model, cache, first, last.tolist(), [1] * len(last), length.tolist())
        length += 1
        last[:] = done[1]
        return done

    def step(self, model: CausalLM, cache: KVCache, first: int, tokens: list[int], counts: list[int], contexts: list[int],
             ahead: Ahead | None = None, picked: list[int] | None = None,
             ) -> tuple[torch.Tensor, torch.Tensor, list[int], list[float]]:
        """The rows from `first` on, each with counts[i] of the tokens, from position contexts[i] on: hidden states, logits, and
        of each the token that comes next, with its log-prob. `ahead` asks for drafts, where they come in the same call;
        `picked`: the tokens of which there are logits, and what follows from them."""
        rows = range(first, first + len(counts))
        if self.native is not None and (
                done := model.native.step(tokens, counts, contexts, rows, self.native, model.rope, cache, ahead, picked)):
            return done
        meta = build_meta(self.table[first : rows.stop], contexts, counts, cache.page_size)
        hidden = model(torch.tensor(tokens, device=self.table.device), meta.positions_N, cache, meta)
        which = slice(None) if picked is None else torch.tensor(picked, dtype=torch.long)
        logits = model.logits(hidden[which])
        drawn, logprobs = self.choose(logits, (meta.sequence_N.cpu() + first)[which], (meta.positions_N.cpu() + 1)[which])
        return hidden, logits, drawn.tolist(), logprobs.tolist()

    def tables(self, sequences: list[Sequence]) -> torch.Tensor:
        """A page table of any sequences, in a row or not."""
        longest = max(len(s.pages) for s in sequences)
        return torch.tensor([s.pages + [0] * (longest - len(s.pages)) for s in sequences], device=self.table.device)
