"""Errors as OpenAI's API words them: `{"error": {"message", "type", "param", "code"}}` and a status."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from fastlm.errors import CapacityError, ConfigError, FastlmError, InferenceError, TokenizerError

log = logging.getLogger("fastlm.serve")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
UNREADABLE = "the body is not JSON in UTF-8, or nested too deeply"


class ApiError(Exception):
    """A refusal that a client is told of."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class JsonResponse(Response):
    """JSON in UTF-8. A lone surrogate, which JSON can spell and UTF-8 can not, stays an escape."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error. Of one that nobody expected, no more than that there was one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, CapacityError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, ConfigError | TokenizerError):
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):
        message = UNREADABLE if error.status_code == 400 else HTTPStatus(error.status_code).phrase
        return ApiError(error.status_code, message, headers=error.headers)
    if isinstance(error, RecursionError):
        return ApiError(400, UNREADABLE)
    if isinstance(error, InferenceError):
        return ApiError(500, str(error))
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why")


def _of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, UNREADABLE)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such argument"
    param = ".".join(place) or None
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


def add_handlers(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        told = as_api_error(error)
        return JsonResponse(told.to_json(), told.status, headers=told.headers)

    for kind in (ApiError, RequestValidationError, HTTPException, FastlmError, RecursionError):
        app.add_exception_handler(kind, handle)
