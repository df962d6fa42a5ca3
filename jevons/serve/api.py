"""The HTTP API: models, chat completions (streamed or whole), health, usage and metrics, in DeepSeek's shapes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from jevons.chat import check_roles
from jevons.serve.completion import ChatRun, dump, event
from jevons.serve.errors import ApiError, as_api_error
from jevons.serve.host import EngineHost
from jevons.serve.ledger import Ledger
from jevons.serve.schema import ChatRequest

if TYPE_CHECKING:
    from jevons.serve.app import ServeSettings


class ChatApi:
    """What the routes share."""

    def __init__(self, host: EngineHost, tokenizer_getter: Callable[[], Any], settings: ServeSettings, ledger: Ledger):
        self.host, self.tokenizer_getter, self.settings, self.ledger = host, tokenizer_getter, settings, ledger
        self.loading = 0  # requests that wait for a model or are being rendered
        self.open: dict[str, ChatRun] = {}  # chat requests by the ids that their clients see
        self.started = int(time.time())

    def model_names(self) -> list[str]:
        """Names that requests may use, the current one first."""
        names = dict.fromkeys(name for name in (self.host.model_name, self.settings.model_name) if name)
        return list(names) or ["jevons"]

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        try:
            body.refuse_unsupported()
            check_roles(body.conversation())
            names = self.model_names()
            if body.model is not None and body.model not in names:
                raise ApiError(400, f"the model {body.model!r} does not exist; this server has {', '.join(names)}", "model",
                               "model_not_found")
        except ValueError as error:
            raise as_api_error(error) from None
        run = ChatRun(self, body)
        pieces = run.chunks() if body.stream else run.whole()
        try:
            first = await _first(pieces, request)
        except Exception as error:
            raise as_api_error(error) from error
        if first is None:
            return Response(status_code=499)  # nobody reads it
        if not body.stream and run.ended:
            return Response(first, headers={"X-Request-ID": run.id}, media_type="application/json")
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "X-Request-ID": run.id}
        media_type = "text/event-stream" if body.stream else "application/json"
        return _Stream(_rest(first, pieces, body.stream), headers=headers, media_type=media_type)

    async def answer_now(self, completion_id: str) -> dict[str, Any]:
        """Close the open thoughts of a chat request; the answers go on. May be repeated."""
        if (run := self.open.get(completion_id)) is None:
            raise ApiError(404, f"no chat completion {completion_id!r} is at work; it may have ended", "id", "not_found")
        return {"id": run.id, "object": "chat.completion.answer_now", "closes_thought": run.end_thoughts()}

    async def models(self) -> dict[str, Any]:
        length = self.host.max_len
        return {"object": "list", "data": [{"id": name, "object": "model", "created": self.started, "owned_by": "jevons",
                                            "context_length": length} for name in self.model_names()]}

    async def health(self) -> dict[str, Any]:
        running, waiting = self.host.counts()
        return {"status": "ok" if self.host.ready else "loading", "model": self.host.model_name, "running": running,
                "waiting": waiting + self.loading}


class _Stream(StreamingResponse):
    """Closes its iterator whatever happens, so that a client that left frees its slot now and not at collection."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


async def _first(pieces: AsyncIterator[bytes], request: Request) -> bytes | None:
    """The first piece, which decides the status; None if the client left before it came."""
    piece, gone = asyncio.ensure_future(anext(pieces)), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({piece, gone}, return_when=asyncio.FIRST_COMPLETED)
        if piece.done():
            return piece.result()
    finally:
        gone.cancel()
        piece.cancel()
        await asyncio.wait({piece, gone})
    return None


async def _rest(first: bytes, pieces: AsyncIterator[bytes], stream: bool) -> AsyncIterator[bytes]:
    """All pieces; an error this late (the status has been sent) is an error object in the body."""
    async with aclosing(pieces):
        yield first
        try:
            async for piece in pieces:
                yield piece
        except Exception as error:
            body = as_api_error(error).body
            yield event(body) + b"data: [DONE]\n\n" if stream else dump(body)


def add_routes(app: FastAPI, api: ChatApi) -> None:
    """Every path with and without /v1."""
    for prefix in ("/v1", ""):
        app.get(f"{prefix}/models")(api.models)
        app.post(f"{prefix}/chat/completions")(api.chat)
        app.post(f"{prefix}/chat/completions/{{completion_id}}/answer_now")(api.answer_now)
    app.get("/health")(api.health)

    @app.get("/ui/usage")
    async def usage() -> dict[str, Any]:
        return api.ledger.usage()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(api.ledger.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")
