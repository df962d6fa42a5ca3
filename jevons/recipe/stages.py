"""Stages of a recipe: one table each, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jevons.recipe.tables import OptimizerTable, Table

DIRECTORY_NAME = r"^\w[\w.+ -]*$"  # names become directories


class StageTable(Table):
    name: str = Field("", pattern=DIRECTORY_NAME)
    save_every: int = Field(50, ge=1, description="steps between checkpoints")


class PretrainStage(StageTable):
    """Next-token and MTP loss on packed traces of the task."""

    kind: Literal["pretrain"]
    tokens: int = Field(gt=0)
    batch_tokens: int = Field(8192, gt=0)
    micro_batch_tokens: int | None = Field(None, gt=0, description="computed at once; on CPU each core takes one")
    prompt_weight: float = Field(0.1, ge=0, le=1)
    mtp_weight: float = Field(0.3, ge=0)
    bias_update_speed: float = Field(0.001, ge=0)
    optimizer: OptimizerTable = OptimizerTable()


class GRPOStage(StageTable):
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


Stage = Annotated[PretrainStage | GRPOStage | EvalStage, Field(discriminator="kind")]
