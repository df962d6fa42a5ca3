"""Who runs next: a bounded queue in front of `max_batch` slots. No torch here.

Running sequences always hold the slots 0..n-1, so their pages lie in order and attention reads them as one view. When
a sequence ends, the last one moves into its slot; the engine copies the cache to match.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from jevons.engine.types import PromptTooLong, QueueFull, Request


@dataclass
class Sequence:
    """A request on its way: `slot` is None while it waits."""

    request: Request
    limit: int  # longest completion
    slot: int | None = None
    produced: int = 0
    text: StopWatcher | None = field(default=None, repr=False)


class StopWatcher:
    """Looks for stop strings in a growing text, keeping no more of it than a stop string could span."""

    def __init__(self, stops: tuple[str, ...], stream):
        self._stops, self._stream, self._tail = stops, stream, ""
        self._keep = max(map(len, stops)) - 1

    def feed(self, token_id: int) -> bool:
        """True when the text so far contains a stop string."""
        text = self._tail + (self._stream.step(token_id) or "")
        self._tail = text[-self._keep:] if self._keep else ""
        return any(stop in text for stop in self._stops)


class Scheduler:
    def __init__(self, max_batch: int, max_len: int, max_waiting: int):
        if min(max_batch, max_len - 1, max_waiting) < 1:
            raise ValueError(f"max_batch {max_batch}, max_waiting {max_waiting}: at least 1 each; max_len {max_len}: at least 2")
        self.max_batch, self.max_len, self.max_waiting = max_batch, max_len, max_waiting
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # running[i].slot == i
        self._known: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> Sequence:
        """Queue a request. Raises PromptTooLong, QueueFull, or ValueError for parameters that cannot be run."""
        room = self.max_len - len(request.prompt_ids)
        if room < 1:
            raise PromptTooLong(f"the prompt has {len(request.prompt_ids)} tokens; the context of {self.max_len} leaves room "
                                f"for at most {self.max_len - 1}")
        if not request.prompt_ids:
            raise ValueError("prompt_ids is empty; a prompt needs at least one token")
        if request.request_id in self._known:
            raise ValueError(f"request_id {request.request_id!r} is already running; it must be unique")
        limit = request.params.max_tokens
        if limit is not None and limit < 1:
            raise ValueError(f"max_tokens is {limit}; it must be at least 1")
        if len(self.waiting) >= self.max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests are waiting, which is the bound")
        sequence = Sequence(request, room if limit is None else min(limit, room))
        self.waiting.append(sequence)
        self._known[request.request_id] = sequence
        return sequence

    def admit(self) -> list[Sequence]:
        """Move waiting sequences into free slots, first come first served; returns those that now need a prefill."""
        admitted = []
        while self.waiting and len(self.running) < self.max_batch:
            sequence = self.waiting.popleft()
            sequence.slot = len(self.running)
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def find(self, request_id: str) -> Sequence | None:
        return self._known.get(request_id)

    def remove(self, sequence: Sequence) -> tuple[int, int] | None:
        """Take a sequence out. Returns (from_slot, to_slot) where the last running one must move, None where none must."""
        del self._known[sequence.request.request_id]
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return None
        slot, last = sequence.slot, self.running.pop()
        sequence.slot = None
        if last is sequence:
            return None
        self.running[slot] = last
        last.slot, source = slot, last.slot
        return source, slot

    def check_integrity(self) -> None:
        """Slots 0..n-1 are held once each, and the books agree. Raises AssertionError."""
        assert [s.slot for s in self.running] == list(range(len(self.running)))
        assert all(s.slot is None for s in self.waiting)
        assert len(self._known) == len(self.running) + len(self.waiting)
        assert len(self.running) <= self.max_batch and len(self.waiting) <= self.max_waiting
