"""Packed training rows. A batch is a function of (seed, step) alone: resuming needs the step and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

Document = tuple[list[int], list[float]]  # token ids, and the loss weight of each id (as a target)


@dataclass
class Batch:
    """Flat tokens of rows of like length, segment after segment; `segments` holds (rows, length) of each.

    `weights` and `mtp_weights` at i weigh predicting token i+1 and i+2 there; both are 0 where that token lies past the
    row. Position -1 marks padding, in rows and after the last one: it is computed and counts nowhere. `order` gives, row
    by row, which of the packed documents it holds.
    """

    tokens_N: torch.Tensor
    targets_N: torch.Tensor
    mtp_targets_N: torch.Tensor
    weights_N: torch.Tensor
    mtp_weights_N: torch.Tensor
    positions_N: torch.Tensor
    segments: list[tuple[int, int]]
    order: list[int]
    tokens: int  # without padding
    share: float = 1.0  # of its update's weights, all ranks' micro-batches together
    mtp_share: float = 1.0  # of its update's `mtp_weights`
    row_share: float = 1.0  # of its update's rows


# Shapes are rounded up so that few distinct ones occur: oneDNN compiles a kernel for every new bf16 shape it meets,
# about 0.4 ms each, which at 2,000 tokens a batch was half of the time.
LENGTH_MULTIPLE, FLAT_MULTIPLE = 16, 256


def pack(documents: Sequence[Document], pad_id: int, rows_per_segment: int = 8) -> Batch:
    """One document a row, sorted by length into segments padded to their longest: attention costs each document its
    own square, and nothing looks across documents."""
    order = sorted(range(len(documents)), key=lambda i: len(documents[i][0]))
    segments: list[tuple[int, int]] = []
    parts: list[list[torch.Tensor]] = []
    for first in range(0, len(order), rows_per_segment):
        chosen = [documents[i] for i in order[first : first + rows_per_segment]]
        length = -(-len(chosen[-1][0]) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        ids = torch.tensor([d + [pad_id] * (length - len(d)) for d, _ in chosen])
        own = torch.tensor([w + [0.0] * (length - len(w)) for _, w in chosen], dtype=torch.float32)
        ahead = [torch.cat([own[:, by:], own.new_zeros(len(chosen), by)], 1) for by in (1, 2)]
        positions = torch.arange(length).repeat(len(chosen), 1)
        positions[positions >= torch.tensor([len(d) for d, _ in chosen])[:, None]] = -1
        parts.append([ids, ids.roll(-1, 1), ids.roll(-2, 1), *ahead, positions])
        segments.append((len(chosen), length))
    size = sum(rows * length for rows, length in segments)
    tail = -size % FLAT_MULTIPLE
    fill = (pad_id, pad_id, pad_id, 0.0, 0.0, -1)
    flat = [torch.cat([*(part[i].flatten() for part in parts), torch.full((tail,), fill[i])]) for i in range(6)]
    return Batch(*flat, segments, order, sum(len(d) for d, _ in documents))


def weight_totals(documents: Iterable[Document]) -> tuple[float, float, int]:
    """What `pack` makes of them: sum of `weights`, sum of `mtp_weights`, rows."""
    main = second = rows = 0
    for _, weights in documents:
        main, second, rows = main + sum(weights[1:]), second + sum(weights[2:]), rows + 1
    return main, second, rows


def align(batch: Batch, values: Sequence[Sequence[float]]) -> torch.Tensor:
    """One number per packed document's token, as a target: flat [N], token j's number at the position that predicts it."""
    flat = torch.zeros(batch.tokens_N.numel())
    start = row = 0
    for rows, length in batch.segments:
        for _ in range(rows):
            own = values[batch.order[row]]
            flat[start : start + len(own) - 1] = torch.tensor(own[1:])
            start, row = start + length, row + 1
    return flat


def take_documents(documents: Iterator[Document], tokens: int) -> list[Document]:
    """Documents until the next would go past `tokens`; at least one."""
    out: list[Document] = []
    room = tokens
    for document in documents:
        room -= len(document[0])
        if out and room < 0:
            break
        out.append(document)
    return out


class Prefetcher:
    """Computes `make(step + 1)` in a thread while step trains. Only the order of computing changes, never a number."""

    def __init__(self, make: Callable[[int], list[Batch]]):
        self._make = make
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future] | None = None

    def get(self, step: int) -> list[Batch]:
        batches = self._ahead[1].result() if self._ahead and self._ahead[0] == step else self._make(step)
        self._ahead = (step + 1, self._pool.submit(self._make, step + 1))
        return batches

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
