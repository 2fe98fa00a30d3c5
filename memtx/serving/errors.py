"""What a client is told when something is wrong: one JSON object, what was met and what to do, never a traceback."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from memtx.errors import MemtxError, closest_match
from memtx.inference.deadline import ClosedError, DeadlineExceededError
from memtx.inference.sessions.registry import SessionLimitError, SessionNotFoundError
from memtx.inference.sessions.store import SessionSaveError

logger = logging.getLogger("memtx.serving")

RETRY_AFTER = "5"
"""Seconds after which a full server may be asked again."""


class APIError(MemtxError):
    """A request that is refused.

    Args:
        status_code: of the answer.
        message: was met.
        hint: what to do about it.
        code: for programs.
        param: the field that is wrong, if one is.
    """

    def __init__(
        self, status_code: int, message: str, hint: str = "", *, code: str = "", param: str | None = None
    ) -> None:
        super().__init__(message, hint)
        self.status_code = status_code
        usual = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}
        self.code = code or usual.get(status_code, "invalid_request")
        self.param = param


_ERROR_STATUS: tuple[tuple[type[MemtxError], int, str], ...] = (
    (SessionNotFoundError, 404, "session_not_found"),
    (SessionLimitError, 429, "session_limit_reached"),
    (DeadlineExceededError, 408, "deadline_exceeded"),
    (ClosedError, 503, "shutting_down"),
    (SessionSaveError, 507, "session_save_failed"),
)


def to_api_error(error: BaseException) -> APIError:
    """Return what to tell a client about an error; the server's own mistakes are written to the log."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, MemtxError):
        for kind, status, code in _ERROR_STATUS:
            if isinstance(error, kind):
                return APIError(status, error.message, error.hint, code=code)
        return APIError(400, error.message, error.hint)
    logger.error("a request failed", exc_info=error)
    return APIError(500, "The server failed.", "Its log says why; the sessions are as they were.", code="server_error")


def error_body(error: APIError) -> dict[str, Any]:
    """Return the answer's JSON, in the form that OpenAI's clients read."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error")
    said = {
        "message": str(error),
        "type": kind,
        "param": error.param,
        "code": error.code,
        "detail": error.message,
        "hint": error.hint,
    }
    return {"error": said}


def error_response(error: APIError) -> JSONResponse:
    """Return the response of a problem."""
    headers = {}
    if error.status_code in (429, 503):
        headers["Retry-After"] = RETRY_AFTER
    if error.status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status_code == 408:
        # OpenAI's clients would ask for the same once more, and it would take as long.
        headers["x-should-retry"] = "false"
    return JSONResponse(error_body(error), error.status_code, headers)


def _from_validation_error(error: RequestValidationError) -> APIError:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    # Of a field of several types, the type's name stands behind it.
    name = place[0] if place else None
    if first["type"] == "extra_forbidden":
        name = str(first["ctx"]["name"])
        known = first["ctx"]["known"]
        hint = closest_match(name, known)
        cure = f"Leave it out; its fields are {', '.join(known)}."
        return APIError(400, f"'{name}' is not a field of this request.{hint}", cure, param=name)
    message = str(first["msg"]).removeprefix("Value error, ")
    return APIError(400, f"{'.'.join(place) or 'The body'}: {message}.", "See /openapi.json.", param=name)


def add_exception_handlers(app: FastAPI) -> None:
    """Answer every kind of error in one form."""

    async def handle_error(_: Request, error: Exception) -> JSONResponse:
        return error_response(to_api_error(error))

    async def handle_validation_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(_from_validation_error(error))

    async def handle_http_exception(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        said = {404: "There is nothing at this address.", 405: "This address has no such method."}
        what = said.get(error.status_code, str(error.detail))
        response = error_response(APIError(error.status_code, what, "See /openapi.json."))
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(MemtxError, handle_error)
    app.add_exception_handler(RequestValidationError, handle_validation_error)
    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_exception_handler(Exception, handle_error)
