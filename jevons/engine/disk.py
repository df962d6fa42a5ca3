"""Cached pages on disk, so that prefixes survive a restart. No torch here: a page is bytes under a key.

One file a page, checksummed over key and bytes: what is damaged, renamed or cut short is a miss and is deleted. Keys begin at
the checkpoint's fingerprint (see `PagePool`), so pages of other weights are never found.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import tempfile
import threading
from pathlib import Path

log = logging.getLogger(__name__)
MAGIC = b"jevons-page-1\n"


class DiskTier:
    """Up to `max_bytes` of pages in `directory`. Writes happen in a thread of their own, and never fail a request. Raises
    ValueError where `directory` is a file, OSError where it cannot be made."""

    def __init__(self, directory: Path, max_bytes: int, waiting: int = 256):
        self.directory, self.max_bytes = Path(directory), max_bytes
        self._lock = threading.Lock()
        self._sizes: dict[bytes, int] = {}  # the longest unused first
        self._queue: queue.Queue[tuple[bytes, bytes] | None] = queue.Queue(waiting)
        if self.directory.is_file():
            raise ValueError(f"disk cache {self.directory} is a file; a directory would be right")
        self.directory.mkdir(parents=True, exist_ok=True)
        files = []
        for path in self.directory.glob("*.page"):
            try:
                stat = path.stat()
                files.append((stat.st_mtime, bytes.fromhex(path.stem), stat.st_size))
            except (OSError, ValueError):  # gone meanwhile, or not one of ours
                continue
        for _, key, size in sorted(files):
            self._sizes[key] = size
        self._total = sum(self._sizes.values())
        self._writer = threading.Thread(target=self._write_all, name="page writer", daemon=True)
        self._writer.start()

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return key in self._sizes

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._total

    def get(self, key: bytes) -> bytes | None:
        """A page's bytes; None where it is not there or is damaged."""
        with self._lock:
            if key not in self._sizes:
                return None
            self._sizes[key] = self._sizes.pop(key)
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            data = b""
        head, payload = data[: len(MAGIC) + 32], data[len(MAGIC) + 32 :]
        if head == MAGIC + _digest(key, payload):
            return payload
        with self._lock:
            self._total -= self._sizes.pop(key, 0)
        if data:
            log.warning("%s is damaged; it is deleted and computed again", path)
        path.unlink(missing_ok=True)
        return None

    def put(self, key: bytes, payload: bytes) -> None:
        """Write a page soon. Where the writer is far behind, it is left out."""
        try:
            self._queue.put_nowait((key, payload))
        except queue.Full:
            pass

    def close(self) -> None:
        """Finish what is to be written."""
        self._queue.put(None)
        self._writer.join()

    def _path(self, key: bytes) -> Path:
        return self.directory / f"{key.hex()}.page"

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            key, payload = item
            if key in self:
                continue
            try:
                self._write(key, payload)
            except OSError as error:
                log.warning("a cached page could not be written to %s: %s", self.directory, error)

    def _write(self, key: bytes, payload: bytes) -> None:
        size = len(MAGIC) + 32 + len(payload)
        if size > self.max_bytes:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._lock:
            gone = []
            while self._sizes and self._total + size > self.max_bytes:
                oldest = next(iter(self._sizes))
                self._total -= self._sizes.pop(oldest)
                gone.append(oldest)
        for oldest in gone:
            self._path(oldest).unlink(missing_ok=True)
        handle, name = tempfile.mkstemp(dir=self.directory)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + _digest(key, payload) + payload)
            os.replace(name, self._path(key))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        with self._lock:
            self._sizes[key] = size
            self._total += size


def _digest(key: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(key + payload, digest_size=32).digest()
