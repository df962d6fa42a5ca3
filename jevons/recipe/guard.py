"""`[guard]`: what a run does about bad batches, and which of its states it keeps."""

from __future__ import annotations

from pydantic import Field, field_validator

from jevons.recipe.tables import Table


class GuardTable(Table):
    """The defaults never met a spike in 47 recorded stages: the largest gradient norm was 5.9 times the running median, the
    largest pretraining loss 1.7 times. After `rollback_after` bad steps in a row the run goes back to its last good state and on
    with data that it has not met; after `max_rollbacks` of these it stops."""

    spike: float = Field(20.0, description="a gradient norm over so many times its running median is bad; 0: none is")
    loss_spike: float = Field(4.0, description="the same of a cross-entropy")
    rollback_after: int = Field(10, ge=1)
    max_rollbacks: int = Field(2, ge=0, description="of one stage")
    keep: int = Field(2, ge=1, description="newest states kept; the best and the last good one stay beside them")
    use_best: bool = Field(False, description="a stage ends with its best state's weights instead of its last")
    async_save: bool = Field(True, description="a thread writes while training goes on")

    @field_validator("spike", "loss_spike")
    @classmethod
    def _above_one(cls, value: float) -> float:
        if value != 0 and not value > 1:
            raise ValueError("0 (off) or above 1 would be right")
        return value
