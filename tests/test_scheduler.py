"""Scheduler and page pool as plain Python: whatever happens, free + cached + used is all, and no page has two writers."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jevons.engine.pages import PagePool, page_key
from jevons.engine.scheduler import LOOP_TOKENS, Scheduler, StopWatcher, is_loop
from jevons.engine.types import PromptTooLong, QueueFull, Request, SamplingParams, Thinking

BATCH, LENGTH, WAITING, SIZE = 4, 40, 5, 4


class Books(RuleBasedStateMachine):
    """Plays the engine without a model. Beside the scheduler stands a cache, `cells`: for every page what was written there,
    a cell being (position, all tokens up to it). Whatever a sequence reads must be what it would have written itself."""

    def __init__(self):
        super().__init__()
        self.pages = random.choice([10, 13, 40])
        self.scheduler = Scheduler(BATCH, LENGTH, WAITING, PagePool(self.pages, SIZE, caching=random.random() < 0.8))
        self.cells = [[None] * SIZE for _ in range(self.pages)]
        self.disk = {}
        self.rows = [None] * BATCH
        self.count, self.order = 0, []

    def write(self, sequence, upto):
        for position in range(sequence.computed, upto):
            page = sequence.pages[position // SIZE]
            assert self.scheduler.pool.sole(page), "written to a page that others can read"
            self.cells[page][position % SIZE] = tuple(sequence.tokens[: position + 1])
        sequence.computed = upto

    def move(self, move):
        if move:
            self.rows[move[1]] = self.rows[move[0]]

    @rule(data=st.data(), limit=st.none() | st.integers(-1, LENGTH + 3))
    def submit(self, data, limit):
        self.count += 1
        # few tokens, so that prompts share prefixes, and prompts that repeat earlier ones
        known = [s.tokens for s in [*self.scheduler.running, *self.scheduler.prefilling]]
        prompt = data.draw(st.lists(st.integers(0, 1), max_size=LENGTH + 1))
        if known and data.draw(st.booleans()):
            prompt = (data.draw(st.sampled_from(known)) + prompt)[: LENGTH + 1]
        request = Request(prompt, SamplingParams(max_tokens=limit), str(self.count))
        if len(prompt) >= LENGTH:
            error = PromptTooLong
        elif not prompt or (limit is not None and limit < 1):
            error = ValueError
        elif len(self.scheduler.waiting) >= WAITING:
            error = QueueFull
        else:
            sequence = self.scheduler.submit(request)
            assert sequence.limit == min(limit or LENGTH, LENGTH - len(prompt))
            return
        with pytest.raises(error):
            self.scheduler.submit(request)

    @precondition(lambda self: self.scheduler.has_work)
    @rule(data=st.data())
    def submit_a_known_id(self, data):
        known = data.draw(st.sampled_from(sorted(self.scheduler._known)))
        with pytest.raises(ValueError, match=known):
            self.scheduler.submit(Request([1], request_id=known))

    @rule(stored=st.booleans())
    def admit(self, stored):
        waiting, idle = list(self.scheduler.waiting), not self.scheduler.running and not self.scheduler.prefilling

        def copy(source, page):
            self.cells[page] = list(self.cells[source])

        def restore(key, page):
            self.cells[page] = list(self.disk.get(key, self.cells[page]))
            return key in self.disk

        admitted = self.scheduler.admit(lambda s: self.scheduler.adopt_prefix(s, copy, restore if stored else None))
        assert admitted == waiting[: len(admitted)], "not first come first served"
        assert admitted or not (waiting and idle), "nothing runs and nothing is let in"
        for sequence in admitted:
            assert sequence.computed < len(sequence.tokens) <= len(sequence.pages) * SIZE
            self.check_cells(sequence)

    @precondition(lambda self: self.scheduler.prefilling)
    @rule(budget=st.integers(1, 30))
    def prefill(self, budget):
        before = {s: s.goal - s.computed for s in self.scheduler.prefilling}
        oldest = self.scheduler.prefilling[0]
        plan = self.scheduler.plan_prefill(budget)
        assert sum(n for _, n in plan) == min(budget, sum(before.values())), "part of the budget is wasted"
        assert all(0 < n <= before[s] for s, n in plan) and len(dict(plan)) == len(plan)
        if oldest.goal > oldest.computed:
            assert dict(plan)[oldest] >= min(before[oldest], max(1, budget // 2)), "the oldest one starves"
        for sequence, count in plan:
            self.write(sequence, sequence.computed + count)
            if sequence.computed == sequence.goal:
                self.scheduler.start(sequence)
                self.rows[sequence.row] = sequence
                if not sequence.produced:
                    sequence.accept(random.randint(0, 1))
            self.register(sequence)

    def register(self, sequence):
        for key, page in self.scheduler.register_pages(sequence):
            self.disk[key] = list(self.cells[page])

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def decode(self, data):
        oldest = min([*self.scheduler.running, *self.scheduler.prefilling], key=lambda s: s.arrival)
        for sequence in list(self.scheduler.running):
            if sequence.row is None or len(sequence.tokens) >= LENGTH:
                continue
            drafts = data.draw(st.integers(0, 2))
            room, moves = self.scheduler.make_room(sequence, 1)
            for move in moves:
                self.move(move)
            assert room == (sequence.row is not None)
            assert room or sequence is not oldest, "the oldest one was put back"
            if room:
                self.write(sequence, sequence.computed + 1)
                for _ in range(1 + drafts):
                    if sequence.computed == len(sequence.tokens) and len(sequence.tokens) < LENGTH:
                        sequence.accept(random.randint(0, 1))
                if random.random() < 0.3:
                    self.register(sequence)

    @precondition(lambda self: self.scheduler.has_work)
    @rule(data=st.data())
    def remove(self, data):
        gone = data.draw(st.sampled_from(sorted(self.scheduler._known)))
        sequence, pool = self.scheduler.find(gone), self.scheduler.pool
        alone = [p for p in sequence.pages if pool._users[p] == 1]
        before = pool.available
        self.move(self.scheduler.remove(sequence))
        assert pool.available == before + len(alone), "pages were not given back at once"
        assert self.scheduler.find(gone) is None

    @rule()
    def weights_change(self):
        if not self.scheduler.running and not self.scheduler.prefilling:
            self.scheduler.pool.clear()
            self.disk.clear()
            assert self.scheduler.pool.cached == 0

    def check_cells(self, sequence):
        for position in range(sequence.computed):
            cell = self.cells[sequence.pages[position // SIZE]][position % SIZE]
            assert cell == tuple(sequence.tokens[: position + 1]), "reads what it would not have written"

    @invariant()
    def books_agree(self):
        self.scheduler.check_integrity()
        pool = self.scheduler.pool
        assert pool.free + pool.cached + pool.used == self.pages
        assert [s.arrival for s in self.scheduler.waiting] == sorted(s.arrival for s in self.scheduler.waiting)
        for sequence in self.scheduler.running:
            assert self.rows[sequence.row] is sequence
        for sequence in [*self.scheduler.running, *self.scheduler.prefilling]:
            self.check_cells(sequence)
        assert self.scheduler.find("unknown") is None


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def scheduler_of(batch, length, waiting, pages=20):
    return Scheduler(batch, length, waiting, PagePool(pages, SIZE))


def test_the_longest_prompt_that_fits():
    scheduler = scheduler_of(1, LENGTH, 8)
    assert scheduler.submit(Request([0] * (LENGTH - 1))).limit == 1
    with pytest.raises(PromptTooLong, match=f"{LENGTH}.*{LENGTH - 1}"):
        scheduler.submit(Request([0] * LENGTH))


def test_a_full_queue_says_so_and_keeps_what_it_has():
    scheduler = scheduler_of(1, LENGTH, 2)
    for _ in range(2):
        scheduler.submit(Request([0]))
    with pytest.raises(QueueFull):
        scheduler.submit(Request([0]))
    assert len(scheduler.waiting) == 2
    scheduler.admit(lambda s: None)
    scheduler.submit(Request([0]))


@pytest.mark.parametrize("sizes", [(0, 8, 8), (1, 1, 8), (1, 8, 0)])
def test_sizes_that_could_never_run_a_request(sizes):
    with pytest.raises(ValueError, match="at least"):
        scheduler_of(*sizes)
    with pytest.raises(ValueError, match="pages 9"):
        scheduler_of(1, LENGTH, 8, pages=9)
    for pages, size in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            PagePool(pages, size)


def test_a_prefix_is_found_to_the_token_and_never_whole():
    pool = PagePool(8, SIZE)
    tokens = list(range(10, 22))
    pages = pool.take(3)
    parent = pool.root
    for i, page in enumerate(pages):
        parent, fresh = pool.register(page, parent, tokens[i * SIZE : (i + 1) * SIZE])
        assert fresh
    pool.release(pages)
    assert (pool.cached, pool.free, pool.used) == (3, 5, 0)
    for asked, whole, part in ((tokens, 2, 3), ([*tokens, 5], 3, 0), (tokens[:6], 1, 1), ([*tokens[:6], 0, 0], 1, 2),
                               (tokens[:1], 0, 0), ([0, *tokens], 0, 0), (tokens[4:], 0, 0)):
        found = pool.match(asked)
        assert (found.pages, found.partial_tokens) == (pages[:whole], part)
        pool.release([*found.pages, *([found.partial] if found.partial is not None else [])])
    # the longest unused goes first, and of one sequence its end
    assert pool.take(6) is not None and pool.match([*tokens, 5]).pages == pages[:2]
    other = PagePool(8, SIZE, root=b"other weights")
    assert page_key(other.root, tokens[:4]) != page_key(pool.root, tokens[:4])


def test_pages_that_hold_the_same_are_known_once():
    pool = PagePool(4, SIZE)
    a, b = pool.take(2)
    assert pool.register(a, pool.root, [1, 2, 3, 4])[1] and not pool.register(b, pool.root, [1, 2, 3, 4])[1]
    pool.release([a, b])
    assert (pool.cached, pool.free) == (1, 3)
    with pytest.raises(AssertionError, match="more often"):
        pool.release([b])


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


def test_a_loop_is_a_pattern_said_over_and_over():
    for _ in range(200):
        start = [random.randrange(50) for _ in range(random.randrange(80))]
        period = random.randint(1, 64)
        pattern = [random.randrange(50) for _ in range(period)]
        times = -(-LOOP_TOKENS // period) + 4
        said = start + pattern * times
        assert is_loop(said)
        assert not is_loop(said[: len(start) + 3 * period]) or period < LOOP_TOKENS // 3
        said[-random.randint(2, min(period * 3, 90))] = 99  # broken off not long ago
        assert not is_loop(said)
    assert not is_loop([]) and not is_loop(list(range(300)))


def test_a_thought_is_closed_once():
    scheduler = scheduler_of(1, LENGTH, 8)

    def sequence(limit):
        return scheduler.submit(Request([1, 2], SamplingParams(thinking=Thinking(7, (8, 7, 9), limit))))

    asked = sequence(None)
    asked.close_thought("asked")
    asked.close_thought("budget")
    assert list(asked.forced) == [8, 7, 9] and asked.thought_closed == "asked"
    at_once = sequence(0)
    assert list(at_once.forced) == [8, 7, 9]
    one = sequence(2)
    one.accept(3)
    assert not one.forced
    one.accept(4)
    assert list(one.forced) == [8, 7, 9] and one.thought_closed == "budget"
    itself = sequence(2)
    itself.accept(7)
    itself.close_thought("asked")
    assert not itself.thinking and not itself.forced and itself.thought_closed is None
    for bad in (Thinking(7, (8,)), Thinking(7, (7,), -1)):
        with pytest.raises(ValueError, match="close_ids"):
            scheduler.submit(Request([1], SamplingParams(thinking=bad)))
