"""What goes into and comes out of the engine: `Request`, `TokenEvent`, `Completion`. No torch here."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled", "error"]


class PromptTooLong(ValueError):
    """The prompt does not fit the context; it is never truncated."""


class QueueFull(RuntimeError):
    """The waiting queue is at its bound; `retry_after` is a hint in seconds."""

    retry_after: float = 1.0


@dataclass(frozen=True)
class Thinking:
    """For a prompt that opens a thought: what may close it before the model does.

    `end_id` is the token that ends a thought (`</think>`); `close_ids` is what is put there to close one gracefully, `end_id`
    among them. `max_tokens` bounds the thought; `Engine.end_thought` closes it at once."""

    end_id: int
    close_ids: tuple[int, ...]
    max_tokens: int | None = None


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. `temperature` 0 is greedy. Noise is a function of (seed, position) only."""

    max_tokens: int | None = None  # None: as far as the context reaches
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()  # strings; the text ends before the first one found in the output
    stop_token_ids: tuple[int, ...] = ()  # beside the model's eos
    thinking: Thinking | None = None  # None: the engine knows of no thought
    loop_guard: bool = False  # an endless repetition closes the thought; after it, it ends the answer (reason "length")


@dataclass(frozen=True)
class Request:
    prompt_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def check(self, vocab_size: int) -> None:
        """Raises ValueError for what no engine of that vocabulary could run."""
        params, known = self.params, range(vocab_size)
        if not 0 <= params.temperature <= 100 or not 0 < params.top_p <= 1:
            raise ValueError(f"temperature {params.temperature} must lie in 0..100 and top_p {params.top_p} in (0, 1]")
        if not all(i in known for i in self.prompt_ids):
            raise ValueError(f"a prompt id lies outside the vocabulary of {vocab_size}")
        if params.thinking and not all(i in known for i in params.thinking.close_ids):
            raise ValueError(f"thinking.close_ids {list(params.thinking.close_ids)} reach outside the vocabulary of {vocab_size}")
        if not all(params.stop):
            raise ValueError(f"stop {list(params.stop)} holds an empty string, which every text contains")


@dataclass(frozen=True)
class Usage:
    """What a request made use of."""

    cached_tokens: int = 0  # of its prompt, read from the prefix cache
    drafted_tokens: int = 0  # by the MTP module
    accepted_tokens: int = 0  # of these, tokens of the answer
    preempted: int = 0  # how often it was put back and computed again, for want of pages
    thought_closed: Literal["budget", "asked", "loop"] | None = None  # by whom, where not by the model
    loop: bool = False  # the loop guard ended the answer


class TokenEvent(NamedTuple):
    """One new token of one request, or its end. The last event of a request has `finish_reason` set.

    `token_id` is None on an end without a token (cancelled, error). `logprob` is that of the distribution sampled
    from, temperature included, top-p not (what the trainer's importance weights need)."""

    request_id: str
    token_id: int | None
    logprob: float = 0.0
    finish_reason: FinishReason | None = None
    error: str | None = None
    usage: Usage | None = None  # with the finish reason


@dataclass
class Completion:
    request_id: str
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)  # the eos, where the model produced it, included
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
