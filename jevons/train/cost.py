"""What a step cost, as far as the machine tells: share of its peak, memory, energy. What it does not tell is left out."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")


class Clocked(Protocol):
    joules: float


class Meter:
    """`peak`: FLOP/s of the machine's own matrix products; `read_energy`: joules so far, or None where nothing tells."""

    def __init__(self, peak: float | None, read_energy: Callable[[], float | None] | None = None):
        self._peak, self._energy = peak, read_energy or Energy().joules
        self._joules = self._energy()

    def read(self, flops: float, seconds: float, progress: Clocked) -> dict[str, float]:
        """The keys of a step's line; `progress.joules` grows by what the step took."""
        record: dict[str, float] = {}
        if self._peak and flops:
            record["time.mfu"] = round(flops / max(seconds, 1e-9) / self._peak, 5)
        if (peak := peak_bytes()) is not None:
            record["time.peak_bytes"] = peak
        if self._joules is not None and (now := self._energy()) is not None:
            progress.joules += max(0.0, now - self._joules)
            self._joules = now
            record["time.joules"] = round(progress.joules, 3)
        return record

    @staticmethod
    def held(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, int]:
        """Bytes of weights (buffers included), of one set of gradients, and of the optimizers' state."""
        parameters = list(model.parameters())
        states = [t for o in optimizers for state in o.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        return {"weights": sum(t.nbytes for t in [*parameters, *model.buffers()]),
                "gradients": sum(p.nbytes for p in parameters if p.requires_grad), "optimizer": sum(t.nbytes for t in states)}


def peak_bytes() -> int | None:
    """The most memory that this process has held: torch's own count on a GPU, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


class Energy:
    """Joules of all CPU packages (RAPL, whatever runs on them) and of the first NVIDIA GPU (NVML)."""

    def __init__(self, powercap: Path = POWERCAP, nvml: Any = None):
        self._packages: dict[Path, tuple[int, int]] = {}  # counter -> (last reading, readings that wrapped) in microjoules
        for counter in sorted(powercap.glob("*-rapl:*/energy_uj")):
            if counter.parent.name.count(":") == 1:  # others are parts of these
                with contextlib.suppress(OSError, ValueError):  # root's only, on many machines
                    self._packages[counter] = (int(counter.read_text()), 0)
        self._nvml = nvml if nvml is not None else _open_nvml()

    def joules(self) -> float | None:
        """Since any fixed moment; None where nothing tells."""
        total, told = 0.0, False
        for counter, (last, wrapped) in self._packages.items():
            now = int(counter.read_text())
            if now < last:
                wrapped += int((counter.parent / "max_energy_range_uj").read_text())
            self._packages[counter] = (now, wrapped)
            total, told = total + (now + wrapped) / 1e6, True
        if self._nvml is not None:
            device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
            if (self._nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) == 0
                    and self._nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)) == 0):
                total, told = total + millijoules.value / 1e3, True
        return total if told else None


def _open_nvml() -> Any:
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2() == 0:
            return library
    return None
