"""The scheduler as plain Python: slots stay packed, the queue is first come first served, stop strings are found."""

import random
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jevons.engine.scheduler import Scheduler, StopWatcher
from jevons.engine.types import PromptTooLong, QueueFull, Request, SamplingParams

BATCH, LENGTH, WAITING = 4, 12, 5


class Slots(RuleBasedStateMachine):
    """Beside the scheduler: who waits, who runs, and what the cache holds in every slot."""

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(BATCH, LENGTH, WAITING)
        self.waiting, self.running, self.count = deque(), set(), 0
        self.cache = [None] * BATCH

    @rule(prompt=st.integers(0, LENGTH + 1), limit=st.none() | st.integers(-1, LENGTH + 3))
    def submit(self, prompt, limit):
        self.count += 1
        request = Request([7] * prompt, SamplingParams(max_tokens=limit), str(self.count))
        if prompt >= LENGTH:
            error = PromptTooLong
        elif prompt == 0 or (limit is not None and limit < 1):
            error = ValueError
        elif len(self.waiting) == WAITING:
            error = QueueFull
        else:
            sequence = self.scheduler.submit(request)
            assert 1 <= sequence.limit <= LENGTH - prompt
            assert sequence.limit == LENGTH - prompt or sequence.limit == limit
            self.waiting.append(str(self.count))
            return
        with pytest.raises(error):
            self.scheduler.submit(request)

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def submit_a_known_id(self, data):
        known = data.draw(st.sampled_from(sorted([*self.waiting, *self.running])))
        with pytest.raises(ValueError, match=known):
            self.scheduler.submit(Request([1], request_id=known))

    @rule()
    def admit(self):
        free = BATCH - len(self.running)
        expected = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        admitted = self.scheduler.admit()
        assert [s.request.request_id for s in admitted] == expected
        assert [s.slot for s in admitted] == list(range(len(self.running), len(self.running) + len(expected)))
        for sequence in admitted:
            self.cache[sequence.slot] = sequence.request.request_id
        self.running |= set(expected)

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def remove(self, data):
        gone = data.draw(st.sampled_from(sorted([*self.waiting, *self.running])))
        move = self.scheduler.remove(self.scheduler.find(gone))
        if gone in self.running:
            self.running.discard(gone)
        else:
            self.waiting.remove(gone)
            assert move is None
        if move is not None:
            source, target = move
            self.cache[target] = self.cache[source]

    @invariant()
    def books_agree(self):
        self.scheduler.check_integrity()
        assert [s.request.request_id for s in self.scheduler.waiting] == list(self.waiting)
        assert {s.request.request_id for s in self.scheduler.running} == self.running
        assert self.scheduler.has_work == bool(self.waiting or self.running)
        for sequence in self.scheduler.running:
            assert self.cache[sequence.slot] == sequence.request.request_id
            assert self.scheduler.find(sequence.request.request_id) is sequence
        assert self.scheduler.find("unknown") is None


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_longest_prompt_that_fits():
    scheduler = Scheduler(1, LENGTH, 8)
    assert scheduler.submit(Request([0] * (LENGTH - 1))).limit == 1
    with pytest.raises(PromptTooLong, match=f"{LENGTH}.*{LENGTH - 1}"):
        scheduler.submit(Request([0] * LENGTH))


def test_a_full_queue_says_so_and_keeps_what_it_has():
    scheduler = Scheduler(1, LENGTH, 2)
    for _ in range(2):
        scheduler.submit(Request([0]))
    with pytest.raises(QueueFull):
        scheduler.submit(Request([0]))
    assert len(scheduler.waiting) == 2
    scheduler.admit()
    scheduler.submit(Request([0]))


@pytest.mark.parametrize("sizes", [(0, 8, 8), (1, 1, 8), (1, 8, 0)])
def test_sizes_that_could_never_run_a_request(sizes):
    with pytest.raises(ValueError, match="at least"):
        Scheduler(*sizes)


class Pieces:
    """A decode stream whose ids are pieces of text; None stands for an unfinished character."""

    def __init__(self, pieces):
        self.pieces = pieces

    def step(self, index):
        return self.pieces[index]


def test_stop_strings_are_found_when_they_are_there():
    def text(least, most):
        return "".join(random.choice("abc") for _ in range(random.randint(least, most)))

    for _ in range(300):
        pieces = [random.choice([None, text(0, 1), text(0, 4)]) for _ in range(random.randint(1, 20))]
        whole, seen = "".join(piece or "" for piece in pieces), ""
        first = random.randint(0, len(whole))
        stops = (whole[first : first + random.randint(1, 15)] or "a", *(text(4, 20) for _ in range(random.randrange(3))))
        watcher = StopWatcher(stops, Pieces(pieces))
        for index, piece in enumerate(pieces):
            seen += piece or ""
            found = any(stop in seen for stop in stops)
            assert watcher.feed(index) == found, (seen, stops)
            if found:
                break


def test_a_long_stop_string_in_many_small_pieces():
    stop = "".join(random.choice("abcdefgh ") for _ in range(random.randrange(2, 40)))
    pieces = ["x", *stop]
    watcher = StopWatcher((stop,), Pieces(pieces))
    assert [watcher.feed(i) for i in range(len(pieces))] == [False] * (len(pieces) - 1) + [True]
