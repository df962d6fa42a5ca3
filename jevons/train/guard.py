"""Which updates are not made: no finite gradient or loss, or far beyond what was usual. Decided by numbers of the run alone, so
that a run that is killed and resumed decides the same."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from jevons.recipe import GuardTable
from jevons.train.objective import Objective

WINDOW, LEAST = 64, 32  # updates that a median looks back on; fewer than LEAST say nothing of what is usual
SHOWN_IDS, SHOWN_TEXT = 32, 300


class TrainingDiverged(ValueError):
    """Too many updates in a row were bad; the last good state is kept."""


class Guard:
    """Running medians of what good updates had. `watch_loss`: the loss is one whose multiples mean something, as a
    cross-entropy is; a policy loss lies around 0."""

    def __init__(self, table: GuardTable, watch_loss: bool):
        self._limits = {"gradient norm": table.spike, "loss": table.loss_spike if watch_loss else 0.0}
        self._usual: dict[str, list[float]] = {name: [] for name in self._limits}

    def judge(self, norm: float, loss: float) -> str | None:
        """Why this update must not be made, in words; None where it may, and then it counts as usual from now on."""
        values = {"gradient norm": norm, "loss": loss}
        for name, value in values.items():
            if not math.isfinite(value):
                return f"the {name} is {value}"
        for name, value in values.items():
            usual, limit = self._usual[name], self._limits[name]
            if limit and len(usual) >= LEAST and value > limit * (median := statistics.median(usual)) > 0:
                return f"the {name} is {value:.4g}, {value / median:.1f} times its running median {median:.4g}"
        for name, value in values.items():
            self._usual[name] = [*self._usual[name], value][-WINDOW:]
        return None

    def state_dict(self) -> dict[str, list[float]]:
        return dict(self._usual)

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self._usual = {name: list(state.get(name, [])) for name in self._limits}


def describe_batch(objective: Objective, update: list[Any]) -> dict[str, Any]:
    """What identifies a batch in the log: the checksum of its ids, the first of them, and their text."""
    ids = torch.cat([objective.token_ids(micro).flatten().cpu() for micro in update]).to(torch.int64)
    record: dict[str, Any] = {"tokens": ids.numel(), "ids_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
                              "first_ids": ids[:SHOWN_IDS].tolist()}
    decode: Callable[[list[int]], str] | None = getattr(getattr(objective, "tokenizer", None), "decode", None)
    return record | ({"first_text": decode(ids[:SHOWN_TEXT].tolist())[:SHOWN_TEXT]} if decode else {})
