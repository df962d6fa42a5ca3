"""Tokenised text on the disk: memory-mapped shards of uint16 or uint32 ids, and an index that says what they were made of.

    DIR/index.json  tokenizer.json  shard-00000.bin  shard-00000.ends (int64: where each document ends)  shard-00001.bin ...

Every document ends with eos. A shard appears by one rename, and the index names it after that: a killed build goes on
behind its last finished shard. The same sources and tokenizer give the same bytes, whatever the number of workers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from jevons.data.sources import HUB, DataError, File, Piece, find_files
from jevons.data.tokenizer import Tokenizer
from jevons.recipe import SourceTable

INDEX, FORMAT = "index.json", 1
BATCH = 2**18  # characters that a worker takes at a time
MOST_PIECES = 1024  # and texts
PROGRESS = 2**17  # bytes of a file between two calls
OnProgress = Callable[[int, int, int], None]  # bytes read, of how many, tokens so far


def build_shards(sources: Sequence[SourceTable], tokenizer: Tokenizer, directory: str | Path, workers: int | None = None,
                 shard_tokens: int = 50_000_000, on_progress: OnProgress = lambda read, total, tokens: None) -> Shards:
    """Tokenise what is left of the sources, one after the other, into `directory`; at once if it is complete.

    Another process that is at it is waited for. Raises DataError for text that cannot be read, and for a directory that
    holds something else or was made with another tokenizer or of other sources. Whatever `on_progress` raises ends it,
    finished shards kept.
    """
    directory, asked = Path(directory), [source.model_dump(exclude={"weight"}) for source in sources]
    if (directory / INDEX).exists() and all(source.path.startswith(HUB) for source in sources):
        index = _read_index(directory)
        if index["complete"] and index["asked"] == asked:  # the hub need not be there any more, nor be as it was
            return Shards(directory, tokenizer)
    files = [file for source in sources for file in find_files(source)]
    head = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "eos_token_id": tokenizer.eos_id, "vocab_size":
            tokenizer.vocab_size, "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32", "shard_tokens": shard_tokens,
            "asked": asked, "sources": [file.record() for file in files]}
    with _lock(directory, lambda: on_progress(0, 1, 0)):
        index = _read_index(directory) if (directory / INDEX).exists() else None
        if index and index["shards"]:
            _check_same(directory, index, head)
        else:  # new, or begun with what turned out not to be readable, and without a shard yet
            own = ("lock", "download", "tokenizer.json", "tokenizer_config.json", f"{INDEX}.tmp")  # a killed process left them
            foreign = sorted(p.name for p in directory.iterdir() if p.name not in own)
            if foreign and index is None:
                raise DataError(f"{directory} holds {foreign[0]!r} but no {INDEX}, so it is no shards'; give another directory")
            index = head | {"shards": [], "empty": 0, "complete": False}
            tokenizer.save(directory)
            _write(directory / INDEX, json.dumps(index).encode())
        if not index["complete"]:
            try:
                _build(directory, index, files, tokenizer, workers or os.cpu_count() or 1, on_progress)
            except OSError as error:
                if error.filename is not None or not error.strerror:
                    raise
                # of a write: a full disk says no name
                raise OSError(error.errno, f"{directory} could not be written: {error.strerror}; finished shards stay") from error
    return Shards(directory, tokenizer)


def _build(directory: Path, index: dict[str, Any], files: list[File], tokenizer: Tokenizer, workers: int,
           on_progress: OnProgress) -> None:
    at, skip = index["shards"][-1]["next"] if index["shards"] else (0, 0)
    before, total = sum(f.size for f in files[:at]), sum(f.size for f in files)
    done = sum(shard["tokens"] for shard in index["shards"])
    shard, said = _Unfinished(directory, len(index["shards"]), index["dtype"]), 0
    try:
        for number, file in enumerate(files[at:], at):
            documents = 0
            for ids, piece in _encoded(_skipped(file.pieces(directory / "download"), skip), tokenizer, workers):
                shard.add(ids)
                if piece.ends:
                    documents += 1
                    index["empty"] += not shard.end_document(tokenizer.eos_id)
                if piece.ends and shard.tokens >= index["shard_tokens"]:
                    done += shard.tokens
                    _finish(directory, index, shard, [number, skip + documents])
                    shard = _Unfinished(directory, len(index["shards"]), index["dtype"])
                if piece.read - said >= PROGRESS or piece.read == file.size:
                    said = piece.read
                    on_progress(before + said, total, done + shard.tokens)
            before, skip, said = before + file.size, 0, 0
        if shard.tokens:
            _finish(directory, index, shard, [len(files), 0])
    finally:
        shard.drop()
    if not index["shards"]:
        raise DataError(f"{', '.join(f.name for f in files)}: no text; all of {index['empty']} documents are empty")
    _write(directory / INDEX, json.dumps(index | {"complete": True}).encode())


def _skipped(pieces: Iterable[Piece], documents: int) -> Iterator[Piece]:
    for piece in pieces:
        if documents > 0:
            documents -= piece.ends
        else:
            yield piece


def _encoded(pieces: Iterable[Piece], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[list[int], Piece]]:
    """Ids of each piece, in order. Threads are enough: the tokenizer lets go of the interpreter's lock while it works."""
    waiting: deque[tuple[list[Piece], Future]] = deque()

    def encode(batch: list[Piece]) -> list[list[int]]:
        return tokenizer.encode_batch(["" if p.ends and p.text.isspace() else p.text for p in batch])

    with ThreadPoolExecutor(workers, "tokenize") as pool:
        batch, size = [], 0
        for piece in pieces:
            batch.append(piece)
            size += len(piece.text)
            if size >= BATCH or len(batch) >= MOST_PIECES:
                waiting.append((batch, pool.submit(encode, batch)))
                batch, size = [], 0
            while len(waiting) > 2 * workers:
                done, ids = waiting.popleft()
                yield from zip(ids.result(), done, strict=True)
        waiting.append((batch, pool.submit(encode, batch)))
        for done, ids in waiting:
            yield from zip(ids.result(), done, strict=True)


class _Unfinished:
    """The shard that is being written, under a temporary name."""

    def __init__(self, directory: Path, number: int, dtype: str):
        self.path, self.dtype = directory / f"shard-{number:05d}.bin", np.dtype(dtype).newbyteorder("<")
        self._file = open(self.path.with_suffix(".tmp"), "wb")  # noqa: SIM115
        self._sha = hashlib.sha256()
        self.tokens, self.ends = 0, [0]

    def add(self, ids: list[int]) -> None:
        data = np.array(ids, self.dtype).tobytes()
        self._file.write(data)
        self._sha.update(data)
        self.tokens += len(ids)

    def end_document(self, eos_id: int) -> bool:
        """Put eos behind it; False, and nothing done, for a document without a token."""
        if self.tokens == self.ends[-1]:
            return False
        self.add([eos_id])
        self.ends.append(self.tokens)
        return True

    def close(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        ends = np.array(self.ends[1:], "<i8").tobytes()
        _write(self.path.with_suffix(".ends"), ends)
        os.replace(self._file.name, self.path)
        return {"file": self.path.name, "tokens": self.tokens, "documents": len(self.ends) - 1,
                "sha256": self._sha.hexdigest(), "ends_sha256": hashlib.sha256(ends).hexdigest()}

    def drop(self) -> None:
        with suppress(OSError):  # what a full disk did not take
            self._file.close()
        Path(self._file.name).unlink(missing_ok=True)


def _finish(directory: Path, index: dict[str, Any], shard: _Unfinished, following: list[int]) -> None:
    index["shards"].append(shard.close() | {"next": following})
    _write(directory / INDEX, json.dumps(index).encode())


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f"{path.name}.tmp")
    with open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


@contextmanager
def _lock(directory: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """One process at a time: ranks of one job all come here, and the first one builds."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "a", encoding="ascii") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(0.1)
        yield


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise DataError(f"{path}: format {index['format']!r}; this version reads {FORMAT}")
        return index | {"shards": list(index["shards"]), "complete": bool(index["complete"])}
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; `jevons tokenize` makes one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise error if isinstance(error, DataError) else DataError(f"{path} is no index of shards: {error!r}") from None


def _check_same(directory: Path, index: dict[str, Any], head: dict[str, Any]) -> None:
    _check_tokenizer(directory, index, head["tokenizer"])
    for old, new in zip(index["sources"], head["sources"], strict=False):
        if changed := [key for key in new if old.get(key) != new[key]]:
            raise DataError(f"{directory} was made of {old['name']} with {changed[0]} {old.get(changed[0])!r}, and that of "
                            f"{new['name']} is {new[changed[0]]!r}; remove the directory, or give another")
    if len(index["sources"]) != len(head["sources"]) or index["shard_tokens"] != head["shard_tokens"]:
        was, now = ((len(i["sources"]), i["shard_tokens"]) for i in (index, head))
        raise DataError(f"{directory} was made of {was[0]} files into shards of {was[1]} tokens, and these are {now[0]} into "
                        f"{now[1]}; remove the directory, or give another")


def _check_tokenizer(directory: Path, index: dict[str, Any], fingerprint: str) -> None:
    if index["tokenizer"] != fingerprint:
        raise DataError(f"{directory} was tokenised by another tokenizer ({index['tokenizer'][:12]}, and this one is "
                        f"{fingerprint[:12]}); take the one it keeps, or tokenise the text again into another directory")


class Shards:
    """A complete directory, read-only: `tokens(low, high)` of all shards as one sequence; `ends_D`: where documents end."""

    def __init__(self, directory: str | Path, tokenizer: Tokenizer):
        self.directory = Path(directory)
        index = _read_index(self.directory)
        _check_tokenizer(self.directory, index, tokenizer.fingerprint)
        if not index["complete"]:
            raise DataError(f"{self.directory} is not complete; run the command that began it again")
        self.vocab_size, self.empty = tokenizer.vocab_size, int(index["empty"])
        self._records, dtype = index["shards"], np.dtype(index["dtype"]).newbyteorder("<")
        self._starts = np.cumsum([0, *(record["tokens"] for record in self._records)])
        self._shards = [self._map(r["file"], dtype, r["tokens"]) for r in self._records]
        ends = [self._map(r["file"].replace(".bin", ".ends"), np.dtype("<i8"), r["documents"]) for r in self._records]
        self.ends_D = np.concatenate([part + start for part, start in zip(ends, self._starts, strict=False)])
        self.total = int(self._starts[-1])

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        path = self.directory / name
        size = path.stat().st_size if path.exists() else None
        if size != count * dtype.itemsize:
            found = "does not exist" if size is None else f"has {size:,} bytes"
            raise DataError(f"{path} {found}; {count * dtype.itemsize:,} bytes would be right: restore it, or remove the "
                            "directory and tokenise again")
        return np.memmap(path, dtype, "r")

    def tokens(self, low: int, high: int) -> np.ndarray:
        """Ids [low, high). Raises DataError for one that the tokenizer does not have."""
        parts = []
        for k in range(int(np.searchsorted(self._starts, low, "right")) - 1, len(self._shards)):
            start = int(self._starts[k])
            if start >= high:
                break
            part = self._shards[k][max(0, low - start) : high - start]
            if len(part) and part.max() >= self.vocab_size:
                at = max(0, low - start) + int((part >= self.vocab_size).argmax())
                raise DataError(f"{self.directory / self._records[k]['file']}: token {at} is {self._shards[k][at]}, past the "
                                f"vocabulary of {self.vocab_size}; the shard is damaged: restore it, or tokenise again")
            parts.append(part)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def verify(self) -> None:
        """Read all and compare with the index. Raises DataError naming the shard that differs."""
        for record in self._records:
            for name, key in ((record["file"], "sha256"), (record["file"].replace(".bin", ".ends"), "ends_sha256")):
                with open(self.directory / name, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != record[key]:
                    raise DataError(f"{self.directory / name} is damaged: its SHA-256 is {digest}, the index says {record[key]}: "
                                    "restore it, or remove the directory and tokenise again")
