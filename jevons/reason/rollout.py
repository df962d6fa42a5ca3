"""Rollouts: problems, groups of answers from the in-process engine on the live weights, rewards, advantages."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jevons.chat import END_THINK, split_thought
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.engine.types import Completion, Request, SamplingParams
from jevons.recipe import GRPOStage
from jevons.tasks.base import Problem, Reward, Task


@dataclass
class Episode:
    """One answer to one problem."""

    problem: Problem
    completion: Completion
    text: str  # thought and answer, without the eos
    reward: Reward
    value: float  # what the advantage is taken of: the weighted sum of the reward's parts
    advantage: float = 0.0
    group: int = 0

    @property
    def truncated(self) -> bool:
        return self.completion.finish_reason == "length"

    @property
    def tokens(self) -> int:
        return len(self.completion.token_ids)

    def shown(self) -> dict[str, Any]:
        thought, answer = split_thought(self.text)
        return {"prompt": self.problem.prompt, "thought": thought, "answer": answer, "correct": int(self.reward.correct == 1.0)}


def check_finite(completions: Sequence[Completion]) -> None:
    """Raises ValueError for a model that could not finish them."""
    if any(c.finish_reason == "error" for c in completions):
        raise ValueError("the model's logits are not finite; a weight is damaged")


def completion_text(completion: Completion, tokenizer: Tokenizer) -> str:
    """Decoded completion without its eos; special tokens as their text."""
    ids = completion.token_ids
    if ids and ids[-1] == tokenizer.eos_id:
        ids = ids[:-1]
    return tokenizer.decode(ids)


def advantages(values: Sequence[float], std_normalise: bool) -> list[float]:
    """Group-relative advantages r - mean, divided by the standard deviation only in the published recipe."""
    mean = sum(values) / len(values)
    centred = [v - mean for v in values]
    if std_normalise:
        std = (sum(c * c for c in centred) / len(values)) ** 0.5
        centred = [c / (std + 1e-6) for c in centred]
    return centred


@dataclass
class Rollouts:
    """A step's groups: `groups` have spread and are trained on; `all` is every episode, for the log."""

    groups: list[list[Episode]]
    all: list[Episode]
    zero_spread: float  # share of groups whose rewards are all equal


class Roller:
    def __init__(self, engine: Engine, tokenizer: Tokenizer, task: Task, stage: GRPOStage, seed: int):
        self.engine, self.tokenizer, self.task, self.stage, self.seed = engine, tokenizer, task, stage, seed
        self._render = tokenizer.renderer()
        self.end_think_id = tokenizer.special[END_THINK]
        self.part: tuple[int, int] = (0, 1)  # of every round's problems: the rank's, of how many ranks
        self.everyone: Callable[[Any], list[Any]] = lambda own: [own]  # every rank's, in their order

    def roll(self, step: int, on_step: Callable[[], None] | None = None) -> Rollouts:
        """Groups for one step, a function of (weights, seed, step). Groups without spread are replaced by new problems,
        `resample_rounds` times; what still has none carries no gradient and is left out. `on_step` is called before every
        step of the engine; what it raises ends the rollouts, and nothing of them stays behind."""
        kept: list[list[Episode]] = []
        everything: list[list[Episode]] = []
        for round_index in range(self.stage.resample_rounds + 1):
            missing = self.stage.problems - len(kept)
            if missing == 0:
                break
            groups = self._round(step, round_index, missing, on_step)
            everything += groups
            kept += [g for g in groups if len({e.value for e in g}) > 1]
        for index, group in enumerate(everything):
            for episode, advantage in zip(group, advantages([e.value for e in group], self.stage.std_normalise), strict=True):
                episode.advantage, episode.group = advantage, index
        return Rollouts(kept, [e for g in everything for e in g], 1 - len(kept) / len(everything))

    def _round(self, step: int, round_index: int, count: int,
               on_step: Callable[[], None] | None) -> list[list[Episode]]:
        stage = self.stage
        rng = random.Random(f"rollout {self.seed + stage.first_seed} {step} {round_index}")
        problems = [self.task.sample(rng) for _ in range(count)]
        requests = []
        for problem in problems:
            prompt = self._render.question(problem.prompt)
            requests += [Request(prompt, SamplingParams(stage.max_tokens, stage.temperature, seed=rng.getrandbits(63),
                                                        stop_token_ids=self.tokenizer.stop_ids))
                         for _ in range(stage.group_size)]
        rank, ranks = self.part
        groups = [requests[i : i + stage.group_size] for i in range(0, len(requests), stage.group_size)]
        completions = self.engine.generate([request for group in groups[rank::ranks] for request in group], on_step)
        check_finite(completions)
        own = []
        for index, completion in enumerate(completions):
            problem = problems[rank::ranks][index // stage.group_size]
            text = completion_text(completion, self.tokenizer)
            reward = self.task.score(problem, text)
            value = reward.correct + stage.format_weight * reward.parts.get("format", 0.0)
            own.append(Episode(problem, completion, text, reward, value))
        made = self.everyone([own[i : i + stage.group_size] for i in range(0, len(own), stage.group_size)])
        whole = [made[i % ranks][i // ranks] for i in range(count)]
        if stage.random_reward:
            for episode in (e for group in whole for e in group):
                episode.value = float(rng.random() < 0.5)
        return whole
