"""Stages of a recipe: one table each, told apart by `kind`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jevons.recipe.schedule import Timeline, check_phases, highest, scheduled
from jevons.recipe.tables import OptimizerTable, Table

DIRECTORY_NAME = r"^\w[\w.+ -]*$"  # names become directories


class StageTable(Table):
    name: str = Field("", pattern=DIRECTORY_NAME)
    save_every: int = Field(50, ge=1, description="steps between checkpoints")


    def beside(self, find: Callable[[str], str]) -> StageTable:
        """The same stage with its relative paths found beside the recipe."""
        return self


class TrainedStage(StageTable):
    """A stage that leaves a checkpoint. Every number of it that may follow a schedule is checked here."""

    ema_decay: float | None = Field(None, gt=0, lt=1, description="keep an average of the weights, saved and scored beside them")

    @model_validator(mode="after")
    def _schedules(self) -> TrainedStage:
        total = getattr(self, "tokens", None)
        for name in type(self).model_fields:
            check_phases(name, getattr(self, name), total)
        check_phases("optimizer.schedule", self.optimizer.schedule, total)
        return self


class PretrainStage(TrainedStage):
    """Next-token and MTP loss on packed traces of the task. What follows a schedule is a number or phases (`schedule.py`)."""

    kind: Literal["pretrain"]
    tokens: int = Field(gt=0)
    batch_tokens: scheduled(Annotated[int, Field(gt=0)]) = 8192
    micro_batch_tokens: int | None = Field(None, gt=0, description="computed at once; on CPU each core takes one")
    prompt_weight: float = Field(0.1, ge=0, le=1)
    mtp_weight: scheduled(Annotated[float, Field(ge=0)]) = 0.3
    bias_update_speed: scheduled(Annotated[float, Field(ge=0)]) = 0.001
    context: int | None = Field(None, gt=0, description="longest row from here on: the model's max_position_embeddings")
    yarn_factor: float | None = Field(None, gt=1, description="stretch the rotary embedding so many times over its first length")
    optimizer: OptimizerTable = OptimizerTable()

    @model_validator(mode="after")
    def _sizes(self) -> PretrainStage:
        if isinstance(self.batch_tokens, tuple):
            for index, phase in enumerate(self.batch_tokens):
                first = phase.start if phase.start is not None else self.batch_tokens[index - 1].to if index else 0.0
                least = phase.to if phase.shape == "constant" else min(phase.to, first)
                if least < 1:
                    raise ValueError(f"batch_tokens[{index}] has {least:g} tokens at one end; give `from` and `to` of 1 or more")
        if self.yarn_factor and not self.context:
            raise ValueError(f"yarn_factor {self.yarn_factor:g} needs `context`, the length of the rows it is for")
        return self

    @cached_property
    def timeline(self) -> Timeline:
        return Timeline.of(self.tokens, self.batch_tokens)

    @property
    def has_mtp(self) -> bool:
        return highest(self.mtp_weight) > 0


class GRPOStage(TrainedStage):
    """Group relative policy optimisation on the task's verifier. `preset = "r1"` gives the published recipe."""

    kind: Literal["grpo"]
    steps: int = Field(gt=0)
    problems: int = Field(16, ge=1, description="problems per step")
    group_size: int = Field(12, ge=2)
    max_tokens: int = Field(256, ge=1, description="longest completion")
    temperature: float = Field(1.0, gt=0, le=2)
    preset: Literal["modern", "r1"] = "modern"
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.28, gt=0)
    kl_beta: float = Field(0.0, ge=0)
    std_normalise: bool = False
    loss_normaliser: Literal["constant", "sequence"] = "constant"
    minibatches: int = Field(1, ge=1)
    importance_cap: float = Field(2.0, gt=0)
    mask_truncated: bool = True
    resample_rounds: int = Field(1, ge=0, description="extra rounds of problems in place of groups without spread")
    format_weight: float = Field(0.0, ge=0, description="weight of the format part beside accuracy")
    random_reward: bool = Field(False, description="the control: rewards are coin flips")
    mtp_weight: float = Field(0.1, ge=0)
    first_seed: int = 1_000_000
    optimizer: OptimizerTable = OptimizerTable(matrices="adamw", lr=3e-4, weight_decay=0.0, schedule="constant")

    @model_validator(mode="before")
    @classmethod
    def _r1(cls, values: Any) -> Any:
        """R1's settings where the recipe does not say otherwise (R1 appendix B.4; KL and std of GRPO's eq. 1-3)."""
        if isinstance(values, dict) and values.get("preset") == "r1":
            published = dict(clip_low=10.0, clip_high=10.0, kl_beta=0.001, std_normalise=True, loss_normaliser="sequence",
                             minibatches=16, mask_truncated=False, resample_rounds=0, format_weight=1.0,
                             group_size=16, problems=32)
            return published | values
        return values


class EvalStage(StageTable):
    """Greedy accuracy on held-out problems: of every checkpoint the stages before left, and of `[model] from`."""

    kind: Literal["eval"]
    n: int = Field(1000, ge=1)
    seed: int = 0
    max_tokens: int = Field(256, ge=1)

