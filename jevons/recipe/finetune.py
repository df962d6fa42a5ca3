"""Stages that go on from a model: supervised fine-tuning, and distillation into a smaller one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jevons.recipe.schedule import scheduled
from jevons.recipe.stages import TrainedStage
from jevons.recipe.tables import ModelTable, OptimizerTable


def _cosine(lr: float, final: float) -> dict[str, Any]:
    return {"matrices": "adamw", "schedule": "cosine", "lr": lr, "final_lr_fraction": final}


# R1 appendix B.4 and table 6 (the students' rate is Qwen2.5-Math-1.5B's), V3 report 5.1
_PRESETS = {("sft", "r1"): {"epochs": 2, "batch": 128, "optimizer": _cosine(5e-5, 0.1)},
            ("sft", "v3"): {"epochs": 2, "batch": 128, "optimizer": _cosine(5e-6, 0.2)},
            ("distil", "r1"): {"epochs": 2, "batch": 64, "optimizer": _cosine(1e-4, 0.1)}}


class FinetuneStage(TrainedStage):
    """What both have: whole examples, one row each, so that none sees another; the loss on the assistant's own words."""

    preset: Literal["own", "r1", "v3"] = "own"
    epochs: int = Field(2, ge=1)
    batch: int = Field(32, ge=1, description="examples a step; the last step has what is left")
    micro_batch_tokens: int = Field(4096, gt=0, description="computed at once; on CPU each core takes one")
    mtp_weight: scheduled(Annotated[float, Field(ge=0)]) = 0.1
    bias_update_speed: scheduled(Annotated[float, Field(ge=0)]) = 0.0
    optimizer: OptimizerTable = OptimizerTable(**_cosine(3e-4, 0.1))

    @model_validator(mode="before")
    @classmethod
    def _published(cls, values: Any) -> Any:
        """The preset's settings where the recipe does not say otherwise."""
        name = isinstance(values, dict) and values.get("preset", "own")
        if not name or name == "own":
            return values
        if (values.get("kind"), name) not in _PRESETS:
            raise ValueError(f"preset {name!r} is not known for {values.get('kind')}; "
                             f"{' or '.join(p for kind, p in _PRESETS if kind == values.get('kind'))} would be right")
        published = _PRESETS[values.get("kind"), name]
        optimizer = values.get("optimizer", {})
        return published | values | ({"optimizer": published["optimizer"] | optimizer} if isinstance(optimizer, dict) else {})

    def steps(self, examples: int) -> int:
        return -(-examples * self.epochs // self.batch)


class SFTStage(FinetuneStage):
    """Supervised fine-tuning on JSONL files of conversations, or of questions and answers."""

    kind: Literal["sft"]
    data: list[str] = Field(min_length=1, description="JSONL files: `messages`, or `question` and `answer`, a line")
    longer: Literal["refuse", "drop"] = Field("refuse", description="what to do with an example past the model's context")
    examples: int | None = Field(None, ge=1, description="how many answers `data` holds: for the plan; another number is refused")
    mean_tokens: int | None = Field(None, ge=1, description="tokens of an example, for the plan; without it the whole context")

    def beside(self, find: Callable[[str], str]) -> SFTStage:
        return self.model_copy(update={"data": [find(path) for path in self.data]})


class DistilStage(FinetuneStage):
    """A student learns from the model before it: from its verified answers, or from its whole distribution over them."""

    kind: Literal["distil"]
    mode: Literal["traces", "logits"] = "traces"
    student: ModelTable
    teacher: str | None = Field(None, description="an earlier stage, or a checkpoint directory; without it the model before")
    problems: int = Field(2000, ge=1)
    samples: int = Field(1, ge=1, description="answers of the teacher to each problem")
    max_tokens: int = Field(256, ge=1, description="longest answer; one that reaches it is left out")
    temperature: float = Field(1.0, ge=0, le=2)
    keep: Literal["right", "all"] = Field("right", description="answers that the task's scorer accepts, or every one that ends")
    first_seed: int = 2_000_000
    top_k: int = Field(32, ge=1, description="logits: the teacher's likeliest tokens; all others are one more")
    kl_weight: float = Field(1.0, gt=0, le=1, description="logits: the rest is cross-entropy on the teacher's answer")

    @model_validator(mode="after")
    def _has_its_effect(self) -> DistilStage:
        given = sorted({"top_k", "kl_weight"} & self.model_fields_set)
        if given and self.mode == "traces":
            raise ValueError(f"{given[0]} does nothing in mode \"traces\"; mode = \"logits\" would use it")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples {self.samples} at temperature 0 are {self.samples} times the same; 1 would be right")
        return self

    def beside(self, find: Callable[[str], str]) -> DistilStage:
        update: dict[str, Any] = {"teacher": find(self.teacher)} if self.teacher else {}
        if self.student.from_dir:
            update["student"] = self.student.model_copy(update={"from_dir": find(self.student.from_dir)})
        return self.model_copy(update=update)
