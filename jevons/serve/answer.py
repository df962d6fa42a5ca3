"""Token events of one request to the text that is sent: decoded, cut at stop strings, split into thought and answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jevons.chat import END_THINK, EOS, ReasoningParser
from jevons.engine.types import Thinking, TokenEvent, Usage
from jevons.serve.host import Unavailable


class EngineFailed(RuntimeError):
    """The engine could not go on with a request."""


def thinking_after(prompt_ids: Sequence[int], tokenizer: Any, max_tokens: int | None = None, words: str = "",
                   ) -> Thinking | None:
    """How the thought that a prompt opens may be closed, with which words; None where it opens none, or none that a token
    could close."""
    end_id = tokenizer.special[END_THINK]
    if end_id < 0 or not ReasoningParser.after(prompt_ids, tokenizer).in_reasoning:
        return None
    return Thinking(end_id, tuple(tokenizer.renderer().close_thought(words)), max_tokens)


class StopFilter:
    """Cuts text before the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held = stops, ""

    def feed(self, text: str) -> tuple[str, bool]:
        """(text that may be sent, whether a stop string was found)."""
        text = self.held + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        keep = max((n for stop in self.stops for n in range(min(len(stop) - 1, len(text)), 0, -1)
                    if not found and text.endswith(stop[:n])), default=0)
        end = min(found) if found else len(text) - keep
        self.held = "" if found else text[end:]
        return text[:end], bool(found)


class Answer:
    """Token events of one request to `thought` and `content`, with their counts. `finish` is set at the end; at "error",
    `error` says why.

    `prompt_ids` tell whether the thought is open already; without them it is."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_ids: Sequence[int] | None = None):
        self._decoder, self._eos = tokenizer.decode_stream(), tokenizer.special[EOS]
        self._stop, self._parser = StopFilter(stops), (
            ReasoningParser() if prompt_ids is None else ReasoningParser.after(prompt_ids, tokenizer))
        self.tokens = self.reasoning_tokens = 0
        self.thought = self.content = ""
        self.usage = Usage()
        self.finish: str | None = None
        self.error: str | None = None

    @property
    def thinking(self) -> bool:
        return self._parser.in_reasoning and not self.finish

    def feed(self, events: Sequence[TokenEvent]) -> tuple[str, str]:
        """New (reasoning, content) text. Events after the end are not read. Raises Unavailable when it was cancelled."""
        thought = content = ""
        for event in events:
            if self.finish:
                break
            if event.finish_reason == "cancelled":
                raise Unavailable("the request was cancelled by the server; ask again")
            self.usage = event.usage or self.usage
            if event.finish_reason == "error":
                self.finish, self.error = "error", event.error or "the engine failed"
                break
            text = ""
            if event.token_id is not None:
                self.tokens += 1
                self.reasoning_tokens += self._parser.in_reasoning
                if event.token_id != self._eos:
                    text = self._decoder.step(event.token_id) or ""
            text, stopped = self._stop.feed(text)
            self.finish = "stop" if stopped else event.finish_reason
            if self.finish:
                text += self._stop.held
            for part in [self._parser.feed(text)] + ([self._parser.finish()] if self.finish else []):
                thought, content = thought + part[0], content + part[1]
        self.thought, self.content = self.thought + thought, self.content + content
        return thought, content
