"""`[data]`: the text that a recipe pretrains on. docs/data.md says what every key does."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from jevons.recipe.tables import Table


class SourceTable(Table):
    """Text by path: a file, a folder, a glob, `hub:OWNER/NAME[@REVISION][/GLOB]`, or a directory that `jevons tokenize` made."""

    path: str = Field(min_length=1)
    format: Literal["text", "jsonl", "parquet"] | None = Field(None, description="default: by the files' endings")
    key: str | list[str] = Field("text", min_length=1, description="JSONL's key or parquet's column; several are joined by \\n")
    separator: str = Field("", description="between the documents of a text file; none: a file is one document")
    weight: float | None = Field(None, gt=0, description="share of sequences; none at all: each source by its size")

    @property
    def keys(self) -> list[str]:
        return [self.key] if isinstance(self.key, str) else self.key


class DataTable(Table):
    sources: list[SourceTable] = Field(min_length=1)
    seq_len: int = Field(256, ge=16, description="tokens of a row")
    mask: Literal["none", "document"] = Field("none", description="none as V3: attention looks across a row's documents")
    fim_rate: float = Field(0.0, ge=0, le=1, description="share of documents rearranged to prefix, suffix, middle; V3: 0.1")
    validation: float | list[SourceTable] = Field(0.01, description="the last share of each source, or sources of its own")
    validate_every: int = Field(100, ge=1, description="steps; and at the last one")
    validation_tokens: int = Field(65_536, ge=16, description="at most")
    shards: str | None = Field(None, description="directory of the tokenised text (default: `data` in the run's)")
    shard_tokens: int = Field(50_000_000, ge=1)
    workers: int | None = Field(None, ge=1, description="threads that tokenise (default: the cores)")

    @field_validator("validation")
    @classmethod
    def _a_share(cls, value: float | list[SourceTable]) -> float | list[SourceTable]:
        if value == [] or not isinstance(value, list) and not 0 <= value <= 0.5:
            raise ValueError("a share from 0 to 0.5, or a list of sources with a path each, would be right")
        if isinstance(value, list) and any(source.weight for source in value):
            raise ValueError("validation sources are read one after the other; `weight` has no meaning for them")
        return value

    @model_validator(mode="after")
    def _weights(self) -> DataTable:
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("give every source a weight, or none of them (then each counts by its size)")
        return self
