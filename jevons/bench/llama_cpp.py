"""llama.cpp's own shared library, unpatched, by ctypes: logits of a batch, and slots that are filled as sequences end.

The library is a folder's: of npm's `@node-llama-cpp/linux-x64` (JEVONS_LLAMA_CPP names it), or of `llama-cpp-python`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jevons.bench.workload import BenchError, Job

FOLDER = "JEVONS_LLAMA_CPP"
UBATCH = 512  # llama.cpp's default: tokens it computes at once


class _Params(ctypes.Structure):
    """llama.cpp's parameter records, larger than any version's: passed by value on the stack, the callee reads its part."""

    _fields_ = [("word", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    _fields_ = [("n_tokens", ctypes.c_int32), *((name, ctypes.c_void_p) for name in (
        "token", "embd", "pos", "n_seq_id", "seq_id", "logits"))]


def find_library() -> tuple[Path, str]:
    """(folder of libllama, version). Raises BenchError where there is none."""
    if named := os.environ.get(FOLDER):
        folder = Path(named)
        if not list(folder.glob("libllama.*so*")):
            raise BenchError(f"{FOLDER} {named} holds no libllama")
        build = folder / "_nlcBuildMetadata.json"
        release = json.loads(build.read_text())["buildOptions"]["llamaCpp"]["release"] if build.is_file() else "unknown release"
        return folder, release
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise BenchError(f"llama.cpp is not here: `pip install llama-cpp-python`, or unpack npm's @node-llama-cpp/linux-x64 and "
                         f"name its bins/linux-x64 in {FOLDER}")
    return Path(spec.origin).parent / "lib", f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"


class LlamaCpp:
    """One model, and one context at a time. Defaults are llama.cpp's own but for sizes and threads."""

    def __init__(self, lib: Path, model: Path, context: int = 1024):
        find = lambda stem: next(p for p in sorted(lib.glob(f"{stem}*.so*")) if p.name[len(stem)] == ".")
        self._base = ctypes.CDLL(str(find("libggml-base")), ctypes.RTLD_GLOBAL)
        self._ggml = ctypes.CDLL(str(find("libggml")), ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(str(find("libllama")), ctypes.RTLD_GLOBAL)
        self._quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(self._log)
        self.said: deque[str] = deque(maxlen=20)
        self.lib.llama_log_set(self._quiet, None)
        self._ggml.ggml_backend_load_all_from_path(str(lib).encode())
        self.lib.llama_backend_init()
        self.model = self._call("llama_model_load_from_file", ctypes.c_void_p, str(model).encode(),
                                self._call("llama_model_default_params", _Params))
        if not self.model:
            raise ValueError(f"llama.cpp does not load {model}: {''.join(list(self.said)[-6:])}")
        self.vocab = self._call("llama_model_get_vocab", ctypes.c_void_p, ctypes.c_void_p(self.model))
        self.size = self._call("llama_vocab_n_tokens", ctypes.c_int32, ctypes.c_void_p(self.vocab))
        self.context = self._pool = None
        self.open(context)

    def _log(self, level: int, text: bytes, _: object) -> None:
        self.said.append(text.decode("utf-8", "replace"))

    def _call(self, name: str, result, *args, lib: ctypes.CDLL | None = None):
        function = getattr(lib or self.lib, name)
        function.restype = result
        return function(*args)

    def open(self, context: int, sequences: int = 1, threads: int = 1, ubatch: int | None = None) -> None:
        """A new context in place of the one before: `sequences` of `context` tokens each; `ubatch` (None: all of a sequence's
        context) is how many tokens are computed at once."""
        self._close()
        params = self._call("llama_context_default_params", _Params)
        if list(params.word[:4]) != [512, 2048, 512, 1]:  # n_ctx, n_batch, n_ubatch, n_seq_max
            raise ValueError(f"llama.cpp's context parameters begin with {list(params.word[:4])}, not as known here")
        context = -(-context // 256) * 256
        self.batch = max(context, UBATCH, sequences)
        params.word[0], params.word[1], params.word[3] = context * sequences, self.batch, sequences
        params.word[2] = min(ubatch or context, self.batch)
        at = next(i for i in range(4, 16) if params.word[i] == params.word[i + 1] == 4)
        params.word[at] = params.word[at + 1] = threads
        self.context = self._call("llama_init_from_model", ctypes.c_void_p, ctypes.c_void_p(self.model), params)
        if not self.context:
            raise ValueError(f"llama.cpp makes no context of {sequences} x {context} tokens: {''.join(list(self.said)[-3:])}")
        self.memory = self._call("llama_get_memory", ctypes.c_void_p, ctypes.c_void_p(self.context))
        self._attach(threads)
        one = np.zeros(1, dtype=np.int32)
        self._seq = np.arange(sequences, dtype=np.int32)  # llama_batch wants a pointer to each token's sequence id
        self._seq_pointers = self._seq.ctypes.data + 4 * np.arange(sequences, dtype=np.uint64)
        self._ones = np.ones(self.batch, dtype=np.int32)
        self.decode(one, one, one, np.ones(1, dtype=np.int8))  # the first call allocates
        self.clear()

    def _attach(self, threads: int) -> None:
        """A pool of threads that stays, as llama.cpp's own programs have it; otherwise every call would start threads anew."""
        if not hasattr(self._base, "ggml_threadpool_params_default"):
            return
        register = self._call("ggml_backend_reg_by_name", ctypes.c_void_p, b"CPU", lib=self._ggml)
        entry = lambda name: self._call("ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p(register), name,
                                        lib=self._base)
        new, self._free_pool = entry(b"ggml_threadpool_new"), entry(b"ggml_threadpool_free")
        if not new or not self._free_pool:
            return
        params = self._call("ggml_threadpool_params_default", _Params, ctypes.c_int(threads), lib=self._base)
        self._pool = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Params))(new)(ctypes.byref(params))
        self._call("llama_attach_threadpool", None, ctypes.c_void_p(self.context), ctypes.c_void_p(self._pool), None)

    def _close(self) -> None:
        if self.context:
            self._call("llama_free", None, ctypes.c_void_p(self.context))
        if self._pool:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._free_pool)(self._pool)
        self.context = self._pool = None

    def clear(self, sequence: int | None = None) -> None:
        """Forget a sequence; None: all."""
        if sequence is None:
            self._call("llama_memory_clear", None, ctypes.c_void_p(self.memory), True)
        else:
            self._call("llama_memory_seq_rm", ctypes.c_bool, ctypes.c_void_p(self.memory), sequence, -1, -1)

    def decode(self, tokens: np.ndarray, positions: np.ndarray, sequences: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """One llama_batch (int32, int32, int32, int8, [n] each) -> the logits of the wanted tokens, [wanted, V] float32: a view
        that the next call overwrites."""
        seq = self._seq_pointers[sequences]
        batch = _Batch(len(tokens), tokens.ctypes.data, None, positions.ctypes.data, self._ones.ctypes.data, seq.ctypes.data,
                       wanted.ctypes.data)
        if self._call("llama_decode", ctypes.c_int32, ctypes.c_void_p(self.context), batch):
            raise ValueError(f"llama_decode failed: {''.join(list(self.said)[-3:])}")
        rows = int(wanted.sum())
        if not rows:
            return np.empty((0, self.size), dtype=np.float32)
        out = self._call("llama_get_logits", ctypes.POINTER(ctypes.c_float), ctypes.c_void_p(self.context))
        return np.ctypeslib.as_array(out, (rows, self.size))

    def logits(self, ids: Sequence[int], past: int = 0) -> np.ndarray:
        """[len(ids), V] float32 in one batch: of a new sequence, or of one that has `past` tokens in the cache."""
        if not past:
            self.clear()
        n = len(ids)
        return self.decode(np.array(ids, dtype=np.int32), np.arange(past, past + n, dtype=np.int32), np.zeros(n, dtype=np.int32),
                           np.ones(n, dtype=np.int8)).copy()

    def chat_template(self) -> str:
        text = self._call("llama_model_chat_template", ctypes.c_char_p, ctypes.c_void_p(self.model), None)
        return (text or b"").decode()

    def tokenize(self, text: str) -> list[int]:
        """Ids of a rendered prompt: nothing added, special tokens read from their text."""
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        n = self._call("llama_tokenize", ctypes.c_int32, ctypes.c_void_p(self.vocab), raw, len(raw), room,
                       len(room), False, True)
        return list(room[:n])


class _Slot:
    def __init__(self, key: int, job: Job):
        self.key, self.job = key, job
        self.read = 0  # tokens of the prompt that are in the cache
        self.last, self.given = 0, 0


class Slots:
    """Continuous batching as llama.cpp's server does it: a batch is one token of every slot that answers, then prompts of slots
    that were just filled, as far as the batch reaches. Greedy; a slot is free when its job has its tokens."""

    def __init__(self, llama: LlamaCpp, slots: int):
        self.llama, self.waiting, self.slots = llama, deque(), [None] * slots
        self.llama.clear()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or any(self.slots)

    def submit(self, key: int, job: Job) -> None:
        self.waiting.append(_Slot(key, job))

    def step(self) -> list[tuple[int, int]]:
        slots: list[Any] = self.slots
        for index, slot in enumerate(slots):
            if slot is None and self.waiting:
                slots[index] = self.waiting.popleft()
        parts = []  # tokens, first position, slot
        room = self.llama.batch
        for index, slot in enumerate(slots):
            if slot is not None and slot.read == len(slot.job.prompt):
                parts.append(([slot.last], slot.read + slot.given - 1, index))
                room -= 1
        for index, slot in enumerate(slots):
            if slot is not None and slot.read < len(slot.job.prompt) and room:
                tokens = slot.job.prompt[slot.read : slot.read + room]
                parts.append((tokens, slot.read, index))
                slot.read += len(tokens)
                room -= len(tokens)
        tokens = np.array([t for part, _, _ in parts for t in part], dtype=np.int32)
        lengths = [len(part) for part, _, _ in parts]
        positions = np.concatenate([np.arange(at, at + len(part), dtype=np.int32) for part, at, _ in parts])
        sequences = np.repeat(np.array([index for *_, index in parts], dtype=np.int32), lengths)
        wanted = np.zeros(len(tokens), dtype=np.int8)
        giving = [k for k, (*_, index) in enumerate(parts) if slots[index].read == len(slots[index].job.prompt)]
        wanted[np.cumsum(lengths)[giving] - 1] = 1
        best = self.llama.decode(tokens, positions, sequences, wanted).argmax(-1)
        out = []
        for k, token in zip(giving, best.tolist(), strict=True):
            index = parts[k][2]
            slot = slots[index]
            slot.last, slot.given = token, slot.given + 1
            out.append((slot.key, token))
            if slot.given == slot.job.tokens:
                self.llama.clear(index)
                slots[index] = None
        return out
