"""How many tokens the MTP module should draft: measured, not assumed. No torch here.

A pass with k drafts gives 1 + (accepted drafts) tokens. Whether that pays depends on how often drafts are right and on what a
longer pass costs, which differs with the batch: in a mixture of experts, more tokens read more experts. So every k has its own
clock per batch size, and the best one so far is used, the others tried again now and then. What is drafted never changes what
is said (see `Engine`), only how fast.
"""

from __future__ import annotations

from collections import deque

TRIES = 8  # passes before a number of drafts is judged, by the last so many
AGAIN = 200  # passes after which a neighbour of the best is tried again
EVERY = 8  # where drafting does not pay, one new sequence in so many tries it again


class Speculation:
    """`drafts` for the next pass of a batch; `record` what came of it. `fixed` is used as it is, None is found out."""

    def __init__(self, fixed: int | None = None, most: int = 3, largest_batch: int = 16):
        self.fixed, self.most, self.largest_batch = fixed, most, largest_batch
        self._seconds: dict[tuple[int, int], deque[float]] = {}  # (batch bucket, k) -> of the last passes
        self._tokens: dict[tuple[int, int], float] = {}  # mean tokens of a pass per sequence
        self._rates: dict[tuple[int, int], float] = {}  # tokens a second, from TRIES passes on
        self._passes = 0
        self._without = 0  # passes since a plain one was found to be the best
        self._off = False  # drafting did not pay when it was last used
        self._refused = 0

    @property
    def paying(self) -> bool:
        """Whether new sequences draft."""
        return not self._off

    def enrol(self) -> bool:
        """Whether a new sequence should draft at all: its prompt must then run through the MTP module too. Where drafting did
        not pay, one sequence in EVERY tries again."""
        if self.fixed is not None or not self._off:
            return True
        self._refused += 1
        if self._refused % EVERY:
            return False
        self._passes = 0
        return True

    def drafts(self, batch: int) -> int | None:
        """Drafts per sequence in the next pass; None: it does not pay, let these sequences draft no more."""
        if self.fixed is not None:
            return self.fixed
        if batch > self.largest_batch:
            return None
        bucket, rates = batch.bit_length(), []
        for k in range(self.most + 1):
            rate = self._rates.get((bucket, k))
            if rate is None:
                if k < 2 or rates[-1] > rates[0]:  # more drafts are tried only where one fewer was better than none
                    return k
                break
            rates.append(rate)
        best = max(range(len(rates)), key=rates.__getitem__)
        turn = self._passes % AGAIN
        if turn < 2 * TRIES:
            return min(max(best + (1 if turn < TRIES else -1), 0), len(rates) - 1)
        # the machine may have changed its pace since: before plain passes win, they and the next best are clocked anew, in turns
        self._without = 0 if best else self._without + 1
        self._off = self._without > 2 * TRIES
        if self._off:
            return None
        return max(range(1, len(rates)), key=rates.__getitem__) if self._without % 2 else best

    def record(self, batch: int, drafts: int, seconds: float, tokens: float) -> None:
        """A pass over `batch` sequences with `drafts` each took `seconds`, the drafting for the next one included, and gave
        `tokens` per sequence."""
        self._passes += 1
        key = batch.bit_length(), drafts
        kept = self._seconds.setdefault(key, deque(maxlen=TRIES))
        kept.append(seconds)
        before = self._tokens.get(key, tokens)
        self._tokens[key] = before + (tokens - before) / len(kept)
        if len(kept) == TRIES:  # by the lower quartile: passes that were disturbed say nothing
            self._rates[key] = self._tokens[key] / sorted(kept)[TRIES // 4]
