"""Small C++ kernels for CPU inference, built on first use by the machine's own compiler; everything works without them.

All `*.cpp` here become one shared library with a plain C interface, called through ctypes: no torch headers, so it builds in
seconds. It is compiled for this processor (`-march=native`) and kept under a name made of sources, flags and processor. It uses
the OpenMP runtime that torch has loaded, and so torch's number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from jevons.runtime import cpu_info, find_compiler

HERE = Path(__file__).resolve().parent
# not -ffast-math: a library linked with it sets flush-to-zero in the process that loads it, torch's arithmetic included
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fopenmp", "-fPIC", "-shared"]


def cache_dir() -> Path:
    """Where built libraries are kept: $XDG_CACHE_HOME/jevons, by default ~/.cache/jevons."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jevons"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, built now if they were not; None where that cannot be (`why_not` says why)."""
    return _library()[0]


def why_not() -> str | None:
    """Why `library` is None; None where it is not."""
    return _library()[1]


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("JEVONS_NATIVE") == "0":
        return None, "JEVONS_NATIVE=0"
    compiler = find_compiler()
    if compiler is None:
        return None, "no C++ compiler on PATH"
    if sys.platform == "win32":
        return None, "not built on Windows"
    sources = sorted(HERE.glob("*.cpp"))
    told = [compiler, *FLAGS, platform.machine(), *sorted(cpu_info()["flags"])]
    parts = [s.read_bytes() for s in sorted([*sources, *HERE.glob("*.h")])] + [" ".join(told).encode()]
    target = cache_dir() / f"native-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    try:
        import torch  # noqa: F401  (its libgomp.so.1 must be the one that is loaded)

        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                built = Path(folder) / "native.so"
                done = subprocess.run([compiler, *FLAGS, *map(str, sources), "-o", str(built)], capture_output=True, text=True)
                if done.returncode:
                    return None, f"{compiler} failed: {done.stderr.strip()[:300]}"
                os.replace(built, target)  # two processes that build at once put the same file there
        return ctypes.CDLL(str(target)), None
    except OSError as error:
        return None, str(error)
