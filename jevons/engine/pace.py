"""How many rows a step may have so that streams keep their pace: measured, not assumed. No torch here.

A step is taken to cost `fixed + row * (rows that decode) + prompt * (tokens of prompts)`. Every step corrects the three by what
it took, so that they are right about where the engine works now; they need not be right anywhere else. How far steps stray from
that is learned too: a limit is one for 99 steps of 100.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median

LEAST_CHUNK = 2  # tokens of prompts that ride in any case, so that every prompt comes to its end
LONE = 64  # steps of one row whose median is the lone step
TRIES = 8  # of them before it is believed
SHARE = 0.2  # of a step's surprise that is learned
RARE = 0.01  # steps that may be over the limit
STRAY = 0.5  # by which share one of them widens the margin
MARGINS = 1.0, 3.0  # between these; what is wide narrows faster, for a disturbance is no state
FORGET = 2e-4  # of a cost, at every step that says nothing about it


class Pace:
    """`limit`: no step takes longer than so many lone ones, as far as admission and the length of chunks decide it; 0: prompts
    may double a step, and everybody is admitted. `clock` gives seconds."""

    def __init__(self, limit: float = 0.0, clock: Callable[[], float] = time.perf_counter):
        if limit and not limit > 1:
            raise ValueError(f"pace {limit}: more than 1 lone step, or 0 for no limit, would be right")
        self.limit, self.clock = limit, clock
        self._lone: deque[float] = deque(maxlen=LONE)  # seconds a token
        self._costs = [0.0, 0.0, 0.0]  # fixed, row, prompt
        self._margin = 1.2  # over its cost, what a step but one in a hundred takes at most
        self._steps = self._rows = 0  # steps seen, and the most rows of one
        self._chunk = 0.0  # about the longest chunk of late

    @property
    def lone(self) -> float | None:
        """Seconds a token while one row decodes and nothing else happens; None: not known yet."""
        return median(self._lone) if len(self._lone) >= TRIES else None

    def cost(self, rows: int, prompt: int = 0) -> float:
        """Seconds that a step should take."""
        fixed, row, each = self._costs
        return fixed + row * rows + each * prompt

    def record(self, rows: int, prompt: int, tokens: int, seconds: float) -> None:
        """A step of `rows` that decoded, at least one, and `prompt` tokens of prompts gave `tokens` and took `seconds`."""
        if rows == 1 and not prompt:
            self._lone.append(seconds / tokens)
        if not self._steps:
            self._costs[1] = seconds / (rows + prompt)  # the dearest guess: nothing is shared
        surprise = seconds - self.cost(rows, prompt)
        if prompt and not self._chunk:
            self._costs[2] = max(0.0, surprise) / prompt
        elif self._steps >= TRIES:
            over = seconds > self._margin * self.cost(rows, prompt)
            wide = self._margin - MARGINS[0] + 0.1  # not 0 where it is narrowest
            self._margin = min(max(MARGINS[0], self._margin + STRAY * wide * (over - RARE)), MARGINS[1])
            surprise = min(surprise, self.cost(rows, prompt))  # what was disturbed says little
        sizes = (1, rows, prompt)
        gain = SHARE * surprise / sum(size * size for size in sizes)
        fixed, row, each = (max(0.0, cost + gain * size) for cost, size in zip(self._costs, sizes, strict=True))
        # what one step in a row did not show is tried again some time: a lone row's cost may be fixed, a prompt's may be less
        shift, fade = (FORGET * row if rows == 1 else 0.0), (0.0 if prompt else FORGET)
        self._costs = [fixed + shift, row - shift, each * (1 - fade)]
        self._steps, self._rows, self._chunk = self._steps + 1, max(self._rows, rows), max(prompt, 0.9 * self._chunk)

    def rows(self) -> int | None:
        """Sequences that may be in at once, those whose prompts are being read among them: at least one, and one more than ever
        ran. None: any number."""
        if not self.limit:
            return None
        if (lone := self.lone) is None:
            return 1  # so that it is found out
        if self._rows < 2:
            return 2  # what a row costs is seen when there are two
        fixed, row, each = self._costs
        room = self.limit * lone / self._margin - fixed - max(row, LEAST_CHUNK * each)
        return max(1, min(self._rows, int(room / row) if row else self._rows) + 1)

    def chunk(self, rows: int) -> int:
        """Tokens of prompts that may ride with `rows`: at least LEAST_CHUNK, and no more than twice as many as were tried."""
        if not self._chunk or not self._costs[2]:
            return max(LEAST_CHUNK, int(2 * self._chunk))
        alone = self.cost(rows)
        most = self.limit * (self.lone or alone) / self._margin if self.limit else 2 * alone
        return max(LEAST_CHUNK, int(min((most - alone) / self._costs[2], 2 * self._chunk)))
