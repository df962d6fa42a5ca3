"""The bridge between HTTP and the one thread that owns the engine and the weights.

HTTP submits, cancels and iterates from its event loop; the owner pumps: training at its step boundaries, `serve` by
`run_forever`. Only the owner's thread ever calls the engine.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from jevons.engine.types import PromptTooLong, QueueFull, Request, TokenEvent

log = logging.getLogger(__name__)


class Unavailable(RuntimeError):
    """Nothing can answer now; `retry_after` is a hint in seconds."""

    retry_after: float = 5.0


class ModelChanged(Unavailable):
    """The model was replaced while the request was open; its prompt must be made anew with the new tokenizer."""


class TokenStream:
    """The events of one request, or of several that were submitted together, read from one event loop and written by the
    owner's thread.

    `seconds`: engine seconds these requests have been charged with so far (see `ledger`).
    """

    def __init__(self, *requests: Request):
        self.requests = {request.request_id: request for request in requests}
        self.seconds = 0.0
        self.started: set[str] = set()  # ids of which a first event has come
        self._open = set(self.requests)
        self._lock = threading.Lock()
        self._events: deque[TokenEvent] = deque()
        self._error: Exception | None = None
        self._ended = False
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future] | None = None

    @property
    def request(self) -> Request:
        """The first, or only, request."""
        return next(iter(self.requests.values()))

    async def get(self, timeout: float | None = None) -> list[TokenEvent]:
        """All events that wait, at least one; [] after the last. Raises TimeoutError, or what ended the requests."""
        with self._lock:
            if not self._events and not self._ended:
                loop = asyncio.get_running_loop()
                self._waiter = (loop, loop.create_future())
        if self._waiter is not None:
            try:
                async with asyncio.timeout(timeout):
                    await self._waiter[1]
            finally:
                self._waiter = None
        with self._lock:
            events = list(self._events)
            self._events.clear()
        if not events and self._error is not None:
            raise self._error
        return events

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while events := await self.get():
            for event in events:
                yield event

    def put(self, events: Sequence[TokenEvent], error: Exception | None = None) -> None:
        """Owner's side: append events. A finish reason is the end of one request, an error that of all."""
        with self._lock:
            if self._ended:
                return
            for event in events:
                if event.request_id in self._open:
                    self._events.append(event)
                    self.started.add(event.request_id)
                    if event.finish_reason:
                        self._open.discard(event.request_id)
            self._error = error
            self._ended = error is not None or not self._open
            if self._waiter is None:
                return
            loop, future = self._waiter
            try:
                loop.call_soon_threadsafe(lambda: future.done() or future.set_result(None))
            except RuntimeError:  # the reader's loop is closed: nobody reads any more
                pass


class EngineHost:
    """Requests wait in a bounded inbox until the owner pumps. `engine` has `submit`, `step`, `cancel`, `end_thought`, `stats`,
    `has_work`, `max_len`.

    `max_waiting` bounds the requests without a first token; `max_wait` is the time in seconds that the API lets a
    request wait for its next token before it answers 503. `epoch` counts the models (`set_engine`).
    """

    def __init__(self, engine: Any = None, model_name: str | None = None, max_waiting: int = 256,
                 max_wait: float = 50.0):
        self.max_waiting, self.max_wait = max_waiting, max_wait
        self.model_name = model_name
        self.epoch = 0
        self._engine = engine
        self._wake = threading.Condition()
        self._streams: dict[str, TokenStream] = {}  # every open request
        self._inbox: deque[str] = deque()  # of these, the ones the engine has not seen
        self._submitted: set[str] = set()  # and the ones it has
        self._cancels: set[str] = set()
        self._end_thoughts: set[str] = set()
        self._stopped = False
        self.stats: dict[str, float] = {}  # the engine's own, as the owner's thread last read them
        self._stats_at = 0.0

    # HTTP's side: any thread.

    @property
    def ready(self) -> bool:
        return self._engine is not None and not self._stopped

    @property
    def max_len(self) -> int | None:
        """Tokens that a prompt and its answer may have together; None while there is no model."""
        return getattr(self._engine, "max_len", None)

    def counts(self) -> tuple[int, int]:
        """(running, waiting): open requests with and without a first token."""
        with self._wake:
            running = sum(request_id in stream.started for request_id, stream in self._streams.items())
            return running, len(self._streams) - running

    def check_room(self, count: int = 1, ahead: int = 0) -> None:
        """Raises QueueFull when `count` further requests may not wait, with `ahead` others waiting outside; Unavailable at
        the end."""
        if self._stopped:
            raise Unavailable("the server is shutting down")
        if (waiting := self.counts()[1] + ahead) + count > self.max_waiting:
            more = f", too few for {count} more" if count > 1 else ""
            raise QueueFull(f"{waiting} requests are waiting and the queue holds {self.max_waiting}{more}; try again shortly")

    def submit(self, *requests: Request, epoch: int | None = None) -> TokenStream:
        """All of the requests or none. Raises PromptTooLong, QueueFull, Unavailable, and ModelChanged if `epoch` is given
        and no longer the current one.

        Without a model the requests wait for one."""
        with self._wake:
            if epoch is not None and epoch != self.epoch:
                raise ModelChanged("the model was replaced")
            self.check_room(len(requests))
            stream = TokenStream(*requests)
            if len(stream.requests) < len(requests) or not self._streams.keys().isdisjoint(stream.requests):
                raise ValueError(f"one of the request ids {[request.request_id for request in requests]} is in use")
            room, length = self.max_len, max(len(request.prompt_ids) for request in requests)
            if room is not None and length >= room:
                raise PromptTooLong(f"the prompt has {length} tokens and the context holds {room}, at least one of "
                                    "them for the answer; shorten the prompt, it is never truncated")
            self._streams |= dict.fromkeys(stream.requests, stream)
            self._inbox.extend(stream.requests)
            self._wake.notify_all()
        return stream

    def end_thought(self, request_id: str) -> None:
        """The request's thought is closed before the engine's next step; that of one which waits, once the engine has it.
        Unknown ids are fine."""
        with self._wake:
            if request_id in self._streams:
                self._end_thoughts.add(request_id)

    def cancel(self, request_id: str) -> None:
        """Ends the request; the engine is told before its next step. Unknown ids, finished ones too, are fine."""
        with self._wake:
            if (stream := self._streams.pop(request_id, None)) is None:
                return
            self._cancels.add(request_id)
            self._wake.notify_all()
        stream.put([TokenEvent(request_id, None, finish_reason="cancelled")])

    # The owner's side: one thread.

    def set_engine(self, engine: Any | None, model_name: str | None = None) -> None:
        """Swap the model; None while one is being made. Requests that wait for a first model stay; open ones of a model
        that goes end with ModelChanged (the API asks again by itself where nothing was answered yet)."""
        with self._wake:
            old, gone, submitted = self._engine, [], set()
            self._engine, self.model_name = engine, model_name
            self.epoch += 1
            self.stats = {}
            if old is not None:
                gone, submitted = list(self._streams.values()), self._submitted | self._cancels
                self._streams, self._submitted, self._cancels, self._end_thoughts = {}, set(), set(), set()
                self._inbox.clear()
            self._wake.notify_all()
        for stream in gone:
            stream.put([], ModelChanged("the model was replaced while the request was open; ask again"))
        for request_id in submitted:
            _quietly(old.cancel, request_id)

    def pump(self, max_steps: int | None = None) -> int:
        """Serve until nothing is left to do, or for `max_steps` engine steps; returns how many were made."""
        steps = 0
        while not self._stopped:
            engine = self._admit()
            if engine is None or not engine.has_work or steps == max_steps or not self._step(engine):
                break
            steps += 1
        self._read_stats(now=steps > 0)
        return steps

    def run_forever(self) -> None:
        """Pump, and sleep while there is nothing to do, until `stop` is called from another thread, or `ask_to_stop`."""
        while not self._stopped:
            self.pump()
            with self._wake:
                if self._engine is not None and self._engine.has_work:  # only after a step that failed
                    self._wake.wait(0.1)
                # not for ever: a signal that comes right before the wait would be handled only after it
                self._wake.wait_for(lambda: self._stopped or self._engine is not None and (
                    self._inbox or self._cancels or self._engine.has_work), timeout=0.5)
        self.stop()

    def ask_to_stop(self) -> None:
        """`stop`, done by the owner within half a second. Takes no lock, so that a signal handler may call it, whatever
        the thread that it interrupts is holding."""
        self._stopped = True

    def stop(self) -> None:
        """End every open request with Unavailable and let `run_forever` return. Any thread, no signal handler; for good."""
        with self._wake:
            self._stopped = True
            gone = list(self._streams.values())
            self._streams.clear()
            self._wake.notify_all()
        for stream in gone:
            stream.put([], Unavailable("the server is shutting down"))

    def _admit(self) -> Any:
        """Hand inbox and cancellations to the engine, which may refuse a request or be full."""
        with self._wake:
            engine = self._engine
            if engine is None:
                return None
            inbox, self._inbox = self._inbox, deque()
            cancels, self._cancels = self._cancels, set()
            self._end_thoughts &= self._streams.keys()
        while inbox:
            request_id = inbox[0]
            if (stream := self._streams.get(request_id)) is not None:
                try:
                    engine.submit(stream.requests[request_id])
                    self._submitted.add(request_id)
                except QueueFull as error:
                    if engine.has_work:
                        break  # the rest waits here until the engine has room
                    self._end(request_id, stream, error=error)
                except Exception as error:
                    self._end(request_id, stream, error=error)
            inbox.popleft()
        for request_id in self._end_thoughts & self._submitted:
            self._end_thoughts.discard(request_id)
            _quietly(engine.end_thought, request_id)
        for request_id in cancels & self._submitted:
            self._submitted.discard(request_id)
            _quietly(engine.cancel, request_id)
        if inbox:
            with self._wake:
                self._inbox.extendleft(reversed(inbox))
        return engine

    def _step(self, engine: Any) -> bool:
        """One engine step; its time is shared out and its events delivered. False after a failure, which ends the
        requests that the engine had, and nothing else."""
        begin = time.perf_counter()
        try:
            events = engine.step()
        except Exception as error:
            log.exception("the engine failed in a step; its %d requests end with an error", len(self._submitted))
            for request_id in list(self._submitted):
                _quietly(engine.cancel, request_id)
                if stream := self._streams.get(request_id):
                    message = f"the engine failed: {type(error).__name__}: {error}"
                    self._end(request_id, stream, [TokenEvent(request_id, None, finish_reason="error", error=message)])
            self._submitted.clear()
            return False
        self._charge(time.perf_counter() - begin, events)
        by_request: dict[str, list[TokenEvent]] = {}
        for event in events:
            by_request.setdefault(event.request_id, []).append(event)
        for request_id, own in by_request.items():
            ended = own[-1].finish_reason is not None
            if ended:
                self._submitted.discard(request_id)
            if stream := self._streams.get(request_id):
                self._end(request_id, stream, own) if ended else stream.put(own)
        self._read_stats()
        return True

    def _read_stats(self, now: bool = False) -> None:
        """The engine's numbers for /metrics, once a second and when it comes to rest."""
        if (now or time.monotonic() > self._stats_at + 1) and (engine := self._engine) is not None:
            self.stats, self._stats_at = engine.stats(), time.monotonic()

    def _charge(self, seconds: float, events: Sequence[TokenEvent]) -> None:
        shares = Counter(e.request_id for e in events if e.token_id is not None) or Counter(self._submitted)
        total = sum(shares.values())
        for request_id, share in shares.items():
            if stream := self._streams.get(request_id):
                stream.seconds += seconds * share / total

    def _end(self, request_id: str, stream: TokenStream, events: Sequence[TokenEvent] = (),
             error: Exception | None = None) -> None:
        with self._wake:
            self._streams.pop(request_id, None)
        stream.put(events, error)


def _quietly(call: Any, request_id: str) -> None:
    """Tell an engine that may have failed or be going: what it raises then is only logged."""
    try:
        call(request_id)
    except Exception:
        log.exception("%s of request %s failed", call.__name__, request_id)
