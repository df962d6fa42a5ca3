"""Tables of a recipe that hold for all of it: `[model]`, `[task]`, `[tokenizer]`, `[cost]`, and `[stages.optimizer]`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jevons.recipe.schedule import scheduled


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


SETTABLE = {"max_position_embeddings", "rope_theta", "rope_scaling", "aux_loss_alpha"}  # what changes no tensor's shape


class ModelTable(Table):
    """`[model]`: a preset with changed fields, or a checkpoint directory to go on from."""

    preset: str | None = None
    from_dir: str | None = Field(None, alias="from")
    set: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one(self) -> ModelTable:
        if (self.preset is None) == (self.from_dir is None):
            raise ValueError("give exactly one of `preset` (train from scratch) and `from` (a checkpoint directory)")
        if self.from_dir and (fixed := sorted(set(self.set) - SETTABLE)):
            raise ValueError(f"set.{fixed[0]} is the checkpoint's own; beside `from`, {', '.join(sorted(SETTABLE))} can be set")
        return self


class TaskTable(Table):
    """`[task]`: a task by name, or `path/to/file.py:Class` for one's own; `args` go to its constructor."""

    name: str = "countdown"
    args: dict[str, Any] = {}


class TokenizerTable(Table):
    """`[tokenizer]`: byte-level BPE trained on `samples` texts of the task (only when training from scratch)."""

    vocab_size: int = Field(512, ge=288)
    samples: int = Field(20_000, ge=10)

    @model_validator(mode="after")
    def _whole_tiles(self) -> TokenizerTable:
        if self.vocab_size % 32:
            raise ValueError(f"vocab_size is {self.vocab_size}; a multiple of 32 would be right")
        return self


class CostTable(Table):
    """`[cost]`: what an hour of this machine costs; every dollar shown follows from it."""

    dollars_per_hour: float = Field(0.10, ge=0)


class OptimizerTable(Table):
    """AdamW with the V3 settings (report section 4.2), and Muon for matrices where `matrices = "muon"`."""

    matrices: Literal["muon", "adamw"] = "muon"
    lr: float = Field(3e-3, gt=0)
    matrix_lr: float = Field(0.02, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: scheduled(Literal["constant", "linear", "cosine"]) = "linear"  # or phases, their values AdamW's rate
    final_lr_fraction: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _phases_end_themselves(self) -> OptimizerTable:
        if isinstance(self.schedule, tuple) and self.final_lr_fraction:
            raise ValueError("final_lr_fraction does nothing beside phases; the last phase's `to` is the final rate")
        return self


class PlanTable(Table):
    """`[plan]`: the machine and layout that `jevons plan` prices the recipe on; the command's own options go before it."""

    gpu: str | None = None
    gpus: int | None = None
    price: float | None = Field(None, description="dollars an hour and GPU")
    utilisation: float | None = None
    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    schedule: str | None = None
    micro_batches: int | None = None
    zero: int | None = None
    recompute: str | None = None
    train_in: str | None = None
