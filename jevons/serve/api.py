"""The HTTP API: models, chat completions (streamed or whole), health, usage and metrics, in DeepSeek's shapes.

A chat request's life: checked, rendered to ids, submitted to the host; its token events become text, minus stop
strings, split into thought and answer; while nothing comes, keep-alives do; at its end it is booked in the ledger.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from jevons.chat import ChatError, check_roles
from jevons.engine import types
from jevons.engine.types import PromptTooLong, QueueFull
from jevons.serve.answer import Answer, EngineFailed
from jevons.serve.host import EngineHost, ModelChanged, TokenStream, Unavailable
from jevons.serve.ledger import Entry, Ledger
from jevons.serve.schema import ChatRequest, Unsupported

if TYPE_CHECKING:
    from jevons.serve.app import ServeSettings

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error",
          503: "service_unavailable_error"}


class ApiError(HTTPException):
    """An error with the documented body {"error": {message, type, param, code}}."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):
        super().__init__(status, message, headers)
        kind = _TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code or kind}}

    def response(self) -> Response:
        return JSONResponse(self.body, self.status_code, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """The status and body of whatever may go wrong with a chat request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (QueueFull, Unavailable)):
        status, code = (429, "queue_full") if isinstance(error, QueueFull) else (503, "unavailable")
        return ApiError(status, str(error), code=code, headers={"Retry-After": str(math.ceil(error.retry_after))})
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), "messages", "context_length_exceeded")
    if isinstance(error, ChatError):
        return ApiError(400, str(error), "messages", "invalid_messages")
    if isinstance(error, Unsupported):
        return ApiError(400, str(error), error.param, "unsupported_parameter")
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    return ApiError(500, str(error) if isinstance(error, EngineFailed) else f"{type(error).__name__}: {error}")


class ChatRun:
    """One chat request from its submission to its line in the ledger."""

    def __init__(self, api: ChatApi, body: ChatRequest):
        self.api, self.body, self.conversation = api, body, body.conversation()
        self.id, self.created, self.begin = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), time.monotonic()
        self.model = body.model or api.model_names()[0]  # the engine's own name once it is submitted
        self.stream: TokenStream | None = None
        self.answer: Answer | None = None

    @property
    def ended(self) -> bool:
        return bool(self.answer and self.answer.finish)

    async def deltas(self, first_wait: float) -> AsyncIterator[tuple[str, str] | None]:
        """(reasoning, content) as they come, and None whenever nothing came for a while (`first_wait`, then
        settings.keep_alive). Closing it cancels the request."""
        host, wait, limit = self.api.host, first_wait, time.monotonic() + self.api.host.max_wait
        finish = "error"
        try:
            while not self.ended:
                try:
                    if self.stream is None:
                        await self._submit(wait)
                    events = await self.stream.get(min(wait, max(0.0, limit - time.monotonic())))
                except TimeoutError:
                    if time.monotonic() >= limit:
                        raise Unavailable(f"no token came within {host.max_wait:g} seconds: the model is loading, "
                                          "training, or busy with others; try again later") from None
                    yield None
                    wait = self.api.settings.keep_alive
                    continue
                except ModelChanged:
                    if self.answer.tokens:
                        raise
                    self.stream = None
                    continue
                if not self.answer.tokens:
                    self.api.ledger.first_token.observe(time.monotonic() - self.begin)
                limit = time.monotonic() + host.max_wait
                delta = self.answer.feed(events)
                if delta != ("", "") or self.ended:
                    yield delta
            finish = self.answer.finish
        except (asyncio.CancelledError, GeneratorExit):
            finish = self.answer.finish if self.ended else "cancelled"
            raise
        except Exception as error:
            finish = str(as_api_error(error).status_code)
            raise
        finally:
            self._close(finish)

    async def _submit(self, timeout: float) -> None:
        """Render and submit, once there is a model and a tokenizer. Raises TimeoutError; can be called again."""
        api, host = self.api, self.api.host
        host.check_room(api.loading)
        api.loading += 1
        try:
            async with asyncio.timeout(timeout):
                while True:
                    epoch, tokenizer = host.epoch, api.tokenizer_getter()
                    if host.ready and tokenizer is not None:
                        break
                    await asyncio.sleep(0.05)
                    host.check_room()
            ids = await asyncio.to_thread(tokenizer.renderer().prompt, self.conversation)
        finally:
            api.loading -= 1
        self.answer = Answer(tokenizer, self.body.stops(), ids)
        self.model = host.model_name or self.model
        params = replace(self.body.sampling(), stop_token_ids=tokenizer.stop_ids)
        self.stream = host.submit(types.Request(ids, params), epoch)

    def _close(self, finish: str) -> None:
        """Free the engine's slot and book what was used."""
        ledger, stream, answer = self.api.ledger, self.stream, self.answer
        if stream is None or answer is None:
            ledger.outcomes.labels(finish).inc()
            return
        self.api.host.cancel(stream.request.request_id)
        ledger.record(Entry(self.id, time.time(), self.model, len(stream.request.prompt_ids), answer.tokens,
                            answer.reasoning_tokens, stream.seconds, ledger.dollars(stream.seconds), finish))

    def usage(self) -> dict[str, Any]:
        prompt, answer = len(self.stream.request.prompt_ids), self.answer
        return {
            "prompt_tokens": prompt, "completion_tokens": answer.tokens, "total_tokens": prompt + answer.tokens,
            "prompt_cache_hit_tokens": 0, "prompt_cache_miss_tokens": prompt,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
            "cost": {"seconds": self.stream.seconds, "dollars": self.api.ledger.dollars(self.stream.seconds)},
        }

    async def chunks(self) -> AsyncIterator[bytes]:
        """The server-sent events of a stream, in the order and with the nulls that DeepSeek's service sends."""
        kind = "chat.completion.chunk"

        def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return _event(self._reply(kind, [choice], **more))

        begun = False
        async with aclosing(self.deltas(self.api.settings.grace)) as deltas:
            async for delta in deltas:
                if delta is None:
                    yield b": keep-alive\n\n"
                    continue
                if not begun:
                    begun = True
                    yield chunk({"role": "assistant", "content": None, "reasoning_content": ""})
                if delta[0]:
                    yield chunk({"content": None, "reasoning_content": delta[0]})
                if delta[1]:
                    yield chunk({"content": delta[1], "reasoning_content": None})
        usage = self.usage()
        yield chunk({"content": "", "reasoning_content": None}, self.answer.finish, usage=usage)
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield _event(self._reply(kind, [], usage=usage))
        yield b"data: [DONE]\n\n"

    async def whole(self) -> AsyncIterator[bytes]:
        """Blank lines while it takes long, then the completion as one JSON object (which may begin with blank lines)."""
        thought, answer, settings = "", "", self.api.settings
        due = self.begin + settings.blank_after
        async with aclosing(self.deltas(min(settings.keep_alive, settings.blank_after))) as deltas:
            async for delta in deltas:
                if delta is not None:
                    thought, answer = thought + delta[0], answer + delta[1]
                if time.monotonic() >= due and not self.ended:
                    due = time.monotonic() + settings.keep_alive
                    yield b"\n"
        message = {"role": "assistant", "content": answer, "reasoning_content": thought}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.answer.finish}
        yield _dump(self._reply("chat.completion", [choice], usage=self.usage()))

    def _reply(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}


class ChatApi:
    """What the routes share."""

    def __init__(self, host: EngineHost, tokenizer_getter: Callable[[], Any], settings: ServeSettings, ledger: Ledger):
        self.host, self.tokenizer_getter, self.settings, self.ledger = host, tokenizer_getter, settings, ledger
        self.loading = 0  # requests that wait for a model or are being rendered
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
            return Response(first, media_type="application/json")
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        media_type = "text/event-stream" if body.stream else "application/json"
        return _Stream(_rest(first, pieces, body.stream), headers=headers, media_type=media_type)

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
            yield _event(body) + b"data: [DONE]\n\n" if stream else _dump(body)


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _event(value: Any) -> bytes:
    return b"data: " + _dump(value) + b"\n\n"


def add_routes(app: FastAPI, api: ChatApi) -> None:
    """Every path with and without /v1."""
    for prefix in ("/v1", ""):
        app.get(f"{prefix}/models")(api.models)
        app.post(f"{prefix}/chat/completions")(api.chat)
    app.get("/health")(api.health)

    @app.get("/ui/usage")
    async def usage() -> dict[str, Any]:
        return api.ledger.usage()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(api.ledger.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")
