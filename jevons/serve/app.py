"""The application and its server: who may ask, how errors look, and uvicorn in a thread of its own."""

from __future__ import annotations

import errno
import hashlib
import hmac
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from jevons.serve.api import ChatApi, add_routes
from jevons.serve.errors import ApiError
from jevons.serve.host import EngineHost
from jevons.serve.ledger import Ledger
from jevons.serve.pages import PageInfo, add_pages

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_KEYED = ("/v1/", "/models", "/chat/", "/metrics", "/ui/usage")  # paths that need a key where keys are set
_DRAIN = 2**28  # bytes of a body too large that are read and dropped, so that the client gets to see its 413


@dataclass(frozen=True)
class ServeSettings:
    """`api_key_hashes`: sha256 in hex of each accepted key, none for no keys. `allow_hosts`: names beyond the loopback's
    that Host and Origin may have. `model_name`: a name that always means the current model. Times are in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_hashes: Sequence[str] = ()
    allow_hosts: Sequence[str] = ()
    dollars_per_hour: float = 0.0
    model_name: str | None = None
    max_thinking_tokens: int | None = None  # for requests that do not say
    closing_words: str = ""  # what a thought that is closed early ends with
    max_body: int = 8 * 2**20
    keep_alive: float = 2.0  # between signs of life while there is nothing to send
    grace: float = 1.0  # a stream's status is open this long; later errors come as events
    blank_after: float = 10.0  # the same without streaming, where such an error is harder on clients
    ledger_path: Path | None = None


class Guard:
    """What is refused before anything reads the request: foreign Host or Origin, a wrong key, a body too large.

    Web pages can reach a loopback server by rebinding their own name to it (so Host is checked) and can post to it
    blindly (so Origin is).
    """

    def __init__(self, app: Any, settings: ServeSettings):
        self.app, self.settings = app, settings
        self.allowed = {*_LOOPBACK, *(name.lower() for name in settings.allow_hosts)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, limit, size = Headers(scope=scope), self.settings.max_body, 0
        if refusal := self.refuse(scope, headers):
            return await refusal.response()(scope, receive, send)
        too_large = ApiError(413, f"the body is larger than {limit} bytes", None, "body_too_large", {"Connection": "close"})

        async def drop(message: Any) -> None:
            nonlocal size
            while message.get("more_body") and size < _DRAIN:
                message = await receive()
                size += len(message.get("body", b""))

        async def limited() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                await drop(message)
                raise too_large
            return message

        if (length := headers.get("content-length", "")).isdecimal() and int(length) > limit:
            if "expect" not in headers:  # such a client sends nothing before it is told to
                await drop({"more_body": True})
            return await too_large.response()(scope, receive, send)
        await self.app(scope, limited, send)

    def refuse(self, scope: Any, headers: Headers) -> ApiError | None:
        host, origin, path = headers.get("host", ""), headers.get("origin"), scope["path"]
        if self.settings.host in _LOOPBACK and _hostname(f"//{host}") not in self.allowed:
            return ApiError(403, f"Host {host!r} is not this server; --allow-host adds a name", code="foreign_host")
        if origin is not None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            same = origin.lower().partition("//")[2] == host.lower() != ""
            if not same and _hostname(origin) not in {name.lower() for name in self.settings.allow_hosts}:
                return ApiError(403, f"Origin {origin!r} may not post here; --allow-host adds a name", code="foreign_origin")
        if self.settings.api_key_hashes and (path + "/").startswith(_KEYED):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
            known = [hmac.compare_digest(digest, each.lower()) for each in self.settings.api_key_hashes]
            if scheme.lower() != "bearer" or not any(known):
                return ApiError(401, "a valid API key is needed: send Authorization: Bearer KEY", code="invalid_api_key",
                                headers={"WWW-Authenticate": "Bearer"})
        return None


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _validation_error(error: RequestValidationError) -> ApiError:
    """422 names the first wrong parameter; a body that is no JSON object is 400."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', message)}", code="invalid_json")
    if first["loc"] == ("body",):
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json", code="invalid_json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:]).lstrip(".")
    value, said = first.get("input"), param
    if first["type"] != "missing" and (value is None or isinstance(value, (str, int, float))):
        said += f" is {value!r:.60}"
    return ApiError(422, f"{said}: {message}", param, "invalid_parameter")


def create_app(host: EngineHost, tokenizer_getter: Callable[[], Any], settings: ServeSettings,
               page_info: PageInfo | None = None, metrics_path: Path | None = None) -> FastAPI:
    """`tokenizer_getter` gives the current model's tokenizer, None while there is none: it may change whenever the host's
    engine does, and must be changed before it. Without `page_info` there are no pages."""
    ledger = Ledger(settings.dollars_per_hour, settings.ledger_path)
    ledger.watch(host.counts, lambda: host.stats)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        ledger.close()

    app = FastAPI(title="Jevons", docs_url=None, redoc_url=None, lifespan=lifespan)  # those pages load from elsewhere
    app.state.ledger = ledger
    app.add_middleware(Guard, settings=settings)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        error = error if isinstance(error, ApiError) else ApiError(error.status_code, str(error.detail), headers=error.headers)
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _validation_error(error).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return ApiError(500, f"internal error: {type(error).__name__}").response()

    add_routes(app, ChatApi(host, tokenizer_getter, settings, ledger))
    if page_info is not None:
        add_pages(app, page_info, metrics_path)
    return app


class Server:
    """uvicorn in a daemon thread. Port 0 takes a free one; `url` says which."""

    def __init__(self, app: FastAPI, settings: ServeSettings):
        self.settings, self._port = settings, settings.port
        self._socket: socket.socket | None = None
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2))
        self._thread = threading.Thread(target=lambda: self._server.run(sockets=[self._socket]), name="http", daemon=True)

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.settings.host, self.settings.host)
        return f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"

    def start(self, timeout: float = 10.0) -> None:
        """Bind, listen and serve. Raises OSError that names the address if it cannot be bound."""
        host, port = self.settings.host, self.settings.port
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self._socket = socket.socket(family, kind)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
            self._socket.listen(2048)  # now: until someone listens, a second server may bind the same port
        except OSError as error:
            if self._socket is not None:
                self._socket.close()
            hint = "is in use by another program; choose a free port with --port" if error.errno == errno.EADDRINUSE else \
                f"cannot be bound: {error.strerror}"
            raise OSError(error.errno, f"port {port} on {host} {hint}") from None
        self._port = self._socket.getsockname()[1]
        self._thread.start()
        deadline = time.monotonic() + timeout
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError(f"the server at {self.url} did not start")
            time.sleep(0.01)

    def stop(self, timeout: float = 10.0) -> None:
        """Stop listening, give open responses two seconds, and wait for the thread."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(timeout)
        if self._socket is not None:
            self._socket.close()
