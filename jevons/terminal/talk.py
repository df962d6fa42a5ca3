"""A chat in the terminal. Ctrl-C while it thinks asks for the answer; another ends that too."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from jevons.terminal.beside import context_that_fits, use_threads, words_of
from jevons.terminal.checkpoint import known_task, open_checkpoint

CLOSED = {"asked": "the thought was closed when you asked", "budget": "the thought was closed at its limit",
          "loop": "the thought went in circles and was closed"}


class Interrupts:
    """Ctrl-C, counted while an answer comes: the engine is told between two steps, never in the middle of one."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: Any) -> None:
        self.count += 1


def chat_with(checkpoint: Path, temperature: float, max_tokens: int, max_thinking_tokens: int | None = None,
              closing_words: str | None = None, weights: str | None = None,
              device: str = "cpu", gpu_experts: float | None = None) -> None:
    """A loop of questions; Ctrl-D ends the chat."""
    from jevons.engine.engine import Engine
    from jevons.engine.types import SamplingParams

    use_threads(device)
    loaded = open_checkpoint(checkpoint, weights, device, gpu_experts)
    console = Console(highlight=False, emoji=False)
    engine = Engine(loaded.model, loaded.tokenizer.eos_id, max_batch=1, tokenizer=loaded.tokenizer,
                    max_len=context_that_fits(loaded.config, 1, loaded.model), speculate=None)
    words = words_of(known_task(loaded.provenance), closing_words)
    taught = loaded.provenance.get("taught") or loaded.config.architecture
    console.print(f"{taught}. Ctrl-D ends the chat.", style="dim", markup=False, soft_wrap=True)
    seed = 0
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not question:
            continue
        seed += 1
        try:
            with Interrupts() as interrupts, contextlib.closing(
                    answer(engine, loaded.tokenizer, question, SamplingParams(max_tokens, temperature, seed=seed),
                           max_thinking_tokens, words, interrupts),
            ) as parts:
                for style, text in parts:
                    console.print(text, style=style, end="", markup=False)
        except ValueError as error:  # a question longer than the context
            console.print(str(error), style="red", markup=False)
        console.print()


def answer(engine: Any, tokenizer: Any, question: str, params: Any, max_thinking_tokens: int | None, words: str,
           interrupts: Interrupts) -> Iterator[tuple[str, str]]:
    """(style, text) as it comes: the thought dimmed, the answer bold, and why either was ended early."""
    from jevons.engine.types import Request
    from jevons.serve.answer import Answer, thinking_after

    prompt = tokenizer.renderer().question(question)
    thinking = thinking_after(prompt, tokenizer, max_thinking_tokens, words)
    if thinking is None and max_thinking_tokens is not None:
        raise ValueError(f"--max-thinking-tokens {max_thinking_tokens}: this model's prompt opens no thought; leave it out")
    params = replace(params, stop_token_ids=tokenizer.stop_ids, thinking=thinking, loop_guard=True)
    request_id, so_far, told = engine.submit(Request(prompt, params)), Answer(tokenizer, (), prompt), 0
    while not so_far.finish:
        if interrupts.count > told:
            told = interrupts.count
            if told > 1 or thinking is None or not so_far.thinking:
                engine.cancel(request_id)
                yield "dim", "\n(stopped)"
                return
            engine.end_thought(request_id)
        thought, text = so_far.feed([event for event in engine.step() if event.request_id == request_id])
        yield "dim", thought
        yield "bold", text
    if so_far.error:
        raise ValueError(so_far.error)
    why = CLOSED.get(so_far.usage.thought_closed, "the answer went in circles and was ended" if so_far.usage.loop else "")
    yield "dim", f"\n({why})" if why else ""
