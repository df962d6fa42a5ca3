"""Evaluation on held-out problems: pass@1, pass@k, cons@k, thinking length, MTP acceptance, with 95 % intervals."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from jevons.chat import END_THINK, ReasoningParser, count_votes
from jevons.data.packing import pack, take_documents
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.engine.types import Completion, Request, SamplingParams
from jevons.model import CausalLM
from jevons.numerics.memory import on_device
from jevons.reason.rollout import check_finite, completion_text
from jevons.store.files import write_text
from jevons.tasks.base import Problem, Task


@dataclass
class EvalResult:
    n: int
    accuracy: float  # pass@1: share right, averaged over a problem's samples
    low: float
    high: float
    thinking_length: float
    length: float
    truncated: float
    samples: int = 1
    pass_at_k: float | None = None  # share of problems with at least one right sample
    pass_low: float | None = None
    pass_high: float | None = None
    cons_at_k: float | None = None  # share of problems where the answer that most samples give is right
    cons_low: float | None = None
    cons_high: float | None = None
    mtp_acceptance: float | None = None

    def record(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v is not None}


def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson score)."""
    if n == 0:
        return 0.0, 1.0
    p = right / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def paired_interval(before: list[float], after: list[float], z: float = 1.96) -> tuple[float, float, float]:
    """(mean, low, high) of the difference after - before over the same problems, 95 % normal interval."""
    gains = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(gains) / len(gains)
    variance = sum((g - mean) ** 2 for g in gains) / max(1, len(gains) - 1)
    half = z * math.sqrt(variance / len(gains))
    return mean, mean - half, mean + half


def held_out_problems(task: Task, n: int, seed: int) -> list[Problem]:
    """Problems never trained on: the task's held-out split, or, for a task without one, seeds training never uses."""
    rng = random.Random(f"evaluation {seed}")
    draw = getattr(task, "sample_heldout", None) or task.sample
    return [draw(rng) for _ in range(n)]


def evaluate(model: CausalLM, tokenizer: Tokenizer, task: Task, n: int = 1000, seed: int = 0, max_tokens: int = 256,
             samples: int = 1, temperature: float = 0.0, max_batch: int = 128, dump: Path | None = None,
             on_step: Callable[[], None] | None = None,
             ) -> tuple[EvalResult, list[float]]:
    """The result, and per problem the share of right samples (for paired comparisons). Greedy unless told otherwise.

    `dump` receives one JSON line per answer, prompt and full text included, so that anybody can rescore.
    `on_step` is called before every step of the engine; what it raises ends the evaluation. Raises PromptTooLong, and
    ValueError for a model whose logits are not finite.
    """
    problems = held_out_problems(task, n, seed)
    render = tokenizer.renderer()
    prompts = [render.question(p.prompt) for p in problems]
    room = max_tokens + max(map(len, prompts))
    engine = Engine(model, tokenizer.eos_id, max_batch=min(max_batch, n * samples),
                    max_len=min(room, model.config.max_position_embeddings))
    completions = engine.generate([
        Request(prompt, SamplingParams(max_tokens, temperature, seed=(seed << 32) + i * samples + k,
                                       stop_token_ids=tokenizer.stop_ids))
        for i, prompt in enumerate(prompts) for k in range(samples)], on_step)
    check_finite(completions)
    end = tokenizer.special[END_THINK]
    opened = ReasoningParser.after(prompts[0], tokenizer).in_reasoning
    lines, scores, lengths, thinking, answers = [], [], [], [], []
    for index, completion in enumerate(completions):
        problem, text = problems[index // samples], completion_text(completion, tokenizer)
        scores.append(float(task.score(problem, text).correct == 1.0))
        before, tag, after = text.partition(END_THINK)
        answer = after if tag else "" if opened else before
        answers.append(answer if completion.finish_reason == "stop" else None)
        ids = completion.token_ids
        lengths.append(len(ids))
        thinking.append(ids.index(end) if end in ids else len(ids))
        lines.append(json.dumps({"key": problem.key, "prompt": problem.prompt, "data": problem.data, "completion": text,
                                 "correct": scores[-1], "finish_reason": completion.finish_reason}))
    if dump is not None:
        write_text(dump, "\n".join(lines) + "\n")
    shares = [sum(scores[i : i + samples]) / samples for i in range(0, len(scores), samples)]
    low, high = wilson(sum(shares), n)
    result = EvalResult(n, sum(shares) / n, low, high, sum(thinking) / len(thinking), sum(lengths) / len(lengths),
                        sum(c.finish_reason == "length" for c in completions) / len(completions), samples)
    if samples > 1:
        some = sum(share > 0 for share in shares)
        voted = sum(scores[i + _winner(answers[i : i + samples])] for i in range(0, len(scores), samples))
        result.pass_at_k, result.cons_at_k = some / n, voted / n
        result.pass_low, result.pass_high = wilson(some, n)
        result.cons_low, result.cons_high = wilson(voted, n)
    if model.mtp and temperature == 0:
        result.mtp_acceptance = mtp_acceptance(model, completions[:256], tokenizer.pad_id)
    return result, shares


def _winner(answers: list[str | None]) -> int:
    """The sample that a majority vote chooses: the first of those with the commonest answer; 0 where none has an answer."""
    tally = count_votes(answers)
    return tally[0][1][0] if tally else 0


@torch.no_grad()
def mtp_acceptance(model: CausalLM, completions: list[Completion], pad_id: int) -> float:
    """How often the MTP module's greedy second-next token is the one that greedy decoding then produced."""
    documents = [(c.prompt_ids + c.token_ids, [0.0] * len(c.prompt_ids) + [1.0] * len(c.token_ids)) for c in completions]
    right = total = 0
    while documents:
        chosen = take_documents(iter(documents), 8192)
        documents = documents[len(chosen) :]
        batch = on_device(pack(chosen, pad_id), model.embed_tokens.weight.device)
        out = model.forward_train(batch.tokens_N, batch.positions_N, batch.segments)
        keep = batch.mtp_weights_N.nonzero().squeeze(1)
        guess = model.logits(out.mtp_hidden_ND[keep]).argmax(-1)
        right += int((guess == batch.mtp_targets_N[keep]).sum())
        total += keep.numel()
    return right / max(1, total)
