"""An engine without a model and a tokenizer without a vocabulary, with the real ones' signatures."""

from __future__ import annotations

import codecs
import threading
import time
from collections import deque
from collections.abc import Callable

from jevons.chat import EOS, SPECIAL_TOKENS, Renderer
from jevons.engine.types import PromptTooLong, QueueFull, Request, TokenEvent


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


class FakeEngine:
    """Says `script(request)`, one token a step, to at most `max_batch` requests at once.

    `delay` is the time of a step; an exception in `failures` is raised by the next step. Stop strings it does not know:
    the server must hold by itself what it promises. It insists on being used by one thread.
    """

    def __init__(self, script: Callable[[Request], list[int]], eos_id: int, max_batch: int = 4, max_len: int = 1024,
                 max_waiting: int = 256, delay: float = 0.0):
        self.script, self.eos_id, self.delay = script, eos_id, delay
        self.max_batch, self.max_len, self.max_waiting = max_batch, max_len, max_waiting
        self.waiting: deque[Request] = deque()
        self.running: dict[str, tuple[Request, list[int], int]] = {}
        self.failures: list[Exception] = []
        self.seen: list[Request] = []
        self.cancelled: list[str] = []
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

    def step(self) -> list[TokenEvent]:
        self._check_thread()
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting.popleft()
            self.running[request.request_id] = (request, self.script(request), 0)
        if self.delay:
            time.sleep(self.delay)
        if self.failures:
            raise self.failures.pop()
        events = []
        for request_id, (request, ids, at) in list(self.running.items()):
            room = self.max_len - len(request.prompt_ids)
            limit = min(room, request.params.max_tokens or room)
            finish = "stop" if ids[at] == self.eos_id else "length" if at + 1 >= limit else None
            events.append(TokenEvent(request_id, ids[at], -0.5, finish))
            if finish:
                del self.running[request_id]
            else:
                self.running[request_id] = (request, ids, at + 1)
        return events


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
