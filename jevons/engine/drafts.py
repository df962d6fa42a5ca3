"""Drafts of the MTP module: what running sequences will probably say next, for the engine to verify."""

from __future__ import annotations

import numpy as np
import torch

from jevons.engine.rows import Rows
from jevons.engine.scheduler import Sequence
from jevons.engine.speculation import Speculation
from jevons.model import CausalLM, KVCache, build_meta
from jevons.model.native_pass import Ahead

FEW = 64  # tokens of a sequence that the module reads in the one native call; longer parts of prompts have kernels of their own


class Drafts(dict[Sequence, list[int]]):
    """The drafts for the next pass of the sequences that draft; one that is not in here does not, for good.

    Entry j of the module's cache holds what it made of token j + 1 and the hidden state at j. A shared page's last entry so
    depends on a token that is not in its key: another branch's may be read there. It only makes a draft worse."""

    def __init__(self, model: CausalLM, rows: Rows, speculation: Speculation, cache: KVCache):
        super().__init__()
        self.model, self.rows, self.speculation, self.cache = model, rows, speculation, cache
        self._ahead: tuple[Ahead, list[int]] | None = None  # asked for in the last call of `verify`, and what it drew

    def admit(self, sequence: Sequence) -> None:
        self.pop(sequence, None)
        if self.speculation.enrol():
            self[sequence] = []

    def make(self, hidden: torch.Tensor, parts: list[tuple[Sequence, int, int, int]], running: int) -> None:
        """Run the module over what was just computed, and set the drafts of the `running` sequences for their next pass.

        `parts`: (sequence, the position of its first token, how many, the row of `hidden` that holds its last)."""
        parts, (ahead, drawn), self._ahead = [part for part in parts if part[0] in self], self._ahead or (None, []), None
        if ahead is not None:
            parts, most = [part for part in parts if not self._made(ahead, drawn, *part)], ahead.most
        else:
            most = self.speculation.drafts(max(1, running)) if parts else 0
        if most is None:
            for sequence, *_ in parts:
                del self[sequence]
        if not parts or most is None:
            return
        for sequence, *_ in parts:
            self[sequence] = []
        few = [part for part in parts if part[2] <= FEW]
        if few and self._natively(hidden, few, most, running):
            parts = [part for part in parts if part not in few]
        if parts:
            self._by_layers(hidden, parts, most)

    def _wanted(self, sequence: Sequence, end: int, most: int) -> int:
        """Drafts after `end` computed tokens: none of a prompt, past the limit, or whose entry would need another page."""
        if sequence.row is None:
            return 0
        return min(most, sequence.limit - sequence.produced - 1, len(sequence.pages) * self.cache.page_size - end + 1)

    def _natively(self, hidden: torch.Tensor, parts: list[tuple[Sequence, int, int, int]], most: int, running: int) -> bool:
        """All of it in one call; False where it cannot be."""
        sequences, starts, counts, last = map(list, zip(*parts, strict=True))
        if self.rows.native is None:
            return False
        rows = []
        for sequence in sequences:
            rows.append(running if sequence.row is None else sequence.row)
            if sequence.row is None:
                self.rows.lend(sequence, running)
                running += 1
        tokens = [i for s, start, count, _ in parts for i in s.tokens[start + 1 : start + count + 1]]
        wanted = [self._wanted(s, start + count, most) for s, start, count, _ in parts]
        drafts = self.model.native_mtp[0].draft(hidden, last, tokens, counts, starts, rows, wanted, self.rows.native,
                                                self.model.rope, self.cache)
        if drafts is None:
            return False
        self.update(zip(sequences, drafts, strict=True))
        return True

    def _by_layers(self, hidden: torch.Tensor, parts: list[tuple[Sequence, int, int, int]], most: int) -> None:
        device, sequences = hidden.device, [part[0] for part in parts]
        starts, counts = [part[1] for part in parts], [part[2] for part in parts]
        table, size = self.rows.tables(sequences), self.cache.page_size
        meta = build_meta(table, starts, counts, size)
        picked = [row for _, _, count, last in parts for row in range(last - count + 1, last + 1)]
        flat = torch.tensor([i for s, start, count, _ in parts for i in s.tokens[start + 1 : start + count + 1]], device=device)
        out = self.model.forward_mtp(hidden[picked], flat, meta.positions_N, self.cache, meta)
        ends, tokens = np.cumsum(counts) - 1, torch.empty(0)
        # (sequence, its row of `out`, drafts)
        live = [(i, int(ends[i]), self._wanted(s, starts[i] + counts[i], most))
                for i, s in enumerate(sequences) if s.row is not None]
        for depth in range(most):
            live = [(i, row, wanted) for i, row, wanted in live if wanted > depth]
            if not live:
                break
            going, at = [i for i, *_ in live], [row for _, row, _ in live]
            if depth:
                meta = build_meta(table[going], [starts[i] + counts[i] + depth - 1 for i in going], None, size)
                out = self.model.forward_mtp(out[at], tokens[at].to(device), meta.positions_N, self.cache, meta)
            else:
                out = out[at]
            live = [(i, row, wanted) for row, (i, _, wanted) in enumerate(live)]
            # drawn with the noise of the very token that it foretells: where the two distributions agree, so do the draws
            slots = torch.tensor([sequences[i].row for i in going])
            tokens, _ = self.rows.choose(self.model.logits(out), slots,
                                         torch.tensor([len(sequences[i].tokens) + depth for i in going]))
            for i, token in zip(going, tokens.tolist(), strict=True):
                self[sequences[i]].append(token)

    def verify(self, sequences: list[Sequence], given: list[list[int]], starts: list[int], cache: KVCache,
               ) -> tuple[torch.Tensor, torch.Tensor, list[int], list[float], int]:
        """All running sequences, each with its last token and its drafts: hidden states, logits, tokens and log-probs of all of
        them, and how many lie from row to row, 0 where they lie close."""
        flat, counts, ahead = [i for tokens in given for i in tokens], list(map(len, given)), None
        if self.rows.native is not None and max(counts) > 1 and all(s in self for s in sequences):
            if most := self.speculation.drafts(len(sequences)):
                room = [min(s.limit - s.produced - 2, len(s.pages) * cache.page_size - start)
                        for s, start in zip(sequences, starts, strict=True)]
                ahead = Ahead(self.model.native_mtp[0], self.cache, most, room)
        hidden, logits, tokens, logprobs = self.rows.step(self.model, cache, 0, flat, counts, starts, ahead)
        self._ahead = ahead and (ahead, tokens)
        return hidden, logits, tokens, logprobs, 0

    def _made(self, ahead: Ahead, drawn: list[int], sequence: Sequence, start: int, count: int, last: int) -> bool:
        """Whether a sequence's drafts came with the pass: so it is where it said what was drawn."""
        if ahead.drafts is None or sequence.tokens[start + 1 : start + count + 1] != drawn[last - count + 1 : last + 1]:
            return False
        first = sequence.row * ahead.most
        self[sequence] = ahead.drafts[first : first + self._wanted(sequence, start + count, ahead.most)]
        return True
