"""What a client is told when something is wrong: one JSON object, what was met and what to do, never a traceback."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from memtx.errors import MemtxError, nearest
from memtx.inference.engine import ClosedError, OutOfTimeError
from memtx.inference.shelf import UnsavedError
from memtx.inference.table import FullError, NoSuchSessionError

log = logging.getLogger("memtx.serving")

RETRY_AFTER = "5"
"""Seconds after which a full server may be asked again."""


class Problem(MemtxError):
    """A request that is refused.

    Args:
        status: of the answer.
        what: was met.
        cure: what to do about it.
        code: for programs.
        param: the field that is wrong, if one is.
    """

    def __init__(self, status: int, what: str, cure: str = "", *, code: str = "", param: str | None = None) -> None:
        super().__init__(what, cure)
        self.status = status
        usual = {401: "invalid_api_key", 404: "not_found", 429: "server_full"}
        self.code = code or usual.get(status, "invalid_request")
        self.param = param


_STATUS: tuple[tuple[type[MemtxError], int, str], ...] = (
    (NoSuchSessionError, 404, "session_not_found"),
    (FullError, 429, "server_full"),
    (OutOfTimeError, 408, "out_of_time"),
    (ClosedError, 503, "closing"),
    (UnsavedError, 507, "not_saved"),
)


def problem_of(error: BaseException) -> Problem:
    """Return what to tell a client about an error; the server's own mistakes are written to the log."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, MemtxError):
        for kind, status, code in _STATUS:
            if isinstance(error, kind):
                return Problem(status, error.what, error.cure, code=code)
        return Problem(400, error.what, error.cure)
    log.error("a request failed", exc_info=error)
    return Problem(500, "The server failed.", "Its log says why; the sessions are as they were.", code="server_error")


def body_of(problem: Problem) -> dict[str, Any]:
    """Return the answer's JSON, in the form that OpenAI's clients read."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(problem.status, "invalid_request_error" if problem.status < 500 else "server_error")
    said = {
        "message": str(problem),
        "type": kind,
        "param": problem.param,
        "code": problem.code,
        "what": problem.what,
        "to_do": problem.cure,
    }
    return {"error": said}


def answer(problem: Problem) -> JSONResponse:
    """Return the response of a problem."""
    headers = {}
    if problem.status in (429, 503):
        headers["Retry-After"] = RETRY_AFTER
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if problem.status == 408:
        # OpenAI's clients would ask for the same once more, and it would take as long.
        headers["x-should-retry"] = "false"
    return JSONResponse(body_of(problem), problem.status, headers)


def _field(request: RequestValidationError) -> Problem:
    first = request.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    # Of a field of several types, the type's name stands behind it.
    name = place[0] if place else None
    if first["type"] == "extra_forbidden":
        name = str(first["ctx"]["name"])
        known = first["ctx"]["known"]
        hint = nearest(name, known)
        cure = f"Leave it out; its fields are {', '.join(known)}."
        return Problem(400, f"'{name}' is not a field of this request.{hint}", cure, param=name)
    message = str(first["msg"]).removeprefix("Value error, ")
    return Problem(400, f"{'.'.join(place) or 'The body'}: {message}.", "See /openapi.json.", param=name)


def install(app: FastAPI) -> None:
    """Answer every kind of error in one form."""

    async def from_error(_: Request, error: Exception) -> JSONResponse:
        return answer(problem_of(error))

    async def from_field(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer(_field(error))

    async def from_status(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        said = {404: "There is nothing at this address.", 405: "This address has no such method."}
        what = said.get(error.status_code, str(error.detail))
        response = answer(Problem(error.status_code, what, "See /openapi.json."))
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(MemtxError, from_error)
    app.add_exception_handler(RequestValidationError, from_field)
    app.add_exception_handler(HTTPException, from_status)
    app.add_exception_handler(Exception, from_error)
