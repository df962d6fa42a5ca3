"""Documents of text files, JSONL and parquet, on this machine or on a hub. Errors name the file, line or row, and field."""

from __future__ import annotations

import codecs
import fnmatch
import glob
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jevons.recipe import SourceTable

HUB = "hub:"
FORMATS = {".txt": "text", ".text": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
BLOCK = 2**20  # bytes of a text file read at a time
ROWS = 256  # parquet rows read at a time


class DataError(ValueError):
    """Text or shards that cannot be read; the message names the file, the line or row, and the field."""


class Piece(NamedTuple):
    """A document, or a part of one: a text file without separator comes in pieces that end with a line."""

    text: str
    ends: bool  # the document ends with it
    read: int  # bytes of the file so far


@dataclass(frozen=True)
class File:
    """A file of a source; `stamp` changes when it does: modification time in ns, or the hub's blob."""

    path: str
    source: SourceTable
    format: str
    size: int
    stamp: str
    repo: str = ""
    commit: str = ""

    @property
    def name(self) -> str:
        return f"{HUB}{self.repo}/{self.path}" if self.repo else self.path

    def record(self) -> dict[str, Any]:
        """What must be the same for shards of it to be the same, wherever it lies."""
        return {"name": self.path if self.repo else Path(self.path).name, "size": self.size, "stamp": self.stamp,
                "format": self.format, "key": self.source.keys, "separator": self.source.separator}

    def pieces(self, scratch: Path) -> Iterator[Piece]:
        """Its text, in order. A hub's file lies in `scratch` meanwhile. Raises DataError."""
        read = {"text": _text, "jsonl": _jsonl, "parquet": _parquet}[self.format]
        with self._local(scratch) as path:
            yield from read(path, self)

    @contextmanager
    def _local(self, scratch: Path) -> Iterator[Path]:
        if not self.repo:
            yield Path(self.path)
            return
        from huggingface_hub import hf_hub_download

        shutil.rmtree(scratch, ignore_errors=True)  # a killed process may have left one there
        try:
            yield Path(_asked(self.name, lambda: hf_hub_download(
                self.repo, self.path, repo_type="dataset", revision=self.commit, local_dir=scratch)))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def find_files(source: SourceTable) -> list[File]:
    """The files of a source, in the order of their names. Raises DataError where there is none that can be read."""
    if source.path.startswith(HUB):
        found = _hub_files(source)
    else:
        root = Path(source.path)
        if root.is_dir():
            paths = sorted(p for p in root.rglob("*") if p.is_file() and (source.format or p.suffix in FORMATS))
        else:
            found = map(Path, glob.glob(source.path, recursive=True))
            paths = [root] if root.is_file() else sorted(p for p in found if p.is_file())
        found = [File(str(p), source, _format(str(p), source), p.stat().st_size, str(p.stat().st_mtime_ns)) for p in paths]
    if not found:
        exists = "holds no file that can be read" if Path(source.path).exists() else "does not exist"
        raise DataError(f"{source.path} {exists}; a file, folder or glob of {', '.join(FORMATS)} would be right, or "
                        f"{HUB}OWNER/NAME")
    return found


def _format(path: str, source: SourceTable) -> str:
    found = source.format or FORMATS.get(Path(path).suffix)
    if found is None:
        raise DataError(f"{path}: the ending says no format; `format` can be one of text, jsonl, parquet")
    return found


def _hub_files(source: SourceTable) -> list[File]:
    from huggingface_hub import HfApi

    owner, _, rest = source.path.removeprefix(HUB).partition("/")
    name, _, pattern = rest.partition("/")
    name, _, revision = name.partition("@")
    repo = f"{owner}/{name}"
    info = _asked(source.path, lambda: HfApi().dataset_info(repo, revision=revision or None, files_metadata=True))
    chosen = [f for f in info.siblings or [] if (fnmatch.fnmatch(f.rfilename, pattern) if pattern else
                                                 f.rfilename.endswith((".parquet", ".jsonl")))]
    return [File(f.rfilename, source, _format(f.rfilename, source), f.size or 0, str(f.blob_id), repo, info.sha)
            for f in sorted(chosen, key=lambda f: f.rfilename)]


def _asked(name: str, ask: Any) -> Any:
    """What the hub answers; its many errors as one of ours."""
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        return ask()
    except (HTTPError, HFValidationError, OSError, ValueError) as error:
        raise DataError(f"{name} could not be fetched: {' '.join(str(error).split())}") from error


def _text(path: Path, file: File) -> Iterator[Piece]:
    decoder, rest, lines, separator = codecs.getincrementaldecoder("utf-8-sig")(), "", 1, file.source.separator
    with open(path, "rb") as f:
        while True:
            block = f.read(BLOCK)
            try:
                rest += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line, at = lines + error.object[: error.start].count(10), f.tell() - len(error.object) + error.start
                raise DataError(f"{file.name} line {line}: not UTF-8 text: {error.reason} at byte {at}") from None
            lines += block.count(b"\n")
            at = f.tell()
            if separator:
                *whole, rest = rest.split(separator)
                yield from (Piece(text, True, at) for text in whole)
            elif block and not rest.isspace() and (cut := rest.rfind("\n") + 1 or (len(rest) if len(rest) > 4 * BLOCK else 0)):
                yield Piece(rest[:cut], False, at)
                rest = rest[cut:]
            if not block:
                yield Piece(rest, True, at)
                return


def json_line(line: bytes, where: str) -> Any:
    """One line of JSONL. Raises DataError naming `where`."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None


def _jsonl(path: Path, file: File) -> Iterator[Piece]:
    read = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            where, read = f"{file.name} line {number}", read + len(line)
            if not line.strip():
                continue
            row = json_line(line, where)
            if not isinstance(row, dict):
                raise DataError(f"{where}: a {type(row).__name__}; an object with the key {file.source.keys[0]!r} would be right")
            yield Piece(_join(row, file, where), True, read)


def _parquet(path: Path, file: File) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            columns, row = table.schema_arrow.names, 0
            if missing := [key for key in file.source.keys if key not in columns]:
                raise DataError(f"{file.name}: no column {missing[0]!r}; it has {', '.join(columns)}")
            for batch in table.iter_batches(ROWS, columns=file.source.keys):
                for values in batch.to_pylist():
                    row += 1
                    text = _join(values, file, f"{file.name} row {row}")
                    yield Piece(text, True, file.size * row // table.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.name}: unreadable parquet: {' '.join(str(error).split())}") from None


def _join(row: dict[str, Any], file: File, where: str) -> str:
    """The texts under the source's keys, joined by newlines; null is an empty text."""
    texts = []
    for key in file.source.keys:
        if key not in row:
            raise DataError(f"{where}: no key {key!r}; it has {', '.join(map(repr, row)) or 'none'}")
        value = row[key]
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {key!r} is {str(value):.40} ({type(value).__name__}); a text would be right")
        texts.append(value or "")
    return "\n".join(texts)
