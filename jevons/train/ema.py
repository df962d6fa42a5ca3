"""An exponential moving average of the weights beside the trained ones (V3 report, section 3.2.3).

The report keeps it in CPU memory, updated while the next step runs; here it lies beside the weights and is updated after
each optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from jevons.model import CausalLM
from jevons.numerics import upcast
from jevons.train.objective import Objective

PREFIX = "ema."
_OWN = {"inner", "decay", "average", "_live"}


class Averaged:
    """Another objective, with the average in its state: average <- decay * average + (1 - decay) * weight, in float32.

    It begins as the weights do, and lies as they do: of many processes each averages what it holds. Router biases are averaged
    too; a skipped update changes nothing. All else is the inner one's.
    """

    def __init__(self, inner: Objective, model: CausalLM, decay: float):
        self.inner, self.decay = inner, decay
        biases = {n: b for n, b in model.named_buffers() if n in model.state_dict()}
        tensors = {n: t.detach() for n, t in model.named_parameters()} | biases
        self.average = {name: upcast(tensor).clone() for name, tensor in tensors.items()}
        self._live = {name: _held(tensor) for name, tensor in tensors.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            self.__dict__[name] = value
        else:
            setattr(self.inner, name, value)

    def after_update(self, load_RE: torch.Tensor | None) -> None:
        self.inner.after_update(load_RE)
        torch._foreach_lerp_([_held(t) for t in self.average.values()], [upcast(t) for t in self._live.values()], 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average inside, and its own weights again after."""
        own = {name: tensor.clone() for name, tensor in self._live.items()}
        try:
            for name, tensor in self._live.items():
                tensor.copy_(_held(self.average[name]))
            yield
        finally:
            for name, tensor in self._live.items():
                tensor.copy_(own[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.inner.tensors() | {PREFIX + name: tensor for name, tensor in self.average.items()}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.average.items():
            _held(tensor).copy_(_held(tensors[PREFIX + name]))
        self.inner.load_tensors({n: t for n, t in tensors.items() if not n.startswith(PREFIX)})


def _held(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
