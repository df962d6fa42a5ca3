"""One renderer for SFT, RL and the server, and the incremental reasoning parser. No torch here.

The prompt is R1's own: `<｜begin▁of▁sentence｜>{system}<｜User｜>{q}<｜Assistant｜><think>\\n`. The system text has no role
token; earlier assistant turns keep only the text after `</think>` (facts: R1's published template). The text of a
special token inside a message stays plain text: messages go through `encode`, which knows no special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK)

# The same prompt as `render_prompt`, for programs that read `chat_template` from tokenizer_config.json.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(system='') -%}"
    "{%- for m in messages -%}{%- if m.role == 'system' -%}"
    "{%- set ns.system = ns.system + m.content -%}{%- endif -%}{%- endfor -%}"
    "{{- bos_token + ns.system -}}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{{- '<｜User｜>' + m.content -}}"
    "{%- elif m.role == 'assistant' -%}"
    "{{- '<｜Assistant｜>' + m.content.split('</think>')[-1].lstrip('\\n') + '<｜end▁of▁sentence｜>' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}"
)


class ChatError(ValueError):
    """A conversation that cannot be rendered; the message says which message and why."""


@dataclass(frozen=True)
class Rendered:
    """Token ids, and per id whether the model is trained on it (its own words and the eos, never the prompt)."""

    ids: list[int]
    loss_mask: list[bool]


class Renderer:
    """Renders conversations with one tokenizer.

    `encode(text) -> ids` must treat special tokens' text as plain text; `special` maps each of SPECIAL_TOKENS to its id.
    """

    def __init__(self, encode: Callable[[str], list[int]], special: dict[str, int]):
        self.encode = encode
        self.special = special

    def prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Ids of the conversation up to and including the primed `<think>\\n`. Raises ChatError on a wrong role order."""
        check_roles(messages)
        system = "".join(m["content"] for m in messages if m["role"] == "system")
        ids = [self.special[BOS]]
        if system:
            ids += self.encode(system)
        for message in messages:
            if message["role"] == "user":
                ids += [self.special[USER], *self.encode(message["content"])]
            elif message["role"] == "assistant":
                answer = message["content"].split(END_THINK)[-1].lstrip("\n")
                ids += [self.special[ASSISTANT], *self.encode(answer), self.special[EOS]]
        return ids + [self.special[ASSISTANT], self.special[THINK], *self.encode("\n")]

    def question(self, text: str) -> list[int]:
        """The prompt of a single user message."""
        return self.prompt([{"role": "user", "content": text}])

    def completion(self, text: str) -> list[int]:
        """Ids of a completion `thought</think>answer`, eos included. Text without `</think>` is all thought."""
        thought, tag, answer = text.partition(END_THINK)
        ids = self.encode(thought)
        if tag:
            ids += [self.special[END_THINK], *self.encode(answer)]
        return ids + [self.special[EOS]]

    def example(self, question: str, completion: str) -> Rendered:
        """A training example: prompt and completion, with the loss on the completion only."""
        prompt, answer = self.question(question), self.completion(completion)
        return Rendered(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def check_roles(messages: Sequence[dict[str, Any]]) -> None:
    """System messages first, then user and assistant in turn, ending with user. Raises ChatError."""
    if not messages:
        raise ChatError("messages is empty; it needs at least one user message")
    expected = "user"
    for index, message in enumerate(messages):
        role = message.get("role")
        if role == "system" and expected == "user" and all(m["role"] == "system" for m in messages[:index]):
            continue
        if role != expected:
            raise ChatError(f"messages[{index}].role is {role!r}; {expected!r} was expected here")
        expected = "assistant" if role == "user" else "user"
    if expected == "user":
        raise ChatError(f"messages[{len(messages) - 1}].role is {messages[-1]['role']!r}; the last message must be from 'user'")


class ReasoningParser:
    """Splits a stream of text into thought and answer, never splitting a tag.

    Starts inside the thought when the prompt primed `<think>`. `feed` returns (reasoning, content) deltas; text that
    might be the beginning of `</think>` is held back until it is decided. The newlines right after the tag are dropped.
    """

    def __init__(self, in_reasoning: bool = True):
        self.in_reasoning = in_reasoning
        self._held = ""
        self._strip = False

    def feed(self, text: str) -> tuple[str, str]:
        if not self.in_reasoning:
            return "", self._content(text)
        text = self._held + text
        at = text.find(END_THINK)
        if at >= 0:
            self._held, self.in_reasoning, self._strip = "", False, True
            return text[:at], self._content(text[at + len(END_THINK):])
        keep = next((n for n in range(min(len(END_THINK) - 1, len(text)), 0, -1) if text.endswith(END_THINK[:n])), 0)
        self._held = text[len(text) - keep:]
        return text[: len(text) - keep], ""

    def finish(self) -> tuple[str, str]:
        """What was held back when the stream ends."""
        held, self._held = self._held, ""
        return (held, "") if self.in_reasoning else ("", held)

    def _content(self, text: str) -> str:
        if self._strip:
            text = text.lstrip("\n")
            self._strip = not text
        return text


def split_thought(text: str) -> tuple[str, str]:
    """(thought, answer) of a whole completion whose prompt primed `<think>`; the answer is empty if it never closed."""
    thought, _, answer = text.partition(END_THINK)
    return thought, answer.strip()
