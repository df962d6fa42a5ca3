"""What every request cost, in tokens, seconds and dollars: totals for /ui/usage and /metrics, rows in SQLite.

The formula, in one place: an engine step's wall time is divided among the requests in it in proportion to the tokens
that each got from it (a step that gave no token, such as one chunk of a long prompt, is divided equally among all
requests the engine has). A request's `seconds` are the sum of its parts, so that the seconds of all requests add up to
the time the engine was busy with them, and `dollars = seconds * dollars_per_hour / 3600`. Waiting costs nothing.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

log = logging.getLogger(__name__)
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)


@dataclass(frozen=True)
class Entry:
    """One request. `finish`: stop, length, cancelled, or the status of an error. `time`: unix seconds at its end."""

    request_id: str
    time: float
    model: str
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    seconds: float
    dollars: float
    finish: str


_SUMMED = ("prompt_tokens", "completion_tokens", "reasoning_tokens", "seconds", "dollars")


# `Engine.stats`: the first are counters, which begin anew with another model; any other number is a gauge.
_ENGINE = {
    "prompt_tokens": "Prompt tokens of admitted requests", "cached_tokens": "Prompt tokens read from the prefix cache",
    "generated_tokens": "Tokens generated", "drafted_tokens": "Tokens drafted by the MTP module",
    "accepted_tokens": "Drafted tokens that were accepted", "preemptions": "Requests put back for want of pages",
    "pages_free": "Cache pages without content", "pages_cached": "Cache pages of known prefixes that nobody uses now",
    "pages_used": "Cache pages in use", "speculating": "1 while tokens are drafted",
    "expert_hit_rate": "Share of experts found on the GPU, or, of mapped ones, of their bytes found in memory",
    "expert_slots": "Experts that the GPU has room for", "expert_uses": "Experts needed, a layer's call each",
    "expert_hits": "Of these, found on the GPU", "expert_copies": "Experts copied to the GPU to stay",
    "expert_bytes_seen": "Bytes of mapped experts looked at before their use", "expert_bytes_resident": "Of these, in memory",
    "major_faults": "Page faults of this process that had to read a disk",
}
_COUNTED = list(_ENGINE)[:6]


class EngineStats:
    """A Prometheus collector of the engine's own numbers."""

    def __init__(self, stats: Callable[[], dict[str, float]]):
        self.stats = stats

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        for name, value in self.stats().items():
            family = CounterMetricFamily if name in _COUNTED else GaugeMetricFamily
            yield family(f"jevons_engine_{name}", _ENGINE.get(name, "A number of the engine"), value=value)


class Ledger:
    """Used from the HTTP thread only. With `path`, rows are kept in that SQLite file and totals go on from it."""

    def __init__(self, dollars_per_hour: float = 0.0, path: str | Path | None = None):
        self.dollars_per_hour = dollars_per_hour
        self.since = time.time()
        self.totals: dict[str, float] = {"requests": 0, **dict.fromkeys(_SUMMED, 0)}
        self.recent: deque[Entry] = deque(maxlen=50)
        self._file = self._open(Path(path)) if path else None
        self._make_metrics()

    def dollars(self, seconds: float) -> float:
        return seconds * self.dollars_per_hour / 3600

    def record(self, entry: Entry) -> None:
        """Book a finished request. A file that cannot be written (a full disk) is logged and loses only its row."""
        self.totals["requests"] += 1
        for name in _SUMMED:
            self.totals[name] += getattr(entry, name)
        self.recent.appendleft(entry)
        for kind in ("prompt", "completion", "reasoning"):
            self._tokens.labels(kind).inc(getattr(entry, f"{kind}_tokens"))
        self._busy.inc(entry.seconds)
        self._dollars.inc(entry.dollars)
        self.outcomes.labels(entry.finish).inc()
        if self._file is not None:
            try:
                with self._file:
                    row = tuple(asdict(entry).values())
                    self._file.execute(f"INSERT INTO requests VALUES ({', '.join('?' * len(row))})", row)
            except sqlite3.Error as error:
                log.warning("the ledger's file did not take request %s: %s", entry.request_id, error)

    def usage(self) -> dict[str, Any]:
        """Totals and the latest requests, newest first."""
        return {**self.totals, "dollars_per_hour": self.dollars_per_hour, "since": self.since,
                "recent": [asdict(entry) for entry in self.recent]}

    def metrics(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def watch(self, counts: Callable[[], tuple[int, int]], stats: Callable[[], dict[str, float]]) -> None:
        """Gauges for requests (running, waiting), and what the engine counts."""
        self._registry.register(EngineStats(stats))
        for index, name in enumerate(("running", "waiting")):
            gauge = Gauge(f"jevons_requests_{name}", f"Requests {name} now", registry=self._registry)
            gauge.set_function(lambda index=index: counts()[index])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _make_metrics(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.outcomes = Counter("jevons_requests", "Requests by how they ended: a finish reason, or the error's status",
                                ["outcome"], registry=registry)
        self.first_token = Histogram("jevons_first_token_seconds", "Time to the first token", buckets=_SECONDS,
                                     registry=registry)
        self._tokens = Counter("jevons_tokens", "Tokens; reasoning ones are completion ones too", ["kind"],
                               registry=registry)
        self._busy = Counter("jevons_engine_busy_seconds", "Engine seconds spent on requests", registry=registry)
        self._dollars = Counter("jevons_dollars", "What the requests cost", registry=registry)

    def _open(self, path: Path) -> sqlite3.Connection:
        """Raises OSError naming the file if it cannot be used."""
        columns = ", ".join(f"{f.name} {dict(str='TEXT', int='INTEGER', float='REAL')[f.type]}" for f in fields(Entry))
        sums = ", ".join(f"COALESCE(SUM({name}), 0)" for name in _SUMMED)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = sqlite3.connect(path, check_same_thread=False)
            file.execute("PRAGMA journal_mode = WAL")
            file.execute("PRAGMA synchronous = NORMAL")
            file.execute(f"CREATE TABLE IF NOT EXISTS requests ({columns})")
            row = file.execute(f"SELECT COUNT(*), {sums} FROM requests").fetchone()
        except sqlite3.Error as error:
            raise OSError(f"{path} cannot be used as the ledger's file: {error}") from None
        self.totals = dict(zip(self.totals, row, strict=True))
        return file
