"""The pages: chat at `/`, the live page at `/runs`, their static files, and the small `/ui` routes that feed them.

The live page reads metrics.jsonl and nothing else; `/ui/metrics` hands out its complete lines from a byte offset on.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from jevons.serve.render import render_markdown

STATIC = Path(__file__).resolve().parent / "static"
MAX_RENDER = 64 * 1024
MAX_READ = 1024 * 1024  # bytes of metrics in one reply; the page asks again while there is more
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = ("default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
           "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache"}


@dataclass
class PageInfo:
    """What the pages show about the process; the callables are asked at every request.

    `model`: name of the model that answers, None while there is none. `taught`: one line. `examples`: questions to try.
    `training`: the stage at work, such as "pretrain, step 120 of 480", or None.
    """

    model: Callable[[], str | None]
    taught: Callable[[], str]
    examples: Callable[[], list[str]]
    dollars_per_hour: float
    training: Callable[[], str | None]


def static_response(name: str, request: Request) -> Response:
    """A file of the static folder by its plain name, with its entity tag; 304 where the browser has it, 404 otherwise."""
    path = STATIC / name
    if path.suffix not in _TYPES or name not in {file.name for file in STATIC.iterdir()}:
        raise HTTPException(404, f"no page or file {name!r}")
    content = path.read_bytes()
    headers = {**_HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:20]}"'}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=f"{_TYPES[path.suffix]}; charset=utf-8")


def parse_lines(data: bytes) -> list[dict[str, Any]]:
    """The JSON objects of metrics lines; anything else is left out, and NaN or infinity (no JSON) becomes None."""
    lines = []
    for raw in data.splitlines():
        try:
            value = json.loads(raw, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def read_metrics(path: Path | None, start: int, mark: str) -> dict[str, Any]:
    """Complete lines of metrics.jsonl from byte `start`: {next, mark, size, lines, reset}.

    `mark` is a checksum of the bytes before `next`; given back, it shows that what was read is still there. Where it is
    not (a resume cut the file and wrote other lines), reading begins again at 0 and the reply says reset.
    """
    try:
        file = open(path, "rb") if path else None
    except FileNotFoundError:
        file = None
    if file is None:
        return {"next": 0, "mark": "", "size": 0, "lines": [], "reset": start > 0}

    def mark_at(offset: int) -> str:
        file.seek(max(0, offset - 256))
        return f"{zlib.crc32(file.read(min(256, offset))):08x}" if offset else ""

    with file:
        size = file.seek(0, 2)
        reset = start > size or bool(mark) and mark != mark_at(start)
        start = 0 if reset else start
        file.seek(start)
        data = file.read(MAX_READ)
        if not data.endswith(b"\n"):
            data += file.readline()
        data = data[: data.rfind(b"\n") + 1]
        after = start + len(data)
        return {"next": after, "mark": mark_at(after), "size": max(size, after), "lines": parse_lines(data), "reset": reset}


async def _limited_body(request: Request, limit: int) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise HTTPException(413, f"the text is over {limit} bytes; send one block at a time")
    return body


def add_pages(app: FastAPI, info: PageInfo, metrics_path: Path | None) -> None:
    """Add the chat page, the live page and their `/ui` routes to `app`; they are left out of its OpenAPI schema."""

    @app.get("/", include_in_schema=False)
    def chat_page(request: Request) -> Response:
        return static_response("chat.html", request)

    @app.get("/runs", include_in_schema=False)
    def runs_page(request: Request) -> Response:
        return static_response("runs.html", request)

    @app.get("/static/{name}", include_in_schema=False)
    def static_file(name: str, request: Request) -> Response:
        return static_response(name, request)

    @app.post("/ui/render", include_in_schema=False)
    async def render(request: Request) -> Response:
        body = await _limited_body(request, 2 * MAX_RENDER)  # escapes in JSON may double a text
        try:
            text = json.loads(body)["text"]
        except (ValueError, RecursionError, KeyError, TypeError):
            raise HTTPException(400, 'the body must be JSON, {"text": "..."}') from None
        if not isinstance(text, str) or len(text.encode("utf-8", "replace")) > MAX_RENDER:
            raise HTTPException(413 if isinstance(text, str) else 400, f"`text` must be a string of at most {MAX_RENDER} bytes")
        html = await run_in_threadpool(render_markdown, text.encode("utf-8", "replace").decode())
        return JSONResponse({"html": html}, headers=_HEADERS)

    @app.get("/ui/info", include_in_schema=False)
    def page_info() -> Response:
        values = {"model": info.model(), "taught": info.taught(), "examples": info.examples(),
                  "dollars_per_hour": info.dollars_per_hour, "training": info.training()}
        return JSONResponse(values, headers=_HEADERS)

    @app.get("/ui/metrics", include_in_schema=False)
    def metrics(start: int = Query(0, alias="from", ge=0), mark: str = "") -> Response:
        return JSONResponse(read_metrics(metrics_path, start, mark), headers=_HEADERS)
