"""What may go wrong with a request, as the documented body {"error": {message, type, param, code}} and its status."""

from __future__ import annotations

import math

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from jevons.chat import ChatError
from jevons.engine.types import PromptTooLong, QueueFull
from jevons.serve.answer import EngineFailed
from jevons.serve.host import Unavailable
from jevons.serve.schema import Unsupported

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
