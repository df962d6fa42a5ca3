"""One renderer for SFT, RL and the server, and the incremental reasoning parser. No torch here.

A checkpoint of others brings its own template (`TemplateRenderer`); this is the one of our own:

The prompt is R1's own: `<｜begin▁of▁sentence｜>{system}<｜User｜>{q}<｜Assistant｜><think>\\n`. The system text has no role
token; earlier assistant turns keep only the text after `</think>` (facts: R1's published template). The text of a
special token inside a message stays plain text: messages go through `encode`, which knows no special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
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

    def close_thought(self, words: str = "") -> list[int]:
        """Ids that end an open thought wherever it stands, as the model's own thoughts end: a newline, `words` on a line of
        their own, `</think>`, and the newline that our tasks' worked solutions have before the answer. Raises ChatError
        without such a token."""
        return self._close("\n", words, "\n")

    def _close(self, before: str, words: str, after: str) -> list[int]:
        if self.special[END_THINK] < 0:
            raise ChatError(f"the tokenizer has no token {END_THINK}, so that a thought could be closed")
        before += words + before if words else ""
        return [*(self.encode(before) if before else []), self.special[END_THINK], *(self.encode(after) if after else [])]

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

    def conversation(self, messages: Sequence[dict[str, Any]]) -> Rendered:
        """A training example: the last message, the assistant's, as the answer to those before it. Its thought is its
        `reasoning_content`, or its content up to `</think>`; without either it has none. Raises ChatError."""
        *before, last = messages
        if last["role"] != "assistant":
            raise ChatError(f"messages[{len(before)}].role is {last['role']!r}; 'assistant' was expected here")
        prompt, thought, content = self.prompt(before), last.get("reasoning_content"), last["content"]
        if thought:
            content = f"{thought.strip()}\n{END_THINK}{self.after_thought}{content.lstrip()}"
        elif content.startswith(THINK):
            content = content.removeprefix(THINK).removeprefix("\n")
        answer = self.completion(content) if END_THINK in content else self.thoughtless(content)
        return Rendered(prompt + answer, [False] * len(prompt) + [True] * len(answer))

    after_thought = "\n"

    def thoughtless(self, content: str) -> list[int]:
        """Ids of an answer without a thought, eos included: one that the prompt opened is closed at once."""
        return self.completion(f"{END_THINK}{self.after_thought}{content}")


GUARD = "\ufdd0"  # no character of any text: put into a special token's text, it keeps it from becoming the token


class TemplateRenderer(Renderer):
    """Renders conversations with a checkpoint's own jinja2 template, sandboxed.

    The ids are those of `transformers`' `apply_chat_template`, with one difference: a special token's text inside a
    message stays text (`<think>` and `</think>` of the assistant's earlier turns excepted, which are its own).
    `encode_special(text) -> ids` knows the special tokens, `tokens` are their ids by text; `variables` is what the template
    may read (`bos_token`, ...). Raises ChatError naming `source` for a template that is no template or reaches for
    Python's internals.
    """

    def __init__(self, template: str, encode: Callable[[str], list[int]], encode_special: Callable[[str], list[int]],
                 special: dict[str, int], tokens: dict[str, int], variables: dict[str, str], source: str):
        super().__init__(encode, special)
        self.encode_special, self.tokens, self.variables, self.source = encode_special, tokens, variables, source
        texts = sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._template = self._compile(template)
        try:
            self.text([{"role": "user", "content": "x"}])
        except ChatError as error:  # a template may refuse this conversation, and no more
            if "internals" in str(error):
                raise

    def _compile(self, template: str) -> Any:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

        class Sandbox(ImmutableSandboxedEnvironment):
            def unsafe_undefined(self, obj: Any, attribute: str) -> Any:  # jinja2's own is silent until it is used
                raise SecurityError(f"{attribute} of a {type(obj).__name__}")

        def refuse(message: str) -> None:
            raise TemplateError(message)

        def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = to_json
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            return environment.from_string(template)
        except (TemplateError, ArithmeticError, MemoryError, RecursionError) as error:  # constants are folded here
            raise ChatError(f"{self.source}: the chat template is not one: {error}") from None

    def text(self, messages: Sequence[dict[str, Any]]) -> str:
        """The conversation as the template writes it, the beginning of the answer included."""
        from jinja2 import TemplateError
        from jinja2.sandbox import SecurityError

        plain = [{key: value for key, value in m.items() if isinstance(value, str)} for m in messages]
        try:
            return self._template.render(messages=plain, tools=None, documents=None, add_generation_prompt=True, **self.variables)
        except SecurityError as error:
            raise ChatError(f"{self.source}: the chat template reaches for Python's internals: {error}") from None
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, MemoryError,
                RecursionError) as error:
            raise ChatError(f"{self.source}: the chat template refuses these messages: {error}") from None

    def prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Ids of the conversation and of the beginning of the answer. Raises ChatError."""
        if not messages:
            raise ChatError("messages is empty; it needs at least one user message")
        guarded = [m | {"content": self._guard(m.get("content") or "", m.get("role") == "assistant")} for m in messages]
        return self._ids(self.text(guarded))

    def _ids(self, text: str) -> list[int]:
        """Ids of guarded text: what a guard parts from its beginning is text, whatever it looks like."""
        if GUARD not in text:
            return self.encode_special(text)
        ids, at = [], 0
        for match in [*self._special.finditer(text), None]:
            piece = text[at : match.start() if match else None].replace(GUARD, "")
            ids += self.encode(piece) if piece else []
            if match:
                ids.append(self.tokens[match[0]])
                at = match.end()
        return ids

    def _guard(self, content: str, own: bool) -> str:
        def guard(match: re.Match) -> str:
            return match[0] if own and match[0] in (THINK, END_THINK) else match[0][0] + GUARD + match[0][1:]

        return self._special.sub(guard, content.replace(GUARD, "\ufffd"))

    def close_thought(self, words: str = "") -> list[int]:
        """Ids that end an open thought: what the template itself writes between a thought and its answer, where it shows
        thoughts, with `words` before the tag. Otherwise as R1 writes, `\\n</think>\\n\\n`, after a prompt that ends in `<think>`
        and a newline, and `</think>` alone after one without (DeepSeek-V3.1)."""
        thought, answer = "thought", "answer"
        question = {"role": "user", "content": "x"}
        try:
            shown = self.text([question, {"role": "assistant", "reasoning_content": thought, "content": answer}])
        except ChatError:  # it may insist on a question at the end
            shown = ""
        if match := re.search(rf"{thought}(\s*){END_THINK}(\s*){answer}", shown):
            return self._close(match[1], words, match[2])
        lines = not self.text([question]).endswith(THINK)
        return self._close("\n", words, "\n\n") if lines else self._close("", words, "")

    after_thought = "\n\n"

    def _opened(self) -> bool:
        """Whether a prompt ends within the thought."""
        return self.text([{"role": "user", "content": "x"}]).rstrip().endswith(THINK)

    def completion(self, text: str) -> list[int]:
        """Ids of `thought</think>answer` and eos, after a prompt that opens the thought or leaves it to the model."""
        guarded = self._guard(text, own=True)
        return self._ids(guarded if self._opened() else f"{THINK}\n{guarded}") + [self.special[EOS]]

    def thoughtless(self, content: str) -> list[int]:
        return super().thoughtless(content) if self._opened() else [*self.encode(content), self.special[EOS]]


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

    Starts inside the thought when the prompt primed `<think>`; with `in_reasoning` None, the text's first word says whether
    there is one. `feed` returns (reasoning, content) deltas; text that
    might be the beginning of `</think>` is held back until it is decided. The newlines right after the tag are dropped.
    """

    def __init__(self, in_reasoning: bool | None = True):
        self.in_reasoning = bool(in_reasoning)
        self._undecided = in_reasoning is None
        self._held = ""
        self._strip = False

    @classmethod
    def after(cls, prompt_ids: Sequence[int], tokenizer: Any) -> ReasoningParser:
        """The parser of what follows a prompt: within the thought if that is opened at its end, by token or by text."""
        end = list(prompt_ids[-3:])
        opened = tokenizer.special[THINK] in end and tokenizer.special[END_THINK] not in end
        return cls(True if opened or tokenizer.decode(prompt_ids[-8:]).rstrip().endswith(THINK) else None)

    def feed(self, text: str) -> tuple[str, str]:
        if self._undecided:
            self._held += text
            begin = self._held.lstrip()
            if THINK.startswith(begin[: len(THINK)]) and len(begin) < len(THINK):
                return "", ""
            text, self._held, self._undecided = self._held, "", False
            if begin.startswith(THINK):
                self.in_reasoning, text = True, begin[len(THINK) :]
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


_SPACE = re.compile(r"\s+")


def final_answer(text: str) -> str:
    """What an answer comes down to, for comparing it with others: the last `\\boxed{...}` in it where there is one (as R1 is
    asked to mark its result), else the whole of it; white space made single."""
    at = text.rfind("\\boxed{")
    if at >= 0:
        begin = end = at + len("\\boxed{")
        depth = 1
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth:
            text = text[begin : end - 1]
    return _SPACE.sub(" ", text).strip()


def count_votes(answers: Sequence[str | None]) -> list[tuple[str, list[int]]]:
    """(answer, indices of those who gave it), most votes first and of equally many the one that came first. None and empty
    answers do not vote."""
    voters: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        if answer and (final := final_answer(answer)):
            voters.setdefault(final, []).append(index)
    return sorted(voters.items(), key=lambda vote: -len(vote[1]))  # stable: the first to come stays first


def split_thought(text: str) -> tuple[str, str]:
    """(thought, answer) of a whole completion whose prompt primed `<think>`; the answer is empty if it never closed."""
    thought, _, answer = text.partition(END_THINK)
    return thought, answer.strip()
