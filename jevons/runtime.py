"""What this machine is, asked once: device, dtypes, threads, compiler. Nothing here changes the process."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Runtime:
    """Which fast paths may run here. `compute_dtype` is torch's name: bfloat16 where the hardware multiplies it."""

    device: str  # "cuda" or "cpu"
    compute_dtype: str
    threads: int  # physical cores this process may use
    has_compiler: bool  # a C++ compiler: torch.compile and native kernels work; without one everything runs eagerly
    cpu: str
    cpu_features: tuple[str, ...]
    memory_gib: float
    gpu: str | None = None
    gpu_capability: tuple[int, int] | None = None
    gpu_memory_gib: float | None = None

    @classmethod
    def detect(cls, device: str | None = None) -> Runtime:
        """Ask the hardware. `device` ("cpu", "cuda") overrides the choice; ValueError where it is not there."""
        import torch

        if device not in (None, "cpu", "cuda"):
            raise ValueError(f"device is {device!r}; 'cpu' or 'cuda' would be right")
        available = torch.cuda.is_available()
        if device == "cuda" and not available:
            raise ValueError("device is 'cuda', but torch finds no CUDA device here; 'cpu' would be right")
        use_cuda = available and device != "cpu"
        info = cpu_info()
        features = tuple(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in info["flags"])
        bf16 = "avx512_bf16" in features or "amx_bf16" in features
        gpu: dict[str, Any] = {}
        if use_cuda:
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            properties = torch.cuda.get_device_properties(0)
            gpu = dict(gpu=properties.name, gpu_capability=(properties.major, properties.minor),
                       gpu_memory_gib=round(properties.total_memory / 2**30, 1))
        return cls(device="cuda" if use_cuda else "cpu", compute_dtype="bfloat16" if bf16 else "float32",
                   threads=physical_cores(), has_compiler=find_compiler() is not None, cpu=info["name"],
                   cpu_features=features, memory_gib=round(_memory_bytes() / 2**30, 1), **gpu)

    @property
    def dtype(self) -> Any:
        """`compute_dtype` as a torch.dtype."""
        import torch

        return getattr(torch, self.compute_dtype)

    def describe(self) -> dict[str, Any]:
        """Plain values for `jevons info`, with the versions that matter."""
        import torch

        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}
        compiled = "torch.compile" if self.has_compiler else "nothing: no C++ compiler on PATH, everything runs eagerly"
        return values | {"compiled": compiled, "torch": torch.__version__, "python": platform.python_version()}


def find_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on a CPU: $CXX, else g++ or clang++ on PATH."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def physical_cores() -> int:
    """Physical cores among those this process may run on; a cgroup's CPU quota counts too."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(path.read_text() if path.is_file() else str(cpu))
    count = len(cores)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max 100000"
        pass
    return max(1, count)


def cpu_info() -> dict[str, Any]:
    path = Path("/proc/cpuinfo")
    fields = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {"name": fields.get("model name") or platform.processor() or platform.machine(), "flags": flags}


def _memory_bytes() -> int:
    """Physical memory, or a cgroup's limit where that is less."""
    if sys.platform == "win32":
        return 0
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return physical


def available_bytes() -> int:
    """Memory that can be had without swapping; 0 where the system does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
