"""`[mesh]`: the grid that a run's processes stand in, and what cannot be spread over one. No torch here."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, ValidationError

from jevons.recipe.tables import Table


class MeshError(ValueError):
    """A mesh that does not fit the model, the batch or the processes; the message says which numbers do not go together."""


class MeshTable(Table):
    """`pipeline * data * expert` processes: every one of the `data * expert` in a stage reads its own part of the batch, the
    routed experts are split over `expert`, everything else is sharded over both (FSDP2). V3's was PP16 x EP64 x ZeRO-1."""

    data: int = Field(1, ge=1)
    expert: int = Field(1, ge=1, description="splits the routed experts; tokens travel to them and back")
    pipeline: int = Field(1, ge=1, description="processes that the layers are spread over")
    schedule: Literal["1f1b", "zbv", "dualpipev"] = "1f1b"
    micro_batches: int | None = Field(None, ge=1, description="of each process (of each pipeline) a step")
    fp8_dispatch: bool = Field(False, description="tokens travel to experts in FP8, 1x128 tiles (report section 3.2.2)")
    timeout: float = Field(60.0, gt=0, description="seconds until a process that does not answer ends the run")

    @property
    def size(self) -> int:
        return self.pipeline * self.data * self.expert

    @property
    def replicas(self) -> int:
        """Processes (pipelines) that read different parts of the batch."""
        return self.data * self.expert

    @property
    def stages(self) -> int:
        """Pieces of the network: the V-shaped schedules fold two onto each process."""
        return self.pipeline * (1 if self.schedule == "1f1b" or self.pipeline == 1 else 2)

    @property
    def shown(self) -> str:
        return f"pipeline {self.pipeline} x data {self.data} x expert {self.expert}"


def override(table: MeshTable, text: str) -> MeshTable:
    """`--mesh data=1,expert=2`: these keys in place of the recipe's (a run that goes on with fewer processes). The sizes that
    are not named become 1. Raises MeshError."""
    values: dict[str, Any] = table.model_dump() | {"data": 1, "expert": 1, "pipeline": 1}
    if table.micro_batches is not None:
        values["micro_batches"] = None
    for part in text.split(","):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals or key not in MeshTable.model_fields:
            raise MeshError(f"--mesh {text!r}: {part!r} is not KEY=VALUE with a key of {', '.join(MeshTable.model_fields)}")
        values[key] = value
    try:
        return MeshTable.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise MeshError(f"--mesh {text!r}: {first['loc'][0]} = {first['input']!r}: {first['msg']}") from None


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_processes(mesh: MeshTable, processes: int) -> None:
    """Raises MeshError where the mesh has not exactly as many places as there are processes."""
    if mesh.size != processes:
        have = "there is one" if processes == 1 else f"there are {processes}"
        need = "one process" if mesh.size == 1 else f"{mesh.size} processes"
        raise MeshError(f"the mesh {mesh.shown} needs {need} and {have}: `torchrun --nproc-per-node {mesh.size} -m jevons run "
                        f"RECIPE` would be right, or another mesh: `--mesh data={processes}`")


def check_model(mesh: MeshTable, config: Any) -> None:
    """Raises MeshError where the mesh does not divide the model (a ModelConfig)."""
    experts = config.n_routed_experts or 0
    if mesh.expert > 1 and (not experts or experts % mesh.expert):
        if not experts:
            raise MeshError(f"the model has no routed experts for mesh.expert = {mesh.expert}; mesh.data would be right")
        raise MeshError(f"{experts} routed experts do not divide by mesh.expert = {mesh.expert}; a divisor would be right")
    if mesh.expert > 1 and mesh.data > 1 and mesh.pipeline == 1:
        for name, rows in (("2 * moe_intermediate_size", 2 * config.moe_intermediate_size), ("hidden_size", config.hidden_size)):
            if rows % mesh.data:
                raise MeshError(f"{name} is {rows}, which does not divide by mesh.data = {mesh.data}: every expert's rows are "
                                f"sharded over it; a divisor of {rows} would be right")
    if mesh.pipeline == 1:
        return
    if mesh.stages > config.num_hidden_layers:
        most = config.num_hidden_layers * mesh.pipeline // mesh.stages
        raise MeshError(f"{config.num_hidden_layers} layers do not fill {mesh.stages} stages (mesh.pipeline = {mesh.pipeline}, "
                        f"schedule {mesh.schedule}); mesh.pipeline = {most} would be the most")
    if mesh.schedule == "1f1b" and config.tie_word_embeddings:
        raise MeshError("mesh.schedule = 1f1b puts embedding and head on different processes, and this model ties them "
                        "(tie_word_embeddings); zbv or dualpipev keep both on the first")
    if mesh.micro_batches is not None and mesh.micro_batches < mesh.stages:
        raise MeshError(f"mesh.micro_batches = {mesh.micro_batches} does not fill {mesh.stages} stages ({mesh.schedule} over "
                        f"{mesh.pipeline} processes); at least {mesh.stages} would be right")


def check_recipe(mesh: MeshTable, recipe: Any) -> None:
    """Raises MeshError for what a recipe asks for and one process alone can do."""
    if mesh.size == 1:
        return
    for index, stage in enumerate(recipe.stages):
        spread_stage(mesh, stage, recipe.stage_name(index))
    if recipe.data and recipe.data.validation and mesh.pipeline > 1:
        raise MeshError(f"data.validation is scored by one forward pass, and mesh.pipeline = {mesh.pipeline} has none; "
                        "data.validation = 0 would be right")


def spread_stage(mesh: MeshTable, stage: Any, name: str) -> Any:
    """A stage with a `micro_batch_tokens` that gives every process its micro-batches. Raises MeshError where its own does not."""
    if mesh.size == 1 or getattr(stage, "batch_tokens", None) is None:
        return stage
    batch = stage.timeline.batch(0)
    each = mesh.micro_batches or (2 * mesh.stages if mesh.pipeline > 1 else 1)
    if stage.micro_batch_tokens is None:
        return stage.model_copy(update={"micro_batch_tokens": max(1, batch // (each * mesh.replicas))})
    count = max(1, round(batch / stage.micro_batch_tokens))
    have = (f"stage {name}: batch_tokens {batch} / micro_batch_tokens {stage.micro_batch_tokens} is {count} "
            f"micro-batch{'es' if count > 1 else ''}")
    if mesh.micro_batches is not None and count != each * mesh.replicas:
        raise MeshError(f"{have}; mesh.micro_batches = {each} for each of {mesh.replicas} would be {each * mesh.replicas}")
    least = mesh.replicas * (mesh.stages if mesh.pipeline > 1 else 1)
    if count % mesh.replicas or count < least:
        raise MeshError(f"{have}; a multiple of {mesh.replicas} from {least} on would be right for the mesh {mesh.shown}")
    return stage
