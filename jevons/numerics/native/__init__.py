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
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

from jevons.runtime import cpu_info, find_compiler, physical_cores

HERE = Path(__file__).resolve().parent
# not -ffast-math: a library linked with it sets flush-to-zero in the process that loads it, torch's arithmetic included
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fopenmp", "-pthread", "-fPIC",
         "-Wno-psabi"]


class CWeight(ctypes.Structure):
    """`Weight` of common.h."""

    _fields_ = [("codes", c_void_p), ("scale", c_void_p), ("rows", c_int64), ("columns", c_int64), ("kind", c_int32),
                ("group", c_int32)]


class CExpert(ctypes.Structure):
    """`Expert` of kernels.h."""

    _fields_ = [("gate", CWeight), ("up", CWeight), ("down", CWeight)]


class CRouted(ctypes.Structure):
    """`Routed` of kernels.h."""

    _fields_ = [("experts", POINTER(CExpert)), ("count", c_int64), ("k", c_int64), ("stride", c_int64 * 3),
                ("chosen", c_void_p), ("weights", c_void_p)]


class CChoice(ctypes.Structure):
    """`Choice` of kernels.h."""

    _fields_ = [("experts", c_int64), ("k", c_int64), ("groups", c_int64), ("kept", c_int64), ("softmax", c_int32),
                ("normalise", c_int32), ("scale", c_float)]


class CMatrix(ctypes.Structure):
    """`Matrix` of common.h."""

    _fields_ = [("data", c_void_p), ("stride", c_int64), ("bf16", c_int32)]


class CWidths(ctypes.Structure):
    """`Widths` of training.cpp."""

    _fields_ = [("heads", c_int64), ("plain", c_int64), ("rotary", c_int64), ("value", c_int64)]


# Matrices are passed as (address, elements from row to row, whether bf16).
_MATRIX = [c_void_p, c_int64, c_int32]
SIGNATURES = {
    "jevons_linear": [POINTER(CWeight), c_int32, *_MATRIX, c_int64, c_void_p, c_int32, c_void_p],
    "jevons_linear_plain": [c_void_p, c_int32, c_int64, c_int64, *_MATRIX, c_int64, c_void_p, c_int32, c_void_p],
    "jevons_experts": [POINTER(CRouted), POINTER(CExpert), *_MATRIX, c_int64, c_void_p],
    "jevons_rms_norm": [*_MATRIX, c_int64, c_int64, c_void_p, c_int32, c_float, c_void_p],
    "jevons_unpack": [POINTER(CWeight), c_int32, c_void_p],
    "jevons_gate": [POINTER(CChoice), *_MATRIX, c_int64, c_int64, c_void_p, c_int32, *[c_void_p] * 5],
    "jevons_heads": [c_void_p, c_int64, c_int64, c_int32, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int32, c_int64, c_int32,
                     c_void_p],
    "jevons_norm": [CMatrix, c_int64, c_int64, c_void_p, c_float, CMatrix, c_void_p],
    "jevons_norm_grad": [CMatrix, CMatrix, c_int64, c_int64, c_void_p, c_void_p, c_void_p, CMatrix, c_void_p, c_void_p, c_void_p],
    "jevons_add_norm": [c_void_p, CMatrix, c_int64, c_int64, c_void_p, c_float, c_void_p, CMatrix, c_void_p],
    "jevons_add": [c_void_p, CMatrix, c_int64, c_int64, c_void_p],
    "jevons_swiglu": [CMatrix, c_int64, c_int64, CMatrix],
    "jevons_swiglu_grad": [CMatrix, CMatrix, c_int64, c_int64, CMatrix],
    "jevons_cross_entropy": [CMatrix, c_int64, c_int64, c_void_p, c_void_p, c_void_p],
    "jevons_cross_entropy_grad": [c_void_p, CMatrix, c_int64, c_int64, c_void_p, c_void_p, CMatrix],
    "jevons_dispatch": [CMatrix, c_int64, c_int64, c_void_p, c_int64, c_void_p, CMatrix, c_int64],
    "jevons_collect": [CMatrix, c_int64, c_int64, c_void_p, c_int64, c_void_p, CMatrix],
    "jevons_collect_dots": [CMatrix, CMatrix, c_int64, c_int64, c_void_p, c_int64, c_void_p],
    "jevons_split_heads": [POINTER(CWidths), c_void_p, c_int64, CMatrix, CMatrix, CMatrix, *[c_void_p] * 4],
    "jevons_split_heads_grad": [POINTER(CWidths), c_void_p, c_int64, c_int64, *[c_void_p] * 4, CMatrix, CMatrix, CMatrix],
    "jevons_move_heads": [c_int64, c_int64, c_void_p, c_int64, c_int64, CMatrix, c_void_p, c_int32],
    "jevons_causal_softmax": [CMatrix, c_int64, c_int64, c_float],
    "jevons_causal_softmax_grad": [CMatrix, CMatrix, c_int64, c_int64, c_float],
    "jevons_draw": [*_MATRIX, c_int64, c_int64, *[c_void_p] * 6],
    "jevons_pass": [c_void_p, c_int64, c_void_p],
    "jevons_step": [c_void_p, c_int64, c_void_p, c_void_p, c_void_p],
    "jevons_draft": [c_void_p, c_void_p],
    "jevons_read": [c_void_p, c_int64, c_int32],
}
RETURNS = {"jevons_read": c_uint64, **dict.fromkeys(("jevons_pass", "jevons_step", "jevons_draft"), c_int32)}


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


def state() -> str:
    """In words, without building anything."""
    target, problem = _target()
    if problem is not None:
        return f"none: {problem}"
    return "built" if target.is_file() else "not built yet: the first answer builds them, in seconds"


def build(compiler: str, flags: list[str], target: Path) -> str | None:
    """Compile the kernels to `target`, which appears whole or not at all; the compiler's complaint, if it has one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        sources = sorted(HERE.glob("*.cpp"))
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        commands = [[compiler, *flags, "-c", str(source), "-o", out] for source, out in zip(sources, objects, strict=True)]
        built = Path(folder) / "native.so"
        with ThreadPoolExecutor(physical_cores()) as pool:
            done = list(pool.map(_run, commands))
        done.append(_run([compiler, *flags, "-shared", *objects, "-o", str(built)]) if not any(done) else None)
        if complaints := [c for c in done if c]:
            return f"{compiler} failed: {complaints[0]}"
        os.replace(built, target)  # two processes that build at once put the same file there
    return None


def _run(command: list[str]) -> str | None:
    """What a command that failed complains of."""
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stderr.strip() or "no reason given")[:300] if done.returncode else None


def open_library(path: Path) -> ctypes.CDLL:
    """A built library with its signatures. Raises OSError where it cannot be loaded."""
    import torch  # noqa: F401  (its libgomp.so.1 must be the one that is loaded)

    opened = ctypes.CDLL(str(path))
    for name, arguments in SIGNATURES.items():
        function = getattr(opened, name)
        function.argtypes, function.restype = arguments, RETURNS.get(name)
    return opened


def _target() -> tuple[Path, str | None]:
    """Where this machine's library lies, or why there can be none."""
    if os.environ.get("JEVONS_NATIVE") == "0":
        return Path(), "JEVONS_NATIVE=0"
    if sys.platform == "win32":
        return Path(), "not built on Windows"
    compiler = find_compiler()
    if compiler is None:
        return Path(), "no C++ compiler on PATH"
    told = [compiler, *FLAGS, platform.machine(), *sorted(cpu_info()["flags"])]
    parts = [s.read_bytes() for s in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")])] + [" ".join(told).encode()]
    return cache_dir() / f"native-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so", None


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    target, problem = _target()
    if problem is not None:
        return None, problem
    try:
        if not target.is_file() and (complaint := build(find_compiler(), FLAGS, target)):
            return None, complaint
        return open_library(target), None
    except OSError as error:
        return None, str(error)
