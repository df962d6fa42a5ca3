"""What the network computes for the engine: the next tokens of its rows, and passes over rows and prompts together. A small model
is computed by every core for its share of the sequences."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
import torch

from jevons.engine.graphs import Graphs
from jevons.engine.rows import Rows
from jevons.engine.scheduler import Sequence
from jevons.model import CausalLM, KVCache, build_meta

SHARED = 16  # rows, or prompts, of a small model from which every core runs its share of them by itself
SHORT = 64  # tokens of prompts up to which the calls around a pass are felt; attention over more of them may have a faster way
MIXED = 256  # tokens that rows and prompts may have in one pass; with more, it saves little


class Passes:
    """Over `rows` and `cache`. `cores` above 1: for a model that is small enough."""

    def __init__(self, model: CausalLM, cache: KVCache, rows: Rows, graphs: Graphs | None, cores: int):
        self.model, self.cache, self.rows, self.graphs, self.cores = model, cache, rows, graphs, cores
        self.pool = ThreadPoolExecutor(cores, "decode", lambda: torch.set_num_threads(1)) if cores > 1 else None

    def next_tokens(self, first: int, end: int) -> tuple[torch.Tensor, list[int], list[float]]:
        """Logits, tokens and log-probs of rows first .. end, which are moved on by one."""
        if self.graphs is not None:
            logits, drawn, chances = self.graphs.decode(first, end)
            return logits, drawn.tolist(), chances.tolist()
        parts = self._by_cores(lambda a, b: self._next_tokens(first + a, first + b), [1] * (end - first))
        if len(parts) == 1:
            return parts[0]
        logits, tokens, logprobs = zip(*parts, strict=True)
        return torch.cat(logits), list(chain(*tokens)), list(chain(*logprobs))

    def together(self, prompts: list[list[int]], sequences: int) -> bool:
        """Whether these parts of prompts go into one call with the rows that run, head and draw included."""
        return sum(map(len, prompts)) <= SHORT and (self.pool is None or sequences < SHARED)

    def read(self, sequences: list[Sequence], given: list[list[int]]) -> torch.Tensor:
        """Hidden states of the tokens that follow what is computed of each sequence, one sequence's after the other."""
        parts = self._by_cores(lambda a, b: self._read(sequences[a:b], given[a:b]), [len(tokens) for tokens in given])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _by_cores(self, work: Callable[[int, int], Any], tokens: list[int]) -> list[Any]:
        """What `work(first, end)` gives for all sequences, which bring so many tokens; of many, every core does its share."""
        if self.pool is None or self.graphs is not None or len(tokens) < SHARED:
            return [work(0, len(tokens))]
        ends = np.cumsum(tokens)
        inner = np.searchsorted(ends, ends[-1] * np.arange(1, self.cores) // self.cores, "right")
        cuts = sorted({0, *inner.tolist(), len(tokens)})
        return list(self.pool.map(work, cuts[:-1], cuts[1:]))

    @torch.inference_mode()
    def _next_tokens(self, first: int, end: int) -> tuple[torch.Tensor, list[int], list[float]]:
        """Writes to these rows and their pages only."""
        return self.rows.advance(self.model, self.cache, first, end)

    @torch.inference_mode()
    def _read(self, sequences: list[Sequence], given: list[list[int]]) -> torch.Tensor:
        """Writes to these sequences' pages only."""
        table, counts = self.rows.tables(sequences), [len(tokens) for tokens in given]
        meta = build_meta(table, [s.computed for s in sequences], counts, self.cache.page_size)
        flat = torch.tensor([i for tokens in given for i in tokens], device=table.device)
        return self.model(flat, meta.positions_N, self.cache, meta)
