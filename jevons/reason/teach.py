"""A teacher's answers as training data: sampled by the engine, checked by the task's scorer (R1 section 2.3.3), kept as JSONL."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jevons.chat import END_THINK, ReasoningParser
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.engine.types import Request, SamplingParams
from jevons.model import CausalLM, build_model
from jevons.plan.fit import student_config
from jevons.reason.rollout import check_finite, completion_text
from jevons.recipe import DistilStage
from jevons.store.checkpoint import load_checkpoint
from jevons.store.files import write_text
from jevons.tasks.base import Task
from jevons.train.distil import LogitDistil, check_same_tokenizer
from jevons.train.sft import SFT, read_conversations, render

if TYPE_CHECKING:
    from jevons.train.parallel.mesh import World

ROUND = 128  # problems sampled at once; each round is on the disk before the next begins
TRACES = "traces.jsonl"


class TeacherError(ValueError):
    """A teacher that left nothing to learn from; the message says what would help."""


def sample_traces(model: CausalLM, tokenizer: Tokenizer, task: Task, stage: DistilStage, seed: int, directory: Path,
                  check_stop: Callable[[], None], on_round: Callable[[int, int], None], world: World | None = None) -> Path:
    """`directory/traces.jsonl`: a line an answer that ended and is right (or `keep = "all"`), as `question` and `answer`, which
    SFT reads. A function of (weights, seed); what an interrupted call sampled whole is kept. Raises TeacherError.

    Many processes share out whole rounds, so that an answer has the same company in any number of them, and the same bits."""
    final, parts = directory / TRACES, directory / "traces"
    rounds, leads = -(-stage.problems // ROUND), world is None or world.leads
    rank, ranks, meet = (world.rank, world.size, world.meet) if world else (0, 1, lambda: None)
    if not final.exists():
        parts.mkdir(parents=True, exist_ok=True)
        for first in range(0, rounds, ranks):
            meet()
            check_stop()
            index = first + rank
            part = parts / f"{index:05d}.jsonl"
            if index < rounds and not part.exists():
                count, name = min(ROUND, stage.problems - index * ROUND), f"traces {seed + stage.first_seed} {index}"
                write_text(part, _round(model, tokenizer, task, stage, name, count, check_stop if ranks == 1 else None))
            on_round(min(first + ranks, rounds), rounds)
        meet()  # all parts are there
        text = "".join((parts / f"{index:05d}.jsonl").read_text(encoding="utf-8") for index in range(rounds))
        if not text:
            wanted = "ended and was right" if stage.keep == "right" else "ended"
            raise TeacherError(f"none of the teacher's {stage.problems * stage.samples} answers {wanted}; a max_tokens over "
                               f"{stage.max_tokens}, more samples, keep = \"all\" or a better teacher would help")
        if leads:
            write_text(final, text)
        meet()  # and all have read them
    if leads:
        shutil.rmtree(parts, ignore_errors=True)
    return final


def _round(model: CausalLM, tokenizer: Tokenizer, task: Task, stage: DistilStage, seed: str, count: int,
           check_stop: Callable[[], None] | None) -> str:
    """One round's lines."""
    rng, render = random.Random(seed), tokenizer.renderer()
    problems = [task.sample(rng) for _ in range(count)]
    prompts = [render.question(p.prompt) for p in problems]
    opened = ReasoningParser.after(prompts[0], tokenizer).in_reasoning
    engine = Engine(model, tokenizer.eos_id, max_batch=min(128, count * stage.samples),
                    max_len=min(model.config.max_position_embeddings, stage.max_tokens + max(map(len, prompts))))
    completions = engine.generate([
        Request(prompt, SamplingParams(stage.max_tokens, stage.temperature, seed=rng.getrandbits(63),
                                       stop_token_ids=tokenizer.stop_ids))
        for prompt in prompts for _ in range(stage.samples)], check_stop)
    check_finite(completions)
    lines: dict[str, None] = {}  # a teacher that says the same twice says it once
    for index, completion in enumerate(completions):
        problem, text = problems[index // stage.samples], completion_text(completion, tokenizer)
        correct = task.score(problem, text).correct
        whole = completion.finish_reason == "stop" and (END_THINK in text or not opened)
        if whole and (correct == 1.0 or stage.keep == "all"):
            row = {"question": problem.prompt, "answer": text, "correct": correct, "key": problem.key}
            lines[json.dumps(row, ensure_ascii=True) + "\n"] = None
    return "".join(lines)


def new_student(stage: DistilStage, teacher: CausalLM, tokenizer: Tokenizer, seed: int) -> tuple[CausalLM, Tokenizer]:
    """The student as it begins, and its tokenizer: a checkpoint's own, else the teacher's. Raises ValueError where logits could
    not be compared."""
    if stage.student.from_dir:
        loaded = load_checkpoint(stage.student.from_dir, changes=stage.student.set)
        student, own = loaded.model, loaded.tokenizer
    else:
        student, own = build_model(student_config(stage, teacher.config), seed=seed), tokenizer
    if stage.mode == "logits":
        check_same_tokenizer(tokenizer, own)
    return student, own


def distil(teacher: CausalLM, student: CausalLM, tokenizer: Tokenizer, directory: Path, stage: DistilStage, seed: int) -> SFT:
    """The student's objective over `directory/traces.jsonl`. Answers past its context are left out."""
    traces = read_conversations(directory / TRACES)
    documents = render(traces, tokenizer, student.config.max_position_embeddings, "drop")
    notes = [f"the teacher's answers: {len(traces)} of {stage.problems * stage.samples} kept, {len(documents)} fit the student"]
    if stage.mode == "logits":
        return LogitDistil(teacher, student, tokenizer, documents, stage, seed, notes)
    return SFT(student, tokenizer, documents, stage, seed, notes)
