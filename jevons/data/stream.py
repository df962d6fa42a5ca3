"""Which tokens every training sequence holds: a function of (seed, sequence) alone, whoever asks, in whatever order.

A source's documents, rearranged for filling in the middle where that is asked, stand behind one another; window i is
tokens [i (T-1), i (T-1) + T) of that, so that every token is a target once. Windows are visited in the order of a
keyed permutation, another one every epoch. Sequences are dealt to sources in exact proportion to their weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from jevons.data.packing import Document
from jevons.data.shards import Shards

_64 = 2**64 - 1
ROUNDS = 6


def mix(x):
    """One output of splitmix64: a bijection of 64-bit numbers, Python's or an array of uint64."""
    x = x + 0x9E3779B97F4A7C15 & _64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _64
    return x ^ (x >> 31)


def key_of(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


def permute(index: int, size: int, key: int) -> int:
    """Where a pseudo-random permutation of range(size) puts `index`: a Feistel network on the next power of four, walked
    until it is back in range. No table is kept."""
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    while True:
        left, right = index >> half, index & (1 << half) - 1
        for turn in range(ROUNDS):
            left, right = right, left ^ mix(right ^ mix(key + turn & _64)) & (1 << half) - 1
        index = left << half | right
        if index < size:
            return index


def deal(index: int, weights: Sequence[int]) -> tuple[int, int]:
    """(source, how many of it came before) of sequence `index`. Among any first n sequences, source k has its share of
    n within k + 1, and exactly where n is a multiple of the weights' sum. Each source takes its share of what those
    before it left."""
    rest = sum(weights)
    for k, weight in enumerate(weights):
        before = index * weight // rest
        if (index + 1) * weight // rest > before:
            return k, before
        index, rest = index - before, rest - weight
    raise AssertionError("the last source takes what is left")


class Part:
    """Tokens [low, high) of a source's shards as windows of `length`.

    With `fim_ids` a share `fim_rate` of its units (documents, in pieces of at most length - 4 tokens) is read as
    `begin prefix hole suffix end middle eos` (PSM); split points are uniform over the unit's tokens, and new every epoch.
    """

    def __init__(self, shards: Shards, low: int, high: int, length: int, key: int = 0, fim_rate: float = 0.0,
                 fim_ids: tuple[int, int, int] | None = None, eos_id: int = 0):
        self.shards, self.length, self.key, self.fim_ids, self.eos_id = shards, length, key, fim_ids, eos_id
        first, last = np.searchsorted(shards.ends_D, [low, high - 1], "right")
        ends = np.minimum(shards.ends_D[first : last + 1], high)
        starts = np.concatenate([[low], ends[:-1]])
        self.opens_U = np.ones(len(ends), bool)  # begins what attention may look back to, with a mask
        self.fim_U = np.zeros(len(ends), bool)
        if fim_rate:
            size = length - 4
            count = -(-(ends - starts) // size)
            document = np.repeat(np.arange(len(ends)), count)
            piece = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
            starts = starts[document] + piece * size
            whole = shards.ends_D[first:][document]  # where it ends, the part's end aside
            ends = np.minimum(starts + size, ends[document])
            self.eos_U = ends == whole
            drawn = mix((mix((document + first).astype(np.uint64) ^ key) + piece.astype(np.uint64)) & _64)
            self.fim_U = (drawn < int(fim_rate * _64)) & (ends - starts > self.eos_U)
            self.opens_U = (piece == 0) | self.fim_U | np.concatenate([[False], self.fim_U[:-1]])
        sizes = ends - starts + (self.fim_U * (4 - self.eos_U) if fim_rate else 0)
        self.starts_U, self.ends_U = starts, ends
        self.at_U = np.concatenate([[0], np.cumsum(sizes)])
        self.total = int(self.at_U[-1])
        self.windows = max(1, -(-(self.total - 1) // (length - 1)))

    def _units(self, window: int) -> tuple[int, int, int, int]:
        """Its tokens [x, y), and the units [first, last] that they lie in."""
        x = window * (self.length - 1)
        y = min(x + self.length, self.total)
        first, last = np.searchsorted(self.at_U, [x, y - 1], "right") - 1
        return x, y, int(first), int(last)

    def _cuts(self, window: int, mask: bool) -> list[int]:
        """Where the window's documents begin and end, seen from its first token; with no mask it is one document."""
        x, y, first, last = self._units(window)
        inner = self.at_U[first + 1 : last + 1][self.opens_U[first + 1 : last + 1]] - x if mask else []
        return [0, *map(int, inner), y - x]

    def sizes(self, window: int, mask: bool) -> list[int]:
        """Tokens of each document of a window. One of a single token predicts nothing and is left out."""
        cuts = self._cuts(window, mask)
        return [b - a for a, b in zip(cuts, cuts[1:], strict=False) if b - a > 1]

    def read(self, window: int, epoch: int, mask: bool) -> list[Document]:
        x, y, first, last = self._units(window)
        if not self.fim_U[first : last + 1].any():  # nothing moved: they stand as they are stored
            low = int(self.starts_U[first]) + x - int(self.at_U[first])
            ids = self.shards.tokens(low, low + y - x).tolist()
        else:
            ids = np.concatenate([self._unit(unit, epoch) for unit in range(first, last + 1)])
            ids = ids[x - self.at_U[first] :][: y - x].tolist()
        cuts = self._cuts(window, mask)
        return [(ids[a:b], [1.0] * (b - a)) for a, b in zip(cuts, cuts[1:], strict=False) if b - a > 1]

    def _unit(self, unit: int, epoch: int) -> np.ndarray:
        ids = self.shards.tokens(int(self.starts_U[unit]), int(self.ends_U[unit])).astype(np.int64)
        if not self.fim_U[unit]:
            return ids
        ids = ids[:-1] if self.eos_U[unit] else ids
        begin, hole, end = self.fim_ids
        a, b = sorted(key_of(self.key, unit, epoch, side) % (len(ids) + 1) for side in "ab")
        return np.concatenate([[begin], ids[:a], [hole], ids[b:], [end], ids[a:b], [self.eos_id]])


class Stream:
    """Endless sequences from weighted parts. `mask`: documents do not see each other."""

    def __init__(self, parts: Sequence[Part], weights: Sequence[float] | None, seed: int, mask: bool):
        if not parts:
            raise ValueError("a stream of no source; at least one would be right")
        self.parts, self.seed, self.mask = list(parts), seed, mask
        exact = [Fraction(str(w)) for w in (weights or [part.windows for part in parts])]
        self.weights = [int(w * lcm(*(w.denominator for w in exact))) for w in exact]

    def place(self, sequence: int) -> tuple[int, int, int]:
        """(source, window, epoch) of a sequence, counted from the run's first."""
        source, before = deal(sequence, self.weights)
        epoch, index = divmod(before, self.parts[source].windows)
        return source, permute(index, self.parts[source].windows, key_of(self.seed, source, epoch)), epoch

    def sequences(self, first: int, count: int, rank: int = 0, ranks: int = 1) -> list[list[Document]]:
        """Of sequences first, ..., first + count - 1 this rank's, every `ranks`-th: each one document, or several with a mask."""
        places = [self.place(first + i) for i in range(rank, count, ranks)]
        return [self.parts[source].read(window, epoch, self.mask) for source, window, epoch in places]

    def sizes(self, first: int, count: int) -> list[int]:
        """Tokens of every document of the sequences [first, first + count), all ranks': no token is read for it."""
        places = [self.place(first + i) for i in range(count)]
        return [size for source, window, _ in places for size in self.parts[source].sizes(window, self.mask)]
