"""Who runs next: a bounded queue, prompts that are being read in chunks, and running sequences. No torch here.

Running sequences always hold the rows 0..n-1 of the engine's tables; when one ends, the last takes over its row. Pages are
taken as sequences grow. Where none is left, the youngest sequence gives its pages back, waits in front of the queue, and is
computed again later; the oldest always goes on, so that every request ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from jevons.engine.pages import PagePool, page_key
from jevons.engine.types import PromptTooLong, QueueFull, Request, Usage

LOOP_PERIOD = 64  # the longest repetition that the loop guard sees, in tokens
LOOP_TIMES = 4  # how often at least
LOOP_TOKENS = 96  # and over how many tokens at least


@dataclass(eq=False)
class Sequence:
    """A request on its way. The cache holds its first `computed` tokens; a running sequence lacks only the last one."""

    request: Request
    limit: int  # longest completion
    arrival: int
    tokens: list[int]  # prompt and answer
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its full pages, as far as they were registered
    row: int | None = None
    text: StopWatcher | None = field(default=None, repr=False)
    forced: deque[int] = field(default_factory=deque)  # what comes next whatever is sampled
    thinking: bool = False
    thought_closed: Literal["budget", "asked", "loop"] | None = None
    loop: bool = False
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0

    @property
    def produced(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def goal(self) -> int:
        """Tokens to compute before it can run: all of a prompt; after a preemption, all but the last, which was sampled."""
        return len(self.tokens) - (self.produced > 0)

    def close_thought(self, why: Literal["budget", "asked", "loop"]) -> None:
        """The tokens that close a thought come next; nothing where none is open or one is being closed."""
        if self.thinking and not self.forced:
            self.forced.extend(self.request.params.thinking.close_ids)
            self.thought_closed = why

    def accept(self, token: int) -> None:
        """Append a token, and see to the thought's end."""
        self.tokens.append(token)
        params = self.request.params
        if self.thinking:
            if token == params.thinking.end_id:
                self.thinking = False
            elif params.thinking.max_tokens is not None and self.produced >= params.thinking.max_tokens:
                self.close_thought("budget")
        if params.loop_guard and not self.forced and self.produced % 16 == 0:
            if is_loop(self.tokens[-min(self.produced, LOOP_PERIOD * LOOP_TIMES) :]):
                self.loop = not self.thinking
                self.close_thought("loop")

    def usage(self) -> Usage:
        return Usage(self.cached_tokens, self.drafted, self.accepted, self.preempted, self.thought_closed, self.loop)


def is_loop(tokens: list[int]) -> bool:
    """Whether the text ends in one pattern of up to LOOP_PERIOD tokens, said over and over."""
    end = len(tokens)
    for period in range(1, LOOP_PERIOD + 1):
        span = max(LOOP_TOKENS, LOOP_TIMES * period)
        if span <= end and tokens[end - period] == tokens[end - 2 * period] and \
                tokens[end - span + period :] == tokens[end - span : end - period]:
            return True
    return False


def in_calls(plan: list[tuple[Sequence, int]], most: int) -> list[list[tuple[Sequence, int]]]:
    """Chunks of prompts in calls of at most `most` tokens, counted as if padded to the longest; one chunk at least."""
    calls: list[list[tuple[Sequence, int]]] = []
    longest = 0
    for sequence, count in plan:
        longest = max(longest, count)
        if not calls or (len(calls[-1]) + 1) * longest > most:
            calls.append([])
            longest = count
        calls[-1].append((sequence, count))
    return calls


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
    """`pool` must hold at least one sequence of `max_len`."""

    def __init__(self, max_batch: int, max_len: int, max_waiting: int, pool: PagePool):
        if min(max_batch, max_len - 1, max_waiting) < 1:
            raise ValueError(f"max_batch {max_batch}, max_waiting {max_waiting}: at least 1 each; max_len {max_len}: at least 2")
        if pool.pages * pool.size < max_len:
            raise ValueError(f"pages {pool.pages} of {pool.size} tokens do not hold one sequence of max_len {max_len}")
        self.max_batch, self.max_len, self.max_waiting, self.pool = max_batch, max_len, max_waiting, pool
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []  # the oldest first
        self.running: list[Sequence] = []  # running[i].row == i
        self.preemptions = 0
        self._known: dict[str, Sequence] = {}
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        return bool(self._known)

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
        limit, thinking = request.params.max_tokens, request.params.thinking
        if limit is not None and limit < 1:
            raise ValueError(f"max_tokens is {limit}; it must be at least 1")
        if thinking and (thinking.end_id not in thinking.close_ids or (thinking.max_tokens or 0) < 0):
            raise ValueError(f"thinking: max_tokens {thinking.max_tokens} must be at least 0 and close_ids "
                             f"{list(thinking.close_ids)} must hold end_id {thinking.end_id}")
        if len(self.waiting) >= self.max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests are waiting, which is the bound")
        self._arrivals += 1
        sequence = Sequence(request, room if limit is None else min(limit, room), self._arrivals, list(request.prompt_ids),
                            thinking=thinking is not None)
        if thinking and thinking.max_tokens == 0:
            sequence.close_thought("budget")
        self.waiting.append(sequence)
        self._known[request.request_id] = sequence
        return sequence

    def admit(self, adopt: Callable[[Sequence], None], most: int | None = None) -> list[Sequence]:
        """Move waiting sequences to prefilling, first come first served, as far as rows and pages reach, and while fewer than
        `most` are in. `adopt` may give one the pages of a prefix (see `adopt_prefix`); then it gets pages for all its tokens."""
        admitted, most = [], self.max_batch if most is None else min(most, self.max_batch)
        while self.waiting and len(self.running) + len(self.prefilling) < most:
            sequence, size = self.waiting[0], self.pool.size
            needed = -(-len(sequence.tokens) // size)
            # those that run will soon need a page each; without the reserve, admission and preemption would alternate
            if self.running or self.prefilling:
                needed += len(self.running) + len(self.prefilling)
            if needed > self.pool.available:
                break
            self.waiting.popleft()
            adopt(sequence)
            missing = self.pool.take(-(-len(sequence.tokens) // size) - len(sequence.pages))
            assert missing is not None
            sequence.pages += missing
            self.prefilling.append(sequence)
            admitted.append(sequence)
        self.prefilling.sort(key=lambda s: s.arrival)
        return admitted

    def adopt_prefix(self, sequence: Sequence, copy: Callable[[int, int], None],
                     restore: Callable[[bytes, int], bool] | None = None) -> None:
        """Give a sequence without pages the known pages that its tokens begin with. `restore(key, page)` may fill further
        pages from elsewhere; `copy(source, page)` copies the cells of a page that only begins as this sequence goes on."""
        pool, tokens = self.pool, sequence.tokens[: sequence.goal]  # whoever was preempted must have something to compute too
        found = pool.match(tokens)
        sequence.pages, sequence.keys = found.pages, found.keys
        sequence.computed = len(found.pages) * pool.size
        while restore and pool.caching and sequence.computed + pool.size < len(tokens) and pool.available > 1:
            block = tokens[sequence.computed : sequence.computed + pool.size]
            parent = sequence.keys[-1] if sequence.keys else pool.root
            (page,) = pool.take(1)
            if not restore(page_key(parent, block), page):
                pool.release([page])
                break
            sequence.pages.append(page)
            sequence.keys.append(pool.register(page, parent, block)[0])
            sequence.computed += pool.size
        if found.partial is not None:
            if sequence.computed == len(found.pages) * pool.size and (taken := pool.take(1)):
                copy(found.partial, taken[0])
                sequence.pages += taken
                sequence.computed += found.partial_tokens
            pool.release([found.partial])
        if not sequence.preempted:
            sequence.cached_tokens = sequence.computed

    def plan_prefill(self, budget: int) -> list[tuple[Sequence, int]]:
        """Who reads how many tokens of its prompt now. Half of the budget, or all that it needs, is the oldest one's, so that
        it ends; the rest goes to those with the least left, so that a short prompt does not wait for a long one."""
        if not self.prefilling:
            return []
        counts: dict[Sequence, int] = {}
        oldest = self.prefilling[0]
        by_need = sorted(self.prefilling, key=lambda s: (s.goal - s.computed, s.arrival))
        first = budget if len(by_need) == 1 else max(1, budget // 2)
        for sequence, share in [(oldest, first), *((s, budget) for s in by_need), (oldest, budget)]:
            left = budget - sum(counts.values())
            more = min(sequence.goal - sequence.computed - counts.get(sequence, 0), share, left)
            if more > 0:
                counts[sequence] = counts.get(sequence, 0) + more
        return list(counts.items())

    def start(self, sequence: Sequence) -> None:
        """From prefilling to the first free row."""
        self.prefilling.remove(sequence)
        sequence.row = len(self.running)
        self.running.append(sequence)

    def make_room(self, sequence: Sequence, tokens: int) -> tuple[bool, list[tuple[int, int]]]:
        """Pages for `tokens` beyond those computed, the youngest sequences giving up theirs where needed. Whether there is
        room (False: this was the youngest itself), and the moves of rows to be made."""
        moves = []
        needed = -(-(sequence.computed + tokens) // self.pool.size) - len(sequence.pages)
        while needed > 0:
            taken = self.pool.take(needed)
            if taken is not None:
                sequence.pages += taken
                break
            victim = max([*self.running, *self.prefilling], key=lambda s: s.arrival)
            move = self.preempt(victim)
            if move:
                moves.append(move)
            if victim is sequence:
                return False, moves
        return True, moves

    def preempt(self, sequence: Sequence) -> tuple[int, int] | None:
        """Back to the front of the queue, without pages. Returns the move of rows, as `remove`."""
        move = self._leave(sequence)
        sequence.preempted += 1
        self.preemptions += 1
        at = next((i for i, other in enumerate(self.waiting) if other.arrival > sequence.arrival), len(self.waiting))
        self.waiting.insert(at, sequence)
        return move

    def register_pages(self, sequence: Sequence) -> list[tuple[bytes, int]]:
        """Make the full pages of a sequence findable; (key, page) of those that were not."""
        size, new = self.pool.size, []
        while self.pool.caching and (len(sequence.keys) + 1) * size <= sequence.computed:
            at = len(sequence.keys)
            parent = sequence.keys[-1] if sequence.keys else self.pool.root
            key, fresh = self.pool.register(sequence.pages[at], parent, sequence.tokens[at * size : (at + 1) * size])
            sequence.keys.append(key)
            if fresh:
                new.append((key, sequence.pages[at]))
        return new

    def find(self, request_id: str) -> Sequence | None:
        return self._known.get(request_id)

    def remove(self, sequence: Sequence) -> tuple[int, int] | None:
        """Take a sequence out; its pages are free or cached at once. Returns (from_row, to_row) where the last running one
        must move, None where none must."""
        del self._known[sequence.request.request_id]
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return None
        return self._leave(sequence)

    def _leave(self, sequence: Sequence) -> tuple[int, int] | None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.keys, sequence.computed = [], [], 0
        if sequence.row is None:
            self.prefilling.remove(sequence)
            return None
        row, last = sequence.row, self.running.pop()
        sequence.row = None
        if last is sequence:
            return None
        self.running[row] = last
        last.row, source = row, last.row
        return source, row

    def check_integrity(self) -> None:
        """Rows 0..n-1 are held once each, pages are counted right, and nobody could write where another reads. Raises
        AssertionError."""
        self.pool.check_integrity()
        assert [s.row for s in self.running] == list(range(len(self.running)))
        assert all(s.row is None for s in [*self.waiting, *self.prefilling])
        assert all(not s.pages and not s.computed for s in self.waiting)
        assert len(self._known) == len(self.running) + len(self.prefilling) + len(self.waiting)
        assert len(self.running) + len(self.prefilling) <= self.max_batch
        held = [page for s in [*self.running, *self.prefilling] for page in s.pages]
        assert len(set(held)) == self.pool.used
        for s in [*self.running, *self.prefilling]:
            assert s.computed <= len(s.pages) * self.pool.size and len(set(s.pages)) == len(s.pages)
            # a page that is still to be written to has one user
            assert all(self.pool.sole(page) for page in s.pages[s.computed // self.pool.size :])
