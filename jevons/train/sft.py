"""Supervised fine-tuning: conversations from JSONL through the one renderer, the loss on the assistant's own words.

Every answer is an example of its own, rendered after what the server would send before it; each is a row, and attention ends
with its row (what the V3 report calls packing with sample masking).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jevons.chat import ChatError, check_roles
from jevons.data.packing import Batch, Document, Prefetcher, weight_totals
from jevons.data.sources import DataError, json_line
from jevons.data.tokenizer import Tokenizer
from jevons.model import CausalLM
from jevons.recipe import FinetuneStage, SFTStage
from jevons.train.objective import TokenObjective, micro_batches

ROWS = 8  # examples a segment
_PAIRS = (("question", "answer"), ("prompt", "completion"))
Conversation = tuple[str, list[dict[str, Any]]]  # where it was read (file:line), and its messages


def read_conversations(path: str | Path) -> list[Conversation]:
    """The rows of a JSONL file: `messages` as in the chat API, the last one the assistant's; or `question` and `answer`
    (`prompt` and `completion`). A thought is the answer's text before `</think>`, or the message's `reasoning_content`.

    Raises DataError naming the file and the line."""
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; a JSONL file of `messages`, or of `question` and `answer`, "
                        "would be right") from None
    out = [(f"{path}:{number}", _messages(line, f"{path}:{number}")) for number, line in enumerate(lines, 1) if line.strip()]
    if not out:
        raise DataError(f"{path} holds no row")
    return out


def _messages(line: bytes, where: str) -> list[dict[str, Any]]:
    row = json_line(line, where)
    pair = next((pair for pair in _PAIRS if isinstance(row, dict) and set(pair) <= set(row)), None)
    if pair and "messages" not in row:
        row = {"messages": [{"role": "user", "content": row[pair[0]]}, {"role": "assistant", "content": row[pair[1]]}]}
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"{where}: needs `messages`, a list of objects with role and content, or `question` and `answer`")
    for index, message in enumerate(messages):
        for key in ("role", "content", "reasoning_content"):
            if not isinstance(message.get(key, "" if key == "reasoning_content" else None), str):
                raise DataError(f"{where}: messages[{index}].{key} is {message.get(key)!r:.60}; text would be right")
        if message["role"] == "assistant" and not message["content"].strip():
            raise DataError(f"{where}: messages[{index}].content, an assistant's answer, is empty")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: messages[{len(messages) - 1}].role is {messages[-1]['role']!r}; the last message must be the "
                        "assistant's")
    try:
        check_roles(messages[:-1])
    except ChatError as error:
        raise DataError(f"{where}: {error}") from None
    return messages


def answers(conversations: Sequence[Conversation]) -> int:
    """How many examples they make."""
    return sum(m["role"] == "assistant" for _, messages in conversations for m in messages)


def render(conversations: Sequence[Conversation], tokenizer: Tokenizer, room: int, longer: str = "refuse") -> list[Document]:
    """One document an answer. Raises DataError naming the row that does not fit `room` tokens, unless `longer` is "drop"."""
    renderer, out = tokenizer.renderer(), []
    for where, messages in conversations:
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                rendered = renderer.conversation(messages[: index + 1])
            except ChatError as error:
                raise DataError(f"{where}: {error}") from None
            if len(rendered.ids) <= room:
                out.append((rendered.ids, [float(own) for own in rendered.loss_mask]))
            elif longer == "refuse":
                raise DataError(f"{where}: {len(rendered.ids)} tokens do not fit the context of {room}; longer = \"drop\" leaves "
                                "such rows out, a longer max_position_embeddings takes them in")
    if not out:
        raise DataError(f"no example fits the context of {room} tokens")
    return out


class SFT(TokenObjective):
    """Each epoch is every example once, in an order of its own; a step takes the next `batch` of them."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, documents: list[Document], stage: FinetuneStage, seed: int,
                 notes: Sequence[str] = ()):
        self.model, self.tokenizer, self.documents, self.stage, self.seed = model, tokenizer, documents, stage, seed
        self.steps, self._notes = stage.steps(len(documents)), list(notes)
        self._prefetch = Prefetcher(self._make)
        self._orders: dict[int, list[int]] = {}

    @classmethod
    def of(cls, model: CausalLM, tokenizer: Tokenizer, stage: SFTStage, seed: int) -> SFT:
        """On the files of the stage. Raises DataError."""
        conversations = [c for path in stage.data for c in read_conversations(path)]
        documents = render(conversations, tokenizer, model.config.max_position_embeddings, stage.longer)
        left = answers(conversations) - len(documents)
        return cls(model, tokenizer, documents, stage, seed,
                   [f"{left} of {left + len(documents)} examples are longer than the context and left out"] if left else [])

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self.documents)))
            random.Random(f"epoch {self.seed} {epoch}").shuffle(order)
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1} | {epoch: order}
        return self._orders[epoch]

    def _make(self, step: int) -> list[Batch]:
        total, stage = len(self.documents), self.stage
        first = min(step, self.steps - 1) * stage.batch
        places = range(first, min(first + stage.batch, total * stage.epochs))
        chosen = [self.documents[self._order(place // total)[place % total]] for place in places]
        tokens = sum(len(ids) for ids, _ in chosen)
        count = min(len(chosen), max(1, round(tokens / stage.micro_batch_tokens)))
        return micro_batches([chosen[i::count] for i in range(count)], weight_totals(chosen), self.tokenizer.pad_id, ROWS)

    def next_batch(self, step: int) -> list[list[Batch]]:
        self.at_step(step, self.stage.mtp_weight, self.stage.bias_update_speed)
        return [self._prefetch.get(step)]

    def opening(self) -> list[str]:
        return self._notes
