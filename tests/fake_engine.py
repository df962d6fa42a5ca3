"""An engine without a model and a tokenizer without a vocabulary, with the real ones' signatures."""

from __future__ import annotations

import codecs
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from jevons.chat import EOS, SPECIAL_TOKENS, Renderer
from jevons.engine.types import PromptTooLong, QueueFull, Request, SamplingParams, TokenEvent, Usage


class FakeTokenizer:
    """Bytes are ids 0..255; special tokens follow."""

    def __init__(self):
        self.special = {text: 256 + index for index, text in enumerate(SPECIAL_TOKENS)}
        self._texts = {index: text for text, index in self.special.items()}
        self.vocab_size = 256 + len(SPECIAL_TOKENS)
        self.stop_ids = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def script(self, text: str) -> list[int]:
        """Ids of what a model says: special tokens in it are special, eos is appended."""
        ids = []
        while text:
            special = next((s for s in SPECIAL_TOKENS if text.startswith(s)), None)
            ids += [self.special[special]] if special else list(text[0].encode())
            text = text[len(special or text[0]):]
        return [*ids, self.special[EOS]]

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        stream = self.decode_stream()
        return "".join(stream.step(index) or "" for index in ids)

    def decode_stream(self):
        return _DecodeStream(self._texts)

    def renderer(self) -> Renderer:
        return Renderer(self.encode, self.special)


class _DecodeStream:
    def __init__(self, texts: dict[int, str]):
        self._texts, self._decoder = texts, codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id: int) -> str | None:
        return self._texts.get(token_id) or self._decoder.decode(bytes([token_id])) or None


@dataclass
class Speech:
    """A request that runs: what it says and how far it is."""

    request: Request
    ids: list[int]
    at: int = 0
    said: list[int] = field(default_factory=list)
    closing: deque[int] = field(default_factory=deque)
    thinking: bool = True
    asked: list[str] = field(default_factory=list)  # ids of those who were asked to end their thoughts
    drafted: int = 0
    accepted: int = 0
    closed: str | None = None

    def next(self) -> int:
        """The next token: the script's, or one of those that close the thought."""
        params = self.request.params
        if params.thinking is not None and self.thinking and self.closed is None and (why := self._why(params)):
            self.closed, self.closing = why, deque(params.thinking.close_ids)
            end = params.thinking.end_id
            self.at = self.ids.index(end) + 1 if end in self.ids else len(self.ids) - 1
        if self.closing:
            token = self.closing.popleft()
        else:
            token, self.at = self.ids[self.at], self.at + 1
        self.said.append(token)
        if params.thinking is not None and token == params.thinking.end_id:
            self.thinking = False
        return token

    def _why(self, params: SamplingParams) -> str | None:
        if self.request.request_id in self.asked:
            return "asked"
        if params.thinking.max_tokens is not None and len(self.said) >= params.thinking.max_tokens:
            return "budget"
        return "loop" if self.loops() else None

    def loops(self) -> bool:
        """Forty times the same token is a loop."""
        return self.request.params.loop_guard and len(self.said) >= 40 and len(set(self.said[-40:])) == 1

    def usage(self, cached: int) -> Usage:
        cached = min(cached, len(self.request.prompt_ids) - 1)
        return Usage(cached, self.drafted, self.accepted, 0, self.closed, self.closed is None and self.loops())


class FakeEngine:
    """Says `script(request)`, `burst` tokens a step (all but one of them drafts), to at most `max_batch` requests at once.

    `delay` is the time of a step; an exception in `failures` is raised by the next step; what `poison(request)` says ends
    that request with an error after two tokens. `cached` is what every prompt finds in the cache. Stop strings it does not
    know: the server must hold by itself what it promises. It insists on being used by one thread.
    """

    def __init__(self, script: Callable[[Request], list[int]], eos_id: int, max_batch: int = 4, max_len: int = 1024,
                 max_waiting: int = 256, delay: float = 0.0, burst: int = 1, cached: int = 0,
                 poison: Callable[[Request], str | None] = lambda request: None):
        self.script, self.eos_id, self.delay, self.burst = script, eos_id, delay, burst
        self.max_batch, self.max_len, self.max_waiting = max_batch, max_len, max_waiting
        self.cached, self.poison = cached, poison
        self.waiting: deque[Request] = deque()
        self.running: dict[str, Speech] = {}
        self.failures: list[Exception] = []
        self.seen: list[Request] = []
        self.cancelled: list[str] = []
        self.asked: list[str] = []
        self.generated = self.prompt_tokens = self.cached_tokens = self.drafted = self.accepted = 0
        self.owner: int | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def _check_thread(self) -> None:
        self.owner = self.owner or threading.get_ident()
        assert self.owner == threading.get_ident(), "two threads use the engine"

    def submit(self, request: Request) -> str:
        self._check_thread()
        if len(request.prompt_ids) >= self.max_len:
            raise PromptTooLong(f"{len(request.prompt_ids)} tokens, {self.max_len} fit")
        if len(self.waiting) >= self.max_waiting:
            raise QueueFull("full")
        self.waiting.append(request)
        self.seen.append(request)
        return request.request_id

    def cancel(self, request_id: str) -> None:
        self._check_thread()
        self.cancelled.append(request_id)
        self.running.pop(request_id, None)
        self.waiting = deque(r for r in self.waiting if r.request_id != request_id)

    def end_thought(self, request_id: str) -> None:
        self._check_thread()
        self.asked.append(request_id)

    def stats(self) -> dict[str, float]:
        self._check_thread()
        return {"prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens, "drafted_tokens": self.drafted,
                "accepted_tokens": self.accepted, "preemptions": 0, "generated_tokens": self.generated,
                "pages_free": self.max_batch - len(self.running), "pages_cached": 0, "pages_used": len(self.running),
                "speculating": float(self.burst > 1)}

    def step(self) -> list[TokenEvent]:
        self._check_thread()
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting.popleft()
            self.running[request.request_id] = Speech(request, self.script(request), asked=self.asked)
            self.prompt_tokens += len(request.prompt_ids)
            self.cached_tokens += min(self.cached, len(request.prompt_ids) - 1)
        if self.delay:
            time.sleep(self.delay)
        if self.failures:
            raise self.failures.pop()
        return [event for speech in list(self.running.values()) for event in self._say(speech)]

    def _say(self, speech: Speech) -> Iterator[TokenEvent]:
        request = speech.request
        room = self.max_len - len(request.prompt_ids)
        limit = min(room, request.params.max_tokens or room)
        speech.drafted, self.drafted = speech.drafted + self.burst - 1, self.drafted + self.burst - 1
        for index in range(self.burst):
            error = self.poison(request) if len(speech.said) == 2 else None
            token = None if error else speech.next()
            finish = "error" if error else "stop" if token == self.eos_id else None
            if finish is None and (len(speech.said) == limit or not speech.thinking and speech.loops()):
                finish = "length"
            self.generated += 1
            speech.accepted, self.accepted = speech.accepted + (index > 0), self.accepted + (index > 0)
            if finish:
                del self.running[request.request_id]
            yield TokenEvent(request.request_id, token, -0.5, finish, error, speech.usage(self.cached) if finish else None)
            if finish:
                return


class Live:
    """A server on a free port with a fake engine behind it, whose owner thread runs unless `owned` is False."""

    def __init__(self, says: str | Callable[[Request], str] = "one</think>two", owned: bool = True, engine: dict | None = None,
                 max_waiting: int = 256, max_wait: float = 50.0, settings: dict | None = None, **app):
        from jevons.serve.app import Server, ServeSettings, create_app
        from jevons.serve.host import EngineHost

        self.tokenizer = FakeTokenizer()
        script = (lambda request: self.tokenizer.script(says(request) if callable(says) else says))
        self.engine = FakeEngine(script, self.tokenizer.special[EOS], **(engine or {}))
        self.host = EngineHost(self.engine, "tiny", max_waiting=max_waiting, max_wait=max_wait)
        settings = ServeSettings(port=0, **(settings or {}))
        self.app = create_app(self.host, lambda: self.tokenizer, settings, **app)
        self.ledger = self.app.state.ledger
        self.server = Server(self.app, settings)
        self.owner = threading.Thread(target=self.host.run_forever, daemon=True) if owned else None

    def __enter__(self) -> Live:
        self.server.start()
        if self.owner:
            self.owner.start()
        return self

    def __exit__(self, *error) -> None:
        self.host.stop()
        self.server.stop()
        if self.owner:
            self.owner.join(5)
            assert not self.owner.is_alive()

    @property
    def url(self) -> str:
        return self.server.url

    def ask(self, text: str = "hi", client=None, path: str = "/v1/chat/completions", headers: dict | None = None, **fields):
        """POST a chat request, or whatever `json` or `content` says."""
        import httpx

        body = fields.pop("body", {"messages": [{"role": "user", "content": text}], **fields})
        raw = {"content": body} if isinstance(body, (str, bytes)) else {"json": body}
        headers = {"Content-Type": "application/json", **(headers or {})}
        return (client or httpx).post(self.url + path, headers=headers, timeout=30, **raw)

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        return condition()


def read_events(text: str) -> list[dict]:
    """The JSON objects of a stream; asserts that each line is an event, a comment or blank, and that [DONE] ends it."""
    import json

    lines = [line for line in text.split("\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]", text
    return [json.loads(line[6:]) for line in lines[:-1]]
