"""The chat request as clients send it: types, ranges, and what is refused because it would be ignored."""

from __future__ import annotations

import difflib
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from jevons.engine.types import SamplingParams

_MAX_STOPS = 16
MAX_CHOICES, MAX_VOTES = 16, 64
# Fields whose effect the engine does not have, with the values that ask for nothing. Any other value is an error.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none",),
    "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "response_format": ({"type": "text"},),
    "frequency_penalty": (0,), "presence_penalty": (0,), "modalities": (["text"],), "audio": (), "prediction": ({},),
    "web_search_options": (), "reasoning_effort": (), "top_k": (-1, 0), "min_p": (0,), "repetition_penalty": (1,),
    "min_tokens": (0,), "ignore_eos": (False,), "stop_token_ids": ([],), "echo": (False,), "suffix": ("",),
    "chat_template_kwargs": ({},), "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
}


class Unsupported(ValueError):
    """A field that asks for something this server does not do; `param` names it."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class Message(_Model):
    """`reasoning_content` (and `reasoning`) of earlier turns may be there and is not used. Text parts become lines."""

    role: str
    content: str | None = Field(json_schema_extra={"description": "text, or a list of {type: 'text', text} parts"}, default=None)

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError("a list of content may hold only parts like {'type': 'text', 'text': '...'}")
        return "\n".join(part["text"] for part in content)

    @model_validator(mode="after")
    def _needs_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content of a {self.role!r} message must be text")
        return self


class StreamOptions(_Model):
    include_usage: bool | None = None


class ThinkingSwitch(_Model):
    """DeepSeek's and Anthropic's way to say it: "disabled" closes the thought at once, a budget is `max_thinking_tokens`."""

    type: Literal["enabled", "disabled"]
    budget_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> ThinkingSwitch:
        if self.type == "disabled" and self.budget_tokens:
            raise ValueError(f"budget_tokens is {self.budget_tokens} and type is 'disabled'; give one of them")
        return self


class ChatRequest(_Model):
    """Body of POST /v1/chat/completions. Labels of others (`user`, `metadata`) are accepted; fields that ask for what is not done
    here are not, nor are misspelt ones.

    Ours: `max_thinking_tokens`, `loop_guard` and `votes` (see docs/api.md)."""

    messages: list[Message]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    votes: Annotated[int, Field(ge=1, le=MAX_VOTES)] | None = None
    max_thinking_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    thinking: ThinkingSwitch | None = None
    loop_guard: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, stop: Any) -> Any:
        strings = [stop] if isinstance(stop, str) else [] if stop is None else stop
        whole = isinstance(strings, list) and len(strings) <= _MAX_STOPS
        if not whole or not all(isinstance(s, str) and 1 <= len(s) <= 1000 for s in strings):
            raise ValueError(f"a string, or a list of at most {_MAX_STOPS}, each of 1 to 1000 characters, would be right")
        return stop

    @property
    def samples(self) -> int:
        """How many answers are to be sampled."""
        return self.votes or self.n or 1

    def thinking_budget(self) -> tuple[str, int | None]:
        """(the field that says how many tokens a thought may have, the number); None where no field does."""
        if self.thinking is None or self.max_thinking_tokens is not None:
            return "max_thinking_tokens", self.max_thinking_tokens
        return "thinking", 0 if self.thinking.type == "disabled" else self.thinking.budget_tokens

    def refuse_unsupported(self) -> None:
        """Raises Unsupported for a field that would silently change nothing, and for two that contradict each other."""
        if self.votes is not None and (self.n or 1) > 1:
            raise Unsupported("n", f"n is {self.n} and votes is {self.votes}; votes gives one choice, leave n out")
        if self.thinking is not None and self.max_thinking_tokens is not None:
            budget = 0 if self.thinking.type == "disabled" else self.thinking.budget_tokens
            if budget not in (None, self.max_thinking_tokens):
                raise Unsupported("thinking", f"thinking gives the thought {budget} tokens and max_thinking_tokens "
                                              f"{self.max_thinking_tokens}; give one of them")
        extra = self.model_extra or {}
        for name, harmless in _UNSUPPORTED.items():
            if (value := extra.get(name)) is not None and value not in harmless:
                hint = f"; leave it out or send {harmless[0]!r}" if harmless else "; leave it out"
                raise Unsupported(name, f"{name} is not supported by this server{hint}")
        for name in extra.keys() - _UNSUPPORTED.keys():
            if near := difflib.get_close_matches(name, type(self).model_fields, n=1, cutoff=0.8):
                raise Unsupported(name, f"{name} is not a field of a request; {near[0]} would be")
        for index, message in enumerate(self.messages):
            for name in ("tool_calls", "prefix"):
                if (message.model_extra or {}).get(name):
                    raise Unsupported(f"messages[{index}].{name}", f"messages[{index}].{name} is not supported by this server")

    def conversation(self) -> list[dict[str, str]]:
        """Role and text of each message, as `chat.Renderer` takes them; OpenAI's `developer` is a system message."""
        return [{"role": "system" if m.role == "developer" else m.role, "content": m.content or ""} for m in self.messages]

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self) -> list[SamplingParams]:
        """One for each sample, with seeds that follow each other. A request without a seed gets a random one."""
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        seed = secrets.randbits(31) if self.seed is None else self.seed
        return [SamplingParams(
            max_tokens=min(limits, default=None),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=seed + index & (2**63 - 1),
            stop=self.stops(),
            loop_guard=self.loop_guard is not False,
        ) for index in range(self.samples)]
