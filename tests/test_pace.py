"""The pace of streams, by clocks that only the steps move: what a step may hold, that nobody starves, and that a limit holds."""

import random
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nets import lively, nano, random_ids
from test_engine import explain, sampled

from jevons.engine.engine import Engine
from jevons.engine.pace import LEAST_CHUNK, TRIES, Pace
from jevons.engine.pages import PagePool
from jevons.engine.scheduler import Scheduler
from jevons.engine.types import Request, SamplingParams


class World:
    """The scheduler and a pace, in a world where a step takes what `cost(rows, prompt)` says."""

    def __init__(self, pace, cost, batch=16):
        self.pace, self.cost, self.steps, self.ends, self.admitted = pace, cost, [], [], []
        self.scheduler = Scheduler(batch, 200, 10**6, PagePool(batch * 7, 32, False))

    def submit(self, name, prompt, answer):
        self.scheduler.submit(Request([1] * prompt, SamplingParams(answer), name))

    def step(self):
        s = self.scheduler
        self.admitted += [a.request.request_id for a in s.admit(lambda sequence: None, self.pace.rows())]
        running = list(s.running)
        plan = s.plan_prefill(self.pace.chunk(len(running)) if running else 8192)
        prompt = sum(count for _, count in plan)
        self.steps.append((len(running), prompt, self.cost(len(running), prompt)))
        for sequence in running:
            assert s.make_room(sequence, 1) == (True, [])
            sequence.computed += 1
        for sequence, count in plan:
            sequence.computed += count
            if sequence.computed == sequence.goal:
                s.start(sequence)
                running.append(sequence)
        for sequence in running:
            sequence.accept(5)
            if sequence.produced >= sequence.limit:
                s.remove(sequence)
                self.ends.append(sequence.request.request_id)
        if self.steps[-1][0]:
            self.pace.record(self.steps[-1][0], prompt, len(running), self.steps[-1][2])
        return prompt


costs = st.builds(lambda fixed, row, prompt, bend: lambda rows, tokens: fixed + row * rows**bend + prompt * tokens,
                  st.floats(0.0, 2.0), st.floats(0.05, 1.0), st.floats(0.005, 1.0), st.floats(0.7, 1.0))


@given(costs, st.sampled_from([0.0, 1.5, 3.0, 8.0]), st.lists(st.tuples(st.integers(1, 150), st.integers(1, 40)), min_size=1,
                                                              max_size=25))
@settings(max_examples=30, deadline=None)
def test_nobody_starves(cost, limit, requests):
    """Whatever steps cost, every request ends, in the order of arrival they are taken in, and every prompt goes on at every
    step."""
    world = World(Pace(limit), cost)
    for name, (prompt, answer) in enumerate(requests):
        world.submit(str(name), prompt, answer)
    most = sum(-(-prompt // LEAST_CHUNK) + answer for prompt, answer in requests) + len(requests)
    while world.scheduler.has_work:
        reading = sum(s.goal - s.computed for s in world.scheduler.prefilling)
        assert world.step() >= min(LEAST_CHUNK, reading)
        assert len(world.steps) <= most, "longer than one after the other"
    assert sorted(world.ends) == sorted(world.admitted) and world.admitted == [str(i) for i in range(len(requests))]


@given(costs, st.floats(1.5, 8.0), st.floats(0.0, 0.15), st.integers(0, 10**6))
@settings(max_examples=12, deadline=None, derandomize=True)  # a bound on what is learned under noise, no law
def test_a_limit_holds_and_is_used(cost, limit, noise, seed):
    """Under more requests than can be served: but for the first steps, and where one row and the least of a chunk are too much
    already, 98 of 100 steps are within the limit; and there is no room for half as many rows more."""
    rng, lone = random.Random(seed), cost(1, 0)
    assume(cost(2, LEAST_CHUNK) < 0.7 * limit * lone)
    world = World(Pace(limit), lambda rows, prompt: cost(rows, prompt) * rng.lognormvariate(0, noise))
    count = 0
    while len(world.steps) < 2000:
        while len(world.scheduler.waiting) < 3:
            world.submit(str(count), rng.randint(3, 15), rng.randint(60, 120))  # reading them keeps nobody out
            count += 1
        world.step()
    late = world.steps[1000:]
    over = sum(seconds > limit * lone * 1.1 for rows, _, seconds in late if rows)
    assert over <= 0.02 * len(late)
    most = max(rows for rows, *_ in late)
    assert most == 16 or cost(most + 2 + most // 2, LEAST_CHUNK) > 0.45 * limit * lone


def test_the_lone_step_is_found_out_first():
    world = World(Pace(3.0), lambda rows, prompt: 1.0 + 0.1 * rows)
    for name in range(4):
        world.submit(str(name), 5, 40)
    for _ in range(TRIES + 1):
        assert len(world.scheduler.running) <= 1 and world.pace.lone is None
        world.step()
    assert world.pace.lone == pytest.approx(1.1)
    world.step()
    assert len(world.admitted) == 2, "then it is seen what a second row costs"
    while world.scheduler.has_work:
        world.step()
    assert max(rows for rows, *_ in world.steps) >= 3


def test_without_a_limit_prompts_double_a_step_and_all_are_admitted():
    world = World(Pace(), lambda rows, prompt: 1.0 + 0.5 * rows + 0.05 * prompt)
    for name in range(6):
        world.submit(str(name), 4, 150)
    world.step()
    assert len(world.admitted) == 6
    for _ in range(100):
        world.step()
    world.submit("long", 190, 1)
    chunks = [world.step() for _ in range(9)]
    assert chunks[0] == LEAST_CHUNK and 60 < max(chunks[3:]) < 90


def test_a_disturbance_is_forgotten():
    """Twenty steps that take ten times as long leave no trace after some hundreds."""
    slow, world = [1.0], World(Pace(4.0), lambda rows, prompt: slow[0] * (0.5 + 0.5 * rows + 0.02 * prompt))
    count = 0

    def busy(steps):
        nonlocal count
        for _ in range(steps):
            while len(world.scheduler.waiting) < 3:
                world.submit(str(count), 20, 40)
                count += 1
            world.step()
        return sum(rows for rows, *_ in world.steps[-200:]) / 200

    before = busy(1000)
    slow[0] = 10.0
    busy(20)
    slow[0] = 1.0
    assert busy(1500) > 0.8 * before > 2


@pytest.mark.parametrize("limit", [0.5, 1.0, -2.0, float("nan")])
def test_a_pace_that_cannot_be(limit):
    with pytest.raises(ValueError, match="more than 1 lone step"):
        Pace(limit)
    with pytest.raises(ValueError, match="more than 1 lone step"):
        Engine(lively(nano()), -1, max_batch=2, max_len=64, pace=limit)


def test_deterministic_keeps_no_pace():
    with pytest.raises(ValueError, match="deterministic computes sequences one by one"):
        Engine(lively(nano()), -1, max_batch=2, max_len=64, pace=3.0, deterministic=True)
    Engine(lively(nano()), -1, max_batch=2, max_len=64, pace=0.0, deterministic=True)


@pytest.mark.parametrize("pace,speculate", [(None, 0), (0.0, 0), (4.0, 0), (4.0, 1)])
def test_an_engine_keeps_its_pace(monkeypatch, pace, speculate):
    """By a clock that every row of a forward pass moves: with a limit no token waits longer than it says, without one they do;
    and the text is what it always is."""
    model = lively(nano(max_position_embeddings=512))
    clock, calls = SimpleNamespace(now=0.0), []
    for name in ("forward", "forward_mtp"):
        def timed(tokens, *args, call=getattr(model, name), **kwargs):
            clock.now += 1.0 + 0.25 * len(tokens)
            calls.append(call)
            return call(tokens, *args, **kwargs)

        monkeypatch.setattr(model, name, timed)
    monkeypatch.setattr("jevons.engine.engine.time", SimpleNamespace(perf_counter=lambda: clock.now))
    engine = Engine(model, -1, max_batch=12, max_len=300, max_waiting=100, pace=pace, speculate=speculate)
    monkeypatch.setattr(engine.rows, "native", None)  # so that every pass is a forward pass
    if pace is not None:
        engine.pace.clock = lambda: clock.now
    requests = [sampled(prompt=random_ids(random.randint(50, 200)), max_tokens=random.randint(20, 60)) for _ in range(25)]
    texts, came, gaps, rows, mixed = {}, {}, [], [], 0
    for asked in requests:
        engine.submit(asked)
    while engine.has_work:
        decoding = {s.request.request_id for s in engine.scheduler.running}
        rows.append(len(decoding))
        reading, before = bool(engine.scheduler.prefilling), len(calls)
        for event in engine.step():
            if event.request_id in decoding:
                gaps.append(clock.now - came[event.request_id])
            texts.setdefault(event.request_id, []).append(event.token_id)
        mixed += len(decoding) > 0 and reading and len(calls) == before + 1 + bool(speculate)
        came |= dict.fromkeys(texts, clock.now)
        engine.scheduler.check_integrity()
    for asked in requests:
        assert len(texts[asked.request_id]) == asked.params.max_tokens
        explain(model, asked, texts[asked.request_id])
    assert (mixed > 10) == (pace is not None), "one pass for those that decode and for prompts"
    ranked = sorted(gap for gap in gaps if gap > 0)  # in a clock's seconds: a row costs 0.25, a pass 1
    if pace:
        assert max(rows) > 1 and ranked[int(0.98 * len(ranked))] <= 1.1 * pace * engine.pace.lone
    else:
        assert max(rows) == 12 and ranked[-1] > 4.0, "all are admitted, and prompts ride with them"
        assert (ranked[-1] > 20.0) == (pace is None), "a whole prompt rides only where no clock looks at it"
